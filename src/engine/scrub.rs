//! What a scrub compares, and what it finds: shared by the sync engine that looks and by whoever wants to see meanwhile.
//!
//! Without stored checksums two replicas cannot say which of them lies (the contract, 8.5). What differs is put right only by the word of
//! somebody who knows: the operator, who names a replica, or two of three that agree.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Extent, Id};

/// What is to be done about a region that differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// It is told.
    #[default]
    No,
    /// What most replicas hold is written to the others.
    Majority,
    /// What the replica with this volume holds is written to the others.
    From(Id),
}

/// The comparison of a node's replicas.
#[derive(Clone, Debug)]
pub struct Scrub {
    /// Which targets, at least two, each with the id of its volume.
    pub members: Vec<(usize, Id)>,
    /// What is to be done about what differs.
    pub repair: Repair,
    /// What was found.
    pub tally: Arc<Tally>,
}

/// What is wrong with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The replicas differ.
    Different,
    /// Some of them cannot be read there.
    Unreadable(Errno),
}

/// Neighbouring regions with which the same is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where, on the node.
    pub extent: Extent,
    /// What.
    pub wrong: Wrong,
    /// The replicas that are at fault, by their volumes, as far as that can be told.
    pub at_fault: Vec<Id>,
    /// They hold the same now.
    pub repaired: bool,
}

/// What was found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Regions in which replicas differed.
    pub different: u64,
    /// Regions that some replica could not read.
    pub unreadable: u64,
    /// Of both, those that are the same now.
    pub repaired: u64,
    /// Where, from the lowest on: the first ones that were found.
    pub list: Vec<Finding>,
    /// There was more than the list has.
    pub more: bool,
}

/// See [`Findings`].
#[derive(Debug, Default)]
pub struct Tally(Mutex<Findings>);

impl Tally {
    fn lock(&self) -> MutexGuard<'_, Findings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found so far.
    pub fn findings(&self) -> Findings {
        self.lock().clone()
    }

    /// A region is not as it should be, or was not.
    pub(crate) fn note(&self, finding: Finding) {
        let mut found = self.lock();
        match finding.wrong {
            Wrong::Different => found.different += 1,
            Wrong::Unreadable(_) => found.unreadable += 1,
        }
        found.repaired += u64::from(finding.repaired);
        let same = |other: &Finding| {
            (other.wrong, other.repaired) == (finding.wrong, finding.repaired) && other.at_fault == finding.at_fault
        };
        let place = found.list.partition_point(|other| other.extent.start < finding.extent.start);
        if let Some(before) = place.checked_sub(1).map(|before| &mut found.list[before])
            && before.extent.end() == finding.extent.start
            && same(before)
        {
            before.extent.sectors += finding.extent.sectors;
        } else if let Some(after) = found.list.get_mut(place)
            && finding.extent.end() == after.extent.start
            && same(after)
        {
            after.extent = Extent { sectors: after.extent.sectors + finding.extent.sectors, ..finding.extent };
        } else if found.list.len() < limits::SCRUB_FINDINGS_MAX {
            found.list.insert(place, finding);
        } else {
            found.more = true;
        }
    }
}

/// What one replica says of a region: its digest, or why it cannot be read.
pub(crate) type Said = Result<[u8; 32], Errno>;

/// What follows from what all replicas say of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All hold the same.
    Alike,
    /// They do not. The replicas at fault, as far as that can be told, by their places; and the one to put them right from.
    Wrong { wrong: Wrong, at_fault: Vec<usize>, good: Option<usize> },
}

