//! The control tree: every path with what it shows and what may be written to it, as one table ([`ATTRIBUTES`]).
//!
//! The paths and values of the 2007 tree are kept byte for byte; sizes and addresses are in sectors of 512 bytes. Pure: it is made of
//! what the owner publishes, and what is written becomes a [`Command`]. Values come without the newline that a file of them ends in.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::control::command::{Command, Refusal};
use crate::control::node::{Migrate, NodeAsk, Suspend, Ttl};
use crate::control::scrub::Scrub;
use crate::control::status::{ArrayStatus, Gate, NodeStatus, ReplicaStatus, State, Trust};
use crate::control::target::Target;
use crate::errno::Errno;
use crate::units::SECTOR_BYTES;

/// The directory of arrays, where every path begins.
pub const DEVICES: &str = "devices";
/// The directory of a node's replicas.
const REPLICAS: &str = "replicas";

/// What a path shows.
#[derive(Clone, Copy)]
enum Show {
    /// Nothing: it is there to be written.
    Never,
    /// Something of an array.
    Array(fn(&ArrayStatus) -> String),
    /// Something of a node.
    Node(fn(&ArrayStatus, &NodeStatus) -> String),
    /// Something of a replica.
    Replica(fn(&NodeStatus, &ReplicaStatus) -> String),
}

/// What may be written to a path.
#[derive(Clone, Copy)]
enum Store {
    /// Nothing.
    Never,
    /// Something that changes an array.
    Array(When, fn(&ArrayStatus, &str) -> Result<Command, Refusal>),
    /// Something that is asked about a node.
    Node(When, fn(&str) -> Result<NodeAsk, Refusal>),
}

/// When something may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// While the array is not in use.
    Stopped,
    /// While it is.
    Started,
}

/// One row of the table.
struct Attribute {
    /// Below the array's directory; `n-*` is each node and `*` each replica.
    path: &'static str,
    show: Show,
    store: Store,
}

const fn row(path: &'static str, show: Show, store: Store) -> Attribute {
    Attribute { path, show, store }
}

/// The table. The first seven rows are those of 2007.
const ATTRIBUTES: &[Attribute] = &[
    row("alg", Show::Array(alg), Store::Never),
    row("name", Show::Array(|array| array.name.clone()), Store::Never),
    row("nodes", Show::Array(nodes), Store::Never),
    row("remove_all_nodes", Show::Never, Store::Array(When::Stopped, remove_all_nodes)),
    row("n-*/type", Show::Node(|_, node| kind(node)), Store::Never),
    row("n-*/size", Show::Node(|_, node| sectors(node.size)), Store::Never),
    row("n-*/start", Show::Node(|_, node| node.start.0.to_string()), Store::Never),
    row("state", Show::Array(|array| array.state.word().to_owned()), Store::Never),
    row("device", Show::Array(|array| array.device.clone().unwrap_or_default()), Store::Never),
    row(
        "size",
        Show::Array(|array| array.spec.as_ref().map_or_else(String::new, |spec| sectors(spec.size))),
        Store::Never,
    ),
    row("epoch", Show::Array(epoch), Store::Never),
    row("tags_free", Show::Array(|array| array.tags_free.unwrap_or(0).to_string()), Store::Never),
    row("n-*/state", Show::Node(|_, node| state(node).to_owned()), Store::Never),
    row("n-*/suspend", Show::Node(suspended), Store::Node(When::Started, suspend)),
    row("n-*/migrate", Show::Node(migrating), Store::Node(When::Started, migrate)),
    row("n-*/progress", Show::Node(progress), Store::Never),
    row("n-*/scrub", Show::Node(scrubbing), Store::Node(When::Started, scrub)),
    row("n-*/in_flight", Show::Node(|_, node| node.counters.in_flight.to_string()), Store::Never),
    row("n-*/parked", Show::Node(|_, node| node.parked.to_string()), Store::Never),
    row("n-*/errors", Show::Node(|_, node| node.counters.errors.to_string()), Store::Never),
    row("n-*/epoch", Show::Node(|array, _| epoch(array)), Store::Never),
    row("n-*/replicas/*/target", Show::Replica(|_, replica| replica.target.to_string()), Store::Never),
    row("n-*/replicas/*/state", Show::Replica(|_, replica| replica.state.word().to_owned()), Store::Never),
    row("n-*/replicas/*/synced", Show::Replica(synced), Store::Never),
    row(
        "n-*/replicas/*/rescued_reads",
        Show::Replica(|_, replica| replica.counters.rescued_reads.to_string()),
        Store::Never,
    ),
    row("n-*/replicas/*/damaged", Show::Replica(|_, replica| replica.counters.damaged.to_string()), Store::Never),
];

