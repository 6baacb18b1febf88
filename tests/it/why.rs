//! `dst why`: what a shard says of its requests, and what people are told.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dst::control::why::Why;
use dst::engine::link::{LinkEvent, Terms};
use dst::engine::request::{Request, RequestOp, ShardConfig, Tag};
use dst::engine::shard::Shard;
use dst::engine::shard::why::Cause;
use dst::engine::shared::Shared;
use dst::engine::view::{Gate, View};
use dst::errno::Errno;
use dst::geometry::map::Geometry;
use dst::limits;
use dst::units::{Epoch, Extent, Id, Time};

use crate::farm::Farm;

fn at(seconds: u64) -> Time {
    Time(seconds * 1_000_000_000)
}

#[test]
fn a_shard_says_what_its_requests_wait_for() {
    let volumes = [vec![Id([7; 16])], vec![Id([8; 16])]];
    let shared = Arc::new(Shared::new(2, 1));
    let view = View::new(Geometry::linear(&[4096, 4096]).unwrap(), &volumes, Epoch(3));
    let config = ShardConfig { index: 0, depth: 8, io_timeout: Duration::from_secs(60) };
    let mut shard = Shard::new(config, Arc::new(view.clone()), Arc::clone(&shared));
    shard.handle_timeout(at(0));
    let terms = Terms { sectors: 4096, volume: Id([7; 16]), losses: 0, requests_max: 64, bytes_max: 1 << 20 };
    shard.handle_link(at(0), 0, LinkEvent::Up(terms));
    let write = |start| Request::new(RequestOp::Write { fua: false }, Extent::new(start, 8));
    shard.handle_request(at(1), Tag(0), write(0));
    shard.handle_request(at(2), Tag(1), write(8));
    shard.handle_request(at(3), Tag(2), write(4096));
    assert!(shard.poll_send(0).is_some(), "the first one is sent");
    let why = |shard: &Shard, now| -> Vec<(u64, Option<usize>, Cause, u64)> {
        let all = shard.why(at(now), Duration::from_secs(2));
        all.iter().map(|w| (w.age.as_secs(), w.target, w.cause, w.left.as_secs())).collect()
    };
    assert_eq!(why(&shard, 2), []);
    assert_eq!(why(&shard, 4), [(3, Some(0), Cause::Answer, 57), (2, Some(0), Cause::Turn, 58)]);
    assert_eq!(why(&shard, 5)[2], (2, Some(1), Cause::Link, 58));
    // A connection that was lost with something on it.
    shard.handle_link(at(5), 0, LinkEvent::Down(Errno::ECONNRESET));
    assert!(why(&shard, 6).iter().all(|(_, _, cause, _)| *cause == Cause::Link));
    // The gate of the second node is shut: what waits there waits for nothing else.
    let mut shut = view;
    (shut.version, shut.nodes[1].gate, shut.nodes[1].changed) = (2, Gate::Frozen, 2);
    shard.adopt(at(6), Arc::new(shut));
    shard.handle_request(at(6), Tag(3), write(5000));
    let gate = Cause::Gate(Gate::Frozen);
    let all = shard.why(at(9), Duration::from_secs(2));
    let gated: Vec<u64> =
        all.iter().filter(|w| w.cause == gate && w.node == Some(1)).map(|w| w.extent.start.0).collect();
    assert_eq!(gated, [4096, 5000]);
    assert!(all.len() <= limits::WHY_MAX);
}

#[test]
fn who_waits_for_a_server_is_told_so() {
    let mut farm = Farm::new(2);
    let (a, b) = (farm.volume(0, "a", "8M"), farm.volume(1, "b", "8M"));
    farm.dst(&format!("create pair --alg linear {a} {b}"));
    assert!(farm.dst_fails("why none").contains("there is no array 'none'"));
    let uri = farm.start_nbd("pair", "--queues 1 --io-timeout 30s");
    assert_eq!(farm.dst("why pair"), "no request waits for longer than a second");
    farm.servers[1].process().unwrap().freeze();
    let mut writer = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 7 12M 64k", &uri])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let address = farm.servers[1].address.clone();
    let until = Instant::now() + Duration::from_secs(20);
    let told = loop {
        let why: Why = serde_json::from_str(&farm.dst("why pair --json")).unwrap();
        if let Some(entry) = why.waiting.into_iter().find(|entry| entry.op == "write") {
            break entry;
        }
        assert!(Instant::now() < until, "nobody waits:\n{}", farm.dst("status pair"));
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!((told.node.as_deref(), told.replica), (Some("n-16384"), Some(0)));
    assert_eq!((told.start, told.sectors, told.waits_for), (24576, 128, format!("the answer of server {address}")));
    assert!(told.age_ms >= 1000 && told.deadline.ends_with(": ETIMEDOUT"), "{} {}", told.age_ms, told.deadline);
    farm.servers[1].kill();
    let words = format!("server {address}: reconnecting, try ");
    while !farm.dst("why pair").contains(&words) {
        assert!(Instant::now() < until, "{}", farm.dst("why pair"));
        std::thread::sleep(Duration::from_millis(50));
    }
    farm.servers[1].start();
    assert!(writer.wait().unwrap().success());
    assert_eq!(farm.dst("why pair"), "no request waits for longer than a second");
}
