//! One TCP connection to a server, driven by completions on its thread's ring: connect, HELLO, gathered sends, staged receives.
//!
//! The shard decides when to connect and what to send; this file moves bytes. It owns the payload checksums: a write's is made
//! when it is first gathered, an answer's is checked before the shard hears of it.
//!
//! - At most one SENDMSG and one RECV are in flight. A send gathers everything the shard offers, small frames first. A small
//!   frame that is alone is sent at once, by a system call of its own, if the socket has room: there is no completion to wake up for.
//! - A receive goes to a staging buffer; when much of a body is missing and the stage is empty, straight to the request's buffer. After
//!   a large body little is received into the stage: what follows is likely another, and what comes through the stage is copied once
//!   more. After a small one as much as possible: many of them come with one receive.
//! - `Down` is reported only after every operation was reaped, so no completion can touch a buffer that was given back. For
//!   the same reason the answer to a write whose send has not completed waits for that completion.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, types};
use nix::libc;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, sockopt};

use crate::engine::link::{LinkEvent, Terms};
use crate::engine::shard::{Body, Data, Outgoing, Shard};
use crate::errno::Errno;
use crate::io::ring::{Frontend, Owner, pack, sqe_length};
use crate::limits;
use crate::units::{Epoch, Extent, Time};
use crate::wire::frame::{HEADER_BYTES, Header, Op, data_crc, message_crc};
use crate::wire::session::{HELLO_BYTES, Hello, WELCOME_BYTES, Welcome, features};
use crate::wire::volume::{Explained, decode_message};

/// Frames up to this size go first in a gather.
const SMALL_BYTES: usize = 32 << 10;
/// A body of which at least this is missing is received straight into its buffer, bytes. Less comes through the stage, with what follows.
const DIRECT_BYTES_MIN: usize = 16 << 10;
/// What is received into the stage after a large body, bytes.
const APPETITE_SMALL: usize = 4 << 10;

/// Which operation a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Connect = 0,
    Send = 1,
    Receive = 2,
    Cancel = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No socket.
    Idle,
    /// CONNECT is in flight.
    Connecting,
    /// HELLO is on its way, or its answer.
    Greeting,
    /// Serving.
    Streaming,
    /// Shut down; `Down` with this error when nothing is in flight.
    Closing(Errno),
}

/// A body that is being received.
#[derive(Clone, Copy, Debug)]
struct Incoming {
    reply: Header,
    data: Data,
    filled: usize,
}

/// A socket address in the kernel's form, at an address that does not move.
struct KernelAddress {
    storage: Box<socket::SockaddrStorage>,
}

/// What the connection to one server is made with.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Index of the target.
    pub target: usize,
    /// The server.
    pub address: SocketAddr,
    /// What to say first.
    pub hello: Hello,
    /// The epoch of the claim.
    pub epoch: Epoch,
}

/// See the module's description.
pub struct Link {
    config: LinkConfig,
    state: State,
    socket: Option<OwnedFd>,
    address: KernelAddress,
    connecting: bool,
    sending: bool,
    receiving: bool,
    /// Frames of the gather in flight, and their bytes.
    gather: Gather,
    stage: Box<[u8]>,
    stage_start: usize,
    stage_end: usize,
    /// How much the stage takes at a time.
    appetite: usize,
    incoming: Option<Incoming>,
    /// The receive in flight goes straight to the buffer of what comes in.
    direct: bool,
    /// Answers to writes whose send has not completed.
    deferred: Vec<Header>,
}

/// The frames of one send. Vectors never grow past what they were made with, so their addresses stay.
struct Gather {
    frames: Vec<Outgoing>,
    headers: Vec<[u8; HEADER_BYTES]>,
    vectors: Vec<libc::iovec>,
    /// First vector that is not sent whole.
    next: usize,
    message: Box<libc::msghdr>,
}

