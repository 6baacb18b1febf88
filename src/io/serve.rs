//! The server's side of a TCP connection on a reactor: whole frames in, gathered frames out.
//!
//! Contract: a socket, and every buffer given to an operation on it, lives until that operation has ended, also when nobody waits
//! any more: the reactor keeps them. One [`Intake`] and one sender at a time per socket. A peer's bytes cost at most the staging
//! buffer and the buffers that the caller hands in.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::rc::Rc;

use io_uring::{IoUring, opcode, types};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::errno::Errno;
use crate::io::buffer::Buffer;
use crate::io::ring::reactor;
use crate::limits;
use crate::wire::frame::{BadFrame, HEADER_BYTES, Header};

/// A body of which more than this is missing is received straight into its buffer, bytes.
const DIRECT_BYTES_MIN: usize = 8 << 10;
/// After a body of at least that size no more than this is received into the stage, bytes: what follows is likely another, and
/// whatever of it comes through the stage is copied once more.
const STAGE_BYTES_SMALL: usize = 4 << 10;

/// Whether this process may use io_uring at all: kernels and containers can forbid it.
pub fn probe() -> Result<(), Errno> {
    IoUring::new(8).map(drop).map_err(|error| Errno::from(&error))
}

/// Sets up an accepted socket: small frames go at once, a dead peer is noticed.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    let seconds = |time: std::time::Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    let user_timeout = u32::try_from((limits::KEEPALIVE_INTERVAL + limits::KEEPALIVE_TIMEOUT).as_millis());
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &seconds(limits::KEEPALIVE_INTERVAL))?;
    setsockopt(stream, sockopt::TcpKeepInterval, &seconds(limits::KEEPALIVE_TIMEOUT / 2))?;
    setsockopt(stream, sockopt::TcpKeepCount, &2)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &user_timeout.unwrap_or(u32::MAX))?;
    Ok(())
}

/// An accepted socket on the calling thread's ring.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
}

impl Socket {
    /// Takes a socket over.
    pub fn new(stream: TcpStream) -> io::Result<Rc<Socket>> {
        // A ring waits by itself; on a non-blocking socket it would not.
        stream.set_nonblocking(false)?;
        Ok(Rc::new(Socket { stream }))
    }

    /// Ends whatever is in flight, and the connection.
    pub fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Receives into a part of a buffer: some bytes, or with `all` the whole part unless the peer ends.
    async fn receive(
        self: &Rc<Socket>,
        buffer: Buffer,
        part: Range<usize>,
        all: bool,
    ) -> (Result<usize, Errno>, Buffer) {
        let bytes = u32::try_from(buffer[part.clone()].len()).unwrap_or(u32::MAX);
        let to = buffer.as_ptr().wrapping_add(part.start);
        let flags = if all { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(types::Fd(self.stream.as_raw_fd()), to, bytes).flags(flags).build();
        // SAFETY: the part was checked to lie in the buffer, whose memory stays where it is; the descriptor is the socket's.
        let (result, (buffer, _)) = unsafe { reactor::submit((buffer, Rc::clone(self)), entry) }.await;
        (result, buffer)
    }

    /// Sends a whole batch.
    pub async fn send(self: &Rc<Socket>, mut batch: Box<Batch>) -> (Result<(), Errno>, Box<Batch>) {
        while let Some(message) = batch.rest() {
            // At once, as far as there is room: the receiver has something to do meanwhile.
            if let Ok(bytes) = send_now(&self.stream, message) {
                batch.sent += bytes;
                continue;
            }
            let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
            let entry =
                opcode::SendMsg::new(types::Fd(self.stream.as_raw_fd()), message).flags(flags.unsigned_abs()).build();
            // SAFETY: the message is in the box, and points into what the batch owns on the heap; the descriptor is the socket's.
            let (result, (back, _)) = unsafe { reactor::submit((batch, Rc::clone(self)), entry) }.await;
            batch = back;
            match result {
                Ok(0) => return (Err(Errno::EPIPE), batch),
                Ok(bytes) => batch.sent += bytes,
                Err(Errno::EINTR) => {}
                Err(error) => return (Err(error), batch),
            }
        }
        (Ok(()), batch)
    }
}

/// Sends without waiting. Whatever goes wrong the ring finds out again, and tells.
fn send_now(stream: &TcpStream, message: *const libc::msghdr) -> Result<usize, Errno> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: a system call on an open descriptor; the message is the batch's, which is borrowed for this long.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), message, flags) };
    usize::try_from(sent).ok().filter(|bytes| *bytes > 0).ok_or(Errno::EAGAIN)
}

/// Frames that are sent with one system call.
pub struct Batch {
    heads: Vec<[u8; HEADER_BYTES]>,
    bodies: Vec<Option<(Buffer, usize)>>,
    parts: Vec<libc::iovec>,
    message: libc::msghdr,
    bytes: usize,
    sent: usize,
}

impl Default for Batch {
    fn default() -> Batch {
        // SAFETY: `msghdr` is plain numbers and pointers, for which zero is a value.
        let message = unsafe { std::mem::zeroed() };
        Batch { heads: Vec::new(), bodies: Vec::new(), parts: Vec::new(), message, bytes: 0, sent: 0 }
    }
}

