//! The scrub of a node: when it runs, what it waits for, and what follows from how it ended.
//!
//! ```text
//! wanted --nothing else is under way, two replicas in sync--> opened{view} --adopted--> compared, region by region --> told
//! ```
//!
//! It makes way for a resync, a move and a suspend of its node, and goes on afterwards where it was; from the beginning, if one
//! of the replicas that were compared was left meanwhile, or another one has come. What holds: a replica that is left becomes durably
//! stale only when nothing is compared with it any more, else what was written since would look like a fault of a disk, and a repair
//! that goes by it would undo that; and writes wait at its windows, else it would wait for a region that is always written. One on which a repair has failed is left, and filled from the beginning: nobody
//! knows what it has.

use std::sync::Arc;

use super::{Effect, Freeze, Job, Replicas, Standing, Step};
use crate::engine::copy::{Copied, CopyError, Task};
use crate::engine::region::SyncMap;
use crate::engine::scrub::{Repair, Scrub, Tally};
use crate::engine::steer::{News, ScrubError, ScrubOrder, ScrubWait, Scrubbed};
use crate::engine::view::{Role, View};
use crate::limits;
use crate::units::{Id, Time};

/// A node's scrub.
#[derive(Clone, Debug)]
pub(super) struct Scrubbing {
    order: ScrubOrder,
    /// Those that are compared.
    members: Vec<usize>,
    map: Arc<SyncMap>,
    tally: Arc<Tally>,
    /// One of them was left: what was compared is of no use.
    again: bool,
    /// It is to end.
    ending: Option<ScrubError>,
    waits: Option<ScrubWait>,
}

/// What may be seen of it.
#[derive(Clone, Debug)]
pub struct ScrubShown {
    /// Regions that were compared are `Done`.
    pub map: Arc<SyncMap>,
    /// What was found.
    pub tally: Arc<Tally>,
    /// What it waits for.
    pub waits: Option<ScrubWait>,
}

/// What a scrub does next.
enum Next {
    Go(Vec<usize>),
    Wait(ScrubWait),
    End(ScrubError),
}

impl Replicas {
    /// How a node's scrub goes.
    pub fn scrub_shown(&self, node: usize) -> Option<ScrubShown> {
        let scrub = self.nodes[node].scrub.as_ref()?;
        Some(ScrubShown { map: Arc::clone(&scrub.map), tally: Arc::clone(&scrub.tally), waits: scrub.waits })
    }

    pub(super) fn begin_scrub(&mut self, order: ScrubOrder) {
        let Some(state) = self.nodes.get_mut(order.node) else { return };
        if state.scrub.is_none() {
            let map = Arc::new(SyncMap::new(0, 1));
            let (members, tally) = (Vec::new(), Arc::default());
            state.scrub = Some(Scrubbing { order, members, map, tally, again: false, ending: None, waits: None });
        }
    }

    pub(super) fn end_scrub(&mut self, node: usize) {
        if let Some(scrub) = self.nodes.get_mut(node).and_then(|state| state.scrub.as_mut()) {
            scrub.ending.get_or_insert(ScrubError::Aborted);
        }
    }

    /// Whether a sync engine of a node reads from a target now.
    pub(super) fn reads(&self, node: usize, target: usize) -> bool {
        let state = &self.nodes[node];
        match state.job {
            Job::None => false,
            Job::Running { source } => source == target,
            Job::Stopping { source, reads } => reads && source == target,
            Job::Scrubbing { .. } => state.scrub.as_ref().is_some_and(|scrub| scrub.members.contains(&target)),
        }
    }

    /// A target of a node is left: what was compared with it is of no use.
    pub(super) fn scrub_again(&mut self, node: usize) {
        if let Some(scrub) = &mut self.nodes[node].scrub {
            scrub.again = true;
        }
    }

    /// Whether the windows of a node are those of its scrub.
    pub(super) fn is_open_for_scrub(&self, node: usize) -> bool {
        let windows = self.view.nodes[node].sync.as_ref();
        let scrub = self.nodes[node].scrub.as_ref();
        windows.zip(scrub).is_some_and(|(windows, scrub)| Arc::ptr_eq(windows, &scrub.map))
    }

    /// What a node's scrub does now.
    fn next_of_scrub(&self, node: usize, now: Time) -> Option<Next> {
        let state = &self.nodes[node];
        let scrub = state.scrub.as_ref()?;
        if let Some(error) = scrub.ending {
            return Some(Next::End(error));
        }
        let replicas = self
            .of(node, |target| target.role != Role::Absent && target.gone.is_none() && !target.standing.is_candidate());
        let in_sync = self.of(node, |target| target.role == Role::InSync && target.gone.is_none());
        let named = |id: Id| self.slot(node, id).filter(|target| replicas.contains(target));
        let source = match scrub.order.repair {
            Repair::From(id) => Some(named(id)),
            Repair::No | Repair::Majority => None,
        };
        let least = if scrub.order.repair == Repair::Majority { limits::REPLICAS_MAX } else { 2 };
        let lacking = |target: &usize| self.targets[*target].role == Role::Stale && self.targets[*target].reachable;
        Some(if replicas.len() < least || source == Some(None) {
            Next::End(if source == Some(None) { ScrubError::SourceGone } else { ScrubError::Alone })
        } else if state.freeze != Freeze::Open {
            Next::Wait(ScrubWait::Suspended)
        } else if state.moving.is_some() {
            Next::Wait(ScrubWait::Moving)
        } else if state.syncing.is_some() || replicas.iter().any(lacking) {
            Next::Wait(ScrubWait::Syncing)
        } else if in_sync.len() < least || source.flatten().is_some_and(|source| !in_sync.contains(&source)) {
            Next::Wait(ScrubWait::NotInSync)
        } else if state.retry_at > now || in_sync.iter().any(|target| !self.targets[*target].reachable) {
            Next::Wait(ScrubWait::Unreachable)
        } else if state.job == Job::None && self.scrubs_running() >= limits::SCRUBS_AT_ONCE {
            Next::Wait(ScrubWait::Turn)
        } else {
            Next::Go(in_sync)
        })
    }

