//! One NBD client: what it sends becomes requests, what the worker answers goes back.
//!
//! At most one RECV and one SENDMSG are in flight. Received bytes go to a staging buffer and are taken apart there; what is
//! missing of a write's data is received straight into its tag's buffer. A client whose next request finds no free tag is not
//! read until there is one.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, types};
use nix::libc;
use nix::sys::socket::{Shutdown, shutdown};

use crate::engine::request::{Request, Tag};
use crate::errno::Errno;
use crate::io::buffer::Buffers;
use crate::io::nbd::send::{Outbox, Sent};
use crate::io::nbd::tags::Tags;
use crate::io::ring::{BareRing, Owner, Ring, pack, sqe_length};
use crate::limits;
use crate::wire::nbd::export::{BadClient, Export, Terms};
use crate::wire::nbd::handshake::{Handshake, Step};
use crate::wire::nbd::transmission::{Command, REQUEST_BYTES, Work};

/// `user_data` of a connection's operations, beside its slot.
pub(super) const RECEIVE: u32 = 1;
pub(super) const SEND: u32 = 2;

/// Writes of at least this many bytes are expected to be followed by their like: only little of the next one is staged, so that
/// most of it needs no copy.
const LARGE_BYTES: u32 = 16 << 10;
/// How much is staged then.
const LARGE_STAGE_BYTES: usize = 4 << 10;

/// What all connections of a thread share.
pub(super) struct Shared {
    pub(super) export: Export,
    pub(super) tags: Tags,
    /// One staging buffer per slot.
    pub(super) stages: Buffers,
    /// Requests that have arrived whole.
    pub(super) ready: VecDeque<(Tag, Request)>,
    /// Counts while someone may be late.
    pub(super) tick: u64,
}

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Open,
    /// Nothing more is read; ends when everything is answered.
    Draining,
    /// Shut down; waits for its operations and for the worker.
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receiving {
    No,
    Stage,
    Data,
}

/// A write whose data is arriving.
#[derive(Clone, Copy, Debug)]
struct Incoming {
    tag: Tag,
    bytes: usize,
    filled: usize,
    /// What to do when it is whole; data of a refused write is skipped.
    work: Result<Request, Errno>,
}

/// See the module's description.
pub(super) struct Connection {
    slot: usize,
    socket: OwnedFd,
    phase: Phase,
    terms: Terms,
    outbox: Outbox,
    receiving: Receiving,
    /// The staged bytes not yet taken.
    staged: std::ops::Range<usize>,
    large: bool,
    incoming: Option<Incoming>,
    /// Tags that belong to this connection.
    held: usize,
    /// The tick when bytes last went in or out; during the handshake, when it began.
    moved: u64,
    /// A request is waiting for a tag.
    pub(super) starving: bool,
    /// In the queue of those that wait for a tag.
    pub(super) queued: bool,
    /// In the list of those that have something to send.
    pub(super) listed: bool,
}

impl Connection {
    pub(super) fn new(slot: usize, socket: OwnedFd, depth: usize, tick: u64) -> Connection {
        let mut outbox = Outbox::new(depth);
        outbox.speech.extend_from_slice(&Handshake::greeting());
        Connection {
            slot,
            socket,
            phase: Phase::Handshake(Handshake::default()),
            terms: Terms::default(),
            outbox,
            receiving: Receiving::No,
            staged: 0..0,
            large: false,
            incoming: None,
            held: 0,
            moved: tick,
            starving: false,
            queued: false,
            listed: false,
        }
    }

    /// Whether something is ready to be sent.
    pub(super) fn can_send(&self) -> bool {
        !matches!(self.phase, Phase::Dead) && !self.outbox.is_empty() && !self.outbox.in_flight()
    }

