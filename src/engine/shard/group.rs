//! What a request is on a node with several targets: one part for each target that must have it, and one result.
//!
//! ```text
//! Waiting --its range is taken--> Flying --every part has ended--> over
//!    |                              |
//!    |                              +--> Deciding (a target missed it) --a view has settled it--> over
//!    +--deadline--> over
//! ```
//!
//! What holds (the contract, 1.1, 1.4, 8.1 and 8.2): a write's range is taken, alone, from before its first part is sent until
//! every target has it or is durably known not to. A write that a target missed is not acknowledged before. Where no in-sync
//! target has it the caller is told at once, and the range stays taken until one target alone is in sync: nobody can read first
//! one and then the other.

use crate::bugs::{Bug, planted};
use crate::engine::link::LinkState;
use crate::engine::overlap::{Hold, Overlap, conflict};
use crate::engine::part::{Part, PartState};
use crate::engine::region::RegionState;
use crate::engine::request::Tag;
use crate::engine::shard::Shard;
use crate::engine::shard::gate::Passage;
use crate::engine::view::{Node, Role, View};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Extent, Time};
use crate::wire::frame::Op;

mod reads;

/// Targets of a node, one bit each, by their place in its list.
type Mask = u8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupState {
    Free,
    Waiting,
    Flying,
    Deciding,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) state: GroupState,
    /// Whose it is; `None` once that one was told.
    pub(super) tag: Option<Tag>,
    pub(super) node: usize,
    pub(super) op: Op,
    fua: bool,
    pub(super) extent: Extent,
    offset: usize,
    /// The view it was sent under, and when.
    version: u64,
    pub(super) since: Time,
    /// Parts that have not ended.
    flying: u32,
    /// Who has it; who has missed it, or may have; who was sent it.
    ok: Mask,
    bad: Mask,
    touched: Mask,
    error: Option<Errno>,
    /// A change in flight: which counter of [`crate::engine::points`] has it.
    pub(super) turn: Option<usize>,
    /// It has waited for so long that its shard goes first.
    favoured: bool,
    /// Its range is taken.
    held: bool,
}

impl Group {
    pub(super) fn mutates(&self) -> bool {
        matches!(self.op, Op::Write | Op::Discard | Op::WriteZeroes)
    }

    fn hold(&self) -> Hold {
        if self.op == Op::Read { Hold::Shared } else { Hold::Exclusive }
    }

    /// Whether some target has it, or may have.
    pub(super) fn is_anywhere(&self) -> bool {
        self.ok | self.touched != 0
    }

    /// Whether the two must not be in flight together.
    fn excludes(&self, other: &Group) -> bool {
        let ranged = self.op.has_range() && other.op.has_range() && self.node == other.node;
        ranged && (self.mutates() || other.mutates()) && conflict(self.extent, other.extent)
    }
}

/// What a shard has to tell the owner of the array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// A target has missed a write, or cannot make durable what it has, while another one has it.
    Failed {
        /// Which.
        target: usize,
        /// Why.
        errno: Errno,
    },
    /// A target's machine has come back without something that was acknowledged.
    Lost {
        /// Which.
        target: usize,
    },
    /// A target is another owner's.
    Fenced {
        /// Which.
        target: usize,
    },
    /// A write that failed may be on some targets of a node and not on others.
    Diverged {
        /// Which.
        node: usize,
    },
}

/// The groups of a shard: a fixed number.
#[derive(Debug)]
pub(super) struct Groups {
    pub(super) groups: Vec<Group>,
    free: Vec<u16>,
    /// Those that wait for their range, oldest first.
    waiting: Vec<u16>,
    /// Something was given back that a waiting one may have waited for.
    look: bool,
}

