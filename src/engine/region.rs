//! How far the copying of one target is, region by region, for all shards and the sync engine.
//!
//! The rule (the contract, 5.1): a write to a region that is still to be copied goes to the in-sync targets alone; to one that is
//! being copied it waits; to one that is copied it goes to the syncing target too. A shard looks after it has taken the write's
//! range in the overlap table, and the sync engine opens a window before it takes the region there, so that each sees the other.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::bugs::{Bug, planted};
use crate::engine::survey::Marked;
use crate::units::Extent;

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RegionState {
    /// Still to be copied.
    Todo = 0,
    /// Being copied: writes wait.
    Window = 1,
    /// The same on both.
    Done = 2,
}

/// See the module's description.
#[derive(Debug)]
pub struct SyncMap {
    /// Regions that were compared.
    verified: AtomicU64,
    /// Sectors of the node.
    sectors: u64,
    region_sectors: u64,
    states: Box<[AtomicU8]>,
    left: AtomicU64,
    /// What the region logs have marked is in it.
    surveyed: AtomicBool,
    /// Everything below this region is copied and flushed.
    kept: AtomicU64,
}

impl SyncMap {
    /// A map with everything still to be copied.
    pub fn new(sectors: u64, region_sectors: u64) -> SyncMap {
        let count = sectors.div_ceil(region_sectors);
        let states = (0..count).map(|_| AtomicU8::new(RegionState::Todo as u8)).collect();
        SyncMap {
            verified: AtomicU64::new(0),
            sectors,
            region_sectors,
            states,
            left: AtomicU64::new(count),
            surveyed: AtomicBool::new(true),
            kept: AtomicU64::new(0),
        }
    }

    /// A map of a target that has everything below a sector, but for what the region logs have marked: they are to be asked
    /// ([`SyncMap::mark`]) when every shard writes the target. What is written before that is told by them.
    pub fn copied_below(below: u64, sectors: u64, region_sectors: u64) -> SyncMap {
        let map = SyncMap::new(sectors, region_sectors);
        let whole = if below >= sectors { map.regions() as u64 } else { below / region_sectors };
        for region in 0..usize::try_from(whole).unwrap_or(usize::MAX) {
            map.set(region, RegionState::Done);
        }
        map.surveyed.store(whole == 0, Ordering::SeqCst);
        map
    }

    /// Up to which sector everything is copied and durable on the target, whatever happens to it.
    pub fn kept(&self) -> u64 {
        (self.kept.load(Ordering::SeqCst) * self.region_sectors).min(self.sectors)
    }

    /// Everything below this region is copied and flushed.
    pub(crate) fn keep(&self, below: usize) {
        self.kept.fetch_max(below as u64, Ordering::SeqCst);
    }

    /// Whether the region logs are still to be asked.
    pub fn needs_survey(&self) -> bool {
        !self.surveyed.load(Ordering::SeqCst)
    }

    /// What the region logs have marked is still to be copied.
    pub fn mark(&self, marked: &Marked) {
        let end = self.regions() as u64;
        let ends = usize::from(planted(Bug::SurveySkipsLast));
        for (first, count) in marked.runs(end) {
            for region in (first..first.saturating_add(count).min(end)).rev().skip(ends) {
                self.set(usize::try_from(region).unwrap_or(usize::MAX), RegionState::Todo);
            }
        }
        self.surveyed.store(true, Ordering::SeqCst);
    }

    /// A map with everything copied.
    pub fn complete(sectors: u64, region_sectors: u64) -> SyncMap {
        let map = SyncMap::new(sectors, region_sectors);
        (0..map.regions()).for_each(|region| map.set(region, RegionState::Done));
        map
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.states.len()
    }

    /// How many regions are not copied yet.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// How many regions were compared, for people.
    pub fn verified(&self) -> u64 {
        self.verified.load(Ordering::Relaxed)
    }

    /// So many regions were compared.
    pub(crate) fn set_verified(&self, regions: u64) {
        self.verified.store(regions, Ordering::Relaxed);
    }

    /// Sectors of a region; the last one may have fewer.
    pub fn region_sectors(&self) -> u64 {
        self.region_sectors
    }

    /// The extent of a region on the node.
    pub fn extent(&self, region: usize) -> Extent {
        let start = region as u64 * self.region_sectors;
        Extent::new(start, self.region_sectors.min(self.sectors - start))
    }

    /// Where a region is.
    pub fn state(&self, region: usize) -> RegionState {
        match self.states[region].load(Ordering::SeqCst) {
            0 => RegionState::Todo,
            1 => RegionState::Window,
            _ => RegionState::Done,
        }
    }

    /// Where the region of an extent is, which lies in one.
    pub fn state_of(&self, extent: Extent) -> RegionState {
        self.state(usize::try_from(extent.start.0 / self.region_sectors).unwrap_or(usize::MAX))
    }

    /// Sectors from the start of an extent to the end of its region.
    pub fn room(&self, extent: Extent) -> u64 {
        self.region_sectors - extent.start.0 % self.region_sectors
    }

    /// Moves a region on or back. One caller: the sync engine, or whoever prepares the map for it.
    pub fn set(&self, region: usize, state: RegionState) {
        let old = self.states[region].swap(state as u8, Ordering::SeqCst);
        match (old == RegionState::Done as u8, state == RegionState::Done) {
            (false, true) => self.left.fetch_sub(1, Ordering::SeqCst),
            (true, false) => self.left.fetch_add(1, Ordering::SeqCst),
            _ => 0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_cover_the_node() {
        let map = SyncMap::new(100, 16);
        assert_eq!((map.regions(), map.left()), (7, 7));
        assert_eq!(map.extent(6), Extent::new(96, 4));
        assert_eq!(map.room(Extent::new(17, 3)), 15);
        map.set(1, RegionState::Window);
        assert_eq!((map.state_of(Extent::new(17, 3)), map.left()), (RegionState::Window, 7));
        map.set(1, RegionState::Done);
        map.set(1, RegionState::Done);
        assert_eq!((map.state(1), map.left()), (RegionState::Done, 6));
        map.set(1, RegionState::Todo);
        assert_eq!(map.left(), 7);
    }

    #[test]
    fn what_was_copied_is_not_copied_again_but_for_what_is_marked() {
        let todo = |map: &SyncMap| {
            (0..map.regions()).filter(|region| map.state(*region) == RegionState::Todo).collect::<Vec<_>>()
        };
        // Up to the middle of a region: all of that one again.
        let map = SyncMap::copied_below(40, 100, 16);
        assert!(map.needs_survey());
        assert_eq!(todo(&map), [2, 3, 4, 5, 6]);
        let mut marked = Marked::default();
        marked.add(&[(1, 1), (4, 90)]);
        map.mark(&marked);
        assert!(!map.needs_survey());
        assert_eq!((todo(&map), map.left()), (vec![1, 2, 3, 4, 5, 6], 6));
        let map = SyncMap::copied_below(100, 100, 16);
        assert!(todo(&map).is_empty());
        map.mark(&Marked::all());
        assert_eq!(todo(&map).len(), 7);
        assert!(!SyncMap::copied_below(15, 100, 16).needs_survey());
    }
}
