//! Arrays whose nodes have several replicas, at host speed: a replica is left and comes back, a daemon dies, the stale one returns
//! first. Afterwards the replicas hold the same, byte for byte.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dst::limits;
use dst::store::region::{Layout, Log};
use dst::store::state::SLOTS_BYTES;

use crate::farm::Farm;

/// What of the array is written.
const ALL: &[&str] = &["--size=40m"];
/// The same of an array of one node.
const ALL_OF_ONE: &[&str] = &["--size=24m"];

/// A mirror over two servers, striped over two nodes, in sync.
fn mirrored(farm: &Farm) -> String {
    let at = |server: usize, name: &str| farm.volume(server, name, "24M");
    let nodes = [format!("{},{}", at(0, "a"), at(1, "a")), format!("{},{}", at(0, "b"), at(1, "b"))];
    farm.dst(&format!("create pair --alg striped --replicas 2 {} {}", nodes[0], nodes[1]));
    let uri = farm.start_nbd("pair", "--queues 2");
    wait_until(farm, "all in sync", |data| data.iter().all(|word| word == "in sync"));
    uri
}

/// What `replica list` says of each replica's data.
fn data(farm: &Farm) -> Vec<String> {
    let json: serde_json::Value = serde_json::from_str(&farm.dst("status pair --json")).unwrap();
    let array = if json.is_array() { &json[0] } else { &json };
    let nodes = array["nodes"].as_array().unwrap().iter();
    let replicas = nodes.flat_map(|node| node["replicas"].as_array().unwrap().clone());
    replicas.map(|replica| replica["state"].as_str().unwrap().replace('_', " ")).collect()
}

