//! A shard in memory, checked against a shadow copy: random requests of every kind, answers in any order, connections that
//! drop at any moment, several shards on one array. What a read returns must be what the shadow says.
//!
//! Overlapping requests are not in flight together here, so every read has one right answer; what overlapping ones may
//! return is the simulator's subject.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::{LinkCommand, LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body, Outgoing, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::View;
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::limits;
use dst::units::{Epoch, Extent, Id, Time};
use dst::wire::frame::{Header, Op};

/// A small generator (xorshift64*): the test is the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

fn bytes(extent: Extent) -> std::ops::Range<usize> {
    let start = usize::try_from(extent.start.bytes()).unwrap();
    start..start + usize::try_from(extent.bytes()).unwrap()
}

/// What a request in flight was to do.
struct Pending {
    request: Request,
    buffer: Vec<u8>,
}

/// Frames at a server that are not answered, with the data of writes.
type AtServer = VecDeque<(Header, Vec<u8>)>;

struct World {
    random: Random,
    now: Time,
    geometry: Geometry,
    shards: Vec<Shard>,
    /// Per shard and tag.
    pending: Vec<Vec<Option<Pending>>>,
    /// Per shard and target.
    at_server: Vec<Vec<AtServer>>,
    up: Vec<Vec<bool>>,
    volumes: Vec<Vec<u8>>,
    /// Per volume: something was written that no flush has made durable.
    unflushed: Vec<bool>,
    shadow: Vec<u8>,
    completed: u64,
    dropped: u64,
}

impl World {
    fn new(seed: u64, geometry: Geometry, sizes: &[u64], shards: usize) -> World {
        let targets = sizes.len();
        let shared = Arc::new(Shared::new(targets, shards));
        let view = Arc::new(View::new(geometry.clone(), &vec![vec![Id([7; 16])]; targets], Epoch(1)));
        let depth = 24;
        let shards: Vec<Shard> = (0..shards)
            .map(|index| {
                let config = ShardConfig { index, depth, io_timeout: Duration::from_secs(60) };
                Shard::new(config, Arc::clone(&view), Arc::clone(&shared))
            })
            .collect();
        let per_target = |_| (0..targets).map(|_| VecDeque::new()).collect();
        World {
            random: Random(seed | 1),
            now: Time(1),
            pending: shards.iter().map(|_| (0..depth).map(|_| None).collect()).collect(),
            at_server: (0..shards.len()).map(per_target).collect(),
            up: vec![vec![false; targets]; shards.len()],
            volumes: sizes.iter().map(|sectors| vec![0; usize::try_from(sectors * 512).unwrap()]).collect(),
            unflushed: vec![false; targets],
            shadow: vec![0; usize::try_from(geometry.sectors() * 512).unwrap()],
            geometry,
            shards,
            completed: 0,
            dropped: 0,
        }
    }

    fn run(&mut self, requests: u64) {
        let mut left = requests;
        while left > 0 || self.shards.iter().any(|shard| shard.active() > 0) {
            let shard = usize::try_from(self.random.below(self.shards.len() as u64)).unwrap();
            match self.random.below(10) {
                0..=3 if left > 0 => left -= u64::from(self.submit(shard)),
                4..=7 => self.answer(shard),
                8 if self.random.chance(3) => self.drop_link(shard),
                _ => self.tick(shard),
            }
            self.carry(shard);
        }
    }

    fn random_request(&mut self) -> Request {
        let sectors = self.geometry.sectors();
        let start = self.random.below(sectors);
        let longest = (sectors - start).min(if self.random.chance(20) { sectors } else { 64 });
        let extent = Extent::new(start, 1 + self.random.below(longest));
        let data = Extent { sectors: extent.sectors.min(2048), ..extent };
        let fua = self.random.chance(10);
        match self.random.below(20) {
            0 => Request::new(RequestOp::Flush, Extent::default()),
            1 => Request::new(RequestOp::Discard, extent),
            2 => Request::new(RequestOp::WriteZeroes { keep: self.random.chance(50), fua }, extent),
            3..=9 => Request::new(RequestOp::Read, data),
            _ => Request::new(RequestOp::Write { fua }, data),
        }
    }

