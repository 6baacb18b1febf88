//! The array's daemon: what `roles/array` and `io/link` are in production, around the production shards.
//!
//! Contract: a link says `Down` only when nothing touches a buffer any more; it has at most one send on its way; the answer to
//! a write whose send is not done waits for that. A read's buffer is full of rubbish until its data comes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::{LinkCommand, LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body as Received, Data, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::{Target, View};
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::limits;
use dst::units::{Epoch, Extent, Id, Time};
use dst::wire::frame::{Header, Op, message_crc};
use dst::wire::session::{HELLO_BYTES, Hello, Welcome, features};

use crate::judge::{OpId, What};
use crate::net::{self, Body, Frame, Pipe};
use crate::plan::Layout;
use crate::server::{Accepted, id_of, show};
use crate::world::{Conn, Event, MICRO, MILLI, Phase, World};

/// The array.
pub(crate) const ARRAY: Id = Id([0xaa; 16]);
/// What a buffer holds before it is filled: nobody's data.
const RUBBISH: u64 = u64::MAX;

/// What is aborted has ended after this, ns.
const STOP_TIME: u64 = 100 * MILLI;

/// The daemon's process.
pub(crate) struct Daemon {
    up: bool,
    life: u32,
    /// It is being stopped and takes no more requests.
    stopping: bool,
    /// Reasons why it stands still.
    pub(crate) paused: u32,
    /// What happens to it when it goes on.
    later: Vec<Event>,
    hosts: Vec<Host>,
    view: Option<Arc<View>>,
    /// What is asked in a sweep, in order.
    pub(crate) script: VecDeque<(What, u64, u64)>,
}

/// One I/O thread.
struct Host {
    shard: Shard,
    links: Vec<Link>,
    buffers: Vec<Vec<u64>>,
    /// The request of each tag.
    asked: Vec<Option<(OpId, What, u64)>>,
    free: Vec<u16>,
    /// Clients that want to ask something.
    idle: usize,
    /// When its timer goes off.
    timer: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Connecting,
    Greeting,
    Streaming,
    Closing,
}

/// A shard's link to one node.
struct Link {
    state: State,
    conn: usize,
    sending: bool,
    /// Tags of the send on its way.
    gather: Vec<u32>,
    deferred: Vec<Header>,
}

