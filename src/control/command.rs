//! What can be asked of the daemon that owns arrays, over HTTP/JSON, and what it answers. Shared with the command line.
//!
//! [`route`] is the whole table of `docs/API.md`: method and path to an [`Ask`]. Pure; nothing of a peer's bytes is trusted.

use serde::{Deserialize, Serialize};

use crate::control::node::{Act, NodeAsk};
use crate::control::spec::{Alg, RunOptions};
use crate::control::status::ArrayStatus;
use crate::control::tree::Value;
use crate::errno::Errno;
use crate::units::{NodeId, check_name};

/// The version of the API, as in its paths.
pub const API_VERSION: u32 = 1;

/// Body of `POST /v1/arrays`: a new array. Targets are text, so that all that is wrong with them is said in one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Its name.
    pub name: String,
    /// How it is laid out.
    pub alg: Alg,
    /// Chunk of a striped array, bytes; the default where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<u64>,
    /// Logical block, bytes: 512 or 4096.
    #[serde(default = "block_default")]
    pub block: u32,
    /// Copies of each node's data.
    #[serde(default = "replicas_default")]
    pub replicas: usize,
    /// Where its nodes live, in order: `HOST:PORT/VOLUME` or an absolute path; with several replicas joined by commas.
    pub targets: Vec<String>,
    /// Bytes that each node uses of its targets; all there are where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// Replicas of a node unless said otherwise.
pub const fn replicas_default() -> usize {
    1
}

/// Logical block of an array unless said otherwise, bytes.
pub const fn block_default() -> u32 {
    512
}

/// What the operator of a start knows and dst cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// No other host uses the array any more, or none shall from now on: its claims are taken.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub take_over: bool,
    /// The other host is dead, so replicas that cannot be reached need not accept the take-over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// Body of `POST /v1/arrays/NAME/start`, as it is sent.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// How it runs.
    #[serde(flatten)]
    pub run: RunOptions,
    /// What the operator knows.
    #[serde(flatten)]
    pub terms: Terms,
}

/// Body of `POST /v1/import`: an array that volumes know of, and this machine does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// One of its volumes: `HOST:PORT/VOLUME` or an absolute path.
    pub target: String,
    /// Its name here; the one that it has, where this is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Even when a replica that the others call in sync is not there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// Body of `POST /v1/arrays/NAME/nodes/NODE/replicas`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewReplica {
    /// Where it is to live.
    pub target: String,
}

/// Body of `POST /v1/arrays/NAME/nodes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewNode {
    /// Where it is to live.
    pub target: String,
    /// Bytes that it uses of its target; all there are where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// Something that changes arrays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Makes an array out of volumes.
    Create(Create),
    /// Makes it usable.
    Start {
        /// The array.
        name: String,
        /// How it runs.
        run: RunOptions,
        /// What the operator knows.
        terms: Terms,
    },
    /// Takes it out of use.
    Stop {
        /// The array.
        name: String,
        /// Even while it is in use.
        force: bool,
    },
    /// Makes a record out of what volumes know of their array.
    Import(Import),
    /// Gives a linear array that is not started a further node at its end.
    AddNode {
        /// The array.
        name: String,
        /// Where the node is to live.
        target: String,
        /// Its bytes; all there are where it is absent.
        size: Option<u64>,
    },
    /// Takes the last node from a linear array that is not started, and frees its volumes.
    RemoveNode {
        /// The array.
        name: String,
        /// The node.
        node: NodeId,
    },
    /// Lets it take up what its volumes have come to have.
    Grow {
        /// The array.
        name: String,
    },
    /// Gives a node a further replica, to be filled.
    AddReplica {
        /// The array.
        name: String,
        /// The node.
        node: NodeId,
        /// Where the replica is to live.
        target: String,
    },
    /// Takes a replica from a node, and frees its volume.
    RemoveReplica {
        /// The array.
        name: String,
        /// The node.
        node: NodeId,
        /// Which of the node's replicas, from 0.
        replica: usize,
    },
    /// Something about one node of a started array.
    Node {
        /// The array.
        name: String,
        /// The node.
        node: NodeId,
        /// What.
        ask: NodeAsk,
    },
    /// Frees its volumes and forgets it.
    Remove {
        /// The array.
        name: String,
        /// Even when a volume cannot be freed.
        force: bool,
    },
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Who is there?
    Version,
    /// All arrays.
    List,
    /// One array.
    Get(String),
    /// What the requests of an array wait for.
    Why(String),
    /// The figures of all arrays, for Prometheus.
    Metrics,
    /// The block devices of this machine that are dst's.
    Devices,
    /// `GET /v1/upgrade`
    Upgraded,
    /// `POST /v1/upgrade`; whether NBD clients may be cut.
    Upgrade(bool),
    /// Removes one that a dead daemon has left, also while it is in use if that is said.
    DeleteDevice(u32, bool),
    /// The control tree at and below a path.
    Tree(String),
    /// A value is written to a path of the control tree; answered when what it asks for is done.
    Store(String, String),
    /// Something that changes arrays; answered when it is done.
    Do(Command),
}

