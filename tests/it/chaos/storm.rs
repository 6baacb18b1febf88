//! Arrays behind bad networks, under fio: what was written is what is read, and no request fails.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dst::limits;

use super::proxy::{Count, Faults, Proxy};
use super::{rounds, seed};
use crate::farm::{Farm, run};

/// A striped array over real servers, each behind a proxy; its NBD URI.
fn behind_proxies(farm: &Farm, seed: u64, name: &str, chunk: &str) -> (Vec<Proxy>, String) {
    let (proxies, targets): (Vec<Proxy>, Vec<String>) = (0..farm.servers.len())
        .map(|index| {
            farm.volume(index, &format!("{name}{index}"), "24M");
            let proxy = Proxy::new(&farm.servers[index].address, seed + index as u64 * 7919);
            let target = format!("{}/{name}{index}", proxy.address);
            (proxy, target)
        })
        .unzip();
    farm.dst(&format!("create {name} --alg striped --chunk {chunk} {}", targets.join(" ")));
    let uri = farm.start_nbd(name, "--queues 2");
    (proxies, uri)
}

/// Small and large, few and many, each in its own part of the device: written, read back and compared all the time. Without
/// `serialize_overlap`, and with several sizes in one job, fio overwrites what it is just reading to verify.
fn fio(farm: &Farm, uri: &str, seconds: u32, bytes: u64) -> Child {
    let global = [
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--thread",
        "--rw=randrw",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--verify_backlog=128",
        "--randrepeat=0",
        "--serialize_overlap=1",
        "--fsync=100",
        "--time_based",
        &format!("--runtime={seconds}"),
    ];
    let jobs = [("sector", "512", 64), ("page", "4k", 64), ("middle", "52k", 32), ("large", "1m", 6)];
    let part = (bytes / jobs.len() as u64) >> 20 << 20;
    let mut command = Command::new("fio");
    for (place, (name, size, depth)) in (0u64..).zip(jobs) {
        command.arg(format!("--name={name}")).args(global);
        command.arg(format!("--offset={}", part * place)).arg(format!("--size={part}"));
        command.arg(format!("--bs={size}")).arg(format!("--iodepth={depth}"));
    }
    let log = std::fs::File::create(farm.dir.join("fio.log")).unwrap();
    command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn sum(proxies: &[Proxy], what: Count) -> u64 {
    proxies.iter().map(|proxy| proxy.count(what)).sum()
}

fn report(test: &str, seed: u64, proxies: &[Proxy]) {
    let [messages, connections, cuts, delays, mutes, flips] =
        [Count::Messages, Count::Connections, Count::Cuts, Count::Delays, Count::Mutes, Count::Flips]
            .map(|what| sum(proxies, what));
    println!(
        "{test}: SEED={seed}: {messages} messages on {connections} connections, {cuts} cuts, {delays} delays, {mutes} half-open, \
         {flips} bits flipped"
    );
}

fn set(proxies: &[Proxy], faults: Faults) {
    proxies.iter().for_each(|proxy| proxy.set(faults));
}

/// The array works, at once, when its network does again.
fn is_well(farm: &Farm, name: &str, uri: &str) {
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 1M", "-c", "flush", "-c", "read -P 9 0 1M", uri]);
    let shown = farm.dst(&format!("status {name}"));
    assert!(shown.contains("connected"), "{shown}");
    farm.dst(&format!("stop {name}"));
}

#[test]
fn connections_cut_at_any_byte_lose_nothing() {
    let (farm, seed) = (Farm::new(3), seed());
    let (proxies, uri) = behind_proxies(&farm, seed, "cut", "16K");
    let mut fio = fio(&farm, &uri, 30 * rounds().div_ceil(30), 72 << 20);
    set(&proxies, Faults { cut: 50, delay: 40, mute: 400, flip: 0 });
    let status = fio.wait().unwrap();
    report("cut", seed, &proxies);
    assert!(status.success(), "fio: {status}, SEED={seed}\n{}", farm.logs());
    let (messages, cuts) = (sum(&proxies, Count::Messages), sum(&proxies, Count::Cuts));
    assert!(cuts > 100 && cuts * 100 > messages, "{cuts} cuts in {messages} messages prove little");
    set(&proxies, Faults::default());
    is_well(&farm, "cut", &uri);
}

#[test]
fn a_connection_that_falls_silent_is_given_up() {
    let (farm, seed) = (Farm::new(2), seed());
    let (proxies, uri) = behind_proxies(&farm, seed, "quiet", "4K");
    // All connections are there: one that is made later would not be silent.
    let until = Instant::now() + Duration::from_secs(10);
    let all_there = |shown: &str| shown.contains(" connected") && !shown.contains("connecting");
    while !all_there(&farm.dst("status quiet")) {
        assert!(Instant::now() < until, "it does not connect");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Nobody closes it: only the array's own question can find out, and what was under way must not be lost.
    assert!(proxies[0].mute_all() > 0);
    let from = Instant::now();
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 1M", "-c", "read -P 5 0 1M", &uri]);
    let took = from.elapsed();
    let most = limits::KEEPALIVE_INTERVAL + limits::KEEPALIVE_TIMEOUT + limits::CONNECT_TIMEOUT;
    assert!(took < most, "{took:?}");
    assert!(took > Duration::from_secs(1), "it was not silent");
    is_well(&farm, "quiet", &uri);
}

#[test]
fn flipped_bits_never_reach_anybody() {
    let (farm, seed) = (Farm::new(2), seed());
    let (proxies, uri) = behind_proxies(&farm, seed, "flip", "64K");
    let mut fio = fio(&farm, &uri, 10 * rounds().div_ceil(30), 48 << 20);
    set(&proxies, Faults { flip: 100, ..Faults::default() });
    let status = fio.wait().unwrap();
    report("flip", seed, &proxies);
    assert!(status.success(), "fio: {status}, SEED={seed}\n{}", farm.logs());
    assert!(sum(&proxies, Count::Flips) > 50);
    let counters: serde_json::Value = serde_json::from_str(&farm.dst("status flip --json")).unwrap();
    assert!(counters["counters"]["damaged"].as_u64().is_some_and(|damaged| damaged > 10), "{counters}");
    set(&proxies, Faults::default());
    is_well(&farm, "flip", &uri);
}