fn sectors(bytes: u64) -> String {
    (bytes / SECTOR_BYTES).to_string()
}

fn alg(array: &ArrayStatus) -> String {
    array.spec.as_ref().map_or_else(String::new, |spec| format!("alg_{}", spec.alg))
}

fn epoch(array: &ArrayStatus) -> String {
    array.spec.as_ref().map_or_else(String::new, |spec| spec.epoch.0.to_string())
}

fn nodes(array: &ArrayStatus) -> String {
    let node = |node: &NodeStatus| format!("{} [{}]", node.start.0, node.size / SECTOR_BYTES);
    let nodes = array.nodes.iter().map(node).collect::<Vec<String>>().join(" | ");
    format!("sectors (start [size]): {nodes}").trim_end().to_owned()
}

/// As in 2007: `R:` and a server's address, or `L:` and the device's numbers, where they are known.
fn kind(node: &NodeStatus) -> String {
    let first = node.replicas.iter().find(|replica| replica.state == Trust::InSync).or(node.replicas.first());
    let Some(replica) = first else { return String::new() };
    match (&replica.target, &replica.address) {
        (Target::Remote { .. }, Some(address)) => format!("R: {address}"),
        (Target::Remote { server, .. }, None) => format!("R: {server}"),
        (Target::Local(_), Some(numbers)) => format!("L: {numbers}"),
        (Target::Local(path), None) => format!("L: {path}"),
    }
}

/// Sectors of the node that a replica has been given.
fn synced(node: &NodeStatus, replica: &ReplicaStatus) -> String {
    sectors(match replica.state {
        Trust::InSync => node.size,
        Trust::Stale | Trust::Syncing => replica.synced.unwrap_or(0),
    })
}

/// How it is attached, unless something holds its requests or it serves none.
fn state(node: &NodeStatus) -> &'static str {
    match node.gate {
        Gate::Open if node.late.is_some() => "late",
        Gate::Open if node.has_lost() => "lost",
        Gate::Open => node.state.word(),
        gate => gate.word(),
    }
}

fn suspended(_: &ArrayStatus, node: &NodeStatus) -> String {
    u8::from(node.suspend.is_some()).to_string()
}

/// `1`, with a time after it where the usual one is not meant, or `0`.
fn suspend(value: &str) -> Result<NodeAsk, Refusal> {
    let next = "write 1 to suspend the node, 1 and a time (such as 1 10m, or 1 none), or 0 to resume it";
    let ttl = match value.split_once(' ') {
        None if value == "0" => return Ok(NodeAsk::Resume),
        None if value == "1" => Ttl::default(),
        Some(("1", ttl)) => ttl.trim().parse().map_err(|why: String| Refusal::new(Errno::EINVAL, why))?,
        _ => return Err(not_understood(value, next)),
    };
    Ok(NodeAsk::Suspend(Suspend { ttl, by: Some("the control tree".to_owned()), ..Suspend::default() }))
}

