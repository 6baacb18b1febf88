//! The servers: what `roles/server` is in production, around the production rules of `store`.
//!
//! Contract: as in production, a connection takes its requests in order and only as far as its budget goes; work of a killed
//! process goes on at the disk, and the next process waits for it before it serves (the contract, 1.3).

use dst::engine::survey::Marked;
use dst::errno::Errno;
use dst::store::budget::Budget;
use dst::store::volume::{
    Ask, Config, Conn as ConnId, DiskOp, Effect, Event as Told, Slot, Told as Answered, Volume, Work,
};
use dst::units::{Epoch, Extent, Id};
use dst::wire::digest::Hasher;
use dst::wire::frame::{DIGEST_BYTES, Header, Op, message_crc};
use dst::wire::session::Hello;
use dst::wire::volume::{Explained, Member, Regions};

use crate::array::{ARRAY, RUBBISH};
use crate::disk::{Disk, Io};
use crate::kept::Kept;
use crate::net::{self, Body, Damage};
use crate::scrubs::FLIPPED;
use crate::world::{Event, MICRO, MILLI, Phase, SECOND, World};

/// The slowest operation of a slow disk, ns: shorter than the judge allows for the recovery from an outage.
const SLOWEST: u64 = 1_000 * MILLI;

/// What is on a disk that was used before: nobody's data here.
const STRANGE: u64 = u64::MAX - 1;

/// A server's process.
#[derive(Default)]
pub(crate) struct Server {
    pub(crate) up: bool,
    pub(crate) life: u32,
    /// Since when it is up.
    pub(crate) since: u64,
    /// It is being stopped.
    stopping: bool,
    /// It takes no connections any more and makes durable what was written; until when at most, then how long it is away.
    ending: Option<(u64, u64)>,
    /// Reasons why nothing arrives at it, why nothing arrives from it, why its link is slow, why it stands still.
    pub(crate) deaf: u32,
    pub(crate) dumb: u32,
    pub(crate) slow: u32,
    pub(crate) paused: u32,
}

impl Server {
    /// Whether it takes no connections any more.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Whether something that is asked of it now is done, and said to be.
    pub(crate) fn answers(&self) -> bool {
        self.up && !self.is_ending() && self.deaf == 0 && self.dumb == 0 && self.paused == 0
    }
}

/// A volume: its rules while its server runs, and its disk.
pub(crate) struct Node {
    pub(crate) server: usize,
    pub(crate) sectors: u64,
    pub(crate) rules: Option<Volume>,
    disk: Disk,
    pub(crate) kept: Kept,
    pub(crate) slow: u32,
    pub(crate) stalled: u32,
    /// Work that has ended while the disk was stalled, or the server stood still.
    held: Vec<(usize, u64)>,
    finished: Vec<Io>,
    /// The rules were told to stop, and have.
    told_stop: bool,
    stopped: bool,
}

impl Node {
    /// What a reader would see.
    pub(crate) fn content(&self) -> &[u64] {
        self.disk.content()
    }

    /// Its disk changes silently what it holds in a sector.
    pub(crate) fn flip(&mut self, sector: u64) {
        self.disk.flip(usize::try_from(sector).unwrap_or(usize::MAX), FLIPPED);
    }

    /// It was another array's.
    pub(crate) fn used_before(&mut self) {
        self.disk.fill(STRANGE);
    }

    /// Whether it reads as zeros, whatever happens.
    pub(crate) fn is_blank(&self) -> bool {
        let zero = |content: &[u64]| content.iter().all(|value| *value == 0);
        self.disk.is_idle() && zero(self.disk.content()) && zero(self.disk.stable())
    }

    /// What would be there after a power cut at the worst.
    pub(crate) fn stable(&self) -> &[u64] {
        self.disk.stable()
    }

