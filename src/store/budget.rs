//! How much one connection may have outstanding, as promised in the answer to HELLO.
//!
//! Contract: a request that does not fit is not refused but not read yet, so a peer that asks for too much waits in its own
//! socket and a server's memory is bounded by its connections.

use crate::limits;
use crate::store::volume::{BYTES_MAX, REQUESTS_MAX, Slot};
use crate::wire::frame::{Header, Op};

/// The free slots and bytes of one connection.
#[derive(Debug)]
pub struct Budget {
    free: Vec<Slot>,
    bytes: u32,
}

impl Default for Budget {
    fn default() -> Budget {
        let slots = u16::try_from(REQUESTS_MAX).unwrap_or(u16::MAX);
        Budget { free: (0..slots).rev().map(Slot).collect(), bytes: BYTES_MAX }
    }
}

impl Budget {
    /// A slot for the request, or `None` until something is given back.
    pub fn take(&mut self, header: &Header) -> Option<Slot> {
        let bytes = data_bytes(header);
        if bytes > self.bytes {
            return None;
        }
        let slot = self.free.pop()?;
        self.bytes -= bytes;
        Some(slot)
    }

    /// The request of this slot has been answered.
    pub fn give(&mut self, slot: Slot, header: &Header) {
        debug_assert!(!self.free.contains(&slot));
        self.free.push(slot);
        self.bytes += data_bytes(header);
    }

    /// Whether everything was given back.
    pub fn is_whole(&self) -> bool {
        self.bytes == BYTES_MAX && self.free.len() == REQUESTS_MAX as usize
    }
}

/// The memory a request or its answer needs. The same for both, as an answer repeats op and length.
fn data_bytes(header: &Header) -> u32 {
    match header.op {
        Op::Read | Op::Write => header.length,
        // It is read piece by piece.
        Op::Digest => header.length.min(limits::PAYLOAD_BYTES_MAX),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Epoch, Extent};

    #[test]
    fn it_is_bounded_by_slots_and_by_bytes() {
        let flush = Header::request(Op::Flush, 0, 0, Epoch(1), Extent::default());
        let sectors = u64::from(limits::PAYLOAD_BYTES_MAX) / 512;
        let read = Header::request(Op::Read, 0, 0, Epoch(1), Extent::new(0, sectors));
        let mut budget = Budget::default();
        let slots: Vec<_> = std::iter::from_fn(|| budget.take(&flush)).collect();
        assert_eq!(slots.len(), limits::LINK_REQUESTS_MAX);
        slots.into_iter().for_each(|slot| budget.give(slot, &flush.reply(Ok(()))));
        let slots: Vec<_> = std::iter::from_fn(|| budget.take(&read)).collect();
        assert_eq!(slots.len() as u64, limits::LINK_BYTES_MAX / u64::from(limits::PAYLOAD_BYTES_MAX));
        assert!(budget.take(&flush).is_some(), "a flush needs no bytes");
        budget.give(slots[0], &read);
        assert!(budget.take(&read).is_some());
        let sectors = u64::from(limits::DIGEST_RANGE_BYTES_MAX) / 512;
        let digest = Header::request(Op::Digest, 0, 0, Epoch(1), Extent::new(0, sectors));
        assert!(budget.take(&digest).is_none());
        budget.give(slots[1], &read);
        assert!(budget.take(&digest).is_some(), "a digest needs what its largest piece needs");
        assert!(!budget.is_whole());
    }
}
