//! How a request is split into parts, each for one node, and queued on its links. As many as there are free parts at a time.

use crate::bugs::{Bug, planted};
use crate::engine::link::LinkState;
use crate::engine::request::{RequestOp, Tag};
use crate::engine::shard::{Active, Shard};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Extent, Lba, SECTOR_BYTES};
use crate::wire::frame::Op;

impl Shard {
    /// Splits the rest of a request into parts: one that it always can have, and with `extra` as many as are free for all.
    /// False when they did not suffice.
    pub(super) fn issue(&mut self, tag: Tag, extra: bool) -> bool {
        while let Some(mut active) = self.slots[usize::from(tag.0)] {
            if active.cursor.done {
                break;
            }
            let extra = extra && (self.extra + 1 + self.slots.len()) * self.width <= self.parts.len();
            if (active.parts > 0 || planted(Bug::SilentNodeStarves)) && !extra {
                return false;
            }
            if !self.groups.has_free() {
                return false;
            }
            self.issue_next(tag, &mut active);
            self.slots[usize::from(tag.0)] = Some(active);
        }
        self.settle(tag);
        true
    }

    /// Makes at most one part, and moves the cursor on.
    fn issue_next(&mut self, tag: Tag, active: &mut Active) {
        if let Some(target) = active.request.target {
            return self.issue_direct(tag, active, target);
        }
        match active.request.op {
            RequestOp::Read => self.issue_data(tag, active, Op::Read, false),
            RequestOp::Write { fua } => self.issue_data(tag, active, Op::Write, fua),
            RequestOp::Discard => self.issue_span(tag, active, Op::Discard, false),
            RequestOp::WriteZeroes { keep: true, fua } => self.issue_span(tag, active, Op::WriteZeroes, fua),
            RequestOp::WriteZeroes { keep: false, fua } => self.issue_span(tag, active, Op::Discard, fua),
            RequestOp::Flush => self.issue_flush(tag, active),
            RequestOp::Digest => (active.cursor.done, active.result) = (true, Err(Errno::EINVAL)),
        }
    }

    /// The whole request is for one target, and small enough for one part.
    fn issue_direct(&mut self, tag: Tag, active: &mut Active, target: usize) {
        let (op, fua) = match active.request.op {
            RequestOp::Read => (Op::Read, false),
            RequestOp::Write { fua } => (Op::Write, fua),
            RequestOp::Flush => (Op::Flush, false),
            RequestOp::Digest => (Op::Digest, false),
            RequestOp::Discard => (Op::Discard, false),
            RequestOp::WriteZeroes { fua, .. } => (Op::WriteZeroes, fua),
        };
        active.cursor.done = true;
        let mark = self.shared.target(target).flush_mark().unwrap_or([0; limits::SHARDS_MAX]);
        if let Some(index) = self.queue_part(tag, active, target, op, active.request.extent, fua) {
            self.marks[usize::from(index)] = mark;
        }
    }

    /// How much of an extent of a node's volume one part may have.
    fn room(&self, node: usize, extent: Extent, most: u64) -> u64 {
        let border = if self.view.straight(node).is_some() {
            u64::MAX
        } else {
            self.view.region_sectors - extent.start.0 % self.view.region_sectors
        };
        extent.sectors.min(most).min(border)
    }

    fn issue_data(&mut self, tag: Tag, active: &mut Active, op: Op, fua: bool) {
        let whole = active.request.extent;
        let done = active.cursor.sectors;
        let rest = Extent { start: Lba(whole.start.0 + done), sectors: whole.sectors - done };
        let rest = Extent { sectors: rest.sectors.min(u64::from(limits::PAYLOAD_BYTES_MAX) / SECTOR_BYTES), ..rest };
        let piece = self.view.geometry.piece(rest);
        let sectors = self.room(piece.node, piece.extent, u64::MAX);
        self.queue_piece(tag, active, piece.node, op, Extent { sectors, ..piece.extent }, fua);
        active.cursor.sectors += sectors;
        active.cursor.done = active.cursor.sectors == whole.sectors;
    }