/// Answer to `GET /v1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's own version.
    pub version: String,
    /// The version of this API.
    pub api: u32,
    /// The daemon's process.
    pub pid: u32,
}

/// Answer to `GET /v1/arrays`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrays {
    /// All arrays, by name.
    pub arrays: Vec<ArrayStatus>,
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The array that was.
    pub name: String,
    /// Volumes that could not be freed and still name the array, each with what to do.
    pub warnings: Vec<String>,
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The array as it is now.
    Array(Box<ArrayStatus>),
    /// What was removed.
    Removed(Removed),
}

impl Answer {
    /// What was done as asked and may be regretted.
    pub fn warnings(&self) -> &[String] {
        match self {
            Answer::Array(array) => &array.warnings,
            Answer::Removed(removed) => &removed.warnings,
        }
    }
}

/// Why something was not done: an error number to branch on, and what, why and what to do next for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For branching.
    pub errno: Errno,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// A refusal of `errno` with its words.
    pub fn new(errno: Errno, text: impl Into<String>) -> Refusal {
        Refusal { errno, text: text.into() }
    }

    /// A name that names nothing.
    pub fn no_such_array(name: &str) -> Refusal {
        let text = format!("there is no array '{name}': 'dst list' shows those there are");
        Refusal::new(Errno::ENOENT, text)
    }

    /// As it is sent.
    pub fn problem(&self) -> Problem {
        Problem { error: self.text.clone(), errno: self.errno.name().unwrap_or("EIO").to_owned() }
    }

    /// The HTTP status under which it is sent.
    pub fn http_status(&self) -> u16 {
        match self.errno {
            Errno::EINVAL | Errno::ERANGE => 400,
            Errno::EACCES | Errno::EPERM => 403,
            Errno::ENOENT => 404,
            Errno::EOPNOTSUPP => 405,
            Errno::EBUSY | Errno::EEXIST => 409,
            Errno::EOVERFLOW => 413,
            Errno::EAGAIN | Errno::ESHUTDOWN => 503,
            _ => 500,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What, why and what to do next.
    pub error: String,
    /// The symbol of the error number, such as `EBUSY`.
    pub errno: String,
}

/// Body of `POST /v1/arrays/NAME/stop`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Force {
    /// Even while it is in use.
    pub force: bool,
}

