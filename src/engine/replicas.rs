//! What the owner of an array decides about the replicas of its nodes: who is in sync, who is left behind, who is synced again; and
//! which node is suspended ([`freeze`]), moves to another target ([`moves`]), gains or loses one ([`slots`]), becomes larger ([`grow`]).
//!
//! Sans-io: [`Replicas::handle`] takes what happened, [`Replicas::poll`] gives what to do, in order. One change of a node's
//! replicas at a time:
//!
//! ```text
//! Recording --saved--> Settling                     (start, where replicas may differ: the first in sync is the one to go by)
//! Steady --failed--> Leaving{view} --adopted--> Recording --saved--> Settling{view} --adopted--> Steady
//! Steady --a stale one answers--> Opening{view} --adopted--> Steady, syncing --copied--> Recording --saved--> Settling
//! Steady --a scrub is wanted--> Opening{view} --adopted--> Steady, scrubbing ([`scrubs`])
//! Recording --not saved, and one of those that were to know of it has failed meanwhile--> Leaving
//! late --its replicas have come--> Recording or Steady, as at the start ([`late`])
//! ```
//!
//! What holds (the contract, 1.4, 4.4, 8.1): a target that is left behind is first no shard's any more, then durably stale, and
//! only then may a write that it missed be acknowledged ([`Role::Leaving`], then [`Role::Stale`]). One that joins is written
//! by every shard before it is copied to, and durably in sync before it is read. The last one in sync is never left.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::control::target::Target;
use crate::engine::copy::{Copied, CopyError, Task};
use crate::engine::losses::Losses;
use crate::engine::region::SyncMap;
use crate::engine::replicas::freeze::Freeze;
use crate::engine::replicas::grow::Growing;
use crate::engine::replicas::jobs::Job;
use crate::engine::replicas::moves::Moving;
use crate::engine::replicas::scrubs::Scrubbing;
use crate::engine::replicas::slots::Gone;
use crate::engine::shard::Report;
use crate::engine::shared::Shared;
use crate::engine::steer::{News, Steer};
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Lba, Time};

mod freeze;
mod grow;
mod jobs;
mod late;
mod logs;
mod losses;
mod moves;
mod scrubs;
mod slots;
#[cfg(test)]
mod tests;

pub use freeze::FreezeState;
pub use logs::Standing;
pub use scrubs::ScrubShown;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A shard says that something is wrong.
    Report(Report),
    /// Every shard works from this view, or a later one, on this node ([`crate::engine::shard::Shard::poll_ack`]).
    Adopted {
        /// The node.
        node: usize,
        /// The version of the view.
        version: u64,
    },
    /// The answer to [`Effect::Save`].
    Saved(Saved),
    /// What a sync engine was to do has ended.
    Synced {
        /// Of this node.
        node: usize,
        /// How.
        result: Result<Copied, CopyError>,
    },
    /// A sync engine that was asked to end has read the last of its source; it may still be writing.
    SourceLeft {
        /// Of this node.
        node: usize,
    },
    /// A flush of one target has ended.
    Flushed {
        /// Which flush.
        ticket: u64,
        /// Whether everything that was acknowledged before is durable there.
        durable: bool,
    },
    /// The owner of arrays asks for something.
    Steer(Steer),
    /// A spare target could not be given its volume.
    NotAttached {
        /// The spare target.
        target: usize,
        /// Why.
        errno: Errno,
    },
    /// Time has passed. Per target: whether it can be asked now.
    Tick(Vec<bool>),
}

