//! The array's daemon: what `roles/array` is in production, around the production shards, and the clients of its device.
//!
//! Contract: a read's buffer is full of rubbish until its data comes; a tag is used again only when its request has ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::LinkCommand;
use dst::engine::replicas::Standing;
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::Shard;
use dst::engine::shared::Shared;
use dst::engine::view::View;
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::units::{Epoch, Extent, Id, Time};

use crate::judge::{OpId, What};
use crate::links::{Link, State};
use crate::owner::{Owner, Record, Syncer};
use crate::plan::Layout;
use crate::server::id_of;
use crate::world::{Event, MILLI, Phase, World};

/// The array.
pub(crate) const ARRAY: Id = Id([0xaa; 16]);
/// What a buffer holds before it is filled: nobody's data.
pub(crate) const RUBBISH: u64 = u64::MAX;

/// What is aborted has ended after this, ns.
const STOP_TIME: u64 = 100 * MILLI;

/// The daemon's process.
pub(crate) struct Daemon {
    up: bool,
    pub(crate) life: u32,
    /// Of its claim.
    pub(crate) epoch: u64,
    /// Where it runs.
    pub(crate) machine: usize,
    /// Tells daemons apart that several hosts have at the same time.
    pub(crate) number: u32,
    /// Which boot of its machine this is.
    pub(crate) boot: u8,
    /// It is being stopped and takes no more requests.
    stopping: bool,
    /// Reasons why it stands still.
    pub(crate) paused: u32,
    /// What happens to it when it goes on.
    later: Vec<Event>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) owner: Option<Owner>,
    pub(crate) shared: Option<Arc<Shared>>,
    /// What is asked in a sweep, in order.
    pub(crate) script: VecDeque<(What, u64, u64)>,
}

/// One I/O thread.
pub(crate) struct Host {
    pub(crate) shard: Shard,
    pub(crate) links: Vec<Link>,
    pub(crate) buffers: Vec<Vec<u64>>,
    /// The request of each tag.
    asked: Vec<Option<(OpId, What, u64)>>,
    free: Vec<u16>,
    /// Clients that want to ask something.
    idle: usize,
    /// When its timer goes off.
    pub(crate) timer: u64,
    /// Per node, the view that it has told to have adopted.
    pub(crate) acked: Vec<u64>,
    /// What it changes is marked in the region logs.
    pub(crate) logged: bool,
    /// It is a sync engine's.
    pub(crate) syncer: Option<Syncer>,
}

impl Host {
    pub(crate) fn new(shard: Shard, targets: usize, nodes: usize, depth: usize) -> Host {
        Host {
            shard,
            links: (0..targets).map(|_| Link::down()).collect(),
            buffers: vec![Vec::new(); depth],
            asked: vec![None; depth],
            free: (0..u16::try_from(depth).unwrap_or(0)).rev().collect(),
            idle: 0,
            timer: u64::MAX,
            acked: vec![0; nodes],
            logged: true,
            syncer: None,
        }
    }
}

impl Daemon {
    pub(crate) fn off() -> Daemon {
        let script = VecDeque::new();
        Daemon {
            up: false,
            life: 0,
            epoch: 1,
            machine: 0,
            number: 0,
            boot: 1,
            stopping: false,
            paused: 0,
            later: Vec::new(),
            hosts: Vec::new(),
            owner: None,
            shared: None,
            script,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up
    }

    /// Its process is no more: what it had is gone.
    pub(crate) fn ends(&mut self) -> Vec<usize> {
        let links = self.hosts.iter().flat_map(|host| &host.links);
        let open = links.filter(|link| link.state != State::Idle).map(|link| link.conn).collect();
        (self.up, self.stopping) = (false, false);
        self.hosts.clear();
        self.later.clear();
        open
    }

    /// Connections that are in use.
    pub(crate) fn connections(&self) -> Vec<usize> {
        let links = self.hosts.iter().flat_map(|host| &host.links);
        links.filter(|link| matches!(link.state, State::Greeting | State::Streaming)).map(|link| link.conn).collect()
    }
}

impl World {
    /// The daemon begins its life: every link is down.
    pub(crate) fn daemon_start(&mut self, life: u32) {
        if self.daemon.up || self.daemon.life != life {
            return;
        }
        if self.plan.hosts {
            return self.start_here();
        }
        let Some(late) = self.muster() else {
            self.queue.push(self.now + 10 * MILLI, Event::DaemonStart { life });
            return;
        };
        self.daemon.epoch = u64::from(life) + 1;
        self.serve(&self.record.clone(), late, life > 0);
    }