/// What a request asks for. `path` comes without the query.
pub fn route(method: &str, path: &str, query: &str, body: &[u8]) -> Result<Ask, Refusal> {
    let parts: Vec<&str> = path.trim_end_matches('/').split('/').skip(1).collect();
    let named = |name: &str| check_name(name).map(|()| name.to_owned()).map_err(|why| Refusal::new(Errno::EINVAL, why));
    let typed = |node: &str| node.parse::<NodeId>().map_err(|why| Refusal::new(Errno::EINVAL, why));
    match (method, parts.as_slice()) {
        ("GET", ["v1"]) => Ok(Ask::Version),
        ("GET", ["metrics"]) => Ok(Ask::Metrics),
        ("GET", ["v1", "arrays"]) => Ok(Ask::List),
        ("GET", ["v1", "arrays", name]) => Ok(Ask::Get(named(name)?)),
        ("POST", ["v1", "arrays"]) => Ok(Ask::Do(Command::Create(parse(body)?))),
        ("POST", ["v1", "arrays", name, "start"]) => {
            let (run, terms) = start(body)?;
            Ok(Ask::Do(Command::Start { name: named(name)?, run, terms }))
        }
        ("POST", ["v1", "arrays", name, "stop"]) => {
            let Force { force } = parse_or_default(body)?;
            Ok(Ask::Do(Command::Stop { name: named(name)?, force }))
        }
        ("DELETE", ["v1", "arrays", name]) => {
            Ok(Ask::Do(Command::Remove { name: named(name)?, force: forced(query)? }))
        }
        ("GET", ["v1", "upgrade"]) => Ok(Ask::Upgraded),
        ("POST", ["v1", "upgrade"]) => Ok(Ask::Upgrade(parse_or_default::<Force>(body)?.force)),
        ("GET", ["v1", "devices"]) => Ok(Ask::Devices),
        ("DELETE", ["v1", "devices", id]) => {
            let bad = |_| Refusal::new(Errno::EINVAL, format!("'{}' is no device's number", id.escape_default()));
            Ok(Ask::DeleteDevice(id.parse().map_err(bad)?, forced(query)?))
        }
        ("GET", ["v1", "arrays", name, "why"]) => Ok(Ask::Why(named(name)?)),
        ("GET", ["v1", "tree", path @ ..]) => Ok(Ask::Tree(path.join("/"))),
        ("PUT", ["v1", "tree", path @ ..]) => Ok(Ask::Store(path.join("/"), parse::<Value>(body)?.value)),
        ("POST", ["v1", "import"]) => Ok(Ask::Do(Command::Import(parse(body)?))),
        ("POST", ["v1", "arrays", name, "nodes"]) => {
            let NewNode { target, size } = parse(body)?;
            Ok(Ask::Do(Command::AddNode { name: named(name)?, target, size }))
        }
        ("POST", ["v1", "arrays", name, "grow"]) => Ok(Ask::Do(Command::Grow { name: named(name)? })),
        ("DELETE", ["v1", "arrays", name, "nodes", node]) => {
            Ok(Ask::Do(Command::RemoveNode { name: named(name)?, node: typed(node)? }))
        }
        ("POST", ["v1", "arrays", name, "nodes", node, "replicas"]) => {
            let NewReplica { target } = parse(body)?;
            Ok(Ask::Do(Command::AddReplica { name: named(name)?, node: typed(node)?, target }))
        }
        ("DELETE", ["v1", "arrays", name, "nodes", node, "replicas", replica]) => {
            let bad = |_| Refusal::new(Errno::EINVAL, format!("'{}' is no replica's number", replica.escape_default()));
            let replica = replica.parse().map_err(bad)?;
            Ok(Ask::Do(Command::RemoveReplica { name: named(name)?, node: typed(node)?, replica }))
        }
        ("POST", ["v1", "arrays", name, "nodes", node, verb @ ..]) if is_verb(verb) => {
            Ok(Ask::Do(Command::Node { name: named(name)?, node: typed(node)?, ask: asked(verb, body)? }))
        }
        (
            _,
            ["v1" | "metrics"]
            | ["v1", "tree", ..]
            | ["v1", "import" | "arrays" | "devices" | "upgrade"]
            | ["v1", "devices", _]
            | ["v1", "arrays", _]
            | ["v1", "arrays", _, "start" | "stop" | "why" | "grow"]
            | ["v1", "arrays", _, "nodes"]
            | ["v1", "arrays", _, "nodes", _]
            | ["v1", "arrays", _, "nodes", _, "replicas"]
            | ["v1", "arrays", _, "nodes", _, "replicas", _],
        ) => Err(Refusal::new(Errno::EOPNOTSUPP, format!("{path} does not know {}", method.escape_default()))),
        (_, ["v1", "arrays", _, "nodes", _, verb @ ..]) if is_verb(verb) => {
            Err(Refusal::new(Errno::EOPNOTSUPP, format!("{path} does not know {}", method.escape_default())))
        }
        _ => Err(Refusal::new(Errno::ENOENT, format!("there is nothing at {}", path.escape_default()))),
    }
}

