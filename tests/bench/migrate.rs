//! Moves of nodes: how long requests wait, how fast data is copied, what those notice who have nothing to do with it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::farm::{Farm, run as tool};
use crate::fio::parse;
use crate::load::Outcome;
use crate::peers::{EXPORT_BYTES, Ground, Way, fill};
use crate::report::{Report, about, median};
use crate::{MEMORY, is_quick, results, wanted};

/// Freezes are wanted below this, with servers in memory.
const FREEZE_WANTED_MS: f64 = 5.0;
/// The nodes of the arrays that are moved a hundred times.
const SMALL_NODE: &str = "16M";
/// How often a move is looked at: seldom enough that looking is no load.
const LOOK: Duration = Duration::from_millis(50);

/// Runs everything that is wanted, and shows it.
pub(crate) fn run() {
    let mut report = Report::default();
    let (memory, disk) = (PathBuf::from(MEMORY), std::env::temp_dir());
    if wanted("freeze") {
        freezes(&mut report, "servers and records in memory", &memory, &memory);
        freezes(&mut report, "servers in memory, records on disk", &memory, &disk);
        freezes(&mut report, "servers and records on disk", &disk, &disk);
    }
    if wanted("copy") {
        copies(&mut report, "servers in memory", &memory, false);
        copies(&mut report, "servers on disk", &disk, true);
    }
    if wanted("foreground") {
        foreground(&mut report);
    }
    if wanted("suspend") {
        suspended(&mut report);
    }
    let about = about("make bench-migrate");
    report.store(&results(), "migrate", &about, &[]);
    println!("{about:#}\n{}", report.text(&[]));
    println!("bench-migrate: also in {}", results().join("migrate.*").display());
}

/// Two servers, whose pools lie on the ground; the array's records are below a directory.
fn two_servers(ground: &Ground, records: &Path) -> Farm {
    Farm::below(records, &[ground.dir.join("pool-a"), ground.dir.join("pool-b")])
}

/// A linear array of so many nodes on the first server; its URI. A volume `spare` is on the second.
fn line(farm: &Farm, nodes: usize, size: &str) -> String {
    let volumes: Vec<String> = (0..nodes).map(|index| farm.volume(0, &format!("n{index}"), size)).collect();
    farm.volume(1, "spare", size);
    farm.dst(&format!("create line --alg linear {}", volumes.join(" ")));
    farm.start_nbd("line", "--queues 2")
}

