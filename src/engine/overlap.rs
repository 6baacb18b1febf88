//! What is in flight on a node that has several targets, for all shards: no write overlaps another write or a read.
//!
//! Without it two writes from two queues reach two replicas in opposite order, and the replicas differ for ever with no fault at
//! all (the contract, 1.1); and a read could show what a crash then takes back (12.3).
//!
//! A fixed table of atomics, one for each 4 KiB granule modulo the table's reach. Taking is all or nothing and never waits, so
//! there is no deadlock; who could not take is woken by who releases. A granule far away may share a slot: then one request
//! waits for another in vain, which costs time and never truth. Who releases could always be the first to take again; a shard
//! that has waited for long is therefore favoured: until it has what it wants the others take nothing. Several that have waited for
//! long come in turn, by number, so that none is favoured twice before each of the others.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::bugs::{Bug, planted};
use crate::engine::points::Points;
use crate::units::Extent;

/// Sectors of a granule.
const GRANULE_SECTORS: u64 = 8;
/// Slots of a table: neighbours within 64 MiB never share one.
const SLOTS: usize = 1 << 14;
/// A slot that is taken for writing. Any other number counts readers.
const WRITER: u32 = u32::MAX;

/// What a table reaches, sectors. A range must not cross a multiple of it: it could fall on the same slot twice.
pub const REACH_SECTORS: u64 = SLOTS as u64 * GRANULE_SECTORS;

/// How a range is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Together with other readers.
    Shared,
    /// Alone.
    Exclusive,
}

/// Shards to be woken, one bit each.
pub type Shards = u32;

/// See the module's description.
#[derive(Debug)]
pub struct Overlap {
    slots: Box<[AtomicU32]>,
    /// Shards that could not take what they wanted since somebody released last.
    waiting: AtomicU32,
    /// A [`Turn`]. One word, so that the turn never goes to a shard that has just given it up.
    turn: AtomicU64,
    /// Up to where the targets are surely the same.
    pub points: Points,
}

/// Who goes first, and who wants to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turn {
    /// The shard that goes first, one more than its number; 0: none.
    first: u32,
    /// Those that have waited for long, too.
    others: Shards,
}

impl Turn {
    fn of(word: u64) -> Turn {
        let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or_default();
        Turn { first: half(word >> 32), others: half(word) }
    }

    fn word(self) -> u64 {
        u64::from(self.first) << 32 | u64::from(self.others)
    }

    fn wanted_by(self, shard: usize) -> Turn {
        match self.first {
            0 => Turn { first: number(shard), ..self },
            first if first == number(shard) => self,
            _ => Turn { others: self.others | 1 << shard, ..self },
        }
    }

    fn left_by(self, shard: usize) -> Turn {
        let others = self.others & !(1 << shard);
        if self.first != number(shard) {
            return Turn { others, ..self };
        }
        // The next one above it, else from the beginning.
        let above = others & !(u32::MAX >> (31 - shard));
        let next = if above == 0 { others } else { above }.trailing_zeros();
        if next == 32 {
            return Turn { first: 0, others: 0 };
        }
        Turn { first: next + 1, others: others & !(1 << next) }
    }
}

impl Default for Overlap {
    fn default() -> Overlap {
        Overlap {
            slots: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            waiting: AtomicU32::new(0),
            turn: AtomicU64::new(0),
            points: Points::default(),
        }
    }
}

fn number(shard: usize) -> u32 {
    u32::try_from(shard + 1).unwrap_or(u32::MAX)
}

