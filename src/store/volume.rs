//! What a server decides about one volume: who is attached, what each request does to the disk, when a flush is true.
//!
//! Sans-io: [`Volume::handle`] takes what happened, [`Volume::poll_effect`] gives what to do, in order. Payload never passes
//! here: the world keeps the bytes of a request under its (connection, slot), checks the checksum of what arrived before it
//! reports the request, and makes the one of what it sends. Nothing is allocated per request once the tables have grown.
//!
//! The world promises: a connection's number is new; every [`Work`] is answered by one `DiskDone`, whatever becomes of the
//! connection; `Gone` comes once, last, for each attached or refused connection; every [`Write`] is answered by one `Saved`.

mod admission;
mod keep;
mod log;
mod request;

use std::collections::VecDeque;

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::limits;
use crate::store::flush::{Ask as Asked, Flushes, Point};
use crate::store::kept::Kept;
use crate::store::pool::Refusal;
use crate::store::region::{Layout, Log};
pub use crate::store::session::Conn;
use crate::store::session::Sessions;
use crate::store::state::{Book, Part, State, Write};
use crate::store::volume::admission::Knock;
pub use crate::store::volume::keep::{Ask, Told};
use crate::store::volume::keep::{Failing, Then};
use crate::store::volume::request::Parked;
use crate::units::{Epoch, Extent, Id};
use crate::wire::frame::Header;
use crate::wire::session::{Hello, Welcome};
use crate::wire::volume::Member;

/// The world's number for a request in flight on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

/// A piece of work at the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job(pub u32);

/// What does not change while the server runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// The volume's name, for messages.
    pub name: String,
    /// The volume's id.
    pub id: Id,
    /// This life of the server.
    pub instance: Id,
    /// This boot of its machine.
    pub boot: Id,
    /// Space is taken as it is written, and given back by a discard.
    pub sparse: bool,
    /// Every change is durable before it is answered, so that nothing is lost with the machine's memory.
    pub write_through: bool,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A connection wants to be a channel of a session.
    Attach {
        /// Its number.
        conn: Conn,
        /// What it said.
        hello: &'a Hello,
        /// The epoch of its frame.
        epoch: Epoch,
        /// The array that the volume is assigned to now.
        assigned: Option<&'a Member>,
    },
    /// A whole request has arrived.
    Request {
        /// From where.
        conn: Conn,
        /// Where the world keeps it.
        slot: Slot,
        /// What is asked.
        header: &'a Header,
        /// The body's checksum was right, or there is no body.
        intact: bool,
    },
    /// Work has ended.
    DiskDone {
        /// Which.
        job: Job,
        /// How.
        result: Result<(), Errno>,
    },
    /// A connection is no more.
    Gone {
        /// Which.
        conn: Conn,
    },
    /// A write of the state file has ended.
    Saved {
        /// Of which part.
        part: Part,
        /// How; after a success it is durable.
        result: Result<(), Errno>,
    },
    /// Somebody asks about the volume as a whole.
    Ask {
        /// The world's number for it.
        number: u64,
        /// What.
        ask: Ask<'a>,
    },
    /// The server stops: nobody is attached, and nothing is on the disk. `Stopped` follows.
    Stop,
    /// The volume has another size.
    Resized {
        /// The new one.
        sectors: u64,
        /// Its regions; the state file has room for them.
        layout: Option<Layout>,
    },
}

/// What the disk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Fills the slot's buffer.
    Read,
    /// Writes the slot's buffer.
    Write {
        /// Durable before it is done.
        durable: bool,
    },
    /// The range reads as zeros and keeps its space.
    Zero,
    /// The range reads as zeros and gives its space back.
    Punch,
    /// Makes everything done so far durable.
    Sync,
    /// Makes the digest of the range.
    Digest,
}

impl DiskOp {
    /// Whether the data is another one afterwards.
    pub fn changes(self) -> bool {
        matches!(self, DiskOp::Write { .. } | DiskOp::Zero | DiskOp::Punch)
    }
}

/// One piece of work at the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name.
    pub job: Job,
    /// What.
    pub op: DiskOp,
    /// Where; empty for a sync.
    pub extent: Extent,
    /// Whose buffer; `None` for a sync.
    pub place: Option<(Conn, Slot)>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Work for the disk.
    Disk(Work),
    /// Bytes for the state file; one write of each part at a time.
    Save(Write),
    /// What was written is durable, or cannot be made so.
    Stopped,
    /// The answer to an `Ask`.
    Answer {
        /// The world's number for it.
        number: u64,
        /// What was done, or why not.
        result: Result<Told, Refusal>,
    },
    /// An answer. After it is sent the slot is free again. The answer to a read or a
    /// digest carries what the disk has made of it when it succeeded.
    Reply {
        /// To whom.
        conn: Conn,
        /// Which slot.
        slot: Slot,
        /// The header; the body of a read or a digest is the world's to add.
        header: Header,
    },
    /// The answer to HELLO; requests may be taken from now on.
    Welcome {
        /// To whom.
        conn: Conn,
        /// What is told.
        welcome: Welcome,
    },
    /// HELLO is refused, and the connection closed after the answer.
    Refuse {
        /// To whom.
        conn: Conn,
        /// Why, for branching.
        errno: Errno,
        /// Why, for people.
        text: String,
    },
    /// The connection is closed at once; nothing more is taken from it.
    Close {
        /// Which.
        conn: Conn,
        /// For the log.
        why: &'static str,
    },
}

