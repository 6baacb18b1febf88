//! What waits at the gate of a node: a suspend, or the moment of a cut-over ([`Gate`]).
//!
//! A request that waits here has no deadline: whoever shut the gate said how long. What had begun before is finished, or waits
//! where it is if its connection is gone; it then counts as waiting, too, so that a dead server does not hinder a suspend.

use std::sync::atomic::Ordering;

use crate::bugs::{Bug, planted};
use crate::engine::link::LinkState;
use crate::engine::part::{Part, PartState};
use crate::engine::request::Tag;
use crate::engine::shard::Shard;
use crate::engine::shard::group::{Group, GroupState};
use crate::engine::view::{Gate, Role, View};
use crate::errno::Errno;
use crate::wire::frame::Op;

/// Whether a group may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    Free,
    Wait,
    Refused,
}

/// Whether a gate of an array is not open.
pub(super) fn is_gated(view: &View) -> bool {
    view.nodes.iter().any(|node| node.gate != Gate::Open)
}

impl Shard {
    /// Whether nothing is sent to a target, whatever waits for it.
    pub(super) fn is_frozen(&self, target: usize) -> bool {
        let gate = self.view.nodes[self.view.targets[target].node].gate;
        self.gated && matches!(gate, Gate::Frozen | Gate::Failed) && !planted(Bug::FrozenStillSends)
    }

    /// The place in the queue of a target's link of what may be sent next: on a suspended node only a flush that was asked for.
    pub(super) fn first_free(&self, target: usize) -> Option<usize> {
        let queue = &self.links[target].queue;
        if !self.is_frozen(target) {
            return (!queue.is_empty()).then_some(0);
        }
        queue.iter().position(|index| self.is_flush(self.parts.at(*index).tag))
    }

    /// Whether a group that has not begun may.
    pub(super) fn at_gate(&self, group: &Group) -> Passage {
        match self.view.nodes[group.node].gate {
            Gate::Open => Passage::Free,
            gate => self.at_shut_gate(gate, group),
        }
    }

    #[cold]
    fn at_shut_gate(&self, gate: Gate, group: &Group) -> Passage {
        match gate {
            Gate::Open => Passage::Free,
            Gate::Failed => Passage::Refused,
            // A flush has nothing to wait for where everything is durable already.
            Gate::Frozen if group.op == Op::Flush && self.is_flushed(group.node) => Passage::Free,
            Gate::Draining | Gate::Frozen | Gate::Closing | Gate::Undecided | Gate::Late => Passage::Wait,
        }
    }

    /// Whether every acknowledged write of a node is durable on all targets that a flush would go to.
    fn is_flushed(&self, node: usize) -> bool {
        let written = |target: usize| self.view.role(target).is_written();
        let flushed = |target: usize| {
            let shared = self.shared.target(target);
            shared.is_flushed() && !shared.has_failed_flush() && !shared.has_lost()
        };
        self.view.nodes[node].targets.iter().copied().filter(|target| written(*target)).all(flushed)
    }

    /// Whether something that has begun on a node hinders what its gate is to bring about.
    pub(super) fn is_behind(&self, node: usize) -> bool {
        let closed = |target: &usize| matches!(self.links[*target].state, LinkState::Down { .. } | LinkState::Fenced);
        let mut gone = self.view.with_role(node, Role::Absent);
        if gone.any(|target| !closed(&target)) {
            return true;
        }
        let sent = |state: PartState| state == PartState::Sent;
        match self.view.nodes[node].gate {
            Gate::Open | Gate::Undecided | Gate::Late | Gate::Failed => false,
            Gate::Draining => {
                let asked = |part: &&Part| !self.is_flush(part.tag);
                self.parts_of(node).filter(asked).any(|part| sent(part.state) || self.is_ready(part.target))
            }
            Gate::Frozen => self.parts_of(node).any(|part| sent(part.state) && !self.is_flush(part.tag)),
            Gate::Closing if planted(Bug::CutOverBeforeDrained) => false,
            Gate::Closing => {
                let begun = |group: &Group| {
                    group.node == node && matches!(group.state, GroupState::Flying | GroupState::Deciding)
                };
                self.parts_of(node).next().is_some() || self.groups.groups.iter().any(begun)
            }
        }
    }

    /// Whether a request that is past its deadline waits at a gate; then its time begins anew.
    pub(super) fn spare(&mut self, tag: Tag) -> bool {
        if !self.gated || planted(Bug::ParkedHasDeadline) {
            return false;
        }
        let shut = |node: usize| self.view.nodes[node].gate.is_shut();
        let waits = |group: &Group| group.tag == Some(tag) && group.state == GroupState::Waiting && shut(group.node);
        let held = self.parts.used().any(|part| {
            part.tag == tag && part.state == PartState::Queued && shut(self.view.targets[part.target].node)
        });
        let spared = held || self.groups.groups.iter().any(waits);
        if spared {
            self.renew_deadline(tag);
        }
        spared
    }

    fn renew_deadline(&mut self, tag: Tag) {
        if let Some(active) = &mut self.slots[usize::from(tag.0)] {
            active.deadline = self.now.after(self.config.io_timeout);
        }
    }

    /// The tags of the requests that wait at the gate of a node.
    fn waiting_at(&self, node: usize) -> Vec<Tag> {
        let waits = |group: &&Group| group.state == GroupState::Waiting && group.node == node;
        let held = self.parts_of(node).filter(|part| part.state == PartState::Queued).map(|part| part.tag);
        self.groups.groups.iter().filter(waits).filter_map(|group| group.tag).chain(held).collect()
    }

    /// How many requests wait at the gate of a node.
    pub fn parked(&self, node: usize) -> usize {
        if !self.view.nodes[node].gate.is_shut() {
            return 0;
        }
        let waits = |group: &&Group| group.state == GroupState::Waiting && group.node == node;
        let held = self.parts_of(node).filter(|part| part.state == PartState::Queued).count();
        self.groups.groups.iter().filter(waits).count() + held
    }

    /// Publishes how many requests wait at the gates.
    pub(super) fn show_parked(&self) {
        for (number, node) in self.view.nodes.iter().enumerate() {
            let gauge = self.shared.target(node.targets[0]).gauge(self.config.index);
            gauge.parked.store(u32::try_from(self.parked(number)).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
    }

    /// After a view was adopted: what an opened gate lets go on has its time before it, and what a failed node refuses ends.
    pub(super) fn pass_gates(&mut self, former: &View) {
        self.show_parked();
        for node in 0..self.view.nodes.len() {
            let (was, is) = (former.nodes[node].gate, self.view.nodes[node].gate);
            if was == is {
                continue;
            }
            for group in self.groups.groups.iter_mut().filter(|group| group.node == node) {
                group.since = self.now;
            }
            if was.is_shut() && !is.is_shut() && !planted(Bug::ParkedHasDeadline) {
                self.waiting_at(node).into_iter().for_each(|tag| self.renew_deadline(tag));
            }
            if is == Gate::Open && planted(Bug::ParkedForgotten) {
                self.forget_waiting();
            }
            if is == Gate::Failed {
                let held = self.parts_of(node).filter(|part| part.state == PartState::Queued);
                let tags: Vec<Tag> = held.map(|part| part.tag).collect();
                tags.into_iter().for_each(|tag| self.give_up(tag, Errno::EIO));
            }
        }
    }
}