    /// From now on the daemon serves what `record` says; these nodes are late.
    pub(crate) fn serve(&mut self, record: &Record, late: Vec<usize>, again: bool) {
        let life = self.daemon.life;
        self.daemon.up = true;
        self.trace.note(self.now, 200, u64::from(life));
        self.trace.say(self.now, || format!("the daemon serves, life {life}"));
        let nodes = self.nodes.len();
        let geometry = match self.plan.layout {
            Layout::Linear => Geometry::linear(&self.plan.volumes),
            Layout::Striped { chunk } => Geometry::striped(chunk, &self.plan.volumes),
        };
        let Ok(geometry) = geometry else { return self.fail("layout", "no such geometry".to_owned()) };
        if geometry.sectors() != self.plan.sectors() {
            return self.fail("layout", format!("the array has {} sectors", geometry.sectors()));
        }
        let replicas = self.plan.volumes.len() * self.plan.copies;
        let targets: Vec<Id> = (0..replicas).map(id_of).collect();
        let volumes: Vec<Vec<Id>> = targets.chunks(self.plan.copies).map(<[Id]>::to_vec).collect();
        let view = View::new(geometry, &volumes, Epoch(self.daemon.epoch));
        let mut view = view.with_spares(self.plan.copies + self.plan.spares);
        let mut known = record.clone();
        for node in late {
            self.stats.late += 1;
            self.trace.note(self.now, 250, node as u64);
            self.trace.say(self.now, || format!("  node {node} is late"));
            self.targets_of(node).for_each(|target| known.standings[target] = Standing::Absent);
            self.queue.push(self.now + self.rng.below(100 * MILLI), Event::LookForLate { life, node });
        }
        let awaited = self.awaited();
        let awaited: Vec<(usize, Standing)> = awaited
            .into_iter()
            .map(|(node, to)| (node, std::mem::replace(&mut known.standings[to], Standing::Absent)))
            .collect();
        for (target, standing) in known.standings.iter().enumerate() {
            view.targets[target].volume = if *standing == Standing::Absent { Id::NIL } else { id_of(target) };
        }
        view.target_timeout = Duration::from_nanos(self.plan.patience);
        view.region_sectors = self.plan.region;
        view.replica_timeout = Duration::from_nanos(self.plan.patience);
        let shared = Arc::new(Shared::with_sync(nodes, self.plan.shards, 1));
        let owner = Owner::new(view, &known, &awaited, &shared);
        let view = Arc::clone(owner.rules.view());
        self.show_view(&view);
        self.daemon.hosts = (0..self.plan.shards).map(|index| self.host(index, &view, &shared)).collect();
        if self.plan.is_plural() {
            let syncers = (0..self.plan.volumes.len()).map(|_| self.sync_host(&crate::owner::idle(&view), &shared, 0));
            let syncers: Vec<Host> = syncers.collect();
            self.daemon.hosts.extend(syncers);
        }
        self.queue.push(self.now, Event::OwnerTick { life });
        self.daemon.owner = Some(owner);
        self.daemon.shared = Some(shared);
        self.record.clean = false;
        self.go_on_with_asked();
        for shard in 0..self.plan.shards {
            for _ in 0..self.plan.depth {
                let soon = self.rng.below(MILLI);
                self.queue.push(self.now + soon, Event::Client { life, shard });
            }
            self.queue.push(self.now, Event::Timer { life, shard });
            self.daemon.hosts[shard].timer = self.now;
        }
        if again {
            self.daemon_trouble(false);
            (0..nodes).for_each(|node| self.haunt(node));
        }
        self.calm();
    }

