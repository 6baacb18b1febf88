//! The ublk devices of this machine that are dst's, as they are shown.

use serde::{Deserialize, Serialize};

/// Who serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// A daemon does.
    Served,
    /// Its daemon has died: whoever uses it waits until the array is started again, or the device is deleted.
    Waiting,
    /// Nobody can use it any more: it is only its number that is taken.
    Dead,
}

impl DeviceState {
    /// As it is printed.
    pub fn word(self) -> &'static str {
        match self {
            DeviceState::Served => "served",
            DeviceState::Waiting => "waiting",
            DeviceState::Dead => "dead",
        }
    }
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `N` of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub path: String,
    /// The array that it shows, if this daemon has it.
    pub array: Option<String>,
    /// Who serves it.
    pub state: DeviceState,
    /// The process that does.
    pub pid: Option<u32>,
    /// Its queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
}

/// Answer to `GET /v1/devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// All of them, by number.
    pub devices: Vec<Device>,
}