impl Groups {
    pub(super) fn new(count: usize) -> Groups {
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let none = Group {
            state: GroupState::Free,
            tag: None,
            node: 0,
            op: Op::Flush,
            fua: false,
            extent: Extent::default(),
            offset: 0,
            version: 0,
            since: Time(0),
            flying: 0,
            ok: 0,
            bad: 0,
            touched: 0,
            error: None,
            turn: None,
            favoured: false,
            held: false,
        };
        let waiting = Vec::with_capacity(usize::from(count));
        Groups { groups: vec![none; usize::from(count)], free: (0..count).rev().collect(), waiting, look: false }
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Something was given back.
    pub(super) fn note_release(&mut self) {
        self.look |= !self.waiting.is_empty();
    }

    pub(super) fn at(&self, group: u16) -> &Group {
        &self.groups[usize::from(group)]
    }

    pub(super) fn at_mut(&mut self, group: u16) -> &mut Group {
        &mut self.groups[usize::from(group)]
    }

    fn indices(&self) -> impl Iterator<Item = u16> + use<> {
        0..u16::try_from(self.groups.len()).unwrap_or(u16::MAX)
    }
}

fn bit_of(node: &Node, target: usize) -> Mask {
    node.targets.iter().position(|other| *other == target).map_or(0, |place| 1 << place)
}

fn mask(view: &View, node: usize, wanted: impl Fn(Role) -> bool) -> Mask {
    let targets = view.nodes[node].targets.iter().enumerate();
    targets.filter(|(_, target)| wanted(view.role(**target))).fold(0, |mask, (place, _)| mask | 1 << place)
}

impl Shard {
    /// Makes a group for a piece of a request; it waits for its turn, and for its range.
    pub(super) fn new_group(&mut self, tag: Tag, node: usize, op: Op, extent: Extent, offset: usize, fua: bool) {
        let Some(index) = self.groups.free.pop() else { return debug_assert!(false, "no group is free") };
        *self.groups.at_mut(index) = Group {
            state: GroupState::Waiting,
            tag: Some(tag),
            node,
            op,
            fua,
            extent,
            offset,
            version: self.view.version,
            since: self.now,
            flying: 0,
            ok: 0,
            bad: 0,
            touched: 0,
            error: None,
            turn: None,
            favoured: false,
            held: false,
        };
        // It is started when the request is whole: it may end at once.
        self.groups.waiting.push(index);
        self.groups.look = true;
    }

    /// Another shard, or the sync engine, has given something back that this shard waits for.
    pub fn look(&mut self, now: Time) {
        self.now = now;
        self.groups.look = true;
        self.look_again();
    }

    /// Starts what has waited and can go on now, oldest first.
    pub(super) fn look_again(&mut self) {
        while std::mem::take(&mut self.groups.look) {
            let mut place = 0;
            let view = std::sync::Arc::clone(&self.view);
            while let Some(index) = self.groups.waiting.get(place).copied() {
                match self.admit(index, place, &view) {
                    Passage::Wait => place += 1,
                    // It is out of the line before it starts: it may end at once, and its place be taken by another.
                    passage => {
                        self.groups.waiting.remove(place);
                        self.unfavour(index);
                        if passage == Passage::Refused {
                            self.end(index, Err(Errno::EIO));
                        } else {
                            self.fly(index);
                        }
                    }
                }
            }
            self.retry_unissued();
        }
    }

    /// Whether a group may be sent: then its range is taken. Of those that wait, the first `earlier` come before it.
    fn admit(&mut self, index: u16, earlier: usize, view: &View) -> Passage {
        let group = *self.groups.at(index);
        let passage = self.at_gate(&group);
        if passage != Passage::Free {
            return passage;
        }
        let node = &view.nodes[group.node];
        // Without a target to go by it waits for a view that has one.
        let nobody = view.with_role(group.node, Role::InSync).next().is_none();
        if nobody || self.parts.free() < node.targets.len() {
            return Passage::Wait;
        }
        let Some(overlap) = node.overlap.as_deref().filter(|_| group.op.has_range()) else { return Passage::Free };
        if self.groups.waiting[..earlier].iter().any(|other| self.groups.at(*other).excludes(&group)) {
            return Passage::Wait;
        }
        let late = group.since.after(limits::TICK) <= self.now;
        // Before the turn: who waits for a window leaves the turn to others, and does not ask for it again meanwhile.
        if !planted(Bug::WindowWantsTurn) && self.waits_for_window(index, node, overlap) {
            return Passage::Wait;
        }
        if overlap.favours_other(self.config.index) {
            // It has its turn as soon as the other one has had its own.
            self.favour_if(late, index, overlap);
            return Passage::Wait;
        }
        if planted(Bug::WindowWantsTurn) && self.waits_for_window(index, node, overlap) {
            return Passage::Wait;
        }
        loop {
            if !overlap.take(self.config.index, group.extent, group.hold()) {
                self.favour_if(late, index, overlap);
                return Passage::Wait;
            }
            if !(group.mutates() && is_window(node, group.extent)) {
                break;
            }
            // It was opened before the range was taken.
            self.wake(overlap.release(group.extent, group.hold()));
            if self.waits_for_window(index, node, overlap) {
                return Passage::Wait;
            }
        }
        self.groups.at_mut(index).held = true;
        Passage::Free
    }