fn forced(query: &str) -> Result<bool, Refusal> {
    match query {
        "" | "force=false" => Ok(false),
        "force=true" => Ok(true),
        _ => Err(Refusal::new(Errno::EINVAL, format!("unknown query '{}'", query.escape_default()))),
    }
}

/// Whether the rest of a node's path names something that can be asked.
fn is_verb(verb: &[&str]) -> bool {
    match verb {
        ["suspend" | "resume" | "fail" | "replace" | "migrate" | "accept-loss" | "scrub"] | ["scrub", "abort"] => true,
        ["migration", word] => Act::ALL.iter().any(|act| act.word() == *word),
        _ => false,
    }
}

/// What is asked about a node by the rest of its path.
fn asked(verb: &[&str], body: &[u8]) -> Result<NodeAsk, Refusal> {
    match verb {
        ["suspend"] => parse_or_default(body).map(NodeAsk::Suspend),
        ["resume"] => Ok(NodeAsk::Resume),
        ["fail"] => Ok(NodeAsk::Fail),
        ["accept-loss"] => Ok(NodeAsk::AcceptLoss),
        ["replace"] => parse(body).map(NodeAsk::Replace),
        ["migrate"] => parse(body).map(NodeAsk::Migrate),
        ["scrub"] => parse_or_default(body).map(NodeAsk::Scrub),
        ["scrub", ..] => Ok(NodeAsk::EndScrub),
        _ => {
            let act = Act::ALL.into_iter().find(|act| verb.last() == Some(&act.word()));
            let nothing = || Refusal::new(Errno::ENOENT, format!("there is nothing at {}", verb.join("/")));
            Ok(NodeAsk::Migration(act.ok_or_else(nothing)?, parse_or_default(body)?))
        }
    }
}

/// The body of a start: two values in one object, each of which knows its own fields only.
fn start(body: &[u8]) -> Result<(RunOptions, Terms), Refusal> {
    let mut run: serde_json::Map<String, serde_json::Value> = parse_or_default(body)?;
    let known = ["take_over", "force"];
    let terms = known.iter().filter_map(|key| Some(((*key).to_owned(), run.remove(*key)?))).collect();
    let of = |fields| serde_json::to_vec(&serde_json::Value::Object(fields)).unwrap_or_default();
    let (run, terms): (RunOptions, Terms) = (parse(&of(run))?, parse(&of(terms))?);
    if terms.force && !terms.take_over {
        let why = "force is for a take-over alone: without one nothing needs it";
        return Err(Refusal::new(Errno::EINVAL, why));
    }
    Ok((run, terms))
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::new(Errno::EINVAL, format!("the request's body is not understood: {error}")))
}

