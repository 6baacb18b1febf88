//! One volume on its owner thread: joins its rules, its disk and its connections.
//!
//! Contract: only the owner thread touches a host. Rules decide, this performs: every [`Work`] that the rules emit comes back as
//! one `DiskDone`; a slot's buffer belongs to the disk while its work runs and to the connection otherwise. Disk work runs in
//! lanes, long-lived tasks that take the next piece when they are done, so a request costs no task of its own.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use tracing::{info, warn};

use crate::errno::Errno;
use crate::io::buffer::{Buffer, BufferPool};
use crate::io::disk::Disk;
use crate::io::ring::reactor;
use crate::limits;
use crate::roles::server::connection::Connection;
use crate::roles::server::fail_stop::FailStop;
use crate::store::pool;
use crate::store::pool::Refusal;
use crate::store::state::{Part, State, Write};
use crate::store::volume::{Ask, Conn, DiskOp, Effect, Event, Job, Slot, Told, Volume, Work};
use crate::units::SECTOR_BYTES;

/// What the volume has made durable, for those on other threads who only look.
pub(crate) type Shown = Arc<Mutex<Option<State>>>;

/// Who waits for the answer to an [`Ask`].
pub(crate) type Asker = tokio::sync::oneshot::Sender<Result<Told, Refusal>>;

/// A volume and everyone attached to it.
pub(crate) struct Host<D> {
    name: String,
    rules: RefCell<Volume>,
    disk: D,
    /// Its state file.
    state: D,
    /// Writes of the state file that have not ended.
    saving: Cell<usize>,
    shown: Shown,
    askers: RefCell<Askers>,
    stopped: Cell<bool>,
    pool: Rc<BufferPool>,
    connections: RefCell<Vec<Rc<Connection>>>,
    lanes: Lanes,
    /// Those of reads and writes that are done at once: there is no use in more than one.
    quick: Lanes,
}

/// Those who wait, by the number of what they asked.
#[derive(Default)]
struct Askers {
    next: u64,
    waiting: Vec<(u64, Asker)>,
}

/// Work for the disk, with what it needs to be done.
struct Task {
    work: Work,
    connection: Option<Rc<Connection>>,
    buffer: Option<Buffer>,
}

/// Who does the work.
#[derive(Default)]
struct Lanes {
    queue: RefCell<VecDeque<Task>>,
    idle: RefCell<Vec<Waker>>,
    count: Cell<usize>,
    closed: Cell<bool>,
}

