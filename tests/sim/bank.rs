//! `BUGS=1`: every mistake of the bank is made in turn, and must be noticed. `BUGS=name` tries one. `SEEDS` bounds the search.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use dst::bugs::Bug;

use crate::runner;

/// A bug is caught well enough after so many seeds have failed.
const CATCHES: u64 = 20;

/// How one bug fared.
struct Hunt {
    tried: u64,
    caught: u64,
    /// The lowest seed that failed, and how.
    first: Option<(u64, String)>,
}

/// The chosen bug of the bank.
pub(crate) fn chosen(name: &str) -> Option<Bug> {
    Bug::ALL.iter().copied().find(|bug| format!("{bug:?}") == name)
}

/// Tries all bugs, or the one of that name.
pub(crate) fn main(name: &str, seeds: u64, requests: u64) -> ExitCode {
    let bugs: Vec<Bug> = if name == "1" { Bug::ALL.to_vec() } else { chosen(name).into_iter().collect() };
    if bugs.is_empty() {
        println!("bugs: there is no bug '{name}'");
        return ExitCode::from(2);
    }
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in &bugs {
        let hunt = hunt(*bug, seeds, requests);
        let Hunt { tried, caught, first } = hunt;
        match first {
            Some((seed, rule)) => {
                println!(
                    "bugs: {:<20} caught in {caught:>2} of {tried:>5} seeds, first {seed}: {rule}",
                    format!("{bug:?}")
                );
            }
            None => {
                println!("bugs: {:<20} NOT CAUGHT in {tried} seeds: {}", format!("{bug:?}"), bug.text());
                missed.push(format!("{bug:?}"));
            }
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
