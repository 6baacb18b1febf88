//! The control thread of one device: from ADD_DEV to DEL_DEV, in one place and one order.
//!
//! Callers talk to it through events and wait with a limit. Every path, also that of a failed start, ends in `tear_down`.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use libublk::UblkFlags;
use libublk::ctrl::UblkCtrl;
use libublk::ctrl::UblkCtrlBuilder;
use libublk::io::UblkDev;
use libublk::sys;

use super::UblkConfig;
use super::UblkError;
use super::answered;
use super::claim::claim;
use super::leftover::Leftover;
use super::leftover::mark;
use super::preflight;
use super::queue::UblkQueue;
use super::queue::become_io_flusher;
use crate::errno::Errno;
use crate::io::ring::Frontend;
use crate::limits;

/// A dead daemon's device waits for the next one, which gets its requests again.
pub(super) const FEATURES: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

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
    events: Sender<Event>,
    step: Step,
    left: AtomicBool,
}

/// What reaches the control thread.
enum Event {
    /// A queue thread has fetched all its tags.
    Ready { queue: u16, thread: i32 },
    /// A queue thread has ended, with nothing of it left in the kernel, or could not begin.
    Ended { queue: u16, result: Result<(), UblkError> },
    /// A worker has returned although its queue is up, or wants to.
    Failing { reason: String },
    /// Somebody wants the device stopped.
    Stop { force: bool, reply: Sender<Result<(), UblkError>> },
}

/// What the control thread is doing, for the message of whoever waits for it in vain.
#[derive(Clone)]
struct Step(Arc<Mutex<String>>);

impl Step {
    fn new() -> Step {
        Step(Arc::new(Mutex::new("starting".to_owned())))
    }

