//! The owner of the array and its sync engines: what `roles/array` does with the production rules of replicas.
//!
//! Contract: what is saved takes time, and a daemon that dies meanwhile leaves the old or the new record; shards take a view at
//! any time after it was published.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dst::bugs::{Bug, planted};
use dst::control::replica::Generation;
use dst::engine::copy::{Content, Copied, Copy, CopyConfig, CopyError, Look, Task};
use dst::engine::losses::{Losses, Memory};
use dst::engine::region::SyncMap;
use dst::engine::replicas::{Effect, Event as Told, Replicas, Saved, Standing};
use dst::engine::request::{RequestOp, ShardConfig};
use dst::engine::shard::Shard;
use dst::engine::shared::Shared;
use dst::engine::survey::Marked;
use dst::engine::view::{Node, Role, View, is_logged};
use dst::errno::Errno;
use dst::units::{Id, Lba, Time};

use crate::array::{ARRAY, Host};
use crate::links::State;
use crate::operator::Asked;
use crate::plan::Plan;
use crate::server::id_of;
use crate::world::{Event, MICRO, MILLI, Phase, SECOND, World};

/// How often the owner looks at its shards, and while something is to be done about a replica.
const TICK: u64 = 500 * MILLI;
const TICK_BUSY: u64 = 20 * MILLI;
/// A replica whose server was up for so long must be in sync again.
const REJOIN: u64 = 20 * SECOND;
/// What could not be saved is tried again after so long.
const SAVE_AGAIN: u64 = 100 * MILLI;
/// Regions that a sync engine has under way.
const WINDOWS: usize = 3;

/// What is durably known of the array.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) standings: Vec<Standing>,
    /// Nothing was in flight when it was last served.
    pub(crate) clean: bool,
    /// What is known of machines that lose what they had acknowledged.
    pub(crate) memory: Memory,
    /// What the operator has asked for.
    pub(crate) asked: Asked,
    /// The greatest epoch that was minted.
    pub(crate) epoch: u64,
    /// Of each node, where several hosts may have the array.
    pub(crate) generations: Vec<Generation>,
}

impl Record {
    pub(crate) fn new(plan: &Plan) -> Record {
        let replicas = plan.volumes.len() * plan.copies;
        let standing = |target| if target < replicas { Standing::InSync } else { Standing::Absent };
        let standings = (0..plan.server_of.len()).map(standing).collect();
        let generations = vec![Generation::first(ARRAY); plan.volumes.len()];
        let asked = Asked::new(plan.volumes.len());
        Record { standings, clean: true, memory: Memory::default(), asked, epoch: 0, generations }
    }
}

type Saving = (Vec<(Id, Standing)>, Vec<(Id, Losses)>);

/// The owner's memory.
pub(crate) struct Owner {
    pub(crate) rules: Replicas,
    /// Every view that was published.
    views: Vec<Arc<View>>,
    /// What is being saved.
    saving: Option<Saving>,
    /// By node: what is changed there is in the region logs.
    logged: Vec<bool>,
    /// Nodes whose targets in sync are to know of a change that the record has.
    pub(crate) owed: BTreeSet<usize>,
    /// Labels that are being written, and those that could not be.
    pub(crate) telling: usize,
    pub(crate) untold: Vec<Id>,
    /// By node: the region logs that are asked before its sync begins.
    surveys: BTreeMap<usize, Survey>,
}

/// Region logs that are asked, one after the other.
struct Survey {
    source: usize,
    target: usize,
    map: Arc<SyncMap>,
    task: Task,
    left: Vec<usize>,
    marked: Marked,
    stopped: bool,
}

