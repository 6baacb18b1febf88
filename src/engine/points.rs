//! Up to where the targets of a node are surely the same, so that their servers may clean their region logs.
//!
//! A server answers each flush with a point of its own, and may be told with a later one that everything it had carried out at
//! that point is complete and flushed on every target (`docs/PROTOCOL.md`). Whoever begins a flush moves this on, in three steps:
//!
//! ```text
//! Idle --the last points are noted--> Draining --what was in flight then has ended--> Covering --all of it is flushed--> may be told
//! ```
//!
//! What holds (the contract, 7.2 and 7.3): a point is told only if all targets of the node were in sync, had lost nothing and no
//! write had failed on some of them, from before it was noted until it was proven. Once proven it stays true.
//!
//! What is in flight is counted by each shard in one of two counters, which of them says the turn; a new turn begins with each
//! note, so that a counter that is zero says that all of an older turn has ended. Nobody ever waits here.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::bugs::{Bug, planted};
use crate::engine::shared::{FlushMark, Shared};
use crate::limits;

/// Changes in flight of one shard, by the parity of their turn. One writer; a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Flying([AtomicU64; 2]);

/// What is being proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Idle,
    Draining { parity: usize },
    Covering,
}

/// The last points of all targets at one moment, and the permission under which they were noted.
#[derive(Debug)]
struct Note {
    step: Step,
    points: [u64; limits::TARGETS_PER_NODE_MAX],
    permit: u64,
    /// Covering: what each target had acknowledged when all that was in flight had ended.
    marks: [FlushMark; limits::TARGETS_PER_NODE_MAX],
}

/// A target and its place in its node.
type Placed = (usize, usize);

/// See the module's description.
#[derive(Debug)]
pub struct Points {
    /// Odd while all targets of the node are in sync; grows with each change.
    permit: AtomicU64,
    /// A write has failed on some targets, and no view will settle it.
    spoiled: AtomicBool,
    turn: AtomicU64,
    flying: [Flying; limits::SHARDS_MAX],
    /// What each target, by its place in its node, has told last, and what it may be told.
    last: [AtomicU64; limits::TARGETS_PER_NODE_MAX],
    proven: [AtomicU64; limits::TARGETS_PER_NODE_MAX],
    /// Taken by nobody for longer than a look; who finds it taken goes on without.
    note: Mutex<Note>,
}

impl Default for Points {
    fn default() -> Points {
        Points {
            permit: AtomicU64::new(0),
            spoiled: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            flying: std::array::from_fn(|_| Flying::default()),
            last: std::array::from_fn(|_| AtomicU64::new(0)),
            proven: std::array::from_fn(|_| AtomicU64::new(0)),
            note: Mutex::new(Note {
                step: Step::Idle,
                points: [0; limits::TARGETS_PER_NODE_MAX],
                permit: 0,
                marks: [[0; limits::SHARDS_MAX]; limits::TARGETS_PER_NODE_MAX],
            }),
        }
    }
}

impl Points {
    /// Whether points may be proven: every shard works from a view in which all targets of the node are in sync.
    pub fn permit(&self, allowed: bool) {
        let now = self.permit.load(Ordering::SeqCst);
        if (now % 2 == 1) != allowed {
            self.permit.store(now + 1, Ordering::SeqCst);
        }
    }

    /// A write has ended on some targets and not on others, for ever.
    pub(crate) fn spoil(&self) {
        self.spoiled.store(true, Ordering::SeqCst);
    }

