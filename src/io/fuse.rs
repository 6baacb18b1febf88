//! The control tree as files: a FUSE filesystem that one thread of its own serves, knowing nothing but [`Source`].
//!
//! As in sysfs: a value is made when a file is read from its beginning, ends in one newline, is never cached, and can be waited for with
//! `poll`. Reading waits for nothing. What is written is handed on, and answered when it has been done: other files go on meanwhile.
//! Mounted by root without a helper; only root can look at it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{BackgroundSession, Config, MountOption, Session};
use nix::mount::{MntFlags, umount2};

use crate::control::command::{Command, Refusal};
use crate::control::status::ArrayStatus;
use crate::errno::Errno;
use crate::limits;

use self::files::Files;
use self::watch::Watch;

mod files;
mod names;
mod watch;

/// Called once with what came of a command.
pub type Done = Box<dyn FnOnce(Result<(), Refusal>) + Send>;

/// What the tree is made of.
pub trait Source: Send + Sync + 'static {
    /// All arrays as they are now. Never waits.
    fn arrays(&self) -> Vec<ArrayStatus>;

    /// One of them. Never waits.
    fn array(&self, name: &str) -> Option<ArrayStatus>;

    /// Hands a command on. Never waits; `done` may be called at once.
    fn submit(&self, command: Command, done: Done);
}

/// Takes a mount away, lazily if it is in use, which is then told as `false`.
pub type Unmount = Box<dyn Fn(&Path) -> io::Result<bool> + Send>;

/// A tree that is mounted and not served yet: who looks at it waits.
pub struct Bound {
    path: PathBuf,
    session: Session<Files>,
    watch: Arc<Watch>,
}

/// A tree that is there until this is dropped.
pub struct Mounted {
    path: PathBuf,
    session: Option<BackgroundSession>,
    watch: Arc<Watch>,
    watcher: Option<JoinHandle<()>>,
    unmount: Unmount,
}

impl Bound {
    /// Mounts the tree on a directory, which is made if it is not there, in place of one whose daemon has died. Starts no thread.
    pub fn new(path: &Path, source: Arc<dyn Source>) -> Result<Bound, Refusal> {
        detach_dead(path)?;
        make_directory(path)?;
        let watch = Arc::new(Watch::new(source));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("dst".to_owned()), MountOption::NoExec, MountOption::NoAtime];
        let session = Session::new(Files::new(Arc::clone(&watch)), path, &config);
        let session = session.map_err(|error| not_mounted(path, &error))?;
        Ok(Bound { path: path.to_owned(), session, watch })
    }

    /// Serves it from threads of its own; `unmount` takes it away at the end.
    pub fn serve(self, unmount: Unmount) -> Result<Mounted, Refusal> {
        let Bound { path, session, watch } = self;
        let session = session.spawn().map_err(|error| not_mounted(&path, &error))?;
        let mut mounted = Mounted { path, session: Some(session), watch: Arc::clone(&watch), watcher: None, unmount };
        let builder = std::thread::Builder::new().name("dst-tree".to_owned()).stack_size(limits::THREAD_STACK_BYTES);
        let thread = builder.spawn(move || watch.run());
        mounted.watcher = Some(thread.map_err(|error| not_mounted(&mounted.path, &error))?);
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.watch.end();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        let Some(session) = self.session.take() else { return };
        match (self.unmount)(&self.path) {
            Ok(true) => drop(session.join()),
            other => {
                // Somebody is in it. The name is free at once; the rest goes with this process, and the session would unmount it again.
                std::mem::forget(session);
                match other {
                    Err(error) => {
                        tracing::warn!(path = %self.path.display(), %error, "the control tree cannot be unmounted")
                    }
                    Ok(_) => tracing::info!(path = %self.path.display(), "the control tree is in use and is detached"),
                }
            }
        }
    }
}

fn not_mounted(path: &Path, error: &io::Error) -> Refusal {
    let next = match error.kind() {
        io::ErrorKind::NotFound => ": is there a /dev/fuse? 'modprobe fuse' makes it",
        io::ErrorKind::PermissionDenied => ": only root can",
        _ => "",
    };
    Refusal::new(Errno::from(error), format!("the control tree cannot be mounted on {}: {error}{next}", path.display()))
}

fn make_directory(path: &Path) -> Result<(), Refusal> {
    let failed = |error: io::Error| not_mounted(path, &error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let above = path.canonicalize().map_err(failed)?.parent().map(fs::metadata).transpose().map_err(failed)?;
    let device = fs::metadata(path).map_err(failed)?.dev();
    if above.is_some_and(|above| above.dev() != device) {
        let path = path.display();
        let text = format!("{path} is a mount of something else already: unmount that, or choose another --tree");
        return Err(Refusal::new(Errno::EBUSY, text));
    }
    Ok(())
}

/// Takes away what daemons that were killed have left there.
fn detach_dead(path: &Path) -> Result<(), Refusal> {
    for _ in 0..limits::TREE_DEAD_MAX {
        let dead = |error: &io::Error| error.raw_os_error() == Some(Errno::ENOTCONN.raw());
        match fs::metadata(path) {
            Err(error) if dead(&error) => {
                umount2(path, MntFlags::MNT_DETACH).map_err(|error| not_mounted(path, &error.into()))?;
                tracing::info!(path = %path.display(), "detached the control tree of a daemon that died");
            }
            _ => break,
        }
    }
    Ok(())
}