/// What has become durable of what was to be saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// All of it.
    All,
    /// The record; and these volumes could not be told. Nodes that have none of them go on. [`Saved::Nothing`] follows, when it may be
    /// tried again.
    AllBut(Vec<Id>),
    /// It may be tried again now.
    Nothing,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Every shard is to adopt this view. Answered by [`Event::Adopted`].
    Publish(Arc<View>),
    /// What is known of the targets is to be made durable: in the array's record, and on those in sync. Answered by
    /// [`Event::Saved`]. One at a time. By the id of the volume.
    Save(Vec<(Id, Standing)>),
    /// What a map says is still to be copied is to be copied, or everything compared. Answered by [`Event::Synced`].
    Sync {
        /// The node.
        node: usize,
        /// From here.
        source: usize,
        /// To there.
        target: usize,
        /// How far it is.
        map: Arc<SyncMap>,
        /// What is to be done.
        task: Task,
        /// Bytes a second at most; 0: no bound.
        rate: u64,
    },
    /// That is to end. Answered by [`Event::Synced`].
    StopSync {
        /// The node.
        node: usize,
    },
    /// One shard is to flush one target, whatever gate is shut. Answered by [`Event::Flushed`].
    Flush {
        /// Which flush.
        ticket: u64,
        /// The target.
        target: usize,
    },
    /// What a target has lost is accepted: it serves again.
    Forgive {
        /// The target.
        target: usize,
    },
    /// A spare target gets a volume, before any view in which it is attached. [`Event::NotAttached`] if it cannot.
    Attach {
        /// The spare target.
        target: usize,
        /// Where the volume lives.
        at: Target,
        /// Its id.
        volume: Id,
        /// What the record knows of its machine.
        known: Option<Losses>,
        /// What is changed there is in its region log, and in those of its siblings.
        logged: bool,
    },
    /// The owner of arrays is to be told.
    Tell(News),
}

/// See the diagram at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Steady,
    Leaving { version: u64, adopted: bool },
    Recording,
    Settling { version: u64 },
    Opening { version: u64 },
}

#[derive(Clone, Debug)]
struct NodeState {
    step: Step,
    /// The target that is copied to.
    syncing: Option<usize>,
    /// The sync engine that does it.
    job: Job,
    /// The target that has everything, and joins as soon as nothing else is under way.
    filled: Option<usize>,
    freeze: Freeze,
    moving: Option<Moving>,
    scrub: Option<Scrubbing>,
    /// Nobody has come yet who has everything: it has no targets.
    late: bool,
    /// A volume that is not attached has part of its data; what it lacks is in the region logs.
    awaits: bool,
    /// All but one target are to be left: they may differ.
    diverged: bool,
    /// Which target has what was in flight when it was last served is not durable yet. What is read from one of them now must not be
    /// read otherwise later, also if the next daemon goes by another one.
    undecided: bool,
    /// When a stale target is tried at the earliest, and after how long the next time.
    retry_at: Time,
    pause: Duration,
}

#[derive(Clone, Copy, Debug)]
struct TargetState {
    role: Role,
    standing: Standing,
    failed: bool,
    reachable: bool,
    /// What was heard of its machine.
    losses: Option<Losses>,
    /// When it is left, nobody knows what it has.
    refill: bool,
    /// It is to be left for good.
    gone: Option<Gone>,
}

/// See the module's description.
#[derive(Debug)]
pub struct Replicas {
    view: Arc<View>,
    nodes: Vec<NodeState>,
    targets: Vec<TargetState>,
    /// What is being saved, or is to be saved next.
    saving: bool,
    dirty: bool,
    /// Nodes whose change the save under way makes durable.
    saved_with: Vec<usize>,
    /// A larger layout that is being adopted.
    growing: Option<Growing>,
    /// The last flush that was asked for.
    ticket: u64,
    effects: VecDeque<Effect>,
}