/// The slot of a granule: neighbours have neighbouring slots, and ranges at equal distances do not all fall on the same ones.
fn slot(granule: u64) -> usize {
    let turn = (granule / SLOTS as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    usize::try_from((granule + turn) % SLOTS as u64).unwrap_or(0)
}

fn granules(extent: Extent) -> std::ops::Range<u64> {
    debug_assert!(extent.sectors > 0 && extent.start.0 / REACH_SECTORS == (extent.end().0 - 1) / REACH_SECTORS);
    extent.start.0 / GRANULE_SECTORS..extent.end().0.div_ceil(GRANULE_SECTORS)
}

/// Whether two ranges exclude each other when one of them is a write.
pub fn conflict(a: Extent, b: Extent) -> bool {
    let (a, b) = (granules(a), granules(b));
    a.start < b.end && b.start < a.end
}

impl Overlap {
    /// Takes a range for shard `shard`. False when somebody else has a part of it: the shard will be among those to be woken.
    pub fn take(&self, shard: usize, extent: Extent, hold: Hold) -> bool {
        if planted(Bug::OverlapIgnored) || self.try_take(extent, hold) {
            return true;
        }
        self.wait(shard);
        // Whoever released in between may not have seen this shard waiting.
        self.try_take(extent, hold)
    }

    fn try_take(&self, extent: Extent, hold: Hold) -> bool {
        let range = granules(extent);
        for granule in range.clone() {
            if !self.take_slot(slot(granule), hold) {
                for taken in range.start..granule {
                    self.release_slot(slot(taken), hold);
                }
                return false;
            }
        }
        true
    }

    fn take_slot(&self, slot: usize, hold: Hold) -> bool {
        let slot = &self.slots[slot];
        match hold {
            Hold::Exclusive => slot.compare_exchange(0, WRITER, Ordering::SeqCst, Ordering::SeqCst).is_ok(),
            Hold::Shared => slot
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| (count < WRITER - 1).then(|| count + 1))
                .is_ok(),
        }
    }

    fn release_slot(&self, slot: usize, hold: Hold) {
        let slot = &self.slots[slot];
        match hold {
            Hold::Exclusive => slot.store(0, Ordering::SeqCst),
            Hold::Shared => {
                slot.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// The shard wants to be woken at the next release, whatever it waits for.
    pub fn wait(&self, shard: usize) {
        self.waiting.fetch_or(1 << shard, Ordering::SeqCst);
    }

    /// The shard has waited for long: it goes first from now on, or in its turn.
    pub fn favour(&self, shard: usize) {
        self.change_turn(|turn| turn.wanted_by(shard));
    }

    /// The shard has what it wanted, or does not want it any more. The shards to be woken.
    pub fn unfavour(&self, shard: usize) -> Shards {
        let was = self.change_turn(|turn| turn.left_by(shard));
        if was.first == number(shard) { self.waiting() } else { 0 }
    }

    /// What it was before.
    fn change_turn(&self, change: impl Fn(Turn) -> Turn) -> Turn {
        let change = |word| Some(change(Turn::of(word)).word());
        let was = self.turn.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        Turn::of(was.unwrap_or_else(|word| word))
    }

    /// Whether another shard goes first; then this one is woken afterwards.
    pub fn favours_other(&self, shard: usize) -> bool {
        let other = || {
            let first = Turn::of(self.turn.load(Ordering::SeqCst)).first;
            first != 0 && first != number(shard)
        };
        if !other() {
            return false;
        }
        self.wait(shard);
        other()
    }

    /// Who waits, to be woken.
    pub fn waiting(&self) -> Shards {
        if self.waiting.load(Ordering::SeqCst) == 0 { 0 } else { self.waiting.swap(0, Ordering::SeqCst) }
    }

    /// Gives a range back. The shards to be woken.
    pub fn release(&self, extent: Extent, hold: Hold) -> Shards {
        if planted(Bug::OverlapIgnored) {
            return 0;
        }
        granules(extent).for_each(|granule| self.release_slot(slot(granule), hold));
        self.waiting()
    }

    /// Whether nothing is taken.
    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.load(Ordering::SeqCst) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_write_excludes_and_reads_share() {
        let table = Overlap::default();
        let (a, b) = (Extent::new(0, 16), Extent::new(8, 8));
        assert!(table.take(0, a, Hold::Shared) && table.take(1, b, Hold::Shared));
        assert!(!table.take(2, Extent::new(15, 1), Hold::Exclusive));
        assert_eq!(table.release(a, Hold::Shared), 1 << 2);
        assert!(!table.take(2, Extent::new(15, 1), Hold::Exclusive));
        assert_eq!(table.release(b, Hold::Shared), 1 << 2);
        assert!(table.take(2, Extent::new(15, 1), Hold::Exclusive));
        assert!(!table.take(0, a, Hold::Shared) && !table.take(3, b, Hold::Exclusive));
        assert_eq!(table.release(Extent::new(15, 1), Hold::Exclusive), 1 << 0 | 1 << 3);
        assert!(table.is_idle());
    }

    #[test]
    fn who_has_waited_for_long_comes_in_turn() {
        let table = Overlap::default();
        let first = || (0..32).find(|shard| !table.favours_other(*shard));
        [2, 0, 5, 31].into_iter().for_each(|shard| table.favour(shard));
        let mut seen = Vec::new();
        for _ in 0..6 {
            let shard = first().unwrap();
            seen.push(shard);
            table.unfavour(shard);
            // It is always the quickest to want it again.
            table.favour(shard);
        }
        assert_eq!(seen, [2, 5, 31, 0, 2, 5]);
        // One that does not want it any more is passed over, and the last one leaves it to nobody.
        table.unfavour(0);
        for shard in [31, 2, 5] {
            table.unfavour(shard);
        }
        assert!((0..32).all(|shard| !table.favours_other(shard)));
    }

    #[test]
    fn what_was_not_taken_whole_is_not_taken_at_all() {
        let table = Overlap::default();
        assert!(table.take(0, Extent::new(80, 8), Hold::Exclusive));
        assert!(!table.take(1, Extent::new(0, 96), Hold::Exclusive));
        table.release(Extent::new(80, 8), Hold::Exclusive);
        assert!(table.is_idle());
    }

    proptest! {
        /// Against a list of what is taken: what overlaps is refused, and everything comes free again.
        #[test]
        fn it_excludes_what_overlaps(steps in prop::collection::vec((0u64..3000, 1u64..600, any::<bool>(), any::<bool>()), 1..80)) {
            let table = Overlap::default();
            let mut taken: Vec<(Extent, Hold)> = Vec::new();
            for (start, sectors, exclusive, give) in steps {
                if give && let Some((extent, hold)) = taken.pop() {
                    table.release(extent, hold);
                    continue;
                }
                let (extent, hold) = (Extent::new(start, sectors), if exclusive { Hold::Exclusive } else { Hold::Shared });
                let clash = |(other, held): &(Extent, Hold)| conflict(extent, *other) && (exclusive || *held == Hold::Exclusive);
                prop_assert_eq!(table.take(0, extent, hold), !taken.iter().any(clash));
                if !taken.iter().any(clash) {
                    taken.push((extent, hold));
                }
            }
            for (extent, hold) in taken {
                table.release(extent, hold);
            }
            prop_assert!(table.is_idle());
        }
    }
}