impl Scrub {
    /// The verdict on a region.
    pub(crate) fn judge(&self, said: &[Said]) -> Verdict {
        let unreadable = said.iter().find_map(|said| said.err());
        if unreadable.is_none() && said.windows(2).all(|pair| pair[0] == pair[1]) {
            return Verdict::Alike;
        }
        let agree = |place: &usize| said.iter().filter(|other| **other == said[*place]).count();
        let most = (0..said.len()).find(|place| said[*place].is_ok() && agree(place) * 2 > said.len());
        let named = |id: Id| self.members.iter().position(|(_, volume)| *volume == id);
        let good = match self.repair {
            Repair::No => None,
            Repair::Majority => most,
            Repair::From(id) => named(id),
        };
        let good = good.filter(|place| said.get(*place).is_some_and(Result::is_ok));
        let good = if planted(Bug::RepairFromWrong) { good.map(|place| (place + 1) % said.len()) } else { good };
        let at_fault = match good.or(most) {
            Some(right) => (0..said.len()).filter(|place| said[*place] != said[right]).collect(),
            None => (0..said.len()).filter(|place| said[*place].is_err()).collect(),
        };
        Verdict::Wrong { wrong: unreadable.map_or(Wrong::Different, Wrong::Unreadable), at_fault, good }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(start: u64, at_fault: &[u8]) -> Finding {
        let at_fault = at_fault.iter().map(|id| Id([*id; 16])).collect();
        Finding { extent: Extent::new(start, 8), wrong: Wrong::Different, at_fault, repaired: false }
    }

    #[test]
    fn neighbours_with_the_same_fault_are_one_finding() {
        let tally = Tally::default();
        for (start, at_fault) in [(16, 1), (0, 1), (8, 1), (24, 2), (40, 2), (64, 1), (56, 1)] {
            tally.note(finding(start, &[at_fault]));
        }
        tally.note(Finding { repaired: true, ..finding(32, &[2]) });
        let found = tally.findings();
        let list: Vec<(u64, u64)> =
            found.list.iter().map(|finding| (finding.extent.start.0, finding.extent.sectors)).collect();
        assert_eq!(list, [(0, 16), (16, 8), (24, 8), (32, 8), (40, 8), (56, 16)], "{found:?}");
        assert_eq!((found.different, found.repaired, found.more), (8, 1, false));
    }

    #[test]
    fn the_list_is_bounded_and_the_counts_are_not() {
        let tally = Tally::default();
        let most = limits::SCRUB_FINDINGS_MAX as u64;
        (0..most + 3).for_each(|at| tally.note(finding(at * 16, &[])));
        let found = tally.findings();
        assert_eq!((found.different, found.list.len() as u64, found.more), (most + 3, most, true));
    }

    #[test]
    fn nobody_is_at_fault_unless_it_is_known_who() {
        let (a, b, c) = (Ok([1; 32]), Ok([2; 32]), Ok([3; 32]));
        let bad: Said = Err(Errno::EIO);
        let id = |at: usize| Id([u8::try_from(at).unwrap(); 16]);
        let different = Wrong::Different;
        let unreadable = Wrong::Unreadable(Errno::EIO);
        for (said, repair, wrong, at_fault, good) in [
            (&[a, b][..], Repair::No, different, vec![], None),
            (&[a, b], Repair::Majority, different, vec![], None),
            (&[a, b], Repair::From(id(1)), different, vec![0], Some(1)),
            (&[a, bad], Repair::No, unreadable, vec![1], None),
            (&[a, bad], Repair::From(id(1)), unreadable, vec![1], None),
            (&[a, bad], Repair::From(id(0)), unreadable, vec![1], Some(0)),
            (&[a, b, a], Repair::No, different, vec![1], None),
            (&[a, b, b], Repair::Majority, different, vec![0], Some(1)),
            (&[a, b, b], Repair::From(id(0)), different, vec![1, 2], Some(0)),
            (&[a, b, c], Repair::Majority, different, vec![], None),
            (&[a, a, bad], Repair::Majority, unreadable, vec![2], Some(0)),
            (&[a, b, bad], Repair::Majority, unreadable, vec![2], None),
            (&[a, bad, bad], Repair::Majority, unreadable, vec![1, 2], None),
        ] {
            let members = (0..said.len()).map(|at| (at, id(at))).collect();
            let scrub = Scrub { members, repair, tally: Arc::default() };
            assert_eq!(scrub.judge(said), Verdict::Wrong { wrong, at_fault, good }, "{said:?} {repair:?}");
        }
        let scrub = Scrub { members: vec![(0, id(0)), (1, id(1))], repair: Repair::No, tally: Arc::default() };
        assert_eq!(scrub.judge(&[a, a]), Verdict::Alike);
    }
}