impl Replicas {
    /// The targets of an array as its record knows them. `clean`: nothing was in flight when it was last served, so all that are
    /// in sync are the same. A node of which none is in sync is late. The view to begin with is [`Replicas::view`].
    pub fn new(view: View, standings: &[Standing], clean: bool) -> Replicas {
        let mut view = view;
        let mut standings = standings.to_vec();
        standings.resize(view.targets.len(), Standing::Absent);
        let mut nodes = Vec::with_capacity(view.nodes.len());
        for node in &view.nodes {
            let in_sync = node.targets.iter().filter(|target| standings[**target] == Standing::InSync).count();
            // Else what was in flight may be on some and not on others: the first is gone by, and nothing is read or acknowledged before it
            // is durably known that the others are stale.
            let known = in_sync <= 1 || clean || planted(Bug::UncleanIsClean);
            let keeper = node.targets.iter().copied().find(|target| standings[*target] == Standing::InSync);
            for target in node.targets.iter().copied() {
                view.targets[target].role = match standings[target] {
                    Standing::InSync if known || Some(target) == keeper => Role::InSync,
                    Standing::InSync => Role::Leaving,
                    Standing::Stale if planted(Bug::StaleForgotten) => Role::InSync,
                    Standing::Candidate { .. } if planted(Bug::CandidateJoins) => Role::InSync,
                    Standing::Stale | Standing::Filling { .. } | Standing::Candidate { .. } => Role::Stale,
                    Standing::Absent => Role::Absent,
                };
            }
            nodes.push(NodeState {
                step: if known { Step::Steady } else { Step::Recording },
                syncing: None,
                job: Job::None,
                filled: None,
                freeze: Freeze::Open,
                moving: None,
                scrub: None,
                late: in_sync == 0,
                awaits: false,
                diverged: false,
                undecided: !known,
                retry_at: Time(0),
                pause: limits::SYNC_RETRY_MIN,
            });
        }
        let dirty = nodes.iter().any(|node| node.step == Step::Recording);
        let known = |(target, standing): (&crate::engine::view::Target, &Standing)| TargetState {
            role: target.role,
            standing: if target.role == Role::Leaving { Standing::Stale } else { *standing },
            failed: false,
            reachable: false,
            losses: None,
            refill: false,
            gone: None,
        };
        for (node, state) in view.nodes.iter_mut().zip(&nodes) {
            node.gate = state.gate();
        }
        view.see_singles();
        let targets = view.targets.iter().zip(&standings).map(known).collect();
        let rules = Replicas {
            view: Arc::new(view),
            nodes,
            targets,
            saving: false,
            dirty,
            saved_with: Vec::new(),
            growing: None,
            ticket: 0,
            effects: VecDeque::new(),
        };
        rules.permit_points();
        rules
    }

    /// The view that was published last.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// What a target is now.
    pub fn role(&self, target: usize) -> Role {
        self.targets[target].role
    }

    /// Whether every node has a target to go by and nothing is to be done about any that is to be in sync.
    pub fn is_settled(&self) -> bool {
        let settled = |node: &NodeState| {
            let candidate = |target: usize| self.targets[target].standing.is_candidate();
            node.step == Step::Steady && node.syncing.is_none_or(candidate)
        };
        self.nodes.iter().all(settled) && !self.saving
    }

    /// Whether all replicas that are in sync are known to hold the same, whatever happens to their machines when the array has ended:
    /// what one of them loses that was not flushed another one may have.
    pub fn is_clean(&self, shared: &Shared) -> bool {
        let lossless = |node: usize| {
            let in_sync = self.of(node, |target| target.role == Role::InSync);
            let flushed = in_sync.len() < 2 || in_sync.iter().all(|target| shared.target(*target).is_flushed());
            flushed && !in_sync.iter().any(|target| shared.target(*target).has_lost())
        };
        let all_came = !self.nodes.iter().any(|node| node.late) || planted(Bug::LateIsClean);
        self.is_settled() && all_came && (planted(Bug::StopIsFlush) || (0..self.nodes.len()).all(lossless))
    }

    /// Whether nothing is under way at all.
    pub fn is_idle(&self) -> bool {
        let idle = |node: &NodeState| node.job == Job::None && node.moving.is_none() && node.freeze.is_at_rest();
        self.is_settled() && self.nodes.iter().all(idle)
    }

    /// When [`Replicas::handle`] is to be called, if nothing else happens; a tick will do.
    pub fn next_timeout(&self) -> Time {
        let next = |node: &NodeState| {
            let moving = node.moving.as_ref().map_or(Time::NEVER, Moving::next_timeout);
            node.freeze.next_timeout().min(moving)
        };
        self.nodes.iter().map(next).fold(Time::NEVER, Time::min)
    }

