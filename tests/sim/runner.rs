//! Runs seeds: one with its trace, or many on all cores.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::judge::Violation;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::world::{self, Outcome, Stats};
use crate::{data, history, pure, shrink};

/// Seeds in a plain `cargo test`.
const SEEDS_DEFAULT: u64 = 300;
/// A run ends after so many failed seeds: the rest would say the same.
const FAILURES_MAX: usize = 10;
/// Seeds that a thread takes at a time.
const BATCH: u64 = 64;
/// A long run says after so many how far it is.
const PROGRESS: u64 = 50_000;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    match value.parse() {
        Ok(number) => Some(number),
        Err(_) => {
            eprintln!("sim: {name}={value} is not a number");
            std::process::exit(2);
        }
    }
}

/// A seed that failed.
struct Failure {
    seed: u64,
    violation: Violation,
}

/// What all seeds of a run have done.
#[derive(Default)]
struct Total {
    stats: Mutex<Stats>,
    failures: Mutex<Vec<Failure>>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, requests: u64, loud: bool) -> Outcome {
    let (plan, rng) = world::plan_of(seed, requests);
    run_plan(plan, rng, loud)
}

/// Runs one plan; a panic is a violation like any other.
pub(crate) fn run_plan(plan: Plan, rng: Rng, loud: bool) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| world::run(plan, rng, loud))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let violation = Violation { rule: "assertion", text: text.unwrap_or_else(|| "a panic".to_owned()) };
        Outcome { violation: Some(violation), hash: 0, stats: Stats::default() }
    })
}

/// Runs one seed, now and then twice: the same seed leaves the same trace.
fn run_checked(seed: u64, requests: u64, twice: u64) -> Outcome {
    let mut outcome = run(seed, requests, false);
    if outcome.violation.is_none()
        && seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 < twice * (u64::from(u32::MAX) / 100)
    {
        let again = run(seed, requests, false);
        if again.hash != outcome.hash {
            let text = "the same seed left another trace".to_owned();
            outcome.violation = Some(Violation { rule: "determinism", text });
        }
    }
    outcome
}

impl Total {
    fn add(&self, seed: u64, outcome: Outcome) {
        if let Ok(mut stats) = self.stats.lock() {
            let more = outcome.stats;
            stats.requests += more.requests;
            stats.errors += more.errors;
            stats.timeouts += more.timeouts;
            stats.faults += more.faults;
            stats.disk_errors += more.disk_errors;
            stats.damaged += more.damaged;
            stats.losses += more.losses;
            stats.scrubs += more.scrubs;
            stats.found += more.found;
            stats.repaired += more.repaired;
            stats.events += more.events;
            stats.wakes += more.wakes;
            stats.late += more.late;
            stats.came += more.came;
            stats.resumed += more.resumed;
            stats.taken += more.taken;
            stats.retaken += more.retaken;
            stats.outrun += more.outrun;
            stats.fenced += more.fenced;
        }
        if let Some(violation) = outcome.violation
            && let Ok(mut failures) = self.failures.lock()
        {
            if failures.len() < FAILURES_MAX {
                println!("sim: SEED={seed}: {violation}");
            }
            failures.push(Failure { seed, violation });
        }
    }

    fn is_over(&self) -> bool {
        self.failures.lock().is_ok_and(|failures| failures.len() >= FAILURES_MAX)
    }
}

/// Runs the seeds from `from` up to `until` on all cores. How many were run.
fn run_all(from: u64, until: u64, requests: u64, total: &Total) -> u64 {
    let twice = number("TWICE").unwrap_or(1);
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let started = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let first = next.fetch_add(BATCH, Ordering::Relaxed);
                    for seed in first..(first + BATCH).min(until) {
                        total.add(seed, run_checked(seed, requests, twice));
                        say_progress(done.fetch_add(1, Ordering::Relaxed) + 1, until - from, started);
                        if total.is_over() {
                            stop.store(true, Ordering::Relaxed);
                            break;
                        }
                    }
                    if first + BATCH >= until {
                        break;
                    }
                }
            });
        }
    });
    done.into_inner()
}

/// For people, who would else sit before a silent machine for half an hour.
fn say_progress(done: u64, all: u64, started: Instant) {
    if done.is_multiple_of(PROGRESS) && done < all {
        let rate = done as f64 / started.elapsed().as_secs_f64().max(0.001);
        let left = (all - done) as f64 / rate / 60.0;
        eprintln!("sim: {done} of {all} seeds ({rate:.0}/s), about {left:.0} min left");
    }
}

