//! What an array's record keeps of a node's move to another target, and of volumes that are still to be let go.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bugs::{Bug, planted};
use crate::control::migration::MigrationStatus;
use crate::control::spec::duration_text;
use crate::control::target::Target;
use crate::units::{Epoch, Id, Lba, NodeId, SECTOR_BYTES};
use crate::wire::volume::Claim;

/// How far a transfer is, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The source is the node's replica; the target is nothing yet. After the death of the daemon it goes on from [`Transfer::kept`].
    Open,
    /// The target is the node's replica, the source is none.
    Committed,
}

/// A node's move from one volume to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// What is shown of it; becomes its certificate.
    pub status: MigrationStatus,
    /// The volume that is to be replaced.
    pub from: Id,
    /// The volume that takes its place; nil before it has been made and assigned.
    pub to: Id,
    /// The transfer makes the volume: it is removed again when nothing comes of it.
    pub made: bool,
    /// For how long the source is kept afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "maybe_duration")]
    pub keep: Option<Duration>,
    /// How far it is.
    pub stage: Stage,
    /// While it is open: what the target has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
}

/// What the target of a transfer is durably known to have: everything below a sector of the node, but for what the region logs of
/// the node's replicas and its own have marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// The first sector that it may never have got.
    pub below: Lba,
    /// The epoch of the daemon that has noted it.
    pub epoch: Epoch,
}

impl Kept {
    /// Whether the last claim on a volume proves that no other host has used it since this was noted. `greatest`: the greatest epoch that this
    /// host has ever used. Claims only grow, and whoever uses a volume claims it.
    pub fn is_vouched_by(&self, claim: Option<&Claim>, host: Id, greatest: Epoch) -> bool {
        let ours = |claim: &Claim| claim.host == host && (self.epoch..=greatest).contains(&claim.epoch);
        claim.is_some_and(ours) || planted(Bug::CursorOfAnotherHost)
    }
}

impl Transfer {
    /// What the target has, of one that is open; nothing is not worth a word.
    pub fn goes_on_from(&self) -> Option<Kept> {
        self.kept.filter(|kept| self.stage == Stage::Open && kept.below > Lba(0))
    }

    /// Notes what the target has; it is shown, too.
    pub fn keep(&mut self, kept: Option<Kept>) {
        self.kept = kept;
        self.status.copied = kept.map_or(0, |kept| kept.below.0 * SECTOR_BYTES);
    }
}

mod maybe_duration {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Text(#[serde(with = "duration_text")] Duration);

    #[expect(clippy::ref_option, reason = "serde passes fields by reference")]
    pub(super) fn serialize<S: serde::Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        time.map(Text).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Text>::deserialize(deserializer)?.map(|Text(time)| time))
    }
}

/// A volume that is, or may be, assigned to the array and is none of its replicas: it is let go as soon as its server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debt {
    /// The node that it is or was of.
    pub node: NodeId,
    /// Where it lives.
    pub target: Target,
    /// Its id; nil where it may not be assigned at all.
    pub volume: Id,
    /// It was made for this array and holds nothing of use: it is removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remove: bool,
    /// Its data has moved: its label says where before it is let go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<Moved>,
}

/// Where the data of a volume has gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moved {
    /// The transfer.
    pub id: Id,
    /// The volume that has it now.
    pub volume: Id,
    /// Where that lives.
    pub to: Target,
}