    /// Takes what happened. Whatever follows is in [`Replicas::poll`] afterwards.
    pub fn handle(&mut self, event: Event, now: Time) {
        match event {
            Event::Report(Report::Failed { target, .. }) => self.targets[target].failed = true,
            Event::Report(Report::Fenced { target }) => {
                let volume = self.view.targets[target].volume;
                if !planted(Bug::FencedGoesOn) {
                    self.tell(News::Fenced { volume });
                }
            }
            Event::Report(Report::Lost { target }) => self.lost(target),
            Event::Report(Report::Diverged { node }) => self.nodes[node].diverged = true,
            Event::Adopted { node, version } => self.adopted(node, version, now),
            Event::Saved(saved) => self.saved(saved, now),
            Event::Synced { node, result } => self.synced(node, result, now),
            Event::SourceLeft { node } => self.source_left(node),
            Event::Flushed { ticket, durable } => self.flushed(ticket, durable, now),
            Event::Steer(steer) => self.steer(steer),
            Event::NotAttached { target, errno } => self.not_attached(target, errno),
            Event::Tick(reachable) => {
                for (target, reachable) in self.targets.iter_mut().zip(reachable) {
                    target.reachable = reachable;
                }
            }
        }
        for node in 0..self.nodes.len() {
            self.advance(node, now);
        }
        self.save();
        self.permit_points();
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn of(&self, node: usize, wanted: impl Fn(&TargetState) -> bool) -> Vec<usize> {
        self.view.nodes[node].targets.iter().copied().filter(|target| wanted(&self.targets[*target])).collect()
    }

    /// Begins what a node needs next.
    fn advance(&mut self, node: usize, now: Time) {
        self.note_progress(node);
        self.join(node);
        self.move_on(node, now);
        self.freeze_on(node, now);
        if !self.may_leave(node) || self.leave(node) || self.nodes[node].step != Step::Steady {
            return;
        }
        let state = &self.nodes[node];
        let free = state.syncing.is_none() && state.job == Job::None && state.freeze == Freeze::Open;
        if free && state.retry_at <= now {
            self.open_stale(node);
        }
        if self.nodes[node].step == Step::Steady {
            self.close_windows(node);
            self.run_scrub(node, now);
        }
        self.run_job(node);
    }

    /// Whether what has failed can be left now. Also when a change is to be recorded and nobody is at it: those who are to know of it are
    /// asked until they answer, and one that has failed may never.
    fn may_leave(&self, node: usize) -> bool {
        match self.nodes[node].step {
            Step::Steady => true,
            Step::Recording => !self.saving,
            Step::Leaving { .. } | Step::Settling { .. } | Step::Opening { .. } => false,
        }
    }

    /// Leaves what has failed; true when there was something.
    fn leave(&mut self, node: usize) -> bool {
        let diverged = std::mem::take(&mut self.nodes[node].diverged);
        let in_sync = self.whole(node);
        let fine = |target: &usize| !self.targets[*target].failed && self.targets[*target].gone.is_none();
        let good = in_sync.iter().copied().filter(fine).collect::<Vec<_>>();
        let keepers = if good.is_empty() { &in_sync } else { &good };
        let reachable = keepers.iter().copied().find(|target| self.targets[*target].reachable);
        let keeper = reachable.or_else(|| keepers.first().copied());
        let all_failed = good.is_empty();
        let mut leaving = self.of(node, |target| {
            let gone = target.gone.is_some() && !matches!(target.role, Role::Leaving | Role::Absent);
            gone || target.role.is_written() && (diverged || target.failed)
        });
        leaving.retain(|target| !self.changes_place(*target));
        let last = in_sync.len() == 1;
        let stays = |target: usize| (diverged || all_failed || last) && Some(target) == keeper;
        let (staying, leaving): (Vec<usize>, Vec<usize>) = leaving.into_iter().partition(|target| stays(*target));
        for target in staying {
            (self.targets[target].gone, self.targets[target].refill) = (None, false);
        }
        for target in self.of(node, |target| target.failed) {
            self.targets[target].failed = self.changes_place(target);
        }
        if leaving.is_empty() {
            return false;
        }
        let committing = self.committing(node).is_some();
        for target in leaving {
            let refilled = self.refilled(target);
            let state = &mut self.targets[target];
            if state.standing.is_candidate() {
                state.gone.get_or_insert(Gone::Failed);
            }
            state.role = Role::Leaving;
            state.standing = match (state.gone, state.standing) {
                (Some(_), _) => Standing::Absent,
                // Its marks are with the one that goes, as for those that were left before.
                (None, Standing::InSync) if committing => Standing::Filling { from: Lba(0) },
                (None, Standing::InSync) => refilled.unwrap_or(Standing::Stale),
                // What was never filled does not become a copy by being left.
                (None, standing) => standing,
            };
            if self.nodes[node].syncing == Some(target) || self.reads(node, target) {
                self.stop_job(node);
            }
            self.scrub_again(node);
            self.move_fails(node, target);
        }
        self.nodes[node].step = Step::Leaving { version: self.publish(), adopted: false };
        true
    }

    /// Takes the first stale target that can be asked.
    fn open_stale(&mut self, node: usize) {
        let stale = self.of(node, |target| {
            target.role == Role::Stale && target.standing.is_synced() && target.reachable && target.gone.is_none()
        });
        if let Some(target) = stale.first().copied().filter(|target| self.source(node, *target).is_some()) {
            self.open(node, target, None);
        }
    }

    /// From now on a target is written where it is copied.
    fn open(&mut self, node: usize, target: usize, map: Option<SyncMap>) {
        self.targets[target].role = Role::Syncing;
        self.forget_loss(target);
        let sectors = self.view.geometry.node_sectors(node);
        let map = Arc::new(map.unwrap_or_else(|| self.first_map(target, sectors)));
        let mut view = View::clone(&self.view);
        view.nodes[node].sync = Some(map);
        self.view = Arc::new(view);
        self.nodes[node].syncing = Some(target);
        self.nodes[node].step = Step::Opening { version: self.publish() };
    }

    /// A view of what is now. Its version.
    fn publish(&mut self) -> u64 {
        let mut view = View::clone(&self.view);
        view.version += 1;
        for (target, state) in view.targets.iter_mut().zip(&self.targets) {
            let node = &mut view.nodes[target.node];
            if target.role != state.role {
                node.changed = view.version;
            }
            if target.role != state.role && state.role == Role::Syncing {
                node.opened = view.version;
            }
            target.role = state.role;
        }
        for (number, (node, state)) in view.nodes.iter_mut().zip(&self.nodes).enumerate() {
            if state.syncing.is_none() && !self.is_open_for_scrub(number) && !self.awaits_refill(number) {
                node.sync = None;
            }
            node.target_timeout = state.moving.as_ref().map(Moving::target_timeout);
            let gate = state.gate();
            if node.gate != gate {
                (node.gate, node.changed) = (gate, view.version);
            }
        }
        view.see_singles();
        self.view = Arc::new(view);
        self.effects.push_back(Effect::Publish(Arc::clone(&self.view)));
        self.view.version
    }

    fn record(&mut self, node: usize) {
        self.nodes[node].step = Step::Recording;
        self.dirty = true;
    }

    /// Saves what has changed, unless a save is under way.
    fn save(&mut self) {
        if !self.dirty || self.saving {
            return;
        }
        (self.dirty, self.saving) = (false, true);
        let recording = |node: &usize| self.nodes[*node].step == Step::Recording;
        self.saved_with = (0..self.nodes.len()).filter(recording).collect();
        let known = self.view.targets.iter().zip(&self.targets).filter(|(target, _)| !target.volume.is_nil());
        let standings = known.map(|(target, state)| (target.volume, state.standing)).collect();
        self.effects.push_back(Effect::Save(standings));
    }

    fn saved(&mut self, saved: Saved, now: Time) {
        let owing = match saved {
            Saved::All => Vec::new(),
            Saved::AllBut(untold) => self.fail_untold(&untold),
            Saved::Nothing => {
                // What waits for it may not go on; it is tried again.
                (self.saving, self.dirty) = (false, true);
                return self.saved_with.clear();
            }
        };
        self.saving = !owing.is_empty();
        let with = std::mem::take(&mut self.saved_with);
        let (waiting, saved) = with.into_iter().partition::<Vec<usize>, _>(|node| owing.contains(node));
        self.saved_with = waiting;
        for node in &saved {
            for target in self.view.nodes[*node].targets.clone() {
                let state = &mut self.targets[target];
                state.role = match (state.standing, state.role) {
                    (Standing::InSync, _) => Role::InSync,
                    (Standing::Stale | Standing::Filling { .. } | Standing::Candidate { .. }, Role::Syncing) => {
                        Role::Syncing
                    }
                    // What was in sync when another one took its place has everything.
                    (Standing::Candidate { .. }, Role::InSync | Role::Mirror) => Role::Mirror,
                    (Standing::Stale | Standing::Filling { .. } | Standing::Candidate { .. }, _) => Role::Stale,
                    (Standing::Absent, _) => Role::Absent,
                };
            }
            self.nodes[*node].undecided = false;
            self.see_syncing(*node);
            self.committed(*node, now);
        }
        if !saved.is_empty() {
            let version = self.publish();
            for node in saved {
                self.nodes[node].step = Step::Settling { version };
            }
        }
    }

    /// A change waits for those who are to know of it. What does not answer is not waited for: it has failed, also when no request says so.
    /// The nodes of these volumes.
    fn fail_untold(&mut self, untold: &[Id]) -> Vec<usize> {
        let mut nodes = Vec::new();
        for node in 0..self.nodes.len() {
            let untold = untold.iter().filter_map(|volume| self.slot(node, *volume)).collect::<Vec<usize>>();
            if !untold.is_empty() {
                nodes.push(node);
            }
            for target in untold {
                self.targets[target].failed |= !self.changes_place(target);
            }
        }
        nodes
    }

    fn adopted(&mut self, node: usize, version: u64, now: Time) {
        match self.nodes[node].step {
            Step::Leaving { version: awaited, .. } if awaited <= version => {
                self.nodes[node].step = Step::Leaving { version: awaited, adopted: true };
                self.left(node);
            }
            Step::Settling { version: awaited } if awaited <= version => {
                self.nodes[node].step = Step::Steady;
                self.free_slots(node);
            }
            Step::Opening { version: awaited } if awaited <= version => self.nodes[node].step = Step::Steady,
            _ => {}
        }
        self.freeze_adopted(node, version, now);
        self.move_adopted(node, version);
        self.grow_adopted(node, version);
    }

    /// What was left is recorded; but nothing must be copied any more from a target that may be read no more: once that is durable,
    /// writes that it missed are over, and their regions free to be copied.
    fn left(&mut self, node: usize) {
        let left = |target: &usize| self.targets[*target].role == Role::Leaving && self.reads(node, *target);
        let source_left = self.view.nodes[node].targets.iter().any(left);
        if matches!(self.nodes[node].step, Step::Leaving { adopted: true, .. }) && !source_left {
            self.record(node);
        }
    }

    fn flushed(&mut self, ticket: u64, durable: bool, now: Time) {
        for node in 0..self.nodes.len() {
            self.freeze_flushed(node, ticket, durable, now);
            self.move_flushed(node, ticket, durable, now);
        }
    }

    /// Asks for a flush of a target. Its number.
    fn flush(&mut self, target: usize) -> u64 {
        self.ticket += 1;
        self.effects.push_back(Effect::Flush { ticket: self.ticket, target });
        self.ticket
    }

    fn tell(&mut self, news: News) {
        self.effects.push_back(Effect::Tell(news));
    }

    fn steer(&mut self, steer: Steer) {
        match steer {
            Steer::Freeze { node } => self.freeze(node),
            Steer::Thaw { node } => self.thaw(node),
            Steer::AcceptLoss { node } => self.accept_loss(node),
            Steer::Fail { node } => self.fail(node),
            Steer::Attach { node, target, volume } => {
                self.attach(node, target, volume, Standing::Filling { from: Lba(0) });
            }
            Steer::Detach { node, volume } => self.detach(node, volume),
            Steer::Move(spec) => self.begin_move(spec),
            Steer::Replace { node, from, to, target } => self.replace(node, from, to, target),
            Steer::Pause { node, paused } => self.pause_move(node, paused),
            Steer::Abort { node } => self.abort_move(node),
            Steer::Stay { node } => self.set_awaits(node, false),
            Steer::Scrub(order) => self.begin_scrub(order),
            Steer::EndScrub { node } => self.end_scrub(node),
            Steer::Grow(geometry) => self.grow(geometry),
            Steer::Arrive { node, replicas } => self.arrive(node, &replicas),
        }
    }
}
