//! `dst`: the command line. Says what happened on stdout, what went wrong on stderr. Exit codes: 0 done, 1 failed, 2 usage.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

mod args;
mod classic;
mod client;
mod commands;
mod nodes;
#[path = "../../src/main/pages.rs"]
mod pages;
mod render;
mod scrub;
mod upgrade;

fn main() -> ExitCode {
    let typed: Vec<OsString> = std::env::args_os().skip(1).collect();
    let done = if classic::is_meant(typed.first()) {
        match classic::parse(&typed) {
            Ok(call) => classic::run(&call),
            Err(why) => {
                eprintln!("dst: {why}\n\n{}", classic::HELP);
                return ExitCode::from(2);
            }
        }
    } else {
        commands::run(args::Arguments::parse())
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("dst: {why}");
            ExitCode::FAILURE
        }
    }
}
