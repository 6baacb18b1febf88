//! One migration of a node, as it is shown and, when it has ended, kept in the array's record: the certificate of what was done.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::node::target_timeout_default;
use crate::control::spec::duration_text;
use crate::control::target::Target;
use crate::limits;
use crate::units::{Epoch, Id, NodeId};

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// The target is made ready and attached.
    Preparing,
    /// Regions are copied.
    Copying,
    /// Everything is on both; what is written goes to both.
    Mirroring,
    /// The two are compared.
    Verifying,
    /// Requests wait while the target takes the place.
    CutOver,
    /// The target is in place; the source is written, too, for a while.
    Committed,
    /// The node is on the target.
    Done,
    /// It was asked to end; the node is where it was.
    Aborted,
    /// It could not be done; the node is where it was.
    Failed,
}

impl MigrationState {
    /// The word of tables and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            MigrationState::Preparing => "preparing",
            MigrationState::Copying => "copying",
            MigrationState::Mirroring => "mirroring",
            MigrationState::Verifying => "verifying",
            MigrationState::CutOver => "cut over",
            MigrationState::Committed => "committed, source kept",
            MigrationState::Done => "done",
            MigrationState::Aborted => "aborted",
            MigrationState::Failed => "failed",
        }
    }

    /// Whether nothing more happens.
    pub const fn is_over(self) -> bool {
        matches!(self, MigrationState::Done | MigrationState::Aborted | MigrationState::Failed)
    }
}

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationStatus {
    /// Counts the migrations of the array, from 1.
    pub number: u64,
    /// Its id for ever, on the labels too.
    pub id: Id,
    /// The node that moves.
    pub node: NodeId,
    /// Where its data was.
    pub from: Target,
    /// Where it goes.
    pub to: Target,
    /// How far it is.
    pub state: MigrationState,
    /// It begins nothing further until it is resumed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Bytes a second that are copied at most; 0: no bound.
    pub rate: u64,
    /// For so long requests may wait before the cut-over is recorded.
    #[serde(with = "duration_text")]
    pub max_freeze: Duration,
    /// The new target is given up when it takes longer than this for one request.
    #[serde(
        default = "target_timeout_default",
        with = "duration_text",
        skip_serializing_if = "is_target_timeout_default"
    )]
    pub target_timeout: Duration,
    /// Whether the two are, or were, compared. Where not, nothing is certified.
    pub verify: bool,
    /// The source is kept until then, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_until: Option<u64>,
    /// The array's epoch when it began.
    pub epoch: Epoch,
    /// When it began, seconds since 1970.
    pub begun: u64,
    /// When it ended, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// Bytes of the node.
    pub size: u64,
    /// Bytes that were copied; of one that is not over, bytes that the target is known to have.
    #[serde(default)]
    pub copied: u64,
    /// It was interrupted, and has gone on from here, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<u64>,
    /// Regions of the node.
    #[serde(default)]
    pub regions: u64,
    /// BLAKE3 over the digests of all regions, in order, of the two alike: 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// For how long requests of the node waited, nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_nanos: Option<u64>,
    /// Cut-overs that were rolled back because they would have taken too long.
    #[serde(default)]
    pub rolled_back: u32,
    /// Why it is not done, or waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

fn is_target_timeout_default(time: &Duration) -> bool {
    *time == target_timeout_default()
}

/// What the data path says of a node's migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveLive {
    /// How far it is.
    pub state: MigrationState,
    /// Bytes of the node that are the same on the target.
    pub copied: u64,
    /// Cut-overs that were rolled back.
    pub rolled_back: u32,
}

impl MigrationStatus {
    /// One that is about to begin: nothing is known of it but who moves, from where to where.
    pub fn new(number: u64, id: Id, node: NodeId, from: Target, to: Target) -> MigrationStatus {
        MigrationStatus {
            number,
            id,
            node,
            from,
            to,
            state: MigrationState::Preparing,
            paused: false,
            rate: 0,
            max_freeze: limits::MAX_FREEZE_DEFAULT,
            target_timeout: target_timeout_default(),
            verify: true,
            keep_until: None,
            epoch: Epoch(0),
            begun: 0,
            ended: None,
            size: 0,
            copied: 0,
            resumed: None,
            regions: 0,
            root: None,
            freeze_nanos: None,
            rolled_back: 0,
            why: None,
        }
    }

    /// Adds what the data path says.
    pub fn with_live(&mut self, live: MoveLive) {
        if !self.state.is_over() {
            (self.state, self.rolled_back) = (live.state, live.rolled_back);
            // Before it copies, what is known of it is what the record has.
            if live.state != MigrationState::Preparing {
                self.copied = live.copied;
            }
        }
    }
}
