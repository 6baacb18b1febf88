//! The targets that a node gains and loses while its array runs: each in a slot, of which every node has a few to spare.

use std::sync::Arc;

use super::{Effect, Replicas, Standing};
use crate::control::target::Target;
use crate::engine::steer::{MoveError, News};
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::units::Id;

/// Why a target is left for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gone {
    /// It was asked for.
    Asked,
    /// It was to take a place and has failed, or was told not to.
    Failed,
    /// Another one has taken its place.
    Replaced,
}

impl Replicas {
    /// The slot of a volume on a node.
    pub(super) fn slot(&self, node: usize, volume: Id) -> Option<usize> {
        let slots = &self.view.nodes.get(node)?.targets;
        slots.iter().copied().find(|target| self.view.targets[*target].volume == volume && !volume.is_nil())
    }

    /// Gives a spare slot of a node a volume, which lacks everything yet. `None`: there is no slot, or it has one already.
    pub(super) fn attach(&mut self, node: usize, at: Target, volume: Id, standing: Standing) -> Option<usize> {
        if self.slot(node, volume).is_some() {
            return None;
        }
        let slots = self.view.nodes.get(node)?.targets.iter().copied();
        let target = slots.into_iter().find(|target| self.view.targets[*target].volume.is_nil())?;
        let mut view = View::clone(&self.view);
        if let Some(overlap) = &view.nodes[node].overlap
            && let Some(place) = view.nodes[node].targets.iter().position(|other| *other == target)
        {
            overlap.points.renew(place);
        }
        view.targets[target].volume = volume;
        self.view = Arc::new(view);
        // What is being copied begins again where it was: it has to be in the logs, if there is a third one now.
        self.stop_job(node);
        let state = &mut self.targets[target];
        (state.role, state.standing, state.failed, state.reachable) = (Role::Stale, standing, false, false);
        state.losses = None;
        state.refill = false;
        self.effects.push_back(Effect::Attach { target, at, volume, known: None, logged: true });
        self.publish();
        Some(target)
    }

    /// A spare target could not be given its volume: whoever wanted it is told.
    pub(super) fn not_attached(&mut self, target: usize, errno: Errno) {
        let node = self.view.targets[target].node;
        if self.nodes[node].moving_to(target).is_some() {
            self.end_move(node, MoveError::Target(errno));
        }
        self.targets[target].gone.get_or_insert(Gone::Asked);
    }

    /// A replica is to be left for good.
    pub(super) fn detach(&mut self, node: usize, volume: Id) {
        let Some(target) = self.slot(node, volume) else { return self.tell(News::Detached { node, volume }) };
        self.targets[target].gone.get_or_insert(Gone::Asked);
    }

    /// The targets that are left for good, durably and by all shards, make room for others.
    pub(super) fn free_slots(&mut self, node: usize) {
        let gone = self.of(node, |target| target.gone.is_some() && target.role == Role::Absent);
        for target in gone {
            let volume = self.view.targets[target].volume;
            let mut view = View::clone(&self.view);
            view.targets[target].volume = Id::NIL;
            self.view = Arc::new(view);
            let gone = self.targets[target].gone.take();
            match gone {
                Some(Gone::Asked) => self.tell(News::Detached { node, volume }),
                Some(Gone::Failed) => self.candidate_gone(node, target, volume),
                Some(Gone::Replaced) | None => {}
            }
        }
    }
}
