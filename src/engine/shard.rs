//! What one I/O thread does: requests in, frames out, answers in, completions out. Sans-io: no sockets, no clock, no payload bytes.
//!
//! The caller's turn: `handle_request`, `handle_link`, `handle_reply`, `handle_timeout` as things happen; then `poll_link`,
//! `poll_send` for every link with room in its socket, and `poll_complete`, each until `None`; then sleep until something
//! happens or `next_timeout` comes.
//!
//! What holds at every moment (the contract, sections 1 to 3):
//! - A tag completes exactly once, and only when no part of it can be touched by a connection any more.
//! - A part is sent again only after HELLO has confirmed that its older self is finished or dropped.
//! - A mutation that missed its deadline holds its target for every shard until that same confirmation.
//! - A flush goes to every target with an acknowledged write that no successful flush covers; a failed one is never forgotten.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::engine::link::{Link, LinkCommand, LinkEvent, LinkState};
use crate::engine::part::{PartState, Parts};
use crate::engine::request::{Request, RequestOp, ShardConfig, Tag};
use crate::engine::shard::flush::{FLUSHES, Flushes};
use crate::engine::shard::group::Groups;
use crate::engine::shared::{FlushMark, LinkPhase, Shared, add};
use crate::engine::view::View;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Extent, Time};
use crate::wire::frame::{Header, Op};

mod adopt;
mod deadline;
mod flush;
mod gate;
mod group;
mod issue;
mod points;
pub mod why;

pub use group::Report;

/// The tag of a keepalive, which is no part's.
const KEEPALIVE_TAG: u32 = u32::MAX;

/// Data that arrived damaged, or was reported damaged, is sent again this often.
const DAMAGED_MAX: u32 = 3;

/// A frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The request frame; of a write still without its body's size and checksum.
    pub header: Header,
    /// A write's data.
    pub data: Option<Data>,
    /// The checksum that the data had when it was first sent, for [`Shard::keep_crc`].
    pub crc: Option<u32>,
}

/// A run of bytes in a tag's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Whose buffer.
    pub tag: Tag,
    /// First byte.
    pub offset: usize,
    /// Length, bytes.
    pub bytes: usize,
}

/// What became of the body of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// There is none, or it is in place and its checksum is right.
    Good,
    /// Its checksum is wrong.
    Damaged,
}

/// An answer that answers nothing: the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadReply;

/// How far a request has been split into parts.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Discard, zeroing, flush: the node that is next.
    node: usize,
    /// Sectors issued: of the request, or of the node's span.
    sectors: u64,
    /// Nothing is left to issue.
    done: bool,
}

#[derive(Clone, Copy, Debug)]
struct Active {
    request: Request,
    since: Time,
    deadline: Time,
    cursor: Cursor,
    /// Parts in use; on a node with several targets, groups of them.
    parts: u32,
    result: Result<(), Errno>,
    /// Past its deadline or aborted: nothing more of it is sent.
    over: bool,
}

/// See the module's description.
pub struct Shard {
    config: ShardConfig,
    view: Arc<View>,
    shared: Arc<Shared>,
    /// The frontend's requests by their tags, then the owner's flushes.
    slots: Vec<Option<Active>>,
    flushes: Flushes,
    active: usize,
    parts: Parts,
    first_sequence: u32,
    /// Per part: what the flush that it is has noted.
    marks: Vec<FlushMark>,
    links: Vec<Link>,
    groups: Groups,
    /// Per target: the view under which it was last reported.
    reported: Vec<u64>,
    /// Per node: the view under which it was last reported as diverged.
    diverged: Vec<u64>,
    reports: VecDeque<Report>,
    /// Other shards that wait for what this one has given back.
    wakes: u32,
    /// The view that the owner knows this shard to work from, and per node that.
    acked: u64,
    acked_nodes: Vec<u64>,
    /// Most parts that a piece of a request takes: one for each target of its node.
    width: usize,
    /// Pieces of requests in flight beyond the first of each. There are parts enough that every request can always have one
    /// piece: those of a node that does not answer must not starve the requests of another.
    extra: usize,
    /// Requests that wait for a further part, oldest first.
    unissued: VecDeque<Tag>,
    completions: VecDeque<(Tag, Result<(), Errno>)>,
    commands: VecDeque<LinkCommand>,
    next_tick: Time,
    /// Whether the gate of a node is not open.
    gated: bool,
    /// The time of the event that is being handled.
    now: Time,
}

