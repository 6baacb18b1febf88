//! The array role: the owner loop in a thread, its control socket, and the signals that end both.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::JoinHandle;

use crate::control::command::Refusal;
use crate::errno::Errno;
use crate::io::fuse::Mounted;
use crate::io::http;
use crate::io::http::scrape;
use crate::io::signals::Signals;
use crate::io::state_dir::StateDir;
use crate::roles::array::owner::{Handle, OwnerLoop};
use crate::roles::array::perform::{Launcher, Performer};

/// How the role is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the records of arrays are kept.
    pub state_dir: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Where the control tree is mounted; `None`: nowhere.
    pub tree: Option<PathBuf>,
    /// Where the figures are served over TCP; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Whether that may be beyond loopback although nothing is encrypted or authenticated.
    pub danger_cleartext: bool,
}

/// The role, running.
pub struct Daemon {
    handle: Handle,
    owner: Option<JoinHandle<Result<(), Refusal>>>,
    _tree: Option<Mounted>,
    _http: http::Server,
}

impl Daemon {
    /// Makes the state directory this process's own.
    pub fn claim(config: &Config) -> Result<StateDir, Refusal> {
        StateDir::open(&config.state_dir).map_err(|error| Refusal::new(error.errno, error.text))
    }

    /// Starts what the records say was started, and serves the socket.
    pub fn start(config: &Config, state: StateDir, launcher: Box<dyn Launcher>) -> Result<Daemon, Refusal> {
        let mut owner = OwnerLoop::new(Performer::new(state, launcher));
        let handle = owner.handle();
        // First, because it may be another daemon's; and whoever reaches it then sees every array.
        let socket = http::Bound::new(&config.socket)?;
        let metrics = config.metrics.map(|address| scrape::listen(address, config.danger_cleartext)).transpose()?;
        owner.boot()?;
        let http = socket.serve(std::sync::Arc::new(handle.clone()), metrics)?;
        let tree = config.tree.as_deref().map(|path| Mounted::new(path, std::sync::Arc::new(handle.clone())));
        let tree = tree.transpose()?;
        let thread = std::thread::Builder::new().name("dst-owner".to_owned()).spawn(move || owner.run());
        let no_thread = |error: std::io::Error| Refusal::new(Errno::from(&error), format!("no thread: {error}"));
        let owner = thread.map_err(no_thread)?;
        tracing::info!(state_dir = %config.state_dir.display(), socket = %config.socket.display(), "serving arrays");
        Ok(Daemon { handle, owner: Some(owner), _tree: tree, _http: http })
    }

    /// Halts what runs and ends. The arrays that were started come back at the next start.
    pub fn stop(mut self) -> Result<(), Refusal> {
        self.handle.shut_down();
        match self.owner.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(Refusal::new(Errno::EIO, "the owner of the arrays has failed: see the log")),
        }
    }
}

/// Runs the role until a signal ends it.
pub fn run(config: &Config, launcher: Box<dyn Launcher>) -> Result<(), Refusal> {
    let signals = block_signals()?;
    let daemon = Daemon::start(config, Daemon::claim(config)?, launcher)?;
    wait_for_end(&signals)?;
    daemon.stop()
}

/// Blocks the signals that end a daemon. Call it before any thread is started.
pub fn block_signals() -> Result<Signals, Refusal> {
    Signals::block().map_err(|error| Refusal::new(Errno::from(&error), format!("signals cannot be blocked: {error}")))
}

/// Waits for the first signal; the second one ends the process at once.
pub fn wait_for_end(signals: &Signals) -> Result<(), Refusal> {
    let failed =
        |error: std::io::Error| Refusal::new(Errno::from(&error), format!("signals cannot be waited for: {error}"));
    let signal = signals.wait().map_err(failed)?;
    tracing::info!(signal, "ending");
    let signals = signals.clone();
    let impatient = move || {
        if signals.wait().is_ok() {
            tracing::warn!("ended at once by a second signal");
            std::process::exit(1);
        }
    };
    // Without this thread a second signal does nothing, which is no reason not to end.
    let _ = std::thread::Builder::new().name("dst-signals".to_owned()).spawn(impatient);
    Ok(())
}
