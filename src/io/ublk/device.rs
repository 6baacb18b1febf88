//! A device as its owner holds it: each call is an event for the control thread, waited for with a limit.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::Sender;
use std::time::Duration;

use libublk::sys;

use super::UblkConfig;
use super::UblkError;
use super::control;
use super::control::Origin;
use super::leftover::Leftover;
use super::preflight;
use super::queue::UblkQueue;
use crate::errno::Errno;
use crate::limits;

/// What one queue's thread runs. It returns when the queue is no longer up; a return before that ends the device.
pub type QueueMain = Box<dyn FnOnce(&mut UblkQueue<'_>) -> io::Result<()> + Send>;

/// How a device ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkEnd {
    /// Why, when nobody asked for it with `stop`.
    pub unasked: Option<String>,
}

/// A live device. Dropping it stops the device, used or not.
pub struct UblkDevice {
    id: u32,
    /// The features that the driver has given it.
    features: u64,
    events: Sender<Event>,
    step: Step,
    left: AtomicBool,
}

/// Where the answer to a caller goes.
pub(super) type Reply = Sender<Result<(), UblkError>>;

/// What reaches the control thread.
pub(super) enum Event {
    /// A queue thread has fetched all its tags.
    Ready { queue: u16, thread: i32 },
    /// A queue thread has ended, with nothing of it left in the kernel, or could not begin.
    Ended { queue: u16, result: Result<(), UblkError> },
    /// A worker has returned although its queue is up, or wants to.
    Failing { reason: String },
    /// Somebody wants the device stopped.
    Stop { force: bool, reply: Reply },
    /// Somebody wants it larger.
    Resize { sectors: u64, reply: Reply },
    /// The process is about to end and wants nothing in flight, within the limit.
    Quiesce { limit: Duration, reply: Reply },
}

/// What the control thread is doing, for the message of whoever waits for it in vain.
#[derive(Clone)]
pub(super) struct Step(Arc<Mutex<String>>);

impl Step {
    pub(super) fn new() -> Step {
        Step(Arc::new(Mutex::new("starting".to_owned())))
    }

