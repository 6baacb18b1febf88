//! The sync engine of a node: when it runs, from whom to whom, and what follows from how it ended.

use super::{Effect, Replicas, Standing, Step};
use crate::engine::copy::{Copied, CopyError, Task};
use crate::engine::replicas::freeze::Freeze;
use crate::engine::replicas::moves::Moving;
use crate::engine::view::Role;
use crate::limits;
use crate::units::Time;

/// A node's sync engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    None,
    Running {
        /// Whom it reads from.
        source: usize,
    },
    /// It was asked to end.
    Stopping {
        /// Whom it reads from.
        source: usize,
        /// Whether it may still copy something that it reads there.
        reads: bool,
    },
    /// It compares the replicas.
    Scrubbing {
        /// It was asked to end.
        stopping: bool,
    },
}

impl Replicas {
    /// Starts the sync engine that a node needs now, or ends the one that it does not.
    pub(super) fn run_job(&mut self, node: usize) {
        let state = &self.nodes[node];
        let wanted = state.syncing.filter(|target| {
            let open = state.freeze == Freeze::Open && self.targets[*target].role == Role::Syncing;
            let moving = state.moving_to(*target);
            open && moving.map_or(self.targets[*target].standing.is_synced(), Moving::wants_job)
        });
        match (wanted, state.job) {
            (Some(target), Job::None) if state.step == Step::Steady => self.start_job(node, target),
            (None, Job::Running { .. }) => self.stop_job(node),
            // A scrub makes way.
            (Some(_), Job::Scrubbing { .. }) => self.stop_job(node),
            _ => {}
        }
    }

    pub(super) fn start_job(&mut self, node: usize, target: usize) {
        let source = self.source(node, target);
        let (Some(source), Some(map)) = (source, self.view.nodes[node].sync.clone()) else { return };
        let state = &mut self.nodes[node];
        let moving = state.moving_to(target);
        let task = moving.map_or(Task::Copy { fresh: false }, Moving::task);
        let rate = moving.map_or(limits::SYNC_RATE, Moving::rate);
        state.job = Job::Running { source };
        self.effects.push_back(Effect::Sync { node, source, target, map, task, rate });
    }

    pub(super) fn stop_job(&mut self, node: usize) {
        let stopping = match self.nodes[node].job {
            Job::Running { source } => Job::Stopping { source, reads: true },
            Job::Scrubbing { stopping: false } => Job::Scrubbing { stopping: true },
            Job::None | Job::Stopping { .. } | Job::Scrubbing { stopping: true } => return,
        };
        self.nodes[node].job = stopping;
        self.effects.push_back(Effect::StopSync { node });
    }

    /// The sync engine that was asked to end reads no more. What it is still writing it has read before, and its windows are open.
    pub(super) fn source_left(&mut self, node: usize) {
        if let Job::Stopping { reads, .. } = &mut self.nodes[node].job {
            *reads = false;
            self.left(node);
        }
    }

    /// Whom a node's data is copied from: the one whose place is to be taken, or the first in sync.
    pub(super) fn source(&self, node: usize, target: usize) -> Option<usize> {
        let good = self.of(node, |state| {
            let lost = state.losses.is_some_and(|losses| losses.lost);
            state.role == Role::InSync && state.reachable && !lost
        });
        let from = self.nodes[node].moving_to(target).map(Moving::from).filter(|from| good.contains(from));
        from.or_else(|| good.first().copied())
    }

    /// Which target of a node is syncing now.
    pub(super) fn see_syncing(&mut self, node: usize) {
        if self.nodes[node].job == Job::None {
            self.nodes[node].syncing = self.of(node, |target| target.role == Role::Syncing).first().copied();
        }
    }

    pub(super) fn synced(&mut self, node: usize, result: Result<Copied, CopyError>, now: Time) {
        if matches!(self.nodes[node].job, Job::Scrubbing { .. }) {
            return self.scrub_ended(node, result, now);
        }
        let asked = matches!(self.nodes[node].job, Job::Stopping { .. });
        self.nodes[node].job = Job::None;
        self.left(node);
        let Some(target) = self.nodes[node].syncing else { return };
        if self.targets[target].role != Role::Syncing {
            self.nodes[node].syncing = None;
            return self.wait_longer(node, now);
        }
        if asked && result == Err(CopyError::Stopped) {
            // It goes on where it was, when it may.
            return;
        }
        if self.nodes[node].moving_to(target).is_some() {
            return self.move_synced(node, result, now);
        }
        if result.is_ok() && !self.targets[target].failed {
            self.nodes[node].pause = limits::SYNC_RETRY_MIN;
            self.nodes[node].retry_at = now;
            self.nodes[node].filled = Some(target);
        } else {
            self.targets[target].failed = true;
            self.wait_longer(node, now);
        }
    }

    /// What was filled is recorded as in sync, and then read. Not together with what leaves: that one may still be read until every shard
    /// has adopted that it is left.
    pub(super) fn join(&mut self, node: usize) {
        let state = &self.nodes[node];
        if state.step != Step::Steady {
            return;
        }
        let diverged = state.diverged;
        let Some(target) = self.nodes[node].filled.take() else { return };
        let state = &mut self.targets[target];
        if state.role == Role::Syncing && state.gone.is_none() && !state.failed && !diverged {
            state.standing = Standing::InSync;
            self.record(node);
        }
    }

    /// What has failed is tried again later.
    pub(super) fn wait_longer(&mut self, node: usize, now: Time) {
        let state = &mut self.nodes[node];
        state.retry_at = now.after(state.pause);
        state.pause = state.pause.saturating_mul(2).min(limits::SYNC_RETRY_MAX);
    }
}