    pub(crate) fn new(node: usize, server: usize, sectors: u64, region: u64, blank: bool) -> Node {
        let mut disk = Disk::new(usize::try_from(sectors).unwrap_or(0));
        if !blank {
            disk.fill(RUBBISH);
        }
        let kept = Kept::new(node, sectors, region);
        let (rules, held, finished) = (None, Vec::new(), Vec::new());
        let (slow, stalled, told_stop, stopped) = (0, 0, false, false);
        Node { server, sectors, rules, disk, kept, slow, stalled, held, finished, told_stop, stopped }
    }
}

impl Node {
    /// Whether nothing of the extent is being changed.
    pub(crate) fn is_still(&self, extent: Extent) -> bool {
        self.disk.is_still(extent)
    }

    /// Whether nothing of the extent could be lost or change by itself.
    pub(crate) fn is_settled(&self, extent: Extent) -> bool {
        self.disk.is_settled(extent)
    }
}

/// The server's end of a connection.
pub(crate) struct Accepted {
    open: bool,
    /// The rules know of it.
    attached: bool,
    greeting: Option<Header>,
    /// Its epoch and its session.
    pub(crate) claim: Option<(Epoch, Id)>,
    budget: Budget,
    /// The data of each slot.
    slots: Vec<Vec<u64>>,
    /// A request that waits for budget.
    waiting: Option<(Header, Body)>,
}

impl Accepted {
    pub(crate) fn new() -> Accepted {
        let budget = Budget::default();
        Accepted { open: true, attached: false, greeting: None, claim: None, budget, slots: Vec::new(), waiting: None }
    }

    fn slot(&mut self, slot: Slot) -> &mut Vec<u64> {
        let at = usize::from(slot.0);
        if at >= self.slots.len() {
            self.slots.resize_with(at + 1, Vec::new);
        }
        &mut self.slots[at]
    }
}

fn volume_id(node: usize) -> Id {
    Id([u8::try_from(node).unwrap_or(0) + 1; 16])
}

/// The id of a node's volume, as the array remembers it.
pub(crate) fn id_of(node: usize) -> Id {
    volume_id(node)
}

impl World {
    /// A server begins to serve, once nothing of its former life is on its disks.
    pub(crate) fn server_start(&mut self, server: usize, life: u32) {
        if self.servers[server].up || self.servers[server].life != life {
            return;
        }
        let nodes = self.nodes_of(server);
        if nodes.iter().any(|node| self.nodes[*node].disk.is_haunted(life)) {
            self.queue.push(self.now + MILLI, Event::ServerStart { server, life });
            return;
        }
        self.servers[server].up = true;
        self.servers[server].since = self.now;
        self.trace.note(self.now, 120, server as u64);
        self.trace.say(self.now, || format!("server {server} serves, life {life}"));
        let mut instance = [0xee; 16];
        instance[..4].copy_from_slice(&life.to_le_bytes());
        instance[4] = u8::try_from(server).unwrap_or(0);
        for node in nodes {
            let config = Config {
                name: format!("v{node}"),
                id: volume_id(node),
                instance: Id(instance),
                boot: self.nodes[node].kept.boot_id(),
                sparse: self.plan.sparse,
                write_through: self.plan.write_through,
            };
            let (book, log) = self.found_state(node);
            self.nodes[node].rules = Some(Volume::new(config, self.nodes[node].sectors, book, log));
            self.haunt(node);
            if life > 0 {
                self.node_trouble(node, false);
            }
        }
    }