fn parse_or_default<T: serde::de::DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refusal> {
    if body.is_empty() { Ok(T::default()) } else { parse(body) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_route() {
        let get = |path| route("GET", path, "", b"");
        assert_eq!(get("/v1"), Ok(Ask::Version));
        assert_eq!(get("/v1/arrays"), Ok(Ask::List));
        assert_eq!(get("/v1/arrays/a"), Ok(Ask::Get("a".to_owned())));
        let create = br#"{"name":"a","alg":"linear","targets":["h/v"]}"#;
        let Ok(Ask::Do(Command::Create(create))) = route("POST", "/v1/arrays", "", create) else { panic!() };
        assert_eq!((create.block, create.chunk, create.replicas), (512, None, 1));
        assert_eq!(
            route("POST", "/v1/arrays/a/start", "", b""),
            Ok(Ask::Do(Command::Start { name: "a".to_owned(), run: RunOptions::default(), terms: Terms::default() }))
        );
        for terms in [Terms { take_over: true, force: false }, Terms { take_over: true, force: true }, Terms::default()]
        {
            let run = RunOptions { queues: 3, ..RunOptions::default() };
            let body = serde_json::to_vec(&Start { run: run.clone(), terms }).unwrap();
            let command = Command::Start { name: "a".to_owned(), run, terms };
            assert_eq!(route("POST", "/v1/arrays/a/start", "", &body), Ok(Ask::Do(command)));
        }
        let body = br#"{"frontend":"nbd:/a.sock","io_timeout":"2s"}"#;
        let Ok(Ask::Do(Command::Start { run, .. })) = route("POST", "/v1/arrays/a/start", "", body) else { panic!() };
        assert_eq!(run.io_timeout.as_secs(), 2);
        assert_eq!(
            route("POST", "/v1/arrays/a/stop", "", br#"{"force":true}"#),
            Ok(Ask::Do(Command::Stop { name: "a".to_owned(), force: true }))
        );
        assert_eq!(
            route("DELETE", "/v1/arrays/a", "force=true", b""),
            Ok(Ask::Do(Command::Remove { name: "a".to_owned(), force: true }))
        );
    }

    #[test]
    fn replicas_and_imports_are_routed() {
        let node = NodeId(crate::units::Lba(800));
        let import = Import { target: "h:1/v".to_owned(), name: None, force: false };
        let name = "a".to_owned();
        for (method, path, body, command) in [
            ("POST", "/v1/import", r#"{"target":"h:1/v"}"#, Command::Import(import)),
            (
                "POST",
                "/v1/arrays/a/nodes/n-800/replicas",
                r#"{"target":"h:1/v"}"#,
                Command::AddReplica { name: name.clone(), node, target: "h:1/v".to_owned() },
            ),
            ("DELETE", "/v1/arrays/a/nodes/n-800/replicas/2", "", Command::RemoveReplica { name, node, replica: 2 }),
        ] {
            assert_eq!(route(method, path, "", body.as_bytes()), Ok(Ask::Do(command)));
        }
    }

    #[test]
    fn what_is_asked_about_a_node_is_routed() {
        use crate::control::node::{Migrate, OnExpire, Replace, Suspend, Ttl, Which};
        let replace = Replace { to: "h:1/v".to_owned(), replica: Some(1), force: true };
        for (verb, body, expected) in [
            ("suspend", "", NodeAsk::Suspend(Suspend::default())),
            (
                "suspend",
                r#"{"ttl":"none","on_expire":"fail"}"#,
                NodeAsk::Suspend(Suspend { ttl: Ttl(None), on_expire: OnExpire::Fail, by: None }),
            ),
            ("resume", "", NodeAsk::Resume),
            ("accept-loss", "", NodeAsk::AcceptLoss),
            ("fail", "", NodeAsk::Fail),
            ("replace", r#"{"to":"h:1/v","replica":1,"force":true}"#, NodeAsk::Replace(replace)),
            ("migrate", r#"{"to":"h:1/v"}"#, NodeAsk::Migrate(Migrate::to("h:1/v"))),
            ("migration/pause", "", NodeAsk::Migration(Act::Pause, Which::default())),
            ("migration/release", r#"{"number":3}"#, NodeAsk::Migration(Act::Release, Which { number: Some(3) })),
        ] {
            let path = format!("/v1/arrays/a/nodes/n-800/{verb}");
            let node = NodeId(crate::units::Lba(800));
            let command = Command::Node { name: "a".to_owned(), node, ask: expected };
            assert_eq!(route("POST", &path, "", body.as_bytes()), Ok(Ask::Do(command)), "{verb}");
            assert_eq!(route("GET", &path, "", b"").unwrap_err().errno, Errno::EOPNOTSUPP, "{verb}");
        }
        let status = |verb: &str, body: &[u8]| {
            route("POST", &format!("/v1/arrays/a/nodes/n-800/{verb}"), "", body).unwrap_err().http_status()
        };
        assert_eq!((status("migration/explode", b""), status("migration", b"")), (404, 404));
        assert_eq!((status("migrate", b""), status("suspend", br#"{"ttl":"0"}"#)), (400, 400));
    }

    #[test]
    fn nodes_are_routed() {
        let (name, node) = ("a".to_owned(), NodeId(crate::units::Lba(800)));
        let add = |size| Command::AddNode { name: name.clone(), target: "h:1/v".to_owned(), size };
        for (method, path, body, command) in [
            ("POST", "/v1/arrays/a/nodes", r#"{"target":"h:1/v"}"#, add(None)),
            ("POST", "/v1/arrays/a/nodes", r#"{"target":"h:1/v","size":409600}"#, add(Some(409_600))),
            ("POST", "/v1/arrays/a/grow", "", Command::Grow { name: name.clone() }),
            ("DELETE", "/v1/arrays/a/nodes/n-800", "", Command::RemoveNode { name: name.clone(), node }),
        ] {
            assert_eq!(route(method, path, "", body.as_bytes()), Ok(Ask::Do(command)), "{method} {path}");
        }
        for (method, path) in
            [("GET", "/v1/arrays/a/nodes"), ("GET", "/v1/arrays/a/grow"), ("POST", "/v1/arrays/a/nodes/n-800")]
        {
            assert_eq!(route(method, path, "", b"").unwrap_err().http_status(), 405, "{method} {path}");
        }
    }

    #[test]
    fn the_control_tree_is_routed() {
        let path = || "devices/a/n-0/type".to_owned();
        for (method, line, body, ask) in [
            ("GET", "/metrics", "", Ask::Metrics),
            ("GET", "/v1/arrays/a/why", "", Ask::Why("a".to_owned())),
            ("GET", "/v1/tree", "", Ask::Tree(String::new())),
            ("GET", "/v1/tree/", "", Ask::Tree(String::new())),
            ("GET", "/v1/tree/devices/a/n-0/type", "", Ask::Tree(path())),
            ("PUT", "/v1/tree/devices/a/n-0/type", r#"{"value":"1"}"#, Ask::Store(path(), "1".to_owned())),
        ] {
            assert_eq!(route(method, line, "", body.as_bytes()), Ok(ask), "{method} {line}");
        }
        assert_eq!(route("POST", "/v1/tree/devices", "", b"").unwrap_err().http_status(), 405);
        assert_eq!(route("PUT", "/v1/tree/devices", "", b"1").unwrap_err().http_status(), 400);
    }

    #[test]
    fn what_is_not_in_the_table() {
        let status = |method, path, query, body| route(method, path, query, body).unwrap_err().http_status();
        assert_eq!(status("GET", "/", "", b""), 404);
        assert_eq!(status("GET", "/v2/arrays", "", b""), 404);
        assert_eq!(status("PUT", "/v1/arrays/a", "", b""), 405);
        assert_eq!(status("GET", "/v1/arrays/a/start", "", b""), 405);
        assert_eq!(status("GET", "/v1/arrays/a/nodes/n-0/replicas", "", b""), 405);
        assert_eq!(status("GET", "/v1/import", "", b""), 405);
        assert_eq!(status("DELETE", "/v1/arrays/a/nodes/800/replicas/0", "", b""), 400);
        assert_eq!(status("DELETE", "/v1/arrays/a/nodes/n-800/replicas/x", "", b""), 400);
        assert_eq!(status("GET", "/v1/arrays/..", "", b""), 400);
        assert_eq!(status("DELETE", "/v1/arrays/a", "sure=yes", b""), 400);
        assert_eq!(status("POST", "/v1/arrays", "", b"{"), 400);
        for body in [r#"{"colour":1}"#, r#"{"take_over":1}"#, r#"{"force":true}"#, "[]"] {
            assert_eq!(status("POST", "/v1/arrays/a/start", "", body.as_bytes()), 400, "{body}");
        }
        assert_eq!(status("POST", "/v1/arrays/a/stop", "", br#"{"foce":true}"#), 400);
    }

    proptest! {
        #[test]
        fn any_request_is_routed_without_panic(path in "[/a-z1.%]{0,20}", body in prop::collection::vec(any::<u8>(), 0..60)) {
            for method in ["GET", "POST", "DELETE", "x"] {
                let _ = route(method, &path, "", &body);
            }
        }
    }
}
