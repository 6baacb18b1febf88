//! The daemon's connections: what `io/link` is in production.
//!
//! Contract: a link says `Down` only when nothing touches a buffer any more; it has at most one send on its way; the answer to
//! a write whose send is not done waits for that.

use dst::engine::link::{LinkEvent, Terms};
use dst::engine::shard::{Body as Received, Data};
use dst::errno::Errno;
use dst::limits;
use dst::units::{Epoch, Extent, Id, Time};
use dst::wire::digest::Digest;
use dst::wire::frame::{Header, Op, message_crc};
use dst::wire::session::{HELLO_BYTES, Hello, Welcome, features};

use crate::array::ARRAY;
use crate::net::{self, Body, Frame, Pipe};
use crate::server::{Accepted, show};
use crate::world::{Conn, Event, MICRO, MILLI, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Idle,
    Connecting,
    Greeting,
    Streaming,
    Closing,
}

/// A shard's link to one node.
pub(crate) struct Link {
    pub(crate) state: State,
    pub(crate) conn: usize,
    pub(crate) sending: bool,
    /// Tags of the send on its way.
    pub(crate) gather: Vec<u32>,
    pub(crate) deferred: Vec<Header>,
}

impl Link {
    pub(crate) fn down() -> Link {
        Link { state: State::Idle, conn: 0, sending: false, gather: Vec::new(), deferred: Vec::new() }
    }
}

impl World {
    /// The client's end of a connection is no more; the server learns of it if `told`.
    pub(crate) fn hang_up_client(&mut self, conn: usize, told: bool) {
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

    pub(crate) fn connect(&mut self, shard: usize, node: usize) {
        let conn = self.conns.len();
        let life = self.daemon.life;
        let (up, down) = (Pipe::default(), Pipe::default());
        self.conns.push(Conn { node, shard, life, up, down, accepted: None, silent: false, logged: false });
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
        if !server.up || server.is_ending() {
            self.close(shard, node, Errno::ECONNREFUSED);
            return;
        }
        self.conns[conn].accepted = Some(Accepted::new());
        self.link_mut(conn).state = State::Greeting;
        let logged = self.logs(node) && self.daemon.hosts[shard].logged;
        self.conns[conn].logged = logged;
        let hello = Hello {
            versions: (1, 1),
            features: if logged { features::OURS } else { features::DATA_CRC },
            array: ARRAY,
            session: session(self.daemon.life),
            host: crate::hosts::host_id(self.daemon.machine),
            // A node's sync engine has a channel of its own, the same on all nodes.
            channel: u16::try_from(shard.min(self.plan.shards)).unwrap_or(0),
            volume: format!("v{node}"),
        };
        let body = hello.encode();
        let epoch = Epoch(self.daemon.epoch);
        let header = Header::request(Op::Hello, 0, 0, epoch, Extent::default());
        let header = header.with_body(u32::try_from(HELLO_BYTES).unwrap_or(0), message_crc(&body));
        self.send_up(conn, &header, Body::Message(body.to_vec()));
    }

    pub(crate) fn send_up(&mut self, conn: usize, header: &Header, body: Body) {
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
    pub(crate) fn pump(&mut self, shard: usize, node: usize) {
        let host = &mut self.daemon.hosts[shard];
        let link = &host.links[node];
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
        // A flush changes nothing: one that a move has asked for may still come.
        if frames.iter().any(|frame| !matches!(frame.header.op, Op::Keepalive | Op::Flush)) {
            self.check_sent(shard, node);
        }
        if frames.is_empty() {
            return;
        }
        let link = &mut self.daemon.hosts[shard].links[node];
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
    pub(crate) fn close(&mut self, shard: usize, node: usize, error: Errno) {
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
            if self.hosts.claims(conn) {
                return self.claim_answered(conn);
            }
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
            losses: welcome.losses,
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
        if let Body::Message(body) = frame.body {
            // A digest: its first bytes will do.
            let digest = Digest::decode(&body).ok_or(Errno::EPROTO)?;
            let first = digest.hash.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let buffer = &mut self.daemon.hosts[shard].buffers[usize::from(data.tag.0)];
            buffer.clear();
            buffer.push(first);
            let intact = message_crc(&body) == reply.body_crc;
            return self.tell(shard, node, &reply, if intact { Received::Good } else { Received::Damaged });
        }
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
pub(crate) fn session(life: u32) -> Id {
    let mut id = [0x55; 16];
    id[..4].copy_from_slice(&life.to_le_bytes());
    Id(id)
}

fn part_of(buffer: &[u64], data: Data) -> &[u64] {
    &buffer[data.offset / 512..(data.offset + data.bytes) / 512]
}