impl Lanes {
    fn next_task(&self) -> impl Future<Output = Option<Task>> + '_ {
        std::future::poll_fn(|context| {
            if let Some(task) = self.queue.borrow_mut().pop_front() {
                return Poll::Ready(Some(task));
            }
            if self.closed.get() {
                return Poll::Ready(None);
            }
            self.idle.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
    }

    fn are_idle(&self) -> bool {
        self.queue.borrow().is_empty() && self.count.get() <= self.idle.borrow().len()
    }

    /// They end when nothing is left to do.
    fn close(&self) {
        self.closed.set(true);
        self.idle.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

impl<D: Disk> Host<D> {
    /// A host of these rules, with the volume's data and its state file.
    pub(crate) fn new(
        name: String,
        rules: Volume,
        (disk, state): (D, D),
        shown: Shown,
        pool: Rc<BufferPool>,
    ) -> Rc<Host<D>> {
        let host = Host {
            name,
            rules: RefCell::new(rules),
            disk,
            state,
            saving: Cell::new(0),
            shown,
            askers: RefCell::default(),
            stopped: Cell::new(false),
            pool,
            connections: RefCell::default(),
            lanes: Lanes::default(),
            quick: Lanes::default(),
        };
        host.show();
        Rc::new(host)
    }

    /// Tells those on other threads what is durable now.
    fn show(&self) {
        // Replaced whole, so a panic elsewhere cannot have left it half done.
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.rules.borrow().state().clone());
    }

    /// The volume's name, for the log.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Free buffers of the thread.
    pub(crate) fn pool(&self) -> &Rc<BufferPool> {
        &self.pool
    }

    /// Makes a connection known, before its HELLO is handed to the rules.
    pub(crate) fn enter(&self, connection: Rc<Connection>) {
        self.connections.borrow_mut().push(connection);
    }

    /// A connection has ended; the rules hear of it, and nothing of it is kept but its work on the disk.
    pub(crate) fn leave(self: &Rc<Host<D>>, conn: Conn) {
        self.handle(Event::Gone { conn });
        self.connections.borrow_mut().retain(|connection| connection.conn() != conn);
    }

    /// Closes every connection.
    pub(crate) fn close_all(&self, why: &'static str) {
        self.connections.borrow().iter().for_each(|connection| connection.close(why));
    }

    /// Whether no connection and no work is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.borrow().is_empty() && self.lanes.are_idle() && self.quick.are_idle() && self.saving.get() == 0
    }

    /// Makes durable what was written; nobody is attached any more.
    pub(crate) fn stop(self: &Rc<Host<D>>) {
        self.handle(Event::Stop);
    }

    /// Whether `stop` is done.
    pub(crate) fn has_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// Lets the lanes end when nothing is left to do. The host is not used after this.
    pub(crate) fn retire(&self) {
        self.lanes.close();
        self.quick.close();
    }

    /// Tells the rules, and does what they say.
    pub(crate) fn handle(self: &Rc<Host<D>>, event: Event<'_>) {
        self.rules.borrow_mut().handle(event);
        self.obey();
    }

    fn obey(self: &Rc<Host<D>>) {
        loop {
            let effect = self.rules.borrow_mut().poll_effect();
            match effect {
                Some(effect) => self.perform(effect),
                None => return,
            }
        }
    }

    /// Asks the rules about the volume as a whole.
    pub(crate) fn ask(self: &Rc<Host<D>>, ask: Ask<'_>, asker: Asker) {
        let number = {
            let askers = &mut *self.askers.borrow_mut();
            askers.next += 1;
            askers.waiting.push((askers.next, asker));
            askers.next
        };
        self.handle(Event::Ask { number, ask });
    }

    fn connection(&self, conn: Conn) -> Option<Rc<Connection>> {
        self.connections.borrow().iter().find(|connection| connection.conn() == conn).cloned()
    }

    fn perform(self: &Rc<Host<D>>, effect: Effect) {
        match effect {
            Effect::Disk(work) => self.start(work),
            Effect::Save(write) => {
                self.saving.set(self.saving.get() + 1);
                reactor::spawn(Rc::clone(self).save(write));
            }
            Effect::Stopped => self.stopped.set(true),
            Effect::Answer { number, result } => {
                let askers = &mut self.askers.borrow_mut().waiting;
                if let Some(at) = askers.iter().position(|(asked, _)| *asked == number) {
                    // Who asked may have gone.
                    let _ = askers.swap_remove(at).1.send(result);
                }
            }
            Effect::Reply { conn, slot, header } => {
                if let Some(connection) = self.connection(conn) {
                    connection.reply(slot, header, &self.pool);
                }
            }
            Effect::Welcome { conn, welcome } => {
                if let Some(connection) = self.connection(conn) {
                    info!(
                        volume = self.name, array = %connection.hello().array, session = %connection.hello().session,
                        epoch = connection.epoch().0, channel = connection.hello().channel, peer = %connection.peer(),
                        "attached"
                    );
                    connection.welcome(&welcome, &self.pool);
                }
            }
            Effect::Refuse { conn, errno, text } => {
                if let Some(connection) = self.connection(conn) {
                    warn!(volume = self.name, peer = %connection.peer(), ?errno, "HELLO refused: {text}");
                    connection.refuse(errno, &text, &self.pool);
                }
            }
            Effect::Close { conn, why } => {
                if let Some(connection) = self.connection(conn) {
                    connection.close(why);
                }
            }
        }
    }

    /// Writes a part of the state file durably.
    async fn save(self: Rc<Host<D>>, write: Write) {
        let _fail_stop = FailStop;
        let mut buffer = Buffer::new(write.bytes.len());
        buffer[..write.bytes.len()].copy_from_slice(&write.bytes);
        let (result, _) = self.state.write_at(buffer, write.bytes.len(), write.offset, true).await;
        if let Err(errno) = result {
            warn!(volume = self.name, ?errno, "the state file cannot be written");
        }
        self.saving.set(self.saving.get() - 1);
        self.rules.borrow_mut().handle(Event::Saved { part: write.part, result });
        if write.part == Part::State {
            self.show();
        }
        self.obey();
    }

    /// Whether it is a short copy, which is done at once.
    fn is_quick(&self, work: &Work) -> bool {
        let copies = matches!(work.op, DiskOp::Read | DiskOp::Write { .. });
        copies && self.disk.is_in_memory() && work.extent.bytes() < limits::WORKER_BYTES_MIN
    }

    fn start(self: &Rc<Host<D>>, work: Work) {
        let connection = work.place.and_then(|(conn, _)| self.connection(conn));
        let buffer =
            work.place.zip(connection.as_ref()).and_then(|((_, slot), connection)| connection.take_buffer(slot));
        let quick = self.is_quick(&work);
        let (lanes, most) = if quick { (&self.quick, 1) } else { (&self.lanes, limits::SERVER_LANES_MAX) };
        lanes.queue.borrow_mut().push_back(Task { work, connection, buffer });
        if let Some(waker) = lanes.idle.borrow_mut().pop() {
            waker.wake();
        } else if lanes.count.get() < most {
            lanes.count.set(lanes.count.get() + 1);
            reactor::spawn(Rc::clone(self).lane(quick));
        }
    }

    /// Does one piece of work after the other.
    async fn lane(self: Rc<Host<D>>, quick: bool) {
        let _fail_stop = FailStop;
        let lanes = if quick { &self.quick } else { &self.lanes };
        let mut copied = 0;
        while let Some(Task { work, connection, buffer }) = lanes.next_task().await {
            let (result, buffer) = self.execute(&work, buffer).await;
            self.finish(work.job, work.op, work.place.map(|(_, slot)| slot), connection, result, buffer);
            copied += work.extent.bytes();
            if quick && copied >= limits::AT_ONCE_BYTES as u64 {
                // What is ready is sent first.
                copied = 0;
                reactor::give_way().await;
            }
        }
        lanes.count.set(lanes.count.get() - 1);
    }

    async fn execute(&self, work: &Work, buffer: Option<Buffer>) -> (Result<(), Errno>, Option<Buffer>) {
        let (offset, length) = (work.extent.start.bytes(), work.extent.bytes());
        // Reads and writes are bounded by PAYLOAD_BYTES_MAX.
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        match (work.op, buffer) {
            (DiskOp::Read, buffer) if self.is_quick(work) => {
                let mut buffer = buffer.unwrap_or_else(|| self.pool.take(bytes));
                (self.disk.read_now(&mut buffer[..bytes], offset), Some(buffer))
            }
            (DiskOp::Write { .. }, Some(buffer)) if self.is_quick(work) => {
                (self.disk.write_now(&buffer[..bytes], offset), Some(buffer))
            }
            (DiskOp::Read, buffer) => {
                let buffer = buffer.unwrap_or_else(|| self.pool.take(bytes));
                let (result, buffer) = self.disk.read_at(buffer, bytes, offset).await;
                (result, Some(buffer))
            }
            (DiskOp::Write { durable }, Some(buffer)) => {
                let (result, buffer) = self.disk.write_at(buffer, bytes, offset, durable).await;
                (result, Some(buffer))
            }
            // The connection went before its work was started: it is dropped.
            (DiskOp::Write { .. }, None) => (Err(Errno::ECANCELED), None),
            (DiskOp::Zero, _) => (self.disk.zero(offset, length).await, None),
            (DiskOp::Punch, _) => (self.disk.punch(offset, length).await, None),
            (DiskOp::Sync, _) => (self.disk.sync().await, None),
            (DiskOp::Digest, buffer) => {
                let piece = bytes.min(limits::PAYLOAD_BYTES_MAX as usize);
                let buffer = buffer.unwrap_or_else(|| self.pool.take(piece));
                let (result, buffer) = self.disk.digest(buffer, offset, length).await;
                (result, Some(buffer))
            }
        }
    }

    fn finish(
        self: &Rc<Host<D>>,
        job: Job,
        op: DiskOp,
        slot: Option<Slot>,
        connection: Option<Rc<Connection>>,
        result: Result<(), Errno>,
        buffer: Option<Buffer>,
    ) {
        if let Err(errno) = result {
            warn!(volume = self.name, ?op, ?errno, "the disk failed");
        }
        match (buffer, slot, connection) {
            (Some(buffer), Some(slot), Some(connection))
                if matches!(op, DiskOp::Read | DiskOp::Digest) && result.is_ok() =>
            {
                connection.put_buffer(slot, buffer);
            }
            (Some(buffer), ..) => self.pool.give(buffer),
            (None, ..) => {}
        }
        self.handle(Event::DiskDone { job, result });
    }

    /// The size in sectors that a peer may use.
    pub(crate) fn resized(self: &Rc<Host<D>>, bytes: u64) {
        self.handle(Event::Resized { sectors: bytes / SECTOR_BYTES, layout: pool::layout(bytes) });
    }
}
