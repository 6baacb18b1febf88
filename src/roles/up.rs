//! Server and arrays in one process with everything under one directory: the quick start on one machine.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::control::command::Refusal;
use crate::io::notify::Notifier;
use crate::roles::array::daemon::{self, Daemon};
use crate::roles::array::perform::Launcher;
use crate::roles::server;

/// How it is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Holds `pool`, `state` and `dstd.sock`.
    pub dir: PathBuf,
    /// Where the server listens.
    pub listen: Vec<SocketAddr>,
    /// Whether to listen beyond loopback although nothing is encrypted or authenticated.
    pub danger_cleartext: bool,
    /// The control socket, where it shall not be in `dir`.
    pub socket: Option<PathBuf>,
}

/// Runs both roles until a signal ends them.
pub fn run(config: Config, launcher: Box<dyn Launcher>) -> Result<(), Refusal> {
    let signals = daemon::block_signals()?;
    let socket = config.socket.unwrap_or_else(|| config.dir.join("dstd.sock"));
    // The state's lock first: a second `dstd up` of the same directory must not touch the first one's pool.
    let state_dir = config.dir.join("state");
    let arrays = daemon::Config { state_dir, socket, tree: None, metrics: None, alone: false, danger_cleartext: false };
    let claimed = Daemon::claim(&arrays)?;
    let notifier = Notifier::from_environment().map(Arc::new);
    let config = server::Config {
        listen: config.listen,
        pool: config.dir.join("pool"),
        threads: 0,
        danger_cleartext: config.danger_cleartext,
    };
    let server = server::Server::start(config).map_err(|error| Refusal::new(error.errno, error.text))?;
    // The watchdog is the arrays': a server that hangs they notice by themselves.
    let daemon = Daemon::start(&arrays, claimed, launcher, notifier.clone())?;
    for address in server.addresses() {
        println!("server:  volumes are created at {address}, such as: dst volume create {address}/a --size 1G");
    }
    println!("arrays:  export DST_SOCKET={}", arrays.socket.display());
    if let Some(notifier) = &notifier {
        notifier.ready("serving volumes and arrays");
    }
    daemon::wait_for_end(&signals)?;
    if let Some(notifier) = &notifier {
        notifier.stopping();
    }
    let ended = daemon.stop();
    server.stop();
    ended
}