    fn issue_span(&mut self, tag: Tag, active: &mut Active, op: Op, fua: bool) {
        let node = active.cursor.node;
        let left_out = planted(Bug::SpanForgetsLastNode) && node > 0 && node + 1 == self.view.geometry.nodes();
        let span = self.view.geometry.span(active.request.extent, node);
        let Some(span) = span.filter(|_| !left_out) else {
            self.next_node(active);
            return;
        };
        let done = active.cursor.sectors;
        let rest = Extent::new(span.start.0 + done, span.sectors - done);
        let sectors = self.room(node, rest, u64::from(limits::ZERO_BYTES_MAX) / SECTOR_BYTES);
        let mut extent = Extent { sectors, ..rest };
        if planted(Bug::DiscardOutward) && op == Op::Discard {
            extent = outward(extent, self.view.geometry.node_sectors(node));
        }
        self.queue_piece(tag, active, node, op, extent, fua);
        active.cursor.sectors += sectors;
        if active.cursor.sectors == span.sectors {
            self.next_node(active);
        }
    }

    fn issue_flush(&mut self, tag: Tag, active: &mut Active) {
        let node = active.cursor.node;
        if planted(Bug::FlushSkipsNode) && node > 0 && node + 1 == self.view.geometry.nodes() {
            return self.next_node(active);
        }
        let Some(target) = self.view.straight(node) else {
            self.queue_piece(tag, active, node, Op::Flush, Extent::default(), false);
            return self.next_node(active);
        };
        if self.shared.target(target).has_failed_flush() {
            active.result = active.result.and(Err(Errno::EIO));
        } else if let Some(mark) = self.shared.target(target).flush_mark()
            && let Some(index) = self.queue_part(tag, active, target, Op::Flush, Extent::default(), false)
        {
            self.marks[usize::from(index)] = mark;
            if planted(Bug::FlushClearsAtSend) {
                self.shared.target(target).flushed(&mark);
            }
        }
        self.next_node(active);
    }

    fn next_node(&self, active: &mut Active) {
        active.cursor.node += 1;
        active.cursor.sectors = 0;
        active.cursor.done = active.cursor.node == self.view.geometry.nodes();
    }

    /// Makes what a piece of a request needs: a part, or a group of them.
    fn queue_piece(&mut self, tag: Tag, active: &mut Active, node: usize, op: Op, extent: Extent, fua: bool) {
        if let Some(target) = self.view.straight(node) {
            self.queue_part(tag, active, target, op, extent, fua);
            return;
        }
        self.extra += usize::from(active.parts > 0);
        active.parts += 1;
        let offset = usize::try_from(active.cursor.sectors * SECTOR_BYTES).unwrap_or(usize::MAX);
        self.new_group(tag, node, op, extent, offset, fua);
    }

    /// Makes a part and queues it on its link. `None` when it is refused at once; the request's result says why.
    fn queue_part(
        &mut self,
        tag: Tag,
        active: &mut Active,
        target: usize,
        op: Op,
        extent: Extent,
        fua: bool,
    ) -> Option<u16> {
        let refusal = if self.links[target].state == LinkState::Fenced {
            Some(Errno::EBADE)
        } else if self.shared.target(target).has_lost() {
            // What it has may be older than what was acknowledged; that says nothing about its disk to whoever asks for this target.
            Some(if active.request.target.is_some() { Errno::ECANCELED } else { Errno::EIO })
        } else if !matches!(op, Op::Read | Op::Digest) && self.shared.target(target).has_failed_flush() {
            // What is written there now could never be made durable truthfully.
            Some(Errno::EIO)
        } else {
            None
        };
        if let Some(error) = refusal {
            active.result = active.result.and(Err(error));
            return None;
        }
        let index = self.parts.take(tag, target, op, extent)?;
        let part = self.parts.at_mut(index);
        part.fua = fua;
        let offset = usize::try_from(active.cursor.sectors * SECTOR_BYTES).unwrap_or(usize::MAX);
        part.offset = if planted(Bug::PartOffset) { 0 } else { offset };
        self.extra += usize::from(active.parts > 0);
        active.parts += 1;
        self.links[target].queue.push_back(index);
        Some(index)
    }
}

/// What [`Bug::DiscardOutward`] makes of an extent.
fn outward(extent: Extent, sectors: u64) -> Extent {
    let start = extent.start.0 / 8 * 8;
    let end = extent.end().0.next_multiple_of(8).min(sectors);
    Extent::new(start, end - start)
}
