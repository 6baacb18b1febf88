//! The world: everything that exists in one run, the events that happen in it, and the phases of a run.
//!
//! Contract: a run is a function of its seed. One thread, virtual time, no order but the queue's. The engine and the store are
//! the production code; `array.rs` and `server.rs` are what the roles and `io` are in production.
//!
//! Phases: work under faults; *heal*, when all faults stop and everything must end in bounded time; a sweep that reads
//! every sector, which must succeed; where disks may die, a power cut of everything and a second sweep.

use dst::engine::replicas::{Event as Told, Standing};
use dst::engine::shard::Report;
use dst::errno::Errno;
use dst::units::Lba;

use crate::array::Daemon;
use crate::hosts::{self, Hosts};
use crate::judge::{Judge, Rules, Verdict, Violation};
use crate::net::{Pipe, Speed};
use crate::owner::Record;
use crate::plan::{self, Fault, Plan};
use crate::queue::Queue;
use crate::rng::Rng;
use crate::scrubs::{self, Scrubs};
use crate::server::{Accepted, Node, Server};
use crate::trace::Trace;

pub(crate) const MICRO: u64 = 1_000;
pub(crate) const MILLI: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;

/// After the last fault everything is connected again within this.
const SETTLE: u64 = 25 * SECOND;
/// How much later than its time-out a request may end: a tick, and the end of its connection.
const SLACK: u64 = 200 * MILLI;
/// Events of a run; more means that it turns in circles.
const EVENTS_MAX: u64 = 20_000_000;
/// How often shards wake each other at most, for each request: ten times what the worst of many worlds needs.
const WAKES_MAX: u64 = 150;

/// Something that happens. Connections are numbered through the run; numbers are never used twice.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A shard's clients think of something to do.
    Client {
        life: u32,
        shard: usize,
    },
    /// The owner looks at what its shards know.
    OwnerTick {
        life: u32,
    },
    /// The owner hears of something.
    Reported {
        life: u32,
        report: Report,
    },
    /// The record is durable.
    Recorded {
        life: u32,
    },
    /// What could not be saved is tried again.
    SaveAgain {
        life: u32,
    },
    /// The owner asks the next region log of a node.
    Survey {
        life: u32,
        node: usize,
    },
    /// A node's sync engine is to end.
    StopSync {
        life: u32,
        node: usize,
    },
    /// A shard takes a view.
    Adopt {
        life: u32,
        shard: usize,
        version: u64,
    },
    /// A shard is woken by another.
    Look {
        life: u32,
        shard: usize,
    },
    /// A shard's timer.
    Timer {
        life: u32,
        shard: usize,
    },
    /// A connection is there, or is not.
    Connected {
        conn: usize,
    },
    /// A frame may have come up to the server.
    Up {
        conn: usize,
    },
    /// A frame may have come down to the client.
    Down {
        conn: usize,
    },
    /// The client's send is done.
    Sent {
        conn: usize,
    },
    /// The client has nothing of a closed connection in flight any more.
    Reaped {
        conn: usize,
        error: Errno,
    },
    /// The server's reader of a connection has ended.
    Gone {
        conn: usize,
    },
    /// Part of a write takes effect.
    DiskPart {
        node: usize,
        io: usize,
        serial: u64,
        sectors: u64,
    },
    /// The state file of a volume is written.
    Saved {
        node: usize,
        serial: u64,
    },
    /// Somebody knocks whose claim has passed.
    Zombie {
        node: usize,
    },
    /// Disk work ends.
    DiskEnd {
        node: usize,
        io: usize,
        serial: u64,
    },
    /// A server that is being stopped ends, a daemon aborts what is in flight, and ends.
    ServerEnd {
        server: usize,
        life: u32,
        lasts: u64,
    },
    /// A server dies while it writes something down.
    ServerDies {
        server: usize,
        life: u32,
    },
    DaemonAbort {
        life: u32,
        lasts: u64,
    },
    DaemonEnd {
        life: u32,
        lasts: u64,
    },
    /// A server is started.
    ServerStart {
        server: usize,
        life: u32,
    },
    /// The daemon is started.
    DaemonStart {
        life: u32,
    },
    /// The daemon looks whether a late node has come.
    LookForLate {
        life: u32,
        node: usize,
    },
    /// It has been claimed.
    LateComes {
        life: u32,
        node: usize,
    },
    /// The destination of a move has come back, and the move goes on.
    MoveGoesOn {
        life: u32,
        node: usize,
    },
    /// A machine is told to take the array over.
    TakeOver {
        machine: usize,
    },
    /// Somebody who starts the array has written his record, or tries again.
    Written {
        start: u32,
        job: u64,
    },
    TryAgain {
        start: u32,
    },
    /// A server is asked for something beside its connections; the answer is there; it is not waited for any longer.
    Errand {
        errand: usize,
    },
    Answered {
        errand: usize,
    },
    GivenUp {
        errand: usize,
    },
    /// The owner hears what became of a label.
    Labelled {
        life: u32,
        volume: usize,
        done: bool,
    },
    /// The owner ends what another host has taken.
    Fenced {
        life: u32,
    },
    /// A fault of the plan strikes, or ends.
    Strike {
        fault: usize,
    },
    Relief {
        fault: usize,
    },
    /// A connection that broke silently must have been given up by now.
    Noticed {
        conn: usize,
    },
    /// The next phase begins.
    Phase,
    /// The phase must be over.
    Overdue {
        phase: Phase,
    },
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Work,
    /// Faults have stopped, requests are still outstanding.
    Heal,
    /// Nothing is asked: connections come back.
    Settle,
    /// Everything is read.
    Sweep,
    /// After the last power cut.
    Return,
    SweepAgain,
    Done,
}

