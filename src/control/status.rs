//! What is shown of arrays: plain values that the API, the tables and later the control tree are made of.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::migration::{MigrationStatus, MoveLive};
use crate::control::node::Suspended;
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::scrub::{ScrubLive, ScrubStatus};
use crate::control::spec::{Alg, RunOptions};
use crate::control::target::Target;
use crate::units::{Epoch, Id, NodeId};

/// What an array is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its volumes are being assigned.
    Creating,
    /// Not in use.
    Stopped,
    /// To be in use as soon as its volumes are there; `why` says what is missing.
    Starting,
    /// In use.
    Started,
    /// It takes no more requests.
    Stopping,
    /// Its volumes are being freed.
    Removing,
    /// It was in use and ended by itself; `why` says the reason.
    Failed,
    /// Its record cannot be read; `why` says the reason.
    Corrupt,
}

impl State {
    /// The word of tables and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            State::Creating => "creating",
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Started => "started",
            State::Stopping => "stopping",
            State::Removing => "removing",
            State::Failed => "failed",
            State::Corrupt => "corrupt",
        }
    }
}

/// How far a replica can be trusted, as a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// It has every write that was acknowledged.
    InSync,
    /// It has missed writes.
    Stale,
    /// It is being filled.
    Syncing,
}

impl Trust {
    /// The word of the control tree and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Trust::InSync => "in_sync",
            Trust::Stale => "stale",
            Trust::Syncing => "syncing",
        }
    }
}

/// How a volume is attached. Ordered: the better, the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Nothing is attached: the array is not started.
    #[default]
    Detached,
    /// Refused for ever: another owner has claimed the volume.
    Fenced,
    /// A connection was lost and is tried again.
    Reconnecting,
    /// The first connection is being made.
    Connecting,
    /// All of its connections are up.
    Connected,
}

impl LinkState {
    /// The word of tables and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            LinkState::Detached => "detached",
            LinkState::Connecting => "connecting",
            LinkState::Connected => "connected",
            LinkState::Reconnecting => "reconnecting",
            LinkState::Fenced => "fenced",
        }
    }
}

/// What was done since the array was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Requests not answered yet.
    pub in_flight: u64,
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, discards and writes of zeros completed.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Reads that a replica has refused, and another one has answered.
    #[serde(default)]
    pub rescued_reads: u64,
    /// Data that arrived damaged, and was asked for or sent again.
    #[serde(default)]
    pub damaged: u64,
}

impl Counters {
    /// The sum of both.
    pub fn plus(self, other: Counters) -> Counters {
        Counters {
            in_flight: self.in_flight + other.in_flight,
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            writes: self.writes + other.writes,
            written_bytes: self.written_bytes + other.written_bytes,
            flushes: self.flushes + other.flushes,
            errors: self.errors + other.errors,
            rescued_reads: self.rescued_reads + other.rescued_reads,
            damaged: self.damaged + other.damaged,
        }
    }
}

/// What the data path says of one replica while the array is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaLive {
    /// The volume's id: replicas come and go while the array is started.
    pub volume: Id,
    /// How far it can be trusted now, and while it is synced how many of the node's bytes are the same on it; `None`: as recorded.
    pub trust: Option<(Trust, Option<u64>)>,
    /// Where it is reached now: a server's address and port, or the major and minor number of a local device.
    pub address: Option<String>,
    /// How its volume is attached.
    pub link: LinkState,
    /// How often the lost connection was tried since it was lost.
    pub tries: u64,
    /// For how long it is not connected.
    pub down: Duration,
    /// What ended the last connection, or refused the last try.
    pub last_error: Option<String>,
    /// Its machine has come back without what was acknowledged, and nobody has accepted that.
    pub lost: bool,
    /// Its part of the work.
    pub counters: Counters,
}

/// Whether requests of a node go through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// They do.
    #[default]
    Open,
    /// New ones wait; what was begun is still in flight.
    Draining,
    /// They wait, and nothing is in flight.
    Frozen,
    /// They end with EIO.
    Failing,
}

impl Gate {
    /// The word of tables and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Gate::Open => "open",
            Gate::Draining => "draining",
            Gate::Frozen => "frozen",
            Gate::Failing => "failing",
        }
    }
}

/// What the data path says of one node while the array is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeLive {
    /// Whether its requests go through.
    pub gate: Gate,
    /// Requests that wait at its gate.
    pub parked: u64,
    /// Its migration.
    pub migration: Option<MoveLive>,
    /// Its scrub.
    pub scrub: Option<ScrubLive>,
    /// One entry per volume that is attached.
    pub replicas: Vec<ReplicaLive>,
}

/// What the data path says while the array is started: read without waiting for anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// What was done on all nodes together.
    pub counters: Counters,
    /// Requests that can still be taken before the device has to wait.
    pub tags_free: u64,
    /// One entry per node, in order.
    pub nodes: Vec<NodeLive>,
    /// What the kernel says of the block device: attribute and value, such as `queue/chunk_sectors`.
    pub device: Vec<(String, String)>,
}

/// One replica, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Where it lives.
    pub target: Target,
    /// The volume's own id.
    #[serde(default)]
    pub volume: Id,
    /// How far it can be trusted.
    pub state: Trust,
    /// While it is filled for the first time: how many bytes of the node it has been given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<u64>,
    /// Where it is reached: a server's address and port, or the major and minor number of a local device. Only while it is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// How its volume is attached.
    pub link: LinkState,
    /// How often the lost connection was tried.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tries: u64,
    /// For how many seconds it is not connected.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub down_seconds: u64,
    /// What ended the last connection, or refused the last try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Its machine has come back without writes that it had acknowledged: nothing is served from here until `dst accept-loss`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
    /// Its part of the work since the array was started.
    pub counters: Counters,
}

