//! What a frontend asks of a shard.

use std::time::Duration;

use crate::units::Extent;

/// A frontend's number for a request in flight: below the shard's depth, one request at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u16);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestOp {
    /// Reads into the tag's buffer.
    Read,
    /// Writes from the tag's buffer; with `fua` durable before completion.
    Write {
        /// Durable before completion.
        fua: bool,
    },
    /// Makes durable whatever was completed before, on every node.
    Flush,
    /// Asks what the extent holds, into the first bytes of the tag's buffer ([`crate::wire::digest::Digest`]). Of one target alone.
    Digest,
    /// The range reads as zeros afterwards; its space may be given back.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// The space must stay allocated.
        keep: bool,
        /// Durable before completion.
        fua: bool,
    },
}

/// One request, of a frontend or of the sync engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is to be done.
    pub op: RequestOp,
    /// Where; empty for a flush.
    pub extent: Extent,
    /// `None`: the extent is on the array. Else it is on this target's volume, and no other target is concerned.
    pub target: Option<usize>,
}

impl Request {
    /// A request on the array.
    pub const fn new(op: RequestOp, extent: Extent) -> Request {
        Request { op, extent, target: None }
    }
}

/// Bounds within which a shard works, the same for all shards of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardConfig {
    /// Which shard this is.
    pub index: usize,
    /// Requests in flight.
    pub depth: usize,
    /// After this a request fails with ETIMEDOUT.
    pub io_timeout: Duration,
}