/// A connection, with both its ends.
pub(crate) struct Conn {
    pub(crate) node: usize,
    pub(crate) shard: usize,
    /// Of the daemon.
    pub(crate) life: u32,
    pub(crate) up: Pipe,
    pub(crate) down: Pipe,
    /// The server's end, once it is connected.
    pub(crate) accepted: Option<Accepted>,
    /// The client is not told of its end.
    pub(crate) silent: bool,
    /// What is changed by it is marked in the region log.
    pub(crate) logged: bool,
}

/// What a run has done, for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) timeouts: u64,
    pub(crate) faults: u64,
    pub(crate) disk_errors: u64,
    pub(crate) damaged: u64,
    pub(crate) losses: u64,
    pub(crate) scrubs: u64,
    pub(crate) found: u64,
    pub(crate) repaired: u64,
    /// Nodes that a daemon went on without, and those that came.
    pub(crate) late: u64,
    pub(crate) came: u64,
    /// Moves that went on where they were.
    pub(crate) resumed: u64,
    /// How often another host has taken the array over, was refused and tried again, was so because the former one had gone on meanwhile;
    /// and requests of former hosts that were refused.
    pub(crate) taken: u64,
    pub(crate) retaken: u64,
    pub(crate) outrun: u64,
    pub(crate) fenced: u64,
    pub(crate) events: u64,
    /// How often a shard was told that another one has given back what it may wait for.
    pub(crate) wakes: u64,
}

/// How a run ended.
pub(crate) struct Outcome {
    pub(crate) violation: Option<Violation>,
    pub(crate) hash: u64,
    pub(crate) stats: Stats,
}

/// See the module's description.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    pub(crate) queue: Queue<Event>,
    pub(crate) trace: Trace,
    pub(crate) judge: Judge,
    pub(crate) daemon: Daemon,
    pub(crate) nodes: Vec<Node>,
    pub(crate) servers: Vec<Server>,
    pub(crate) conns: Vec<Conn>,
    /// What the array's record says, durably.
    pub(crate) record: Record,
    /// Targets that a fault has ever touched: the others have everything, and no error is excused where one of them is.
    pub(crate) spoiled: Vec<bool>,
    /// Which targets are slow and waited for.
    pub(crate) awaited: Vec<bool>,
    /// Targets whose cache was lost while the array lived on.
    pub(crate) lossy: Vec<bool>,
    /// Targets of which the loss was accepted, and nothing lost since.
    pub(crate) accepted: Vec<bool>,
    pub(crate) scrubs: Scrubs,
    pub(crate) hosts: Hosts,
    pub(crate) phase: Phase,
    pub(crate) stats: Stats,
    /// Which faults of the plan are on.
    pub(crate) active: Vec<bool>,
    pub(crate) next_fault: usize,
    /// What a volume has answered to a question about it as a whole.
    pub(crate) answer: Option<Result<dst::store::volume::Told, dst::store::pool::Refusal>>,
    /// Bodies to use again.
    pub(crate) spare: Vec<Vec<u64>>,
    pub(crate) verdict: Verdict,
}

