//! The seeded simulator: the production engine in a hostile world, and a judge. `docs/TESTING.md` explains how to use it.
//!
//! `SEEDS=n` runs so many seeds from `FROM` (1) on; `SEED=n` replays one with its trace; `REQUESTS` (500) is the length of a
//! run; `SEED=n SHRINK=1` looks for a smaller run that fails alike; `TWICE=percent` (1) of the seeds run twice and must leave the same trace. Seeds that once failed
//! (`tests/data/seeds.txt`) always run first. The exit status tells whether all is well.

mod array;
#[cfg(feature = "bugs")]
mod bank;
// The two below are the integration tests' own, where a panic is how a test fails; not all of the bench is needed here.
#[cfg(feature = "bugs")]
#[allow(clippy::unwrap_used, dead_code)]
#[path = "../it/bench.rs"]
mod bench;
#[cfg(feature = "bugs")]
#[allow(clippy::unwrap_used)]
#[path = "../it/cases.rs"]
mod cases;
mod data;
mod disk;
mod errands;
mod excuse;
mod faults;
mod history;
mod hosts;
mod judge;
mod kept;
mod links;
mod losses;
mod net;
mod operator;
mod owner;
mod plan;
mod pure;
mod queue;
mod rng;
mod runner;
mod scrubs;
mod server;
mod shrink;
mod starts;
mod text;
mod trace;
mod world;

fn main() -> std::process::ExitCode {
    runner::main()
}
