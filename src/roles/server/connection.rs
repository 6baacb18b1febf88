//! One attached connection: its slots, what it is to send, and the two tasks that read and write its socket.
//!
//! Contract: at most what the answer to HELLO promised is in memory for it; a peer that asks for more waits in its own socket. A
//! request's slot is free again after its answer was sent. `close` ends both tasks; the reader's end tells the rules.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Poll, Waker};

use tracing::info;

use crate::errno::Errno;
use crate::io::buffer::{Buffer, BufferPool};
use crate::io::disk::Disk;
use crate::io::ring::reactor;
use crate::io::serve::{Batch, Ended, Intake, Socket};
use crate::limits;
use crate::roles::server::fail_stop::FailStop;
use crate::roles::server::host::Host;
use crate::roles::server::rude::Rude;
use crate::store::budget::Budget;
use crate::store::volume::{Conn, Event, REQUESTS_MAX, Slot};
use crate::units::Epoch;
use crate::wire::frame::{DIGEST_BYTES, Header, Op, data_crc, message_crc};
use crate::wire::session::{Hello, Welcome, features};
use crate::wire::volume::Explained;

/// Counts a connection to a volume for as long as anything of it is left, its work on the disk included.
pub(crate) struct Counted(Arc<AtomicU32>);

impl Counted {
    pub(crate) fn new(count: Arc<AtomicU32>) -> Counted {
        count.fetch_add(1, Ordering::AcqRel);
        Counted(count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// HELLO is not answered yet.
    Waiting,
    Live,
    /// What is queued is sent, then it closes.
    Leaving,
    Closed,
}

/// A frame to send.
struct Outgoing {
    header: Header,
    body: Option<(Buffer, usize)>,
    /// Given back after it is sent.
    slot: Option<Slot>,
}

/// A connection of a volume.
pub(crate) struct Connection {
    conn: Conn,
    peer: SocketAddr,
    hello: Hello,
    /// The header of the HELLO, for its answer.
    greeting: Header,
    socket: Rc<Socket>,
    state: Cell<State>,
    why: Cell<&'static str>,
    budget: RefCell<Budget>,
    buffers: RefCell<Vec<Option<Buffer>>>,
    outgoing: RefCell<VecDeque<Outgoing>>,
    reader: Signal,
    writer: Signal,
    /// The task that sends has ended.
    written: Cell<bool>,
    rude: Rude,
    _counted: Counted,
}

impl Connection {
    pub(crate) fn new(
        conn: Conn,
        peer: SocketAddr,
        (hello, greeting): (Hello, Header),
        socket: Rc<Socket>,
        counted: Counted,
        rude: Rude,
    ) -> Rc<Connection> {
        Rc::new(Connection {
            conn,
            peer,
            hello,
            greeting,
            socket,
            state: Cell::new(State::Waiting),
            why: Cell::new(""),
            budget: RefCell::default(),
            buffers: RefCell::new((0..REQUESTS_MAX).map(|_| None).collect()),
            outgoing: RefCell::default(),
            reader: Signal::default(),
            writer: Signal::default(),
            written: Cell::new(false),
            rude,
            _counted: counted,
        })
    }

    pub(crate) fn conn(&self) -> Conn {
        self.conn
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    pub(crate) fn hello(&self) -> &Hello {
        &self.hello
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.greeting.epoch
    }

    /// The data of a request that has arrived, for the disk.
    pub(crate) fn take_buffer(&self, slot: Slot) -> Option<Buffer> {
        self.buffers.borrow_mut().get_mut(usize::from(slot.0))?.take()
    }

    /// The data of an answer, from the disk.
    pub(crate) fn put_buffer(&self, slot: Slot, buffer: Buffer) {
        if let Some(place) = self.buffers.borrow_mut().get_mut(usize::from(slot.0)) {
            *place = Some(buffer);
        }
    }

    /// Queues the answer of a request.
    pub(crate) fn reply(&self, slot: Slot, header: Header, pool: &BufferPool) {
        let buffer = self.take_buffer(slot);
        if header.op == Op::Read && header.status == 0 {
            let Some(buffer) = buffer else { return self.close("an answer has no data") };
            let bytes = header.length as usize;
            let header = if self.hello.features & features::DATA_CRC == 0 {
                header.with_bare_body(header.length)
            } else {
                header.with_body(header.length, data_crc(&buffer[..bytes], header.lba))
            };
            return self.send(Outgoing { header, body: Some((buffer, bytes)), slot: Some(slot) });
        }
        if header.op == Op::Digest && header.status == 0 {
            let Some(buffer) = buffer else { return self.close("an answer has no data") };
            let bytes = DIGEST_BYTES as usize;
            let header = header.with_body(DIGEST_BYTES, message_crc(&buffer[..bytes]));
            return self.send(Outgoing { header, body: Some((buffer, bytes)), slot: Some(slot) });
        }
        if let Some(buffer) = buffer {
            pool.give(buffer);
        }
        self.send(Outgoing { header, body: None, slot: Some(slot) });
    }

    /// Answers HELLO; requests are read from now on.
    pub(crate) fn welcome(&self, welcome: &Welcome, pool: &BufferPool) {
        self.answer(Ok(()), &welcome.encode(), pool);
        if self.state.get() == State::Waiting {
            self.state.set(State::Live);
            self.reader.wake();
        }
    }

    /// Answers HELLO with a refusal and closes.
    pub(crate) fn refuse(&self, errno: Errno, text: &str, pool: &BufferPool) {
        let body = serde_json::to_vec(&Explained { error: text.to_owned() }).unwrap_or_default();
        self.answer(Err(errno), &body, pool);
        if self.state.get() != State::Closed {
            self.state.set(State::Leaving);
            self.why.set("its HELLO was refused");
            self.writer.wake();
        }
    }

    fn answer(&self, result: Result<(), Errno>, body: &[u8], pool: &BufferPool) {
        let mut buffer = pool.take(body.len());
        buffer[..body.len()].copy_from_slice(body);
        let length = u32::try_from(body.len()).unwrap_or(0);
        let header = self.greeting.reply(result).with_body(length, message_crc(body));
        self.send(Outgoing { header, body: Some((buffer, body.len())), slot: None });
    }

    fn send(&self, outgoing: Outgoing) {
        if self.state.get() != State::Closed {
            self.outgoing.borrow_mut().push_back(outgoing);
            self.writer.wake();
        }
    }

    /// Ends the connection; the reason is kept for the log.
    pub(crate) fn close(&self, why: &'static str) {
        if self.state.get() != State::Closed {
            if self.why.get().is_empty() {
                self.why.set(why);
            }
            self.state.set(State::Closed);
            self.socket.shutdown();
            self.outgoing.borrow_mut().clear();
            self.reader.wake();
            self.writer.wake();
        }
    }

    /// Everything the connection does, until it has ended.
    pub(crate) async fn run<D: Disk>(self: Rc<Connection>, host: Rc<Host<D>>) {
        let _fail_stop = FailStop;
        reactor::spawn(Rc::clone(&self).write(Rc::clone(host.pool())));
        let mut intake = Intake::new(Rc::clone(&self.socket), host.pool().take(limits::SERVER_STAGE_BYTES));
        let ended = self.read(&host, &mut intake).await;
        if self.state.get() != State::Leaving {
            self.close("");
        }
        // The answer to a refused HELLO may be on its way.
        self.reader.until(|| self.written.get()).await;
        self.close("");
        if let Some(stage) = intake.into_stage() {
            host.pool().give(stage);
        }
        match (ended, self.why.get()) {
            (Err(Ended::Bad(bad)), _) => self.rude.tell(self.peer, host.name(), &bad.to_string()),
            (Err(ended), "") => info!(volume = host.name(), peer = %self.peer, "detached: {ended}"),
            (_, why) => info!(volume = host.name(), peer = %self.peer, "detached: {why}"),
        }
        host.leave(self.conn);
    }

    /// Takes requests until the connection ends.
    async fn read<D: Disk>(&self, host: &Rc<Host<D>>, intake: &mut Intake) -> Result<(), Ended> {
        loop {
            let header = intake.header().await?;
            self.reader.until(|| self.state.get() != State::Waiting).await;
            if header.is_reply() || header.op.has_message() {
                self.close("it sent a frame that has no place after HELLO");
            }
            let mut slot = None;
            self.reader
                .until(|| {
                    slot = if self.state.get() == State::Live { self.budget.borrow_mut().take(&header) } else { None };
                    slot.is_some() || self.state.get() != State::Live
                })
                .await;
            let Some(slot) = slot else { return Ok(()) };
            let mut intact = true;
            if header.body_bytes > 0 {
                // Bounded by decode: at most PAYLOAD_BYTES_MAX.
                let bytes = header.body_bytes as usize;
                let buffer = intake.body(host.pool().take(bytes), bytes).await?;
                intact = !header.is_sealed() || data_crc(&buffer[..bytes], header.lba) == header.body_crc;
                self.put_buffer(slot, buffer);
            }
            host.handle(Event::Request { conn: self.conn, slot, header: &header, intact });
        }
    }

    async fn write(self: Rc<Connection>, pool: Rc<BufferPool>) {
        let _fail_stop = FailStop;
        self.send_all(&pool).await;
        self.written.set(true);
        self.reader.wake();
    }

    /// Sends what is queued, as much as possible at a time.
    async fn send_all(&self, pool: &BufferPool) {
        let mut batch = Box::<Batch>::default();
        let mut sending = Vec::with_capacity(limits::GATHER_FRAMES_MAX);
        loop {
            let ready =
                || !self.outgoing.borrow().is_empty() || !matches!(self.state.get(), State::Waiting | State::Live);
            self.writer.until(ready).await;
            while let Some(Outgoing { header, body, slot }) = self.next_for(&batch) {
                batch.push(&header, body);
                sending.push((slot, header));
            }
            if batch.is_empty() {
                if self.state.get() == State::Leaving {
                    self.close("");
                }
                return;
            }
            let (result, back) = self.socket.send(batch).await;
            batch = back;
            batch.clear().for_each(|buffer| pool.give(buffer));
            if result.is_err() {
                return self.close("its answers cannot be sent");
            }
            for (slot, header) in sending.drain(..) {
                if let Some(slot) = slot {
                    self.budget.borrow_mut().give(slot, &header);
                }
            }
            self.reader.wake();
        }
    }

    fn next_for(&self, batch: &Batch) -> Option<Outgoing> {
        let mut outgoing = self.outgoing.borrow_mut();
        let fits = outgoing.front().is_some_and(|next| batch.has_room(next.header.body_bytes));
        if fits { outgoing.pop_front() } else { None }
    }
}

/// Lets one task of the thread wait for something that others of the same thread change.
#[derive(Default)]
struct Signal {
    waker: RefCell<Option<Waker>>,
}

impl Signal {
    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    async fn until(&self, mut ready: impl FnMut() -> bool) {
        std::future::poll_fn(|context| {
            if ready() {
                return Poll::Ready(());
            }
            *self.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