/// Where the node goes, while it is on its way.
fn migrating(_: &ArrayStatus, node: &NodeStatus) -> String {
    node.migration.as_ref().map_or_else(String::new, |migration| migration.to.to_string())
}

/// The rest is as if nothing else was said to `dst migrate`.
fn migrate(value: &str) -> Result<NodeAsk, Refusal> {
    match value {
        "" => {
            Err(not_understood(value, "write a target, such as tor:20070/data3, or tor:20070/ for a new volume there"))
        }
        target => Ok(NodeAsk::Migrate(Migrate::to(target))),
    }
}

/// A migration's state, sectors that are done, sectors of the node.
fn progress(_: &ArrayStatus, node: &NodeStatus) -> String {
    let Some(migration) = &node.migration else { return "none".to_owned() };
    let state = serde_json::to_value(migration.state).unwrap_or_default();
    let (done, all) = (sectors(migration.copied), sectors(migration.size));
    format!("{} {done} {all}", state.as_str().unwrap_or_default())
}

/// The scrub's state, sectors that were compared, sectors of the node, regions that are not as they should be.
fn scrubbing(_: &ArrayStatus, node: &NodeStatus) -> String {
    let Some(scrub) = &node.scrub else { return "none".to_owned() };
    let (done, all) = (sectors(scrub.compared), sectors(scrub.size));
    format!("{} {done} {all} {}", scrub.state.word(), scrub.wrong())
}

/// The words of md's `sync_action`; a replica's number after `repair` says which one is right.
fn scrub(value: &str) -> Result<NodeAsk, Refusal> {
    let next = "write check, repair, repair K to go by replica K, or idle to end it";
    let repair = |from| Scrub { repair: true, from, ..Scrub::default() };
    match value.split_once(' ') {
        None if value == "check" => Ok(NodeAsk::Scrub(Scrub::default())),
        None if value == "repair" => Ok(NodeAsk::Scrub(repair(None))),
        None if value == "idle" => Ok(NodeAsk::EndScrub),
        Some(("repair", from)) => {
            let from = from.trim().parse().map_err(|_| not_understood(value, next))?;
            Ok(NodeAsk::Scrub(repair(Some(from))))
        }
        _ => Err(not_understood(value, next)),
    }
}

fn remove_all_nodes(array: &ArrayStatus, value: &str) -> Result<Command, Refusal> {
    match value {
        "1" => Ok(Command::Remove { name: array.name.clone(), force: false }),
        _ => Err(not_understood(value, "write 1 to free the array's volumes and forget it")),
    }
}

fn not_understood(value: &str, next: &str) -> Refusal {
    Refusal::new(Errno::EINVAL, format!("'{}' is not understood here: {next}", value.escape_default()))
}

/// What something in the tree is, to those who only look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A value that is only shown.
    Shown,
    /// A value that may be written, too.
    Writable,
    /// Nothing to be seen: it is there to be written.
    WriteOnly,
}