fn wait_until(farm: &Farm, what: &str, so: impl Fn(&[String]) -> bool) {
    let until = Instant::now() + Duration::from_secs(40);
    while !so(&data(farm)) {
        assert!(Instant::now() < until, "not {what}:\n{}\n{}", farm.dst("status pair"), farm.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until every replica is.
pub(crate) fn in_sync(farm: &Farm) {
    wait_until(farm, "in sync", |data| data.iter().all(|word| word == "in sync"));
}

/// Writes and verifies an area for so many seconds.
pub(crate) fn fio(uri: &str, seconds: u32, area: &[&str]) -> Child {
    let (uri, runtime) = (format!("--uri={uri}"), format!("--runtime={seconds}"));
    Command::new("fio")
        .args(["--name=verify", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=8k", "--iodepth=24"])
        .args(["--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0", "--fsync=100"])
        .args(["--time_based", &runtime, "--serialize_overlap=1", "--randrepeat=0", "--do_verify=1"])
        .args(area)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub(crate) fn ends_well(fio: Child) {
    let output = fio.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

fn same(farm: &Farm) {
    for name in ["a", "b"] {
        let [one, other] = [0, 1].map(|server: usize| std::fs::read(farm.servers[server].pool().join(name)).unwrap());
        assert!(one.iter().any(|byte| *byte != 0), "nothing was written");
        let differs = one.iter().zip(&other).position(|(one, other)| one != other);
        assert_eq!(differs, None, "the first byte of '{name}' that differs");
    }
}

#[test]
fn a_replica_that_goes_is_left_and_synced_when_it_comes_back() {
    let mut farm = Farm::new(2);
    let uri = mirrored(&farm);
    let writer = fio(&uri, 14, ALL);
    std::thread::sleep(Duration::from_secs(1));
    farm.servers[1].kill();
    wait_until(&farm, "left", |data| data == ["in sync", "stale", "in sync", "stale"]);
    farm.servers[1].start();
    wait_until(&farm, "in sync again", |data| data.iter().all(|word| word == "in sync"));
    // Now the other one.
    farm.servers[0].kill();
    wait_until(&farm, "left", |data| data == ["stale", "in sync", "stale", "in sync"]);
    farm.servers[0].start();
    ends_well(writer);
    wait_until(&farm, "in sync again", |data| data.iter().all(|word| word == "in sync"));
    farm.dst("stop pair");
    same(&farm);
}

#[test]
fn after_a_daemon_has_died_the_replicas_are_made_the_same() {
    let mut farm = Farm::new(2);
    let uri = mirrored(&farm);
    for _ in 0..2 {
        let mut writer = fio(&uri, 30, ALL);
        std::thread::sleep(Duration::from_secs(1));
        farm.kill_array();
        let _ = writer.kill();
        let _ = writer.wait();
        farm.start_array();
        farm.wait_until_started("pair");
        let writer = fio(&uri, 2, ALL);
        wait_until(&farm, "in sync again", |data| data.iter().all(|word| word == "in sync"));
        ends_well(writer);
    }
    farm.dst("stop pair");
    same(&farm);
}

#[test]
fn the_stale_one_that_returns_first_is_not_served() {
    let mut farm = Farm::new(2);
    let uri = mirrored(&farm);
    farm.servers[1].kill();
    ends_well(fio(&uri, 8, ALL));
    assert_eq!(data(&farm), ["in sync", "stale", "in sync", "stale"]);
    farm.dst("stop pair");
    farm.servers[0].kill();
    farm.servers[1].start();
    let said = farm.dst_fails("start pair --frontend nbd:127.0.0.1:0");
    assert!(said.contains("n-0"), "{said}");
    farm.servers[0].start();
    farm.start_nbd("pair", "");
    wait_until(&farm, "in sync again", |data| data.iter().all(|word| word == "in sync"));
    farm.dst("stop pair");
    same(&farm);
}

#[test]
fn what_went_from_one_to_the_next_reaches_the_third() {
    let mut farm = Farm::new(3);
    let at: Vec<String> = (0..3).map(|server| farm.volume(server, "a", "24M")).collect();
    farm.dst(&format!("create pair --alg linear --replicas 3 {}", at.join(",")));
    let uri = farm.start_nbd("pair", "");
    let is = |farm: &Farm, words: [&str; 3]| wait_until(farm, &words.join(", "), |data| data == words);
    is(&farm, ["in sync"; 3]);
    let writer = fio(&uri, 45, &["--size=20m"]);
    std::thread::sleep(Duration::from_secs(1));
    farm.servers[2].kill();
    is(&farm, ["in sync", "in sync", "stale"]);
    farm.servers[1].kill();
    is(&farm, ["in sync", "stale", "stale"]);
    farm.servers[1].start();
    is(&farm, ["in sync", "in sync", "stale"]);
    // What the second one has it was told by the first, which is away now.
    farm.servers[0].kill();
    is(&farm, ["stale", "in sync", "stale"]);
    farm.servers[2].start();
    is(&farm, ["stale", "in sync", "in sync"]);
    farm.servers[0].start();
    is(&farm, ["in sync"; 3]);
    ends_well(writer);
    is(&farm, ["in sync"; 3]);
    farm.dst("stop pair");
    let [one, two, three] =
        [0, 1, 2].map(|server: usize| std::fs::read(farm.servers[server].pool().join("a")).unwrap());
    assert!(one == two && two == three, "they differ");
}

#[test]
fn of_three_replicas_the_two_stale_ones_that_return_first_are_not_served() {
    let mut farm = Farm::new(3);
    let at: Vec<String> = (0..3).map(|server| farm.volume(server, "a", "24M")).collect();
    farm.dst(&format!("create pair --alg linear --replicas 3 {}", at.join(",")));
    let uri = farm.start_nbd("pair", "");
    in_sync(&farm);
    let writer = fio(&uri, 16, ALL_OF_ONE);
    std::thread::sleep(Duration::from_millis(500));
    farm.servers[2].kill();
    wait_until(&farm, "one left", |data| data == ["in sync", "in sync", "stale"]);
    farm.servers[1].kill();
    wait_until(&farm, "two left", |data| data == ["in sync", "stale", "stale"]);
    ends_well(writer);
    farm.dst("stop pair");
    farm.servers[0].kill();
    for server in [1, 2] {
        farm.servers[server].start();
        let said = farm.dst_fails("start pair --frontend nbd:127.0.0.1:0");
        assert!(said.contains("n-0") && said.contains(&farm.servers[0].address), "{said}");
    }
    farm.servers[0].start();
    farm.start_nbd("pair", "");
    in_sync(&farm);
    farm.dst("stop pair");
    let volume = |server: usize| std::fs::read(farm.servers[server].pool().join("a")).unwrap();
    assert!(volume(0) == volume(1) && volume(1) == volume(2), "they differ");
}

/// A mirror of one node, large enough for its resync to take a while: 256 regions, one of them in four was written while the second
/// server was away.
fn lagging() -> (Farm, String) {
    let mut farm = Farm::new(2);
    let at = [0, 1].map(|server| farm.volume(server, "a", "256M"));
    farm.dst(&format!("create pair --alg linear --replicas 2 {}", at.join(",")));
    let uri = farm.start_nbd("pair", "--queues 2");
    in_sync(&farm);
    farm.servers[1].kill();
    let writer = fio(&uri, 9, &["--size=192m"]);
    wait_until(&farm, "left", |data| data == ["in sync", "stale"]);
    ends_well(writer);
    (farm, uri)
}

fn same_volumes(farm: &Farm) {
    let [one, other] = [0, 1].map(|server: usize| std::fs::read(farm.servers[server].pool().join("a")).unwrap());
    let differs = one.iter().zip(&other).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first byte that differs");
}

#[test]
fn writes_to_regions_that_are_not_resynced_reach_both() {
    let (mut farm, uri) = lagging();
    farm.servers[1].start();
    // What nothing is marked in, and what is.
    let clean = fio(&uri, 6, &["--offset=192m", "--size=64m"]);
    let marked = fio(&uri, 6, &["--size=192m"]);
    in_sync(&farm);
    ends_well(clean);
    ends_well(marked);
    in_sync(&farm);
    farm.dst("stop pair");
    same_volumes(&farm);
}

#[test]
fn when_the_source_of_a_resync_dies_nothing_is_served_until_it_is_back() {
    let (mut farm, uri) = lagging();
    farm.servers[1].start();
    let until = Instant::now() + Duration::from_secs(30);
    while data(&farm)[1] == "stale" && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    farm.servers[0].kill();
    let was = data(&farm);
    let writer = fio(&uri, 10, &["--size=256m"]);
    std::thread::sleep(Duration::from_secs(2));
    if was[1] != "in sync" {
        assert_eq!(data(&farm)[0], "in sync", "the last one in sync is never left");
        assert_ne!(data(&farm)[1], "in sync", "the other lacks something");
    }
    farm.servers[0].start();
    ends_well(writer);
    in_sync(&farm);
    farm.dst("stop pair");
    same_volumes(&farm);
}

/// Whether anything of a volume is marked in its region log, and all that is written stays where it was.
fn marked(farm: &Farm, server: usize, name: &str) -> bool {
    let file = std::fs::read(farm.servers[server].pool().join(format!(".{name}.state"))).unwrap();
    let layout = Layout::new((24 << 20) / 512, limits::REGION_BYTES / 512).unwrap();
    !Log::load(&file[SLOTS_BYTES..], layout).page(None).marked.is_empty()
}

#[test]
fn the_first_replica_of_a_node_that_is_served_switches_its_region_log_on() {
    let farm = Farm::new(2);
    farm.dst(&format!("create pair --alg linear {}", farm.volume(0, "a", "24M")));
    let uri = farm.start_nbd("pair", "");
    ends_well(fio(&uri, 1, &["--size=4m"]));
    assert!(!marked(&farm, 0, "a"), "one target alone needs no log");
    farm.dst(&format!("replica add pair n-0 {}", farm.volume(1, "a", "24M")));
    wait_until(&farm, "in sync", |data| data == ["in sync", "in sync"]);
    ends_well(fio(&uri, 1, &["--size=4m"]));
    assert!(marked(&farm, 0, "a") && marked(&farm, 1, "a"));
}
