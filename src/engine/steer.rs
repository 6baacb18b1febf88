//! What the owner of an array asks of its running data path, and what that tells.
//!
//! The owner decides what may be asked, makes volumes ready, and keeps what must survive it (a suspend and its end, a transfer, a
//! certificate) in the array's record. The data path does the work, under I/O, and asks for changes of the replicas to be made
//! durable ([`crate::engine::replicas::Effect::Save`]). Nodes are named by their place, replicas by the id of their volume.

use std::time::Duration;

use crate::control::migration::MigrationState;
use crate::control::target::Target;
use crate::engine::losses::Losses;
use crate::engine::replicas::Standing;
use crate::engine::scrub::{Findings, Repair};
use crate::errno::Errno;
use crate::geometry::map::Geometry;
use crate::units::{Id, Lba};

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Steer {
    /// New requests of a node are to wait. Answered by [`News::Frozen`] when nothing is in flight there and it is flushed.
    Freeze {
        /// The node.
        node: usize,
    },
    /// What waits at a frozen node goes on. Undoes `Freeze` and `Fail`; not answered.
    Thaw {
        /// The node.
        node: usize,
    },
    /// What waits at a frozen node ends with EIO, and so does what comes. Not answered.
    Fail {
        /// The node.
        node: usize,
    },
    /// What a node's machines have lost is accepted, durably: what is left is served. Not answered.
    AcceptLoss {
        /// The node.
        node: usize,
    },
    /// A volume, assigned, claimed and recorded as one that is to be filled, becomes a replica of a node in the background. When
    /// it is full that is made durable as every change of the replicas.
    Attach {
        /// The node.
        node: usize,
        /// Where it lives.
        target: Target,
        /// Its id.
        volume: Id,
    },
    /// A replica is to be left for good: durably [`crate::engine::replicas::Standing::Absent`] first, then answered by
    /// [`News::Detached`]. Never asked for the last one in sync.
    Detach {
        /// The node.
        node: usize,
        /// The replica.
        volume: Id,
    },
    /// A node moves from one target to another, which is attached, filled, verified and put in its place. Answered by
    /// [`News::Moved`].
    Move(Move),
    /// The operator's word that another volume has what a replica of a suspended node had: it takes its place at once. Answered by
    /// [`News::Moved`].
    Replace {
        /// The node.
        node: usize,
        /// The replica.
        from: Id,
        /// The volume that takes its place.
        to: Id,
        /// Where that lives.
        target: Target,
    },
    /// A move begins nothing further until it may again.
    Pause {
        /// The node.
        node: usize,
        /// Whether it is to wait.
        paused: bool,
    },
    /// A move ends; the node stays where it is. Answered by [`News::Moved`], which may also say that it was too late.
    Abort {
        /// The node.
        node: usize,
    },
    /// A move that was to go on where it was ([`crate::engine::replicas::Replicas::await_move`]) is over, durably: the region logs need keep nothing
    /// for it. Not answered.
    Stay {
        /// The node.
        node: usize,
    },
    /// A node's replicas are compared. Answered by [`News::Scrubbed`]. Never asked for while that is under way.
    Scrub(ScrubOrder),
    /// That is to end. Answered by [`News::Scrubbed`], unless nothing is under way.
    EndScrub {
        /// The node.
        node: usize,
    },
    /// Nodes of one target each have more sectors from now on. Answered by [`News::Grown`] when every shard knows.
    Grow(Geometry),
    /// A late node may be served: those that are there have been claimed, and the record and their labels say who is in sync. Answered
    /// by [`News::Arrived`].
    Arrive {
        /// The node.
        node: usize,
        /// All of its replicas, in order.
        replicas: Vec<Arrival>,
    },
}

/// A replica of a late node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Where it lives.
    pub target: Target,
    /// Its id.
    pub volume: Id,
    /// What the record says of it.
    pub standing: Standing,
    /// And of its machine.
    pub losses: Option<Losses>,
}

/// The comparison of a node's replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOrder {
    /// The node.
    pub node: usize,
    /// What is to be done about what differs.
    pub repair: Repair,
    /// Bytes of the node a second at most; 0: no bound.
    pub rate: u64,
}