    /// Whether a group would change what is being copied; then its shard is woken afterwards.
    fn waits_for_window(&mut self, index: u16, node: &Node, overlap: &Overlap) -> bool {
        let group = *self.groups.at(index);
        if !group.mutates() || !is_window(node, group.extent) {
            return false;
        }
        overlap.wait(self.config.index);
        // It may have been closed before this shard was seen waiting.
        let waits = is_window(node, group.extent);
        if waits {
            self.unfavour(index);
        }
        waits
    }

    /// A group has waited for long.
    fn favour_if(&mut self, late: bool, index: u16, overlap: &Overlap) {
        if late {
            overlap.favour(self.config.index);
            self.groups.at_mut(index).favoured = true;
        }
    }

    /// A group has what it waited for, or does not wait any more.
    fn unfavour(&mut self, index: u16) {
        let group = self.groups.at_mut(index);
        if std::mem::take(&mut group.favoured)
            && let Some(overlap) = self.view.nodes[group.node].overlap.clone()
        {
            self.wake(overlap.unfavour(self.config.index));
        }
    }

    fn fly(&mut self, index: u16) {
        let view = std::sync::Arc::clone(&self.view);
        let group = self.groups.at_mut(index);
        group.state = GroupState::Flying;
        (group.version, group.since) = (view.version, self.now);
        let group = *group;
        let node = &view.nodes[group.node];
        let fenced = |target: &usize| self.links[*target].state == LinkState::Fenced;
        if node.targets.iter().any(fenced) {
            self.groups.at_mut(index).error = Some(Errno::EBADE);
            return self.decide(index);
        }
        self.count_in(index);
        if group.op == Op::Read {
            match self.pick(&view, group.node, 0) {
                Some(target) => drop(self.send_part(index, target)),
                None => self.end(index, Err(Errno::EIO)),
            }
            return;
        }
        for target in node.targets.iter().copied() {
            self.fly_to(index, &view, target);
        }
        if self.groups.at(index).flying == 0 {
            self.decide(index);
        }
    }

    /// One target's share of a write or a flush.
    fn fly_to(&mut self, index: u16, view: &View, target: usize) {
        let group = *self.groups.at(index);
        let node = &view.nodes[group.node];
        let bit = bit_of(node, target);
        let shared = self.shared.target(target);
        let failed_flush = shared.has_failed_flush() || shared.has_lost();
        match view.role(target) {
            Role::Leaving => self.groups.at_mut(index).bad |= bit,
            role if role.is_written() && failed_flush => {
                let group = self.groups.at_mut(index);
                group.bad |= bit;
                group.error.get_or_insert(Errno::EIO);
            }
            // One that is syncing, too: it will be in sync as soon as the last region is copied, with what was flushed by then.
            Role::Syncing if group.op == Op::Flush && planted(Bug::FlushSkipsSyncing) => {}
            role if role.is_written() && group.op == Op::Flush => match self.shared.target(target).flush_mark() {
                None => self.groups.at_mut(index).ok |= bit,
                Some(mark) => {
                    if let Some(part) = self.send_part(index, target) {
                        self.marks[usize::from(part)] = mark;
                    }
                }
            },
            Role::InSync if planted(Bug::OneReplicaWritten) && target != node.targets[0] => {
                self.groups.at_mut(index).ok |= bit;
            }
            Role::InSync | Role::Mirror => drop(self.send_part(index, target)),
            Role::Syncing if group.mutates() && is_copied(node, group.extent) => drop(self.send_part(index, target)),
            Role::Syncing | Role::Stale | Role::Absent => {}
        }
    }

    /// Queues a part of a group on a target's link.
    fn send_part(&mut self, index: u16, target: usize) -> Option<u16> {
        let group = *self.groups.at(index);
        let part = self.parts.take(group.tag?, target, group.op, group.extent)?;
        let point = if group.op == Op::Flush { self.point_for(group.node, target) } else { 0 };
        let made = self.parts.at_mut(part);
        (made.fua, made.offset, made.group, made.point) = (group.fua, group.offset, Some(index), point);
        self.groups.at_mut(index).flying += 1;
        self.links[target].queue.push_back(part);
        Some(part)
    }

    /// Whether what is asked of a target now is sent at once.
    pub(super) fn is_ready(&self, target: usize) -> bool {
        matches!(self.links[target].state, LinkState::Up(_)) && !self.shared.target(target).is_held()
    }

