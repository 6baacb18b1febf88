//! The engine alone: what one 4 KiB request costs in a shard, without kernel, sockets and payload, and what it allocates: nothing.
//!
//! `cargo bench --bench engine` measures time; `cargo test --release --bench engine` counts allocations and runs each once;
//! `tests/bench/callgrind.sh` counts instructions.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{Criterion, Throughput};
use dst::engine::link::{LinkEvent, Terms};
use dst::engine::region::{RegionState, SyncMap};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::{Body, Shard};
use dst::engine::shared::Shared;
use dst::engine::view::{Role, View};
use dst::geometry::map::Geometry;
use dst::units::{Epoch, Extent, Id, Time};
use dst::wire::frame::{Header, Op};

/// Counts what is asked of the allocator.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests in flight together.
const BATCH: u16 = 32;
const DEPTH: usize = 128;
/// Sectors of each node: 4 GiB.
const NODE: u64 = 8 << 20;
/// Sectors of a request.
const SECTORS: u64 = 8;
const VOLUME: Id = Id([7; 16]);

/// One shard whose servers answer at once.
struct Rig {
    shard: Shard,
    targets: usize,
    sectors: u64,
    sent: Vec<(usize, Header)>,
    place: u64,
    now: Time,
}

impl Rig {
    /// An array of this layout, with so many replicas.
    fn new(geometry: Geometry, replicas: usize) -> Rig {
        let nodes = geometry.nodes();
        Rig::of(View::new(geometry, &vec![vec![VOLUME; replicas]; nodes], Epoch(3)))
    }

    fn of(view: View) -> Rig {
        let targets = view.targets.len();
        let (sectors, view) = (view.geometry.sectors(), Arc::new(view));
        let config = ShardConfig { index: 0, depth: DEPTH, io_timeout: Duration::from_secs(60) };
        let attached = (0..targets).filter(|target| view.role(*target).is_attached()).collect::<Vec<_>>();
        let shared = Arc::new(Shared::new(targets, 1));
        let mut shard = Shard::new(config, view, shared);
        shard.handle_timeout(Time(0));
        while shard.poll_link().is_some() {}
        for target in attached {
            let terms = Terms { sectors: NODE, volume: VOLUME, losses: 0, requests_max: 256, bytes_max: 4 << 20 };
            shard.handle_link(Time(0), target, LinkEvent::Up(terms));
        }
        Rig { shard, targets, sectors, sent: Vec::with_capacity(DEPTH * 4), place: 0, now: Time(0) }
    }

    /// A batch of requests at random places, from what the frontend asks to what it is told.
    fn batch(&mut self, op: RequestOp) {
        for tag in 0..BATCH {
            self.now = Time(self.now.0 + 100);
            self.place = self.place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = (self.place >> 20) % (self.sectors / SECTORS) * SECTORS;
            self.shard.handle_request(self.now, Tag(tag), Request::new(op, Extent::new(start, SECTORS)));
        }
        let mut done = 0;
        // On a node with several targets some wait for others at the same place.
        while done < BATCH {
            for target in 0..self.targets {
                while let Some(outgoing) = self.shard.poll_send(target) {
                    self.sent.push((target, outgoing.header));
                }
            }
            assert!(!self.sent.is_empty(), "each request ends at once");
            for (target, header) in self.sent.drain(..) {
                let mut reply = header.reply(Ok(()));
                if header.op == Op::Read {
                    reply = reply.with_body(header.length, 0);
                    black_box(self.shard.expect(target, &reply).unwrap());
                }
                self.shard.handle_reply(self.now, target, &reply, Body::Good).unwrap();
            }
            while let Some((tag, result)) = self.shard.poll_complete() {
                result.unwrap();
                black_box(tag);
                done += 1;
            }
        }
        self.shard.show_load();
    }
}

/// A node whose second target is being filled: half of it is copied, one region is under way.
fn during_a_copy() -> Rig {
    let mut view = View::new(Geometry::linear(&[NODE]).unwrap(), &[vec![VOLUME; 2]], Epoch(3));
    let map = SyncMap::new(NODE, view.region_sectors);
    (0..map.regions() / 2).for_each(|region| map.set(region, RegionState::Done));
    view.targets[1].role = Role::Syncing;
    view.nodes[0].sync = Some(Arc::new(map));
    view.see_singles();
    Rig::of(view)
}

type Make = fn() -> Rig;

const RIGS: [(&str, Make); 5] = [
    ("linear", || Rig::new(Geometry::linear(&[NODE; 4]).unwrap(), 1)),
    ("striped", || Rig::new(Geometry::striped(128, &[NODE; 4]).unwrap(), 1)),
    ("striped over 32", || Rig::new(Geometry::striped(128, &[NODE; 32]).unwrap(), 1)),
    ("two replicas", || Rig::new(Geometry::linear(&[NODE; 2]).unwrap(), 2)),
    ("during a copy", during_a_copy),
];

const OPS: [(&str, RequestOp); 2] = [("read", RequestOp::Read), ("write", RequestOp::Write { fua: false })];

/// A request allocates nothing, whatever the array is.
fn nothing_is_allocated() {
    for (name, make) in RIGS {
        let mut rig = make();
        for (op_name, op) in OPS {
            // What grows once stays.
            (0..8).for_each(|_| rig.batch(op));
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            (0..1000).for_each(|_| rig.batch(op));
            let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(count, 0, "{name}, {op_name}: allocations in {} requests", 1000 * u64::from(BATCH));
        }
    }
    println!("engine: 0 allocations per request");
}

fn main() {
    if let Ok(rig) = std::env::var("RIG") {
        return count_instructions(&rig);
    }
    nothing_is_allocated();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for (name, make) in RIGS {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(u64::from(BATCH)));
        for (op_name, op) in OPS {
            let mut rig = make();
            group.bench_function(op_name, |bencher| bencher.iter(|| rig.batch(op)));
        }
        group.finish();
    }
    criterion.final_summary();
}

/// For callgrind: `RIG=name/op` runs so many batches of one kind, `BATCHES` of them.
fn count_instructions(wanted: &str) {
    let batches: u64 = std::env::var("BATCHES").map_or(1000, |count| count.parse().unwrap());
    for (name, make) in RIGS {
        for (op_name, op) in OPS {
            if format!("{name}/{op_name}") == wanted {
                let mut rig = make();
                (0..batches).for_each(|_| rig.batch(op));
                println!("{wanted}: {} requests", batches * u64::from(BATCH));
            }
        }
    }
}
