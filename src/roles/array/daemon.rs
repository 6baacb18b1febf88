//! The array role: the owner loop in a thread, its control socket, and the signals that end both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::control::command::Refusal;
use crate::errno::Errno;
use crate::io::clock;
use crate::io::exec;
use crate::io::fuse::{self, Mounted};
use crate::io::http;
use crate::io::http::scrape;
use crate::io::memory;
use crate::io::mounts::{self, Former};
use crate::io::notify::Notifier;
use crate::io::signals::{Signals, Told};
use crate::io::state_dir::StateDir;
use crate::io::ublk::become_io_flusher;
use crate::limits;
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
    /// Whether the process is the role's alone and has no other thread yet: then it gets a mount namespace of its own.
    pub alone: bool,
    /// Whether that may be beyond loopback although nothing is encrypted or authenticated.
    pub danger_cleartext: bool,
}

/// The role, running.
pub struct Daemon {
    handle: Handle,
    owner: Option<JoinHandle<Result<(), Refusal>>>,
    tree: Option<Mounted>,
    http: http::Server,
    former: Option<Former>,
}

impl Daemon {
    /// Makes the state directory this process's own.
    pub fn claim(config: &Config) -> Result<StateDir, Refusal> {
        StateDir::open(&config.state_dir).map_err(|error| Refusal::new(error.errno, error.text))
    }

    /// Starts what the records say was started, and serves the socket. The loop of the owner feeds the watchdog of `notifier`.
    pub fn start(
        config: &Config,
        state: StateDir,
        launcher: Box<dyn Launcher>,
        notifier: Option<Arc<Notifier>>,
    ) -> Result<Daemon, Refusal> {
        let mut owner = OwnerLoop::new(Performer::new(state, launcher), notifier);
        let handle = owner.handle().upgradable(config.alone);
        // First, because it may be another daemon's; and whoever reaches it then sees every array.
        let socket = http::Bound::new(&config.socket)?;
        let metrics = config.metrics.map(|address| scrape::listen(address, config.danger_cleartext)).transpose()?;
        // Where everybody sees it; and before there is any thread, because namespaces are of threads.
        let tree = config.tree.as_deref().map(|path| fuse::Bound::new(path, Arc::new(handle.clone()))).transpose()?;
        let former = if config.alone { own_mounts() } else { None };
        let unmount =
            move |path: &Path| former.map_or_else(|| mounts::detach(path), |former| mounts::unmount(former, path));
        let tree = tree.map(|tree| tree.serve(Box::new(unmount))).transpose()?;
        owner.boot()?;
        let http = socket.serve(Arc::new(handle.clone()), metrics)?;
        let thread = std::thread::Builder::new().name("dst-owner".to_owned()).stack_size(limits::THREAD_STACK_BYTES);
        let thread = thread.spawn(move || owner.run());
        let no_thread = |error: std::io::Error| Refusal::new(Errno::from(&error), format!("no thread: {error}"));
        let owner = thread.map_err(no_thread)?;
        tracing::info!(state_dir = %config.state_dir.display(), socket = %config.socket.display(), "serving arrays");
        Ok(Daemon { handle, owner: Some(owner), tree, http, former })
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

impl Daemon {
    /// Goes on as the program that is installed now, in the middle of whatever is being done: block devices wait for it, as after a death, with
    /// nothing in flight where the kernel helps with that. Returns only when it could not be started: then the process has to end.
    pub fn go_on(self) -> Refusal {
        // Until the last moment devices are served. Answers that are ready go out first.
        drop(self.http);
        drop(self.tree);
        let back = self.former.map_or(Ok(()), mounts::go_back);
        let failed = back.and_then(|()| exec::installed()).map(|program| {
            // From here on the users of the devices wait.
            let left_at = clock::now();
            self.handle.quiesce();
            exec::go_on(&program, left_at)
        });
        let error = failed.unwrap_or_else(|error| error);
        // Devices must not be halted now.
        std::mem::forget(self.owner);
        Refusal::new(Errno::from(&error), format!("cannot go on as another program: {error}"))
    }
}

/// Runs the role until a signal ends it.
pub fn run(config: &Config, launcher: Box<dyn Launcher>) -> Result<(), Refusal> {
    let signals = Signals::block_with_upgrade().map_err(|error| no_signals(&error))?;
    keep_memory();
    let notifier = Notifier::from_environment().map(Arc::new);
    let daemon = Daemon::start(config, Daemon::claim(config)?, launcher, notifier.clone())?;
    if let Some(notifier) = &notifier {
        notifier.ready("serving arrays");
    }
    if wait_for_end(&signals)? == Told::Upgrade {
        return Err(daemon.go_on());
    }
    if let Some(notifier) = &notifier {
        notifier.stopping();
    }
    daemon.stop()
}

/// Writeback goes through this process: its memory stays, and what it allocates never waits for writeback. Threads inherit the latter. Call it
/// before any is started.
fn keep_memory() {
    if !become_io_flusher() {
        tracing::warn!("PR_SET_IO_FLUSHER is refused (CAP_SYS_RESOURCE): block devices cannot be served, NBD can");
    }
    if let Err(error) = memory::lock() {
        tracing::warn!(%error, "memory is not locked (CAP_IPC_LOCK, RLIMIT_MEMLOCK): when this daemon is swapped out its devices are slow");
    }
}

/// A namespace of mounts in which none of the devices is mounted, ever; `None`: it stays where it is.
fn own_mounts() -> Option<Former> {
    let left = mounts::leave();
    left.inspect_err(
        |error| tracing::warn!(%error, "no mount namespace of its own (CAP_SYS_ADMIN): end it before its container"),
    )
    .ok()
}

/// Blocks the signals that end a daemon. Call it before any thread is started.
pub fn block_signals() -> Result<Signals, Refusal> {
    Signals::block().map_err(|error| no_signals(&error))
}

fn no_signals(error: &std::io::Error) -> Refusal {
    Refusal::new(Errno::from(error), format!("signals cannot be waited for: {error}"))
}

/// Waits for the first signal. After one that ends the daemon, a second one ends the process at once.
pub fn wait_for_end(signals: &Signals) -> Result<Told, Refusal> {
    let told = signals.wait().map_err(|error| no_signals(&error))?;
    let Told::End(signal) = told else { return Ok(told) };
    tracing::info!(signal, "ending");
    let signals = signals.clone();
    let impatient = move || {
        if signals.wait().is_ok() {
            tracing::warn!("ended at once by a second signal");
            std::process::exit(1);
        }
    };
    // Without this thread a second signal does nothing, which is no reason not to end.
    let _ = std::thread::Builder::new()
        .name("dst-signals".to_owned())
        .stack_size(limits::THREAD_STACK_BYTES)
        .spawn(impatient);
    Ok(told)
}