impl Owner {
    /// `awaited`: destinations of moves that are not attached yet, each with its node and with what it has.
    pub(crate) fn new(view: View, record: &Record, awaited: &[(usize, Standing)], shared: &Shared) -> Owner {
        let ours = |target: &usize| record.standings[*target] != Standing::Absent;
        let known = |target| Some(target).filter(ours).and_then(|at| record.memory.volumes.get(&id_of(at)).copied());
        let known: Vec<Option<Losses>> = (0..record.standings.len()).map(known).collect();
        let mut rules = Replicas::new(view, &record.standings, record.clean).with_losses(&known, shared);
        for (node, _) in record.asked.frozen.iter().enumerate().filter(|(_, deeds)| **deeds > 0) {
            rules.begin_frozen(node);
        }
        let goes_on = |(_, of): &&(usize, Standing)| matches!(of, Standing::Candidate { from } if *from > Lba(0));
        let awaits: Vec<usize> = awaited.iter().filter(goes_on).map(|(node, _)| *node).collect();
        awaits.iter().for_each(|node| rules.await_move(*node));
        let there = |node: &Node| node.targets.iter().filter(|target| ours(target)).count();
        let nodes = rules.view().nodes.iter().enumerate();
        let logged = nodes.map(|(at, node)| is_logged(there(node), awaits.contains(&at))).collect();
        Owner {
            logged,
            views: vec![Arc::clone(rules.view())],
            rules,
            saving: None,
            owed: BTreeSet::new(),
            telling: 0,
            untold: Vec::new(),
            surveys: BTreeMap::new(),
        }
    }
}

/// One node's sync engine, on a host of its own.
pub(crate) struct Syncer {
    pub(crate) rules: Copy,
    pub(crate) node: usize,
    /// That it reads no more was told.
    pub(crate) left: bool,
    copies: bool,
}

impl World {
    /// The owner looks at what its shards know.
    pub(crate) fn owner_tick(&mut self, life: u32) {
        if life != self.daemon.life || !self.hears(Event::OwnerTick { life }) {
            return;
        }
        let shards = &self.daemon.hosts[..self.plan.shards];
        let reachable = |target: usize| shards.iter().all(|host| host.shard.is_up(target));
        let reachable = (0..self.nodes.len()).map(reachable).collect();
        let settled = self.daemon.owner.as_ref().is_some_and(|owner| owner.rules.is_settled());
        self.queue.push(self.now + if settled { TICK } else { TICK_BUSY }, Event::OwnerTick { life });
        if let (Some(owner), Some(shared)) = (&mut self.daemon.owner, &self.daemon.shared) {
            owner.rules.look_at_losses(shared);
        }
        self.owner_hears(life, Told::Tick(reachable));
        if !self.hosts.is_former() {
            self.accept_losses();
        }
    }

    pub(crate) fn owner_hears(&mut self, life: u32, told: Told) {
        if life != self.daemon.life {
            return;
        }
        if let Told::Report(report) = told
            && !self.hears(Event::Reported { life, report })
        {
            return;
        }
        let Some(owner) = &mut self.daemon.owner else { return };
        if !matches!(told, Told::Tick(_)) {
            self.trace.say(self.now, || format!("  owner hears {told:?}"));
        }
        owner.rules.handle(told, Time(self.now));
        while let Some(effect) = self.daemon.owner.as_mut().and_then(|owner| owner.rules.poll()) {
            self.obey(life, effect);
        }
    }

    fn obey(&mut self, life: u32, effect: Effect) {
        let Some(owner) = &mut self.daemon.owner else { return };
        match effect {
            Effect::Publish(view) => {
                let version = view.version;
                let roles: Vec<Role> = view.targets.iter().map(|target| target.role).collect();
                self.trace.note(self.now, 240, version);
                self.trace.say(self.now, || format!("  owner: view {version} {roles:?}"));
                owner.views.push(Arc::clone(&view));
                self.show_view(&view);
                for shard in 0..self.plan.shards {
                    let late = if self.rng.one_in(8) { 50 * MILLI } else { MILLI };
                    let at = self.now + self.rng.below(late);
                    self.queue.push(at, Event::Adopt { life, shard, version });
                }
            }
            Effect::Save(standings) => {
                self.trace.say(self.now, || format!("  owner saves {standings:?}"));
                let losses = self.daemon.shared.as_ref().map(|shared| owner.rules.losses(shared)).unwrap_or_default();
                owner.saving = Some((standings.clone(), losses));
                self.check_commit(&standings);
                // Long enough, now and then, for much to happen before it is durable.
                let longest = if self.rng.one_in(4) { 400 * MILLI } else { 10 * MILLI };
                let at = self.now + self.rng.below(longest);
                self.queue.push(at, Event::Recorded { life });
            }
            Effect::Forgive { target } => {
                if let Some(shared) = &self.daemon.shared {
                    shared.target(target).forget_loss();
                }
            }
            Effect::Sync { node, source, target, map, task, .. } if map.needs_survey() => {
                self.begin_survey(life, node, (source, target), map, task);
            }
            Effect::Sync { node, source, target, map, task, .. } => self.begin_sync(node, (source, target), map, task),
            Effect::Flush { ticket, target } => {
                self.daemon.hosts[0].shard.flush_target(Time(self.now), ticket, target);
                self.turn(0);
            }
            Effect::Attach { target, volume, known, logged, .. } => {
                if id_of(target) != volume {
                    self.fail("attach", format!("slot {target} is given another volume"));
                }
                if let Some(shared) = &self.daemon.shared {
                    shared.target(target).renew();
                    known.into_iter().for_each(|known| shared.target(target).begin(known));
                }
                if logged {
                    self.log_from_now_on(target);
                }
            }
            Effect::Tell(news) => self.hears_news(news),
            Effect::StopSync { node } => {
                let late = if self.rng.one_in(8) { 50 * MILLI } else { MILLI };
                let at = self.now + self.rng.below(late);
                self.queue.push(at, Event::StopSync { life, node });
            }
        }
    }

