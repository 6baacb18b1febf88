//! What the rules of replicas do with the region logs of the servers: what is durably known of a target beside them, what is still
//! to be copied to one that lacks something, and when a log may be cleaned.

use super::{Replicas, Step};
use crate::bugs::{Bug, planted};
use crate::engine::region::SyncMap;
use crate::engine::view::Role;
use crate::units::Lba;

/// What is durably known of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It has everything that was acknowledged.
    InSync,
    /// It lacks something: what the region logs have marked.
    Stale,
    /// It is being filled to take another one's place, or was in sync until another one took its own. Never in sync by itself.
    Candidate,
    /// It is being filled: it lacks whatever lies from here on, and below what the logs have marked.
    Filling {
        /// The first sector of the node that was never copied to it.
        from: Lba,
    },
    /// It is none.
    Absent,
}

impl Standing {
    /// Whether it is one that is to be in sync and is not.
    pub(super) fn is_synced(self) -> bool {
        matches!(self, Standing::Stale | Standing::Filling { .. })
    }
}

impl Replicas {
    /// Servers may clean their logs while every shard works from a view in which all targets of a node are in sync.
    pub(super) fn permit_points(&self) {
        for (node, state) in self.view.nodes.iter().zip(&self.nodes) {
            let whole = |target: &usize| matches!(self.targets[*target].role, Role::InSync | Role::Absent);
            if let Some(overlap) = &node.overlap {
                overlap.points.permit(state.step == Step::Steady && node.targets.iter().all(whole));
            }
        }
    }

    /// What is to be copied to a target, as far as that is known without the logs: what was in sync is written everywhere from now on;
    /// then they tell what it lacks.
    pub(super) fn first_map(&self, target: usize, sectors: u64) -> SyncMap {
        let copied = match self.targets[target].standing {
            _ if planted(Bug::FillingIsStale) => sectors,
            Standing::Filling { from } => from.0,
            Standing::Candidate => 0,
            Standing::InSync | Standing::Stale | Standing::Absent => sectors,
        };
        SyncMap::copied_below(copied, sectors, self.view.region_sectors)
    }
}
