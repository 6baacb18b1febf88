//! The seeded simulator: the production engine in a hostile world, and a judge. `docs/TESTING.md` explains how to use it.

mod data;
mod excuse;
mod history;
mod judge;
mod rng;
mod text;

fn main() -> std::process::ExitCode {
    match data::check("judge.txt", history::run) {
        Ok(count) => println!("sim: judge: {count} histories"),
        Err(different) => {
            print!("{different}");
            return std::process::ExitCode::FAILURE;
        }
    }
    std::process::ExitCode::SUCCESS
}
