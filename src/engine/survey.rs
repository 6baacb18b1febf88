//! What the region logs of a node's targets say together: the regions in which any two of them could differ.
//!
//! What holds (the contract, 5.1 and 7.3): of two targets that have been in sync, whatever one has and the other has not is
//! marked on one of them, because a mark comes before its change and goes only when both have it. So the logs of those in
//! sync and of the one that lacks something are asked, its own too. A log that cannot be had counts as marked, all of it.

use crate::units::SECTOR_BYTES;
use crate::wire::volume::RegionPage;

/// Marked regions of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    all: bool,
    runs: Vec<(u64, u64)>,
}

impl Marked {
    /// Every region.
    pub fn all() -> Marked {
        Marked { all: true, runs: Vec::new() }
    }

    /// Whether it is every region.
    pub fn is_all(&self) -> bool {
        self.all
    }

    /// These runs, too: the first region of each, and how many.
    pub fn add(&mut self, runs: &[(u64, u64)]) {
        self.runs.extend(runs);
    }

    /// What another log has, too.
    pub fn join(&mut self, other: &Marked) {
        self.all |= other.all;
        self.add(&other.runs);
    }

    /// A page of a log. Where to go on, if there is more.
    pub fn add_page(&mut self, page: &RegionPage, region_sectors: u64) -> Option<u64> {
        let last = page.marked.last().and_then(|(first, count)| first.checked_add(*count)?.checked_sub(1));
        if page.region_bytes != region_sectors * SECTOR_BYTES || (page.more && last.is_none()) {
            // It is cut otherwise, or makes no sense.
            self.all = true;
            return None;
        }
        self.add(&page.marked);
        last.filter(|_| page.more)
    }

    /// The runs of a node with so many regions, in any order.
    pub fn runs(&self, regions: u64) -> Vec<(u64, u64)> {
        if self.all { vec![(0, regions)] } else { self.runs.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(marked: &[(u64, u64)], more: bool) -> RegionPage {
        RegionPage { marked: marked.to_vec(), more, region_bytes: 4096 }
    }

    #[test]
    fn logs_are_joined_page_by_page() {
        let mut marked = Marked::default();
        assert_eq!(marked.add_page(&page(&[(1, 2), (7, 3)], true), 8), Some(9));
        assert_eq!(marked.add_page(&page(&[(10, 1)], false), 8), None);
        let mut other = Marked::default();
        other.add(&[(4, 1)]);
        marked.join(&other);
        assert_eq!(marked.runs(20), [(1, 2), (7, 3), (10, 1), (4, 1)]);
        marked.join(&Marked::all());
        assert_eq!(marked.runs(20), [(0, 20)]);
    }

    #[test]
    fn a_log_that_makes_no_sense_marks_everything() {
        for (page, region_sectors) in
            [(page(&[(1, 1)], false), 16), (page(&[], true), 8), (page(&[(u64::MAX, 9)], true), 8)]
        {
            let mut marked = Marked::default();
            assert_eq!(marked.add_page(&page, region_sectors), None);
            assert!(marked.is_all(), "{page:?}");
        }
    }
}