/// A job on the disk.
#[derive(Clone, Copy, Debug)]
enum Running {
    Sync,
    Data { conn: Conn, slot: Slot, op: DiskOp, header: Header, channel: u16, session: Id, logged: bool },
}

/// An answer that waits for a sync.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    conn: Conn,
    slot: Slot,
    header: Header,
    needs: Point,
}

/// The rules of one volume.
#[derive(Debug)]
pub struct Volume {
    config: Config,
    sectors: u64,
    sessions: Sessions,
    flushes: Flushes,
    kept: Kept,
    jobs: Vec<Option<Running>>,
    free: Vec<u32>,
    waiters: Vec<Waiter>,
    /// HELLOs that are not decided, and whether the first one's claim is being made durable.
    knocks: VecDeque<Knock>,
    claiming: bool,
    book: Book,
    /// Who waits for a write of the state, and for which change.
    saves: Vec<(u64, Then)>,
    failing: Vec<Failing>,
    /// It is not yet written down that the machine has lost its memory.
    lost: bool,
    /// Changes that wait until something is written down.
    parked: Vec<Parked>,
    /// `None`: it has too many regions.
    log: Option<Log>,
    /// The server stops when this is durable.
    stopping: Option<Point>,
    effects: VecDeque<Effect>,
}

impl Volume {
    /// A volume of `sectors` sectors that nobody is attached to, with what its former server has left in its state file.
    pub fn new(config: Config, sectors: u64, book: Book, log: Option<Log>) -> Volume {
        let kept = book.durable();
        let lost = kept.has_lost(config.boot) && !config.write_through && !planted(Bug::LossNotCounted);
        Volume {
            config,
            lost,
            parked: Vec::new(),
            log,
            stopping: None,
            sectors,
            sessions: Sessions::new(book.durable().claim),
            flushes: Flushes::new(book.durable().flush_failed),
            kept: Kept::default(),
            jobs: Vec::new(),
            free: Vec::new(),
            waiters: Vec::new(),
            knocks: VecDeque::new(),
            claiming: false,
            book,
            saves: Vec::new(),
            failing: Vec::new(),
            effects: VecDeque::new(),
        }
    }

    /// Takes what happened. Whatever follows from it is in [`Volume::poll_effect`] afterwards.
    pub fn handle(&mut self, event: Event<'_>) {
        match event {
            Event::Attach { conn, hello, epoch, assigned } => self.knock(conn, hello, epoch, assigned),
            Event::Request { conn, slot, header, intact } => self.request(conn, slot, header, intact),
            Event::DiskDone { job, result } => self.disk_done(job, result),
            Event::Gone { conn } => self.gone(conn),
            Event::Saved { part: Part::State, result } => self.saved(result),
            Event::Saved { part: Part::Page(_), result } => self.page_saved(result),
            Event::Ask { number, ask } => self.ask(number, ask),
            Event::Stop => self.stop(),
            Event::Resized { sectors, layout } => self.resize(sectors, layout),
        }
    }

    /// What to do next. To be called until `None` after each event.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// What the volume would remember if its server died now.
    pub fn state(&self) -> &State {
        self.book.durable()
    }

    fn disk_done(&mut self, job: Job, result: Result<(), Errno>) {
        let at = job.0 as usize;
        let Some(running) = self.jobs.get_mut(at).and_then(Option::take) else { return };
        self.free.push(job.0);
        match running {
            Running::Sync => self.synced(result),
            Running::Data { conn, slot, op, header, channel, session, logged } => {
                if logged {
                    let landed = (self.flushes.ticks(), result.is_err());
                    self.end_touch(&header, Some(landed));
                }
                // A failed write may have left something behind, so it counts too. A durable one needs no flush.
                if op.changes() && (op != DiskOp::Write { durable: true } || result.is_err()) {
                    self.flushes.wrote();
                }
                if op.changes() && self.sessions.claim().is_some_and(|claim| claim.session == session) {
                    self.kept.keep(channel, &header, result);
                }
                let told = planted(Bug::ServerAcksEarly) && op == (DiskOp::Write { durable: false });
                if self.sessions.ended(conn) && !told {
                    self.answer(conn, slot, &header, op, result);
                }
                self.welcome_ready();
            }
        }
    }