impl Gather {
    fn new() -> Gather {
        // SAFETY: all zeros is a valid msghdr: null pointers and zero lengths.
        let message = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Gather {
            frames: Vec::with_capacity(limits::GATHER_FRAMES_MAX),
            headers: Vec::with_capacity(limits::GATHER_FRAMES_MAX),
            vectors: Vec::with_capacity(limits::GATHER_FRAMES_MAX * 2),
            next: 0,
            message,
        }
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.headers.clear();
        self.vectors.clear();
        self.next = 0;
    }

    fn push(&mut self, header: [u8; HEADER_BYTES], body: Option<(*mut u8, usize)>) {
        debug_assert!(self.headers.len() < self.headers.capacity());
        self.headers.push(header);
        if let Some(last) = self.headers.last_mut() {
            self.vectors.push(libc::iovec { iov_base: last.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
        }
        if let Some((start, length)) = body {
            self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: length });
        }
    }

    /// Takes `bytes` sent bytes off the front. True when nothing is left.
    fn advance(&mut self, mut bytes: usize) -> bool {
        while let Some(vector) = self.vectors.get_mut(self.next) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                vector.iov_len -= bytes;
                return false;
            }
            bytes -= vector.iov_len;
            self.next += 1;
        }
        true
    }

    fn message(&mut self) -> *const libc::msghdr {
        let rest = &mut self.vectors[self.next..];
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = rest.len();
        &raw const *self.message
    }

    fn carries(&self, reply: &Header) -> bool {
        self.frames.iter().any(|frame| frame.header.tag == reply.tag)
    }
}

// SAFETY: the pointers inside (vectors, message) are only read by the kernel, for operations of the thread that owns the link;
// a link is moved to its thread before the first operation.
unsafe impl Send for Link {}

impl Link {
    /// A link that is down.
    pub fn new(config: LinkConfig) -> Link {
        let storage = Box::new(socket::SockaddrStorage::from(config.address));
        Link {
            config,
            state: State::Idle,
            socket: None,
            address: KernelAddress { storage },
            connecting: false,
            sending: false,
            receiving: false,
            gather: Gather::new(),
            stage: vec![0; limits::STAGE_BYTES].into_boxed_slice(),
            stage_start: 0,
            stage_end: 0,
            appetite: limits::STAGE_BYTES,
            incoming: None,
            direct: false,
            deferred: Vec::with_capacity(limits::GATHER_FRAMES_MAX),
        }
    }

    /// Has its changes written down by the server from the next connection on. Whether that is news.
    pub fn log_changes(&mut self) -> bool {
        let features = &mut self.config.hello.features;
        let news = *features & features::REGION_LOG == 0;
        *features |= features::REGION_LOG;
        news
    }

    /// Whether data has a checksum, in both directions.
    fn has_digests(&self) -> bool {
        self.config.hello.features & features::DATA_CRC != 0
    }

    /// Whether nothing is in flight and no socket is open.
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    fn user_data(&self, kind: Kind) -> u64 {
        Owner::Link.user_data(pack(self.config.target, kind as u32))
    }

    /// Starts to connect.
    pub fn connect<F: Frontend>(&mut self, now: Time, shard: &mut Shard, frontend: &mut F) {
        if self.state != State::Idle {
            return;
        }
        match open_socket(&self.config.address) {
            Ok(socket) => {
                let fd = types::Fd(socket.as_raw_fd());
                self.socket = Some(socket);
                self.state = State::Connecting;
                self.connecting = true;
                let (address, length) = self.address.parts();
                let sqe = opcode::Connect::new(fd, address, length).build();
                frontend.push(sqe.user_data(self.user_data(Kind::Connect)));
            }
            Err(error) => shard.handle_link(now, self.config.target, LinkEvent::Down(error)),
        }
    }

    /// Closes; `Down` follows when every operation was reaped.
    pub fn close<F: Frontend>(&mut self, now: Time, shard: &mut Shard, frontend: &mut F) {
        self.give_up(now, shard, frontend, Errno::ECANCELED);
    }