/// Where a path leads.
#[derive(Clone, Copy)]
enum Place<'a> {
    Root,
    Devices,
    Array(&'a ArrayStatus),
    Node(&'a ArrayStatus, &'a NodeStatus),
    Replicas(&'a NodeStatus),
    Replica(&'a NodeStatus, &'a ReplicaStatus),
    Attribute(&'static Attribute, Whose<'a>),
}

/// The directory that an attribute is in.
#[derive(Clone, Copy)]
enum Whose<'a> {
    Array(&'a ArrayStatus),
    Node(&'a ArrayStatus, &'a NodeStatus),
    Replica(&'a NodeStatus, &'a ReplicaStatus),
}

impl Attribute {
    fn kind(&self) -> Kind {
        match (self.show, self.store) {
            (Show::Never, _) => Kind::WriteOnly,
            (_, Store::Never) => Kind::Shown,
            (_, Store::Array(..) | Store::Node(..)) => Kind::Writable,
        }
    }

    /// `None`: there is nothing to be seen.
    fn show(&self, whose: Whose<'_>) -> Option<String> {
        match (self.show, whose) {
            (Show::Array(show), Whose::Array(array)) => Some(show(array)),
            (Show::Node(show), Whose::Node(array, node)) => Some(show(array, node)),
            (Show::Replica(show), Whose::Replica(node, replica)) => Some(show(node, replica)),
            _ => None,
        }
    }

    fn store(&self, whose: Whose<'_>, path: &str, value: &str) -> Result<Command, Refusal> {
        match (self.store, whose) {
            (Store::Array(when, store), Whose::Array(array)) => {
                when.check(array)?;
                store(array, value)
            }
            (Store::Node(when, store), Whose::Node(array, node)) => {
                when.check(array)?;
                Ok(Command::Node { name: array.name.clone(), node: node.start, ask: store(value)? })
            }
            _ => Err(Refusal::new(Errno::EPERM, format!("{path} cannot be written: it only shows what is"))),
        }
    }
}

impl When {
    fn check(self, array: &ArrayStatus) -> Result<(), Refusal> {
        let name = &array.name;
        match self {
            When::Stopped if array.state == State::Started => {
                Err(Refusal::new(Errno::EBUSY, format!("array '{name}' is started: 'dst stop {name}' first")))
            }
            When::Started if array.state != State::Started => {
                Err(Refusal::new(Errno::EBUSY, format!("array '{name}' is not started: 'dst start {name}' first")))
            }
            When::Stopped | When::Started => Ok(()),
        }
    }
}

/// The names of the attributes whose path has this prefix and no further directory.
fn attributes(prefix: &'static str) -> impl Iterator<Item = (&'static str, &'static Attribute)> {
    ATTRIBUTES.iter().filter_map(move |attribute| {
        let name = attribute.path.strip_prefix(prefix)?;
        (!name.contains('/')).then_some((name, attribute))
    })
}

impl<'a> Place<'a> {
    fn kind(self) -> Kind {
        match self {
            Place::Attribute(attribute, _) => attribute.kind(),
            _ => Kind::Directory,
        }
    }

    /// What is in it, in the order in which it is shown.
    fn children(self, arrays: &'a [ArrayStatus]) -> Vec<(String, Place<'a>)> {
        let of = |prefix, whose: Whose<'a>| {
            attributes(prefix).map(move |(name, attribute)| (name.to_owned(), Place::Attribute(attribute, whose)))
        };
        match self {
            Place::Root => vec![(DEVICES.to_owned(), Place::Devices)],
            Place::Devices => arrays.iter().map(|array| (array.name.clone(), Place::Array(array))).collect(),
            Place::Array(array) => {
                let nodes = array.nodes.iter().map(|node| (node.name.clone(), Place::Node(array, node)));
                of("", Whose::Array(array)).chain(nodes).collect()
            }
            Place::Node(array, node) => {
                let replicas = (REPLICAS.to_owned(), Place::Replicas(node));
                of("n-*/", Whose::Node(array, node)).chain([replicas]).collect()
            }
            Place::Replicas(node) => {
                let number = |(at, replica)| (format!("{at}"), Place::Replica(node, replica));
                node.replicas.iter().enumerate().map(number).collect()
            }
            Place::Replica(node, replica) => of("n-*/replicas/*/", Whose::Replica(node, replica)).collect(),
            Place::Attribute(..) => Vec::new(),
        }
    }

    fn at(arrays: &'a [ArrayStatus], path: &str) -> Result<Place<'a>, Refusal> {
        let mut place = Place::Root;
        let mut seen = String::new();
        for name in path.trim_matches('/').split('/').filter(|name| !name.is_empty()) {
            let found = place.children(arrays).into_iter().find(|(child, _)| child == name);
            let Some((_, child)) = found else {
                let shown = if seen.is_empty() { "the control tree".to_owned() } else { format!("{seen}/") };
                let text = format!("there is no '{}' in {shown}: 'dst tree' shows all paths", name.escape_default());
                return Err(Refusal::new(Errno::ENOENT, text));
            };
            place = child;
            let _ = write!(seen, "{}{name}", if seen.is_empty() { "" } else { "/" });
        }
        Ok(place)
    }
}

/// The name of the array that a path is about, for those who need not look at all of them.
pub fn array_of(path: &str) -> Option<&str> {
    let mut names = path.trim_matches('/').split('/');
    (names.next() == Some(DEVICES)).then(|| names.next()).flatten()
}

/// What is at a path; ENOENT if nothing is.
pub fn find(arrays: &[ArrayStatus], path: &str) -> Result<Kind, Refusal> {
    Place::at(arrays, path).map(Place::kind)
}

/// What is in a directory; empty for anything else.
pub fn list(arrays: &[ArrayStatus], path: &str) -> Result<Vec<(String, Kind)>, Refusal> {
    let place = Place::at(arrays, path)?;
    Ok(place.children(arrays).into_iter().map(|(name, child)| (name, child.kind())).collect())
}

/// The value at a path, without a newline. EPERM where there is none to be seen, EINVAL for a directory.
pub fn show(arrays: &[ArrayStatus], path: &str) -> Result<String, Refusal> {
    match Place::at(arrays, path)? {
        Place::Attribute(attribute, whose) => attribute
            .show(whose)
            .ok_or_else(|| Refusal::new(Errno::EPERM, format!("{path} cannot be read: it is there to be written"))),
        _ => Err(is_a_directory(path)),
    }
}

/// What is to be done for this value at this path. ENOENT: no such path; EPERM: it is only shown; EBUSY: not now; EINVAL: not that.
pub fn store(arrays: &[ArrayStatus], path: &str, value: &str) -> Result<Command, Refusal> {
    match Place::at(arrays, path)? {
        Place::Attribute(attribute, whose) => attribute.store(whose, path, value.trim()),
        _ => Err(is_a_directory(path)),
    }
}

fn is_a_directory(path: &str) -> Refusal {
    Refusal::new(Errno::EINVAL, format!("{} is a directory: 'dst tree' shows what is in it", path.escape_default()))
}

/// One path of the tree, as shown over the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// From `devices` on.
    pub path: String,
    /// What it shows, without a newline; absent where it is only there to be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Whether anything may be written to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
}

