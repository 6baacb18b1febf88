//! How a shard takes a new view of its array, and what it tells the owner.

use std::sync::Arc;

use crate::engine::link::LinkState;
use crate::engine::part::PartState;
use crate::engine::shard::group::Report;
use crate::engine::shard::{Shard, gate};
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::limits;
use crate::units::Time;

impl Shard {
    /// Works from a newer view from now on. [`Shard::poll_ack`] tells when that is true of what is in flight, too.
    pub fn adopt(&mut self, now: Time, view: Arc<View>) {
        self.now = now;
        if view.version <= self.view.version {
            return;
        }
        let former = std::mem::replace(&mut self.view, view);
        self.gated = gate::is_gated(&self.view);
        for target in 0..self.view.targets.len() {
            let (was, is) = (former.role(target), self.view.role(target));
            if former.targets[target].volume != self.view.targets[target].volume {
                self.links[target].renew();
            }
            if was != is && !is.is_written() {
                self.leave(target);
            }
            if is == Role::Stale {
                // It is not read before everything was copied to it.
                self.shared.target(target).forget_loss();
            }
        }
        self.pass_gates(&former);
        self.decide_again();
        self.look_again();
    }

    /// Ends what is under way on a target that is left behind.
    fn leave(&mut self, target: usize) {
        for part in 0..self.parts.len() {
            let part = u16::try_from(part).unwrap_or(u16::MAX);
            let found = *self.parts.at(part);
            if found.target != target || found.state == PartState::Free || found.over {
                continue;
            }
            if found.group.is_some() || self.is_flush(found.tag) {
                self.drop_part(part, Errno::EIO);
            } else if found.state == PartState::Queued
                && let Some(heir) = self.view.nodes[self.view.targets[target].node].single
            {
                self.hand_over(part, heir);
            }
        }
        if self.view.role(target) == Role::Absent {
            self.close(target);
            // Nothing is ever sent there again that what it may still do could harm.
            if std::mem::take(&mut self.links[target].holds) {
                self.shared.target(target).release();
            }
        }
    }

    /// The other targets of a target's node.
    pub fn siblings(&self, target: usize) -> Vec<usize> {
        let all = &self.view.nodes[self.view.targets[target].node].targets;
        all.iter().copied().filter(|other| *other != target).collect()
    }

    /// Connects to a target anew, at once: what is on its way is asked for again.
    pub fn reconnect(&mut self, target: usize) {
        self.links[target].hurry();
        self.close(target);
    }

    /// What waits for a target that has gone waits for the one in its place.
    fn hand_over(&mut self, index: u16, heir: usize) {
        self.unqueue(index);
        let part = self.parts.at_mut(index);
        (part.target, part.exposed) = (heir, false);
        self.marks[usize::from(index)] = self.shared.target(heir).flush_mark().unwrap_or([0; limits::SHARDS_MAX]);
        self.links[heir].queue.push_back(index);
    }

    /// A node, and the view that this shard works from there: nothing is in flight on a target that was left, nothing that
    /// was sent before a target began to sync, and at its gate what [`crate::engine::view::Gate`] says. Once for each change of a node.
    pub fn poll_ack(&mut self) -> Option<(usize, u64)> {
        if self.acked == self.view.version {
            return None;
        }
        let pending = |node: &usize| self.acked_nodes[*node] < self.view.nodes[*node].changed;
        let mut open = (0..self.view.nodes.len()).filter(pending).peekable();
        if open.peek().is_none() {
            self.acked = self.view.version;
            return None;
        }
        let node = open.find(|node| !self.has_older(*node) && !self.is_behind(*node))?;
        self.acked_nodes[node] = self.view.version;
        Some((node, self.view.version))
    }

    /// The next thing that the owner must know.
    pub fn poll_report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// The next shard that waits for what this one has given back: it is to be told to [`Shard::look`].
    pub fn poll_wake(&mut self) -> Option<usize> {
        (self.wakes != 0).then(|| {
            let shard = self.wakes.trailing_zeros();
            self.wakes &= self.wakes - 1;
            shard as usize
        })
    }

    /// Whether this shard could send to a target now.
    pub fn is_up(&self, target: usize) -> bool {
        matches!(self.links[target].state, LinkState::Up(_))
    }
}
