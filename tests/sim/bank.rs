//! `BUGS=1`: every mistake of the bank is made in turn, and must be noticed, by the simulator or by a property. `BUGS=name,name` tries
//! some. `SEEDS` bounds the search.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use dst::bugs::Bug;

use crate::{cases, runner};

/// A bug is caught well enough after so many seeds have failed.
const CATCHES: u64 = 20;

/// How one bug fared in the simulator.
struct Hunt {
    tried: u64,
    caught: u64,
    /// The lowest seed that failed, and how.
    first: Option<(u64, String)>,
}

/// The property that notices a bug by itself.
fn property(bug: Bug) -> Option<&'static str> {
    dst::bugs::plant(Some(bug));
    let broken = cases::ALL.iter().find(|(_, case)| std::panic::catch_unwind(case).is_err());
    dst::bugs::plant(None);
    broken.map(|(name, _)| *name)
}

/// The bug of that name.
pub(crate) fn chosen(name: &str) -> Option<Bug> {
    Bug::ALL.iter().copied().find(|bug| format!("{bug:?}") == name)
}

/// Tries all bugs, or those of these names.
pub(crate) fn main(names: &str, seeds: u64, requests: u64) -> ExitCode {
    let mut bugs = Bug::ALL.to_vec();
    if names != "1" {
        bugs.clear();
        for name in names.split(',') {
            let Some(bug) = chosen(name) else {
                println!("bugs: there is no bug '{name}'");
                return ExitCode::from(2);
            };
            bugs.push(bug);
        }
    }
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in &bugs {
        let name = format!("{bug:?}");
        let Hunt { tried, caught, first } = hunt(*bug, seeds, requests);
        let property = property(*bug);
        if let Some((seed, rule)) = &first {
            println!("bugs: {name:<20} caught in {caught:>2} of {tried:>5} seeds, first {seed}: {rule}");
        }
        if let Some(case) = property {
            println!("bugs: {name:<20} caught by {case}");
        }
        if first.is_none() && property.is_none() {
            println!("bugs: {name:<20} NOT CAUGHT in {tried} seeds: {}", bug.text());
            missed.push(name);
        }
    }
    println!("bugs: {} of {} caught", bugs.len() - missed.len(), bugs.len());
    println!("checks: {} ok, {} failed", bugs.len() - missed.len(), missed.len());
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn hunt(bug: Bug, seeds: u64, requests: u64) -> Hunt {
    let next = AtomicU64::new(1);
    let hunt = Mutex::new(Hunt { tried: 0, caught: 0, first: None });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                dst::bugs::plant(Some(bug));
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let outcome = runner::run(seed, requests, false);
                    let Ok(mut hunt) = hunt.lock() else { return };
                    hunt.tried += 1;
                    if let Some(violation) = outcome.violation {
                        hunt.caught += 1;
                        if hunt.first.as_ref().is_none_or(|(first, _)| seed < *first) {
                            hunt.first = Some((seed, violation.to_string().lines().next().unwrap_or("").to_owned()));
                        }
                    }
                    if hunt.tried >= seeds || hunt.caught >= CATCHES {
                        return;
                    }
                }
            });
        }
    });
    hunt.into_inner().unwrap_or(Hunt { tried: 0, caught: 0, first: None })
}
