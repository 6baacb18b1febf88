//! The owner's judgements: whether an array can be made, started, removed out of what its targets are, and the words for it.

use std::collections::BTreeSet;

use super::{Enlisted, Found};
use crate::control::command::{Create, Refusal};
use crate::control::replica::{Generation, ReplicaSpec, ReplicaState};
use crate::control::spec::{Alg, ArraySpec, NodeSpec, Phase, RunOptions};
use crate::control::target::Target;
use crate::engine::losses::Memory;
use crate::errno::Errno;
use crate::geometry::map::{BadGeometry, Geometry};
use crate::limits;
use crate::units::{Epoch, Id, Lba, NodeId, SECTOR_BYTES, check_name, format_size};
use crate::wire::volume::{Claim, Member};

/// Volumes are used in whole pages of sectors, so that any logical block fits.
const PAGE_SECTORS: u64 = 8;

/// The layout that a record describes.
pub fn geometry(spec: &ArraySpec) -> Result<Geometry, BadGeometry> {
    let sectors: Vec<u64> = spec.nodes.iter().map(|node| node.sectors).collect();
    lay(spec, &sectors)
}

fn lay(spec: &ArraySpec, sectors: &[u64]) -> Result<Geometry, BadGeometry> {
    match spec.alg {
        Alg::Linear => Geometry::linear(sectors),
        Alg::Striped => Geometry::striped(spec.chunk / SECTOR_BYTES, sectors),
    }
}

/// Checks what was typed, and makes a record of it whose sizes are still to be found out.
pub(super) fn draft(create: &Create, id: Id) -> Result<ArraySpec, Refusal> {
    let invalid = |text: String| Refusal::new(Errno::EINVAL, text);
    check_name(&create.name).map_err(invalid)?;
    let chunk = match (create.alg, create.chunk) {
        (Alg::Linear, None) => 0,
        (Alg::Linear, Some(_)) => {
            return Err(invalid("a linear array has no chunk: leave --chunk out, or use --alg striped".to_owned()));
        }
        (Alg::Striped, chunk) => chunk.unwrap_or(limits::CHUNK_BYTES_DEFAULT),
    };
    if !matches!(create.block, 512 | 4096) {
        return Err(invalid(format!("a logical block of {} bytes: it is 512 or 4096", create.block)));
    }
    if create.targets.is_empty() || create.targets.len() > limits::NODES_MAX {
        return Err(invalid(BadGeometry::NodeCount(create.targets.len()).to_string()));
    }
    if create.replicas == 0 || create.replicas > limits::REPLICAS_MAX {
        return Err(invalid(format!("{} replicas: a node has 1 to {}", create.replicas, limits::REPLICAS_MAX)));
    }
    let mut nodes: Vec<NodeSpec> = Vec::with_capacity(create.targets.len());
    // 0: as large as its targets are.
    let sectors = create.size.map(node_sectors).transpose()?.unwrap_or(0);
    let mut seen: BTreeSet<Target> = BTreeSet::new();
    for text in &create.targets {
        let targets = split(text, create.replicas).map_err(invalid)?;
        if let Some(twice) = targets.iter().find(|target| !seen.insert((*target).clone())) {
            return Err(invalid(format!(
                "{twice} is given twice: each replica of each node needs a target of its own"
            )));
        }
        let replica = |target| ReplicaSpec { target, volume: Id::NIL, state: ReplicaState::InSync };
        let replicas = targets.into_iter().map(replica).collect();
        let generation = Generation::first(id);
        let start = NodeId(Lba(0));
        nodes.push(NodeSpec { start, sectors, replicas, generation, suspend: None, transfer: None, scrub: None });
    }
    let run = RunOptions::default();
    let (name, alg, block) = (create.name.clone(), create.alg, create.block);
    let spec = ArraySpec { name, id, phase: Phase::Creating, alg, chunk, block, nodes, run, ..nameless("") };
    if alg == Alg::Striped {
        // Sizes that any chunk divides: only the chunk and the count can be wrong.
        lay(&spec, &vec![limits::CHUNK_BYTES_MAX / SECTOR_BYTES; spec.nodes.len()]).map_err(|bad| {
            let bytes = if chunk % SECTOR_BYTES == 0 { bad.to_string() } else { odd_chunk(chunk) };
            invalid(format!("{bytes}: choose another --chunk"))
        })?;
        if chunk % SECTOR_BYTES != 0 {
            return Err(invalid(format!("{}: choose another --chunk", odd_chunk(chunk))));
        }
    }
    Ok(spec)
}

