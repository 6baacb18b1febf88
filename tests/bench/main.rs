//! `make bench`, `make bench-migrate` and `make bench-vm`: dst against its peers on this machine, everything on loopback.
//!
//! Machines are noisy. Whoever is compared is measured in turn, several rounds, so that what disturbs one disturbs all; figures are
//! medians, and a result is the ratio within a round. Beside each throughput stands the CPU time that server and client took for it.
//! `QUICK=1` is shorter and says less; `ONLY=word` runs the parts with that word in their name.

// Here a panic is the verdict; figures for people may be rounded.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod chart;
#[allow(dead_code)]
#[path = "../it/farm.rs"]
mod farm;
mod fio;
mod host;
mod idle;
mod load;
mod meter;
mod migrate;
mod null;
mod peers;
mod report;
mod vm;

use std::path::{Path, PathBuf};

/// Where data in memory lies.
pub(crate) const MEMORY: &str = "/dev/shm";

fn main() {
    // Cargo adds words of its own, which begin with dashes.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["host"] => host::run(),
        ["migrate"] => migrate::run(),
        ["vm"] => vm::run(),
        ["vm", log] => vm::show_log(log),
        ["null", tcp, socket] => null::serve(tcp, Path::new(socket), peers::EXPORT_BYTES),
        // `cargo test --benches` asks whether it works at all; there is nothing to see without a choice.
        [] => println!("say what: host, migrate, vm"),
        _ => panic!("there are: host, migrate, vm"),
    }
}

/// Whether a short run is wanted.
pub(crate) fn is_quick() -> bool {
    std::env::var_os("QUICK").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Whether a part of this name is to run.
pub(crate) fn wanted(part: &str) -> bool {
    std::env::var("ONLY").map_or(true, |only| only.split(',').any(|word| part.contains(word)))
}

/// Where results go.
pub(crate) fn results() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench")
}
