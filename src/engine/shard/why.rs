//! What the requests of a shard wait for, for people. Only looks.

use std::time::Duration;

use crate::engine::link::LinkState;
use crate::engine::part::{Part, PartState};
use crate::engine::request::{RequestOp, Tag};
use crate::engine::shard::group::{Group, GroupState, is_window};
use crate::engine::shard::{Active, Shard};
use crate::engine::view::{Gate, Role};
use crate::limits;
use crate::units::{Extent, Time};

/// What a piece of a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// That so much else is in flight that there is no room to begin it.
    Room,
    /// The gate of its node to open.
    Gate(Gate),
    /// A replica of its node that is in sync.
    NoReplica,
    /// The copying of its region.
    Window,
    /// Another request of the same range.
    Range,
    /// That a target missed it, to be made durable.
    Record,
    /// A connection.
    Link,
    /// What became of something that was sent on a former connection.
    Fate,
    /// Its turn on the connection.
    Turn,
    /// The answer.
    Answer,
}

/// A piece of a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// For how long its request has been there.
    pub age: Duration,
    /// What that is.
    pub op: RequestOp,
    /// On the array; empty for a flush.
    pub extent: Extent,
    /// How long until its deadline.
    pub left: Duration,
    /// The node; `None`: it has not come so far.
    pub node: Option<usize>,
    /// The target; `None`: it has not come so far.
    pub target: Option<usize>,
    /// What it waits for.
    pub cause: Cause,
}

impl Shard {
    /// What the frontend's requests wait for that are at least so old: the oldest ones, at most `limits::WHY_MAX`.
    pub fn why(&self, now: Time, age: Duration) -> Vec<Waiting> {
        let old = |tag: Tag| {
            let active = self.slots[usize::from(tag.0)].filter(|_| usize::from(tag.0) < self.config.depth)?;
            (now.since(active.since) >= age).then_some(active)
        };
        let mut all = Vec::new();
        for tag in &self.unissued {
            all.extend(old(*tag).filter(|active| active.parts == 0).map(|active| waiting(&active, now, Cause::Room)));
        }
        for group in self.groups.groups.iter().filter(|group| group.state != GroupState::Free) {
            if let (Some(active), Some(cause)) = (group.tag.and_then(old), self.group_waits_for(group)) {
                all.push(Waiting { node: Some(group.node), ..waiting(&active, now, cause) });
            }
        }
        for part in self.parts.used().filter(|part| !part.over) {
            if let Some(active) = old(part.tag) {
                let (node, target) = (Some(self.view.targets[part.target].node), Some(part.target));
                all.push(Waiting { node, target, ..waiting(&active, now, self.part_waits_for(part)) });
            }
        }
        all.sort_by_key(|waiting| std::cmp::Reverse(waiting.age));
        all.truncate(limits::WHY_MAX);
        all
    }

    /// `None`: its parts say it.
    fn group_waits_for(&self, group: &Group) -> Option<Cause> {
        let node = &self.view.nodes[group.node];
        match group.state {
            GroupState::Free | GroupState::Flying => None,
            GroupState::Deciding => Some(Cause::Record),
            GroupState::Waiting if node.gate != Gate::Open => Some(Cause::Gate(node.gate)),
            GroupState::Waiting if self.view.with_role(group.node, Role::InSync).next().is_none() => {
                Some(Cause::NoReplica)
            }
            GroupState::Waiting if self.parts.free() < node.targets.len() => Some(Cause::Room),
            GroupState::Waiting if group.mutates() && is_window(node, group.extent) => Some(Cause::Window),
            GroupState::Waiting => Some(Cause::Range),
        }
    }

    fn part_waits_for(&self, part: &Part) -> Cause {
        let gate = self.view.nodes[self.view.targets[part.target].node].gate;
        match part.state {
            PartState::Free | PartState::Sent => Cause::Answer,
            PartState::Queued if gate != Gate::Open => Cause::Gate(gate),
            PartState::Queued if !matches!(self.links[part.target].state, LinkState::Up(_)) => Cause::Link,
            PartState::Queued if self.shared.target(part.target).is_held() => Cause::Fate,
            PartState::Queued => Cause::Turn,
        }
    }
}

fn waiting(active: &Active, now: Time, cause: Cause) -> Waiting {
    let Active { request, since, deadline, .. } = *active;
    let (age, left) = (now.since(since), deadline.since(now));
    Waiting { age, op: request.op, extent: request.extent, left, node: None, target: None, cause }
}