/// fio in the background on part of an array: a bounded number of requests a second, so that latency and not throughput is seen.
fn client(uri: &str, seconds: f64, rate: u32, offset: u64, size: u64, op: &str) -> Child {
    Command::new("fio")
        .args([
            "--name=client",
            "--ioengine=nbd",
            "--output-format=json",
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
        ])
        .args(["--bs=4k", "--iodepth=4", "--allow_file_create=0"])
        .args([format!("--rw=rand{op}"), format!("--uri={uri}"), format!("--runtime={}ms", (seconds * 1e3) as u64)])
        .args([format!("--offset={offset}"), format!("--size={size}"), format!("--rate_iops={rate}")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn outcome(client: Child, op: &str) -> Outcome {
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    parse(&String::from_utf8_lossy(&output.stdout), op)
}

/// Moves the first node; its certificate. A target that the busy machine was too slow for is asked again.
fn migrate(farm: &Farm, target: &str, options: &str) -> Value {
    for _ in 0..5 {
        let output = farm.try_dst(&format!("migrate line n-0 --to {target} --json {options}"));
        if output.status.success() {
            return serde_json::from_slice(&output.stdout).unwrap();
        }
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_secs(1));
    }
    panic!("{target} takes no node\n{}", farm.logs());
}

fn share(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * share).ceil() as usize;
    values[index.clamp(1, values.len()) - 1]
}

/// A node goes back and forth while it is written.
fn freezes(report: &mut Report, name: &str, below: &Path, records: &Path) {
    let count = if is_quick() { 10 } else { 100 };
    let ground = Ground::new(below);
    let farm = two_servers(&ground, records);
    let uri = line(&farm, 2, SMALL_NODE);
    let targets = [format!("{}/n0", farm.servers[0].address), format!("{}/spare", farm.servers[1].address)];
    let writer = client(&uri, 3600.0, 1000, 0, 16 << 20, "write");
    let (mut freezes, mut rolled_back, mut first) = (Vec::new(), 0, 0);
    let from = Instant::now();
    for number in 0..count {
        let certificate = migrate(&farm, &targets[(number + 1) % 2], "--rate 10G");
        freezes.push(certificate["freeze_nanos"].as_f64().unwrap() / 1e6);
        let again = certificate["rolled_back"].as_u64().unwrap_or(0);
        rolled_back += again;
        first += usize::from(again == 0);
    }
    let each = from.elapsed().as_secs_f64() / count as f64;
    stop(writer);
    let mut fact = |what: &str, value: f64, unit| report.facts.push((format!("freeze, {name}: {what}"), value, unit));
    fact("migrations", count as f64, "");
    fact("p50", share(freezes.clone(), 0.5), "ms");
    fact(&format!("p99 (wanted in memory: {FREEZE_WANTED_MS})"), share(freezes.clone(), 0.99), "ms");
    fact("longest", share(freezes.clone(), 1.0), "ms");
    fact("within --max-freeze (50 ms) at the first try", first as f64, "");
    fact("cut-overs rolled back", rolled_back as f64, "");
    fact("a whole migration of 16 MiB, mean", each * 1e3, "ms");
    eprintln!("freezes {name}: done");
}

fn stop(mut client: Child) {
    let _ = client.kill();
    let _ = client.wait();
}

/// How fast a node is copied, in MiB a second, against nbdcopy between files at the same two places. On a disk neither uses the page
/// cache.
fn copies(report: &mut Report, name: &str, below: &Path, direct: bool) {
    let rounds = if is_quick() { 1 } else { 5 };
    let ground = Ground::new(below);
    let farm = two_servers(&ground, &std::env::temp_dir());
    let size = format!("{}M", EXPORT_BYTES >> 20);
    let uri = line(&farm, 1, &size);
    let source = ground.file("source");
    tool("nbdcopy", &["--no-extents", source.to_str().unwrap(), &uri]);
    // In the pools, beside the volumes.
    let other = ground.dir.join("pool-b/copy.of");
    std::fs::copy(&source, &other).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let serve = |name, file: &Path| {
        if direct {
            ground.qemu(name, Way::Tcp, file, "none")
        } else {
            ground.nbdkit(name, Way::Tcp, &["file", &text(file)])
        }
    };
    let (from, to) = (serve("source", &source), serve("destination", &other));
    let peer_name = if direct { "qemu-nbd --cache=none" } else { "nbdkit file" };
    fill(&source, &to);
    let targets = [format!("{}/n0", farm.servers[0].address), format!("{}/spare", farm.servers[1].address)];
    let (mut ours, mut theirs, mut ratios, mut whole) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let begun = Instant::now();
        let rate = copy_rate(&farm, &targets[(round + 1) % 2]);
        whole.push((EXPORT_BYTES >> 20) as f64 / begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        tool("nbdcopy", &["--no-extents", "--flush", "--destination-is-zero", &from.uri, &to.uri]);
        let peer = (EXPORT_BYTES >> 20) as f64 / begun.elapsed().as_secs_f64();
        ours.push(rate);
        theirs.push(peer);
        ratios.push(rate / peer);
    }
    let mut fact = |what: &str, value: f64, unit| report.facts.push((format!("copy, {name}: {what}"), value, unit));
    fact("a migration copies", median(ours), "MiB/s");
    fact(&format!("nbdcopy --flush between two {peer_name}"), median(theirs), "MiB/s");
    fact("ratio, % (wanted: 90)", median(ratios) * 100.0, "%");
    fact("a migration as a whole, compared and cut over", median(whole), "MiB/s");
    let _ = std::fs::remove_file(other);
    eprintln!("copies {name}: done");
}

/// Moves the node; MiB a second while it was in the phase of copying.
fn copy_rate(farm: &Farm, target: &str) -> f64 {
    farm.dst(&format!("migrate line n-0 --to {target} --rate 100G --detach"));
    let mut looks: Vec<(Instant, f64)> = Vec::new();
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        assert!(Instant::now() < until, "it does not end\n{}", farm.logs());
        let status: Value = serde_json::from_str(&farm.dst("status line --json")).unwrap();
        let array = if status.is_array() { &status[0] } else { &status };
        let now = Instant::now();
        let Some(migration) = array["nodes"][0].get("migration") else { break };
        let copied = migration["copied"].as_f64().unwrap_or(0.0);
        if migration["state"] == "copying" {
            looks.push((now, copied));
        }
        std::thread::sleep(LOOK);
    }
    match (looks.first(), looks.last()) {
        (Some((from, begun)), Some((to, ended))) if to > from => {
            (ended - begun) / f64::from(1 << 20) / to.duration_since(*from).as_secs_f64()
        }
        _ => f64::NAN,
    }
}