/// The targets of one node. A single one is taken as it is: a path may have a comma.
fn split(text: &str, replicas: usize) -> Result<Vec<Target>, String> {
    let texts: Vec<&str> = if replicas == 1 { vec![text] } else { text.split(',').collect() };
    if texts.len() != replicas {
        return Err(format!(
            "'{}' names {} target(s), and each node has {replicas} replicas: join the targets of a node with commas, such as \
             kano/a,via/a",
            text.escape_default(),
            texts.len()
        ));
    }
    texts.into_iter().map(str::parse).collect()
}

fn odd_chunk(chunk: u64) -> String {
    format!("a chunk of {chunk} bytes is no power of two")
}

/// The sectors of a node whose size was asked for.
pub(super) fn node_sectors(bytes: u64) -> Result<u64, Refusal> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SECTORS * SECTOR_BYTES) {
        let text = format!("a node of {bytes} bytes: its size is a multiple of 4K");
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    Ok(bytes / SECTOR_BYTES)
}

/// What a node uses of a volume of `sectors` sectors: all of it, or as much as is `wanted`.
pub(super) fn usable(sectors: u64, wanted: u64) -> Result<u64, String> {
    let size = |sectors: u64| format_size(sectors * SECTOR_BYTES);
    match wanted {
        0 => Ok(sectors - sectors % PAGE_SECTORS),
        wanted if wanted <= sectors => Ok(wanted),
        wanted => Err(format!("too small with {}: {} is asked for", size(sectors), size(wanted))),
    }
}

/// Names the nodes and their sizes from what the targets are, or says which of them cannot be used.
pub(super) fn lay_out(spec: &mut ArraySpec, found: &[Result<Found, Refusal>]) -> Result<(), Refusal> {
    let targets: Vec<&Target> = spec.replicas().map(|(_, replica)| &replica.target).collect();
    let refuse = |at: usize, errno, why: String| {
        Err(Refusal::new(errno, format!("target {} ({}): {why}; nothing was changed", at + 1, targets[at])))
    };
    // Each node is as large as the smallest of its replicas.
    let mut sectors: Vec<u64> = Vec::with_capacity(spec.nodes.len());
    let mut smallest: Vec<usize> = Vec::with_capacity(spec.nodes.len());
    let mut node_of = spec.nodes.iter().enumerate().flat_map(|(at, node)| node.replicas.iter().map(move |_| at));
    for (at, found_here) in found.iter().enumerate() {
        let here = match found_here {
            Ok(here) => here,
            Err(why) => return refuse(at, why.errno, why.text.clone()),
        };
        if let Some(member) = &here.member {
            let why = in_use(member, targets[at]);
            return refuse(at, Errno::EBUSY, why);
        }
        let same = |other: &Result<Found, Refusal>| other.as_ref().is_ok_and(|other| other.identity == here.identity);
        if let Some(other) = found[..at].iter().position(same) {
            let why = format!("it is the same volume as target {} ({})", other + 1, targets[other]);
            return refuse(at, Errno::EINVAL, why);
        }
        let node = node_of.next();
        let wanted = node.and_then(|node| spec.nodes.get(node)).map_or(0, |node| node.sectors);
        let usable = match usable(here.sectors, wanted) {
            Ok(usable) => usable,
            Err(why) => return refuse(at, Errno::EINVAL, why),
        };
        match node {
            Some(node) if node < sectors.len() && sectors[node] <= usable => {}
            Some(node) if node < sectors.len() => (sectors[node], smallest[node]) = (usable, at),
            _ => {
                sectors.push(usable);
                smallest.push(at);
            }
        }
    }
    let geometry = match lay(spec, &sectors) {
        Ok(geometry) => geometry,
        Err(BadGeometry::TooSmall(node)) => {
            let at = smallest.get(node).copied().unwrap_or(0);
            let size = format_size(found.get(at).and_then(|f| f.as_ref().ok()).map_or(0, |f| f.sectors * SECTOR_BYTES));
            let least = spec.chunk.max(PAGE_SECTORS * SECTOR_BYTES);
            let why = format!("too small with {size}: at least {} is needed", format_size(least));
            return refuse(at, Errno::EINVAL, why);
        }
        Err(bad) => return Err(Refusal::new(Errno::EINVAL, format!("{bad}; nothing was changed"))),
    };
    for (at, node) in spec.nodes.iter_mut().enumerate() {
        node.start = NodeId(geometry.node_start(at));
        node.sectors = geometry.node_sectors(at);
    }
    Ok(())
}