    /// The process dies, with `power` its machine; it is started again after `lasts`.
    pub(crate) fn kill_server(&mut self, server: usize, lasts: u64, power: bool) {
        let was_up = std::mem::replace(&mut self.servers[server].up, false);
        if !was_up && !power {
            return;
        }
        self.servers[server].life += 1;
        self.servers[server].stopping = false;
        let ending = self.servers[server].ending.take().is_some();
        let life = self.servers[server].life;
        self.trace.note(self.now, 121, server as u64);
        self.trace.say(self.now, || format!("!! server {server} dies{}", if power { ", power cut" } else { "" }));
        for node in self.nodes_of(server) {
            let device = u16::try_from(self.plan.node_of(node)).unwrap_or(0);
            if was_up {
                self.judge.restarted(device);
            }
            if was_up && !ending {
                self.node_trouble(node, true);
            }
            self.nodes[node].rules = None;
            let told_stop = std::mem::take(&mut self.nodes[node].told_stop);
            self.nodes[node].stopped = false;
            self.nodes[node].finished.clear();
            self.state_cut(node, power, told_stop);
            if power {
                self.nodes[node].held.clear();
                self.nodes[node].disk.power_cut(&mut self.rng);
                match self.device_lives() {
                    // Whatever was acknowledged is there.
                    _ if self.plan.write_through => {}
                    // The array lives on: nothing may be missing, or nothing is served.
                    true => self.loses(node),
                    false => self.judge.device_died(device),
                }
            }
        }
        for conn in 0..self.conns.len() {
            if self.nodes[self.conns[conn].node].server == server && self.is_open(conn) {
                // A machine that is back soon resets what it does not know.
                let told = !power || (self.daemon.is_up() && self.rng.percent(50));
                self.hang_up(conn, told);
            }
        }
        self.labels_lost(server);
        self.queue.push(self.now + lasts, Event::ServerStart { server, life });
    }

    /// The server is asked to stop.
    pub(crate) fn stop_server(&mut self, server: usize, lasts: u64) {
        if !self.servers[server].up || std::mem::replace(&mut self.servers[server].stopping, true) {
            return;
        }
        let (life, soon) = (self.servers[server].life, self.rng.below(20 * MILLI));
        self.queue.push(self.now + soon, Event::ServerEnd { server, life, lasts });
    }

    /// The server has been stopped: it closes its connections, and its process ends when nothing could be lost with it.
    pub(crate) fn server_end(&mut self, server: usize, lasts: u64) {
        let now = self.now;
        if self.servers[server].ending.is_none() {
            self.servers[server].ending = Some((now + dst::limits::STOP_TIMEOUT.as_secs() * SECOND, lasts));
            for conn in 0..self.conns.len() {
                if self.nodes[self.conns[conn].node].server == server && self.is_open(conn) {
                    self.hang_up_and_leave(conn);
                }
            }
            for node in self.nodes_of(server) {
                self.node_trouble(node, true);
            }
        }
        let Some((until, lasts)) = self.servers[server].ending else { return };
        let mut ended = true;
        for node in self.nodes_of(server) {
            if self.servers[server].paused == 0 && !self.nodes[node].told_stop && self.is_idle(node) {
                self.nodes[node].told_stop = true;
                self.tell_rules(node, Told::Stop);
            }
            ended &= self.nodes[node].stopped;
        }
        if ended || now >= until {
            return self.kill_server(server, lasts, false);
        }
        let life = self.servers[server].life;
        self.queue.push(now + MILLI, Event::ServerEnd { server, life, lasts });
    }

    /// Whether nobody is attached to a volume and nothing of it is on the disk.
    fn is_idle(&self, node: usize) -> bool {
        let attached = |conn: &crate::world::Conn| {
            conn.node == node && conn.accepted.as_ref().is_some_and(|accepted| accepted.attached)
        };
        let node_is_idle = |node: &Node| node.disk.is_idle() && node.finished.is_empty() && !node.kept.is_saving();
        node_is_idle(&self.nodes[node]) && !self.conns.iter().any(attached)
    }

    fn is_open(&self, conn: usize) -> bool {
        self.conns[conn].accepted.as_ref().is_some_and(|accepted| accepted.open)
    }

    /// The server's end of a connection is no more; the client learns of it if `told`.
    fn hang_up(&mut self, conn: usize, told: bool) {
        let speed = self.speed(self.conns[conn].node);
        let (now, rng) = (self.now, &mut self.rng);
        let end = &mut self.conns[conn];
        if let Some(accepted) = &mut end.accepted {
            accepted.open = false;
            accepted.waiting = None;
        }
        end.up.drop_all();
        if !end.down.cut {
            end.down.cut(rng);
            if told {
                end.down.cut = false;
                end.down.end(now, speed, rng, Errno::ECONNRESET);
            }
        }
        self.schedule_down(conn);
    }

