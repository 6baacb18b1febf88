//! What the rules of replicas do about machines that have come back without what they had acknowledged. Shards serve nothing from
//! such a target ([`crate::engine::shared`]); it is left where another one has everything, else it waits for the operator's word.

use super::{Effect, Replicas, Standing};
use crate::engine::losses::Losses;
use crate::engine::shared::Shared;
use crate::engine::view::Role;
use crate::units::Id;

impl Replicas {
    /// With what the record knows of each target. Before any shard begins.
    #[must_use]
    pub fn with_losses(mut self, known: &[Option<Losses>], shared: &Shared) -> Replicas {
        for (target, (state, known)) in self.targets.iter_mut().zip(known).enumerate() {
            let Some(known) = *known else { continue };
            // What is missed on one that is not in sync is copied anyway.
            let known = Losses { lost: known.lost && state.standing == Standing::InSync, ..known };
            state.losses = Some(known);
            shared.target(target).begin(known);
        }
        self
    }

    /// Looks at what servers have told. What is new is made durable with the next [`Effect::Save`], which is asked for.
    pub fn look_at_losses(&mut self, shared: &Shared) {
        for (target, (state, of)) in self.targets.iter_mut().zip(&self.view.targets).enumerate() {
            let heard = shared.target(target).losses();
            if heard.is_some() && heard != state.losses && !of.volume.is_nil() {
                state.losses = heard;
                state.failed |= state.role == Role::InSync && heard.is_some_and(|losses| losses.lost);
                self.dirty = true;
            }
        }
    }

    /// What is to be in the record with the standings of an [`Effect::Save`]. What is missed on one that is not in sync anyway is no loss.
    pub fn losses(&self, shared: &Shared) -> Vec<(Id, Losses)> {
        let known = |(number, (target, state)): (usize, (&crate::engine::view::Target, &super::TargetState))| {
            let heard = shared.target(number).losses().filter(|_| !target.volume.is_nil())?;
            let lost = heard.lost && state.standing == Standing::InSync;
            Some((target.volume, Losses { lost, ..heard }))
        };
        self.view.targets.iter().zip(&self.targets).enumerate().filter_map(known).collect()
    }

    /// Something is missed on a target: it is left, if another one of its node has everything.
    pub(super) fn lost(&mut self, target: usize) {
        let state = &mut self.targets[target];
        // Of one that is syncing, too, everything is copied again.
        state.failed = true;
        if let Some(losses) = &mut state.losses {
            losses.lost = true;
        }
    }

    /// What it had lost is copied to it: it does not count any more when it is in sync.
    pub(super) fn forget_loss(&mut self, target: usize) {
        if let Some(losses) = &mut self.targets[target].losses {
            losses.lost = false;
        }
    }

    /// The targets of a node to go by: those in sync, but for those that have lost something where another has not.
    pub(super) fn whole(&self, node: usize) -> Vec<usize> {
        let in_sync = self.of(node, |target| target.role == Role::InSync);
        let whole: Vec<usize> = in_sync.iter().copied().filter(|target| !self.has_lost(*target)).collect();
        if whole.is_empty() { in_sync } else { whole }
    }

    pub(super) fn has_lost(&self, target: usize) -> bool {
        self.targets[target].losses.is_some_and(|losses| losses.lost)
    }

    pub(super) fn accept_loss(&mut self, node: usize) {
        for target in self.of(node, |target| target.role == Role::InSync) {
            self.forget_loss(target);
            self.effects.push_back(Effect::Forgive { target });
        }
    }
}
