//! What is shown of arrays: plain values that the API, the tables and later the control tree are made of.

use std::time::Duration;

use serde::{Deserialize, Serialize};

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

/// How a node's volume is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Nothing is attached: the array is not started.
    #[default]
    Detached,
    /// The first connection is being made.
    Connecting,
    /// All of its connections are up.
    Connected,
    /// A connection was lost and is tried again.
    Reconnecting,
    /// Refused for ever: another owner has claimed the volume.
    Fenced,
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
        }
    }
}

/// What the data path says of one node while the array is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeLive {
    /// How its volume is attached.
    pub link: LinkState,
    /// How often the lost connection was tried since it was lost.
    pub tries: u64,
    /// For how long it is not connected.
    pub down: Duration,
    /// What ended the last connection, or refused the last try.
    pub last_error: Option<String>,
    /// Its part of the work.
    pub counters: Counters,
}

/// What the data path says while the array is started: read without waiting for anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// What was done on all nodes together.
    pub counters: Counters,
    /// One entry per node, in order.
    pub nodes: Vec<NodeLive>,
    /// What the kernel says of the block device: attribute and value, such as `queue/chunk_sectors`.
    pub device: Vec<(String, String)>,
}

/// One node, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name, such as `n-800`.
    pub name: String,
    /// Its first array sector when it was added.
    pub start: NodeId,
    /// Bytes of its volume that the array uses.
    pub size: u64,
    /// Where its data lives.
    pub target: Target,
    /// How its volume is attached.
    pub state: LinkState,
    /// How often the lost connection was tried.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tries: u64,
    /// For how many seconds it is not connected.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub down_seconds: u64,
    /// What ended the last connection, or refused the last try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Its part of the work since the array was started.
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
    /// Its nodes, in order.
    #[serde(default)]
    pub nodes: Vec<NodeStatus>,
    /// What the kernel says of the block device.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub kernel: std::collections::BTreeMap<String, String>,
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
}

impl ArrayStatus {
    /// Adds what the data path says.
    pub fn with_live(mut self, live: Live) -> ArrayStatus {
        self.counters = Some(live.counters);
        self.kernel = live.device.into_iter().collect();
        for (node, live) in self.nodes.iter_mut().zip(live.nodes) {
            node.state = live.link;
            node.tries = live.tries;
            node.down_seconds = live.down.as_secs();
            node.last_error = live.last_error;
            node.counters = live.counters;
        }
        self
    }
}
