//! The sync engine as a scrub: the same region of several targets is compared while no write of it is in flight, and put right if
//! that was asked for and it is known who is right.
//!
//! What holds: a region is judged from what all of them said under one window, and put right under the same one. It is put right when
//! all of them say the same afterwards. One that cannot be written to is left, and until then nobody else writes there: the window
//! stays open, because what was sent may still land ([`CopyError::Repair`]).

use super::{Content, Copy, CopyError, Slot, Task};
use crate::bugs::{Bug, planted};
use crate::engine::overlap::Hold;
use crate::engine::region::RegionState;
use crate::engine::request::RequestOp;
use crate::engine::scrub::{Finding, Said, Verdict};
use crate::errno::Errno;

/// What is known of a region that is being compared.
#[derive(Clone, Debug, Default)]
pub(super) struct Case {
    /// What each of them says, in their order.
    said: Vec<Said>,
    /// What is wrong, once that is known; then it is being put right.
    finding: Option<Finding>,
    /// Whom it is put right from.
    good: usize,
    /// Who is to be put right.
    bad: Vec<usize>,
    /// The one that is right holds nothing but zeros.
    zeros: bool,
}

/// Whether an error says nothing about what is on the disk: the connection, or who may use it.
fn is_of_the_way(error: Errno) -> bool {
    matches!(error, Errno::ETIMEDOUT | Errno::EBADE | Errno::EILSEQ | Errno::ECANCELED)
}

impl Copy {
    fn member(&self, place: usize) -> usize {
        match &self.config.task {
            Task::Scrub(scrub) => scrub.members[place].0,
            Task::Copy { .. } | Task::Verify => self.config.source,
        }
    }

    /// How many are asked.
    fn members(&self) -> usize {
        match &self.config.task {
            Task::Scrub(scrub) if planted(Bug::ScrubMissesThird) => scrub.members.len().min(2),
            Task::Scrub(scrub) => scrub.members.len(),
            Task::Copy { .. } | Task::Verify => 0,
        }
    }

    /// What [`Bug::ScrubSkipsLast`] does.
    pub(super) fn skips_last(&self) -> bool {
        planted(Bug::ScrubSkipsLast) && matches!(self.config.task, Task::Scrub(_))
    }

    /// A region is taken: all of them are asked, one after the other.
    pub(super) fn first_question(&mut self, slot: usize, region: usize) -> Slot {
        self.cases[slot] = Case::default();
        Slot::Comparing(region, 0)
    }

    /// What a slot asks for: the operation, the region, the target.
    pub(super) fn scrub_request(&self, slot: usize) -> (RequestOp, Option<usize>, usize) {
        let case = &self.cases[slot];
        match self.slots[slot] {
            Slot::Fetching(region) => (RequestOp::Read, Some(region), self.member(case.good)),
            Slot::Mending(region, place) if case.zeros => (RequestOp::Discard, Some(region), self.member(place)),
            Slot::Mending(region, place) => (RequestOp::Write { fua: false }, Some(region), self.member(place)),
            Slot::Comparing(region, place) => (RequestOp::Digest, Some(region), self.member(place)),
            Slot::Sealing(place) => (RequestOp::Flush, None, self.member(place)),
            _ => (RequestOp::Flush, None, self.config.target),
        }
    }

    /// What became of it.
    pub(super) fn scrubbed(&mut self, slot: usize, was: Slot, result: Result<(), Errno>, content: Content) {
        match (was, result) {
            (Slot::Comparing(region, place), result) => self.said(slot, (region, place), result, content),
            (Slot::Fetching(region), Ok(())) if self.failed.is_none() => {
                self.cases[slot].zeros = content == Content::Zeros;
                if planted(Bug::RepairClosesEarly) {
                    self.close(region, RegionState::Done);
                }
                self.mend(slot, region);
            }
            (Slot::Fetching(region), result) => {
                let error = result.err().map_or(CopyError::Stopped, CopyError::Target);
                self.fail(region, RegionState::Todo, error);
            }
            (Slot::Mending(region, place), Ok(())) => {
                if !self.unsealed.contains(&place) {
                    self.unsealed.push(place);
                }
                self.mend(slot, region);
            }
            (Slot::Mending(region, place), Err(error)) => {
                self.failed.get_or_insert(CopyError::Repair(self.member(place), error));
                self.note_unproven(slot);
                // The window stays: what was sent may land as long as the target is used.
                self.wakes |= self.overlap.release(self.map.extent(region), Hold::Shared);
            }
            (Slot::Sealing(place), Ok(())) => self.unsealed.retain(|other| *other != place),
            (Slot::Sealing(place), Err(error)) => {
                self.failed.get_or_insert(CopyError::Repair(self.member(place), error));
            }
            _ => debug_assert!(false, "an answer to nothing"),
        }
    }