    fn host(&self, index: usize, view: &Arc<View>, shared: &Arc<Shared>) -> Host {
        let depth = self.plan.depth;
        let config = ShardConfig { index, depth, io_timeout: Duration::from_nanos(self.plan.io_timeout) };
        Host::new(
            Shard::new(config, Arc::clone(view), Arc::clone(shared)),
            self.nodes.len(),
            self.plan.volumes.len(),
            depth,
        )
    }

    /// The daemon dies; what was outstanding has failed. It is started again after `lasts`.
    pub(crate) fn kill_daemon(&mut self, lasts: u64, power: bool) {
        if self.hosts.is_former() {
            return self.former_dies(power);
        }
        if power {
            self.daemon.boot = self.daemon.boot.wrapping_add(1);
            self.hosts.reboots(self.daemon.machine, self.daemon.boot);
        }
        if !self.daemon.up {
            return self.device_dies();
        }
        self.daemon_ends(power);
        self.daemon.life = self.hosts.next_life();
        // Its requests wait for its return as they would for a device.
        self.daemon_trouble(true);
        self.queue.push(self.now + lasts, Event::DaemonStart { life: self.daemon.life });
        self.reboot_meanwhile(lasts);
    }

    /// The daemon is no more.
    pub(crate) fn daemon_ends(&mut self, power: bool) {
        self.daemon.up = false;
        self.trace.note(self.now, 201, u64::from(self.daemon.life));
        self.trace.say(self.now, || "!! the daemon dies".to_owned());
        self.judge.daemon_died(self.now, self.daemon.life);
        // What became durable at the last moment counts for what is known to be lost.
        self.owner_dies();
        self.device_dies();
        for conn in self.daemon.ends() {
            self.hang_up_client(conn, !power);
        }
        for device in 0..u16::try_from(self.plan.volumes.len()).unwrap_or(0) {
            self.judge.excuses.suspended(self.now, device, false);
        }
        self.keep_record();
    }

    /// The daemon is asked to stop: first what is in flight may end by itself.
    pub(crate) fn stop_daemon(&mut self, lasts: u64) {
        if !self.daemon.up || std::mem::replace(&mut self.daemon.stopping, true) {
            return;
        }
        let (life, soon) = (self.daemon.life, self.rng.below(50 * MILLI));
        self.queue.push(self.now + soon, Event::DaemonAbort { life, lasts });
    }

    pub(crate) fn daemon_abort(&mut self, life: u32, lasts: u64) {
        if life != self.daemon.life || !self.hears(Event::DaemonAbort { life, lasts }) {
            return;
        }
        self.trace.say(self.now, || "!! the daemon ends what is in flight".to_owned());
        self.judge.excuses.aborted(self.now);
        self.queue.push(self.now + STOP_TIME, Event::DaemonEnd { life, lasts });
        for shard in 0..self.daemon.hosts.len() {
            self.daemon.hosts[shard].shard.abort(Errno::EIO);
            self.turn(shard);
        }
    }

    /// An orderly stop leaves nothing in flight.
    pub(crate) fn daemon_end(&mut self, life: u32, lasts: u64) {
        if life != self.daemon.life || !self.hears(Event::DaemonEnd { life, lasts }) {
            return;
        }
        self.rule(self.judge.finish_of(self.daemon.life));
        let settled = self.daemon.hosts.iter().all(|host| host.shard.is_settled());
        let shared = self.daemon.shared.clone();
        let clean = |owner: &Owner| shared.is_some_and(|shared| owner.rules.is_clean(&shared));
        self.record.clean = settled && self.daemon.owner.as_ref().is_some_and(clean);
        if self.record.clean {
            self.record.memory.shown = None;
        }
        self.kill_daemon(lasts, false);
        if self.plan.mortal && self.daemon.life % 2 == 1 && !self.hosts.is_former() {
            // What it has left unflushed is lost on some machines while nobody looks.
            for server in (0..self.servers.len()).step_by(2) {
                self.kill_server(server, lasts, true);
            }
        }
    }

    /// Whether the daemon hears of an event now; if it stands still, it will later.
    pub(crate) fn hears(&mut self, event: Event) -> bool {
        if self.daemon.up && self.daemon.paused > 0 {
            self.daemon.later.push(event);
        }
        self.daemon.up && self.daemon.paused == 0
    }

