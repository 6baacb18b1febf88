//! Nodes that are late: a start went on without them, because nobody answered who has everything (the contract, "Late nodes").
//!
//! Such a node has slots and no targets. When the owner of arrays has claimed what is there, and the record and the labels say who is in
//! sync, it begins as every node begins at a start, under a new view.

use std::sync::Arc;

use super::freeze::Freeze;
use super::{Effect, Replicas, Standing, TargetState};
use crate::bugs::{Bug, planted};
use crate::engine::losses::Losses;
use crate::engine::steer::{Arrival, News};
use crate::engine::view::{Role, View};

impl Replicas {
    /// Whether nobody has come yet who has a node's data.
    pub fn is_late(&self, node: usize) -> bool {
        self.nodes[node].late
    }

    /// A late node has come, with these replicas.
    pub(super) fn arrive(&mut self, node: usize, replicas: &[Arrival]) {
        let in_sync = || replicas.iter().filter(|of| of.standing == Standing::InSync);
        let Some(keeper) =
            in_sync().next().map(|of| of.volume).filter(|_| self.nodes.get(node).is_some_and(|of| of.late))
        else {
            debug_assert!(false, "node {node} is not late, or nobody who has come has its data");
            return;
        };
        // What was in flight may be on some and not on others: the first is gone by, as at a start.
        let known = in_sync().count() == 1 || planted(Bug::LateReplicasAlike);
        let mut view = View::clone(&self.view);
        let slots = view.nodes[node].targets.clone().into_iter().enumerate();
        for ((place, target), of) in slots.zip(replicas) {
            debug_assert!(view.targets[target].volume.is_nil(), "a late node has no targets");
            if let Some(overlap) = &view.nodes[node].overlap {
                overlap.points.renew(place);
            }
            view.targets[target].volume = of.volume;
            let (role, standing) = match of.standing {
                Standing::InSync if known || of.volume == keeper => (Role::InSync, Standing::InSync),
                Standing::InSync => (Role::Leaving, Standing::Stale),
                Standing::Stale | Standing::Filling { .. } | Standing::Candidate { .. } => (Role::Stale, of.standing),
                Standing::Absent => (Role::Absent, Standing::Absent),
            };
            // What is missed on one that is not in sync is copied anyway.
            let losses = of.losses.filter(|_| !planted(Bug::LateLossForgotten));
            let losses = losses.map(|known| Losses { lost: known.lost && standing == Standing::InSync, ..known });
            self.targets[target] =
                TargetState { role, standing, failed: false, reachable: false, losses, refill: false, gone: None };
            let (at, volume, logged) = (of.target.clone(), of.volume, replicas.len() > 1);
            self.effects.push_back(Effect::Attach { target, at, volume, known: losses, logged });
        }
        self.view = Arc::new(view);
        let state = &mut self.nodes[node];
        (state.late, state.undecided) = (false, !known);
        if matches!(state.freeze, Freeze::Frozen { .. }) {
            // There is something to be flushed now.
            state.freeze = Freeze::Wanted { shut: true };
        }
        if !known {
            self.record(node);
        }
        self.publish();
        self.tell(News::Arrived { node, result: Ok(()) });
    }
}