    /// What could not happen because the server was paused or not reachable happens now, a little later.
    pub(crate) fn wake_server(&mut self, server: usize) {
        for conn in 0..self.conns.len() {
            let node = self.conns[conn].node;
            if self.nodes[node].server != server {
                continue;
            }
            let later = self.now + self.rng.below(100 * MILLI);
            if let Some(at) = self.conns[conn].up.delay(later) {
                self.queue.push(at, Event::Up { conn });
                self.schedule_up(conn);
            }
            if let Some(at) = self.conns[conn].down.delay(later) {
                self.queue.push(at, Event::Down { conn });
                self.schedule_down(conn);
            }
        }
        if self.servers[server].paused == 0 {
            for node in self.nodes_of(server) {
                for io in std::mem::take(&mut self.nodes[node].finished) {
                    self.finish_io(node, io);
                }
            }
        }
    }

    /// The last frame of the way up will be noticed.
    pub(crate) fn schedule_up(&mut self, conn: usize) {
        if let Some(frame) = self.conns[conn].up.frames.back() {
            self.queue.push(frame.at, Event::Up { conn });
        }
    }

    /// The server reads what has arrived, as far as it takes it.
    pub(crate) fn arrive_up(&mut self, conn: usize) {
        let node = self.conns[conn].node;
        let server = &self.servers[self.nodes[node].server];
        if !self.is_open(conn) || server.paused > 0 || server.deaf > 0 {
            return;
        }
        while self.is_open(conn) && self.conns[conn].accepted.as_ref().is_some_and(|end| end.waiting.is_none()) {
            let Some(frame) = self.conns[conn].up.take(self.now) else { break };
            match frame.body {
                Body::End(_) => self.close_server_end(conn),
                Body::Partial(_) => {}
                body => match Header::decode(&frame.header) {
                    Ok(header) => self.take_frame(conn, node, header, body),
                    Err(_) => self.hang_up_and_leave(conn),
                },
            }
        }
        self.perform(node);
    }

    fn hang_up_and_leave(&mut self, conn: usize) {
        self.hang_up(conn, true);
        self.leave(conn);
    }

    /// The client has ended the connection.
    fn close_server_end(&mut self, conn: usize) {
        self.hang_up(conn, true);
        self.leave(conn);
    }

    /// The reader's end reaches the rules a little later.
    fn leave(&mut self, conn: usize) {
        let later = self.rng.below(50 * MICRO);
        self.queue.push(self.now + later, Event::Gone { conn });
    }

    /// The rules hear that a connection is no more, once.
    pub(crate) fn gone(&mut self, conn: usize) {
        let node = self.conns[conn].node;
        let Some(accepted) = &mut self.conns[conn].accepted else { return };
        if std::mem::take(&mut accepted.attached)
            && let Some(rules) = &mut self.nodes[node].rules
        {
            rules.handle(Told::Gone { conn: ConnId(conn as u64) });
        }
        self.perform(node);
    }

    fn take_frame(&mut self, conn: usize, node: usize, header: Header, body: Body) {
        self.trace.note(self.now, 130, conn as u64 ^ u64::from(header.tag) << 20 ^ (header.op as u64) << 40);
        self.trace.say(self.now, || format!("  server v{node} c{conn} <- {}", show(&header)));
        let Some(accepted) = &mut self.conns[conn].accepted else { return };
        if accepted.greeting.is_none() {
            return self.greeted(conn, node, header, &body);
        }
        if header.is_reply() || header.op.has_message() {
            return self.hang_up_and_leave(conn);
        }
        let Some(slot) = accepted.budget.take(&header) else {
            accepted.waiting = Some((header, body));
            return;
        };
        let mut intact = true;
        if let Body::Data(values) = body {
            intact =
                header.body_bytes as usize == values.len() * 512 && net::crc(&values, header.lba) == header.body_crc;
            let old = std::mem::replace(accepted.slot(slot), values);
            self.recycle(old);
        }
        if self.servers[self.nodes[node].server].stopping && header.op.is_io() {
            return self.reply(conn, slot, &header.reply(Err(Errno::ESHUTDOWN)));
        }
        let header = match header.op {
            // A volume that is alone has all its targets flushed when it is.
            Op::Flush if self.plan.logged && !self.plan.is_plural() => header.with_point(self.nodes[node].kept.point),
            _ => header,
        };
        self.nodes[node].kept.asked |= changes(header.op);
        if let Some(rules) = &mut self.nodes[node].rules {
            rules.handle(Told::Request { conn: ConnId(conn as u64), slot, header: &header, intact });
        }
        self.perform(node);
    }