    fn scrubs_running(&self) -> usize {
        self.nodes.iter().filter(|state| matches!(state.job, Job::Scrubbing { .. })).count()
    }

    /// Moves a node's scrub on. Called while nothing else is changing there.
    pub(super) fn run_scrub(&mut self, node: usize, now: Time) {
        let Some(next) = self.next_of_scrub(node, now) else { return };
        let job = self.nodes[node].job;
        let running = matches!(job, Job::Scrubbing { .. });
        if let Some(scrub) = &mut self.nodes[node].scrub {
            scrub.waits = if let Next::Wait(wait) = next { Some(wait) } else { None };
        }
        match next {
            Next::End(error) if job == Job::None => self.tell_scrubbed(node, Some(error)),
            Next::End(_) | Next::Wait(_) if running => self.stop_job(node),
            Next::Go(members) if running => {
                if self.nodes[node].scrub.as_ref().is_some_and(|scrub| scrub.again || scrub.members != members) {
                    self.stop_job(node);
                }
            }
            Next::Go(members) if job == Job::None => self.go_on_scrubbing(node, members),
            Next::End(_) | Next::Wait(_) | Next::Go(_) => {}
        }
    }

    fn go_on_scrubbing(&mut self, node: usize, members: Vec<usize>) {
        let (sectors, grain) = (self.view.geometry.node_sectors(node), self.view.region_sectors);
        let Some(scrub) = &mut self.nodes[node].scrub else { return };
        if scrub.again || scrub.members != members {
            (scrub.again, scrub.members, scrub.tally) = (false, members, Arc::default());
            scrub.map = Arc::new(SyncMap::new(sectors, grain));
        }
        let map = Arc::clone(&scrub.map);
        if !self.is_open_for_scrub(node) {
            // Every shard is to know of the windows before the first one is opened.
            let mut view = View::clone(&self.view);
            view.nodes[node].sync = Some(map);
            view.nodes[node].changed = view.version + 1;
            self.view = Arc::new(view);
            self.nodes[node].step = Step::Opening { version: self.publish() };
            return;
        }
        self.start_scrub(node);
    }

    fn start_scrub(&mut self, node: usize) {
        let volume = |target: &usize| (*target, self.view.targets[*target].volume);
        let Some(scrub) = &self.nodes[node].scrub else { return };
        let (map, tally, ScrubOrder { repair, rate, .. }) =
            (Arc::clone(&scrub.map), Arc::clone(&scrub.tally), scrub.order);
        let members: Vec<(usize, Id)> = scrub.members.iter().map(volume).collect();
        let [(source, _), (target, _), ..] = members[..] else { return };
        let task = Task::Scrub(Scrub { members, repair, tally });
        self.nodes[node].job = Job::Scrubbing { stopping: false };
        self.effects.push_back(Effect::Sync { node, source, target, map, task, rate });
    }

    /// The sync engine of a node's scrub has ended.
    pub(super) fn scrub_ended(&mut self, node: usize, result: Result<Copied, CopyError>, now: Time) {
        self.nodes[node].job = Job::None;
        match result {
            Ok(_) if self.nodes[node].scrub.as_ref().is_some_and(|scrub| !scrub.again) => {
                self.tell_scrubbed(node, None);
            }
            // It goes on where it was, when it may.
            Ok(_) | Err(CopyError::Stopped) => {}
            Err(CopyError::Repair(target, errno)) => {
                let state = &mut self.targets[target];
                (state.failed, state.refill) = (true, true);
                let volume = self.view.targets[target].volume;
                self.tell_scrubbed(node, Some(ScrubError::Repair(volume, errno)));
            }
            Err(CopyError::Source(_, _) | CopyError::Target(_) | CopyError::Different(_)) => {
                self.wait_longer(node, now);
            }
        }
        self.left(node);
    }

    fn tell_scrubbed(&mut self, node: usize, error: Option<ScrubError>) {
        let Some(scrub) = self.nodes[node].scrub.take() else { return };
        self.nodes[node].pause = limits::SYNC_RETRY_MIN;
        let Scrubbing { map, tally, .. } = scrub;
        let (regions, left) = (map.regions() as u64, map.left());
        let scrubbed = Scrubbed { regions, compared: regions - left, findings: tally.findings(), error };
        self.tell(News::Scrubbed { node, scrubbed });
    }

    /// What is known of a target on which a repair has failed.
    pub(super) fn refilled(&mut self, target: usize) -> Option<Standing> {
        std::mem::take(&mut self.targets[target].refill).then_some(Standing::Filling { from: crate::units::Lba(0) })
    }

    /// Whether a target of a node on which a repair has failed is still to be left: the window on what was sent there stays.
    pub(super) fn awaits_refill(&self, node: usize) -> bool {
        self.view.nodes[node].targets.iter().any(|target| self.targets[*target].refill)
    }

    /// No shard need look at windows any more that nobody opens.
    pub(super) fn close_windows(&mut self, node: usize) {
        let idle = self.nodes[node].syncing.is_none() && self.nodes[node].scrub.is_none();
        if idle && self.view.nodes[node].sync.is_some() && !self.awaits_refill(node) {
            self.publish();
        }
    }
}
