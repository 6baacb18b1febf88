//! The log of peers that do not speak the protocol: bounded, so that whoever scans ports does not fill the disk.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::warn;

use crate::limits;

/// Shared by all threads of a server.
#[derive(Clone, Default)]
pub(crate) struct Rude(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    since: Option<Instant>,
    lines: u32,
    silent: u32,
}

impl Rude {
    /// Tells of a peer that was disconnected for what it sent, unless there were too many of late.
    pub(crate) fn tell(&self, peer: SocketAddr, volume: &str, what: &str) {
        // Plain counters: a panic elsewhere leaves nothing half done.
        let told = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.since.is_none_or(|since| since.elapsed() >= limits::SERVER_RUDE_PERIOD) {
            if told.silent > 0 {
                warn!(peers = told.silent, "more peers did not speak the protocol");
            }
            *told = Told { since: Some(Instant::now()), lines: 0, silent: 0 };
        }
        if told.lines < limits::SERVER_RUDE_LINES_MAX {
            told.lines += 1;
            warn!(%peer, volume, "disconnected: {what}");
        } else {
            told.silent += 1;
        }
    }
}