/// The volumes of a new array are its own. Replicas that are known to read as zeros are the same; else the first one of a node has
/// what the node begins with, and the others are to be filled.
pub(super) fn enlist(spec: &mut ArraySpec, mut enlisted: impl Iterator<Item = Enlisted>) {
    for node in &mut spec.nodes {
        let mut alike = true;
        for replica in &mut node.replicas {
            let Some(Enlisted { volume, blank }) = enlisted.next() else { return };
            replica.volume = volume;
            alike &= blank;
        }
        for replica in node.replicas.iter_mut().skip(1).filter(|_| !alike) {
            replica.state = ReplicaState::Syncing { from: Lba(0) };
        }
    }
    spec.clean = true;
}

/// What to say about nodes that one machine can take away with all of their replicas' siblings.
pub(super) fn shared_fate(spec: &ArraySpec) -> Vec<String> {
    let machine = |replica: &ReplicaSpec| match &replica.target {
        Target::Remote { server, .. } => format!("on {}", server.host),
        Target::Local(_) => "on this machine".to_owned(),
    };
    let warn = |node: &NodeSpec| {
        let mut seen = BTreeSet::new();
        let twice = node.replicas.iter().map(machine).find(|machine| !seen.insert(machine.clone()))?;
        Some(format!("node {} has two replicas {twice}: when that machine is away, so are both", node.start))
    };
    spec.nodes.iter().filter_map(warn).collect()
}