    /// A change of shard `shard` is about to be sent. What [`Points::end`] is to be given.
    pub(crate) fn begin(&self, shard: usize) -> usize {
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            let parity = usize::from(turn % 2 == 1);
            self.flying[shard].0[parity].fetch_add(1, Ordering::SeqCst);
            // Else whoever began the next turn meanwhile may not have seen it.
            if self.turn.load(Ordering::SeqCst) == turn {
                return parity;
            }
            self.end(shard, parity);
        }
    }

    /// It has ended on every target, or a view has settled where it has not.
    pub(crate) fn end(&self, shard: usize, parity: usize) {
        self.flying[shard].0[parity].fetch_sub(1, Ordering::SeqCst);
    }

    /// A target has answered a flush.
    pub(crate) fn told(&self, place: usize, point: u64) {
        if let Some(last) = self.last.get(place) {
            last.store(point, Ordering::SeqCst);
        }
    }

    /// Another volume is in this place: what the former one has said is nothing to it.
    pub(crate) fn renew(&self, place: usize) {
        for points in [&self.last, &self.proven] {
            if let Some(point) = points.get(place) {
                point.store(0, Ordering::SeqCst);
            }
        }
    }

    /// What a target may be told now; 0: nothing.
    pub(crate) fn to_tell(&self, place: usize) -> u64 {
        if planted(Bug::PointToldEarly) {
            return self.last.get(place).map_or(0, |last| last.load(Ordering::SeqCst));
        }
        // It would still be true; but while one lacks something its siblings keep what they have.
        if !self.may(self.permit.load(Ordering::SeqCst)) {
            return 0;
        }
        self.proven.get(place).map_or(0, |proven| proven.load(Ordering::SeqCst))
    }

    /// Moves the proof on. `targets`: those in sync, each with its place and its number.
    pub(crate) fn look(&self, shared: &Shared, targets: impl Iterator<Item = Placed> + Clone) {
        let Ok(mut note) = self.note.try_lock() else { return };
        // Through all steps once, and on to the next note; where nothing is in flight, that one too could be proven for ever.
        for _ in 0..5 {
            let next = match note.step {
                Step::Idle => self.begin_note(&mut note),
                _ if !self.may(note.permit) => Some(Step::Idle),
                Step::Draining { parity } => self.drained(&mut note, parity, shared, targets.clone()),
                Step::Covering => self.covered(&note, shared, targets.clone()),
            };
            let Some(next) = next else { return };
            note.step = next;
        }
    }

    fn may(&self, permit: u64) -> bool {
        let allowed = permit % 2 == 1 && self.permit.load(Ordering::SeqCst) == permit;
        (allowed || planted(Bug::PointWhileStale)) && !self.spoiled.load(Ordering::SeqCst)
    }

    fn begin_note(&self, note: &mut Note) -> Option<Step> {
        let parity = usize::from(self.turn.load(Ordering::SeqCst) % 2 == 1);
        note.permit = self.permit.load(Ordering::SeqCst);
        // What is left of a note that was given up: its counter is the next turn's.
        if !self.may(note.permit) || !self.is_empty(1 - parity) {
            return None;
        }
        note.points = std::array::from_fn(|place| self.last[place].load(Ordering::SeqCst));
        self.turn.fetch_add(1, Ordering::SeqCst);
        Some(Step::Draining { parity })
    }

    /// Whether nothing of the turns of this parity is in flight.
    fn is_empty(&self, parity: usize) -> bool {
        self.flying.iter().all(|flying| flying.0[parity].load(Ordering::SeqCst) == 0)
    }

    fn drained(
        &self,
        note: &mut Note,
        parity: usize,
        shared: &Shared,
        targets: impl Iterator<Item = Placed>,
    ) -> Option<Step> {
        if !self.is_empty(parity) && !planted(Bug::PointIgnoresFlight) {
            return None;
        }
        for (place, target) in targets {
            if let Some(mark) = note.marks.get_mut(place) {
                *mark = shared.target(target).acknowledged();
            }
        }
        Some(Step::Covering)
    }

    fn covered(&self, note: &Note, shared: &Shared, mut targets: impl Iterator<Item = Placed> + Clone) -> Option<Step> {
        let flushed =
            |(place, target): Placed| note.marks.get(place).is_some_and(|mark| shared.target(target).has_flushed(mark));
        let all = targets.clone().all(flushed);
        // In this order: a machine that came back without something has said so before it could flush, and it is left before
        // that is forgotten.
        if !all || targets.any(|(_, target)| shared.target(target).has_lost()) || !self.may(note.permit) {
            return None;
        }
        for (proven, point) in self.proven.iter().zip(note.points) {
            proven.store(point, Ordering::SeqCst);
        }
        Some(Step::Idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node with two targets, all flushed, its servers' last points 7 and 9.
    fn node() -> (Points, Shared) {
        let (points, shared) = (Points::default(), Shared::new(2, 2));
        flush(&shared, 0);
        flush(&shared, 1);
        points.told(0, 7);
        points.told(1, 9);
        points.permit(true);
        (points, shared)
    }

    fn flush(shared: &Shared, target: usize) {
        if let Some(mark) = shared.target(target).flush_mark() {
            shared.target(target).flushed(&mark);
        }
    }

    fn look(points: &Points, shared: &Shared) -> (u64, u64) {
        points.look(shared, [(0, 0), (1, 1)].into_iter());
        (points.to_tell(0), points.to_tell(1))
    }

    #[test]
    fn where_nothing_happens_the_last_points_are_told() {
        let (points, shared) = node();
        assert_eq!(look(&points, &shared), (7, 9));
    }

    #[test]
    fn what_was_in_flight_has_to_end_and_to_be_flushed_everywhere() {
        let (points, shared) = node();
        let early = points.begin(0);
        assert_eq!(look(&points, &shared), (0, 0));
        // What begins after the note need not have ended.
        let late = points.begin(1);
        shared.target(0).acknowledge(0);
        shared.target(1).acknowledge(0);
        points.end(0, early);
        assert_eq!(look(&points, &shared), (0, 0));
        flush(&shared, 0);
        assert_eq!(look(&points, &shared), (0, 0), "one target has not flushed it");
        flush(&shared, 1);
        points.told(0, 17);
        points.told(1, 19);
        assert_eq!(look(&points, &shared), (7, 9), "those of the time of the note");
        assert_eq!(look(&points, &shared), (7, 9), "the next note has to wait for what began before it");
        points.end(1, late);
        assert_eq!(look(&points, &shared), (17, 19));
    }

    #[test]
    fn a_note_that_was_given_up_leaves_nothing_uncounted() {
        let (points, shared) = node();
        let early = points.begin(0);
        look(&points, &shared);
        points.permit(false);
        points.permit(true);
        assert_eq!(look(&points, &shared), (0, 0), "it was noted under another permission");
        assert_eq!(look(&points, &shared), (0, 0), "and what was in flight then still is");
        points.end(0, early);
        assert_eq!(look(&points, &shared), (7, 9));
    }

    #[test]
    fn nothing_is_proven_in_trouble() {
        for trouble in 0..3 {
            let (points, shared) = node();
            look(&points, &shared);
            points.told(0, 17);
            points.told(1, 19);
            match trouble {
                0 => points.permit(false),
                1 => points.spoil(),
                _ => {
                    shared.target(1).acknowledge(0);
                    shared.target(1).told_losses(0);
                    shared.target(1).told_losses(1);
                    flush(&shared, 1);
                }
            }
            for _ in 0..4 {
                let told = look(&points, &shared);
                assert_eq!(told, if trouble == 2 { (7, 9) } else { (0, 0) }, "trouble {trouble}");
            }
            points.permit(true);
            assert_eq!(look(&points, &shared) == (0, 0), trouble == 1);
        }
    }
}