/// All paths at and below one, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    /// The paths.
    pub tree: Vec<Entry>,
}

/// The value to be written to a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Value {
    /// As it would be written to a file of the tree; blanks and newlines around it do not count.
    pub value: String,
}

/// All paths at and below one.
pub fn entries(arrays: &[ArrayStatus], path: &str) -> Result<Entries, Refusal> {
    let mut tree = Vec::new();
    let path = path.trim_matches('/');
    gather(arrays, Place::at(arrays, path)?, path.to_owned(), &mut tree);
    Ok(Entries { tree })
}

/// Goes down at most six directories.
fn gather(arrays: &[ArrayStatus], place: Place<'_>, path: String, tree: &mut Vec<Entry>) {
    if let Place::Attribute(attribute, whose) = place {
        let writable = !matches!(attribute.store, Store::Never);
        tree.push(Entry { path, value: attribute.show(whose), writable });
        return;
    }
    for (name, child) in place.children(arrays) {
        let below = if path.is_empty() { name } else { format!("{path}/{name}") };
        gather(arrays, child, below, tree);
    }
}

impl Entries {
    /// As the tree was written down in 2007: a path and its value in each line.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for Entry { path, value, .. } in &self.tree {
            let _ = match value {
                Some(value) if value.is_empty() => writeln!(text, "{path} :"),
                Some(value) => writeln!(text, "{path} : {value}"),
                None => writeln!(text, "{path}"),
            };
        }
        text
    }
}

#[cfg(test)]
mod tests;