    /// The daemon goes on.
    pub(crate) fn daemon_resumed(&mut self) {
        for event in std::mem::take(&mut self.daemon.later) {
            self.queue.push(self.now, event);
        }
    }

    pub(crate) fn timer(&mut self, life: u32, shard: usize) {
        if life != self.daemon.life || !self.hears(Event::Timer { life, shard }) {
            return;
        }
        let host = &mut self.daemon.hosts[shard];
        if host.timer > self.now {
            return;
        }
        host.timer = u64::MAX;
        if host.shard.next_timeout().0 <= self.now {
            host.shard.handle_timeout(Time(self.now));
        }
        self.turn(shard);
    }

    /// One more client of a shard has thought of something to do.
    pub(crate) fn client(&mut self, life: u32, shard: usize) {
        if life == self.daemon.life && self.hears(Event::Client { life, shard }) {
            self.daemon.hosts[shard].idle += 1;
            self.turn(shard);
        }
    }

    /// Everything that a shard has to say, and what follows from it.
    pub(crate) fn turn(&mut self, shard: usize) {
        loop {
            while let Some(command) = self.daemon.hosts[shard].shard.poll_link() {
                match command {
                    LinkCommand::Connect(node) => self.connect(shard, node),
                    LinkCommand::Close(node) => self.close(shard, node, Errno::ECANCELED),
                }
            }
            for node in 0..self.nodes.len() {
                self.pump(shard, node);
            }
            self.forward(shard);
            let mut again = self.sync_turn(shard);
            while self.daemon.hosts[shard].syncer.is_none()
                && let Some((tag, result)) = self.daemon.hosts[shard].shard.poll_complete()
            {
                self.completed(shard, tag, result);
                again = true;
            }
            while self.ask(shard) {
                again = true;
            }
            if !again || self.verdict.is_err() {
                break;
            }
        }
        let host = &mut self.daemon.hosts[shard];
        let syncing = host.syncer.as_ref().map_or(Time::NEVER, |syncer| syncer.rules.next_timeout());
        let next = host.shard.next_timeout().min(syncing).0;
        if next < host.timer {
            host.timer = next;
            let life = self.daemon.life;
            self.queue.push(next.max(self.now), Event::Timer { life, shard });
        }
    }

    /// Hands the next request of the workload, or of the sweep, to a shard.
    fn ask(&mut self, shard: usize) -> bool {
        let Some(host) = self.daemon.hosts.get(shard) else { return false };
        if host.idle == 0 || host.free.is_empty() || self.daemon.stopping {
            return false;
        }
        let next = match self.phase {
            Phase::Work if self.stats.requests < self.plan.requests => Some(self.invent()),
            Phase::Sweep | Phase::SweepAgain => self.daemon.script.pop_front(),
            _ => None,
        };
        let Some((what, start, sectors)) = next else { return false };
        self.judge.by = self.daemon.life;
        let id = self.judge.invoke(self.now, what, start, sectors);
        self.trace.note(self.now, 210, start ^ sectors << 40 ^ (shard as u64) << 60);
        self.trace.say(self.now, || {
            format!("#{} {} {start}+{sectors} on shard {shard}", id.serial(), crate::text::what(what))
        });
        let (keep, as_discard) = (self.rng.percent(50), self.rng.percent(50));
        let op = match what {
            What::Read => RequestOp::Read,
            What::Write { fua } => RequestOp::Write { fua },
            What::Zero { fua: false } if as_discard => RequestOp::Discard,
            What::Zero { fua } => RequestOp::WriteZeroes { keep, fua },
            What::Flush => RequestOp::Flush,
        };
        let host = &mut self.daemon.hosts[shard];
        host.idle -= 1;
        let Some(tag) = host.free.pop() else { return false };
        let slot = usize::from(tag);
        host.asked[slot] = Some((id, what, sectors));
        let buffer = &mut host.buffers[slot];
        buffer.clear();
        match what {
            What::Write { .. } => buffer.extend((0..sectors).map(|place| id.value(place))),
            What::Read => buffer.extend((0..sectors).map(|_| RUBBISH)),
            _ => {}
        }
        let request = Request::new(op, Extent::new(start, sectors));
        host.shard.handle_request(Time(self.now), Tag(tag), request);
        self.issued();
        if self.phase == Phase::Work && self.stats.requests == self.plan.requests {
            self.queue.push(self.now, Event::Phase);
        }
        true
    }