    /// Answers what the disk has done. What has no durable form of its own is made durable by a flush.
    fn answer(&mut self, conn: Conn, slot: Slot, header: &Header, op: DiskOp, result: Result<(), Errno>) {
        let zeroes = matches!(op, DiskOp::Zero | DiskOp::Punch);
        let durable = header.is_fua() || self.config.write_through;
        let flushes = durable && zeroes && !planted(Bug::ServerFuaZero);
        match result {
            Ok(()) if flushes => self.flush(conn, slot, header),
            _ => self.reply(conn, slot, header, result),
        }
    }

    fn flush(&mut self, conn: Conn, slot: Slot, header: &Header) {
        match self.flushes.ask() {
            Asked::Clean => {
                let moment = self.flushes.tick();
                self.flushed(conn, slot, header, moment);
            }
            Asked::Failed => self.fail_flush(conn, slot, *header, Errno::EIO),
            Asked::Wait(needs) => {
                self.waiters.push(Waiter { conn, slot, header: *header, needs });
                self.sync_if_needed();
            }
        }
    }

    /// All who wait share the next sync: it covers the latest of them.
    fn sync_if_needed(&mut self) {
        if let Some(needs) = self.waiters.iter().map(|waiter| waiter.needs).max() {
            self.sync(needs);
        }
    }

    fn sync(&mut self, needs: Point) {
        if self.flushes.start(needs) {
            let job = self.start(Running::Sync);
            self.effects.push_back(Effect::Disk(Work {
                job,
                op: DiskOp::Sync,
                extent: Extent::default(),
                place: None,
            }));
        }
    }

    fn synced(&mut self, result: Result<(), Errno>) {
        self.flushes.ended(result);
        if self.flushes.is_failed() && self.stopping.is_none() && !planted(Bug::FailureTellsNobody) {
            // Also when nobody is there any more to be told. A stop does so itself.
            self.record_failure();
        }
        for waiter in std::mem::take(&mut self.waiters) {
            let Waiter { conn, slot, header, needs } = waiter;
            match result {
                Ok(()) if !self.flushes.covers(needs) => self.waiters.push(waiter),
                Err(errno) if self.flushes.is_failed() => self.fail_flush(conn, slot, header, errno),
                Ok(()) => self.flushed(conn, slot, &header, self.flushes.synced()),
                Err(errno) => self.reply(conn, slot, &header, Err(errno)),
            }
        }
        if let Some(needs) = self.stopping
            && (result.is_err() || self.flushes.covers(needs))
        {
            self.stopping = None;
            let failed = result.is_err();
            self.keep(
                |state| (state.dirty, state.flush_failed) = (failed, state.flush_failed || failed),
                Then::Stopped,
            );
        }
        self.sync_if_needed();
    }

    /// Leaves nothing to lose.
    fn stop(&mut self) {
        let kept = self.book.durable();
        match self.flushes.ask() {
            _ if !kept.dirty || kept.boot != self.config.boot => self.effects.push_back(Effect::Stopped),
            Asked::Failed if kept.flush_failed || planted(Bug::FailureTellsNobody) => {
                self.effects.push_back(Effect::Stopped);
            }
            Asked::Failed => self.keep(|state| state.flush_failed = true, Then::Stopped),
            Asked::Clean => self.keep(|state| state.dirty = false, Then::Stopped),
            Asked::Wait(needs) => {
                self.stopping = Some(needs);
                self.sync(needs);
            }
        }
    }

    fn gone(&mut self, conn: Conn) {
        self.forget(conn);
        self.sessions.gone(conn);
        self.welcome_ready();
    }

    fn close(&mut self, conn: Conn, why: &'static str) {
        if self.sessions.close(conn) {
            self.forget(conn);
            self.effects.push_back(Effect::Close { conn, why });
        }
    }

    /// Nothing more is said to a connection.
    fn forget(&mut self, conn: Conn) {
        self.waiters.retain(|waiter| waiter.conn != conn);
        self.failing.retain(|failing| failing.conn != conn);
        self.knocks.retain(|knock| knock.conn != conn);
        self.drop_parked(conn);
    }

    fn reply(&mut self, conn: Conn, slot: Slot, header: &Header, result: Result<(), Errno>) {
        self.effects.push_back(Effect::Reply { conn, slot, header: header.reply(result) });
    }

    fn start(&mut self, running: Running) -> Job {
        if let Some(at) = self.free.pop() {
            self.jobs[at as usize] = Some(running);
            return Job(at);
        }
        self.jobs.push(Some(running));
        // Bounded by VOLUME_CONNECTIONS_MAX * LINK_REQUESTS_MAX and the sync.
        Job(u32::try_from(self.jobs.len() - 1).unwrap_or(u32::MAX))
    }
}

/// Requests that may be outstanding on one channel.
#[allow(clippy::cast_possible_truncation)] // asserted in limits
pub const REQUESTS_MAX: u32 = limits::LINK_REQUESTS_MAX as u32;
/// Bytes that may be outstanding on one channel.
#[allow(clippy::cast_possible_truncation)] // asserted in limits
pub const BYTES_MAX: u32 = limits::LINK_BYTES_MAX as u32;

#[cfg(test)]
mod tests;
