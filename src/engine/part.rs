//! The in-flight table: the parts into which requests were split, one per (request, target, run of sectors).
//!
//! Invariants: a part belongs to one request from `take` to `give_back`; its (index, sequence) names one use of it and never
//! comes back within 2^32 uses, so a late or forged answer matches nothing.

use crate::bugs::{Bug, planted};
use crate::engine::request::Tag;
use crate::units::{Epoch, Extent};
use crate::wire::frame::{DIGEST_BYTES, Header, Op, flags};

/// Where a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PartState {
    Free,
    /// In its link's queue.
    Queued,
    /// Handed to the connection, not answered.
    Sent,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) state: PartState,
    pub(crate) tag: Tag,
    pub(crate) target: usize,
    pub(crate) op: Op,
    pub(crate) fua: bool,
    /// On the target's volume.
    pub(crate) extent: Extent,
    /// Where its data starts in the tag's buffer, bytes.
    pub(crate) offset: usize,
    sequence: u32,
    /// It was sent on a former connection and the server has not yet said that this is over.
    pub(crate) exposed: bool,
    /// Nobody waits for it any more; it only keeps its buffer until its connection is closed.
    pub(crate) over: bool,
    /// The group it belongs to, on a node with several targets.
    pub(crate) group: Option<u16>,
    /// How often its data arrived damaged.
    pub(crate) damaged: u32,
    /// A flush: what its server is told with it.
    pub(crate) point: u64,
    /// The checksum of its data, once it was computed: a part that is sent again is sent as it was first read.
    pub(crate) crc: Option<u32>,
}

impl Part {
    /// Bytes that this part puts on the connection, in both directions, besides headers.
    pub(crate) fn bytes(&self) -> u64 {
        match self.op {
            Op::Read | Op::Write => self.extent.bytes(),
            Op::Digest => u64::from(DIGEST_BYTES),
            _ => 0,
        }
    }

    /// Whether its effect could still come after its caller was told that it failed.
    pub(crate) fn mutates(&self) -> bool {
        matches!(self.op, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// A fixed number of parts.
#[derive(Debug)]
pub(crate) struct Parts {
    parts: Vec<Part>,
    free: Vec<u16>,
}

impl Parts {
    /// The first use of each has a sequence after `first`.
    pub(crate) fn new(count: usize, first: u32) -> Parts {
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let empty = Part {
            state: PartState::Free,
            tag: Tag(0),
            target: 0,
            op: Op::Flush,
            fua: false,
            extent: Extent::default(),
            offset: 0,
            sequence: first,
            exposed: false,
            over: false,
            group: None,
            damaged: 0,
            point: 0,
            crc: None,
        };
        Parts { parts: vec![empty; usize::from(count)], free: (0..count).rev().collect() }
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    /// A sequence that no use of any of these has had, if they began at `first`.
    pub(crate) fn unused_after(&self, first: u32) -> u32 {
        let uses = self.parts.iter().map(|part| part.sequence.wrapping_sub(first)).max().unwrap_or(0);
        first.wrapping_add(uses)
    }

    /// Those in use.
    pub(crate) fn used(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(|part| part.state != PartState::Free)
    }

    /// How many are free.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free part for `tag`, queued.
    pub(crate) fn take(&mut self, tag: Tag, target: usize, op: Op, extent: Extent) -> Option<u16> {
        let index = self.free.pop()?;
        let part = self.at_mut(index);
        let sequence = part.sequence.wrapping_add(1);
        *part = Part {
            state: PartState::Queued,
            tag,
            target,
            op,
            fua: false,
            extent,
            offset: 0,
            sequence,
            exposed: false,
            over: false,
            group: None,
            damaged: 0,
            point: 0,
            crc: None,
        };
        Some(index)
    }

    pub(crate) fn give_back(&mut self, index: u16) {
        let part = self.at_mut(index);
        debug_assert!(part.state != PartState::Free, "part {index} given back twice");
        part.state = PartState::Free;
        self.free.push(index);
    }

    pub(crate) fn at(&self, index: u16) -> &Part {
        &self.parts[usize::from(index)]
    }

    pub(crate) fn at_mut(&mut self, index: u16) -> &mut Part {
        &mut self.parts[usize::from(index)]
    }

    /// The request frame of a part; a write's body is yet to be described.
    pub(crate) fn header(&self, index: u16, epoch: Epoch) -> Header {
        let part = self.at(index);
        let mut header = Header::request(part.op, u32::from(index), part.sequence, epoch, part.extent);
        if part.op == Op::Flush {
            header = header.with_point(part.point);
        }
        if part.fua && !planted(Bug::IgnoreFua) {
            header.flags |= flags::FUA;
        }
        header
    }

    /// The part that `reply` answers on the link to `target`; `None` when it answers nothing that was asked there.
    pub(crate) fn matching(&self, target: usize, reply: &Header) -> Option<u16> {
        if planted(Bug::ReplyToWrongTag) {
            return self.similar(target, reply);
        }
        let index = u16::try_from(reply.tag).ok()?;
        let part = self.parts.get(usize::from(index))?;
        let fits = part.state == PartState::Sent
            && part.target == target
            && part.sequence == reply.sequence
            && part.op == reply.op
            && part.extent == reply.extent()
            && reply.is_reply();
        fits.then_some(index)
    }

    /// What [`Bug::ReplyToWrongTag`] takes for the part that `reply` answers.
    fn similar(&self, target: usize, reply: &Header) -> Option<u16> {
        let is_similar = |part: &Part| {
            let sent = part.state == PartState::Sent && part.target == target;
            sent && part.op == reply.op && part.extent.sectors == reply.extent().sectors
        };
        u16::try_from(self.parts.iter().position(is_similar)?).ok()
    }
}
