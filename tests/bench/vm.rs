//! `make bench-vm`: block devices in the guest of tests/vm, against those of the kernel's own clients.
//!
//! tests/vm/bench.sh measures in there and prints a line for each sample; here they become tables and ratios. The guest is emulated and
//! far slower than any machine: only ratios mean something.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::report::{Goal, Report, Sample, about};
use crate::{is_quick, results};

const TABLE: &str = "block device in the guest (fio, io_uring)";
const TWO: &str = "dst, two nodes";
const BARE: &str = "dst, two, no digests";
const NEAR: &str = "dst, two, 500us";
const NEAR_BARE: &str = "dst, two, 500us, no digests";
const NVME: &[&str] = &["NVMe/TCP, two, dm-stripe"];
const SEALED: &[&str] = &["NVMe/TCP, two, digests"];
const NBD: &[&str] = &["NBD, two, dm-stripe"];

/// Runs the guest, and shows what it has measured.
pub(crate) fn run() {
    let from = Instant::now();
    let text = |name: &str, otherwise: &str| std::env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    let (rounds, seconds, works) = if is_quick() { ("1", "1", "rand.*QD") } else { ("3", "3", ".") };
    let mut about = about("make bench-vm");
    let mut guest = Command::new("tests/vm/boot.sh")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // All of it takes a quarter of an hour; on a machine that is busy, longer.
        .args(["--memory", "3G", "--timeout", "3600", "tests/vm/bench.sh"])
        .args([text("ROUNDS", rounds), text("EACH", seconds), text("WORKS", works), text("PEERS", ".")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let report = read(BufReader::new(guest.stdout.take().unwrap()));
    assert!(guest.wait().unwrap().success(), "the guest has not reached its end");
    show(&report, &mut about);
    println!("bench: {} s; also in {}", from.elapsed().as_secs(), results().join("vm.*").display());
}

/// Shows what tests/vm/bench.sh has printed some time before.
pub(crate) fn show_log(path: &str) {
    let report = read(BufReader::new(std::fs::File::open(path).unwrap()));
    show(&report, &mut about("make bench-vm"));
}

fn show(report: &Report, about: &mut Value) {
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/vm/kernel.version");
    about["guest"] =
        json!({ "kernel": std::fs::read_to_string(kernel).unwrap_or_default().trim(), "cpus": 2, "emulated": true });
    let goals = goals(report);
    report.store(&results(), "vm", about, &goals);
    println!("{about:#}\n{}", report.text(&goals));
}

fn read(lines: impl BufRead) -> Report {
    let mut report = Report::default();
    for line in lines.lines() {
        let line = line.unwrap();
        match sample(&line) {
            Some(sample) => {
                eprintln!("{:28} {:22} {:8.0} a second", sample.who, sample.work, sample.rate);
                report.samples.push(sample);
            }
            None => eprintln!("{line}"),
        }
    }
    report
}

/// A line of tests/vm/bench.sh, if it is one of a sample.
fn sample(line: &str) -> Option<Sample> {
    let words: Vec<&str> = line.strip_prefix("sample|")?.split('|').collect();
    let number = |at: usize| words[at].parse::<f64>().unwrap_or(f64::NAN);
    Some(Sample {
        table: TABLE,
        work: words[1].to_owned(),
        who: words[0].to_owned(),
        round: words[2].parse().unwrap(),
        rate: number(3),
        p50_us: number(4),
        p99_us: number(5),
        server_us: number(6),
        client_us: f64::NAN,
        switches: number(7),
    })
}

/// What is wanted, as far as it was measured.
fn goals(report: &Report) -> Vec<Goal> {
    let rate = |who, work, against, bound| Goal {
        table: TABLE,
        work,
        who,
        against,
        what: "rate",
        figure: |sample| sample.rate,
        bound,
        most: false,
    };
    // With one request in flight the time of a request is what a rate says; a median would hide what is slow now and then.
    let time = |who, against, bound| Goal {
        what: "time of a request",
        figure: |sample| 1.0 / sample.rate,
        most: true,
        ..rate(who, "4k randread QD1", against, bound)
    };
    let works = report.works(TABLE);
    let whos = report.whos(TABLE);
    // Like with like: both with checksums of data, both without; and as they are when nobody says anything.
    let pairs = [(NEAR, SEALED), (NEAR_BARE, NVME), (TWO, SEALED), (BARE, NVME), (TWO, NVME)];
    let rates = [
        ("4k randread QD32", 4.0),
        ("4k randwrite QD32", 2.5),
        ("128k randread QD8", 1.1),
        ("128k randwrite QD8", 1.1),
        ("128k read QD8", 1.1),
        ("128k write QD8", 1.1),
    ];
    let rates = pairs.iter().flat_map(|(who, against)| rates.map(|(work, bound)| rate(*who, work, *against, bound)));
    let times = pairs.iter().map(|(who, against)| time(*who, *against, 1.5));
    let times = times.chain([NEAR, NEAR_BARE, TWO, BARE].map(|who| time(who, NBD, 1.0)));
    let measured = |goal: &Goal| {
        works.iter().any(|work| work == goal.work)
            && [goal.who, goal.against[0]].iter().all(|name| whos.iter().any(|who| who == name))
    };
    rates.chain(times).filter(measured).collect()
}