impl Shard {
    /// A shard whose links are all down; the first `handle_timeout` asks to connect them.
    pub fn new(config: ShardConfig, view: Arc<View>, shared: Arc<Shared>) -> Shard {
        Shard::after(config, view, shared, 0)
    }

    /// A shard that takes over the channels of another one of the same session, which had used the sequences up to `sequence`
    /// ([`Shard::sequence`]): a server remembers how a change ended under its tag and sequence, so they must not come again.
    pub fn after(config: ShardConfig, view: Arc<View>, shared: Arc<Shared>, sequence: u32) -> Shard {
        let targets = view.targets.len();
        let width = view.width();
        let count = (config.depth * 2).max(64) + FLUSHES;
        let sequence = if planted(Bug::SequenceReused) { 0 } else { sequence };
        let parts = Parts::new(count * width, sequence);
        Shard {
            slots: vec![None; config.depth + FLUSHES],
            flushes: Flushes::default(),
            active: 0,
            marks: vec![[0; limits::SHARDS_MAX]; parts.len()],
            links: (0..targets).map(|_| Link::new(parts.len())).collect(),
            groups: Groups::new(count),
            reported: vec![0; targets],
            diverged: vec![0; view.nodes.len()],
            reports: VecDeque::with_capacity(targets),
            wakes: 0,
            acked: 0,
            acked_nodes: vec![view.version; view.nodes.len()],
            width,
            first_sequence: sequence,
            parts,
            extra: 0,
            unissued: VecDeque::with_capacity(config.depth),
            completions: VecDeque::with_capacity(config.depth),
            commands: VecDeque::with_capacity(targets * 2),
            next_tick: Time(0),
            gated: gate::is_gated(&view),
            now: Time(0),
            config,
            view,
            shared,
        }
    }

    /// Takes a request. The tag must be free; it is busy until `poll_complete` returns it.
    pub fn handle_request(&mut self, now: Time, tag: Tag, request: Request) {
        self.now = now;
        let slot = &mut self.slots[usize::from(tag.0)];
        assert!(slot.is_none(), "{tag:?} was given while in use");
        if self.active == 0 {
            self.next_tick = now.after(limits::TICK);
        }
        self.active += 1;
        let flush = request.op == RequestOp::Flush;
        let sectors = match request.target {
            None => self.view.geometry.sectors(),
            Some(target) => self.view.geometry.node_sectors(self.view.targets[target].node),
        };
        let fits = request.extent.within(sectors) && request.extent.sectors > 0;
        let result = if flush || fits { Ok(()) } else { Err(Errno::EINVAL) };
        // A flush that was asked for by itself holds nobody up.
        let patience = if flush && request.target.is_some() { limits::FLUSH_TIMEOUT } else { Duration::ZERO };
        *slot = Some(Active {
            request,
            since: now,
            deadline: now.after(self.config.io_timeout.max(patience)),
            cursor: Cursor { done: result.is_err(), ..Cursor::default() },
            parts: 0,
            result,
            over: false,
        });
        if !self.issue(tag, self.unissued.is_empty()) {
            self.unissued.push_back(tag);
        }
        self.look_again();
    }

    /// Takes what happened to a connection.
    pub fn handle_link(&mut self, now: Time, target: usize, event: LinkEvent) {
        self.now = now;
        match event {
            LinkEvent::Up(terms) => self.link_up(now, target, terms),
            LinkEvent::Down(error) => self.link_down(now, target, error),
        }
        self.show_link(target);
        self.look_again();
    }

    fn link_up(&mut self, now: Time, target: usize, terms: crate::engine::link::Terms) {
        let wanted = &self.view.targets[target];
        if terms.volume != wanted.volume || terms.sectors < self.view.geometry.node_sectors(wanted.node) {
            // The name is served, but not by the volume that has the data, or by less of it.
            let error = if terms.volume == wanted.volume { Errno::ENOSPC } else { Errno::ENOENT };
            self.shared.target(target).gauge(self.config.index).set_error(Some(error));
            self.close(target);
            return;
        }
        if !matches!(self.links[target].state, LinkState::Connecting { .. }) {
            return;
        }
        self.shared.target(target).told_losses(terms.losses);
        if self.shared.target(target).has_lost() {
            self.report_loss(target);
        }
        // The confirmation: whatever was sent before is finished or dropped.
        self.links[target].up(now, terms);
        for position in 0..self.links[target].queue.len() {
            let index = self.links[target].queue[position];
            self.parts.at_mut(index).exposed = false;
        }
        if std::mem::take(&mut self.links[target].holds) {
            self.shared.target(target).release();
        }
        let gauge = self.shared.target(target).gauge(self.config.index);
        gauge.set_error(None);
        gauge.note_up();
    }

