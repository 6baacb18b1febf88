//! SIGINT, SIGTERM and SIGUSR1, waited for instead of handled: blocked in every thread, taken by the one that waits.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// The signals that a daemon waits for, blocked.
#[derive(Clone, Debug)]
pub struct Signals {
    set: SigSet,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// To end; the signal's name.
    End(&'static str),
    /// To go on as the program that is installed now.
    Upgrade,
}

impl Signals {
    /// Blocks those that end a daemon in this thread and in those that it starts afterwards. Call it before any thread is started.
    pub fn block() -> io::Result<Signals> {
        Signals::block_all([Signal::SIGINT, Signal::SIGTERM])
    }

    /// The same, and the one that asks for an upgrade.
    pub fn block_with_upgrade() -> io::Result<Signals> {
        Signals::block_all([Signal::SIGINT, Signal::SIGTERM, Signal::SIGUSR1])
    }

    fn block_all(signals: impl IntoIterator<Item = Signal>) -> io::Result<Signals> {
        let set: SigSet = signals.into_iter().collect();
        set.thread_block().map_err(io::Error::from)?;
        Ok(Signals { set })
    }

    /// Waits for one.
    pub fn wait(&self) -> io::Result<Told> {
        match self.set.wait().map_err(io::Error::from)? {
            Signal::SIGUSR1 => Ok(Told::Upgrade),
            signal => Ok(Told::End(signal.as_str())),
        }
    }
}