    fn give_up<F: Frontend>(&mut self, now: Time, shard: &mut Shard, frontend: &mut F, error: Errno) {
        if matches!(self.state, State::Idle | State::Closing(_)) {
            return;
        }
        self.state = State::Closing(error);
        if let Some(socket) = &self.socket {
            // Ends a send or receive in flight. ENOTCONN: there is none.
            let _ = socket::shutdown(socket.as_raw_fd(), socket::Shutdown::Both);
        }
        if self.connecting {
            let sqe = opcode::AsyncCancel::new(self.user_data(Kind::Connect)).build();
            frontend.push(sqe.user_data(self.user_data(Kind::Cancel)));
        }
        self.finish_close(now, shard);
    }

    /// Reports `Down` once nothing is in flight.
    fn finish_close(&mut self, now: Time, shard: &mut Shard) {
        let State::Closing(error) = self.state else { return };
        if self.connecting || self.sending || self.receiving {
            return;
        }
        self.socket = None;
        self.state = State::Idle;
        self.gather.clear();
        self.stage_start = 0;
        self.stage_end = 0;
        self.appetite = limits::STAGE_BYTES;
        self.incoming = None;
        // Their parts count as sent and unanswered: they are sent again.
        self.deferred.clear();
        shard.handle_link(now, self.config.target, LinkEvent::Down(error));
    }