/// What a client of the moving node notices while it is copied slowly.
fn foreground(report: &mut Report) {
    let rounds = if is_quick() { 1 } else { 5 };
    let ground = Ground::new(Path::new(MEMORY));
    let farm = two_servers(&ground, &std::env::temp_dir());
    let uri = line(&farm, 1, "64M");
    let targets = [format!("{}/n0", farm.servers[0].address), format!("{}/spare", farm.servers[1].address)];
    let mut numbers: Vec<[f64; 4]> = Vec::new();
    for round in 0..rounds {
        let quiet = outcome(client(&uri, 3.0, 2000, 0, 64 << 20, "write"), "write");
        // 64 MiB at 16 MiB a second are copied in 4 s.
        farm.dst(&format!("migrate line n-0 --to {} --rate 16M --detach", targets[(round + 1) % 2]));
        std::thread::sleep(Duration::from_millis(300));
        let moving = outcome(client(&uri, 3.0, 2000, 0, 64 << 20, "write"), "write");
        numbers.push([quiet.p50_us, quiet.p99_us, moving.p50_us, moving.p99_us]);
        while farm.dst("status line --json").contains("\"migration\"") {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let column = |place: usize| median(numbers.iter().map(|row| row[place]).collect());
    let mut fact = |what: &str, value: f64, unit| {
        report.facts.push((format!("4k randwrite, 2000/s, to a moving node (16 MiB/s): {what}"), value, unit));
    };
    fact("p50 without", column(0), "µs");
    fact("p50 during", column(2), "µs");
    fact("p99 without", column(1), "µs");
    fact("p99 during", column(3), "µs");
    fact("p99 during, to without", median(numbers.iter().map(|row| row[3] / row[1] * 100.0).collect()), "%");
    eprintln!("foreground: done");
}

/// What clients of other nodes notice while one is suspended.
fn suspended(report: &mut Report) {
    const NODE: u64 = 32 << 20;
    let rounds = if is_quick() { 1 } else { 7 };
    let ground = Ground::new(Path::new(MEMORY));
    let farm = two_servers(&ground, &std::env::temp_dir());
    let uri = line(&farm, 4, "32M");
    let mut numbers: Vec<[f64; 2]> = Vec::new();
    for round in 0..rounds {
        let mut pair = [0.0; 2];
        for place in 0..2 {
            // Who is first changes.
            let hold = (place + round) % 2 == 1;
            if hold {
                farm.dst("suspend line n-0 --ttl none");
            }
            let clients: Vec<Child> = (0..4).map(|node| client(&uri, 3.0, 500, node * NODE, NODE, "write")).collect();
            let mut worst: Vec<f64> = Vec::new();
            for (node, client) in clients.into_iter().enumerate().rev() {
                if node == 0 && hold {
                    farm.dst("resume line n-0");
                }
                let outcome = outcome(client, "write");
                if node > 0 {
                    worst.push(outcome.p99_us);
                }
            }
            pair[usize::from(hold)] = median(worst);
        }
        numbers.push(pair);
    }
    let column = |place: usize| median(numbers.iter().map(|row| row[place]).collect());
    let mut fact = |what: &str, value: f64, unit| {
        report.facts.push((format!("4k randwrite, 500/s each, to the other three of four nodes: {what}"), value, unit));
    };
    fact("p99", column(0), "µs");
    fact("p99 while one is suspended", column(1), "µs");
    fact("ratio, % (wanted: 110 at most)", median(numbers.iter().map(|row| row[1] / row[0] * 100.0).collect()), "%");
    eprintln!("suspend: done");
}