    /// Whether nothing of it is left anywhere.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.phase, Phase::Dead)
            && self.receiving == Receiving::No
            && !self.outbox.in_flight()
            && self.held == 0
    }

    /// Moves on as far as the bytes and tags that are there allow.
    pub(super) fn pump(&mut self, shared: &mut Shared, ring: &mut BareRing) {
        loop {
            match self.step(shared) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::debug!(%error, "an NBD client is disconnected");
                    self.die();
                    break;
                }
            }
        }
        if matches!(self.phase, Phase::Draining | Phase::Dead) {
            self.clean_up(shared);
        }
        if self.wants_bytes() {
            self.receive(shared, ring);
        }
    }

    /// Takes one thing out of the stage. False when there is nothing to take.
    fn step(&mut self, shared: &mut Shared) -> Result<bool, BadClient> {
        self.starving = false;
        match &mut self.phase {
            // One answer at a time: what a client does not take does not pile up.
            Phase::Handshake(_) if !self.outbox.is_empty() => Ok(false),
            Phase::Handshake(handshake) => {
                let length = self.staged.len();
                // SAFETY: a receive is in flight only when `step` has returned false, and ends before it is called again.
                let input = unsafe { shared.stages.bytes(self.slot, self.staged.start, length) };
                let step = handshake.handle(&shared.export, input, &mut self.outbox.speech)?;
                Ok(self.shake(step))
            }
            Phase::Open if self.incoming.is_some() => Ok(self.fill(shared)),
            Phase::Open => self.command(shared),
            Phase::Draining | Phase::Dead => Ok(false),
        }
    }

    fn shake(&mut self, step: Step) -> bool {
        match step {
            Step::More => return false,
            Step::Next(used) => self.staged.start += used,
            Step::Begin(used, terms) => {
                self.staged.start += used;
                self.terms = terms;
                self.phase = Phase::Open;
            }
            Step::End => self.phase = Phase::Draining,
        }
        true
    }

    /// Takes a request out of the stage.
    fn command(&mut self, shared: &mut Shared) -> Result<bool, BadClient> {
        if self.staged.len() < REQUEST_BYTES {
            return Ok(false);
        }
        let mut bytes = [0; REQUEST_BYTES];
        shared.stages.copy_out(self.slot, self.staged.start, &mut bytes);
        let verdict = Command::decode(&bytes)?.judge(&shared.export, self.terms)?;
        if verdict.work == Work::Disconnect {
            self.phase = Phase::Draining;
            return Ok(false);
        }
        let Some(tag) = shared.tags.take(self.slot, verdict.pending) else {
            self.starving = true;
            return Ok(false);
        };
        self.held += 1;
        self.staged.start += REQUEST_BYTES;
        let work = match verdict.work {
            Work::Engine(request) => Ok(request),
            Work::Answer(Err(error)) => Err(error),
            Work::Answer(Ok(())) | Work::Disconnect => {
                self.answer(tag, Ok(()), shared);
                return Ok(true);
            }
        };
        if verdict.payload == 0 {
            self.arrived(tag, work, shared);
        } else {
            self.large = verdict.payload >= LARGE_BYTES;
            self.incoming = Some(Incoming { tag, bytes: verdict.payload as usize, filled: 0, work });
        }
        Ok(true)
    }

    /// Copies what the stage has of a write's data. True when it is whole.
    fn fill(&mut self, shared: &mut Shared) -> bool {
        let Some(incoming) = &mut self.incoming else { return false };
        let count = (incoming.bytes - incoming.filled).min(self.staged.len());
        if count > 0 && incoming.work.is_ok() {
            // SAFETY: as in `step`.
            let bytes = unsafe { shared.stages.bytes(self.slot, self.staged.start, count) };
            shared.tags.data_mut().copy_in(usize::from(incoming.tag.0), incoming.filled, bytes);
        }
        self.staged.start += count;
        incoming.filled += count;
        if incoming.filled < incoming.bytes {
            return false;
        }
        let (tag, work) = (incoming.tag, incoming.work);
        self.incoming = None;
        self.arrived(tag, work, shared);
        true
    }

    fn arrived(&mut self, tag: Tag, work: Result<Request, Errno>, shared: &mut Shared) {
        match work {
            Ok(request) => shared.ready.push_back((tag, request)),
            Err(error) => self.answer(tag, Err(error), shared),
        }
    }

    fn answer(&mut self, tag: Tag, result: Result<(), Errno>, shared: &mut Shared) {
        shared.tags.answer(tag, result, self.terms);
        self.outbox.push(tag);
    }

    /// Takes the result of a request from the worker.
    pub(super) fn complete(&mut self, tag: Tag, result: Result<(), Errno>, shared: &mut Shared) {
        if matches!(self.phase, Phase::Dead) {
            shared.tags.release(tag);
            self.held -= 1;
        } else {
            self.answer(tag, result, shared);
        }
    }

    fn wants_bytes(&self) -> bool {
        let reads = match self.phase {
            Phase::Handshake(_) => self.outbox.is_empty(),
            Phase::Open => !self.starving,
            Phase::Draining | Phase::Dead => false,
        };
        reads && self.receiving == Receiving::No
    }

    fn receive(&mut self, shared: &mut Shared, ring: &mut BareRing) {
        let (start, length, flags) = if let Some(incoming) = self.incoming {
            debug_assert!(self.staged.is_empty());
            let left = incoming.bytes - incoming.filled;
            let (offset, length) = match incoming.work {
                Ok(_) => (incoming.filled, left),
                // Skipped data goes over the same bytes again and again.
                Err(_) => (0, left.min(shared.tags.data().bytes_each())),
            };
            self.receiving = Receiving::Data;
            (shared.tags.data().at(usize::from(incoming.tag.0), offset, length), length, libc::MSG_WAITALL)
        } else {
            shared.stages.copy_down(self.slot, self.staged.clone());
            self.staged = 0..self.staged.len();
            let room = shared.stages.bytes_each() - self.staged.end;
            let length = if self.large { room.min(LARGE_STAGE_BYTES) } else { room };
            self.receiving = Receiving::Stage;
            (shared.stages.at(self.slot, self.staged.end, length), length, 0)
        };
        let fd = types::Fd(self.socket.as_raw_fd());
        let sqe = opcode::Recv::new(fd, start, sqe_length(length)).flags(flags).build();
        ring.push(sqe.user_data(Owner::Frontend.user_data(pack(self.slot, RECEIVE))));
    }

    /// Takes the end of a receive.
    pub(super) fn received(&mut self, result: i32, tick: u64) {
        let into = std::mem::replace(&mut self.receiving, Receiving::No);
        let Ok(bytes @ 1..) = usize::try_from(result) else {
            // While draining, the end of the client's bytes is what was asked for.
            if !matches!(self.phase, Phase::Draining) {
                self.die();
            }
            return;
        };
        if !matches!(self.phase, Phase::Handshake(_)) {
            self.moved = tick;
        }
        match &mut self.incoming {
            Some(incoming) if into == Receiving::Data => incoming.filled += bytes,
            _ => self.staged.end += bytes,
        }
    }

    /// Starts to send what is ready.
    pub(super) fn send(&mut self, shared: &Shared, ring: &mut BareRing) {
        if !matches!(self.phase, Phase::Dead)
            && let Some(message) = self.outbox.start(&shared.tags)
        {
            self.push_send(message, ring);
        }
    }

    fn push_send(&self, message: *const libc::msghdr, ring: &mut BareRing) {
        let fd = types::Fd(self.socket.as_raw_fd());
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let sqe = opcode::SendMsg::new(fd, message).flags(flags.cast_unsigned()).build();
        ring.push(sqe.user_data(Owner::Frontend.user_data(pack(self.slot, SEND))));
    }

    /// Takes the end of a send.
    pub(super) fn sent(&mut self, result: i32, shared: &mut Shared, ring: &mut BareRing) {
        let Ok(bytes @ 1..) = usize::try_from(result) else {
            self.outbox.failed();
            self.die();
            return;
        };
        if !matches!(self.phase, Phase::Handshake(_)) {
            self.moved = shared.tick;
        }
        match self.outbox.sent(bytes, &mut shared.tags) {
            Sent::Whole { released } => self.held -= released,
            Sent::Partly(message) if !matches!(self.phase, Phase::Dead) => self.push_send(message, ring),
            Sent::Partly(_) => self.outbox.failed(),
        }
    }

    /// Nothing more is read; what was asked is answered first.
    pub(super) fn drain(&mut self) {
        match self.phase {
            Phase::Open => {
                self.phase = Phase::Draining;
                // Ends a receive in flight. An error means that the client has gone: its receive ends as well.
                let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
            }
            Phase::Handshake(_) => self.die(),
            Phase::Draining | Phase::Dead => {}
        }
    }

    /// Nothing more goes in or out; `clean_up` does the rest as operations end.
    pub(super) fn die(&mut self) {
        if !matches!(self.phase, Phase::Dead) {
            self.phase = Phase::Dead;
            // Ends a receive and a send in flight. An error means that the client has gone: they end as well.
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        }
    }

    /// Gives back the tags that neither an operation nor the worker uses.
    fn clean_up(&mut self, shared: &mut Shared) {
        self.starving = false;
        if self.receiving == Receiving::No
            && let Some(incoming) = self.incoming.take()
        {
            shared.tags.release(incoming.tag);
            self.held -= 1;
        }
        if matches!(self.phase, Phase::Draining) && self.held == 0 && self.outbox.is_empty() {
            self.die();
        }
        if matches!(self.phase, Phase::Dead) && !self.outbox.in_flight() {
            self.held -= self.outbox.drop_all(&mut shared.tags);
        }
    }

    /// Whether it may be late one day: its handshake is not finished.
    pub(super) fn is_shaking_hands(&self) -> bool {
        matches!(self.phase, Phase::Handshake(_))
    }

    /// Whether it has had more time than it may take. `others_wait`: for tags.
    pub(super) fn is_late(&self, tick: u64, others_wait: bool) -> bool {
        let idle = tick.saturating_sub(self.moved);
        match self.phase {
            Phase::Handshake(_) => idle >= limits::HANDSHAKE_TIMEOUT.as_secs() / limits::NBD_TICK.as_secs(),
            Phase::Open | Phase::Draining => {
                let holds = self.incoming.is_some() || self.outbox.in_flight();
                others_wait && holds && idle >= limits::NBD_STALL_TICKS
            }
            Phase::Dead => false,
        }
    }
}
