//! An array daemon that goes on as what is installed now.
//!
//! It does not halt anything: whoever uses a block device would notice that. It stops answering on its socket, and ends as if it had been killed,
//! in the middle of whatever it does; the next program, in the same process, takes its devices on as after any death. Nothing else has to
//! be right for that than what must be right when it dies; that a newer kernel lets requests in flight end first only spares making them again. An NBD client has a connection, which does not survive: so that is asked for.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control::command::Refusal;
use crate::control::status::{ArrayStatus, State};
use crate::control::upgrade::{ArrayAfter, Upgrade, Upgraded};
use crate::errno::Errno;
use crate::io::exec::{self, Life};

/// One array, how many NBD clients it has, and how long its device was without a daemon.
pub struct Seen {
    /// The array.
    pub status: ArrayStatus,
    /// Clients whose connections would be cut.
    pub clients: usize,
    /// The wait of an upgrade, microseconds.
    pub waited_us: Option<u64>,
}

/// Says what will go on, and has the daemon's first thread do so.
pub fn begin(arrays: &[Seen], force: bool) -> Result<Upgrade, Refusal> {
    if let Some(array) = arrays.iter().find(|array| array.clients > 0).filter(|_| !force) {
        let text = format!(
            "{} NBD client(s) of array '{}' would lose their connections: disconnect them first, or use --force",
            array.clients, array.status.name
        );
        return Err(Refusal::new(Errno::EBUSY, text));
    }
    let refused = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| Refusal::new(Errno::from(&error), format!("not upgraded: {what}: {error}"))
    };
    let program = exec::installed().map_err(refused("where this program lies is not known"))?;
    let shown = program.display().to_string();
    let version = exec::version(&program).map_err(refused(&format!("{shown} cannot go on")))?;
    let started = arrays.iter().filter(|array| array.status.state == State::Started);
    let arrays = started.map(|array| array.status.name.clone()).collect();
    tracing::info!(program = shown, version, "going on as what is installed now");
    kill(Pid::this(), Signal::SIGUSR1).map_err(|error| refused("the daemon cannot be told")(error.into()))?;
    Ok(Upgrade { program: shown, version, arrays })
}

/// What came of it.
pub fn tell(arrays: Vec<Seen>) -> Upgraded {
    let after = |seen: Seen| ArrayAfter {
        array: seen.status.name,
        state: seen.status.state,
        device: seen.status.device,
        waited_us: seen.waited_us,
        why: seen.status.why,
    };
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Upgraded { version, upgrades: Life::own().upgrades, arrays: arrays.into_iter().map(after).collect() }
}