/// What a scrub waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubWait {
    /// The node is suspended.
    Suspended,
    /// It moves.
    Moving,
    /// One of its replicas is being synced, or is about to be.
    Syncing,
    /// Too few of its replicas are in sync, or not the one that is to be gone by.
    NotInSync,
    /// One that is in sync cannot be asked.
    Unreachable,
    /// Other nodes of the array are being scrubbed.
    Turn,
}

/// Why a scrub has ended before everything was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubError {
    /// It was asked to.
    Aborted,
    /// The node has too few replicas for it by now.
    Alone,
    /// The replica that was to be gone by is none any more.
    SourceGone,
    /// This replica could not be put right: it is left, and filled anew.
    Repair(Id, Errno),
}

/// What is known of a node's replicas after a scrub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrubbed {
    /// Regions of the node.
    pub regions: u64,
    /// Regions that were compared.
    pub compared: u64,
    /// What was found.
    pub findings: Findings,
    /// Why not all were compared.
    pub error: Option<ScrubError>,
}

/// A node's move.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// The node.
    pub node: usize,
    /// The replica that is to be replaced.
    pub from: Id,
    /// The volume that takes its place.
    pub to: Id,
    /// Where that lives.
    pub target: Target,
    /// Bytes a second that are copied at most; 0: no bound.
    pub rate: u64,
    /// Compare the two before the cut-over.
    pub verify: bool,
    /// For so long the node's requests may wait before the move is recorded; else it is tried again later.
    pub max_freeze: Duration,
    /// The volume is given up when it takes longer than this for one request.
    pub target_timeout: Duration,
    /// Afterwards the former replica is still written, so that the move can be undone at once.
    pub keep: bool,
    /// The destination is new and reads as zeros: what the source never wrote need not be copied.
    pub fresh: bool,
    /// A former daemon has copied what lies below this, durably: it lacks there what the region logs have marked, and nothing else.
    pub copied: Lba,
}

/// How a move goes, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveShown {
    /// Where it is.
    pub phase: MigrationState,
    /// It begins nothing further until it may again.
    pub paused: bool,
    /// Cut-overs that were rolled back.
    pub rolled_back: u32,
}

/// What is told.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// Nothing is in flight on a node; what comes waits.
    Frozen {
        /// The node.
        node: usize,
        /// Everything that was acknowledged there is durable, so that a flush has nothing to wait for. False: it cannot be reached.
        flushed: bool,
    },
    /// Another owner has claimed a volume: nothing of this data path is written any more, and all of it is to end.
    Fenced {
        /// The volume.
        volume: Id,
    },
    /// A replica is no longer used.
    Detached {
        /// The node.
        node: usize,
        /// The replica.
        volume: Id,
    },
    /// A late node is served, or cannot be yet.
    Arrived {
        /// The node.
        node: usize,
        /// Why not.
        result: Result<(), String>,
    },
    /// A move has ended. After `Ok` the change of the replicas is durable already; with `keep` the former replica stays attached
    /// until it is detached, or fails.
    Moved {
        /// The node.
        node: usize,
        /// How.
        result: Result<Moved, MoveError>,
    },
    /// Whether every shard works with the layout that was asked for last.
    Grown {
        /// Else a node that was to grow has several targets, or is about to.
        done: bool,
    },
    /// A scrub has ended.
    Scrubbed {
        /// The node.
        node: usize,
        /// How.
        scrubbed: Scrubbed,
    },
}

/// What is known of a move that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moved {
    /// Regions of the node.
    pub regions: u64,
    /// Regions that were copied; writes that came meanwhile went to both.
    pub copied: u64,
    /// BLAKE3 over the digests of all regions, in order, of the two alike; `None`: they were not compared.
    pub root: Option<[u8; 32]>,
    /// For how long requests of the node waited, nanoseconds.
    pub freeze_nanos: u64,
    /// Cut-overs that were rolled back before, because they would have taken too long.
    pub rolled_back: u32,
}

/// Why a node stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveError {
    /// It was asked to.
    Aborted,
    /// The source could not be read here.
    Source(Lba, Errno),
    /// The destination could not be written or flushed, or was too slow.
    Target(Errno),
    /// The two differ in the region that begins here, although both have had the same writes.
    Different(Lba),
    /// It is not the node's move: there is none, or the replica is not in sync.
    Refused,
}