    /// A part of a group has ended. `answered`: by its server, not by the loss of its connection or a deadline.
    pub(super) fn group_part(&mut self, index: u16, part: &Part, answered: bool, result: Result<(), Errno>) {
        let view = std::sync::Arc::clone(&self.view);
        let node = self.groups.at(index).node;
        let bit = bit_of(&view.nodes[node], part.target);
        let group = self.groups.at_mut(index);
        group.flying -= 1;
        if part.state == PartState::Sent || part.exposed {
            group.touched |= bit;
        }
        match result {
            Ok(()) => group.ok |= bit,
            Err(error) => {
                // How a connection ended is not how the request did.
                let error = if answered || error == Errno::EBADE { error } else { Errno::EIO };
                group.bad |= if answered || group.op != Op::Read { bit } else { 0 };
                // That another owner has the array is more than any other news; what ails a target that is only being filled, or is
                // being left, is none of the caller's business.
                let own = view.role(part.target) == Role::InSync;
                if error == Errno::EBADE || (own && group.error.is_none()) {
                    group.error = Some(error);
                }
            }
        }
        match result {
            Err(error) if part.op == Op::Read => self.read_elsewhere(index, part.target, error),
            _ if part.op == Op::Read => self.read_answered(index, &view),
            _ if self.groups.at(index).flying == 0 => self.decide(index),
            _ => {}
        }
    }

    /// Every part of a write or a flush has ended, or the view has changed since: what its caller is told, and when.
    fn decide(&mut self, index: u16) {
        let view = std::sync::Arc::clone(&self.view);
        let group = *self.groups.at(index);
        let error = group.error.unwrap_or(Errno::EIO);
        if error == Errno::EBADE && !planted(Bug::FencedIsFailed) {
            return self.end(index, Err(error));
        }
        let have = group.ok & mask(&view, group.node, |role| role == Role::InSync);
        let missed = group.bad & !mask(&view, group.node, Role::is_settled);
        if have != 0 && (missed == 0 || planted(Bug::AckDegradedEarly)) {
            return self.end(index, Ok(()));
        }
        if have != 0 {
            for (place, target) in view.nodes[group.node].targets.iter().enumerate() {
                if missed & 1 << place != 0 && view.role(*target) != Role::Leaving {
                    self.report(*target, Report::Failed { target: *target, errno: error });
                }
            }
            self.groups.at_mut(index).state = GroupState::Deciding;
            // Whoever asked waits no longer; its range stays taken.
            if self.is_over(&group) {
                self.tell(index, Err(error));
            }
            return;
        }
        let attached = mask(&view, group.node, |role| role.is_written() || role == Role::Leaving);
        let alike = !group.mutates() || (group.ok | group.touched) == 0 || attached.count_ones() <= 1;
        if alike || planted(Bug::DivergenceIgnored) {
            return self.end(index, Err(error));
        }
        self.tell(index, Err(error));
        self.report_diverged(group.node);
        self.groups.at_mut(index).state = GroupState::Deciding;
    }

    /// What [`Bug::ParkedForgotten`] does.
    pub(super) fn forget_waiting(&mut self) {
        if !self.groups.waiting.is_empty() {
            self.groups.waiting.remove(0);
        }
    }

    /// Whether its request was given up.
    fn is_over(&self, group: &Group) -> bool {
        group.tag.is_none_or(|tag| self.slots[usize::from(tag.0)].is_none_or(|active| active.over))
    }

    /// Tells the owner, once for each view.
    fn report(&mut self, target: usize, report: Report) {
        if self.reported[target] != self.view.version {
            self.reported[target] = self.view.version;
            self.reports.push_back(report);
        }
    }

    /// The same of a node as a whole: that one of its targets was reported must not hide it.
    fn report_diverged(&mut self, node: usize) {
        let hidden = planted(Bug::ReportsMixed) && self.reported[self.view.nodes[node].targets[0]] == self.view.version;
        if self.diverged[node] != self.view.version && !hidden {
            self.diverged[node] = self.view.version;
            self.reports.push_back(Report::Diverged { node });
        }
    }

    /// Another owner has claimed a target: whatever else was reported, that ends the array.
    pub(super) fn report_fenced(&mut self, target: usize) {
        self.reports.push_back(Report::Fenced { target });
    }

    /// A target has come back without something that was acknowledged: it is left, if another one has it.
    pub(super) fn report_loss(&mut self, target: usize) {
        self.report(target, Report::Lost { target });
    }

    fn tell(&mut self, index: u16, result: Result<(), Errno>) {
        if let Some(tag) = self.groups.at_mut(index).tag.take() {
            self.unit_done(tag, result);
        }
    }