    /// The servers of a node's targets write down what is changed, before a further one is written.
    fn log_from_now_on(&mut self, target: usize) {
        let node = self.plan.node_of(target);
        let Some(owner) = &mut self.daemon.owner else { return };
        if std::mem::replace(&mut owner.logged[node], true) || self.plan.logged {
            return;
        }
        for shard in 0..self.plan.shards {
            let host = &mut self.daemon.hosts[shard];
            for other in host.shard.siblings(target) {
                host.shard.reconnect(other);
            }
            self.turn(shard);
        }
    }

    /// Whether sessions of a target ask for a region log.
    pub(crate) fn logs(&self, target: usize) -> bool {
        let logged = |owner: &Owner| owner.logged[self.plan.node_of(target)];
        self.plan.logged || self.daemon.owner.as_ref().is_some_and(logged)
    }

    /// A sync engine hears that it is to end.
    pub(crate) fn stop_sync(&mut self, life: u32, node: usize) {
        if life != self.daemon.life || !self.hears(Event::StopSync { life, node }) {
            return;
        }
        let Some(owner) = &mut self.daemon.owner else { return };
        if let Some(survey) = owner.surveys.get_mut(&node) {
            survey.stopped = true;
            return;
        }
        if let Some(syncer) = &mut self.daemon.hosts[self.plan.shards + node].syncer {
            syncer.rules.stop();
        }
        self.turn(self.plan.shards + node);
    }

    /// The record is durable.
    pub(crate) fn recorded(&mut self, life: u32) {
        if life != self.daemon.life || !self.hears(Event::Recorded { life }) {
            return;
        }
        let before = self.record.standings.clone();
        self.record_durable();
        let in_sync = |standings: &[Standing], target: usize| standings[target] == Standing::InSync;
        let changed = |node: &usize| {
            self.targets_of(*node).any(|target| in_sync(&before, target) != in_sync(&self.record.standings, target))
        };
        let changed: Vec<usize> = (0..self.plan.volumes.len()).filter(changed).collect();
        if self.plan.hosts {
            return self.write_labels(life, &changed);
        }
        // Each of those in sync is to know who is; a server that is not there cannot be told.
        let untold = |node: usize| {
            let in_sync = self.targets_of(node).filter(|target| in_sync(&self.record.standings, *target));
            in_sync.filter(|target| !self.servers[self.nodes[*target].server].answers()).map(id_of).collect::<Vec<Id>>()
        };
        let owed = self.daemon.owner.as_ref().map(|owner| owner.owed.clone()).unwrap_or_default();
        let owed: BTreeSet<usize> = owed.into_iter().chain(changed).filter(|node| !untold(*node).is_empty()).collect();
        let untold: Vec<Id> = owed.iter().flat_map(|node| untold(*node)).collect();
        if let Some(owner) = &mut self.daemon.owner {
            owner.owed = owed;
        }
        if untold.is_empty() {
            return self.owner_hears(life, Told::Saved(Saved::All));
        }
        self.queue.push(self.now + SAVE_AGAIN, Event::SaveAgain { life });
        self.owner_hears(life, Told::Saved(Saved::AllBut(untold)));
    }

    pub(crate) fn save_again(&mut self, life: u32) {
        if life == self.daemon.life && self.hears(Event::SaveAgain { life }) {
            self.owner_hears(life, Told::Saved(Saved::Nothing));
        }
    }

