//! Performs the owner's work: one call per piece of work, which blocks until it is done. Runs in threads that may wait.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::control::command::Refusal;
use crate::control::spec::{ArraySpec, Phase};
use crate::control::status::Live;
use crate::control::target::Target;
use crate::control::why::Heard;
use crate::engine::array::{Halt, Outcome, Work};
use crate::engine::replicas::Saved;
use crate::engine::steer::Steer;
use crate::errno::Errno;
use crate::io::state_dir::StateDir;
use crate::limits;
use crate::roles::array::keeper::Tell;
use crate::roles::array::targets;
use crate::units::{Epoch, Id};
use crate::wire::volume::Claim;

/// The data path of one started array.
pub trait Running: Send + Sync {
    /// The block device's path, or the NBD URI.
    fn device(&self) -> String;

    /// Figures of now. Never waits.
    fn live(&self) -> Live;

    /// What its requests wait for that have waited for long. Waits a little for its I/O threads, never for I/O.
    fn why(&self) -> Heard;

    /// Whether each of its I/O threads has gone round since the last call that said so. Never waits.
    fn goes_round(&self) -> bool;

    /// Clients with connections that end with this process.
    fn clients(&self) -> usize;

    /// How long its block device was without a daemon when the process went on as this program, microseconds.
    fn waited_us(&self) -> Option<u64>;

    /// What has become of what it had asked to be made durable.
    fn regrouped(&self, saved: Saved);

    /// Something is asked of it.
    fn steer(&self, steer: Steer);

    /// Its device gets so many sectors; `None`: only says whether it could get more than it has.
    fn resize(&self, sectors: Option<u64>) -> Result<(), Refusal>;

    /// Takes no more requests, lets those in flight end within a bound, and ends. Refused while clients use it, unless `force`.
    /// Whether all replicas that are in sync are known to hold the same.
    fn stop(&self, force: bool) -> Result<bool, Refusal>;

    /// Ends with its process, and not before: the next one serves the device on. Whether it can.
    fn leave(&self) -> bool;

    /// The process is about to end, and the next one serves the device on: if the kernel can keep new requests back, what is in flight ends first,
    /// within a bound. Else, and with what has not ended, it is a death like any other.
    fn quiesce(&self);
}

/// Called when a data path ended by itself, with the reason.
pub type Died = Box<dyn FnOnce(String) + Send>;

/// What starts data paths.
pub trait Launcher: Send + Sync {
    /// Attaches every node under a claim that its volumes have accepted, but those that are late, and shows the device.
    /// `tell` is for changes of its replicas.
    fn launch(
        &self,
        spec: &ArraySpec,
        claim: (&Claim, &[usize]),
        died: Died,
        tell: Tell,
    ) -> Result<Arc<dyn Running>, Refusal>;

    /// Removes what data paths of a dead daemon have left in the kernel, but devices that somebody may use: those wait for the next
    /// start of their array, which `started` may be.
    fn clear_away(&self, started: &[Id]);

    /// Ends what a dead daemon has left of an array; refused while it is in use, unless `force`. There may be nothing.
    fn discard(&self, array: Id, force: bool) -> Result<(), Refusal>;
}

/// What work is performed with.
pub struct Performer {
    /// The records.
    pub state: StateDir,
    launcher: Box<dyn Launcher>,
    running: Mutex<BTreeMap<String, Arc<dyn Running>>>,
    /// Those that end with the process, and not before.
    left: Mutex<Vec<Arc<dyn Running>>>,
}

impl Performer {
    /// Works on the records of `state`, and starts data paths with `launcher`.
    pub fn new(state: StateDir, launcher: Box<dyn Launcher>) -> Performer {
        Performer { state, launcher, running: Mutex::default(), left: Mutex::default() }
    }

    /// Does what is asked; `died` and `tell` are for a data path that is launched.
    pub fn perform(&self, work: Work, died: Died, tell: Tell) -> Outcome {
        match work {
            Work::Survey(targets) => Outcome::Surveyed(each(&targets, targets::look)),
            Work::Assign(members) => {
                Outcome::Assigned(each(&members, |(target, member)| targets::assign(target, member)))
            }
            Work::Free(array, targets) => {
                let host = self.state.host();
                Outcome::Each(each(&targets, |target: &Target| targets::free(target, array, host)))
            }
            Work::Claim(array, epoch, targets) => self.claim(array, epoch, &targets),
            Work::Label(array, claim, labels) => {
                Outcome::Each(each(&labels, |(target, label)| targets::put_label(target, array, &claim, label)))
            }
            Work::Save(spec) => {
                Outcome::Saved(self.state.save(&spec).map_err(|error| Refusal::new(error.errno, error.text)))
            }
            Work::Forget(name) => {
                Outcome::Saved(self.state.remove(&name).map_err(|error| Refusal::new(error.errno, error.text)))
            }
            Work::Launch(spec, claim, late) => Outcome::Launched(self.launch(&spec, (&claim, &late), died, tell)),
            Work::Regroup(spec, claim, labels) => self.regroup(&spec, &claim, &labels),
            Work::Make(target, bytes) => Outcome::Each(vec![targets::make(&target, bytes)]),
            Work::Join(array, claim, targets) => {
                Outcome::Each(each(&targets, |(target, features)| targets::claim(target, array, &claim, *features)))
            }
            Work::Discard(array, targets) => {
                let host = self.state.host();
                Outcome::Each(each(&targets, |(target, remove)| targets::discard(target, array, host, *remove)))
            }
            Work::Resize(name, sectors) => Outcome::Each(vec![self.resize(&name, sectors)]),
            Work::Halt { name, array, how } => Outcome::Halted(self.halt(&name, array, how)),
        }
    }