/// What a seed decides, and the chance that is left for the rest.
pub(crate) fn plan_of(seed: u64, requests: u64) -> (Plan, Rng) {
    let mut rng = Rng::new(seed);
    let mut plan = plan::plan(&mut rng, requests);
    plan::deeds(&mut Rng::new(!seed), &mut plan);
    // Decided apart, so that nothing else of a seed changes.
    if Rng::new(seed ^ 0x5eed).percent(15) {
        plan.write_through = true;
        // What was not answered with success may be seen and gone again after a power cut: a zeroing, which has no durable form and is
        // followed by a sync, and what a disk has failed at.
        plan.mix[1] += std::mem::take(&mut plan.mix[3]);
        (plan.rates.disk_eio, plan.rates.disk_enospc) = (0, 0);
    }
    scrubs::plan(&mut Rng::new(seed.rotate_left(32) ^ 0x5c), &mut plan);
    plan::interruptions(&mut Rng::new(seed.rotate_left(48) ^ 0x13), &mut plan);
    hosts::plan(&mut Rng::new(seed.rotate_left(48) ^ 0x4074), &mut plan);
    plan::crowd(&mut Rng::new(seed.rotate_left(16) ^ 0xc0d), &mut plan);
    (plan, rng)
}

/// Runs a plan.
pub(crate) fn run(plan: Plan, rng: Rng, loud: bool) -> Outcome {
    let rules = Rules {
        device_of: (0..plan.sectors()).map(|sector| u16::try_from(plan.locate(sector).0).unwrap_or(0)).collect(),
        devices: plan.volumes.len(),
        replicated: plan.copies > 1,
        plural: plan.is_plural(),
        mortal: plan.mortal,
        io_timeout: plan.io_timeout,
        slack: SLACK,
    };
    let mut world = World {
        rng,
        now: 0,
        queue: Queue::new(),
        trace: Trace::new(loud),
        judge: Judge::new(rules),
        daemon: Daemon::off(),
        nodes: (plan.server_of.iter().enumerate())
            .map(|(target, server)| {
                let blank = plan.blank || target < plan.volumes.len() * plan.copies;
                Node::new(target, *server, plan.volumes[plan.node_of(target)], plan.region, blank)
            })
            .collect(),
        record: Record::new(&plan),
        spoiled: vec![false; plan.server_of.len()],
        awaited: vec![false; plan.server_of.len()],
        lossy: vec![false; plan.server_of.len()],
        accepted: vec![false; plan.server_of.len()],
        servers: (0..plan.servers).map(|_| Server::default()).collect(),
        conns: Vec::new(),
        scrubs: Scrubs::new(plan.volumes.len()),
        hosts: Hosts::new(plan.faults.len(), plan.server_of.len()),
        phase: Phase::Work,
        stats: Stats::default(),
        active: vec![false; plan.faults.len()],
        next_fault: 0,
        answer: None,
        spare: Vec::new(),
        verdict: Ok(()),
        plan,
    };
    if loud {
        println!("{:#?}", world.plan);
    }
    if world.plan.used_before {
        let replicas = world.plan.volumes.len() * world.plan.copies;
        let others = (0..replicas).filter(|target| target % world.plan.copies > 0);
        for target in others.collect::<Vec<_>>() {
            world.nodes[target].used_before();
            world.record.standings[target] = Standing::Filling { from: Lba(0) };
            world.spoil(target);
        }
    }
    world.run();
    let violation = world.verdict.err();
    let Scrubs { done, found, repaired, .. } = world.scrubs;
    let stats = Stats { scrubs: done, found, repaired, ..world.stats };
    Outcome { violation, hash: world.trace.hash(), stats }
}

