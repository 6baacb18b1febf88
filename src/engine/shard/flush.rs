//! Flushes of one target that the owner asks a shard for: at the end of a suspend's draining, and around a cut-over.
//!
//! They go through any gate, as requests of their own behind those of the frontend.

use crate::engine::request::{Request, RequestOp, Tag};
use crate::engine::shard::Shard;
use crate::errno::Errno;
use crate::units::{Extent, Time};

/// Flushes under way at a time; more wait for their turn.
pub(super) const FLUSHES: usize = 4;

/// The flushes that a shard was asked for, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    waiting: std::collections::VecDeque<(u64, usize)>,
    flying: [Option<u64>; FLUSHES],
    over: std::collections::VecDeque<(u64, bool)>,
}

impl Shard {
    /// Flushes one target. [`Shard::poll_flushed`] tells how it ended.
    pub fn flush_target(&mut self, now: Time, ticket: u64, target: usize) {
        self.flushes.waiting.push_back((ticket, target));
        self.begin_flushes(now);
    }

    /// A flush that has ended: its number, and whether everything acknowledged before it began is durable.
    pub fn poll_flushed(&mut self) -> Option<(u64, bool)> {
        self.flushes.over.pop_front()
    }

    fn begin_flushes(&mut self, now: Time) {
        while let Some(slot) = self.flushes.flying.iter().position(Option::is_none)
            && let Some((ticket, target)) = self.flushes.waiting.pop_front()
        {
            self.flushes.flying[slot] = Some(ticket);
            let tag = Tag(u16::try_from(self.config.depth + slot).unwrap_or(u16::MAX));
            let request = Request { op: RequestOp::Flush, extent: Extent::default(), target: Some(target) };
            self.handle_request(now, tag, request);
        }
    }

    /// Whether a tag is that of a flush.
    pub(super) fn is_flush(&self, tag: Tag) -> bool {
        usize::from(tag.0) >= self.config.depth
    }

    /// Whether a tag is that of a flush; then it has ended so.
    pub(super) fn flush_over(&mut self, tag: Tag, result: Result<(), Errno>) -> bool {
        let Some(slot) = usize::from(tag.0).checked_sub(self.config.depth) else { return false };
        if let Some(ticket) = self.flushes.flying[slot].take() {
            self.flushes.over.push_back((ticket, result.is_ok()));
        }
        true
    }

    /// Goes on with those that wait. Called once in a turn.
    pub(super) fn more_flushes(&mut self) {
        if !self.flushes.waiting.is_empty() {
            self.begin_flushes(self.now);
        }
    }
}
