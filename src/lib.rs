//! dst: disks of several machines as one Linux block device.
//!
//! This page is the floor plan. A file imports only from floors below its own; `tests/it/tidy.rs` enforces it.
//! `docs/ARCHITECTURE.md` says why.

// Floor 0, words.
pub mod bugs;
pub mod errno;
pub mod limits;
pub mod units;

// Floor 1, rules: no sockets, files, threads, clocks, randomness. Time is an argument.

/// Where an array's sectors live.
pub mod geometry {
    pub mod linear;
    pub mod map;
    pub mod striped;
}

/// What a request is, and what one I/O thread does with it.
pub mod engine {
    pub mod array;
    pub mod copy;
    pub mod link;
    pub mod losses;
    pub mod overlap;
    mod part;
    pub mod points;
    pub mod region;
    pub mod replicas;
    pub mod request;
    pub mod scrub;
    pub mod shard;
    pub mod shared;
    pub mod steer;
    pub mod survey;
    pub mod view;
}

/// What a server decides about its volumes.
pub mod store {
    pub mod budget;
    pub mod flush;
    pub mod kept;
    pub mod pool;
    pub mod record;
    pub mod region;
    pub mod session;
    pub mod state;
    pub mod volume;
}

/// Bytes on a wire: headers, messages, sessions.
pub mod wire {
    pub mod digest;
    pub mod frame;
    /// What NBD clients speak.
    pub mod nbd {
        pub mod address;
        pub mod export;
        pub mod handshake;
        pub mod transmission;
    }
    pub mod session;
    pub mod volume;
}

/// What people and programs ask for, and what is persisted of it.
pub mod control {
    pub mod command;
    pub mod device;
    pub mod label;
    pub mod member;
    pub mod metrics;
    pub mod migration;
    pub mod node;
    pub mod record;
    pub mod replica;
    pub mod scrub;
    pub mod spec;
    pub mod status;
    pub mod target;
    pub mod transfer;
    pub mod tree;
    pub mod upgrade;
    pub mod why;
}

// Floor 2, the world.

/// Rings, sockets, disks, devices.
#[cfg(feature = "world")]
pub mod io {
    pub mod boot;
    pub mod buffer;
    pub mod clock;
    pub mod config;
    pub mod copying;
    pub mod disk;
    pub mod exec;
    pub mod fuse;
    pub mod greet;
    pub mod http;
    pub mod label;
    pub mod link;
    pub mod local;
    pub mod memory;
    pub mod mounts;
    /// The NBD frontend.
    pub mod nbd {
        mod connection;
        pub mod frontend;
        pub mod listener;
        mod send;
        mod tags;
    }
    pub mod notify;
    pub mod pool;
    pub mod ring;
    pub mod serve;
    pub mod signals;
    pub mod state_dir;
    pub mod sysfs;
    pub mod ublk;
    pub mod wakeup;
}

// Floor 3, roles: one owner loop each.

/// What a process is for.
#[cfg(feature = "world")]
pub mod roles {
    /// Arrays: the owner, and the I/O threads.
    pub mod array {
        pub mod daemon;
        pub mod devices;
        pub mod keeper;
        pub mod launch;
        pub mod owner;
        pub mod path;
        pub mod perform;
        pub mod pulse;
        pub mod running;
        pub mod survey;
        pub mod targets;
        mod tree;
        pub mod upgrade;
        pub mod worker;
    }
    pub mod server;
    pub mod up;
}
