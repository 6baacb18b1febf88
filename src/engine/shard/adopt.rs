//! How a shard takes a new view of its array, and what it tells the owner.

use std::sync::Arc;

use crate::engine::link::LinkState;
use crate::engine::part::PartState;
use crate::engine::shard::Shard;
use crate::engine::shard::group::Report;
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::units::Time;

impl Shard {
    /// Works from a newer view from now on. [`Shard::poll_ack`] tells when that is true of what is in flight, too.
    pub fn adopt(&mut self, now: Time, view: Arc<View>) {
        self.now = now;
        if view.version <= self.view.version {
            return;
        }
        let former = std::mem::replace(&mut self.view, view);
        for target in 0..self.view.targets.len() {
            let (was, is) = (former.role(target), self.view.role(target));
            if was != is && !matches!(is, Role::InSync | Role::Syncing) {
                self.leave(target);
            }
            if is == Role::Stale {
                // It is not read before everything was copied to it.
                self.shared.target(target).forget_loss();
            }
        }
        self.decide_again();
        self.look_again();
    }

    /// Ends what is under way on a target that is left behind.
    fn leave(&mut self, target: usize) {
        for part in 0..self.parts.len() {
            let part = u16::try_from(part).unwrap_or(u16::MAX);
            let found = *self.parts.at(part);
            if found.target == target && found.state != PartState::Free && found.group.is_some() && !found.over {
                self.drop_part(part, Errno::EIO);
            }
        }
        if self.view.role(target) == Role::Absent {
            self.close(target);
        }
    }

    /// A node, and the view that this shard works from there: nothing is in flight on a target that was left, and nothing that
    /// was sent before a target began to sync. Once for each change of a node.
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
        let node = open.find(|node| !self.has_older(*node))?;
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