    pub(super) fn begin(&self, text: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl UblkDevice {
    /// Makes the device and runs one worker per queue; there must be as many as [`usable_queues`](super::usable_queues) allows. Returns when
    /// `/dev/ublkbN` is there. `on_end` runs on the control thread when the device is gone, whether stopped or not.
    pub fn create(
        config: UblkConfig,
        workers: Vec<QueueMain>,
        on_end: impl FnOnce(UblkEnd) + Send + 'static,
    ) -> Result<UblkDevice, UblkError> {
        UblkDevice::begin(config, Origin::New, workers, on_end)
    }

    /// Serves a device on that its dead daemon has left: one worker per queue that it has. Requests that the dead one had are given out again,
    /// so whatever it has begun must be over for good. It waits until the kernel has noticed the death.
    pub fn recover(
        leftover: Leftover,
        config: UblkConfig,
        workers: Vec<QueueMain>,
        on_end: impl FnOnce(UblkEnd) + Send + 'static,
    ) -> Result<UblkDevice, UblkError> {
        UblkDevice::begin(config, Origin::Left(leftover), workers, on_end)
    }

    fn begin(
        config: UblkConfig,
        origin: Origin,
        workers: Vec<QueueMain>,
        on_end: impl FnOnce(UblkEnd) + Send + 'static,
    ) -> Result<UblkDevice, UblkError> {
        config.check()?;
        let offered = preflight::features()?;
        let (events, inbox) = mpsc::channel();
        let (started, wait) = mpsc::channel();
        let step = Step::new();
        control::spawn(config, (origin, offered), (events.clone(), inbox), step.clone(), workers, started, on_end)?;
        match wait.recv_timeout(limits::UBLK_START) {
            Ok(Ok((id, features))) => Ok(UblkDevice { id, features, events, step, left: AtomicBool::new(false) }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // Whatever it makes when the kernel answers at last, it shall undo.
                let (reply, _) = mpsc::channel();
                let _ = events.send(Event::Stop { force: true, reply });
                Err(UblkError::TimedOut { step: step.text(), after: limits::UBLK_START })
            }
        }
    }

    /// `N` of `/dev/ublkbN`.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// `ublkbN`, as under `/sys/class/block`.
    pub fn name(&self) -> String {
        format!("ublkb{}", self.id)
    }

    /// `/dev/ublkbN`.
    pub fn path(&self) -> String {
        format!("/dev/ublkb{}", self.id)
    }

    /// Stops and deletes the device, and returns when its workers have ended. Requests in flight are completed first: workers must be
    /// able to. Without `force` it is refused while the device is mounted, held or open. A device that is gone already is stopped.
    /// Blocks the calling thread up to `limit`; after that the device still stops when it can.
    pub fn stop(&self, force: bool, limit: Duration) -> Result<(), UblkError> {
        let (reply, answer) = mpsc::channel();
        match self.ask(Event::Stop { force, reply }, &answer, limit) {
            Err(error) if error.errno() == Errno::ENODEV => Ok(()),
            result => result,
        }
    }

    /// Whether the kernel can change its size while it is in use: one from 6.16 on, if it has made the device with that feature.
    pub fn can_resize(&self) -> bool {
        self.has(sys::UBLK_F_UPDATE_SIZE)
    }

    /// The same, and if not, why not.
    pub fn resizable(&self) -> Result<(), UblkError> {
        if self.can_resize() {
            return Ok(());
        }
        Err(UblkError::Unsupported(format!(
            "{} cannot change its size while it is in use: it was made by a kernel without UBLK_F_UPDATE_SIZE, which Linux has from 6.16 on; \
             after a stop and a start of the array its device has the new size",
            self.path()
        )))
    }

    /// Makes it larger while it is in use. What lies beyond its former end must be served before that.
    pub fn resize(&self, sectors: u64, limit: Duration) -> Result<(), UblkError> {
        self.resizable()?;
        let (reply, answer) = mpsc::channel();
        self.ask(Event::Resize { sectors, reply }, &answer, limit)
    }

    /// From now on dropping it does not stop it: it is served until the process ends, and then waits for the next one.
    pub fn leave(&self) {
        self.left.store(true, Ordering::SeqCst);
    }

    /// Whether [`quiesce`](UblkDevice::quiesce) is possible: with a kernel from 6.16 on, if it has made the device with that feature.
    pub fn can_quiesce(&self) -> bool {
        self.has(sys::UBLK_F_QUIESCE)
    }

    /// Leaves the device, just before the process ends: the kernel keeps new requests back for the next daemon, and those that the workers
    /// have in hand end. Whatever comes of it, there is no way back to serving: after an error, too, only the next daemon can
    /// ([`recover`](UblkDevice::recover)), and gets again what has not ended. Only a device that cannot do it is as it was. Takes `limit` at most, and as much
    /// again if the kernel does not answer.
    pub fn quiesce(&self, limit: Duration) -> Result<(), UblkError> {
        if !self.can_quiesce() {
            return Err(UblkError::Unsupported(format!(
                "{} cannot be quiesced: it was made by a kernel without UBLK_F_QUIESCE, which Linux has from 6.16 on; it can be left as it is",
                self.path()
            )));
        }
        self.leave();
        let (reply, answer) = mpsc::channel();
        self.ask(Event::Quiesce { limit, reply }, &answer, limit * 2)
    }

    fn has(&self, feature: u32) -> bool {
        self.features & u64::from(feature) != 0
    }

    /// Hands an event to the control thread and waits. ENODEV: that has ended, and the device is gone.
    fn ask(&self, event: Event, answer: &Receiver<Result<(), UblkError>>, limit: Duration) -> Result<(), UblkError> {
        let gone = || Err(UblkError::Refused { step: self.path(), errno: Errno::ENODEV });
        if self.events.send(event).is_err() {
            return gone();
        }
        match answer.recv_timeout(limit) {
            Ok(result) => result,
            // The control thread ended without reading the event.
            Err(RecvTimeoutError::Disconnected) => gone(),
            Err(RecvTimeoutError::Timeout) => Err(UblkError::TimedOut { step: self.step.text(), after: limit }),
        }
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        if self.left.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.stop(true, limits::UBLK_STOP) {
            tracing::error!(device = self.id, %error, "ublk: the device could not be stopped");
        }
    }
}