    fn record_durable(&mut self) {
        if let Some((standings, losses)) = self.daemon.owner.as_mut().and_then(|owner| owner.saving.take()) {
            let before = self.record.standings.clone();
            for (volume, standing) in standings {
                if let Some(target) = self.target_of(volume) {
                    self.record.standings[target] = standing;
                }
            }
            if self.plan.hosts {
                self.name_sets(&before);
            }
            for (volume, losses) in losses {
                self.record.memory.keep(volume, losses);
            }
            let standings = &self.record.standings;
            let is_ours =
                |volume| (0..standings.len()).any(|of| id_of(of) == volume && standings[of] != Standing::Absent);
            self.record.memory.retain(is_ours);
            if !self.hosts.is_former() {
                self.condemn();
                self.see_slow();
            }
        }
    }

    /// The daemon dies while something is saved: the disk has the old or the new record.
    pub(crate) fn owner_dies(&mut self) {
        if self.rng.percent(50) {
            self.record_durable();
        }
        self.daemon.owner = None;
    }

    pub(crate) fn adopt(&mut self, life: u32, shard: usize, version: u64) {
        if life != self.daemon.life || !self.hears(Event::Adopt { life, shard, version }) {
            return;
        }
        let views = self.daemon.owner.as_ref().map(|owner| &owner.views);
        let view = views.and_then(|views| views.iter().find(|view| view.version == version)).cloned();
        if let Some(view) = view {
            self.daemon.hosts[shard].shard.adopt(Time(self.now), view);
            self.turn(shard);
        }
    }

    pub(crate) fn look(&mut self, life: u32, shard: usize) {
        if life == self.daemon.life && self.hears(Event::Look { life, shard }) {
            self.stats.wakes += 1;
            self.daemon.hosts[shard].shard.look(Time(self.now));
            self.turn(shard);
        }
    }

    /// What a shard has to say to the owner and to other shards.
    pub(crate) fn forward(&mut self, shard: usize) {
        let life = self.daemon.life;
        while let Some((ticket, durable)) = self.daemon.hosts[shard].shard.poll_flushed() {
            self.owner_hears(life, Told::Flushed { ticket, durable });
        }
        while let Some(report) = self.daemon.hosts[shard].shard.poll_report() {
            let at = self.now + self.rng.below(MILLI);
            self.queue.push(at, Event::Reported { life, report });
        }
        while let Some(other) = self.daemon.hosts[shard].shard.poll_wake() {
            self.wake_shards(1 << other);
        }
        while shard < self.plan.shards
            && let Some((node, version)) = self.daemon.hosts[shard].shard.poll_ack()
        {
            self.daemon.hosts[shard].acked[node] = version;
            let version = self.daemon.hosts[..self.plan.shards].iter().map(|host| host.acked[node]).min().unwrap_or(0);
            self.owner_hears(life, Told::Adopted { node, version });
        }
    }

    fn wake_shards(&mut self, shards: u32) {
        let life = self.daemon.life;
        for shard in (0..self.plan.shards).filter(|shard| shards & 1 << shard != 0) {
            let at = self.now + self.rng.below(50 * MICRO);
            self.queue.push(at, Event::Look { life, shard });
        }
    }

    /// The logs of those in sync that can be asked, and the target's own.
    fn begin_survey(
        &mut self,
        life: u32,
        node: usize,
        (source, target): (usize, usize),
        map: Arc<SyncMap>,
        task: Task,
    ) {
        let up = |other: usize| self.daemon.hosts[..self.plan.shards].iter().all(|host| host.shard.is_up(other));
        let Some(owner) = &self.daemon.owner else { return };
        let of = self.targets_of(node);
        let asked = |other: &usize| {
            let own = *other == target && !planted(Bug::StaleMarksIgnored);
            own || *other == source || (owner.rules.role(*other) == Role::InSync && up(*other))
        };
        let left = of.filter(asked).collect();
        let survey = Survey { source, target, map, task, left, marked: Marked::default(), stopped: false };
        if let Some(owner) = &mut self.daemon.owner {
            owner.surveys.insert(node, survey);
        }
        self.ask_later(life, node);
    }

    fn ask_later(&mut self, life: u32, node: usize) {
        let longest = if self.rng.one_in(4) { 200 * MILLI } else { MILLI };
        let at = self.now + self.rng.below(longest);
        self.queue.push(at, Event::Survey { life, node });
    }