    fn link_down(&mut self, now: Time, target: usize, error: Errno) {
        let was_up = matches!(self.links[target].state, LinkState::Up(_) | LinkState::Closing);
        self.links[target].down(now, error);
        let gauge = self.shared.target(target).gauge(self.config.index);
        gauge.note_down(now);
        if was_up {
            gauge.losses.fetch_add(1, Ordering::Relaxed);
        }
        if gauge.last_error().is_none() || error != Errno::ECANCELED {
            gauge.set_error(Some(error));
        }
        let fenced = self.links[target].state == LinkState::Fenced;
        if fenced {
            self.report_fenced(target);
        }
        if planted(Bug::HoldEndsAtDown) && std::mem::take(&mut self.links[target].holds) {
            self.shared.target(target).release();
        }
        for index in 0..self.parts.len() {
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            let part = *self.parts.at(index);
            if part.target != target || part.state == PartState::Free {
                continue;
            }
            let over = part.over || self.slots[usize::from(part.tag.0)].is_none_or(|active| active.over);
            let sent = part.state == PartState::Sent && !over;
            if planted(Bug::AckOnLoss) && sent && part.mutates() {
                self.finish(index, Ok(()));
            } else if planted(Bug::ErrorOnLoss) && sent {
                self.finish(index, Err(Errno::EIO));
            } else if planted(Bug::ForgetOnLoss) && sent {
                continue;
            } else if fenced {
                self.unqueue(index);
                self.finish(index, Err(Errno::EBADE));
            } else if part.state == PartState::Sent && over {
                // Its request has its verdict already; this was only about the buffer.
                self.count(&part, Err(error));
                self.release(index, false, Err(error));
            } else {
                if part.state == PartState::Sent {
                    self.parts.at_mut(index).state = PartState::Queued;
                    self.parts.at_mut(index).exposed = true;
                    self.links[target].queue.push_back(index);
                }
                self.reroute(index);
            }
        }
    }

    /// Something arrived on the link, though not yet a whole answer.
    pub fn handle_progress(&mut self, now: Time, target: usize) {
        self.links[target].heard(now);
    }

    /// Where the body of an answer belongs; asked before the body is received. `Ok(None)`: there is none.
    pub fn expect(&self, target: usize, reply: &Header) -> Result<Option<Data>, BadReply> {
        if self.is_keepalive(target, reply) {
            return Ok(None);
        }
        let index = self.parts.matching(target, reply).ok_or(BadReply)?;
        if reply.body_bytes == 0 {
            return Ok(None);
        }
        let part = self.parts.at(index);
        let bytes = usize::try_from(part.bytes()).map_err(|_| BadReply)?;
        Ok(Some(Data { tag: part.tag, offset: part.offset, bytes }))
    }

    /// Where the data of a read that was handed out belongs.
    pub fn place(&self, request: &Header) -> Option<Data> {
        let part = self.parts.at(u16::try_from(request.tag).ok()?);
        let bytes = usize::try_from(part.extent.bytes()).ok()?;
        Some(Data { tag: part.tag, offset: part.offset, bytes })
    }

    /// Up to where this shard has used sequences.
    pub fn sequence(&self) -> u32 {
        self.parts.unused_after(self.first_sequence)
    }