impl Batch {
    /// Whether one more frame with so long a body may join.
    pub fn has_room(&self, body_bytes: u32) -> bool {
        let bytes = self.bytes as u64 + u64::from(body_bytes);
        self.heads.is_empty() || (self.heads.len() < limits::GATHER_FRAMES_MAX && bytes <= limits::GATHER_BYTES_MAX)
    }

    /// Adds a frame, with the first bytes of a buffer as its body.
    pub fn push(&mut self, header: &Header, body: Option<(Buffer, usize)>) {
        debug_assert_eq!(header.body_bytes as usize, body.as_ref().map_or(0, |(_, bytes)| *bytes));
        self.heads.push(header.encode());
        self.bytes += HEADER_BYTES + body.as_ref().map_or(0, |(_, bytes)| *bytes);
        self.bodies.push(body);
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Empties the batch; its buffers come back.
    pub fn clear(&mut self) -> impl Iterator<Item = Buffer> + '_ {
        self.heads.clear();
        (self.bytes, self.sent) = (0, 0);
        self.bodies.drain(..).flatten().map(|(buffer, _)| buffer)
    }

    /// What is still to be sent. The message points into this batch, which must not change until it is sent.
    fn rest(&mut self) -> Option<*const libc::msghdr> {
        if self.sent == self.bytes {
            return None;
        }
        self.parts.clear();
        let mut skip = self.sent;
        let mut part = |bytes: &[u8]| {
            let skipped = skip.min(bytes.len());
            skip -= skipped;
            let rest = &bytes[skipped..];
            if !rest.is_empty() {
                self.parts.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
            }
        };
        for (head, body) in self.heads.iter().zip(&self.bodies) {
            part(head);
            if let Some((buffer, bytes)) = body {
                part(&buffer[..*bytes]);
            }
        }
        self.message.msg_iov = self.parts.as_mut_ptr();
        self.message.msg_iovlen = self.parts.len();
        Some(ptr::from_ref(&self.message))
    }
}

/// Why nothing more comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The peer has closed the connection.
    Closed,
    /// The connection failed.
    Failed(Errno),
    /// What came is not the protocol.
    Bad(BadFrame),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Closed => f.write_str("the peer closed it"),
            Ended::Failed(errno) => errno.fmt(f),
            Ended::Bad(bad) => bad.fmt(f),
        }
    }
}

/// What arrives, frame by frame.
pub struct Intake {
    socket: Rc<Socket>,
    /// Away while it is received into.
    stage: Option<Buffer>,
    /// What of the stage has arrived and is not used yet.
    unread: Range<usize>,
    /// How much the stage takes at a time.
    appetite: usize,
}

impl Intake {
    /// The one reader of a socket.
    pub fn new(socket: Rc<Socket>, stage: Buffer) -> Intake {
        Intake { socket, appetite: stage.len(), stage: Some(stage), unread: 0..0 }
    }

    /// The next header. Its body, if it has one, must be taken before the next.
    pub async fn header(&mut self) -> Result<Header, Ended> {
        let mut head = [0; HEADER_BYTES];
        while self.unread.len() < HEADER_BYTES {
            self.fill().await?;
        }
        self.take(&mut head);
        Header::decode(&head).map_err(Ended::Bad)
    }

    /// Receives `bytes` bytes of body to the start of a buffer that has room for them.
    pub async fn body(&mut self, mut buffer: Buffer, bytes: usize) -> Result<Buffer, Ended> {
        let mut done = self.unread.len().min(bytes);
        self.take(&mut buffer[..done]);
        self.appetite = if bytes >= DIRECT_BYTES_MIN { STAGE_BYTES_SMALL } else { usize::MAX };
        while done < bytes {
            // The stage is empty here.
            if bytes - done >= DIRECT_BYTES_MIN {
                let (result, back) = self.socket.receive(buffer, done..bytes, true).await;
                buffer = back;
                done += arrived(result)?;
            } else {
                self.fill().await?;
                let part = self.unread.len().min(bytes - done);
                self.take(&mut buffer[done..done + part]);
                done += part;
            }
        }
        Ok(buffer)
    }

    fn take(&mut self, to: &mut [u8]) {
        if let Some(stage) = &self.stage {
            to.copy_from_slice(&stage[self.unread.start..self.unread.start + to.len()]);
            self.unread.start += to.len();
        }
    }

    /// Receives something into the stage, which has less than a header in it.
    async fn fill(&mut self) -> Result<(), Ended> {
        let Some(mut stage) = self.stage.take() else { return Err(Ended::Closed) };
        stage.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let room = self.unread.end..stage.len().min(self.appetite);
        let (result, back) = self.socket.receive(stage, room, false).await;
        self.stage = Some(back);
        self.unread.end += arrived(result)?;
        Ok(())
    }

    /// The stage, for another connection.
    pub fn into_stage(self) -> Option<Buffer> {
        self.stage
    }
}

fn arrived(result: Result<usize, Errno>) -> Result<usize, Ended> {
    match result {
        Ok(0) => Err(Ended::Closed),
        Ok(bytes) => Ok(bytes),
        Err(Errno::EINTR) => Ok(0),
        Err(error) => Err(Ended::Failed(error)),
    }
}