    fn greeted(&mut self, conn: usize, node: usize, header: Header, body: &Body) {
        let hello = match body {
            Body::Message(bytes) if header.op == Op::Hello => Hello::decode(bytes).ok(),
            _ => None,
        };
        let Some(hello) = hello else { return self.hang_up_and_leave(conn) };
        if let Some(accepted) = &mut self.conns[conn].accepted {
            accepted.greeting = Some(header);
            accepted.claim = Some((header.epoch, hello.session));
            accepted.attached = true;
        }
        let member = Member { id: ARRAY, name: "a".to_owned(), node: format!("n-{node}") };
        if let Some(rules) = &mut self.nodes[node].rules {
            let told =
                Told::Attach { conn: ConnId(conn as u64), hello: &hello, epoch: header.epoch, assigned: Some(&member) };
            rules.handle(told);
        }
        self.perform(node);
    }

    /// Does what the rules of a volume say.
    fn perform(&mut self, node: usize) {
        while let Some(effect) = self.nodes[node].rules.as_mut().and_then(Volume::poll_effect) {
            match effect {
                Effect::Disk(work) => self.start_io(node, work),
                Effect::Reply { conn, slot, header } => self.reply(usize::try_from(conn.0).unwrap_or(0), slot, &header),
                Effect::Save(write) => self.save(node, write),
                Effect::Stopped => {
                    self.nodes[node].stopped = true;
                    self.nodes[node].kept.stopped();
                }
                Effect::Answer { number: 0, result } => self.answer = Some(result),
                Effect::Answer { number, result } => self.label_answered(number, result.map(drop)),
                Effect::Welcome { conn, welcome } => {
                    let conn = usize::try_from(conn.0).unwrap_or(0);
                    self.check_welcome(node, conn, welcome.losses);
                    self.answer(conn, Ok(()), welcome.encode().to_vec());
                }
                Effect::Refuse { conn, errno, text } => {
                    let conn = usize::try_from(conn.0).unwrap_or(0);
                    self.trace.say(self.now, || format!("  server v{node} c{conn} refused: {text}"));
                    let text = serde_json::to_vec(&Explained { error: text }).unwrap_or_default();
                    self.answer(conn, Err(errno), text);
                    self.hang_up_and_leave_after_answer(conn);
                }
                Effect::Close { conn, why } => {
                    let conn = usize::try_from(conn.0).unwrap_or(0);
                    self.trace.say(self.now, || format!("  server v{node} closes c{conn}: {why}"));
                    if self.is_open(conn) {
                        self.hang_up_and_leave(conn);
                    }
                }
            }
        }
    }

    fn hang_up_and_leave_after_answer(&mut self, conn: usize) {
        let speed = self.speed(self.conns[conn].node);
        let end = &mut self.conns[conn];
        if let Some(accepted) = &mut end.accepted {
            accepted.open = false;
        }
        end.up.drop_all();
        end.down.end(self.now, speed, &mut self.rng, Errno::ECONNRESET);
        self.schedule_down(conn);
        self.leave(conn);
    }

