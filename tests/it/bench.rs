//! Shards of one array whose links and time are a test's.

use std::sync::Arc;
use std::time::Duration;

use dst::engine::link::{LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body, Outgoing, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::View;
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::units::{Epoch, Extent, Id, Time};
use dst::wire::frame::{Header, Op};

pub(crate) const VOLUME: Id = Id([7; 16]);
pub(crate) const SECTORS: u64 = 4096;

pub(crate) fn ms(millis: u64) -> Time {
    Time(millis * 1_000_000)
}

/// Shards of one array of `nodes` linear nodes, with I/O timeout one second, all links up.
pub(crate) struct Bench {
    pub(crate) shards: Vec<Shard>,
    pub(crate) shared: Arc<Shared>,
}

impl Bench {
    pub(crate) fn new(nodes: usize, shards: usize) -> Bench {
        Bench::laid_out(Geometry::linear(&vec![SECTORS; nodes]).unwrap(), shards)
    }

    pub(crate) fn laid_out(geometry: Geometry, shards: usize) -> Bench {
        let nodes = geometry.nodes();
        let shared = Arc::new(Shared::new(nodes, shards));
        let view = Arc::new(View::new(geometry, &vec![vec![VOLUME]; nodes], Epoch(3)));
        let make = |index| {
            let config = ShardConfig { index, depth: 8, io_timeout: Duration::from_secs(1) };
            Shard::new(config, Arc::clone(&view), Arc::clone(&shared))
        };
        let mut bench = Bench { shards: (0..shards).map(make).collect(), shared };
        for shard in 0..shards {
            bench.shards[shard].handle_timeout(ms(0));
            for target in 0..nodes {
                bench.up(shard, target, 0);
            }
            while bench.shards[shard].poll_link().is_some() {}
        }
        bench
    }

    pub(crate) fn up(&mut self, shard: usize, target: usize, at: u64) {
        let terms = Terms { sectors: SECTORS, volume: VOLUME, losses: 0, requests_max: 64, bytes_max: 1 << 20 };
        self.shards[shard].handle_link(ms(at), target, LinkEvent::Up(terms));
    }

    pub(crate) fn ask(&mut self, shard: usize, at: u64, tag: u16, op: RequestOp, start: u64, sectors: u64) {
        self.shards[shard].handle_request(ms(at), Tag(tag), Request::new(op, Extent::new(start, sectors)));
    }

    pub(crate) fn write(&mut self, shard: usize, at: u64, tag: u16, start: u64) {
        self.ask(shard, at, tag, RequestOp::Write { fua: false }, start, 8);
    }

    pub(crate) fn sent(&mut self, shard: usize, target: usize) -> Option<Outgoing> {
        self.shards[shard].poll_send(target)
    }

    pub(crate) fn answer(&mut self, shard: usize, target: usize, at: u64, request: &Header, result: Result<(), Errno>) {
        let mut reply = request.reply(result);
        if request.op == Op::Read && result.is_ok() {
            reply = reply.with_body(request.length, 0);
        }
        self.shards[shard].handle_reply(ms(at), target, &reply, Body::Good).unwrap();
    }

    pub(crate) fn done(&mut self, shard: usize) -> Option<(u16, Result<(), Errno>)> {
        self.shards[shard].poll_complete().map(|(tag, result)| (tag.0, result))
    }

    /// A write on `target` from `shard`, sent, answered and completed.
    pub(crate) fn written(&mut self, shard: usize, target: usize, at: u64) {
        self.write(shard, at, 0, target as u64 * SECTORS);
        let frame = self.sent(shard, target).unwrap();
        self.answer(shard, target, at, &frame.header, Ok(()));
        assert_eq!(self.done(shard), Some((0, Ok(()))));
    }

    /// Flushes from `shard`, answering every frame; the targets that were asked.
    pub(crate) fn flush(&mut self, shard: usize, at: u64) -> Vec<usize> {
        self.ask(shard, at, 7, RequestOp::Flush, 0, 0);
        let mut asked = Vec::new();
        for target in 0..self.shared.targets().len() {
            if let Some(frame) = self.sent(shard, target) {
                assert_eq!(frame.header.op, Op::Flush);
                self.answer(shard, target, at, &frame.header, Ok(()));
                asked.push(target);
            }
        }
        assert_eq!(self.done(shard), Some((7, Ok(()))));
        asked
    }
}