    /// Removes what a dead daemon has left, but what arrays of these records go on with.
    pub fn clear_away(&self, records: &[(String, Result<ArraySpec, String>)]) {
        let specs = records.iter().filter_map(|(_, record)| record.as_ref().ok());
        let started = specs.filter(|spec| spec.phase == Phase::Started).map(|spec| spec.id);
        self.launcher.clear_away(&started.collect::<Vec<_>>());
    }

    /// The process is about to end: quiesces what was left to the next one.
    pub fn quiesce_left(&self) {
        quiesce(&self.left.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The data paths that run now.
    pub fn running(&self) -> BTreeMap<String, Arc<dyn Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Each claim has an owner of its own, so that two starts are never taken for one another.
    fn claim(&self, array: Id, epoch: Epoch, targets: &[(Target, u64)]) -> Outcome {
        let host = self.state.host();
        match targets::random_id() {
            Ok(owner) => {
                let claim = Claim { epoch, owner, host };
                let claimed = each(targets, |(target, features)| targets::claim(target, array, &claim, *features));
                Outcome::Claimed(claim, claimed)
            }
            Err(why) => Outcome::Claimed(
                Claim { epoch, owner: Id::NIL, host },
                targets.iter().map(|_| Err(why.clone())).collect(),
            ),
        }
    }

    /// The record first: a label that is newer than it would say that the record is old.
    fn regroup(&self, spec: &ArraySpec, claim: &Claim, labels: &[(Target, String)]) -> Outcome {
        match self.state.save(spec) {
            Ok(()) => {
                let put = |(target, label): &(Target, String)| targets::put_label(target, spec.id, claim, label);
                Outcome::Regrouped(Ok(()), each(labels, put))
            }
            Err(error) => Outcome::Regrouped(Err(Refusal::new(error.errno, error.text)), Vec::new()),
        }
    }

    fn launch(&self, spec: &ArraySpec, claim: (&Claim, &[usize]), died: Died, tell: Tell) -> Result<String, Refusal> {
        let running = self.launcher.launch(spec, claim, died, tell)?;
        let device = running.device();
        link_device(&spec.name, &device);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(spec.name.clone(), running);
        Ok(device)
    }

    fn resize(&self, name: &str, sectors: Option<u64>) -> Result<(), Refusal> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let gone = || Refusal::new(Errno::ENODEV, format!("array '{name}' is in use no more"));
        running.ok_or_else(gone)?.resize(sectors)
    }

    fn halt(&self, name: &str, array: Id, how: Halt) -> Result<bool, Refusal> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let Some(running) = running else {
            return self.launcher.discard(array, how == Halt::Forced).map(|()| false);
        };
        let settled = match (running.stop(how == Halt::Forced), how) {
            (Err(why), Halt::Leaving) if why.errno == Errno::EBUSY && running.leave() => {
                tracing::info!(array = name, why = why.text, "left as it is: the next daemon serves it on");
                self.left.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&running));
                std::mem::forget(running);
                return Ok(false);
            }
            (Err(_), Halt::Leaving) => running.stop(true)?,
            (result, _) => result?,
        };
        unlink_device(name);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(settled)
    }
}

/// Quiesces all at the same time, because the users of each wait meanwhile.
pub fn quiesce(paths: &[Arc<dyn Running>]) {
    std::thread::scope(|scope| {
        for running in paths {
            let thread = std::thread::Builder::new().name("dst-quiesce".to_owned());
            let thread = thread.stack_size(limits::THREAD_STACK_BYTES);
            if let Err(error) = thread.spawn_scoped(scope, || running.quiesce()) {
                // It is left as after a death.
                tracing::warn!(%error, "no thread to quiesce a device");
            }
        }
    });
}

/// The folder of stable names.
const LINKS: &str = "/dev/dst";

/// Points `/dev/dst/NAME` at a block device. A convenience: the array works without.
fn link_device(name: &str, device: &str) {
    if !device.starts_with("/dev/") {
        return;
    }
    let link = Path::new(LINKS).join(name);
    let temporary = Path::new(LINKS).join(format!(".{name}.tmp"));
    let _ = std::fs::remove_file(&temporary);
    let linked = std::fs::create_dir_all(LINKS)
        .and_then(|()| std::os::unix::fs::symlink(device, &temporary))
        .and_then(|()| std::fs::rename(&temporary, &link));
    if let Err(error) = linked {
        tracing::warn!(array = name, %error, "cannot make the link {}", link.display());
    }
}

fn unlink_device(name: &str) {
    let link = Path::new(LINKS).join(name);
    if let Err(error) = std::fs::remove_file(&link)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(array = name, %error, "cannot remove the link {}", link.display());
    }
}

/// Does the same for each item, a few at a time, and returns the results in order.
fn each<T: Sync, R: Send>(items: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let share = items.len().div_ceil(limits::SURVEY_THREADS_MAX).max(1);
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> =
            items.chunks(share).map(|share| scope.spawn(move || share.iter().map(act).collect::<Vec<R>>())).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}
