//! SIGINT and SIGTERM, waited for instead of handled: blocked in every thread, taken by the one that waits.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// The signals that end a daemon, blocked.
#[derive(Clone, Debug)]
pub struct Signals {
    set: SigSet,
}

impl Signals {
    /// Blocks them in this thread and in those that it starts afterwards. Call it before any thread is started.
    pub fn block() -> io::Result<Signals> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
        set.thread_block().map_err(io::Error::from)?;
        Ok(Signals { set })
    }

    /// Waits for one, and returns its name.
    pub fn wait(&self) -> io::Result<&'static str> {
        Ok(self.set.wait().map_err(io::Error::from)?.as_str())
    }
}