impl ReplicaStatus {
    /// A replica of an array that is not started.
    pub fn detached(replica: &ReplicaSpec) -> ReplicaStatus {
        let (state, synced) = match replica.state {
            ReplicaState::InSync => (Trust::InSync, None),
            ReplicaState::Stale => (Trust::Stale, None),
            ReplicaState::Syncing { from } => (Trust::Syncing, Some(from.bytes())),
        };
        let (target, link, counters) = (replica.target.clone(), LinkState::Detached, Counters::default());
        let volume = replica.volume;
        ReplicaStatus {
            target,
            volume,
            state,
            synced,
            address: None,
            link,
            tries: 0,
            down_seconds: 0,
            last_error: None,
            lost: false,
            counters,
        }
    }
}

/// One node, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name, such as `n-800`.
    pub name: String,
    /// Its first array sector when it was added.
    pub start: NodeId,
    /// Bytes of each of its volumes that the array uses.
    pub size: u64,
    /// How the best of its in-sync replicas is attached: one is enough to serve the node.
    pub state: LinkState,
    /// Whether its requests go through.
    #[serde(default)]
    pub gate: Gate,
    /// Requests that wait at its gate.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub parked: u64,
    /// It is late: why the others are served without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub late: Option<String>,
    /// Who holds its requests, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<Suspended>,
    /// Its migration, while it is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
    /// The comparison of its replicas: the one under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubStatus>,
    /// The copies of its data.
    pub replicas: Vec<ReplicaStatus>,
    /// The work of all of them since the array was started.
    pub counters: Counters,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One array, as shown. An array whose record is corrupt has only a name, a state and a reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrayStatus {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Why it is not doing what it should: what is waited for, or what went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The block device or the NBD URI, while it is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// What is known from its record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<SpecStatus>,
    /// What was done since it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counters>,
    /// Requests that can still be taken before the device has to wait. Only while it is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags_free: Option<u64>,
    /// Its nodes, in order.
    #[serde(default)]
    pub nodes: Vec<NodeStatus>,
    /// Migrations that are over, the last ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migrations: Vec<MigrationStatus>,
    /// What the kernel says of the block device.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub kernel: std::collections::BTreeMap<String, String>,
    /// What was done as asked and may be regretted. Only in the answer to the command.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What an array's record says, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecStatus {
    /// Its id.
    pub id: Id,
    /// Size, bytes.
    pub size: u64,
    /// How it is laid out.
    pub alg: Alg,
    /// Chunk of a striped array, bytes; 0 for linear.
    pub chunk: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// The greatest epoch that was ever used.
    pub epoch: Epoch,
    /// How it runs, or ran last.
    pub run: RunOptions,
    /// It takes up what its volumes have when it is started the next time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub grow: bool,
}

impl NodeStatus {
    /// Whether it serves nothing because nobody has what it had acknowledged.
    pub fn has_lost(&self) -> bool {
        let mut in_sync = self.replicas.iter().filter(|replica| replica.state == Trust::InSync).peekable();
        in_sync.peek().is_some() && in_sync.all(|replica| replica.lost)
    }
}

impl ArrayStatus {
    /// What to say about nodes that serve nothing because of what their machines have lost.
    pub fn losses(&self) -> Vec<String> {
        let said = |node: &NodeStatus| {
            let (array, node) = (&self.name, &node.name);
            format!(
                "{node}: lost acknowledged writes: its machine has come back without them, and requests fail. What is left is served again after \
                 'dst accept-loss {array} {node}'"
            )
        };
        self.nodes.iter().filter(|node| node.has_lost()).map(said).collect()
    }

    /// Adds what the data path says.
    pub fn with_live(mut self, live: Live) -> ArrayStatus {
        self.counters = Some(live.counters);
        self.tags_free = Some(live.tags_free);
        self.kernel = live.device.into_iter().collect();
        for (node, live) in self.nodes.iter_mut().zip(live.nodes) {
            node.parked = live.parked;
            if live.gate != Gate::Open {
                node.gate = live.gate;
            }
            if let (Some(migration), Some(moving)) = (&mut node.migration, live.migration) {
                migration.with_live(moving);
            }
            if let (Some(scrub), Some(live)) = (&mut node.scrub, &live.scrub) {
                scrub.with_live(live);
            }
            for replica in &mut node.replicas {
                let found = live.replicas.iter().find(|live| live.volume == replica.volume).cloned();
                // One that is not attached yet is shown as recorded.
                let Some(live) = found else { continue };
                if let Some((state, synced)) = live.trust {
                    (replica.state, replica.synced) = (state, synced);
                }
                replica.address = live.address;
                replica.link = live.link;
                replica.tries = live.tries;
                replica.down_seconds = live.down.as_secs();
                replica.last_error.clone_from(&live.last_error);
                replica.lost = live.lost;
                replica.counters = live.counters;
            }
            let in_sync = node.replicas.iter().filter(|replica| replica.state == Trust::InSync);
            node.state = in_sync.map(|replica| replica.link).max().unwrap_or_default();
            node.counters = node.replicas.iter().fold(Counters::default(), |sum, replica| sum.plus(replica.counters));
        }
        self
    }
}
