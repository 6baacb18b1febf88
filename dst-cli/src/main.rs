//! `dst`: the command line.
fn main() {}
