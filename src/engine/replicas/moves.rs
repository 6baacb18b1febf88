//! The move of a node from one target to another under I/O (the contract, 6):
//!
//! ```text
//! Preparing --it answers--> Copying --copied, flushed--> Verifying --alike--> Mirroring --> Flushing --flushed--> Closing{view}
//!   Closing --every shard is done--> Sealing --flushed--> Committing --durable--> in its place
//!   Closing, Sealing --too long--> Mirroring, and again later
//!   any but Committing --a failure, or asked to--> Ending --left durably--> the node stays where it is
//! ```
//!
//! From `Mirroring` on both have everything, and every write goes to both. In `Sealing` nothing is in flight, so both are the same;
//! the record of the change is the one point from which there is no way back. A move that a former daemon had begun goes on where that was:
//! what is copied first is what it had not copied, and what the region logs have marked.

use std::time::Duration;

use super::{Freeze, Job, NodeState, Replicas, Standing, Step, TargetState};
use crate::bugs::{Bug, planted};
use crate::control::migration::MigrationState;
use crate::control::target::Target;
use crate::engine::copy::{Copied, CopyError, Task};
use crate::engine::region::SyncMap;
use crate::engine::replicas::slots::Gone;
use crate::engine::steer::{Move, MoveError, MoveShown, Moved, News};
use crate::engine::view::Role;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Lba, Time};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preparing,
    Copying,
    Verifying,
    Mirroring { retry_at: Time },
    Flushing { ticket: u64 },
    Closing { version: u64, since: Time },
    Sealing { ticket: u64, since: Time },
    Committing { since: Time },
    Ending(MoveError),
}

/// See the diagram at the top.
#[derive(Clone, Debug)]
pub(super) struct Moving {
    spec: Move,
    from: usize,
    to: usize,
    stage: Stage,
    paused: bool,
    copied: u64,
    root: Option<[u8; 32]>,
    rolled_back: u32,
    pause: Duration,
    /// How often its source was too slow since it last got on, and how many regions were left then.
    stalls: (u32, u64),
    /// Until when it rests before it asks its source again.
    rests: Option<Time>,
}

impl Moving {
    fn new(spec: Move, from: usize, to: usize, stage: Stage) -> Moving {
        Moving {
            spec,
            from,
            to,
            stage,
            paused: false,
            copied: 0,
            root: None,
            rolled_back: 0,
            pause: limits::CUT_OVER_RETRY_MIN,
            stalls: (0, u64::MAX),
            rests: None,
        }
    }

    pub(super) fn from(&self) -> usize {
        self.from
    }

    fn is_committing(&self) -> bool {
        matches!(self.stage, Stage::Committing { .. })
    }

    /// Whether new requests wait.
    pub(super) fn shuts_gate(&self) -> bool {
        let ending = matches!(self.stage, Stage::Ending(_)) && planted(Bug::AbortLeavesGate);
        ending || matches!(self.stage, Stage::Closing { .. } | Stage::Sealing { .. } | Stage::Committing { .. })
    }

    pub(super) fn wants_job(&self) -> bool {
        matches!(self.stage, Stage::Copying | Stage::Verifying) && !self.paused && self.rests.is_none()
    }

    pub(super) fn task(&self) -> Task {
        match self.stage {
            Stage::Verifying => Task::Verify,
            // What lies below where it goes on is written before it is known what of that is to be copied again.
            _ => Task::Copy { fresh: self.spec.fresh && self.spec.copied == Lba(0) },
        }
    }

    pub(super) fn target_timeout(&self) -> Duration {
        self.spec.target_timeout
    }

    pub(super) fn rate(&self) -> u64 {
        self.spec.rate
    }

    pub(super) fn next_timeout(&self) -> Time {
        match self.stage {
            Stage::Copying | Stage::Verifying => self.rests.unwrap_or(Time::NEVER),
            Stage::Mirroring { retry_at } => retry_at,
            Stage::Closing { since, .. } | Stage::Sealing { since, .. } => since.after(self.spec.max_freeze),
            _ => Time::NEVER,
        }
    }

    fn phase(&self) -> MigrationState {
        match self.stage {
            Stage::Preparing | Stage::Ending(_) => MigrationState::Preparing,
            Stage::Copying => MigrationState::Copying,
            Stage::Verifying => MigrationState::Verifying,
            Stage::Mirroring { .. } | Stage::Flushing { .. } => MigrationState::Mirroring,
            Stage::Closing { .. } | Stage::Sealing { .. } | Stage::Committing { .. } => MigrationState::CutOver,
        }
    }
}