/// Whether every volume can be asked to let go. One that is gone needs not be asked.
pub(super) fn check_removal(spec: &ArraySpec, host: Id, found: &[Result<Found, Refusal>]) -> Result<(), Refusal> {
    for ((what, target), found) in spec.held().zip(found) {
        if let Ok(Found { member: Some(member), claim: Some(claim), .. }) = found
            && member.id == spec.id
            && claim.host != host
        {
            let name = &spec.name;
            let text = format!(
                "array '{name}' is not removed: {what} ({target}): another host has claimed the volume ({}, epoch {}) and may use the \
                 array: remove it there. 'dst remove {name} --force' forgets the array here and leaves it such volumes",
                claim.host, claim.epoch.0
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        if let Err(why) = found
            && why.errno != Errno::ENOENT
        {
            let name = &spec.name;
            let text = format!(
                "array '{name}' is not removed: {what} ({target}): {}. Bring it back, or 'dst remove {name} --force': the volume then \
                 stays assigned until '{}'",
                why.text,
                free_command(target)
            );
            return Err(Refusal::new(why.errno, text));
        }
    }
    Ok(())
}

/// The first of the results that is not a success, with its node.
pub(super) fn first_error<T>(spec: &ArraySpec, results: &[Result<T, Refusal>]) -> Option<Refusal> {
    spec.held().zip(results).find_map(|((what, target), result)| {
        let why = result.as_ref().err()?;
        Some(Refusal::new(why.errno, format!("{what} ({target}): {}", why.text)))
    })
}

/// What to say about each volume that still names the array.
pub(super) fn left_assigned(spec: &ArraySpec, results: &[Result<(), Refusal>]) -> Vec<String> {
    let left = spec.held().zip(results);
    left.filter_map(|((_, target), result)| Some(self::left(target, &spec.name, result.as_ref().err()?))).collect()
}

/// What to say about a volume that still names the array called `name`.
pub(super) fn left(target: &Target, name: &str, why: &Refusal) -> String {
    let free = free_command(target);
    format!("{target} stays assigned to '{name}' ({}): free it with '{free}'", why.text)
}

/// Why a volume of another array cannot be had.
pub(super) fn in_use(member: &Member, target: &Target) -> String {
    format!(
        "in use by array '{}' (node {}): take another volume, or remove that array; if that array is gone for good, free the \
         volume with '{}'",
        member.name,
        member.node,
        free_command(target)
    )
}

/// No place for a further array.
pub(super) fn too_many() -> Refusal {
    let text = format!("there are {} arrays already, the most that one dstd owns", limits::ARRAYS_MAX);
    Refusal::new(Errno::ENOSPC, text)
}

fn free_command(target: &Target) -> String {
    match target {
        Target::Remote { .. } => format!("dst volume free {target} --force"),
        Target::Local(path) => format!("dst volume free {path} --force"),
    }
}

/// A create that failed and could not be undone at once.
pub(super) fn half_done(spec: &ArraySpec, why: &Refusal, left: &str) -> Refusal {
    let name = &spec.name;
    let text = format!(
        "array '{name}' was not created: {why}; {left}. This is tried again in the background; 'dst remove {name} --force' gives up"
    );
    Refusal::new(why.errno, text)
}

/// A remove that has begun and could not be ended at once.
pub(super) fn half_gone(spec: &ArraySpec, left: &str) -> Refusal {
    let name = &spec.name;
    let text = format!(
        "array '{name}' is being removed: {left}. This is tried again in the background; 'dst remove {name} --force' gives up"
    );
    Refusal::new(Errno::EBUSY, text)
}

/// Another owner has taken a volume of the array.
pub(super) fn fenced(name: &str) -> String {
    format!(
        "fenced: another owner has claimed its volumes, and nothing of this host is written any more. 'dst stop {name}' puts it away; 'dst start \
         {name} --take-over' takes it back"
    )
}

/// The same, when it is known who that is.
pub(super) fn taken(name: &str, place: &str, claim: &Claim, host: Id) -> String {
    let who = match claim.host == host {
        true => "another daemon with a copy of this state directory",
        false => "another host",
    };
    format!(
        "fenced: {who} ({}, epoch {}) has taken the array, as {place} says; nothing of this host is written any more. 'dst stop {name}' puts it \
         away; to take it back, stop it there, then 'dst start {name} --take-over'",
        claim.host, claim.epoch.0
    )
}

/// What refuses a start, which is told with the array's name.
pub(super) fn cannot_start(name: &str, why: Refusal) -> Refusal {
    Refusal::new(why.errno, format!("array '{name}' cannot start: {}", why.text))
}

/// Nothing is known to be lost that could be accepted.
pub(super) fn no_loss(name: &str, node: NodeId) -> Refusal {
    let text =
        format!("node {node} of array '{name}' has lost nothing that is known: 'dst status {name}' shows what ails it");
    Refusal::new(Errno::EINVAL, text)
}

/// A start that was stopped before it came up.
pub(super) fn given_up(name: &str) -> Refusal {
    Refusal::new(
        Errno::ECANCELED,
        format!("the start of array '{name}' was given up: it was stopped, or dstd is ending"),
    )
}

/// An array that has ended, but whose record still says `started`.
pub(super) fn not_parked(name: &str, failed: Option<Refusal>, trouble: &Refusal) -> Refusal {
    let why = failed.map_or_else(|| "is stopped".to_owned(), |why| format!("could not be started ({why})"));
    let text = format!(
        "array '{name}' {why}, but its record could not be written ({trouble}), so dstd would start it again at its next start: \
         make room in the state directory and 'dst stop {name}' again"
    );
    Refusal::new(trouble.errno, text)
}

/// A placeholder for a record that cannot be read.
pub(super) fn nameless(name: &str) -> ArraySpec {
    ArraySpec {
        name: name.to_owned(),
        id: Id::NIL,
        phase: Phase::Stopped,
        alg: Alg::Linear,
        chunk: 0,
        block: 512,
        epoch: Epoch(0),
        nodes: Vec::new(),
        clean: false,
        memory: Memory::default(),
        debts: Vec::new(),
        migrations: Vec::new(),
        migrated: 0,
        grow: false,
        run: RunOptions::default(),
    }
}