impl Daemon {
    pub(crate) fn off() -> Daemon {
        let script = VecDeque::new();
        Daemon {
            up: false,
            life: 0,
            stopping: false,
            paused: 0,
            later: Vec::new(),
            hosts: Vec::new(),
            view: None,
            script,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up
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
        let targets = (0..nodes).map(|node| Target { volume: id_of(node) }).collect();
        let view = Arc::new(View { geometry, targets, epoch: Epoch(u64::from(life) + 1) });
        let shared = Arc::new(Shared::new(nodes, self.plan.shards));
        self.daemon.hosts = (0..self.plan.shards).map(|index| self.host(index, &view, &shared)).collect();
        self.daemon.view = Some(view);
        for shard in 0..self.plan.shards {
            for _ in 0..self.plan.depth {
                let soon = self.rng.below(MILLI);
                self.queue.push(self.now + soon, Event::Client { life, shard });
            }
            self.queue.push(self.now, Event::Timer { life, shard });
            self.daemon.hosts[shard].timer = self.now;
        }
        if life > 0 {
            (0..nodes).for_each(|node| self.node_trouble(node, false));
        }
        self.calm();
    }

    fn host(&self, index: usize, view: &Arc<View>, shared: &Arc<Shared>) -> Host {
        let depth = self.plan.depth;
        let config = ShardConfig { index, depth, io_timeout: Duration::from_nanos(self.plan.io_timeout) };
        let link = || Link { state: State::Idle, conn: 0, sending: false, gather: Vec::new(), deferred: Vec::new() };
        Host {
            shard: Shard::new(config, Arc::clone(view), Arc::clone(shared)),
            links: (0..self.nodes.len()).map(|_| link()).collect(),
            buffers: vec![Vec::new(); depth],
            asked: vec![None; depth],
            free: (0..u16::try_from(depth).unwrap_or(0)).rev().collect(),
            idle: 0,
            timer: u64::MAX,
        }
    }

    /// The daemon dies; what was outstanding has failed. It is started again after `lasts`.
    pub(crate) fn kill_daemon(&mut self, lasts: u64, power: bool) {
        if !std::mem::replace(&mut self.daemon.up, false) {
            return;
        }
        self.trace.note(self.now, 201, u64::from(self.daemon.life));
        self.trace.say(self.now, || "!! the daemon dies".to_owned());
        self.judge.daemon_died(self.now);
        let mut ends: Vec<usize> = Vec::new();
        for link in self.daemon.hosts.iter().flat_map(|host| &host.links) {
            if link.state != State::Idle {
                ends.push(link.conn);
            }
        }
        for conn in ends {
            self.hang_up_client(conn, !power);
        }
        self.daemon.hosts.clear();
        self.daemon.stopping = false;
        self.daemon.later.clear();
        self.daemon.life += 1;
        // Its requests wait for its return as they would for a device.
        (0..self.nodes.len()).for_each(|node| self.node_trouble(node, true));
        self.queue.push(self.now + lasts, Event::DaemonStart { life: self.daemon.life });
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
        self.rule(self.judge.finish());
        self.kill_daemon(lasts, false);
    }

    /// The client's end of a connection is no more; the server learns of it if `told`.
    fn hang_up_client(&mut self, conn: usize, told: bool) {
        let node = self.conns[conn].node;
        let speed = self.speed(node);
        self.noticed(conn);
        let (now, rng) = (self.now, &mut self.rng);
        let end = &mut self.conns[conn];
        end.down.drop_all();
        if !end.up.cut {
            if rng.percent(30) {
                end.up.cut(rng);
            }
            end.up.cut = !told;
            if told {
                end.up.end(now, speed, rng, Errno::ECONNRESET);
            }
        }
        self.schedule_up(conn);
    }

    /// Whether the daemon hears of an event now; if it stands still, it will later.
    fn hears(&mut self, event: Event) -> bool {
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
    fn turn(&mut self, shard: usize) {
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
            let mut again = false;
            while let Some((tag, result)) = self.daemon.hosts[shard].shard.poll_complete() {
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
        let next = host.shard.next_timeout().0;
        if next < host.timer {
            host.timer = next;
            let life = self.daemon.life;
            self.queue.push(next.max(self.now), Event::Timer { life, shard });
        }
    }

    /// Hands the next request of the workload, or of the sweep, to a shard.
    fn ask(&mut self, shard: usize) -> bool {
        let host = &self.daemon.hosts[shard];
        if host.idle == 0 || host.free.is_empty() || self.daemon.stopping {
            return false;
        }
        let next = match self.phase {
            Phase::Work if self.stats.requests < self.plan.requests => Some(self.invent()),
            Phase::Sweep | Phase::SweepAgain => self.daemon.script.pop_front(),
            _ => None,
        };
        let Some((what, start, sectors)) = next else { return false };
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
        let request = Request { op, extent: Extent::new(start, sectors) };
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

    fn connect(&mut self, shard: usize, node: usize) {
        let conn = self.conns.len();
        let life = self.daemon.life;
        let (up, down) = (Pipe::default(), Pipe::default());
        self.conns.push(Conn { node, shard, life, up, down, accepted: None, silent: false });
        let link = &mut self.daemon.hosts[shard].links[node];
        (link.state, link.conn, link.sending) = (State::Connecting, conn, false);
        let speed = self.speed(node);
        let at = self.now + 2 * speed.latency + self.rng.below(speed.jitter + 1);
        self.queue.push(at, Event::Connected { conn });
    }

    /// The link that a connection belongs to, if it still does.
    fn link_of(&self, conn: usize) -> Option<&Link> {
        let Conn { node, shard, life, .. } = self.conns[conn];
        let link = self.daemon.hosts.get(shard)?.links.get(node)?;
        (life == self.daemon.life && link.conn == conn && link.state != State::Idle).then_some(link)
    }

    fn link_mut(&mut self, conn: usize) -> &mut Link {
        let Conn { node, shard, .. } = self.conns[conn];
        &mut self.daemon.hosts[shard].links[node]
    }

    pub(crate) fn connected(&mut self, conn: usize) {
        if self.link_of(conn).is_none_or(|link| link.state != State::Connecting)
            || !self.hears(Event::Connected { conn })
        {
            return;
        }
        let Conn { node, shard, .. } = self.conns[conn];
        let server = &self.servers[self.nodes[node].server];
        if server.deaf > 0 || server.dumb > 0 {
            self.queue.push(self.now + 20 * MILLI, Event::Connected { conn });
            return;
        }
        if !server.up {
            self.close(shard, node, Errno::ECONNREFUSED);
            return;
        }
        self.conns[conn].accepted = Some(Accepted::new());
        self.link_mut(conn).state = State::Greeting;
        let hello = Hello {
            versions: (1, 1),
            features: features::OURS,
            array: ARRAY,
            session: session(self.daemon.life),
            channel: u16::try_from(shard).unwrap_or(0),
            volume: format!("v{node}"),
        };
        let body = hello.encode();
        let epoch = Epoch(u64::from(self.daemon.life) + 1);
        let header = Header::request(Op::Hello, 0, 0, epoch, Extent::default());
        let header = header.with_body(u32::try_from(HELLO_BYTES).unwrap_or(0), message_crc(&body));
        self.send_up(conn, &header, Body::Message(body.to_vec()));
    }

    fn send_up(&mut self, conn: usize, header: &Header, body: Body) {
        let node = self.conns[conn].node;
        let speed = self.speed(node);
        self.trace.say(self.now, || format!("  array c{conn} -> v{node} {}", show(header)));
        let is_io = matches!(body, Body::Data(_) | Body::None);
        if let Some(at) = self.conns[conn].up.send(self.now, speed, &mut self.rng, (header, body)) {
            self.queue.push(at, Event::Up { conn });
            if is_io {
                self.maybe_damage(conn, true);
            }
        }
    }

    /// Sends everything that a shard offers for one link, small frames first.
    fn pump(&mut self, shard: usize, node: usize) {
        let host = &mut self.daemon.hosts[shard];
        let link = &mut host.links[node];
        if link.state != State::Streaming || link.sending {
            return;
        }
        let mut frames = Vec::new();
        let mut bytes = 0;
        while frames.len() < limits::GATHER_FRAMES_MAX && bytes < limits::GATHER_BYTES_MAX {
            let Some(outgoing) = host.shard.poll_send(node) else { break };
            bytes += outgoing.data.map_or(0, |data| data.bytes as u64);
            frames.push(outgoing);
        }
        if frames.is_empty() {
            return;
        }
        let conn = link.conn;
        link.gather.clear();
        link.gather.extend(frames.iter().map(|frame| frame.header.tag));
        frames.sort_by_key(|frame| frame.data.is_some_and(|data| data.bytes > 32 << 10));
        for outgoing in frames {
            let Some(data) = outgoing.data else {
                self.send_up(conn, &outgoing.header, Body::None);
                continue;
            };
            let mut values = self.buffer();
            let host = &mut self.daemon.hosts[shard];
            values.extend_from_slice(part_of(&host.buffers[usize::from(data.tag.0)], data));
            let crc = outgoing.crc.unwrap_or_else(|| net::crc(&values, outgoing.header.lba));
            host.shard.keep_crc(&outgoing.header, crc);
            let header = outgoing.header.with_body(u32::try_from(data.bytes).unwrap_or(0), crc);
            self.send_up(conn, &header, Body::Data(values));
        }
        let sent_at = self.conns[conn].up.sent_at();
        if sent_at > self.now {
            self.link_mut(conn).sending = true;
            self.queue.push(sent_at, Event::Sent { conn });
        }
    }

    pub(crate) fn sent(&mut self, conn: usize) {
        if self.link_of(conn).is_none() || !self.hears(Event::Sent { conn }) {
            return;
        }
        let Conn { node, shard, .. } = self.conns[conn];
        let link = self.link_mut(conn);
        link.sending = false;
        link.gather.clear();
        if link.state == State::Streaming {
            let deferred = std::mem::take(&mut link.deferred);
            for reply in deferred {
                if let Err(error) = self.tell(shard, node, &reply, Received::Good) {
                    self.close(shard, node, error);
                }
            }
        }
        self.turn(shard);
    }

    /// Closes a link; `Down` follows when nothing of it is in flight.
    fn close(&mut self, shard: usize, node: usize, error: Errno) {
        let link = &mut self.daemon.hosts[shard].links[node];
        if matches!(link.state, State::Idle | State::Closing) {
            return;
        }
        link.state = State::Closing;
        let conn = link.conn;
        self.stats.losses += 1;
        self.trace.say(self.now, || format!("  array closes c{conn}: {error:?}"));
        self.hang_up_client(conn, true);
        let reaped = self.now + self.rng.below(100 * MICRO);
        self.queue.push(reaped, Event::Reaped { conn, error });
    }

    pub(crate) fn reaped(&mut self, conn: usize, error: Errno) {
        if self.link_of(conn).is_none() || !self.hears(Event::Reaped { conn, error }) {
            return;
        }
        let Conn { node, shard, .. } = self.conns[conn];
        let link = self.link_mut(conn);
        link.state = State::Idle;
        link.sending = false;
        link.deferred.clear();
        link.gather.clear();
        self.trace.note(self.now, 220, conn as u64);
        self.daemon.hosts[shard].shard.handle_link(Time(self.now), node, LinkEvent::Down(error));
        self.turn(shard);
    }

    /// The last frame of the way down will be noticed.
    pub(crate) fn schedule_down(&mut self, conn: usize) {
        if let Some(frame) = self.conns[conn].down.frames.back() {
            self.queue.push(frame.at, Event::Down { conn });
        }
    }

    /// The client reads what has arrived.
    pub(crate) fn arrive_down(&mut self, conn: usize) {
        let Conn { node, shard, .. } = self.conns[conn];
        if self.link_of(conn).is_none() {
            self.conns[conn].down.drop_all();
            return;
        }
        if self.servers[self.nodes[node].server].dumb > 0 || !self.hears(Event::Down { conn }) {
            return;
        }
        while let Some(state) = self.link_of(conn).map(|link| link.state) {
            if !matches!(state, State::Greeting | State::Streaming) {
                break;
            }
            let Some(frame) = self.conns[conn].down.take(self.now) else { break };
            let step = if state == State::Greeting {
                self.welcomed(shard, node, frame)
            } else {
                self.answered(shard, node, conn, frame)
            };
            if let Err(error) = step {
                self.close(shard, node, error);
            }
        }
        self.turn(shard);
    }

    fn welcomed(&mut self, shard: usize, node: usize, frame: Frame) -> Result<(), Errno> {
        let body = match frame.body {
            Body::Message(body) => body,
            Body::End(error) => return Err(error),
            _ => return Err(Errno::EPROTO),
        };
        let reply = Header::decode(&frame.header).map_err(|bad| bad.errno())?;
        reply.result()?;
        let welcome = Welcome::decode(&body).map_err(|_| Errno::EPROTO)?;
        let terms = Terms {
            sectors: welcome.sectors,
            volume: welcome.volume,
            requests_max: welcome.requests_max as usize,
            bytes_max: u64::from(welcome.bytes_max),
        };
        let host = &mut self.daemon.hosts[shard];
        host.links[node].state = State::Streaming;
        self.trace.note(self.now, 221, (node as u64) << 8 ^ shard as u64);
        host.shard.handle_link(Time(self.now), node, LinkEvent::Up(terms));
        Ok(())
    }

    fn answered(&mut self, shard: usize, node: usize, conn: usize, frame: Frame) -> Result<(), Errno> {
        if let Body::End(error) = frame.body {
            return Err(error);
        }
        let reply = Header::decode(&frame.header).map_err(|bad| bad.errno())?;
        self.trace.note(self.now, 230, conn as u64 ^ u64::from(reply.tag) << 20 ^ (reply.op as u64) << 40);
        self.trace.say(self.now, || format!("  array c{conn} <- v{node} {}", show(&reply)));
        let host = &mut self.daemon.hosts[shard];
        host.shard.handle_progress(Time(self.now), node);
        let expected = host.shard.expect(node, &reply).map_err(|_| Errno::EPROTO);
        let Some(data) = expected? else {
            return self.tell(shard, node, &reply, Received::Good);
        };
        let (values, whole) = match frame.body {
            Body::Data(values) => (values, true),
            Body::Partial(values) => (values, false),
            _ => return Err(Errno::EPROTO),
        };
        let host = &mut self.daemon.hosts[shard];
        let start = data.offset / 512;
        let buffer = &mut host.buffers[usize::from(data.tag.0)];
        let count = values.len().min(data.bytes / 512);
        buffer[start..start + count].copy_from_slice(&values[..count]);
        let intact = values.len() == data.bytes / 512 && net::crc(&values, reply.lba) == reply.body_crc;
        self.recycle(values);
        if !whole {
            return Ok(());
        }
        self.tell(shard, node, &reply, if intact { Received::Good } else { Received::Damaged })
    }

    fn tell(&mut self, shard: usize, node: usize, reply: &Header, body: Received) -> Result<(), Errno> {
        let host = &mut self.daemon.hosts[shard];
        let link = &mut host.links[node];
        if link.sending && reply.op == Op::Write && link.gather.contains(&reply.tag) {
            link.deferred.push(*reply);
            return Ok(());
        }
        host.shard.handle_reply(Time(self.now), node, reply, body).map_err(|_| Errno::EPROTO)
    }
}

/// The id of a life of the daemon.
fn session(life: u32) -> Id {
    let mut id = [0x55; 16];
    id[..4].copy_from_slice(&life.to_le_bytes());
    Id(id)
}

fn part_of(buffer: &[u64], data: Data) -> &[u64] {
    &buffer[data.offset / 512..(data.offset + data.bytes) / 512]
}