/// One seed, with everything that happens.
fn replay(seed: u64, requests: u64) -> ExitCode {
    let (mut plan, rng) = world::plan_of(seed, requests);
    if number("SHRINK").is_some() {
        std::panic::set_hook(Box::new(|_| {}));
        match shrink::shrink(plan.clone(), &rng) {
            Some(smaller) => plan = smaller,
            None => println!("sim: SEED={seed} is clean, there is nothing to shrink"),
        }
    }
    let outcome = run_plan(plan, rng, true);
    match outcome.violation {
        Some(violation) => {
            println!("sim: SEED={seed}: {violation}");
            ExitCode::FAILURE
        }
        None => {
            println!("sim: SEED={seed} is clean; trace {:016x}", outcome.hash);
            ExitCode::SUCCESS
        }
    }
}

/// The seeds that once failed: `SEED [REQUESTS]`, then what it was.
fn kept_seeds() -> Result<Vec<(u64, Option<u64>)>, String> {
    let path = data::directory().join("seeds.txt");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let seed = words.next().and_then(|word| word.parse().ok()).ok_or_else(|| format!("seeds.txt: {line}"))?;
            Ok((seed, words.next().and_then(|word| word.parse().ok())))
        })
        .collect()
}

pub(crate) fn main() -> ExitCode {
    let requests = number("REQUESTS").unwrap_or(500);
    #[cfg(feature = "bugs")]
    if let Ok(name) = std::env::var("BUGS") {
        if let Some(seed) = number("SEED") {
            dst::bugs::plant(crate::bank::chosen(&name));
            return replay(seed, requests);
        }
        return crate::bank::main(&name, number("SEEDS").unwrap_or(4000), requests);
    }
    if let Some(seed) = number("SEED") {
        return replay(seed, requests);
    }
    let judge: pure::Table = ("judge.txt", history::run);
    let mut cases = 0;
    for (name, function) in [judge].into_iter().chain(pure::TABLES) {
        match data::check(name, function) {
            Ok(count) => {
                println!("sim: {name}: {count} cases");
                cases += count as u64;
            }
            Err(different) => {
                print!("{different}");
                println!("checks: 0 ok, 1 failed");
                return ExitCode::FAILURE;
            }
        }
    }
    let kept = match kept_seeds() {
        Ok(kept) => kept,
        Err(error) => {
            println!("sim: {error}");
            return ExitCode::FAILURE;
        }
    };
    // The message of a panic is part of the verdict.
    std::panic::set_hook(Box::new(|_| {}));
    let total = Total::default();
    for (seed, length) in &kept {
        total.add(*seed, run_checked(*seed, length.unwrap_or(requests), 100));
    }
    let from = number("FROM").unwrap_or(1);
    let seeds = number("SEEDS").unwrap_or(SEEDS_DEFAULT);
    let started = Instant::now();
    let done = run_all(from, from + seeds, requests, &total);
    let seconds = started.elapsed().as_secs_f64();
    summary(&total, done, (cases, kept.len() as u64), seconds)
}

fn summary(total: &Total, done: u64, (cases, kept): (u64, u64), seconds: f64) -> ExitCode {
    let stats = total.stats.lock().map(|stats| *stats).unwrap_or_default();
    let failures = total.failures.lock().map(|failures| failures.len()).unwrap_or(1);
    println!(
        "sim: {done} seeds and {kept} kept ones in {seconds:.1} s ({:.0}/s): {} requests ({} errors, {} of them time-outs), \
         {} faults, {} lost connections, {} disk errors, {} damaged frames, {} scrubs ({} regions differed, {} put right), {} late nodes ({} served), \
         {} moves that went on where they were, \
         {} take-overs ({} refused and tried again, {} of them outrun; {} requests of former hosts refused), {} wakes, {} events",
        done as f64 / seconds.max(0.001),
        stats.requests,
        stats.errors,
        stats.timeouts,
        stats.faults,
        stats.losses,
        stats.disk_errors,
        stats.damaged,
        stats.scrubs,
        stats.found,
        stats.repaired,
        stats.late,
        stats.came,
        stats.resumed,
        stats.taken,
        stats.retaken,
        stats.outrun,
        stats.fenced,
        stats.wakes,
        stats.events,
    );
    // For tests/run.sh, which adds up.
    println!("checks: {} ok, {failures} failed", cases + done + kept - failures as u64);
    if failures == 0 {
        println!("sim: all clean");
        return ExitCode::SUCCESS;
    }
    if let Ok(failures) = total.failures.lock() {
        let seeds: Vec<String> = failures.iter().map(|failure| failure.seed.to_string()).collect();
        let rules: std::collections::BTreeSet<&str> = failures.iter().map(|failure| failure.violation.rule).collect();
        println!("sim: {} seeds FAILED ({rules:?}): {}", seeds.len(), seeds.join(" "));
    }
    ExitCode::FAILURE
}
