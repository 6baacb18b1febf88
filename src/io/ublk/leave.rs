//! A device that its daemon leaves in order (QUIESCE_DEV): what the control thread and the queues tell each other meanwhile.
//!
//! The kernel gives out no more requests and aborts the commands of idle tags, as at a stop; but a request that is under way goes on,
//! and its result is still taken. So a queue has to know which of the two an abort is.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

/// Shared by the control thread of a device and its queues.
pub(super) struct Leave {
    begun: AtomicBool,
    /// Per queue: requests that have arrived and are not complete.
    in_hand: Vec<AtomicUsize>,
}

impl Leave {
    pub(super) fn new(queues: usize) -> Leave {
        Leave { begun: AtomicBool::new(false), in_hand: (0..queues).map(|_| AtomicUsize::new(0)).collect() }
    }

    /// From now on an abort is no end.
    pub(super) fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// A queue says what it has in hand.
    pub(super) fn show(&self, queue: u16, requests: usize) {
        if let Some(in_hand) = self.in_hand.get(usize::from(queue)) {
            in_hand.store(requests, Ordering::Relaxed);
        }
    }

    /// Of all queues, as they have said last.
    pub(super) fn in_hand(&self) -> usize {
        self.in_hand.iter().map(|requests| requests.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_queues_have_in_hand_is_added_up() {
        let leave = Leave::new(2);
        leave.show(0, 3);
        leave.show(1, 4);
        leave.show(0, 1);
        leave.show(2, 9);
        assert_eq!(leave.in_hand(), 5);
        assert!(!leave.has_begun());
        leave.begin();
        assert!(leave.has_begun());
    }
}
