//! `dstd`: parse arguments, pick the role, run it. No logic lives here.
fn main() {}