impl NodeState {
    /// The move of a node to a target.
    pub(super) fn moving_to(&self, target: usize) -> Option<&Moving> {
        self.moving.as_ref().filter(|moving| moving.to == target)
    }
}

impl Replicas {
    /// How a node's move goes.
    pub fn move_shown(&self, node: usize) -> Option<MoveShown> {
        let shown = |moving: &Moving| MoveShown {
            phase: moving.phase(),
            paused: moving.paused,
            rolled_back: moving.rolled_back,
        };
        self.nodes[node].moving.as_ref().map(shown)
    }

    pub(super) fn begin_move(&mut self, spec: Move) {
        let node = spec.node;
        let Some((from, to)) = self.ends_of_move(&spec) else {
            return self.tell(News::Moved { node, result: Err(MoveError::Refused) });
        };
        self.nodes[node].moving = Some(Moving::new(spec, from, to, Stage::Preparing));
        // From now on it is one of the node's targets.
        self.set_awaits(node, false);
    }

    /// Whom a move is from, and to whom: attached, if it is not yet. `None`: there can be no such move. One that is only behind, as after
    /// the death of a daemon, is waited for.
    fn ends_of_move(&mut self, spec: &Move) -> Option<(usize, usize)> {
        let node = spec.node;
        let replica = |from: &usize| {
            let TargetState { standing, gone, .. } = &self.targets[*from];
            gone.is_none() && (*standing == Standing::InSync || standing.is_synced())
        };
        let from = self.slot(node, spec.from).filter(replica)?;
        if self.nodes[node].moving.is_some() {
            return None;
        }
        let candidate = |to: &usize| self.targets[*to].standing.is_candidate() && self.targets[*to].gone.is_none();
        let to = match self.slot(node, spec.to) {
            Some(to) => Some(to).filter(candidate),
            None => self.attach(node, spec.target.clone(), spec.to, Standing::Candidate { from: spec.copied }),
        };
        Some((from, to?))
    }

    /// The operator's word: `to` has what `from` had. Only while nothing can be in flight.
    pub(super) fn replace(&mut self, node: usize, from: Id, to: Id, target: Target) {
        let rests = self.nodes.get(node).is_some_and(|state| {
            let frozen = matches!(state.freeze, Freeze::Frozen { .. } | Freeze::Failed);
            frozen && state.step == Step::Steady && state.job == Job::None && state.moving.is_none()
        });
        let old = self.slot(node, from).filter(|_| rests);
        let new = old.and_then(|_| self.attach(node, target.clone(), to, Standing::Stale));
        let (Some(old), Some(new)) = (old, new) else {
            return self.tell(News::Moved { node, result: Err(MoveError::Refused) });
        };
        let (max_freeze, target_timeout) = (Duration::MAX, self.view.target_timeout);
        let (rate, verify, keep, fresh, copied) = (0, false, false, false, Lba(0));
        let spec = Move { node, from, to, target, rate, verify, max_freeze, target_timeout, keep, fresh, copied };
        self.nodes[node].moving = Some(Moving::new(spec, old, new, Stage::Committing { since: Time(0) }));
        self.take_place(node, old, new, false);
    }

    pub(super) fn pause_move(&mut self, node: usize, paused: bool) {
        if let Some(moving) = self.nodes.get_mut(node).and_then(|state| state.moving.as_mut()) {
            moving.paused = paused;
        }
    }

    pub(super) fn abort_move(&mut self, node: usize) {
        match self.nodes.get(node).map(|state| state.moving.as_ref().map(|moving| moving.stage)) {
            // Too late: it is told how it ends.
            Some(Some(Stage::Committing { .. } | Stage::Ending(_))) => {}
            Some(Some(_)) => self.end_move(node, MoveError::Aborted),
            _ => self.tell(News::Moved { node, result: Err(MoveError::Refused) }),
        }
    }

    /// The node stays where it is: the target that was to take its place is left.
    pub(super) fn end_move(&mut self, node: usize, error: MoveError) {
        let Some(moving) = &mut self.nodes[node].moving else { return };
        moving.stage = Stage::Ending(error);
        let to = moving.to;
        self.targets[to].gone.get_or_insert(Gone::Failed);
    }

    /// A target of a node is being left: a move to it, or from it, ends; but one that has not begun to copy waits for a source that comes back.
    pub(super) fn move_fails(&mut self, node: usize, target: usize) {
        let Some(moving) = &self.nodes[node].moving else { return };
        if matches!(moving.stage, Stage::Ending(_)) {
            return;
        }
        if moving.to == target {
            self.end_move(node, MoveError::Target(Errno::EIO));
        } else if moving.from == target && (moving.stage != Stage::Preparing || self.targets[target].gone.is_some()) {
            self.end_move(node, MoveError::Source(Lba(0), Errno::EIO));
        }
    }

