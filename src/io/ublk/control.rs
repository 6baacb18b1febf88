//! The control thread of one device: from ADD_DEV to DEL_DEV, in one place and one order.
//!
//! Callers talk to it through events and wait with a limit. Every path, also that of a failed start, ends in `tear_down`; only a device
//! that is quiesced is never taken down.

use std::collections::VecDeque;
use std::fs;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use libublk::UblkFlags;
use libublk::ctrl::UblkCtrl;
use libublk::ctrl::UblkCtrlBuilder;
use libublk::io::UblkDev;
use libublk::sys;

use super::UblkConfig;
use super::UblkError;
use super::answered;
use super::claim::claim;
use super::device::Event;
use super::device::QueueMain;
use super::device::Reply;
use super::device::Step;
use super::device::UblkEnd;
use super::leave::Leave;
use super::leftover::Leftover;
use super::leftover::mark;
use super::queue::UblkQueue;
use super::queue::become_io_flusher;
use crate::errno::Errno;
use crate::io::ring::Frontend;
use crate::limits;
use crate::units::SECTOR_BYTES;

/// A dead daemon's device waits for the next one, which gets its requests again.
pub(super) const FEATURES: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// What a device gets where the driver has it: it can be left with nothing in flight, and change its size while it is in use.
const EXTRAS: u64 = (sys::UBLK_F_QUIESCE | sys::UBLK_F_UPDATE_SIZE) as u64;

/// Where a device comes from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// It is made.
    New,
    /// A dead daemon has left it.
    Left(Leftover),
}

/// Starts the control thread, which tells `started` the number and the features of what it has made. `offered`: what the driver knows.
pub(super) fn spawn(
    config: UblkConfig,
    (origin, offered): (Origin, u64),
    (sender, inbox): (Sender<Event>, Receiver<Event>),
    step: Step,
    workers: Vec<QueueMain>,
    started: Sender<Result<(u32, u64), UblkError>>,
    on_end: impl FnOnce(UblkEnd) + Send + 'static,
) -> Result<(), UblkError> {
    let leave = Arc::new(Leave::new(workers.len()));
    let control = Control { config, origin, offered, sender, inbox, backlog: VecDeque::new(), leave, step };
    std::thread::Builder::new()
        .name("ublk-control".to_owned())
        .stack_size(limits::THREAD_STACK_BYTES)
        .spawn(move || control.run(workers, started, on_end))
        .map_err(|error| UblkError::Refused { step: "control thread".to_owned(), errno: Errno::from(&error) })?;
    Ok(())
}

/// The control thread's state before there is a device.
struct Control {
    config: UblkConfig,
    origin: Origin,
    /// The features that the driver has.
    offered: u64,
    sender: Sender<Event>,
    inbox: Receiver<Event>,
    /// Events that came while others were waited for.
    backlog: VecDeque<Event>,
    leave: Arc<Leave>,
    step: Step,
}

/// What the control thread owns of a device that was added.
struct Added {
    /// Deletes the device when dropped, on this thread, if it was made here.
    control: UblkCtrl,
    device: Arc<UblkDev>,
    /// What the driver has granted, now or to the daemon that made it.
    features: u64,
    /// The size that it has, which is less than wanted if a daemon died while it made it larger.
    sectors: u64,
    threads: Vec<JoinHandle<()>>,
}

impl Control {
    fn run(
        mut self,
        workers: Vec<QueueMain>,
        started: Sender<Result<(u32, u64), UblkError>>,
        on_end: impl FnOnce(UblkEnd),
    ) {
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
        let _ = started.send(Ok((id, added.features)));

        let (unasked, reply) = self.serve(&mut added);
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
            .ctrl_flags(FEATURES | self.offered & EXTRAS)
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
        self.open(control, config.sectors)
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
        let sectors = self.config.same_disk(&params, control.dev_info().flags)?;
        self.step.begin("START_USER_RECOVERY (the kernel notices that the former daemon is dead)");
        answered("START_USER_RECOVERY", control.start_user_recover())?;
        self.open(control, sectors)
    }

    fn open(&self, control: UblkCtrl, sectors: u64) -> Result<Added, UblkError> {
        self.step.begin(format!("opening {}", control.get_cdev_path()));
        let params = self.config.params();
        let init = |device: &mut UblkDev| {
            device.tgt.dev_size = params.basic.dev_sectors * SECTOR_BYTES;
            device.tgt.params = params;
            Ok(())
        };
        let device = UblkDev::new(control.get_name(), init, &control)
            .map_err(UblkError::refused(format!("opening {}", control.get_cdev_path())))?;
        let features = control.dev_info().flags;
        Ok(Added { control, device: Arc::new(device), features, sectors, threads: Vec::new() })
    }

