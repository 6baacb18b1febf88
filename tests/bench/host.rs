//! Throughput, latency and CPU time on the host: servers, exports, arrays over 1 to 8 servers; memory and idleness.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::farm::{Farm, run as tool};
use crate::fio::fio;
use crate::load::{self, Outcome, Work};
use crate::meter::cpu_of;
use crate::peers::{Contestant, EXPORT_BYTES, Ground, Way, array, fill, server};
use crate::report::{Goal, Report, Sample, about};
use crate::{MEMORY, idle, is_quick, results, wanted};

const SMALL: usize = 4 << 10;
const LARGE: usize = 256 << 10;

const SERVER: &str = "server (load generator, TCP)";
const EXPORT: &str = "NBD export, memory (fio, unix socket)";
const COPY: &str = "NBD export, memory (nbdcopy, unix socket, MiB/s)";
const DISK: &str = "NBD export, O_DIRECT on disk (fio, unix socket)";
const ARRAY: &str = "array striped over n servers (fio, unix socket)";

const DST_SERVER: &str = "dst server";
const DST_FILE: &str = "dst array, local file";
const DST_PATH: &str = "dst array + server";
const NBDKIT_FILE: &str = "nbdkit file";
const NBDKIT_MEMORY: &str = "nbdkit memory";
const QEMU: &str = "qemu-nbd io_uring";
const BEST: &[&str] = &[NBDKIT_FILE, QEMU];

const fn work(write: bool, bytes: usize, depth: usize) -> Work {
    Work { write, bytes, depth }
}

const ALL: [Work; 6] = [
    work(false, SMALL, 1),
    work(true, SMALL, 1),
    work(false, SMALL, 32),
    work(true, SMALL, 32),
    work(false, LARGE, 8),
    work(true, LARGE, 8),
];

/// How often, and how long each.
struct Effort {
    rounds: usize,
    seconds: f64,
}

fn effort() -> Effort {
    let rounds = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    if is_quick() {
        Effort { rounds: rounds.unwrap_or(1), seconds: 0.5 }
    } else {
        Effort { rounds: rounds.unwrap_or(3), seconds: 1.0 }
    }
}

/// Lets everybody do every kind of work, in turn.
fn compete(
    report: &mut Report,
    table: &'static str,
    contestants: &[Contestant],
    works: &[Work],
    run: impl Fn(&Contestant, Work, f64) -> Outcome,
) {
    let Effort { rounds, seconds } = effort();
    for contestant in contestants {
        run(contestant, works[0], 0.2);
    }
    for work in works {
        for round in 0..rounds {
            for place in 0..contestants.len() {
                // Nobody is always after the same one.
                let contestant = &contestants[(place + round) % contestants.len()];
                let cpu = cpu_of(&contestant.processes);
                let outcome = run(contestant, *work, seconds);
                let cpu = cpu_of(&contestant.processes) - cpu;
                let requests = outcome.requests as f64;
                report.samples.push(Sample {
                    table,
                    work: work.name(),
                    who: contestant.name.to_owned(),
                    round,
                    rate: requests / outcome.seconds,
                    p50_us: outcome.p50_us,
                    p99_us: outcome.p99_us,
                    server_us: cpu / requests * 1e6,
                    client_us: outcome.cpu_seconds / requests * 1e6,
                    switches: f64::NAN,
                });
            }
        }
    }
    eprintln!("{table}: done");
}

fn by_generator(contestant: &Contestant, work: Work, seconds: f64) -> Outcome {
    let Contestant { address, dialect, volume, .. } = contestant;
    load::run(address, *dialect, volume, EXPORT_BYTES, work, Duration::from_secs_f64(seconds))
}

fn by_fio(contestant: &Contestant, work: Work, seconds: f64) -> Outcome {
    fio(&contestant.uri, work, seconds, &[])
}

/// Copies a whole export out (read) and in (write).
fn by_nbdcopy(contestant: &Contestant, file: &Path, write: bool) -> Outcome {
    let from = Instant::now();
    let file = file.to_str().unwrap();
    if write {
        tool("nbdcopy", &["--no-extents", "--destination-is-zero", file, &contestant.uri]);
    } else {
        tool("nbdcopy", &["--no-extents", &contestant.uri, "null:"]);
    }
    Outcome { requests: EXPORT_BYTES >> 20, seconds: from.elapsed().as_secs_f64(), ..Outcome::default() }
}

/// The peers that serve a file in memory, and ours that does.
fn in_memory(ground: &Ground, farm: &Farm, way: Way) -> Vec<Contestant> {
    let copy = |who: &str| ground.file(&format!("{who}-{way:?}"));
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let (own, kits, qemus) = (copy("own"), copy("nbdkit"), copy("qemu"));
    let memory = ground.nbdkit(NBDKIT_MEMORY, way, &["memory", &EXPORT_BYTES.to_string()]);
    fill(&kits, &memory);
    vec![
        array(farm, DST_FILE, way, "linear", &[text(&own)], false),
        ground.nbdkit(NBDKIT_FILE, way, &["file", &text(&kits)]),
        memory,
        ground.qemu(QEMU, way, &qemus, "writeback"),
        ground.null(way),
    ]
}

fn servers(report: &mut Report) {
    let ground = Ground::new(Path::new(MEMORY));
    let farm = Farm::with_pools(&[ground.dir.join("pool")]);
    let mut contestants = in_memory(&ground, &farm, Way::Tcp);
    contestants.insert(0, server(&farm, DST_SERVER, "bench"));
    compete(report, SERVER, &contestants, &ALL, by_generator);
}