impl World {
    fn run(&mut self) {
        for server in 0..self.servers.len() {
            self.server_start(server, 0);
        }
        self.daemon_start(0);
        while self.verdict.is_ok() && self.phase != Phase::Done {
            let Some((at, event)) = self.queue.pop() else {
                self.fail("liveness", format!("nothing is left to happen in phase {:?}", self.phase));
                return;
            };
            self.now = at;
            self.stats.events += 1;
            if self.stats.events > EVENTS_MAX {
                self.fail("liveness", format!("the run turns in circles in phase {:?}", self.phase));
            }
            if self.stats.wakes > (self.stats.requests + 100) * WAKES_MAX {
                self.fail("liveness", format!("shards wake each other without end in phase {:?}", self.phase));
            }
            self.hand_out(event);
        }
    }

    pub(crate) fn happen(&mut self, event: Event) {
        match event {
            Event::OwnerTick { life } => self.owner_tick(life),
            Event::Reported { life, report } => self.owner_hears(life, Told::Report(report)),
            Event::Recorded { life } => self.recorded(life),
            Event::SaveAgain { life } => self.save_again(life),
            Event::Survey { life, node } => self.survey(life, node),
            Event::StopSync { life, node } => self.stop_sync(life, node),
            Event::Adopt { life, shard, version } => self.adopt(life, shard, version),
            Event::Look { life, shard } => self.look(life, shard),
            Event::Client { life, shard } => self.client(life, shard),
            Event::Timer { life, shard } => self.timer(life, shard),
            Event::Connected { conn } => self.connected(conn),
            Event::Up { conn } => self.arrive_up(conn),
            Event::Down { conn } => self.arrive_down(conn),
            Event::Sent { conn } => self.sent(conn),
            Event::Reaped { conn, error } => self.reaped(conn, error),
            Event::Gone { conn } => self.gone(conn),
            Event::DiskPart { node, io, serial, sectors } => self.disk_part(node, io, serial, sectors),
            Event::Saved { node, serial } => self.saved(node, serial),
            Event::Zombie { node } => self.zombie(node),
            Event::DiskEnd { node, io, serial } => self.disk_end(node, io, serial),
            Event::ServerEnd { server, life, lasts } if life == self.servers[server].life => {
                self.server_end(server, lasts);
            }
            Event::ServerDies { server, life } if life == self.servers[server].life => {
                let lasts = self.rng.below(5 * MILLI);
                self.kill_server(server, lasts, false);
            }
            Event::ServerDies { .. } | Event::ServerEnd { .. } => {}
            Event::DaemonAbort { life, lasts } => self.daemon_abort(life, lasts),
            Event::DaemonEnd { life, lasts } => self.daemon_end(life, lasts),
            Event::ServerStart { server, life } => self.server_start(server, life),
            Event::DaemonStart { life } => self.daemon_start(life),
            Event::LookForLate { life, node } => self.look_for_late(life, node),
            Event::LateComes { life, node } => self.late_comes(life, node),
            Event::MoveGoesOn { life, node } => self.move_goes_on(life, node),
            Event::TakeOver { machine } => self.take_over(machine),
            Event::Written { start, job } => self.written(start, job),
            Event::TryAgain { start } => self.try_again(start),
            Event::Errand { errand } => self.run_errand(errand),
            Event::Answered { errand } => self.errand_answered(errand),
            Event::GivenUp { errand } => self.errand_given_up(errand),
            Event::Labelled { life, volume, done } => self.labelled(life, volume, done),
            Event::Fenced { life } => self.fenced(life),
            Event::Strike { fault } => self.strike(fault),
            Event::Relief { fault } => self.relief(fault),
            Event::Noticed { conn } => self.noticed(conn),
            Event::Phase => self.advance(),
            Event::Overdue { phase } if phase == self.phase => {
                let pending = self.judge.finish().err().map_or_else(String::new, |pending| pending.text);
                self.fail("liveness", format!("phase {phase:?} does not end; {pending}"));
            }
            Event::Overdue { .. } => {}
        }
    }