    /// A random request.
    fn invent(&mut self) -> (What, u64, u64) {
        let plan = &self.plan;
        let mut chosen = self.rng.below(plan.mix.iter().sum());
        let mut kind = 0;
        while chosen >= plan.mix[kind] {
            chosen -= plan.mix[kind];
            kind += 1;
        }
        let fua = self.rng.one_in(4);
        let what = match kind {
            0 => What::Read,
            1 => What::Write { fua: false },
            2 => What::Write { fua: true },
            3 => What::Zero { fua },
            _ => return (What::Flush, 0, 0),
        };
        let all = plan.sectors();
        let start = if self.rng.percent(75) { plan.hot.0 + self.rng.below(plan.hot.1) } else { self.rng.below(all) };
        let largest = if self.rng.percent(plan.small) { plan.largest.min(8) } else { plan.largest };
        let sectors = self.rng.range(1, largest);
        if plan.strays && self.rng.one_in(20) {
            return (what, all - sectors / 2, sectors);
        }
        (what, start, sectors.min(all - start))
    }

    /// A shard says that a request has ended.
    fn completed(&mut self, shard: usize, tag: Tag, result: Result<(), Errno>) {
        let host = &mut self.daemon.hosts[shard];
        let slot = usize::from(tag.0);
        let Some((id, what, sectors)) = host.asked.get_mut(slot).and_then(Option::take) else {
            return self.fail("3.2", format!("tag {} of shard {shard} has ended, but nothing was asked", tag.0));
        };
        host.free.push(tag.0);
        self.trace.note(self.now, 211, id.serial() ^ u64::from(result.is_ok()) << 63);
        self.trace.say(self.now, || format!("#{} {} ends: {result:?}", id.serial(), crate::text::what(what)));
        let verdict = match result {
            Ok(()) if what == What::Read => {
                let values = &host.buffers[slot][..usize::try_from(sectors).unwrap_or(0)];
                self.judge.read(self.now, id, values)
            }
            Ok(()) => self.judge.acked(self.now, id),
            Err(error) => {
                self.stats.errors += 1;
                self.stats.timeouts += u64::from(error == Errno::ETIMEDOUT);
                self.stats.fenced += u64::from(error == Errno::EBADE);
                self.judge.failed(self.now, id, error.raw())
            }
        };
        self.rule(verdict);
        let swept = matches!(self.phase, Phase::Sweep | Phase::SweepAgain);
        let excused = what != What::Read && self.plan.rates.sync_eio > 0 && result == Err(Errno::EIO);
        if swept && result.is_err() && !excused {
            self.fail("liveness", format!("#{} failed with {result:?} though all faults are over", id.serial()));
        }
        let (percent, longest) = self.plan.think;
        if self.phase == Phase::Work && self.rng.percent(percent) {
            let later = self.now + self.rng.below(longest);
            self.queue.push(later, Event::Client { life: self.daemon.life, shard });
        } else {
            self.daemon.hosts[shard].idle += 1;
        }
        if self.judge.pending() == 0 {
            self.calm();
        }
    }

    /// Reads everything, writes a little, and reads everything again.
    pub(crate) fn sweep(&mut self) {
        let all = self.plan.sectors();
        let script = &mut self.daemon.script;
        let reads = || (0..all).step_by(64).map(|start| (What::Read, start, 64.min(all - start)));
        script.extend(reads());
        script.push_back((What::Flush, 0, 0));
        // Without writes of its own the flush has to know what others have left.
        if self.phase == Phase::Sweep && self.rng.percent(50) {
            for _ in 0..8 {
                let start = self.rng.below(all);
                script.push_back((What::Write { fua: false }, start, 1));
            }
            script.push_back((What::Flush, 0, 0));
            script.extend(reads());
        }
        for shard in 0..self.plan.shards {
            self.turn(shard);
        }
    }
}
