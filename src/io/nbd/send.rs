//! The sending half of a connection: one SENDMSG at a time, with every answer that is ready.

use std::collections::VecDeque;

use nix::libc;

use crate::engine::request::Tag;
use crate::io::nbd::tags::Tags;
use crate::limits;

/// Answers that wait, and those in the send in flight.
pub(super) struct Outbox {
    /// Handshake bytes; they go before every answer. Not touched while they are in flight.
    pub(super) speech: Vec<u8>,
    waiting: VecDeque<Tag>,
    going: Vec<Tag>,
    /// Never grows, so its address stays.
    vectors: Vec<libc::iovec>,
    /// The first vector that is not sent whole.
    next: usize,
    message: Box<libc::msghdr>,
    in_flight: bool,
}

/// How a send has ended.
pub(super) enum Sent {
    /// This is left of it and goes next.
    Partly(*const libc::msghdr),
    /// All of it; so many tags were released.
    Whole {
        /// Tags whose answers were sent.
        released: usize,
    },
}

impl Outbox {
    pub(super) fn new(depth: usize) -> Outbox {
        // SAFETY: all zeros is a valid msghdr: null pointers and zero lengths.
        let message = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Outbox {
            speech: Vec::new(),
            waiting: VecDeque::with_capacity(depth),
            going: Vec::with_capacity(limits::GATHER_FRAMES_MAX),
            vectors: Vec::with_capacity(limits::GATHER_FRAMES_MAX * 2),
            next: 0,
            message,
            in_flight: false,
        }
    }

    pub(super) fn push(&mut self, tag: Tag) {
        self.waiting.push_back(tag);
    }

    pub(super) fn in_flight(&self) -> bool {
        self.in_flight
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.in_flight && self.waiting.is_empty() && self.speech.is_empty()
    }

    /// What to send now, if something is ready and nothing is in flight.
    pub(super) fn start(&mut self, tags: &Tags) -> Option<*const libc::msghdr> {
        if self.is_empty() || self.in_flight {
            return None;
        }
        self.vectors.clear();
        self.next = 0;
        if self.speech.is_empty() {
            self.gather(tags);
        } else {
            let (start, length) = (self.speech.as_mut_ptr(), self.speech.len());
            self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: length });
        }
        Some(self.message())
    }

    fn gather(&mut self, tags: &Tags) {
        let mut bytes = 0;
        while self.going.len() < limits::GATHER_FRAMES_MAX && bytes < limits::GATHER_BYTES_MAX {
            let Some(tag) = self.waiting.pop_front() else { break };
            self.going.push(tag);
            for (start, length) in tags.answer_parts(tag) {
                if length > 0 {
                    self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: length });
                    bytes += length as u64;
                }
            }
        }
    }

    fn message(&mut self) -> *const libc::msghdr {
        self.in_flight = true;
        let rest = &mut self.vectors[self.next..];
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = rest.len();
        &raw const *self.message
    }

    /// Takes the end of a send.
    pub(super) fn sent(&mut self, mut bytes: usize, tags: &mut Tags) -> Sent {
        self.in_flight = false;
        while let Some(vector) = self.vectors.get_mut(self.next) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                vector.iov_len -= bytes;
                return Sent::Partly(self.message());
            }
            bytes -= vector.iov_len;
            self.next += 1;
        }
        self.speech.clear();
        let released = self.going.len();
        self.going.drain(..).for_each(|tag| tags.release(tag));
        Sent::Whole { released }
    }

    /// Takes the end of a send that failed.
    pub(super) fn failed(&mut self) {
        self.in_flight = false;
    }

    /// Forgets everything, when no send is in flight; how many tags were released.
    pub(super) fn drop_all(&mut self, tags: &mut Tags) -> usize {
        debug_assert!(!self.in_flight);
        self.speech.clear();
        let count = self.going.len() + self.waiting.len();
        self.going.drain(..).chain(self.waiting.drain(..)).for_each(|tag| tags.release(tag));
        count
    }
}
