//! A ring that one I/O thread owns: what the links, local files and frontends of that thread push their operations to.
//!
//! Contract: whoever pushes an SQE keeps every buffer it names alive and unmoved until its completion was delivered. All
//! `user_data` values pushed here have bit 63 set ([`FOREIGN`]), which tells them from ublk's own commands on a shared ring.

pub mod busy;
pub mod reactor;

use std::io;

use io_uring::{IoUring, squeue};

use crate::engine::request::{Request, Tag};
use crate::errno::Errno;
use crate::io::ring::busy::BusyPoll;
use crate::units::Time;

/// Bit 63 of `user_data`: the completion belongs to us and not to libublk.
pub const FOREIGN: u64 = 1 << 63;

/// Whose operation a completion ends: bits 56 to 62 of `user_data`. The low 56 bits are the owner's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// A TCP link to a server.
    Link = 1,
    /// A local file or block device.
    Disk = 2,
    /// The worker's own tick and mailbox.
    Worker = 3,
    /// The frontend: NBD sockets.
    Frontend = 4,
}

impl Owner {
    /// `user_data` of an operation of this owner; `value` uses the low 56 bits.
    pub const fn user_data(self, value: u64) -> u64 {
        FOREIGN | (self as u64) << 56 | (value & ((1 << 56) - 1))
    }

    /// Whose operation it was, and the owner's own bits.
    pub const fn of(user_data: u64) -> Option<(Owner, u64)> {
        let owner = match (user_data >> 56) & 0x7f {
            1 => Owner::Link,
            2 => Owner::Disk,
            3 => Owner::Worker,
            4 => Owner::Frontend,
            _ => return None,
        };
        Some((owner, user_data & ((1 << 56) - 1)))
    }
}

/// A target's index and 32 more bits, for the low part of a `user_data`.
pub const fn pack(target: usize, rest: u32) -> u64 {
    (target as u64 & 0xffff) | (rest as u64) << 16
}

/// The reverse of [`pack`].
pub fn unpack(value: u64) -> (usize, u32) {
    let [a, b, c, d, e, f, ..] = value.to_le_bytes();
    (usize::from(u16::from_le_bytes([a, b])), u32::from_le_bytes([c, d, e, f]))
}

/// A length as an SQE carries it. Lengths are bounded by `limits::PAYLOAD_BYTES_MAX`; one that is not is cut, and the
/// operation comes back short.
pub fn sqe_length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// One completion of an SQE that was pushed.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// As pushed.
    pub user_data: u64,
    /// Bytes, or a negative error number.
    pub result: i32,
    /// Flags of the CQE.
    pub flags: u32,
}

/// A submission and completion queue.
pub trait Ring {
    /// Queues an SQE with bit 63 of `user_data` set; submits by itself when the submission queue is full.
    fn push(&mut self, sqe: squeue::Entry);

    /// Submits what is queued; with `wait`, waits until at least one completion is there; appends completions of pushed SQEs.
    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()>;
}

/// Where the requests of one I/O thread come from, and where their results go. It brings the ring on which everything of that
/// thread runs.
///
/// The worker's loop: `turn`; `handle` for completions owned by [`Owner::Frontend`]; `next_request` until `None`; `complete`
/// for whatever the shard has finished. A tag belongs to the worker from `next_request` until `complete`.
pub trait Frontend: Ring {
    /// Takes the completion of one of the frontend's own operations; `value` is the owner's part of its `user_data`.
    fn handle(&mut self, value: u64, result: i32);

    /// The next request that has arrived whole. For a write its data is in the tag's buffer.
    fn next_request(&mut self) -> Option<(Tag, Request)>;

    /// The next request that nobody wants to be completed any more, and that is to end soon.
    fn next_abandoned(&mut self) -> Option<Tag> {
        None
    }

    /// When `next_request` is to be asked again, if nothing else happens.
    fn next_timeout(&self) -> Time {
        Time::NEVER
    }

