//! The tags of one I/O thread: a fixed number of requests in flight, each with its data buffer and its answer.
//!
//! A tag is free, or it belongs to one connection until its answer is sent or its connection has died and nothing uses its
//! buffer any more. Everything a client can make the thread hold is a tag, so a client that may not have one is not read.

use std::io;

use crate::engine::request::{Request, Tag};
use crate::errno::Errno;
use crate::io::buffer::{Buffers, PAGE_BYTES};
use crate::limits;
use crate::wire::nbd::export::Terms;
use crate::wire::nbd::transmission::{Pending, REPLY_HEAD_BYTES_MAX, Reply};

/// Who has a tag now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Nobody,
    /// The connection: its data is arriving, it waits to be taken, or its answer is being sent.
    Connection,
    /// The worker.
    Worker,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    holder: Holder,
    connection: usize,
    pending: Pending,
    head_bytes: usize,
    data_bytes: usize,
}

/// See the module's description.
pub(super) struct Tags {
    entries: Box<[Entry]>,
    /// Free tags; the last one freed is the next one used, so that few buffers are ever touched.
    free: Vec<u16>,
    data: Buffers,
    heads: Buffers,
}

impl Tags {
    pub(super) fn new(depth: usize) -> io::Result<Tags> {
        let Some(last) =
            u16::try_from(depth).ok().filter(|depth| (1..=limits::DEPTH_MAX).contains(&usize::from(*depth)))
        else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let entry =
            Entry { holder: Holder::Nobody, connection: 0, pending: Pending::default(), head_bytes: 0, data_bytes: 0 };
        let heads_bytes = (depth * REPLY_HEAD_BYTES_MAX).next_multiple_of(PAGE_BYTES);
        Ok(Tags {
            entries: vec![entry; depth].into_boxed_slice(),
            free: (0..last).rev().collect(),
            data: Buffers::new(depth, limits::PAYLOAD_BYTES_MAX as usize)?,
            heads: Buffers::new(1, heads_bytes)?,
        })
    }

    pub(super) fn any_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// A free tag, for a request of this connection.
    pub(super) fn take(&mut self, connection: usize, pending: Pending) -> Option<Tag> {
        let tag = self.free.pop()?;
        let entry = &mut self.entries[usize::from(tag)];
        debug_assert_eq!(entry.holder, Holder::Nobody);
        *entry = Entry { holder: Holder::Connection, connection, pending, head_bytes: 0, data_bytes: 0 };
        Some(Tag(tag))
    }

    /// Back to the free ones; nothing uses its buffers any more.
    pub(super) fn release(&mut self, tag: Tag) {
        let entry = &mut self.entries[usize::from(tag.0)];
        assert_eq!(entry.holder, Holder::Connection, "tag {} is released by who does not hold it", tag.0);
        entry.holder = Holder::Nobody;
        self.free.push(tag.0);
    }

    /// The worker takes the tag's request.
    pub(super) fn lend(&mut self, tag: Tag, request: Request) -> (Tag, Request) {
        let entry = &mut self.entries[usize::from(tag.0)];
        debug_assert_eq!(entry.holder, Holder::Connection);
        entry.holder = Holder::Worker;
        (tag, request)
    }

    /// The worker gives the tag back; the connection it belongs to.
    pub(super) fn give_back(&mut self, tag: Tag) -> usize {
        let entry = &mut self.entries[usize::from(tag.0)];
        assert_eq!(entry.holder, Holder::Worker, "tag {} is completed by who does not hold it", tag.0);
        entry.holder = Holder::Connection;
        entry.connection
    }

    /// Makes the answer.
    pub(super) fn answer(&mut self, tag: Tag, result: Result<(), Errno>, terms: Terms) {
        let entry = &mut self.entries[usize::from(tag.0)];
        let reply = Reply::new(&entry.pending, result, terms);
        entry.head_bytes = reply.head().len();
        entry.data_bytes = reply.data_bytes;
        self.heads.copy_in(0, usize::from(tag.0) * REPLY_HEAD_BYTES_MAX, reply.head());
    }

    /// Address and length of the answer's head and of its data.
    pub(super) fn answer_parts(&self, tag: Tag) -> [(*mut u8, usize); 2] {
        let entry = &self.entries[usize::from(tag.0)];
        let at = usize::from(tag.0) * REPLY_HEAD_BYTES_MAX;
        let head = self.heads.at(0, at, entry.head_bytes);
        [(head, entry.head_bytes), (self.data.at(usize::from(tag.0), 0, entry.data_bytes), entry.data_bytes)]
    }

    pub(super) fn data(&self) -> &Buffers {
        &self.data
    }

    pub(super) fn data_mut(&mut self) -> &mut Buffers {
        &mut self.data
    }
}