    /// One of them has said what it holds.
    fn said(&mut self, slot: usize, (region, place): (usize, usize), result: Result<(), Errno>, content: Content) {
        let said = match (result, content) {
            (Ok(()), Content::Digest(digest)) => Ok(digest),
            (Ok(()), _) => return self.not_said(slot, region, Errno::EPROTO),
            (Err(error), _) if is_of_the_way(error) => return self.not_said(slot, region, error),
            (Err(error), _) => Err(error),
        };
        if self.failed.is_some() {
            let state = if self.note_unproven(slot) { RegionState::Done } else { RegionState::Todo };
            return self.close(region, state);
        }
        self.cases[slot].said.push(said);
        match place + 1 {
            next if next < self.members() => self.go_on(slot, Slot::Comparing(region, next)),
            _ => self.judge(slot, region),
        }
    }

    /// Nothing is known of a region this time.
    fn not_said(&mut self, slot: usize, region: usize, error: Errno) {
        let state = if self.note_unproven(slot) { RegionState::Done } else { RegionState::Todo };
        self.fail(region, state, CopyError::Target(error));
    }

    /// Something was written to put a region right, and nobody knows whether it is.
    pub(super) fn note_unproven(&mut self, slot: usize) -> bool {
        let finding = self.cases[slot].finding.take();
        if let (Task::Scrub(scrub), Some(finding)) = (&self.config.task, &finding) {
            scrub.tally.note(finding.clone());
        }
        finding.is_some()
    }

    /// All of them have said it.
    fn judge(&mut self, slot: usize, region: usize) {
        let Task::Scrub(scrub) = &self.config.task else { return };
        let extent = self.map.extent(region);
        let case = &mut self.cases[slot];
        let verdict = scrub.judge(&case.said);
        match (case.finding.take(), verdict) {
            (None, Verdict::Alike) => {}
            (None, Verdict::Wrong { wrong, at_fault, good }) => {
                let volumes = at_fault.iter().map(|place| scrub.members[*place].1).collect();
                let finding = Finding { extent, wrong, at_fault: volumes, repaired: false };
                if let Some(good) = good {
                    *case = Case { finding: Some(finding), good, bad: at_fault, ..Case::default() };
                    return self.go_on(slot, Slot::Fetching(region));
                }
                scrub.tally.note(finding);
            }
            (Some(finding), verdict) => {
                scrub.tally.note(Finding { repaired: verdict == Verdict::Alike, ..finding });
            }
        }
        self.copied += 1;
        if !planted(Bug::RepairClosesEarly) || self.map.state(region) == RegionState::Window {
            self.close(region, RegionState::Done);
        }
    }

    /// The next one is put right; when all are they are asked again.
    fn mend(&mut self, slot: usize, region: usize) {
        match self.cases[slot].bad.pop() {
            Some(place) => self.go_on(slot, Slot::Mending(region, place)),
            None => self.go_on(slot, Slot::Comparing(region, 0)),
        }
    }

    /// Whether a slot makes durable what was put right.
    pub(super) fn is_sealing(&self, slot: usize) -> bool {
        matches!(self.slots[slot], Slot::Sealing(_)) && !planted(Bug::SealAwaited)
    }

    /// Everything was compared: what was put right is made durable.
    pub(super) fn seal(&mut self, slot: usize) {
        match self.unsealed.first() {
            Some(place) => {
                self.slots[slot] = Slot::Sealing(*place);
                self.ready.push(slot);
            }
            None => self.done = true,
        }
    }
}