fn exports(report: &mut Report) {
    let ground = Ground::new(Path::new(MEMORY));
    let farm = Farm::with_pools(&[ground.dir.join("pool")]);
    let mut contestants = in_memory(&ground, &farm, Way::Unix);
    let volume = farm.volume(0, "whole", "256M");
    contestants.insert(1, array(&farm, DST_PATH, Way::Unix, "linear", &[volume], true));
    fill(&ground.dir.join("own-Unix"), &contestants[1]);
    if wanted("export") {
        compete(report, EXPORT, &contestants, &ALL, by_fio);
    }
    if wanted("copy") {
        let source = ground.file("source");
        let works = [work(false, LARGE, 64), work(true, LARGE, 64)];
        compete(report, COPY, &contestants, &works, |contestant, work, _| by_nbdcopy(contestant, &source, work.write));
        for sample in report.samples.iter_mut().filter(|sample| sample.table == COPY) {
            sample.work = if sample.work.contains("read") { "copy out" } else { "copy in" }.to_owned();
        }
    }
}

fn disks(report: &mut Report) {
    let ground = Ground::new(&std::env::temp_dir());
    let farm = Farm::with_pools(&[ground.dir.join("pool")]);
    let (own, qemus) = (ground.file("own"), ground.file("qemu"));
    let volume = farm.volume(0, "disk", "256M");
    let contestants = [
        array(&farm, DST_FILE, Way::Unix, "linear", &[own.to_str().unwrap().to_owned()], false),
        array(&farm, DST_PATH, Way::Unix, "linear", &[volume], true),
        ground.qemu(QEMU, Way::Unix, &qemus, "none"),
    ];
    fill(&own, &contestants[1]);
    compete(report, DISK, &contestants, &ALL[2..], by_fio);
}

fn arrays(report: &mut Report) {
    // Servers, nodes.
    const NAMES: [(usize, usize, &str); 5] = [
        (1, 1, "1 server"),
        (2, 2, "2 servers"),
        (4, 4, "4 servers"),
        (8, 8, "8 servers"),
        (1, 8, "8 nodes, 1 server"),
    ];
    let ground = Ground::new(Path::new(MEMORY));
    let mut contestants = Vec::new();
    let mut farms = Vec::new();
    for (servers, nodes, name) in NAMES {
        let pool = |index| ground.dir.join(format!("pool-{servers}-{nodes}-{index}"));
        let farm = Farm::with_pools(&(0..servers).map(pool).collect::<Vec<PathBuf>>());
        let size = format!("{}M", (EXPORT_BYTES >> 20) / nodes as u64);
        let volume = |node: usize| farm.volume(node % servers, &format!("part{node}"), &size);
        let volumes: Vec<String> = (0..nodes).map(volume).collect();
        contestants.push(array(&farm, name, Way::Unix, "striped", &volumes, true));
        farms.push(farm);
    }
    contestants.push(ground.null(Way::Unix));
    // The same bytes over the transport that arrays have to their servers, and nothing done with them.
    contestants.push(ground.null(Way::Tcp).named("nothing, over TCP"));
    compete(report, ARRAY, &contestants, &ALL, by_fio);
}

/// What is wanted. A ratio at most is of costs, at least of rates.
fn goals() -> Vec<Goal> {
    let rate = |table, work, who, against, bound| Goal {
        table,
        work,
        who,
        against,
        what: "rate",
        figure: |sample| sample.rate,
        bound,
        most: false,
    };
    let cost = |table, work, who, against, bound| Goal {
        table,
        work,
        who,
        against,
        what: "server CPU for an I/O",
        figure: |sample| sample.server_us,
        bound,
        most: true,
    };
    let mut goals = Vec::new();
    for (table, who) in [(SERVER, DST_SERVER), (SERVER, DST_FILE), (EXPORT, DST_FILE)] {
        goals.push(rate(table, "4k randread QD32", who, BEST, 1.2));
        goals.push(rate(table, "4k randwrite QD32", who, BEST, 1.1));
        goals.push(cost(table, "4k randread QD32", who, BEST, 0.67));
        goals.push(cost(table, "4k randwrite QD32", who, BEST, 0.67));
        goals.push(rate(table, "256k randread QD8", who, BEST, 1.2));
        goals.push(rate(table, "256k randwrite QD8", who, BEST, 1.2));
    }
    for name in ["4k randread QD32", "4k randwrite QD32", "256k randread QD8", "256k randwrite QD8"] {
        goals.push(rate(DISK, name, DST_FILE, &[QEMU], 1.2));
    }
    for name in ["4k randread QD32", "4k randwrite QD32"] {
        goals.push(cost(ARRAY, name, "8 nodes, 1 server", &["1 server"], 1.15));
        goals.push(cost(ARRAY, name, "8 servers", &["1 server"], 1.15));
    }
    goals
}

/// A part of the run, under the names by which it is wanted.
type Part = (&'static [&'static str], fn(&mut Report));

/// Those of the tables that were measured.
fn measured_goals(report: &Report) -> Vec<Goal> {
    let tables = report.tables();
    goals().into_iter().filter(|goal| tables.iter().any(|table| table == goal.table)).collect()
}

/// Runs everything that is wanted, and shows it.
pub(crate) fn run() {
    let mut report = Report::default();
    let from = Instant::now();
    let about = about("make bench");
    let parts: [Part; 5] = [
        (&["server"], servers),
        (&["export", "copy"], exports),
        (&["disk"], disks),
        (&["array"], arrays),
        (&["idle"], idle::measure),
    ];
    for (names, part) in parts {
        if names.iter().any(|name| wanted(name)) {
            part(&mut report);
            // What there is is kept, whatever becomes of the rest.
            report.store(&results(), "host", &about, &measured_goals(&report));
        }
    }
    let goals = measured_goals(&report);
    println!("{about:#}\n{}", report.text(&goals));
    println!("bench: {} s; also in {}", from.elapsed().as_secs(), results().join("host.*").display());
}