    /// Takes a completion of one of this link's operations.
    pub fn handle<F: Frontend>(&mut self, now: Time, kind: u32, result: i32, shard: &mut Shard, frontend: &mut F) {
        let outcome = if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(result.unsigned_abs() as usize) };
        let step = match kind {
            kind if kind == Kind::Connect as u32 => {
                self.connecting = false;
                outcome.map(|_| self.greet(frontend))
            }
            kind if kind == Kind::Send as u32 => {
                self.sending = false;
                outcome.and_then(|bytes| self.sent(now, bytes, shard, frontend))
            }
            kind if kind == Kind::Receive as u32 => {
                self.receiving = false;
                match outcome {
                    Ok(0) => Err(Errno::ECONNRESET),
                    other => other.and_then(|bytes| self.received(now, bytes, shard, frontend)),
                }
            }
            _ => Ok(()),
        };
        if let Err(error) = step {
            self.give_up(now, shard, frontend, error);
        }
        self.finish_close(now, shard);
    }

    fn greet<F: Frontend>(&mut self, frontend: &mut F) {
        if self.state != State::Connecting {
            return;
        }
        self.state = State::Greeting;
        let body = self.config.hello.encode();
        let header = Header::request(Op::Hello, 0, 0, self.config.epoch, Extent::default());
        let header = header.with_body(sqe_length(HELLO_BYTES), message_crc(&body));
        // The stage is free until the answer comes: it carries the question.
        self.stage[..HEADER_BYTES].copy_from_slice(&header.encode());
        self.stage[HEADER_BYTES..HEADER_BYTES + HELLO_BYTES].copy_from_slice(&body);
        self.gather.clear();
        let vector = libc::iovec { iov_base: self.stage.as_mut_ptr().cast(), iov_len: HEADER_BYTES + HELLO_BYTES };
        self.gather.vectors.push(vector);
        self.send(frontend);
    }

    fn send<F: Frontend>(&mut self, frontend: &mut F) {
        let Some(socket) = &self.socket else { return };
        let fd = types::Fd(socket.as_raw_fd());
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let sqe = opcode::SendMsg::new(fd, self.gather.message()).flags(flags.cast_unsigned()).build();
        self.sending = true;
        frontend.push(sqe.user_data(self.user_data(Kind::Send)));
    }

    /// Whether the gather is one small frame: likely nothing else is going on, and the thread would wake for the completion alone.
    fn is_alone(&self) -> bool {
        let [frame] = &self.gather.frames[..] else { return false };
        frame.data.is_none_or(|data| data.bytes <= SMALL_BYTES)
    }

    /// Sends what the socket has room for. True when nothing is left. Whatever goes wrong the ring finds out again, and tells.
    fn send_now(&mut self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: a system call on an open descriptor; what the message points to is the gather's, and of tags in flight.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), self.gather.message(), flags) };
        usize::try_from(sent).is_ok_and(|bytes| self.gather.advance(bytes))
    }

    fn sent<F: Frontend>(&mut self, now: Time, bytes: usize, shard: &mut Shard, frontend: &mut F) -> Result<(), Errno> {
        let all = self.gather.advance(bytes);
        if matches!(self.state, State::Closing(_)) {
            return Ok(());
        }
        if !all {
            self.send(frontend);
            return Ok(());
        }
        self.gather.clear();
        if self.state == State::Greeting {
            self.receive(frontend);
        }
        // Takes the buffer out, so that it keeps its capacity while the shard is told.
        let mut deferred = std::mem::take(&mut self.deferred);
        let told = deferred.drain(..).try_for_each(|reply| self.tell(now, &reply, Body::Good, shard));
        self.deferred = deferred;
        told
    }

    /// Gathers and sends what the shard offers. Call after everything that may have given it something to send.
    pub fn pump<F: Frontend>(&mut self, shard: &mut Shard, frontend: &mut F) {
        while self.state == State::Streaming && !self.sending && self.gather(shard, frontend) {
            if self.is_alone() && self.send_now() {
                self.gather.clear();
            } else {
                self.send(frontend);
            }
        }
    }

    /// Takes what the shard offers. False when that is nothing.
    fn gather<F: Frontend>(&mut self, shard: &mut Shard, frontend: &F) -> bool {
        let mut bytes = 0;
        while self.gather.frames.len() < limits::GATHER_FRAMES_MAX && bytes < limits::GATHER_BYTES_MAX {
            let Some(outgoing) = shard.poll_send(self.config.target) else { break };
            bytes += HEADER_BYTES as u64 + outgoing.data.map_or(0, |data| data.bytes as u64);
            self.gather.frames.push(outgoing);
        }
        if self.gather.frames.is_empty() {
            return false;
        }
        let is_small = |outgoing: &Outgoing| outgoing.data.is_none_or(|data| data.bytes <= SMALL_BYTES);
        for small in [true, false] {
            for at in 0..self.gather.frames.len() {
                let outgoing = self.gather.frames[at];
                if is_small(&outgoing) == small {
                    self.gather_frame(&outgoing, shard, frontend);
                }
            }
        }
        true
    }

    fn gather_frame<F: Frontend>(&mut self, outgoing: &Outgoing, shard: &mut Shard, frontend: &F) {
        let Some(data) = outgoing.data else {
            self.gather.push(outgoing.header.encode(), None);
            return;
        };
        let start = frontend.buffer(data.tag).wrapping_add(data.offset);
        debug_assert!(data.offset + data.bytes <= frontend.buffer_bytes());
        if !self.has_digests() {
            let header = outgoing.header.with_bare_body(sqe_length(data.bytes));
            return self.gather.push(header.encode(), Some((start, data.bytes)));
        }
        let crc = outgoing.crc.unwrap_or_else(|| {
            // SAFETY: the tag is in flight, so its buffer is the shard's alone; offset and length lie within it by construction.
            let payload = unsafe { std::slice::from_raw_parts(start, data.bytes) };
            let crc = data_crc(payload, outgoing.header.lba);
            shard.keep_crc(&outgoing.header, crc);
            crc
        });
        let header = outgoing.header.with_body(sqe_length(data.bytes), crc);
        self.gather.push(header.encode(), Some((start, data.bytes)));
    }

    fn receive<F: Frontend>(&mut self, frontend: &mut F) {
        let Some(socket) = &self.socket else { return };
        let fd = types::Fd(socket.as_raw_fd());
        let missing = |incoming: &Incoming| incoming.data.bytes - incoming.filled;
        let straight =
            |incoming: &Incoming| self.stage_start == self.stage_end && missing(incoming) >= DIRECT_BYTES_MIN;
        let direct = self.incoming.filter(straight);
        self.direct = direct.is_some();
        let (start, length, flags) = match direct {
            Some(incoming) => {
                let at = frontend.buffer(incoming.data.tag).wrapping_add(incoming.data.offset + incoming.filled);
                (at, incoming.data.bytes - incoming.filled, libc::MSG_WAITALL)
            }
            None => {
                if self.stage_start > 0 {
                    self.stage.copy_within(self.stage_start..self.stage_end, 0);
                    self.stage_end -= self.stage_start;
                    self.stage_start = 0;
                }
                let end = self.stage.len().min(self.stage_end + self.appetite);
                let free = &mut self.stage[self.stage_end..end];
                (free.as_mut_ptr(), free.len(), 0)
            }
        };
        let sqe = opcode::Recv::new(fd, start, sqe_length(length)).flags(flags).build();
        self.receiving = true;
        frontend.push(sqe.user_data(self.user_data(Kind::Receive)));
    }

    fn received<F: Frontend>(
        &mut self,
        now: Time,
        bytes: usize,
        shard: &mut Shard,
        frontend: &mut F,
    ) -> Result<(), Errno> {
        match &mut self.incoming {
            Some(incoming) if self.direct => incoming.filled += bytes,
            _ => self.stage_end += bytes,
        }
        match self.state {
            State::Streaming => {
                shard.handle_progress(now, self.config.target);
                self.parse(now, shard, frontend)?;
            }
            State::Greeting => self.welcomed(now, shard)?,
            _ => return Ok(()),
        }
        if matches!(self.state, State::Greeting | State::Streaming) {
            self.receive(frontend);
        }
        Ok(())
    }

    fn staged(&self) -> &[u8] {
        &self.stage[self.stage_start..self.stage_end]
    }

    fn staged_header(&self) -> Result<Option<Header>, Errno> {
        let Some(bytes) = self.staged().first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        Header::decode(bytes).map(Some).map_err(|error| {
            tracing::warn!(server = %self.config.address, %error, "a server sent something that is no answer");
            error.errno()
        })
    }

    /// The answer to HELLO, once it is whole.
    fn welcomed(&mut self, now: Time, shard: &mut Shard) -> Result<(), Errno> {
        let Some(reply) = self.staged_header()? else { return Ok(()) };
        let whole = HEADER_BYTES + reply.body_bytes as usize;
        if reply.op != Op::Hello || !reply.is_reply() {
            return Err(Errno::EPROTO);
        }
        let Some(body) = self.staged().get(HEADER_BYTES..whole) else { return Ok(()) };
        if let Err(error) = reply.result() {
            let text = decode_message::<Explained>(&reply, body).map_or_else(|_| error.to_string(), |body| body.error);
            tracing::warn!(server = %self.config.address, volume = self.config.hello.volume, %error, text, "refused");
            return Err(error);
        }
        if message_crc(body) != reply.body_crc || body.len() != WELCOME_BYTES {
            return Err(Errno::EPROTO);
        }
        let welcome = Welcome::decode(body).map_err(|_| Errno::EPROTO)?;
        self.stage_start += whole;
        self.state = State::Streaming;
        let terms = Terms {
            sectors: welcome.sectors,
            volume: welcome.volume,
            losses: welcome.losses,
            requests_max: welcome.requests_max as usize,
            bytes_max: u64::from(welcome.bytes_max),
        };
        shard.handle_link(now, self.config.target, LinkEvent::Up(terms));
        Ok(())
    }

    /// Takes every whole answer out of the stage.
    fn parse<F: Frontend>(&mut self, now: Time, shard: &mut Shard, frontend: &F) -> Result<(), Errno> {
        loop {
            if let Some(incoming) = self.incoming {
                if !self.fill(incoming, frontend) {
                    return Ok(());
                }
                self.incoming = None;
                let body = self.check(&incoming, frontend);
                self.tell(now, &incoming.reply, body, shard)?;
                continue;
            }
            let Some(reply) = self.staged_header()? else { return Ok(()) };
            let expected = shard.expect(self.config.target, &reply).map_err(|_| {
                tracing::warn!(server = %self.config.address, ?reply, "an answer to nothing that was asked");
                Errno::EPROTO
            })?;
            self.stage_start += HEADER_BYTES;
            match expected {
                Some(data) => {
                    let large = data.bytes >= DIRECT_BYTES_MIN;
                    self.appetite = if large { APPETITE_SMALL } else { limits::STAGE_BYTES };
                    self.incoming = Some(Incoming { reply, data, filled: 0 });
                }
                None => self.tell(now, &reply, Body::Good, shard)?,
            }
        }
    }

    /// Copies what the stage has of a body. True when the body is whole.
    fn fill<F: Frontend>(&mut self, mut incoming: Incoming, frontend: &F) -> bool {
        let data = incoming.data;
        let count = (data.bytes - incoming.filled).min(self.stage_end - self.stage_start);
        if count > 0 {
            let to = frontend.buffer(data.tag).wrapping_add(data.offset + incoming.filled);
            // SAFETY: the tag is in flight, so its buffer is the shard's alone; the shard's `expect` said that this run lies
            // within it. The stage is another allocation.
            unsafe { std::ptr::copy_nonoverlapping(self.stage.as_ptr().add(self.stage_start), to, count) };
            self.stage_start += count;
            incoming.filled += count;
        }
        self.incoming = Some(incoming);
        incoming.filled == data.bytes
    }

    fn check<F: Frontend>(&self, incoming: &Incoming, frontend: &F) -> Body {
        if !incoming.reply.is_sealed() && !self.has_digests() {
            return Body::Good;
        }
        let start = frontend.buffer(incoming.data.tag).wrapping_add(incoming.data.offset);
        // SAFETY: as in `fill`; the body is whole and nothing is being received into it.
        let payload = unsafe { std::slice::from_raw_parts(start, incoming.data.bytes) };
        let crc = match incoming.reply.op {
            Op::Digest => message_crc(payload),
            _ => data_crc(payload, incoming.reply.lba),
        };
        if crc == incoming.reply.body_crc {
            Body::Good
        } else {
            tracing::warn!(server = %self.config.address, lba = incoming.reply.lba.0, "data arrived damaged");
            Body::Damaged
        }
    }

    fn tell(&mut self, now: Time, reply: &Header, body: Body, shard: &mut Shard) -> Result<(), Errno> {
        if self.sending && reply.op == Op::Write && self.gather.carries(reply) {
            self.deferred.push(*reply);
            return Ok(());
        }
        shard.handle_reply(now, self.config.target, reply, body).map_err(|_| Errno::EPROTO)
    }
}

impl KernelAddress {
    fn parts(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        use nix::sys::socket::SockaddrLike;
        (self.storage.as_ptr(), self.storage.len())
    }
}

/// A TCP socket with the options that every data connection has.
fn open_socket(address: &SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let errno = |error: nix::Error| Errno::from_raw(error as i32);
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(errno)?;
    set_options(&socket).map_err(errno)?;
    Ok(socket)
}

/// No delay, and an end to connections whose peer has vanished.
pub fn set_options(socket: &OwnedFd) -> nix::Result<()> {
    socket::setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    let millis = u32::try_from(limits::KEEPALIVE_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    socket::setsockopt(socket, sockopt::TcpUserTimeout, &millis)
}

impl Drop for Link {
    fn drop(&mut self) {
        debug_assert!(!(self.connecting || self.sending || self.receiving), "a link was dropped with I/O in flight");
    }
}
