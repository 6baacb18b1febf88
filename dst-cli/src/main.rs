//! `dst`: the command line. Says what happened on stdout, what went wrong on stderr. Exit codes: 0 done, 1 failed, 2 usage.

use std::process::ExitCode;

use clap::Parser;

mod args;
mod client;
mod commands;
mod nodes;
mod render;

fn main() -> ExitCode {
    match commands::run(args::Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("dst: {why}");
            ExitCode::FAILURE
        }
    }
}