    /// The start of a tag's data buffer: page-aligned, `buffer_bytes` long, the same for the frontend's life.
    fn buffer(&self, tag: Tag) -> *mut u8;

    /// Length of each buffer.
    fn buffer_bytes(&self) -> usize;

    /// Gives a tag back with its result. The data of a successful read is in its buffer.
    fn complete(&mut self, tag: Tag, result: Result<(), Errno>);

    /// Whether requests may still come. Once false, the worker ends after everything in flight is complete.
    fn is_up(&self) -> bool;

    /// Asks the frontend to take no more requests (NBD: stop listening, close when idle); `is_up` becomes false afterwards.
    fn shut_down(&mut self);
}

impl<R: Ring + ?Sized> Ring for &mut R {
    fn push(&mut self, sqe: squeue::Entry) {
        (**self).push(sqe);
    }

    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        (**self).turn(wait, completions)
    }
}

/// A worker may run on a frontend that somebody else keeps: a ublk queue outlives its worker.
impl<F: Frontend + ?Sized> Frontend for &mut F {
    fn handle(&mut self, value: u64, result: i32) {
        (**self).handle(value, result);
    }

    fn next_request(&mut self) -> Option<(Tag, Request)> {
        (**self).next_request()
    }

    fn next_abandoned(&mut self) -> Option<Tag> {
        (**self).next_abandoned()
    }

    fn next_timeout(&self) -> Time {
        (**self).next_timeout()
    }

    fn buffer(&self, tag: Tag) -> *mut u8 {
        (**self).buffer(tag)
    }

    fn buffer_bytes(&self) -> usize {
        (**self).buffer_bytes()
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        (**self).complete(tag, result);
    }

    fn is_up(&self) -> bool {
        (**self).is_up()
    }

    fn shut_down(&mut self) {
        (**self).shut_down();
    }
}

/// How what lies in memory is read and written: it is only copying, which would be done while the ring is entered, by the calling
/// thread, that is.
pub fn beside(in_memory: bool) -> squeue::Flags {
    if in_memory { squeue::Flags::ASYNC } else { squeue::Flags::empty() }
}

/// Answers of io_uring_enter after which the same call is simply made again.
pub fn is_transient(errno: Errno) -> bool {
    matches!(errno, Errno::EINTR | Errno::EBUSY | Errno::EAGAIN)
}

/// A ring that is used by the calling thread alone, and gives it completions only while it is inside `io_uring_enter`.
fn build(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_cqsize(entries.saturating_mul(4))
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries)
}

/// A plain ring, for frontends other than ublk.
pub struct BareRing {
    ring: IoUring,
    busy: BusyPoll,
}

impl BareRing {
    /// A ring of `entries` submissions and four times as many completions, used by the calling thread alone.
    pub fn new(entries: u32) -> io::Result<BareRing> {
        Ok(BareRing { ring: build(entries)?, busy: BusyPoll::default() })
    }
}

impl Ring for BareRing {
    fn push(&mut self, sqe: squeue::Entry) {
        debug_assert!(sqe.get_user_data() & FOREIGN != 0);
        loop {
            // SAFETY: by this module's contract the pusher keeps the buffers of the SQE alive until its completion.
            if unsafe { self.ring.submission().push(&sqe) }.is_ok() {
                return;
            }
            // Full: hand over what is there. EBUSY and EINTR leave it queued, and the next try finds room.
            let _ = self.ring.submit();
        }
    }

    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        if wait {
            self.busy.look(&mut self.ring);
        }
        let want = usize::from(wait && self.ring.completion().is_empty());
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            Err(error) if is_transient(Errno::from(&error)) => {}
            Err(error) => return Err(error),
        }
        for cqe in self.ring.completion() {
            completions.push(Completion { user_data: cqe.user_data(), result: cqe.result(), flags: cqe.flags() });
        }
        Ok(())
    }
}