    /// The next log is asked, or all were.
    pub(crate) fn survey(&mut self, life: u32, node: usize) {
        if life != self.daemon.life || !self.hears(Event::Survey { life, node }) {
            return;
        }
        let Some(mut survey) = self.daemon.owner.as_mut().and_then(|owner| owner.surveys.remove(&node)) else { return };
        let Some(target) = survey.left.pop().filter(|_| !survey.stopped) else {
            if survey.stopped {
                return self.owner_hears(life, Told::Synced { node, result: Err(CopyError::Stopped) });
            }
            survey.map.mark(&survey.marked);
            self.trace.say(self.now, || format!("  logs of node {node}: {:?}", survey.marked));
            return self.begin_sync(node, (survey.source, survey.target), survey.map, survey.task);
        };
        match self.ask_log(target) {
            Ok(marked) => {
                survey.marked.join(&marked);
                if let Some(owner) = &mut self.daemon.owner {
                    owner.surveys.insert(node, survey);
                }
                self.ask_later(life, node);
            }
            // It is asked again.
            Err(_) => {
                let result = Err(CopyError::Source(Lba(0), Errno::ETIMEDOUT));
                self.owner_hears(life, Told::Synced { node, result });
            }
        }
    }

    /// Begins to copy.
    fn begin_sync(&mut self, node: usize, (source, target): (usize, usize), map: Arc<SyncMap>, task: Task) {
        let copies = matches!(task, Task::Copy { .. });
        if copies {
            self.copies(node);
        }
        let Some(owner) = &self.daemon.owner else { return };
        let shard = self.plan.shards + node;
        let (targets, logged) = task.targets(owner.rules.view(), source, target);
        let view = owner.rules.view().for_copying(&targets);
        let Some(overlap) = view.nodes[node].overlap.clone() else { return };
        let Some(shared) = self.daemon.shared.clone() else { return };
        // What has to be filled takes long enough for something to happen meanwhile.
        // When all is to become well again nothing is slowed down: what was filled may have to be filled anew when a move has ended.
        let rates = match (self.plan.used_before, self.plan.spares) {
            (_, 1..) if self.phase != Phase::Work => [0; 3],
            (true, _) => [1 << 15, 1 << 16, 1 << 20],
            (false, 0) => [0, 0, 1 << 20],
            (false, _) => [0, 1 << 16, 1 << 20],
        };
        let rate = self.rng.pick(&rates);
        let checkpoint = Duration::from_nanos(self.rng.pick(&[MILLI, 10 * MILLI]));
        let config = CopyConfig { task, source, target, shard: self.plan.shards, windows: WINDOWS, rate, checkpoint };
        let sequence = self.daemon.hosts[shard].shard.sequence();
        let mut host = self.sync_host(&Arc::new(view), &shared, sequence);
        host.syncer = Some(Syncer { rules: Copy::new(config, map, overlap), node, left: false, copies });
        host.logged = logged;
        host.timer = self.now;
        self.daemon.hosts[shard] = host;
        self.queue.push(self.now, Event::Timer { life: self.daemon.life, shard });
    }

    /// A host for a sync engine; without one it does nothing.
    pub(crate) fn sync_host(&self, view: &Arc<View>, shared: &Arc<Shared>, sequence: u32) -> Host {
        let io_timeout = Duration::from_nanos(self.plan.io_timeout / 4);
        let config = ShardConfig { index: self.plan.shards, depth: WINDOWS, io_timeout };
        let shard = Shard::after(config, Arc::clone(view), Arc::clone(shared), sequence);
        Host::new(shard, self.nodes.len(), self.plan.volumes.len(), WINDOWS)
    }

