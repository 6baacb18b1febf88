//! What is asked and told of an array daemon that goes on as another version of itself.

use serde::{Deserialize, Serialize};

use crate::control::status::State;

/// Answer to `POST /v1/upgrade`: it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// The program that goes on.
    pub program: String,
    /// The version that it says it is.
    pub version: String,
    /// Arrays that are started and shall be again.
    pub arrays: Vec<String>,
}

/// Answer to `GET /v1/upgrade`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// The daemon's version.
    pub version: String,
    /// How often this process has gone on as another program.
    pub upgrades: u32,
    /// All arrays.
    pub arrays: Vec<ArrayAfter>,
}

/// What an upgrade was for an array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrayAfter {
    /// Its name.
    pub array: String,
    /// What it is doing.
    pub state: State,
    /// Its block device or URI, while it is started.
    pub device: Option<String>,
    /// How long requests of its block device have waited at most, from the end of the former program until the device was served again,
    /// microseconds. None: its device is a new one, or NBD.
    pub waited_us: Option<u64>,
    /// What keeps it from being started.
    pub why: Option<String>,
}