    /// The target that was to take the place is left, durably and by all.
    pub(super) fn candidate_gone(&mut self, node: usize, target: usize, volume: Id) {
        let moving = self.nodes[node].moving.take_if(|moving| moving.to == target);
        match moving.map(|moving| moving.stage) {
            Some(Stage::Ending(error)) => self.tell(News::Moved { node, result: Err(error) }),
            Some(_) => self.tell(News::Moved { node, result: Err(MoveError::Target(Errno::EIO)) }),
            // One that was still written after another one had taken its place.
            None => self.tell(News::Detached { node, volume }),
        }
    }

    /// What a move can go on with now.
    pub(super) fn move_on(&mut self, node: usize, now: Time) {
        if let Some(moving) = &mut self.nodes[node].moving {
            moving.rests.take_if(|until| *until <= now);
        }
        let state = &self.nodes[node];
        let Some(moving) = &state.moving else { return };
        let (to, stage) = (moving.to, moving.stage);
        let quiet = state.step == Step::Steady && state.job == Job::None && state.freeze == Freeze::Open;
        let from_in_sync = self.targets[moving.from].role == Role::InSync;
        let free = quiet && !moving.paused && self.targets[to].reachable && self.source(node, to).is_some();
        match stage {
            Stage::Preparing if free && state.syncing.is_none() && from_in_sync => {
                let has_everything = self.targets[to].role == Role::Mirror;
                self.set_stage(node, Stage::Copying);
                let (sectors, region_sectors) = (self.view.geometry.node_sectors(node), self.view.region_sectors);
                self.open(node, to, has_everything.then(|| SyncMap::complete(sectors, region_sectors)));
            }
            Stage::Mirroring { retry_at } if free && retry_at <= now => {
                if planted(Bug::RollBackForgetsWrites) {
                    self.targets[to].role = Role::Syncing;
                    self.publish();
                }
                let ticket = self.flush(to);
                self.set_stage(node, Stage::Flushing { ticket });
            }
            Stage::Closing { since, .. } | Stage::Sealing { since, .. }
                if since.after(moving.spec.max_freeze) <= now =>
            {
                self.roll_back(node, now);
            }
            _ => {}
        }
    }

    fn set_stage(&mut self, node: usize, stage: Stage) {
        if let Some(moving) = &mut self.nodes[node].moving {
            moving.stage = stage;
        }
    }

    /// Both stay as they are, and requests go on; it is tried again later.
    fn roll_back(&mut self, node: usize, now: Time) {
        let Some(moving) = &mut self.nodes[node].moving else { return };
        moving.stage = Stage::Mirroring { retry_at: now.after(moving.pause) };
        moving.rolled_back = moving.rolled_back.saturating_add(1);
        moving.pause = moving.pause.saturating_mul(2).min(limits::CUT_OVER_RETRY_MAX);
        if planted(Bug::RollBackForgetsWrites) {
            let to = moving.to;
            self.targets[to].role = Role::Stale;
        }
        self.publish();
    }

    /// Whether a source that was too slow is asked once more. Not at once: what has waited for the window goes first, and tells if the
    /// source does not answer anybody.
    fn asks_again(&mut self, node: usize, now: Time) -> bool {
        let left = self.view.nodes[node].sync.as_ref().map_or(0, |map| map.left());
        let Some(to) = self.nodes[node].moving.as_ref().map(|moving| moving.to) else { return false };
        let there = self.source(node, to).is_some();
        let Some(moving) = &mut self.nodes[node].moving else { return false };
        let (tries, before) = moving.stalls;
        moving.rests = (!planted(Bug::SourceNotSpared)).then(|| now.after(limits::SOURCE_PAUSE));
        moving.stalls = (if left < before { 1 } else { tries.saturating_add(1) }, left);
        there && moving.stalls.0 < limits::SOURCE_TRIES
    }