    /// Starts the queue threads, waits until the kernel has the commands of all of them, and sends START_DEV.
    fn start(&mut self, added: &mut Added, workers: Vec<QueueMain>) -> Result<(), UblkError> {
        let mut failure = None;
        for (index, worker) in (0..).zip(workers) {
            let device = added.device.clone();
            let events = self.sender.clone();
            let leave = self.leave.clone();
            let spawned = std::thread::Builder::new()
                .name(format!("ublk{}-q{index}", device.dev_info.dev_id))
                .stack_size(limits::THREAD_STACK_BYTES)
                .spawn(move || run_queue(&device, index, worker, &events, leave));
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
            self.catch_up(added);
            return Ok(());
        }
        let timer = format!("/sys/block/ublkb{}/queue/io_timeout", added.device.dev_info.dev_id);
        if let Err(error) = fs::write(&timer, limits::UBLK_BLOCK_TIMEOUT.as_millis().to_string()) {
            tracing::warn!(%error, timer, "ublk: the request timer cannot be set; after a crash requests may hang for 30 s");
        }
        Ok(())
    }

    /// Waits until the device is to go; takes its disk away. Returns the reason when nobody asked, or who asked.
    fn serve(&mut self, added: &mut Added) -> (Option<String>, Option<Reply>) {
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
                Ok(Event::Resize { sectors, reply }) => {
                    let _ = reply.send(self.resize(added, sectors));
                    continue;
                }
                Ok(Event::Quiesce { limit, reply }) => {
                    let _ = reply.send(self.quiesce(added, limit));
                    self.await_end_of_process();
                    continue;
                }
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

    /// UPDATE_SIZE: its users see it at once.
    fn resize(&self, added: &mut Added, sectors: u64) -> Result<(), UblkError> {
        UblkConfig { sectors, ..self.config.clone() }.check()?;
        if sectors < added.sectors {
            let (name, now) = (&self.config.name, added.sectors);
            let text = format!(
                "ublk device '{name}' has {now} sectors: it cannot be cut to {sectors}, its users would lose what is there"
            );
            return Err(UblkError::Config(text));
        }
        self.step.begin("UPDATE_SIZE");
        answered("UPDATE_SIZE", added.control.update_size(sectors * SECTOR_BYTES))?;
        tracing::info!(
            array = self.config.name,
            device = added.device.dev_info.dev_id,
            sectors,
            "ublk: device resized"
        );
        added.sectors = sectors;
        Ok(())
    }

    /// A daemon that died between the array's growth and its device's has left that to the next one.
    fn catch_up(&self, added: &mut Added) {
        if added.sectors != self.config.sectors
            && let Err(error) = self.resize(added, self.config.sectors)
        {
            // It is served all the same, as large as it was.
            tracing::warn!(array = self.config.name, %error, "ublk: the device keeps its size");
        }
    }

    /// QUIESCE_DEV: new requests wait in the kernel for the next daemon. It answers when each queue has a tag to spare; here is waited until
    /// all have ended. An error changes nothing about that there is no way back: in the kernel the device is marked for good.
    fn quiesce(&self, added: &Added, limit: Duration) -> Result<(), UblkError> {
        let begun = Instant::now();
        self.leave.begin();
        self.step.begin("QUIESCE_DEV (the kernel waits for a free tag in each queue)");
        // Zero would be for ever.
        let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
        answered("QUIESCE_DEV", added.control.quiesce_dev(milliseconds))?;
        self.step.begin("the end of requests in flight");
        loop {
            // First of all: what the kernel gave out last is on its way to its queue.
            std::thread::sleep(limits::UBLK_QUIESCE_LOOK);
            match self.leave.in_hand() {
                0 => return Ok(()),
                requests if begun.elapsed() >= limit => return Err(UblkError::InFlight { requests, after: limit }),
                _ => {}
            }
        }
    }

    /// The device belongs to the next daemon: nothing that happens here may take it away.
    fn await_end_of_process(&self) {
        self.step.begin("the end of this process");
        while let Ok(event) = self.inbox.recv() {
            if let Event::Stop { reply, .. } | Event::Resize { reply, .. } | Event::Quiesce { reply, .. } = event {
                let step = "a device that waits for the next daemon".to_owned();
                let _ = reply.send(Err(UblkError::Refused { step, errno: Errno::EBUSY }));
            }
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
        let Added { control, device, threads, .. } = added;
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
fn run_queue(device: &Arc<UblkDev>, index: u16, worker: QueueMain, events: &Sender<Event>, leave: Arc<Leave>) {
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
    let mut queue = match UblkQueue::open(device, index, ask_to_stop, leave) {
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
