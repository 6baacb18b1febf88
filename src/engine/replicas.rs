//! What the owner of an array decides about the replicas of its nodes: who is in sync, who is left behind, who is synced again.
//!
//! Sans-io: [`Replicas::handle`] takes what happened, [`Replicas::poll`] gives what to do, in order. One change of a node at a
//! time:
//!
//! ```text
//! Recording --saved--> Settling                     (start, where replicas may differ: the first in sync is the one to go by)
//! Steady --failed--> Leaving{view} --adopted--> Recording --saved--> Settling{view} --adopted--> Steady
//! Steady --a stale one answers--> Opening{view} --adopted--> Steady, syncing --copied--> Recording --saved--> Settling
//! ```
//!
//! What holds (the contract, 1.4, 4.4, 8.1): a target that is left behind is first no shard's any more, then durably stale, and
//! only then may a write that it missed be acknowledged ([`Role::Leaving`], then [`Role::Stale`]). One that joins is written
//! by every shard before it is copied to, and durably in sync before it is read. The last one in sync is never left.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::engine::region::SyncMap;
use crate::engine::shard::Report;
use crate::engine::view::{Role, View};
use crate::units::{Id, Time};

/// A stale target is synced again at the earliest after this, when the last try has failed; doubled with each.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause between two tries.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What is durably known of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It has everything that was acknowledged.
    InSync,
    /// It lacks something.
    Stale,
    /// It is none.
    Absent,
}

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
    /// What was to be saved is durable, or could not be made so.
    Saved(bool),
    /// Copying has ended; false: it has failed.
    Synced {
        /// Of this node.
        node: usize,
        /// Whether everything is on the syncing target, flushed.
        whole: bool,
    },
    /// Time has passed. Per target: whether it can be asked now.
    Tick(Vec<bool>),
}

/// What is to be done.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Every shard is to adopt this view. Answered by [`Event::Adopted`].
    Publish(Arc<View>),
    /// What is known of the targets is to be made durable: in the array's record, and on those in sync. Answered by
    /// [`Event::Saved`]. One at a time. By the id of the volume.
    Save(Vec<(Id, Standing)>),
    /// The regions of a node's map that are still to be copied are to be found out, then copied. Answered by [`Event::Synced`].
    Sync {
        /// The node.
        node: usize,
        /// From here.
        source: usize,
        /// To there.
        target: usize,
        /// How far it is; all of it is still to be copied.
        map: Arc<SyncMap>,
    },
    /// Copying to this node's syncing target is to end. Answered by [`Event::Synced`].
    StopSync {
        /// The node.
        node: usize,
    },
}

/// See the diagram at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Steady,
    Leaving { version: u64 },
    Recording,
    Settling { version: u64 },
    Opening { version: u64, target: usize },
}

#[derive(Clone, Debug)]
struct NodeState {
    step: Step,
    /// The target that is copied to.
    syncing: Option<usize>,
    /// Its copying was asked to end.
    stopping: bool,
    /// All but one target are to be left: they may differ.
    diverged: bool,
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
    effects: VecDeque<Effect>,
}