    /// What the sync engine was to do for a move has ended.
    pub(super) fn move_synced(&mut self, node: usize, result: Result<Copied, CopyError>, now: Time) {
        if matches!(result, Err(CopyError::Source(_, Errno::ETIMEDOUT))) && self.asks_again(node, now) {
            // It goes on where it was.
            return;
        }
        let Some(moving) = &mut self.nodes[node].moving else { return };
        let mirroring = Stage::Mirroring { retry_at: Time(0) };
        match (moving.stage, result) {
            (Stage::Copying, Ok(copied)) => {
                moving.stalls = (0, u64::MAX);
                moving.copied += copied.regions;
                moving.stage = if moving.spec.verify { Stage::Verifying } else { mirroring };
            }
            (Stage::Verifying, Ok(copied)) => {
                moving.root = copied.root;
                moving.stage = mirroring;
            }
            (_, Err(CopyError::Source(at, errno))) => self.end_move(node, MoveError::Source(at, errno)),
            (_, Err(CopyError::Target(errno))) => self.end_move(node, MoveError::Target(errno)),
            (_, Err(CopyError::Different(at))) => self.end_move(node, MoveError::Different(at)),
            // It goes on where it was, if it is still wanted.
            (_, Err(CopyError::Stopped | CopyError::Repair(..)) | Ok(_)) => {}
        }
    }

    pub(super) fn move_flushed(&mut self, node: usize, ticket: u64, durable: bool, now: Time) {
        let state = &self.nodes[node];
        let Some(moving) = &state.moving else { return };
        let (from, to, keep) = (moving.from, moving.to, moving.spec.keep);
        let steady = state.step == Step::Steady && !self.targets[to].failed && self.targets[to].gone.is_none();
        match moving.stage {
            Stage::Flushing { ticket: awaited } | Stage::Sealing { ticket: awaited, .. }
                if awaited == ticket && !durable =>
            {
                self.end_move(node, MoveError::Target(Errno::EIO));
            }
            // A suspend that was asked for meanwhile goes first.
            Stage::Flushing { ticket: awaited } if awaited == ticket && state.freeze != Freeze::Open => {
                self.set_stage(node, Stage::Mirroring { retry_at: now });
            }
            Stage::Flushing { ticket: awaited } if awaited == ticket && steady => {
                self.set_stage(node, Stage::Closing { version: u64::MAX, since: now });
                let version = self.publish();
                self.set_stage(node, Stage::Closing { version, since: now });
            }
            Stage::Sealing { ticket: awaited, since } if awaited == ticket => {
                let late = since.after(moving.spec.max_freeze) <= now;
                if late || !steady {
                    return self.roll_back(node, now);
                }
                self.set_stage(node, Stage::Committing { since });
                self.take_place(node, from, to, keep);
            }
            Stage::Flushing { ticket: awaited } if awaited == ticket => {
                self.set_stage(node, Stage::Mirroring { retry_at: now });
            }
            _ => {}
        }
    }

    /// Every shard is done with what it had begun under the older view.
    pub(super) fn move_adopted(&mut self, node: usize, version: u64) {
        let Some(moving) = &self.nodes[node].moving else { return };
        let to = moving.to;
        if let Stage::Closing { version: awaited, since } = moving.stage
            && awaited <= version
        {
            let ticket = self.flush(to);
            self.set_stage(node, Stage::Sealing { ticket, since });
        }
    }

    /// One target takes the place of another, as soon as that is durable.
    fn take_place(&mut self, node: usize, from: usize, to: usize, keep: bool) {
        self.targets[to].standing = Standing::InSync;
        self.targets[from].standing = if keep { Standing::Candidate { from: Lba(0) } } else { Standing::Absent };
        if !keep {
            self.targets[from].gone = Some(Gone::Replaced);
        }
        // What a stale copy lacks, also where it was filled before, is in the log of the one that goes, and not in that of the one that comes.
        for stale in self.of(node, |target| target.standing.is_synced()) {
            self.targets[stale].standing = Standing::Filling { from: Lba(0) };
        }
        self.record(node);
    }

    /// The move of a node whose record is being written.
    pub(super) fn committing(&self, node: usize) -> Option<&Moving> {
        self.nodes[node].moving.as_ref().filter(|moving| moving.is_committing())
    }

    /// Whether a target is one of two that are changing places: whether they have, only the record knows.
    pub(super) fn changes_place(&self, target: usize) -> bool {
        let moving = self.committing(self.view.targets[target].node);
        moving.is_some_and(|moving| target == moving.from || target == moving.to)
    }

    /// It is durable.
    pub(super) fn committed(&mut self, node: usize, now: Time) {
        let Some(moving) = self.nodes[node].moving.take_if(|moving| moving.is_committing()) else { return };
        let Stage::Committing { since } = moving.stage else { return };
        let regions = self.view.nodes[node].sync.as_ref().map_or(0, |map| map.regions() as u64);
        let waited = if since == Time(0) { Duration::ZERO } else { now.since(since) };
        let moved = Moved {
            regions,
            copied: moving.copied,
            root: moving.root,
            freeze_nanos: u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX),
            rolled_back: moving.rolled_back,
        };
        self.tell(News::Moved { node, result: Ok(moved) });
    }
}