    fn end(&mut self, index: u16, result: Result<(), Errno>) {
        let group = *self.groups.at(index);
        debug_assert!(group.flying == 0, "a group ends with parts in flight");
        if let Some(overlap) = self.view.nodes[group.node].overlap.clone()
            && group.held
        {
            self.wake(overlap.release(group.extent, group.hold()));
        }
        self.count_out(&group, result);
        self.groups.at_mut(index).state = GroupState::Free;
        self.groups.free.push(index);
        self.groups.note_release();
        self.tell(index, result);
    }

    fn wake(&mut self, shards: u32) {
        let own = 1 << self.config.index;
        self.groups.look |= shards & own != 0;
        self.wakes |= shards & !own;
    }

    /// The request of a tag is given up; its parts are ended already.
    pub(super) fn give_up_groups(&mut self, tag: Tag, error: Errno) {
        for index in self.groups.indices() {
            let group = *self.groups.at(index);
            if group.tag != Some(tag) {
                continue;
            }
            match group.state {
                GroupState::Waiting => {
                    self.groups.waiting.retain(|waiting| *waiting != index);
                    self.unfavour(index);
                    self.end(index, Err(error));
                }
                // Its range stays taken until a view has settled it.
                GroupState::Deciding => self.tell(index, Err(error)),
                GroupState::Flying | GroupState::Free => {}
            }
        }
    }

    /// What takes too long on one target while another one of its node has answered, or could.
    pub(super) fn leave_slow_targets(&mut self) {
        self.groups.look |= !self.groups.waiting.is_empty();
        for part in 0..self.parts.len() {
            let part = u16::try_from(part).unwrap_or(u16::MAX);
            let Part { state, group, over, target, op, .. } = *self.parts.at(part);
            let Some(index) = group.filter(|_| state != PartState::Free && !over) else { continue };
            let group = *self.groups.at(index);
            let patience = match self.view.role(target) {
                Role::Syncing | Role::Mirror if op != Op::Flush => self.view.target_timeout(group.node),
                _ => self.view.replica_timeout,
            };
            let early = group.since.after(patience) > self.now || self.is_frozen(target);
            if early || planted(Bug::SlowReplicaStalls) {
                continue;
            }
            let has = mask(&self.view, group.node, |role| role == Role::InSync) & group.ok;
            let here = bit_of(&self.view.nodes[group.node], target);
            let elsewhere =
                || self.pick(&self.view, group.node, group.bad | here).filter(|target| self.is_ready(*target));
            if op != Op::Read && has != 0 || op == Op::Read && elsewhere().is_some() {
                self.drop_part(part, Errno::ETIMEDOUT);
            }
        }
    }

    /// Whether every write is on all targets that it concerns, or on none.
    pub fn is_settled(&self) -> bool {
        self.active == 0 && self.groups.groups.iter().all(|group| group.state == GroupState::Free)
    }

    /// Whether a change of a node was sent over a connection that is gone, so that it may still take effect, unasked.
    pub fn has_exposed(&self, node: usize) -> bool {
        self.parts_of(node).any(|part| part.exposed && part.mutates())
    }

    /// Whether something is in flight on a node that the present view would not send.
    pub(super) fn has_older(&self, node: usize) -> bool {
        let opened = self.view.nodes[node].opened;
        let older = |group: &Group| group.state == GroupState::Flying && group.node == node && group.version < opened;
        // What was sent while the node had one target alone knows nothing of others. Only before one begins to be written: what waits at a shut
        // gate, perhaps for ever, hinders nobody to leave.
        let opens = self.acked_nodes[node] < opened || planted(Bug::LoneHindersLeave);
        let alone =
            |part: &Part| opens && part.group.is_none() && !self.view.is_single(node) && !self.is_flush(part.tag);
        let left = |part: &Part| !self.view.role(part.target).is_written();
        self.groups.groups.iter().any(older) || self.parts_of(node).any(|part| alone(part) || left(part))
    }

    /// The parts that are in use on a node.
    pub(super) fn parts_of(&self, node: usize) -> impl Iterator<Item = &Part> {
        self.parts.used().filter(move |part| self.view.targets[part.target].node == node)
    }

    /// A new view was adopted: what waited for it goes on.
    pub(super) fn decide_again(&mut self) {
        for index in self.groups.indices() {
            if self.groups.at(index).state == GroupState::Deciding {
                self.decide(index);
            }
        }
        self.groups.look = true;
    }
}

pub(super) fn is_window(node: &Node, extent: Extent) -> bool {
    node.sync.as_ref().is_some_and(|sync| sync.state_of(extent) == RegionState::Window)
}

fn is_copied(node: &Node, extent: Extent) -> bool {
    node.sync.as_ref().is_none_or(|sync| sync.state_of(extent) == RegionState::Done)
        && !planted(Bug::ResyncMissesWrites)
}