    /// Number of parts; the tags of request frames are below it.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    fn is_keepalive(&self, target: usize, reply: &Header) -> bool {
        reply.op == Op::Keepalive && reply.tag == KEEPALIVE_TAG && self.links[target].expects_keepalive()
    }

    /// Takes an answer whose body, if any, is in place.
    pub fn handle_reply(&mut self, now: Time, target: usize, reply: &Header, body: Body) -> Result<(), BadReply> {
        self.now = now;
        let result = self.take_reply(now, target, reply, body);
        self.look_again();
        result
    }

    fn take_reply(&mut self, now: Time, target: usize, reply: &Header, body: Body) -> Result<(), BadReply> {
        if self.is_keepalive(target, reply) {
            self.links[target].heard(now);
            return Ok(());
        }
        let index = self.parts.matching(target, reply).ok_or(BadReply)?;
        self.links[target].heard(now);
        let part = *self.parts.at(index);
        let result = match (body, reply.result()) {
            (Body::Damaged, _) if !planted(Bug::DamagedIsData) => Err(Errno::EILSEQ),
            (_, Err(Errno::EIO)) if planted(Bug::ReadErrorIsData) && part.op == Op::Read => Ok(()),
            (_, result) => result,
        };
        if result == Err(Errno::ESHUTDOWN) && !planted(Bug::ShutdownIsError) {
            // The server is going away: the part stays unanswered, and is sent again when the server is back.
            self.close(target);
            return Ok(());
        }
        if result == Err(Errno::EILSEQ) {
            add(&self.shared.target(target).gauge(self.config.index).damaged, 1);
        }
        let link = &mut self.links[target];
        link.requests -= 1;
        link.bytes -= part.bytes();
        let over = part.over || self.slots[usize::from(part.tag.0)].is_none_or(|active| active.over);
        let retried = planted(Bug::RetryFailedFlush) && part.op == Op::Flush && result.is_err() && !over;
        if retried {
            self.parts.at_mut(index).state = PartState::Queued;
            self.links[target].queue.push_back(index);
            return Ok(());
        }
        if result == Err(Errno::EILSEQ) && part.bytes() > 0 && part.damaged < DAMAGED_MAX && !over {
            let part = self.parts.at_mut(index);
            part.damaged += 1;
            part.state = PartState::Queued;
            self.links[target].queue.push_back(index);
            return Ok(());
        }
        if result == Err(Errno::EBADE) {
            self.close(target);
        }
        if part.op == Op::Flush && result.is_ok() {
            self.hear_point(target, reply);
        }
        self.finish(index, result);
        Ok(())
    }

    /// Requests in flight.
    pub fn active(&self) -> usize {
        self.active
    }

    /// The next command for a connection.
    pub fn poll_link(&mut self) -> Option<LinkCommand> {
        self.commands.pop_front()
    }

    /// The next result. Its tag is free again.
    pub fn poll_complete(&mut self) -> Option<(Tag, Result<(), Errno>)> {
        self.more_flushes();
        self.completions.pop_front()
    }

    /// The next frame for the link to `target`, if its budget allows one.
    pub fn poll_send(&mut self, target: usize) -> Option<Outgoing> {
        if self.links[target].take_keepalive() {
            let header = Header::request(Op::Keepalive, KEEPALIVE_TAG, 0, self.view.epoch, Extent::default());
            return Some(Outgoing { header, data: None, crc: None });
        }
        let place = match self.first_free(target)? {
            _ if self.has_lost(target) => return self.refuse_lost(target),
            place => place,
        };
        let index = self.links[target].queue[place];
        let part = *self.parts.at(index);
        let held = self.shared.target(target).is_held() && !planted(Bug::IgnoreHold);
        if !self.links[target].has_room(part.bytes()) || held {
            return None;
        }
        let link = &mut self.links[target];
        link.queue.remove(place);
        link.requests += 1;
        link.bytes += part.bytes();
        self.parts.at_mut(index).state = PartState::Sent;
        let header = self.parts.header(index, self.view.epoch);
        let data = (part.op == Op::Write).then(|| Data {
            tag: part.tag,
            offset: part.offset,
            bytes: usize::try_from(part.extent.bytes()).unwrap_or(usize::MAX),
        });
        Some(Outgoing { header, data, crc: part.crc })
    }

    /// Remembers the checksum of a write's data, so that it is the same when the write is sent again.
    pub fn keep_crc(&mut self, header: &Header, crc: u32) {
        if let Ok(index) = u16::try_from(header.tag) {
            self.parts.at_mut(index).crc = Some(crc);
        }
    }

    /// Publishes the figures of one link.
    fn show_link(&self, target: usize) {
        let link = &self.links[target];
        let gauge = self.shared.target(target).gauge(self.config.index);
        gauge.set_phase(match link.state {
            LinkState::Down { .. } | LinkState::Closing => LinkPhase::Down,
            LinkState::Connecting { .. } => LinkPhase::Connecting,
            LinkState::Up(_) => LinkPhase::Up,
            LinkState::Fenced => LinkPhase::Fenced,
        });
        gauge.attempts.store(link.attempts(), Ordering::Relaxed);
    }

    /// Publishes how much is on its way; cheap enough for every turn of the caller's loop.
    pub fn show_load(&self) {
        self.shared.show_load(self.config.index, self.active);
        for (target, link) in self.links.iter().enumerate() {
            let gauge = self.shared.target(target).gauge(self.config.index);
            gauge.in_flight.store(u32::try_from(link.requests).unwrap_or(u32::MAX), Ordering::Relaxed);
            gauge.waiting.store(u32::try_from(link.queue.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
        if self.gated {
            self.show_parked();
        }
    }

    fn close(&mut self, target: usize) {
        if matches!(self.links[target].state, LinkState::Connecting { .. } | LinkState::Up(_)) {
            self.links[target].state = LinkState::Closing;
            self.commands.push_back(LinkCommand::Close(target));
            self.show_link(target);
        }
    }

    /// A part has come to its end.
    fn finish(&mut self, index: u16, result: Result<(), Errno>) {
        let part = *self.parts.at(index);
        let target = self.shared.target(part.target);
        self.count(&part, result);
        match (part.op, result) {
            (Op::Flush, Ok(())) if planted(Bug::FlushMarksAtEnd) => {
                target.flushed(&target.flush_mark().unwrap_or(self.marks[usize::from(index)]));
            }
            (Op::Flush, Ok(())) => target.flushed(&self.marks[usize::from(index)]),
            (Op::Discard, Ok(())) if planted(Bug::DiscardNotCounted) => {}
            (Op::Flush, Err(error)) if error != Errno::EBADE => target.fail_flush(),
            (Op::Write | Op::Discard | Op::WriteZeroes, Ok(())) if !part.fua => target.acknowledge(self.config.index),
            _ => {}
        }
        self.release(index, true, result);
    }

    /// Gives a part back and tells its request or its group. `answered`: by its server.
    fn release(&mut self, index: u16, answered: bool, result: Result<(), Errno>) {
        let part = *self.parts.at(index);
        self.parts.give_back(index);
        self.groups.note_release();
        match part.group {
            Some(group) => self.group_part(group, &part, answered, result),
            None => self.unit_done(part.tag, result),
        }
    }

    /// A piece of a request has come to its end.
    fn unit_done(&mut self, tag: Tag, result: Result<(), Errno>) {
        let mut stuck = false;
        if let Some(active) = &mut self.slots[usize::from(tag.0)] {
            self.extra -= usize::from(active.parts > 1);
            active.parts -= 1;
            active.result = if planted(Bug::LastResultWins) { result } else { active.result.and(result) };
            // A request that has failed needs no further parts.
            active.cursor.done |= active.result.is_err();
            stuck = active.parts == 0 && !active.cursor.done;
        }
        self.settle(tag);
        if stuck && (planted(Bug::WaitingForgotten) || self.issue(tag, false)) {
            self.unissued.retain(|waiting| *waiting != tag);
        }
        self.retry_unissued();
    }

    /// Goes on with the requests that wait for a further part.
    fn retry_unissued(&mut self) {
        while let Some(waiting) = self.unissued.pop_front() {
            if !self.issue(waiting, true) {
                self.unissued.push_front(waiting);
                break;
            }
        }
    }

    fn count(&self, part: &crate::engine::part::Part, result: Result<(), Errno>) {
        let gauge = self.shared.target(part.target).gauge(self.config.index);
        match (result, part.op) {
            (Err(_), _) => add(&gauge.errors, 1),
            (Ok(()), Op::Read) => {
                add(&gauge.reads, 1);
                add(&gauge.read_bytes, part.extent.bytes());
            }
            (Ok(()), Op::Flush) => add(&gauge.flushes, 1),
            (Ok(()), _) => {
                add(&gauge.writes, 1);
                add(&gauge.write_bytes, part.extent.bytes());
            }
        }
    }

    /// Completes a request that has nothing left to do.
    fn settle(&mut self, tag: Tag) {
        let slot = &mut self.slots[usize::from(tag.0)];
        if let Some(active) = slot
            && active.cursor.done
            && active.parts == 0
        {
            let result = active.result;
            if planted(Bug::CompleteTwice) && active.request.op == RequestOp::Flush {
                self.completions.push_back((tag, result));
            }
            *slot = None;
            self.active -= 1;
            if !self.unissued.is_empty() {
                self.unissued.retain(|waiting| *waiting != tag);
            }
            if !self.flush_over(tag, result) {
                self.completions.push_back((tag, result));
            }
        }
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        // A shard that ends must not hold the others for ever: it ends only after its connections are closed for good.
        for (target, link) in self.links.iter().enumerate() {
            if link.holds {
                self.shared.target(target).release();
            }
        }
    }
}