    fn submit(&mut self, shard: usize) -> bool {
        let Some(tag) = self.pending[shard].iter().position(Option::is_none) else { return false };
        let request = self.random_request();
        let busy = |pending: &Pending| pending.request.extent.overlaps(request.extent);
        if self.pending.iter().flatten().flatten().any(busy) {
            return false;
        }
        let mut buffer = vec![0xee; usize::try_from(request.extent.bytes()).unwrap()];
        match request.op {
            RequestOp::Write { .. } => {
                buffer.iter_mut().for_each(|byte| *byte = self.random.next().to_le_bytes()[3]);
                self.shadow[bytes(request.extent)].copy_from_slice(&buffer);
            }
            RequestOp::Discard | RequestOp::WriteZeroes { .. } => self.shadow[bytes(request.extent)].fill(0),
            _ => {}
        }
        self.pending[shard][tag] = Some(Pending { request, buffer });
        self.shards[shard].handle_request(self.now, Tag(u16::try_from(tag).unwrap()), request);
        true
    }

    /// Commands, frames and completions of one shard.
    fn carry(&mut self, shard: usize) {
        while let Some(command) = self.shards[shard].poll_link() {
            match command {
                LinkCommand::Connect(target) => self.connect(shard, target),
                LinkCommand::Close(target) => self.lose(shard, target),
            }
        }
        for target in 0..self.volumes.len() {
            while self.up[shard][target] {
                let Some(outgoing) = self.shards[shard].poll_send(target) else { break };
                self.send(shard, target, &outgoing);
            }
        }
        while let Some((tag, result)) = self.shards[shard].poll_complete() {
            self.complete(shard, tag, result);
        }
    }

    fn connect(&mut self, shard: usize, target: usize) {
        let event = if self.random.chance(80) {
            self.up[shard][target] = true;
            LinkEvent::Up(Terms {
                sectors: self.volumes[target].len() as u64 / 512,
                volume: Id([7; 16]),
                losses: 0,
                requests_max: 1 + usize::try_from(self.random.below(32)).unwrap(),
                bytes_max: u64::from(limits::PAYLOAD_BYTES_MAX),
            })
        } else {
            LinkEvent::Down(Errno::ECONNREFUSED)
        };
        self.shards[shard].handle_link(self.now, target, event);
    }

    fn drop_link(&mut self, shard: usize) {
        let target = usize::try_from(self.random.below(self.volumes.len() as u64)).unwrap();
        if self.up[shard][target] {
            self.dropped += 1;
            self.lose(shard, target);
        }
    }

    /// The connection is gone; what was at the server is finished or dropped, as HELLO would find it.
    fn lose(&mut self, shard: usize, target: usize) {
        self.up[shard][target] = false;
        let lost: Vec<_> = self.at_server[shard][target].drain(..).collect();
        for (header, data) in lost {
            if self.random.chance(50) {
                self.apply(target, &header, &data);
            }
        }
        self.shards[shard].handle_link(self.now, target, LinkEvent::Down(Errno::ECONNRESET));
    }

    fn send(&mut self, shard: usize, target: usize, outgoing: &Outgoing) {
        let mut header = outgoing.header;
        let mut data = Vec::new();
        if let Some(at) = outgoing.data {
            let pending = self.pending[shard][usize::from(at.tag.0)].as_ref().unwrap();
            data = pending.buffer[at.offset..at.offset + at.bytes].to_vec();
            header = header.with_body(u32::try_from(at.bytes).unwrap(), 0);
        }
        // Over the codec, as on a wire.
        let header = Header::decode(&header.encode()).unwrap();
        self.at_server[shard][target].push_back((header, data));
    }

    /// What the server's disk does.
    fn apply(&mut self, target: usize, header: &Header, data: &[u8]) {
        match header.op {
            Op::Write => self.volumes[target][bytes(header.extent())].copy_from_slice(data),
            Op::Discard | Op::WriteZeroes => self.volumes[target][bytes(header.extent())].fill(0),
            Op::Flush => self.unflushed[target] = false,
            _ => return,
        }
        if header.op != Op::Flush && !header.is_fua() {
            self.unflushed[target] = true;
        }
    }