    fn begin(&self, text: impl Into<String>) {
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
        preflight::check()?;
        let (events, inbox) = mpsc::channel();
        let (started, wait) = mpsc::channel();
        let step = Step::new();
        let sender = events.clone();
        let control = Control { config, origin, sender, inbox, backlog: VecDeque::new(), step: step.clone() };
        std::thread::Builder::new()
            .name("ublk-control".to_owned())
            .stack_size(limits::THREAD_STACK_BYTES)
            .spawn(move || control.run(workers, started, on_end))
            .map_err(|error| UblkError::Refused { step: "control thread".to_owned(), errno: Errno::from(&error) })?;
        match wait.recv_timeout(limits::UBLK_START) {
            Ok(Ok(id)) => Ok(UblkDevice { id, events, step, left: AtomicBool::new(false) }),
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
        if self.events.send(Event::Stop { force, reply }).is_err() {
            return Ok(());
        }
        match answer.recv_timeout(limit) {
            Ok(result) => result,
            // The control thread ended without reading the event: the device is gone.
            Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(UblkError::TimedOut { step: self.step.text(), after: limit }),
        }
    }
}

impl UblkDevice {
    /// From now on dropping it does not stop it: it is served until the process ends, and then waits for the next one.
    pub fn leave(&self) {
        self.left.store(true, Ordering::SeqCst);
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

/// Where a device comes from.
#[derive(Clone, Copy)]
enum Origin {
    /// It is made.
    New,
    /// A dead daemon has left it.
    Left(Leftover),
}

/// The control thread's state before there is a device.
struct Control {
    config: UblkConfig,
    origin: Origin,
    sender: Sender<Event>,
    inbox: Receiver<Event>,
    /// Events that came while others were waited for.
    backlog: VecDeque<Event>,
    step: Step,
}

/// What the control thread owns of a device that was added.
struct Added {
    /// Deletes the device when dropped, on this thread, if it was made here.
    control: UblkCtrl,
    device: Arc<UblkDev>,
    threads: Vec<JoinHandle<()>>,
}

impl Control {
    fn run(mut self, workers: Vec<QueueMain>, started: Sender<Result<u32, UblkError>>, on_end: impl FnOnce(UblkEnd)) {
        let added = match self.origin {
            Origin::New => self.add(workers.len()),
            Origin::Left(leftover) => self.take_up(leftover, workers.len()),
        };
        let mut added = match added {
            Ok(added) => added,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let id = added.device.dev_info.dev_id;
        if let Err(error) = self.start(&mut added, workers) {
            if let Origin::Left(_) = self.origin {
                // Its commands can be taken back only with the device, on which somebody's filesystem is. The next daemon tries again.
                tracing::error!(array = self.config.name, device = id, %error, "ublk: the device cannot be served on; the process ends");
                std::process::abort();
            }
            self.tear_down(added);
            let _ = started.send(Err(error));
            return;
        }
        let recovered = matches!(self.origin, Origin::Left(_));
        tracing::info!(
            array = self.config.name,
            device = id,
            queues = added.threads.len(),
            recovered,
            "ublk: device started"
        );
        let _ = started.send(Ok(id));

        let (unasked, reply) = self.serve(&added);
        self.tear_down(added);
        match &unasked {
            None => tracing::info!(array = self.config.name, device = id, "ublk: device stopped"),
            Some(reason) => tracing::error!(array = self.config.name, device = id, reason, "ublk: device ended"),
        }
        if let Some(reply) = reply {
            let _ = reply.send(Ok(()));
        }
        on_end(UblkEnd { unasked });
    }

    /// ADD_DEV, and the driver's answer read back.
    fn add(&self, queues: usize) -> Result<Added, UblkError> {
        let config = &self.config;
        let wanted = u16::try_from(queues).unwrap_or(u16::MAX);
        let id = config.id.map_or(Ok(-1), i32::try_from);
        let id = id.map_err(|_| UblkError::Config(format!("device number {:?} is too large", config.id)))?;
        self.step.begin("ADD_DEV");
        let control = UblkCtrlBuilder::default()
            .name("dst")
            .id(id)
            .nr_queues(wanted)
            .depth(config.depth)
            .io_buf_bytes(config.buffer_bytes)
            .ctrl_flags(FEATURES)
            .ctrl_target_flags(mark(config.owner))
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
            .build()
            .map_err(UblkError::refused("ADD_DEV"))?;
        let info = control.dev_info();
        if (info.nr_hw_queues, info.queue_depth, info.max_io_buf_bytes) != (wanted, config.depth, config.buffer_bytes) {
            return Err(UblkError::Config(format!(
                "the ublk driver gives {} queues of depth {} with buffers of {} bytes where {wanted}, {} and {} were asked for; ask for that",
                info.nr_hw_queues, info.queue_depth, info.max_io_buf_bytes, config.depth, config.buffer_bytes
            )));
        }
        self.open(control)
    }

    /// START_USER_RECOVERY: the device of a dead daemon, if it is the one that is wanted.
    fn take_up(&self, leftover: Leftover, queues: usize) -> Result<Added, UblkError> {
        let id = i32::try_from(leftover.id);
        let id = id.map_err(|_| UblkError::Config(format!("device number {} is too large", leftover.id)))?;
        if queues != usize::from(leftover.queues) {
            let text = format!("device {id} has {} queues, not {queues}", leftover.queues);
            return Err(UblkError::Config(text));
        }
        self.step.begin("GET_DEV_INFO");
        let control = UblkCtrlBuilder::default()
            .name("dst")
            .id(id)
            .nr_queues(leftover.queues)
            .depth(leftover.depth)
            .io_buf_bytes(leftover.buffer_bytes)
            .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
            .build()
            .map_err(UblkError::refused("GET_DEV_INFO"))?;
        let mut params = sys::ublk_params::default();
        answered("GET_PARAMS", control.get_params(&mut params))?;
        self.config.same_disk(&params)?;
        self.step.begin("START_USER_RECOVERY (the kernel notices that the former daemon is dead)");
        answered("START_USER_RECOVERY", control.start_user_recover())?;
        self.open(control)
    }

    fn open(&self, control: UblkCtrl) -> Result<Added, UblkError> {
        self.step.begin(format!("opening {}", control.get_cdev_path()));
        let params = self.config.params();
        let init = |device: &mut UblkDev| {
            device.tgt.dev_size = params.basic.dev_sectors * crate::units::SECTOR_BYTES;
            device.tgt.params = params;
            Ok(())
        };
        let device = UblkDev::new(control.get_name(), init, &control)
            .map_err(UblkError::refused(format!("opening {}", control.get_cdev_path())))?;
        Ok(Added { control, device: Arc::new(device), threads: Vec::new() })
    }

    /// Starts the queue threads, waits until the kernel has the commands of all of them, and sends START_DEV.
    fn start(&mut self, added: &mut Added, workers: Vec<QueueMain>) -> Result<(), UblkError> {
        let mut failure = None;
        for (index, worker) in (0..).zip(workers) {
            let device = added.device.clone();
            let events = self.sender.clone();
            let spawned = std::thread::Builder::new()
                .name(format!("ublk{}-q{index}", device.dev_info.dev_id))
                .stack_size(limits::THREAD_STACK_BYTES)
                .spawn(move || run_queue(&device, index, worker, &events));
            match spawned {
                Ok(thread) => added.threads.push(thread),
                Err(error) => {
                    failure = Some(UblkError::Refused {
                        step: format!("thread of queue {index}"),
                        errno: Errno::from(&error),
                    });
                    break;
                }
            }
        }
        // All of them have to have answered before the device may be taken down: a command that comes later is never aborted.
        let mut answers = added.threads.len();
        while answers != 0 {
            self.step.begin(format!("waiting for {answers} queue threads"));
            match self.inbox.recv() {
                Ok(Event::Ready { queue, thread }) => {
                    added.control.set_thread_affinity(queue, thread);
                    answers -= 1;
                }
                Ok(Event::Ended { queue, result }) => {
                    let early = || UblkError::Refused { step: format!("queue {queue}"), errno: Errno::ESHUTDOWN };
                    failure = Some(result.err().unwrap_or_else(early));
                    answers -= 1;
                }
                Ok(event) => self.backlog.push_back(event),
                Err(_) => break,
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let step = match self.origin {
            Origin::New => "START_DEV (the kernel reads the partition table)",
            Origin::Left(_) => "END_USER_RECOVERY",
        };
        self.step.begin(step);
        answered(step, added.control.start_dev(&added.device))?;
        if let Origin::Left(_) = self.origin {
            // Its timer is set already; and to set it the kernel would wait for every request, those of a suspended node among them.
            return Ok(());
        }
        let timer = format!("/sys/block/ublkb{}/queue/io_timeout", added.device.dev_info.dev_id);
        if let Err(error) = fs::write(&timer, limits::UBLK_BLOCK_TIMEOUT.as_millis().to_string()) {
            tracing::warn!(%error, timer, "ublk: the request timer cannot be set; after a crash requests may hang for 30 s");
        }
        Ok(())
    }

    /// Waits until the device is to go; takes its disk away. Returns the reason when nobody asked, or who asked.
    fn serve(&mut self, added: &Added) -> (Option<String>, Option<Sender<Result<(), UblkError>>>) {
        loop {
            let event = self.backlog.pop_front().map_or_else(|| self.inbox.recv(), Ok);
            let reason = match event {
                Ok(Event::Stop { force, reply }) => match self.stop_disk(added, force) {
                    Ok(()) => return (None, Some(reply)),
                    Err(error) => {
                        let _ = reply.send(Err(error));
                        continue;
                    }
                },
                Ok(Event::Failing { reason }) => reason,
                Ok(Event::Ended { queue, result: Ok(()) }) => {
                    format!("queue {queue} was aborted by the kernel: somebody else deleted the device")
                }
                Ok(Event::Ended { queue, result: Err(error) }) => format!("queue {queue}: {error}"),
                Ok(Event::Ready { .. }) => continue,
                Err(_) => "its events ended".to_owned(),
            };
            if let Err(error) = self.stop_disk(added, true) {
                tracing::error!(%error, "ublk: a failed device could not be stopped");
            }
            return (Some(reason), None);
        }
    }

    /// STOP_DEV, unless the device is in use. The claim is held meanwhile, so that nobody begins to use it.
    fn stop_disk(&self, added: &Added, force: bool) -> Result<(), UblkError> {
        let name = format!("ublkb{}", added.device.dev_info.dev_id);
        self.step.begin(format!("asking who uses /dev/{name}"));
        let claimed = if force { None } else { claimed(&name)? };
        self.step.begin("STOP_DEV (the kernel waits for requests in flight)");
        let stopped = answered("STOP_DEV", added.control.kill_dev());
        drop(claimed);
        match stopped {
            Err(error) if error.errno() != Errno::ENODEV => Err(error),
            _ => Ok(()),
        }
    }

    /// Ends what is there, however far it got. The order matters: the kernel lets go of a device when its last queue is unmapped and
    /// `/dev/ublkcN` is closed.
    fn tear_down(&self, added: Added) {
        let Added { control, device, threads } = added;
        // Aborts the commands of the queues; where the disk was taken away already there is nothing to do.
        self.step.begin("STOP_DEV");
        let _ = control.kill_dev();
        let count = threads.len();
        for (index, thread) in threads.into_iter().enumerate() {
            self.step.begin(format!("the end of queue thread {} of {count}", index + 1));
            // A panic of a worker has ended the process.
            let _ = thread.join();
        }
        drop(device);
        self.step.begin("DEL_DEV");
        if let Err(error) = answered("DEL_DEV", control.del_dev_async()) {
            tracing::warn!(%error, "ublk: the device could not be deleted");
        }
    }
}

fn claimed(name: &str) -> Result<Option<super::claim::Claim>, UblkError> {
    let tried = claim(name)
        .map_err(|error| UblkError::Refused { step: format!("opening /dev/{name}"), errno: Errno::from(&error) })?;
    tried.map_err(UblkError::InUse)
}

/// A queue's thread.
fn run_queue(device: &Arc<UblkDev>, index: u16, worker: QueueMain, events: &Sender<Event>) {
    let id = device.dev_info.dev_id;
    // It was asked for before anything was made, but by another thread.
    if !become_io_flusher() {
        let step = format!("PR_SET_IO_FLUSHER in queue {index}");
        let _ =
            events.send(Event::Ended { queue: index, result: Err(UblkError::Refused { step, errno: Errno::EPERM }) });
        return;
    }
    let asking = events.clone();
    let ask_to_stop = Box::new(move || {
        let _ = asking.send(Event::Failing { reason: format!("queue {index} asked for it") });
    });
    let mut queue = match UblkQueue::open(device, index, ask_to_stop) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = events.send(Event::Ended { queue: index, result: Err(error) });
            return;
        }
    };
    let _ = events.send(Event::Ready { queue: index, thread: nix::unistd::gettid().as_raw() });
    let Ok(result) = std::panic::catch_unwind(AssertUnwindSafe(|| worker(&mut queue))) else {
        // The unwinding has freed memory that operations in the kernel point at. The kernel ends the requests with EIO.
        tracing::error!(device = id, queue = index, "ublk: a worker panicked; the process ends");
        std::process::abort();
    };
    if queue.is_up() {
        let reason = match &result {
            Ok(()) => format!("the worker of queue {index} returned"),
            Err(error) => format!("the worker of queue {index} failed: {error}"),
        };
        let _ = events.send(Event::Failing { reason });
    }
    queue.wind_down();
    drop(queue);
    let result =
        result.map_err(|error| UblkError::Refused { step: format!("worker ({error})"), errno: Errno::from(&error) });
    let _ = events.send(Event::Ended { queue: index, result });
}