    /// Something that no history could tell is wrong.
    pub(crate) fn fail(&mut self, rule: &'static str, text: String) {
        self.rule(Err(Violation { rule, text }));
    }

    /// Keeps the first violation.
    pub(crate) fn rule(&mut self, verdict: Verdict) {
        if self.verdict.is_ok() {
            self.verdict = verdict;
        }
    }

    /// How the link to a node's server is now.
    pub(crate) fn speed(&self, node: usize) -> Speed {
        let slow = if self.servers[self.nodes[node].server].slow > 0 { 100 } else { 1 };
        Speed {
            latency: self.plan.latency * slow,
            jitter: self.plan.jitter,
            per_byte: (self.plan.per_byte * slow).min(50_000),
        }
    }

    /// A buffer for a body.
    pub(crate) fn buffer(&mut self) -> Vec<u64> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    /// A body is no longer needed.
    pub(crate) fn recycle(&mut self, buffer: Vec<u64>) {
        if self.spare.len() < 64 {
            self.spare.push(buffer);
        }
    }

    /// A request has been issued: faults of the plan that were waiting for it.
    pub(crate) fn issued(&mut self) {
        self.stats.requests += 1;
        while let Some(Fault { after, .. }) = self.plan.faults.get(self.next_fault) {
            if *after >= self.stats.requests || self.phase != Phase::Work {
                break;
            }
            let soon = self.rng.below(2 * MILLI);
            self.queue.push(self.now + soon, Event::Strike { fault: self.next_fault });
            self.next_fault += 1;
        }
    }

    /// The work is done: faults stop, and everything must end.
    fn heal(&mut self) {
        self.enter(Phase::Heal, self.plan.io_timeout + SETTLE * 3);
        for fault in 0..self.active.len() {
            self.relief(fault);
        }
        self.scrub_all();
        self.calm();
    }

    /// Where the run can go on when nothing is outstanding.
    pub(crate) fn calm(&mut self) {
        if self.hosts.is_former() {
            return;
        }
        let idle = self.judge.pending() == 0 && self.daemon.is_up() && self.daemon.script.is_empty();
        match self.phase {
            Phase::Heal if idle => {
                self.enter(Phase::Settle, SETTLE * 3);
                self.queue.push(self.now + SETTLE, Event::Phase);
            }
            Phase::Sweep | Phase::SweepAgain if idle => self.queue.push(self.now, Event::Phase),
            _ => {}
        }
    }

    fn enter(&mut self, phase: Phase, limit: u64) {
        self.phase = phase;
        self.trace.note(self.now, 100, phase as u64);
        self.trace.say(self.now, || format!("== {phase:?}"));
        self.queue.push(self.now + limit, Event::Overdue { phase });
    }

    fn advance(&mut self) {
        match self.phase {
            Phase::Work => self.heal(),
            // A server that was being stopped may take its time, and have the only good copy of something.
            Phase::Settle if self.servers.iter().any(|server| !server.up || server.since + 8 * SECOND > self.now) => {
                self.queue.push(self.now + 5 * SECOND, Event::Phase);
            }
            // A former host whose volumes all are another's hears of it. One that was being stopped in order when the last request was asked,
            // of a former host, takes its time to come back.
            Phase::Settle if self.hosts.has_formers() || !self.daemon.is_up() => {
                self.queue.push(self.now + 5 * SECOND, Event::Phase);
            }
            Phase::Settle => {
                self.check_asked();
                self.check_replicas();
                self.enter(Phase::Sweep, self.plan.io_timeout * 4 + SETTLE);
                self.sweep();
            }
            Phase::Sweep if self.plan.mortal => {
                self.enter(Phase::Return, SETTLE * 2);
                self.power_cut_all(10 * MILLI);
                self.queue.push(self.now + SETTLE, Event::Phase);
            }
            Phase::Return => {
                self.check_replicas();
                self.enter(Phase::SweepAgain, self.plan.io_timeout * 4 + SETTLE);
                self.sweep();
            }
            Phase::Sweep | Phase::SweepAgain => {
                self.rule(self.judge.finish());
                self.check_replicas();
                self.phase = Phase::Done;
            }
            _ => {}
        }
    }
}
