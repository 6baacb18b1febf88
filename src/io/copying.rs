//! The sync engine as the frontend of an I/O thread of its own: it brings a ring, and a buffer for each region under way.

use std::io;

use io_uring::squeue;

use crate::engine::copy::{Content, Copied, Copy, CopyError, Look};
use crate::engine::request::{Request, Tag};
use crate::errno::Errno;
use crate::io::buffer::Buffers;
use crate::io::ring::{BareRing, Completion, Frontend, Ring};
use crate::limits;
use crate::units::Time;
use crate::wire::digest::Digest;
use crate::wire::frame::DIGEST_BYTES;

/// Entries of the ring: the engine has few operations in flight.
const RING_ENTRIES: u32 = 64;

/// See the module's description.
pub struct CopyFrontend<W: FnMut(u32), L: FnMut()> {
    // Dropped first: what it has in flight ends before the buffers go.
    ring: BareRing,
    buffers: Buffers,
    rules: Copy,
    clock: fn() -> Time,
    /// Wakes the shards of these bits: their writes have waited for a region.
    wake: W,
    /// Called when it was stopped and has read the last of its source; once.
    left: Option<L>,
}

impl<W: FnMut(u32), L: FnMut()> CopyFrontend<W, L> {
    /// To be called by the thread that will use it.
    pub fn new(rules: Copy, clock: fn() -> Time, wake: W, left: L) -> io::Result<CopyFrontend<W, L>> {
        let bytes = usize::try_from(limits::REGION_BYTES).unwrap_or(usize::MAX);
        let buffers = Buffers::new(limits::SYNC_WINDOWS, bytes)?;
        Ok(CopyFrontend { ring: BareRing::new(RING_ENTRIES)?, buffers, rules, clock, wake, left: Some(left) })
    }

    /// How it has ended.
    pub fn outcome(&self) -> Result<Copied, CopyError> {
        self.rules.outcome().unwrap_or(Err(CopyError::Stopped))
    }

    /// What the buffer of a request that has ended holds, as far as it is asked for.
    fn look(&self, tag: Tag) -> Content {
        let region = self.rules.bytes(tag).min(self.buffers.bytes_each());
        // SAFETY: the request of this tag has ended, so nothing else touches its buffer.
        let bytes = unsafe { std::slice::from_raw_parts(self.buffer(tag), region) };
        match self.rules.looks_at(tag) {
            Look::Not => Content::Unknown,
            Look::ForZeros if is_zero(bytes) => Content::Zeros,
            Look::ForZeros => Content::Unknown,
            Look::ForDigest => Digest::decode(&bytes[..DIGEST_BYTES as usize])
                .map_or(Content::Unknown, |digest| Content::Digest(digest.hash)),
        }
    }

    /// Tells the others what they wait for.
    fn tell(&mut self) {
        let waiting = self.rules.poll_wake();
        if waiting != 0 {
            (self.wake)(waiting);
        }
        if self.rules.has_left_source()
            && let Some(mut left) = self.left.take()
        {
            left();
        }
    }
}

/// Whether there is nothing but zeros.
fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: every bit pattern is a u128.
    let (head, words, tail) = unsafe { bytes.align_to::<u128>() };
    let rest = head.iter().chain(tail).all(|byte| *byte == 0);
    // By blocks, so that the compiler can compare many at a time and data ends it soon.
    rest && words.chunks(256).all(|block| block.iter().fold(0, |sum, word| sum | word) == 0)
}

impl<W: FnMut(u32), L: FnMut()> Ring for CopyFrontend<W, L> {
    fn push(&mut self, sqe: squeue::Entry) {
        self.ring.push(sqe);
    }

    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.ring.turn(wait, completions)
    }
}

impl<W: FnMut(u32), L: FnMut()> Frontend for CopyFrontend<W, L> {
    fn handle(&mut self, _: u64, _: i32) {}

    fn next_request(&mut self) -> Option<(Tag, Request)> {
        let next = self.rules.next_request((self.clock)());
        self.tell();
        next
    }

    fn next_abandoned(&mut self) -> Option<Tag> {
        self.rules.poll_abandoned()
    }

    fn next_timeout(&self) -> Time {
        self.rules.next_timeout()
    }

    fn buffer(&self, tag: Tag) -> *mut u8 {
        self.buffers.start(usize::from(tag.0))
    }

    fn buffer_bytes(&self) -> usize {
        self.buffers.bytes_each()
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        let content = self.look(tag);
        self.rules.complete(tag, result, content);
        self.tell();
    }

    fn is_up(&self) -> bool {
        self.rules.outcome().is_none()
    }

    fn shut_down(&mut self) {
        self.rules.stop();
    }
}
