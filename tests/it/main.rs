//! The one integration binary.

// In a test a panic is the verdict, in helper functions too.
#![allow(clippy::unwrap_used)]

mod bench;
mod busy;
mod cases;
mod chaos;
mod classic;
mod cli;
mod corpus;
mod farm;
mod grow;
mod host;
mod hosts;
mod late;
mod losses;
mod migrate;
mod nbd;
mod replicas;
mod scrub;
mod server;
mod service;
mod shadow;
mod shard;
mod tidy;
mod tree;
mod upgrade;
mod why;
