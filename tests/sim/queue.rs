//! Virtual time: events in the order of their moments, and of their making where moments are equal.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

struct Item<E> {
    at: u64,
    order: u64,
    event: E,
}

impl<E> PartialEq for Item<E> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<E> Eq for Item<E> {}

impl<E> PartialOrd for Item<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Item<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// The events to come.
pub(crate) struct Queue<E> {
    heap: BinaryHeap<Item<E>>,
    made: u64,
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Queue<E> {
        Queue { heap: BinaryHeap::with_capacity(256), made: 0 }
    }

    /// `event` happens at `at`.
    pub(crate) fn push(&mut self, at: u64, event: E) {
        self.made += 1;
        self.heap.push(Item { at, order: self.made, event });
    }

    /// The next event and its moment.
    pub(crate) fn pop(&mut self) -> Option<(u64, E)> {
        self.heap.pop().map(|item| (item.at, item.event))
    }
}