    fn answer(&mut self, conn: usize, result: Result<(), Errno>, message: Vec<u8>) {
        let Some(greeting) = self.conns[conn].accepted.as_ref().and_then(|accepted| accepted.greeting) else { return };
        let length = u32::try_from(message.len()).unwrap_or(0);
        let header = greeting.reply(result).with_body(length, message_crc(&message));
        self.send_down(conn, &header, Body::Message(message));
    }

    fn reply(&mut self, conn: usize, slot: Slot, header: &Header) {
        if !self.is_open(conn) {
            return;
        }
        if header.op == Op::Flush {
            self.check_flush(self.conns[conn].node, header.result(), header.point());
        }
        let node = self.conns[conn].node;
        self.nodes[node].kept.changed |= changes(header.op) && header.status == 0;
        let mut buffer = self.buffer();
        let Some(accepted) = &mut self.conns[conn].accepted else { return };
        accepted.budget.give(slot, header);
        let waiting = accepted.waiting.take();
        if header.op == Op::Read && header.status == 0 {
            std::mem::swap(accepted.slot(slot), &mut buffer);
            let header = header.with_body(header.length, net::crc(&buffer, header.lba));
            self.send_down(conn, &header, Body::Data(buffer));
        } else if header.op == Op::Digest && header.status == 0 {
            std::mem::swap(accepted.slot(slot), &mut buffer);
            let mut hasher = Hasher::default();
            buffer.iter().for_each(|value| hasher.update(&value.to_le_bytes()));
            self.recycle(buffer);
            let body = hasher.finish(u64::from(header.length)).encode();
            let header = header.with_body(DIGEST_BYTES, message_crc(&body));
            self.send_down(conn, &header, Body::Message(body.to_vec()));
        } else {
            self.recycle(buffer);
            self.send_down(conn, header, Body::None);
        }
        if let Some((header, body)) = waiting {
            let node = self.conns[conn].node;
            self.take_frame(conn, node, header, body);
            // More may have arrived while it waited.
            self.queue.push(self.now, Event::Up { conn });
        }
    }

    fn send_down(&mut self, conn: usize, header: &Header, body: Body) {
        let node = self.conns[conn].node;
        let speed = self.speed(node);
        self.trace.say(self.now, || format!("  server v{node} c{conn} -> {}", show(header)));
        let is_io = matches!(body, Body::Data(_) | Body::None);
        if let Some(at) = self.conns[conn].down.send(self.now, speed, &mut self.rng, (header, body)) {
            self.queue.push(at, Event::Down { conn });
            if is_io {
                self.maybe_damage(conn, false);
            }
        }
    }

    /// Now and then a frame is damaged on its way.
    pub(crate) fn maybe_damage(&mut self, conn: usize, up: bool) {
        let rate = if self.phase == Phase::Work { self.plan.rates.damage } else { 0 };
        if rate == 0 || self.rng.below(100_000) >= rate {
            return;
        }
        let end = &mut self.conns[conn];
        let pipe = if up { &mut end.up } else { &mut end.down };
        let node = end.node;
        let Some(damage) = pipe.damage(&mut self.rng) else { return };
        self.stats.damaged += 1;
        self.trace.say(self.now, || format!("!! a frame of c{conn} is damaged"));
        match damage {
            Damage::Header => {
                self.node_trouble(node, true);
                self.node_trouble(node, false);
            }
            Damage::Body(header) => self.excuse(node, header.extent(), Errno::EILSEQ),
            Damage::Exchange(first, second) => {
                self.excuse(node, first.extent(), Errno::EILSEQ);
                self.excuse(node, second.extent(), Errno::EILSEQ);
            }
        }
    }

    fn excuse(&mut self, node: usize, extent: Extent, error: Errno) {
        self.spoil(node);
        let (target, node) = (node, self.plan.node_of(node));
        let first = self.plan.array_sector(node, extent.start.0);
        let last = self.plan.array_sector(node, extent.end().0 - 1);
        if self.matters(target) {
            self.judge.excuses.gave(self.now, u16::try_from(node).unwrap_or(0), error.raw(), (first, last));
        }
    }

