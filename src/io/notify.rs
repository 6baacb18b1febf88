//! What a service manager is told: `sd_notify(3)`, a datagram of `NAME=VALUE` to the socket that `NOTIFY_SOCKET` names.
//!
//! Who starts dstd by hand has no such socket, and nobody is told. What cannot be delivered is dropped after [`limits::NOTIFY_MAX`]:
//! a manager that does not listen must not stop the daemon.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::limits;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The one that the environment names; `None`: nobody wants to know, or the name cannot be used, which is logged.
    pub fn from_environment() -> Option<Notifier> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let watchdog = watchdog(number("WATCHDOG_USEC"), number("WATCHDOG_PID"), std::process::id());
        match Notifier::new(&name, watchdog) {
            Ok(notifier) => Some(notifier),
            Err(error) => {
                tracing::warn!(socket = ?name, %error, "the service manager cannot be told anything");
                None
            }
        }
    }

    /// To the socket `name`: a path, or `@` and an abstract name.
    fn new(name: &OsStr, watchdog: Option<Duration>) -> io::Result<Notifier> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(limits::NOTIFY_MAX))?;
        Ok(Notifier { socket, address, watchdog })
    }

    /// How long the manager waits for [`alive`](Notifier::alive) before it takes the daemon for hung; `None`: it does not.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// It serves; `what` is shown to people.
    pub fn ready(&self, what: &str) {
        self.tell(&format!("READY=1\nSTATUS={what}"));
    }

    /// It is ending.
    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=ending");
    }

    /// It makes progress.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    fn tell(&self, state: &str) {
        if let Err(error) = self.socket.send_to_addr(state.as_bytes(), &self.address) {
            tracing::warn!(%error, state, "the service manager could not be told");
        }
    }
}

/// What the environment says of the watchdog, microseconds, and for which process.
fn watchdog(usec: Option<u64>, pid: Option<u64>, own: u32) -> Option<Duration> {
    let meant = pid.is_none_or(|pid| pid == u64::from(own));
    usec.filter(|usec| *usec != 0 && meant).map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_an_abstract_name_are_told() {
        let unique = format!("dst-notify-{}", std::process::id());
        let path = std::env::temp_dir().join(&unique);
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&unique).unwrap()).unwrap();
        for (socket, name) in [(by_path, path.clone().into_os_string()), (by_name, format!("@{unique}").into())] {
            let notifier = Notifier::new(&name, None).unwrap();
            notifier.ready("2 arrays");
            notifier.alive();
            notifier.stopping();
            let mut heard = [0; 100];
            for told in ["READY=1\nSTATUS=2 arrays", "WATCHDOG=1", "STOPPING=1\nSTATUS=ending"] {
                let bytes = socket.recv(&mut heard).unwrap();
                assert_eq!(std::str::from_utf8(&heard[..bytes]).unwrap(), told);
            }
        }
        std::fs::remove_file(path).unwrap();
        assert!(Notifier::new(OsStr::new("relative"), None).is_err());
        // Nobody listens: nothing comes of it.
        Notifier::new(OsStr::new("@dst-nobody"), None).unwrap().alive();
    }

    #[test]
    fn the_watchdog_is_this_process_s() {
        assert_eq!(watchdog(Some(2_000_000), Some(7), 7), Some(Duration::from_secs(2)));
        assert_eq!(watchdog(Some(2_000_000), None, 7), Some(Duration::from_secs(2)));
        assert_eq!(watchdog(Some(2_000_000), Some(8), 7), None);
        assert_eq!(watchdog(Some(0), None, 7), None);
        assert_eq!(watchdog(None, Some(7), 7), None);
    }
}
