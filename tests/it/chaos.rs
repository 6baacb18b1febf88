//! Whole arrays of real processes in a bad world: connections that are cut, delayed, swallowed, damaged; processes that die at any
//! instant and at each system call. `ROUNDS=n` runs more of it (`make soak`).

mod client;
mod dice;
mod journal;
mod kills;
mod migrate;
mod points;
mod power;
mod proxy;
mod storm;
mod trap;

/// How often the random tests go round: 30, or what `ROUNDS` says.
fn rounds() -> u32 {
    std::env::var("ROUNDS").map_or(30, |rounds| rounds.parse().expect("ROUNDS is a number"))
}

/// Where the dice of a test start: another place in each run, unless `SEED` says. A test prints it, and a failure can be tried again
/// with the same decisions; what processes and the kernel do beside them is not repeatable.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let chosen = std::env::var("SEED").map(|seed| seed.parse().expect("SEED is a number"));
    chosen.unwrap_or_else(|_| u64::from(now.subsec_nanos()))
}