    fn start_io(&mut self, node: usize, work: Work) {
        let mut values = self.buffer();
        if let (DiskOp::Write { .. }, Some((conn, slot))) = (work.op, work.place)
            && let Some(accepted) = &mut self.conns[usize::try_from(conn.0).unwrap_or(0)].accepted
        {
            std::mem::swap(accepted.slot(slot), &mut values);
        }
        if work.op.changes() {
            let by = |(conn, _): (ConnId, Slot)| self.conns[usize::try_from(conn.0).unwrap_or(0)].logged;
            if work.place.is_some_and(by) {
                self.check_marked(node, work.extent);
            }
            self.check_place(node, &work, &values);
        }
        let doomed = work.op == DiskOp::Sync && self.nodes[node].kept.doomed;
        let result = if doomed { Err(Errno::EIO) } else { self.disk_luck(work.op) };
        let life = self.servers[self.nodes[node].server].life;
        let takes = self.disk_time(node);
        let (io, serial) = self.nodes[node].disk.start(work, life, values, result);
        if result.is_ok() && work.op.changes() && self.rng.one_in(4) {
            let sectors = self.rng.range(1, work.extent.sectors);
            let at = self.now + self.rng.below(takes);
            self.queue.push(at, Event::DiskPart { node, io, serial, sectors });
        }
        self.queue.push(self.now + takes, Event::DiskEnd { node, io, serial });
    }

    /// How long the disk of a node takes for something.
    pub(crate) fn disk_time(&mut self, node: usize) -> u64 {
        let (low, high) = self.plan.disk;
        let takes = self.rng.range(low, high);
        if self.nodes[node].slow > 0 { (takes * 1000).min(SLOWEST) } else { takes }
    }

    /// The rules of a volume hear of something.
    pub(crate) fn tell_rules(&mut self, node: usize, told: Told<'_>) {
        if let Some(rules) = &mut self.nodes[node].rules {
            rules.handle(told);
        }
        self.perform(node);
    }

    /// A volume's region log, by its claimant.
    pub(crate) fn ask_log(&mut self, node: usize) -> Result<Marked, Errno> {
        let server = &self.servers[self.nodes[node].server];
        if !server.up || server.is_ending() || server.paused > 0 || server.deaf > 0 || server.dumb > 0 {
            return Err(Errno::ETIMEDOUT);
        }
        let life = self.daemon.life;
        let (name, epoch, owner) = (format!("v{node}"), Epoch(self.daemon.epoch), crate::links::session(life));
        let mut ask = Regions { name, array: ARRAY, epoch, owner, after: None };
        let mut marked = Marked::default();
        loop {
            self.tell_rules(node, Told::Ask { number: 0, ask: Ask::Regions(&ask) });
            match self.answer.take() {
                Some(Ok(Answered::Regions(page))) => match marked.add_page(&page, self.plan.region) {
                    None => return Ok(marked),
                    after => ask.after = after,
                },
                Some(Err((errno, _))) => return Err(errno),
                _ => return Err(Errno::EPROTO),
            }
        }
    }

    /// What the disk will answer.
    fn disk_luck(&mut self, op: DiskOp) -> Result<(), Errno> {
        let rates = self.plan.rates;
        if self.phase != Phase::Work {
            return Ok(());
        }
        let mut luck = |rate: u64| rate > 0 && self.rng.below(100_000) < rate;
        match op {
            DiskOp::Sync if luck(rates.sync_eio) => Err(Errno::EIO),
            DiskOp::Sync => Ok(()),
            _ if luck(rates.disk_eio) => Err(Errno::EIO),
            DiskOp::Read | DiskOp::Digest => Ok(()),
            _ if luck(rates.disk_enospc) => Err(if luck(50_000) { Errno::ENOSPC } else { Errno::EDQUOT }),
            _ => Ok(()),
        }
    }

