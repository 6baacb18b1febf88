//! Which target of a node a read goes to, and where else when that one refuses it or has no connection.

use super::{Group, Mask, bit_of};
use crate::bugs::{Bug, planted};
use crate::engine::part::{Part, PartState};
use crate::engine::shard::Shard;
use crate::engine::shared::add;
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::wire::frame::Op;

impl Shard {
    /// The target to read from: in sync, connected, with the least to do. Not one of `tried`.
    pub(super) fn pick(&self, view: &View, node: usize, tried: Mask) -> Option<usize> {
        let node = &view.nodes[node];
        let may = |target: &usize| {
            let readable = match view.role(*target) {
                Role::InSync => true,
                Role::Stale | Role::Syncing | Role::Mirror => planted(Bug::ReadFromStale),
                _ => false,
            };
            readable && !self.shared.target(*target).has_lost() && bit_of(node, *target) & tried == 0
        };
        let busy =
            |target: &usize| (!self.is_ready(*target), self.links[*target].requests + self.links[*target].queue.len());
        node.targets.iter().copied().filter(may).min_by_key(busy)
    }

    /// A read has ended well; it is counted where it was refused before.
    pub(super) fn read_answered(&mut self, index: u16, view: &View) {
        let Group { node, bad, .. } = *self.groups.at(index);
        for (_, target) in view.nodes[node].targets.iter().enumerate().filter(|(place, _)| bad & 1 << place != 0) {
            add(&self.shared.target(*target).gauge(self.config.index).rescued, 1);
        }
        self.end(index, Ok(()));
    }

    /// A read has failed on one target, or has no connection there: the next one, or the error when all were asked.
    pub(super) fn read_elsewhere(&mut self, index: u16, from: usize, error: Errno) {
        let view = std::sync::Arc::clone(&self.view);
        let group = *self.groups.at(index);
        if self.is_over(&group) || error == Errno::EBADE {
            return self.end(index, Err(error));
        }
        let here = bit_of(&view.nodes[group.node], from);
        let next = self.pick(&view, group.node, group.bad | here).filter(|target| self.is_ready(*target));
        match next.or_else(|| self.pick(&view, group.node, group.bad)) {
            Some(target) => drop(self.send_part(index, target)),
            None => self.end(index, Err(group.error.unwrap_or(error))),
        }
    }

    /// A read that waits for a connection goes to a target that has one.
    pub(in crate::engine::shard) fn reroute(&mut self, part: u16) -> bool {
        let Part { target, op, group, state, .. } = *self.parts.at(part);
        let Some(index) = group.filter(|_| op == Op::Read && state == PartState::Queued) else { return false };
        let view = std::sync::Arc::clone(&self.view);
        let group = *self.groups.at(index);
        let here = bit_of(&view.nodes[group.node], target);
        let next = self.pick(&view, group.node, group.bad | here).filter(|target| self.is_ready(*target));
        if next.is_some() {
            self.unqueue(part);
            self.release(part, false, Err(Errno::ETIMEDOUT));
        }
        next.is_some()
    }
}