    /// One of the oldest few frames at a server is answered.
    fn answer(&mut self, shard: usize) {
        let target = usize::try_from(self.random.below(self.volumes.len() as u64)).unwrap();
        let queue = &mut self.at_server[shard][target];
        if queue.is_empty() {
            return;
        }
        let at = usize::try_from(self.random.below(queue.len().min(8) as u64)).unwrap();
        let (header, data) = queue.remove(at).unwrap();
        self.apply(target, &header, &data);
        let mut reply = header.reply(Ok(()));
        if header.op == Op::Read {
            reply = reply.with_body(header.length, 0);
        }
        let expected = self.shards[shard].expect(target, &reply).unwrap();
        let damaged = self.random.chance(2);
        if let Some(at) = expected {
            let pending = self.pending[shard][usize::from(at.tag.0)].as_mut().unwrap();
            let found = &self.volumes[target][bytes(header.extent())];
            pending.buffer[at.offset..at.offset + at.bytes].copy_from_slice(found);
            if damaged {
                pending.buffer[at.offset] ^= 1;
            }
        }
        let body = if damaged && expected.is_some() { Body::Damaged } else { Body::Good };
        self.shards[shard].handle_reply(self.now, target, &reply, body).unwrap();
        // The same answer again answers nothing.
        assert!(reply.op == Op::Keepalive || self.shards[shard].handle_reply(self.now, target, &reply, body).is_err());
    }

    fn tick(&mut self, shard: usize) {
        self.now = self.now.after(Duration::from_millis(self.random.below(100)));
        self.shards[shard].handle_timeout(self.now);
    }

    fn complete(&mut self, shard: usize, tag: Tag, result: Result<(), Errno>) {
        let pending = self.pending[shard][usize::from(tag.0)].take().expect("a tag completes once");
        self.completed += 1;
        assert_eq!(result, Ok(()), "{:?}", pending.request);
        match pending.request.op {
            RequestOp::Read => {
                assert!(pending.buffer == self.shadow[bytes(pending.request.extent)], "{:?}", pending.request);
            }
            RequestOp::Flush => {}
            _ => {
                // It is on the volumes, and only there where the layout says.
                let extent = pending.request.extent;
                for lba in extent.start.0..extent.end().0 {
                    let piece = self.geometry.piece(Extent::new(lba, 1));
                    let there = &self.volumes[piece.node][bytes(piece.extent)];
                    assert!(there == &self.shadow[bytes(Extent::new(lba, 1))], "sector {lba}");
                }
            }
        }
    }
}

fn check(seed: u64, geometry: Geometry, sizes: &[u64], shards: usize) {
    let mut world = World::new(seed, geometry, sizes, shards);
    world.run(3000);
    assert!(world.completed >= 3000 && world.dropped > 0, "seed {seed}: {} done", world.completed);
}

#[test]
fn linear_of_unequal_nodes() {
    for seed in 1..=4 {
        let sizes = [100, 1, 2049, 37];
        check(seed, Geometry::linear(&sizes).unwrap(), &sizes, 2);
    }
}

#[test]
fn striped_over_one_to_five_nodes() {
    for nodes in 1..=5 {
        let sizes = vec![1000 + nodes as u64; nodes];
        check(nodes as u64, Geometry::striped(8, &sizes).unwrap(), &sizes, 3);
    }
}

#[test]
fn flushes_reach_every_written_node() {
    let sizes = [512, 512, 512];
    let mut world = World::new(9, Geometry::striped(8, &sizes).unwrap(), &sizes, 2);
    for round in 0..200 {
        world.run(5);
        // A flush from either shard, with nothing else in flight, leaves no target with unflushed writes.
        let shard = round % 2;
        let flush = Request::new(RequestOp::Flush, Extent::default());
        world.pending[shard][0] = Some(Pending { request: flush, buffer: Vec::new() });
        world.shards[shard].handle_request(world.now, Tag(0), flush);
        world.run(0);
        assert_eq!(world.unflushed, [false; 3], "round {round}");
    }
}