    /// What reaches a disk belongs there, by the simulator's own arithmetic.
    fn check_place(&mut self, node: usize, work: &Work, values: &[u64]) {
        let (extent, node) = (work.extent, self.plan.node_of(node));
        if extent.end().0 > self.plan.used[node] {
            return self.fail("layout", format!("{:?} at {extent:?} of node {node} is beyond the array", work.op));
        }
        let is_write = matches!(work.op, DiskOp::Write { .. });
        if is_write && values.len() as u64 != extent.sectors {
            return self.fail("layout", format!("a write of {extent:?} of node {node} has {} sectors", values.len()));
        }
        for at in [0, extent.sectors - 1] {
            let sector = self.plan.array_sector(node, extent.start.0 + at);
            let Some(value) = values.get(usize::try_from(at).unwrap_or(0)).filter(|_| is_write) else { continue };
            if let Some(belongs) = self.judge.place_of(*value)
                && belongs != sector
            {
                let text =
                    format!("data of array sector {belongs} was written where sector {sector} lives, on node {node}");
                return self.fail("layout", text);
            }
        }
    }

    pub(crate) fn disk_part(&mut self, node: usize, io: usize, serial: u64, sectors: u64) {
        let node = &mut self.nodes[node];
        if node.stalled == 0 && node.disk.at(io, serial).is_some() {
            node.disk.apply(io, sectors);
        }
    }

    pub(crate) fn disk_end(&mut self, node: usize, io: usize, serial: u64) {
        if self.nodes[node].disk.at(io, serial).is_none() {
            return;
        }
        if self.nodes[node].stalled > 0 {
            self.nodes[node].held.push((io, serial));
            return;
        }
        let Some(io) = self.nodes[node].disk.end(io, &mut self.rng) else { return };
        self.trace.note(self.now, 140, io.serial ^ (node as u64) << 40);
        let Work { op, extent, .. } = io.work;
        self.trace
            .say(self.now, || format!("  disk v{node} {op:?} {}+{} {:?}", extent.start, extent.sectors, io.result));
        if op == DiskOp::Sync {
            self.nodes[node].kept.synced(io.result);
        }
        if let Err(error) = io.result {
            self.stats.disk_errors += 1;
            if op == DiskOp::Sync {
                self.spoil(node);
                let device = u16::try_from(self.plan.node_of(node)).unwrap_or(0);
                self.judge.excuses.flush_failed(self.now, device);
            } else {
                // A quota is a full disk to whoever asked.
                self.excuse(node, extent, if error == Errno::EDQUOT { Errno::ENOSPC } else { error });
            }
        }
        let server = &self.servers[self.nodes[node].server];
        if !server.up || server.life != io.life {
            self.recycle(io.values);
        } else if server.paused > 0 {
            self.nodes[node].finished.push(io);
        } else {
            self.finish_io(node, io);
        }
    }

    /// The server's process learns that its work has ended.
    fn finish_io(&mut self, node: usize, mut io: Io) {
        if let Some((conn, slot)) = io.work.place
            && let Some(accepted) = &mut self.conns[usize::try_from(conn.0).unwrap_or(0)].accepted
        {
            std::mem::swap(accepted.slot(slot), &mut io.values);
        }
        self.recycle(io.values);
        self.tell_rules(node, Told::DiskDone { job: io.work.job, result: io.result });
    }

    /// A stalled disk goes on.
    pub(crate) fn disk_resumed(&mut self, node: usize) {
        for (io, serial) in std::mem::take(&mut self.nodes[node].held) {
            let later = self.now + self.rng.below(MILLI);
            self.queue.push(later, Event::DiskEnd { node, io, serial });
        }
    }
}

fn changes(op: Op) -> bool {
    matches!(op, Op::Write | Op::Discard | Op::WriteZeroes)
}

/// A frame's header, for the trace.
pub(crate) fn show(header: &Header) -> String {
    let kind = if header.is_reply() { "answer" } else { "request" };
    let (lba, sectors) = (header.lba.0, header.length / 512);
    let result = if header.is_reply() { format!(" {:?}", header.result()) } else { String::new() };
    format!("{kind} {:?} {lba}+{sectors} tag {}.{}{result}", header.op, header.tag, header.sequence)
}