    /// Moves a sync engine on: its requests in, its results out. Whether anything moved.
    pub(crate) fn sync_turn(&mut self, shard: usize) -> bool {
        let now = Time(self.now);
        let region = usize::try_from(self.plan.region).unwrap_or(0);
        let host = &mut self.daemon.hosts[shard];
        let Some(syncer) = &mut host.syncer else { return false };
        let mut moved = false;
        while let Some((tag, result)) = host.shard.poll_complete() {
            let buffer = &host.buffers[usize::from(tag.0)];
            let content = match syncer.rules.looks_at(tag) {
                Look::ForZeros if !buffer.is_empty() && buffer.iter().all(|value| *value == 0) => Content::Zeros,
                Look::ForDigest => Content::Digest(digest(buffer.first().copied().unwrap_or(0))),
                _ => Content::Unknown,
            };
            syncer.rules.complete(tag, result, content);
            moved = true;
        }
        while let Some((tag, request)) = syncer.rules.next_request(now) {
            let buffer = &mut host.buffers[usize::from(tag.0)];
            if request.op == RequestOp::Read {
                buffer.clear();
                buffer.resize(region.min(usize::try_from(request.extent.sectors).unwrap_or(region)), u64::MAX);
            }
            host.shard.handle_request(now, tag, request);
            moved = true;
        }
        while let Some(tag) = syncer.rules.poll_abandoned() {
            host.shard.abandon(tag, Errno::ECANCELED);
            moved = true;
        }
        let wakes = syncer.rules.poll_wake();
        let outcome = syncer.rules.outcome();
        let node = syncer.node;
        let left =
            syncer.rules.has_left_source() && !std::mem::replace(&mut syncer.left, syncer.rules.has_left_source());
        self.wake_shards(wakes);
        if left {
            self.owner_hears(self.daemon.life, Told::SourceLeft { node });
        }
        if let Some(outcome) = outcome {
            self.trace.say(self.now, || format!("  sync of node {node} has ended: {outcome:?}"));
            self.end_sync(shard, node, outcome);
        }
        moved
    }

    fn end_sync(&mut self, shard: usize, node: usize, result: Result<Copied, CopyError>) {
        if self.daemon.hosts[shard].syncer.take().is_some_and(|syncer| syncer.copies) {
            self.copies(node);
        }
        let open: Vec<usize> = self.daemon.hosts[shard]
            .links
            .iter()
            .filter(|link| link.state != State::Idle)
            .map(|link| link.conn)
            .collect();
        for conn in open {
            self.hang_up_client(conn, true);
        }
        if let (Some(owner), Some(shared)) = (&self.daemon.owner, self.daemon.shared.clone()) {
            let view = idle(owner.rules.view());
            let sequence = self.daemon.hosts[shard].shard.sequence();
            self.daemon.hosts[shard] = self.sync_host(&view, &shared, sequence);
        }
        self.owner_hears(self.daemon.life, Told::Synced { node, result });
    }

    /// Whether a target's server was up for so long that all must be well again.
    pub(crate) fn has_rejoined(&self, target: usize) -> bool {
        let server = &self.servers[self.nodes[target].server];
        server.up && server.since + REJOIN < self.now
    }

    /// All replicas that count as in sync hold the same; and once nothing hinders it, all of them are in sync.
    pub(crate) fn check_replicas(&mut self) {
        let Some(owner) = &self.daemon.owner else { return };
        if !self.plan.is_plural() || self.verdict.is_err() {
            return;
        }
        let mut found = None;
        for node in 0..self.plan.volumes.len() {
            let known = |target: &usize| {
                !matches!(self.record.standings[*target], Standing::Candidate { .. } | Standing::Absent)
            };
            let targets: Vec<usize> = self.targets_of(node).filter(known).collect();
            let in_sync: Vec<usize> =
                targets.iter().copied().filter(|target| owner.rules.role(*target) == Role::InSync).collect();
            if in_sync.len() < targets.len()
                && self.plan.rates.sync_eio == 0
                && targets.iter().all(|target| self.has_rejoined(*target))
            {
                found = Some(("liveness", format!("of node {node} only the targets {in_sync:?} are in sync")));
            }
            let used = usize::try_from(self.plan.used[node]).unwrap_or(0);
            for pair in in_sync.windows(2) {
                let (one, other) = (self.nodes[pair[0]].content(), self.nodes[pair[1]].content());
                let flipped = self.flipped(node);
                let counts = |sector: usize| !flipped.contains(&(sector as u64));
                if let Some(sector) = (0..used).find(|sector| one[*sector] != other[*sector] && counts(*sector)) {
                    found = Some((
                        "replicas",
                        format!("targets {} and {} differ in sector {sector} of node {node}", pair[0], pair[1]),
                    ));
                }
            }
        }
        if let Some((rule, text)) = found {
            self.fail(rule, text);
        }
    }
}

fn digest(first: u64) -> [u8; 32] {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&first.to_le_bytes());
    digest
}

/// A view in which nothing is attached.
pub(crate) fn idle(view: &View) -> Arc<View> {
    let mut view = view.clone();
    view.targets.iter_mut().for_each(|target| target.role = Role::Absent);
    Arc::new(view)
}