impl Replicas {
    /// The targets of an array as its record knows them. `clean`: nothing was in flight when it was last served, so all that are
    /// in sync are the same. The view to begin with is [`Replicas::view`].
    pub fn new(view: View, standings: &[Standing], clean: bool) -> Replicas {
        let mut view = view;
        let mut nodes = Vec::with_capacity(view.nodes.len());
        for node in &view.nodes {
            let in_sync = node.targets.iter().filter(|target| standings[**target] == Standing::InSync).count();
            // Else what was in flight may be on some and not on others: the first is read, and nothing is acknowledged before it is
            // durably known that the others are stale.
            let known = in_sync == 1 || clean || planted(Bug::UncleanIsClean);
            let keeper = node.targets.iter().copied().find(|target| standings[*target] == Standing::InSync);
            for target in node.targets.iter().copied() {
                view.targets[target].role = match standings[target] {
                    Standing::InSync if known || Some(target) == keeper => Role::InSync,
                    Standing::InSync => Role::Leaving,
                    Standing::Stale if planted(Bug::StaleForgotten) => Role::InSync,
                    Standing::Stale => Role::Stale,
                    Standing::Absent => Role::Absent,
                };
            }
            nodes.push(NodeState {
                step: if known { Step::Steady } else { Step::Recording },
                syncing: None,
                stopping: false,
                diverged: false,
                retry_at: Time(0),
                pause: RETRY_MIN,
            });
        }
        let dirty = nodes.iter().any(|node| node.step == Step::Recording);
        let known = |(target, standing): (&crate::engine::view::Target, &Standing)| TargetState {
            role: target.role,
            standing: if target.role == Role::Leaving { Standing::Stale } else { *standing },
            failed: false,
            reachable: false,
        };
        let targets = view.targets.iter().zip(standings).map(known).collect();
        let rules = Replicas {
            view: Arc::new(view),
            nodes,
            targets,
            saving: false,
            dirty,
            saved_with: Vec::new(),
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

    /// Whether every node has a target to go by and nothing is to be done about any.
    pub fn is_settled(&self) -> bool {
        self.nodes.iter().all(|node| node.step == Step::Steady && node.syncing.is_none()) && !self.saving
    }

    /// Takes what happened. Whatever follows is in [`Replicas::poll`] afterwards.
    pub fn handle(&mut self, event: Event, now: Time) {
        match event {
            Event::Report(Report::Failed { target, .. }) => self.targets[target].failed = true,
            Event::Report(Report::Diverged { node }) => self.nodes[node].diverged = true,
            Event::Adopted { node, version } => self.adopted(node, version, now),
            Event::Saved(durable) => self.saved(durable),
            Event::Synced { node, whole } => self.synced(node, whole, now),
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

    /// Servers may clean their logs while every shard works from a view in which all targets of a node are in sync.
    fn permit_points(&self) {
        for (node, state) in self.view.nodes.iter().zip(&self.nodes) {
            let whole = |target: &usize| matches!(self.targets[*target].role, Role::InSync | Role::Absent);
            if let Some(overlap) = &node.overlap {
                overlap.points.permit(state.step == Step::Steady && node.targets.iter().all(whole));
            }
        }
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
        if self.nodes[node].step != Step::Steady || self.leave(node) {
            return;
        }
        if self.nodes[node].syncing.is_none() && self.nodes[node].retry_at <= now {
            self.open(node);
        }
    }

    /// Leaves what has failed; true when there was something.
    fn leave(&mut self, node: usize) -> bool {
        let member = |role: Role| matches!(role, Role::InSync | Role::Syncing);
        let diverged = std::mem::take(&mut self.nodes[node].diverged);
        let in_sync = self.of(node, |target| target.role == Role::InSync);
        let good = in_sync.iter().copied().filter(|target| !self.targets[*target].failed).collect::<Vec<_>>();
        let keepers = if good.is_empty() { &in_sync } else { &good };
        let reachable = keepers.iter().copied().find(|target| self.targets[*target].reachable);
        let keeper = reachable.or_else(|| keepers.first().copied());
        let all_failed = good.is_empty();
        let leaving = self.of(node, |target| member(target.role) && (diverged || target.failed));
        let leaving: Vec<usize> =
            leaving.into_iter().filter(|target| !((diverged || all_failed) && Some(*target) == keeper)).collect();
        for target in self.of(node, |target| target.failed) {
            self.targets[target].failed = false;
        }
        if leaving.is_empty() {
            return false;
        }
        for target in leaving {
            self.targets[target].role = Role::Leaving;
            self.targets[target].standing = Standing::Stale;
        }
        self.nodes[node].step = Step::Leaving { version: self.publish() };
        if self.nodes[node].syncing.is_some() {
            self.stop_sync(node);
        }
        true
    }

    fn stop_sync(&mut self, node: usize) {
        if !std::mem::replace(&mut self.nodes[node].stopping, true) {
            self.effects.push_back(Effect::StopSync { node });
        }
    }

    /// Takes the first stale target that can be asked: from now on it is written where it is copied.
    fn open(&mut self, node: usize) {
        let stale = self.of(node, |target| target.role == Role::Stale && target.reachable);
        let source = self.of(node, |target| target.role == Role::InSync && target.reachable);
        let (Some(target), Some(_)) = (stale.first().copied(), source.first()) else { return };
        self.targets[target].role = Role::Syncing;
        let sectors = self.view.geometry.node_sectors(node);
        let map = Arc::new(SyncMap::new(sectors, self.view.region_sectors));
        let mut view = View::clone(&self.view);
        view.nodes[node].sync = Some(map);
        self.view = Arc::new(view);
        self.nodes[node].syncing = Some(target);
        self.nodes[node].step = Step::Opening { version: self.publish(), target };
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
        for (node, state) in view.nodes.iter_mut().zip(&self.nodes) {
            if state.syncing.is_none() {
                node.sync = None;
            }
        }
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

    fn saved(&mut self, durable: bool) {
        self.saving = false;
        if !durable {
            // Nothing may go on without it; it is tried again.
            self.dirty = true;
            return;
        }
        let saved = std::mem::take(&mut self.saved_with);
        for node in &saved {
            for target in self.view.nodes[*node].targets.clone() {
                let state = &mut self.targets[target];
                state.role = match (state.standing, state.role) {
                    (Standing::InSync, _) => Role::InSync,
                    (Standing::Stale, Role::Syncing) => Role::Syncing,
                    (Standing::Stale, _) => Role::Stale,
                    (Standing::Absent, _) => Role::Absent,
                };
            }
        }
        if !saved.is_empty() {
            let version = self.publish();
            for node in saved {
                self.nodes[node].step = Step::Settling { version };
            }
        }
    }

    fn adopted(&mut self, node: usize, version: u64, now: Time) {
        match self.nodes[node].step {
            Step::Leaving { version: awaited } if awaited <= version => self.record(node),
            Step::Settling { version: awaited } if awaited <= version => self.nodes[node].step = Step::Steady,
            Step::Opening { version: awaited, target } if awaited <= version => {
                self.nodes[node].step = Step::Steady;
                self.begin_sync(node, target, now);
            }
            _ => {}
        }
    }

    fn begin_sync(&mut self, node: usize, target: usize, now: Time) {
        let source = self.of(node, |state| state.role == Role::InSync && state.reachable).first().copied();
        let (Some(source), Some(map)) = (source, self.view.nodes[node].sync.clone()) else {
            return self.synced(node, false, now);
        };
        self.nodes[node].stopping = false;
        self.effects.push_back(Effect::Sync { node, source, target, map });
    }

    fn synced(&mut self, node: usize, whole: bool, now: Time) {
        let Some(target) = self.nodes[node].syncing.take() else { return };
        let pause = self.nodes[node].pause;
        let good = whole && self.targets[target].role == Role::Syncing && !self.targets[target].failed;
        self.nodes[node].pause = if good { RETRY_MIN } else { pause.saturating_mul(2).min(RETRY_MAX) };
        self.nodes[node].retry_at = now.after(if good { Duration::ZERO } else { pause });
        self.nodes[node].stopping = false;
        if good {
            self.targets[target].standing = Standing::InSync;
            self.record(node);
        } else if self.targets[target].role == Role::Syncing {
            self.targets[target].failed = true;
        }
    }
}
