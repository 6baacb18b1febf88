//! What time brings a shard: links to try or to give up, and requests that have to end.

use crate::bugs::{Bug, planted};
use crate::engine::link::{Due, Link, LinkCommand, LinkState};
use crate::engine::part::PartState;
use crate::engine::request::Tag;
use crate::engine::shard::{Outgoing, Shard};
use crate::errno::Errno;
use crate::limits;
use crate::units::Time;

impl Shard {
    /// Does what time has brought. Call when `next_timeout` has come; calling more often does no harm.
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = now;
        for target in 0..self.links.len() {
            if !self.view.role(target).is_attached() && matches!(self.links[target].state, LinkState::Down { .. }) {
                continue;
            }
            match self.links[target].tick(now) {
                Some(Due::Connect) => {
                    self.links[target].connect(now);
                    self.commands.push_back(LinkCommand::Connect(target));
                    self.show_link(target);
                }
                Some(Due::GiveUp) => {
                    self.shared.target(target).gauge(self.config.index).set_error(Some(Errno::ETIMEDOUT));
                    self.close(target);
                }
                None => {}
            }
        }
        if self.active == 0 || now < self.next_tick {
            return;
        }
        self.next_tick = now.after(limits::TICK);
        if planted(Bug::NoDeadline) {
            return;
        }
        for tag in 0..self.slots.len() {
            let late = self.slots[tag].is_some_and(|active| !active.over && active.deadline <= now);
            let tag = Tag(u16::try_from(tag).unwrap_or(u16::MAX));
            if late && !self.spare(tag) {
                self.give_up(tag, Errno::ETIMEDOUT);
            }
        }
        if self.width > 1 {
            self.leave_slow_targets();
        }
        self.look_again();
    }

    /// When `handle_timeout` is to be called next, if nothing else happens.
    pub fn next_timeout(&self) -> Time {
        let tick = if self.active > 0 { self.next_tick } else { Time::NEVER };
        let attached = |(target, link): (usize, &Link)| {
            let idle = !self.view.role(target).is_attached() && matches!(link.state, LinkState::Down { .. });
            if idle { Time::NEVER } else { link.next_tick() }
        };
        self.links.iter().enumerate().map(attached).fold(tick, Time::min)
    }

    /// Ends every request in flight with `error`, as soon as no connection can touch its buffer any more.
    pub fn abort(&mut self, error: Errno) {
        for tag in 0..self.slots.len() {
            if self.slots[tag].is_some_and(|active| !active.over) {
                self.give_up(Tag(u16::try_from(tag).unwrap_or(u16::MAX)), error);
            }
        }
    }

    /// Ends a request with `error` before its deadline.
    pub fn abandon(&mut self, tag: Tag, error: Errno) {
        if self.slots[usize::from(tag.0)].is_some_and(|active| !active.over) {
            self.give_up(tag, error);
        }
    }

    /// Ends a request with `error`: what was not sent is dropped, what was sent closes its connection, and what may still
    /// take effect holds its target.
    pub(super) fn give_up(&mut self, tag: Tag, error: Errno) {
        let Some(active) = &mut self.slots[usize::from(tag.0)] else { return };
        active.over = true;
        active.result = Err(error);
        active.cursor.done = true;
        for index in 0..self.parts.len() {
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            let part = *self.parts.at(index);
            if part.tag != tag || part.state == PartState::Free {
                continue;
            }
            if planted(Bug::SendPastDeadline) && part.state == PartState::Queued {
                continue;
            }
            if planted(Bug::DeadlineLeavesSession) {
                self.unqueue(index);
                self.release(index, false, Err(error));
                continue;
            }
            self.drop_part(index, error);
        }
        self.give_up_groups(tag, error);
        self.settle(tag);
    }

    /// Ends a part: one that was not sent at once, one that was sent when its connection is closed. What may still take effect
    /// holds its target.
    pub(super) fn drop_part(&mut self, index: u16, error: Errno) {
        let part = *self.parts.at(index);
        let known = (part.state == PartState::Queued && !part.exposed) || planted(Bug::NoHold);
        if part.mutates() && !known && !std::mem::replace(&mut self.links[part.target].holds, true) {
            self.shared.target(part.target).hold();
        }
        if part.state == PartState::Sent {
            self.parts.at_mut(index).over = true;
            self.close(part.target);
        } else {
            self.unqueue(index);
            self.count(&part, Err(error));
            self.release(index, false, Err(error));
        }
    }

    /// Whether what is sent to a target now would find older data than was acknowledged.
    pub(super) fn has_lost(&self, target: usize) -> bool {
        self.is_up(target) && self.shared.target(target).has_lost()
    }

    /// What has waited for such a target is refused, as what comes is; but for what waits at a gate.
    pub(super) fn refuse_lost(&mut self, target: usize) -> Option<Outgoing> {
        while let Some(index) = self.first_free(target).map(|place| self.links[target].queue[place]) {
            let part = *self.parts.at(index);
            self.unqueue(index);
            self.count(&part, Err(Errno::EIO));
            self.release(index, true, Err(Errno::EIO));
        }
        self.look_again();
        None
    }

    pub(super) fn unqueue(&mut self, index: u16) {
        let target = self.parts.at(index).target;
        if self.parts.at(index).state == PartState::Queued {
            self.links[target].queue.retain(|queued| *queued != index);
        }
    }
}
