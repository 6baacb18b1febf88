//! A started array: its I/O threads under a frontend, from start to stop.
//!
//! Starting and stopping block; the owner calls them from threads that may wait. Figures can be read at any time.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::shared::Shared;
use crate::errno::Errno;
use crate::io::greet::Refusal;
use crate::io::nbd::frontend::NbdFrontend;
use crate::io::nbd::listener::{Bound, Door, Listener, seat};
use crate::io::ublk::{self, Leftover, QueueMain, UblkConfig, UblkDevice, UblkError, UblkQueue, usable_queues};
use crate::io::wakeup::Postbox;
use crate::limits;
use crate::roles::array::keeper::{Keeper, KeeperConfig, KeeperHandle, Tell};
use crate::roles::array::path::{Path, PathConfig, ReplicaParts, StartError, attach};
use crate::roles::array::worker::{Order, Seat, Worker};
use crate::units::SECTOR_BYTES;
use crate::wire::nbd::address::NbdAddress;
use crate::wire::nbd::export::Export;

/// How an array is shown.
#[derive(Clone, Debug)]
pub enum Face {
    /// A block device.
    Ublk,
    /// NBD on this address.
    Nbd(NbdAddress),
}

/// Why an array did not start.
#[derive(Debug)]
pub enum RunError {
    /// A node cannot be attached.
    Node(StartError),
    /// The frontend cannot be made.
    Frontend(Refusal),
}

/// What is called when an array ends although nobody stopped it, with the reason.
pub type OnEnd = Arc<dyn Fn(String) + Send + Sync>;

enum Live {
    Ublk(UblkDevice),
    Nbd { listener: Option<Listener>, threads: Vec<JoinHandle<()>> },
}

/// A started array.
pub struct Running {
    device: String,
    shared: Arc<Shared>,
    orders: Vec<Postbox<Order>>,
    live: Live,
    stopping: Arc<AtomicBool>,
    keeper: Option<Keeper>,
    recovered: bool,
}

impl Running {
    /// Attaches the targets and shows the array. `block` is the logical block, bytes; `tag` is kept with a ublk device by the kernel
    /// and tells whose remains a dead daemon's device is.
    pub fn start(
        mut config: PathConfig,
        face: &Face,
        block: u32,
        tag: u32,
        on_end: OnEnd,
        tell: Tell,
    ) -> Result<Running, RunError> {
        match face {
            Face::Ublk => {
                let left = ublk::leftovers().map_err(|error| RunError::Frontend(refusal(&error)))?;
                let left = left.into_iter().find(|leftover| leftover.owner == tag && leftover.live);
                match left {
                    Some(leftover) => {
                        config.queues = usize::from(leftover.queues);
                        config.depth = usize::from(leftover.depth);
                    }
                    None => {
                        config.queues = usize::from(usable_queues(u16::try_from(config.queues).unwrap_or(u16::MAX)))
                    }
                }
                Running::start_ublk(&config, block, (tag, left), on_end, tell)
            }
            Face::Nbd(address) => Running::start_nbd(&config, address, block, on_end, tell),
        }
    }

    /// With a new device, or the one that a dead daemon has left.
    fn start_ublk(
        config: &PathConfig,
        block: u32,
        (tag, left): (u32, Option<Leftover>),
        on_end: OnEnd,
        tell: Tell,
    ) -> Result<Running, RunError> {
        let (path, seats) = attach(config).map_err(RunError::Node)?;
        let (path, keeper) = with_keeper(config, path, tell)?;
        let main =
            |seat: Seat| -> QueueMain { Box::new(move |queue: &mut UblkQueue<'_>| Worker::new(seat, queue).run()) };
        let workers = seats.into_iter().map(main).collect();
        let stopping = Arc::new(AtomicBool::new(false));
        let ended = move |end: crate::io::ublk::UblkEnd| {
            if let Some(reason) = end.unasked {
                on_end(reason);
            }
        };
        let shape = ublk_config(config, block, tag);
        let recovered = left.is_some();
        let device = match left {
            Some(leftover) => UblkDevice::recover(leftover, shape, workers, ended),
            None => UblkDevice::create(shape, workers, ended),
        };
        let device = device.map_err(|error| RunError::Frontend(refusal(&error)))?;
        let running = Running::new(device.path(), path, Live::Ublk(device), stopping, keeper);
        Ok(Running { recovered, ..running })
    }

    fn start_nbd(
        config: &PathConfig,
        address: &NbdAddress,
        block: u32,
        on_end: OnEnd,
        tell: Tell,
    ) -> Result<Running, RunError> {
        let failed =
            |error: io::Error| RunError::Frontend(Refusal { errno: Errno::from(&error), text: error.to_string() });
        // The address first: it fails fastest, and before anything was attached.
        let bound = Bound::new(address)
            .map_err(|error| RunError::Frontend(Refusal { errno: error.errno, text: error.text }))?;
        let (path, seats) = attach(config).map_err(RunError::Node)?;
        let (path, keeper) = with_keeper(config, path, tell)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let chunk = config.geometry.chunk_sectors().map_or(4096, |sectors| sectors * SECTOR_BYTES);
        let export = Export {
            name: config.name.clone(),
            description: format!("dst array {}", config.name),
            sectors: config.geometry.sectors(),
            block_bytes: block,
            preferred_bytes: u32::try_from(chunk).unwrap_or(4096).max(4096),
        };
        let mut threads = Vec::with_capacity(seats.len());
        let mut doors = Vec::with_capacity(seats.len());
        for (index, io_seat) in seats.into_iter().enumerate() {
            let (client_seat, door) = seat().map_err(failed)?;
            doors.push(client_seat);
            let thread = IoThread {
                name: config.name.clone(),
                export: export.clone(),
                depth: config.depth,
                stopping: Arc::clone(&stopping),
                on_end: Arc::clone(&on_end),
            };
            let spawned = std::thread::Builder::new()
                .name(format!("io-{index}-{}", config.name))
                .stack_size(limits::THREAD_STACK_BYTES)
                .spawn(move || thread.run(io_seat, door));
            threads.push(spawned.map_err(failed)?);
        }
        let uri = bound.address().uri(&config.name);
        let listener = bound.start(doors).map_err(failed)?;
        Ok(Running::new(uri, path, Live::Nbd { listener: Some(listener), threads }, stopping, keeper))
    }

    fn new(device: String, path: Started, live: Live, stopping: Arc<AtomicBool>, keeper: Keeper) -> Running {
        Running {
            device,
            shared: path.shared,
            orders: path.orders,
            live,
            stopping,
            keeper: Some(keeper),
            recovered: false,
        }
    }

    /// What looks after the replicas, until the end.
    pub fn keeper(&self) -> Option<KeeperHandle> {
        self.keeper.as_ref().map(Keeper::handle)
    }

    /// `/dev/ublkbN`, or the NBD URI.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether its device is one that a dead daemon has left.
    pub fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// How many NBD clients are connected, by I/O thread.
    pub fn clients(&self) -> Vec<Arc<AtomicUsize>> {
        match &self.live {
            Live::Nbd { listener: Some(listener), .. } => listener.counters(),
            _ => Vec::new(),
        }
    }

    /// The figures of every target and thread.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The way to each I/O thread.
    pub fn threads(&self) -> &[Postbox<Order>] {
        &self.orders
    }

    /// Serves on until the process ends, and its device, if it has one, waits for the next one. Whether it has one.
    pub fn leave(&mut self) -> bool {
        match &self.live {
            Live::Ublk(device) => {
                device.leave();
                self.stopping.store(true, Ordering::SeqCst);
                // What would end with it must not: nobody waits for it any more.
                std::mem::forget(self.keeper.take());
                true
            }
            Live::Nbd { .. } => false,
        }
    }

    /// Gives the device so many sectors, all of which the data path serves already. `None`: only says whether it could become larger.
    pub fn resize(&self, sectors: Option<u64>) -> Result<(), Refusal> {
        match (&self.live, sectors) {
            (Live::Ublk(device), None) => device.resizable().map_err(|error| refusal(&error)),
            (Live::Ublk(device), Some(sectors)) => {
                device.resize(sectors, limits::UBLK_RESIZE).map_err(|error| refusal(&error))
            }
            (Live::Nbd { .. }, _) => {
                let text = "a client of NBD learns the size when it connects".to_owned();
                Err(Refusal { errno: Errno::EOPNOTSUPP, text })
            }
        }
    }

    /// Leaves its device with nothing in flight, just before the process ends, as far as that goes within a bound. `None`: it has no device that can
    /// be left so, and serves on.
    pub fn quiesce(&self) -> Option<Result<(), Refusal>> {
        match &self.live {
            Live::Ublk(device) if device.can_quiesce() => {
                Some(device.quiesce(limits::UBLK_QUIESCE).map_err(|error| refusal(&error)))
            }
            _ => None,
        }
    }

    /// Stops, and returns when every I/O thread has ended. Without `force` it is refused while the device is in use; with it,
    /// requests in flight end with EIO. After `limit` it gives up waiting; what was asked goes on. Whether all replicas that are in
    /// sync are known to hold the same.
    pub fn stop(&mut self, force: bool, limit: Duration) -> Result<bool, Refusal> {
        if let Live::Nbd { listener: Some(listener), .. } = &self.live
            && !force
            && listener.clients() > 0
        {
            let text = format!(
                "{} NBD client(s) are connected to {}; disconnect them first, or use --force",
                listener.clients(),
                self.device
            );
            return Err(Refusal { errno: Errno::EBUSY, text });
        }
        self.stopping.store(true, Ordering::SeqCst);
        let orders = self.orders.clone();
        let done = AtomicBool::new(false);
        let live = &mut self.live;
        let result = std::thread::scope(|scope| {
            if force {
                // Until the frontend is down new requests may come, which must end too.
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        post(&orders, &Order::Abort(Errno::EIO));
                        std::thread::sleep(limits::TICK);
                    }
                });
            }
            let result = match live {
                Live::Ublk(device) => device.stop(force, limit).map_err(|error| refusal(&error)),
                Live::Nbd { listener, threads } => {
                    *listener = None;
                    post(&orders, &Order::Stop);
                    join(threads, limit)
                }
            };
            done.store(true, Ordering::SeqCst);
            result
        });
        if result.is_err() {
            self.stopping.store(false, Ordering::SeqCst);
        }
        result.map(|()| {
            let settled = self.keeper.take().is_none_or(Keeper::end);
            settled && !self.shared.is_unsettled()
        })
    }
}

/// What is left of a path when its keeper has been started.
struct Started {
    shared: Arc<Shared>,
    orders: Vec<Postbox<Order>>,
}

/// Starts what looks after the replicas.
fn with_keeper(config: &PathConfig, path: Path, tell: Tell) -> Result<(Started, Keeper), RunError> {
    let Path { shared, orders, replicas: ReplicaParts { rules, sender, notes, seats } } = path;
    let (name, threads) = (config.name.clone(), orders.clone());
    let started =
        Keeper::start(KeeperConfig { name, rules, shared: Arc::clone(&shared), threads, sender, notes, seats, tell });
    let keeper = started.map_err(|error| {
        let text = format!("the keeper of the replicas cannot be started: {error}");
        RunError::Frontend(Refusal { errno: Errno::from(&error), text })
    })?;
    Ok((Started { shared, orders }, keeper))
}

/// To every thread. One that has ended needs no order; one whose box is full has plenty.
fn post(orders: &[Postbox<Order>], order: &Order) {
    for postbox in orders {
        let _ = postbox.post(order.clone());
    }
}

fn join(threads: &mut Vec<JoinHandle<()>>, limit: Duration) -> Result<(), Refusal> {
    let until = Instant::now() + limit;
    while threads.iter().any(|thread| !thread.is_finished()) {
        if Instant::now() >= until {
            return Err(Refusal {
                errno: Errno::ETIMEDOUT,
                text: "requests in flight have not ended; wait for their servers, or use --force".to_owned(),
            });
        }
        std::thread::sleep(limits::TICK / 10);
    }
    for thread in threads.drain(..) {
        // A panic of an I/O thread ends the process, so there is none to report.
        let _ = thread.join();
    }
    Ok(())
}

fn refusal(error: &UblkError) -> Refusal {
    Refusal { errno: error.errno(), text: error.to_string() }
}

fn ublk_config(config: &PathConfig, block: u32, tag: u32) -> UblkConfig {
    let geometry = &config.geometry;
    let chunk = geometry.chunk_sectors().unwrap_or(0) * SECTOR_BYTES;
    let zero_sectors = u64::from(limits::ZERO_BYTES_MAX) / SECTOR_BYTES;
    let zero_sectors = u32::try_from(zero_sectors).unwrap_or(u32::MAX);
    UblkConfig {
        name: config.name.clone(),
        owner: tag,
        id: None,
        depth: u16::try_from(config.depth).unwrap_or(u16::MAX),
        buffer_bytes: limits::UBLK_BUFFER_BYTES,
        sectors: geometry.sectors(),
        block_bytes: block,
        minimum_bytes: chunk,
        optimal_bytes: chunk * geometry.nodes() as u64,
        max_discard_sectors: zero_sectors,
        max_write_zeroes_sectors: zero_sectors,
    }
}

/// What an NBD I/O thread is started with.
struct IoThread {
    name: String,
    export: Export,
    depth: usize,
    stopping: Arc<AtomicBool>,
    on_end: OnEnd,
}

impl IoThread {
    fn run(self, seat: Seat, door: Door) {
        if !ublk::become_io_flusher() {
            tracing::warn!(
                array = self.name,
                "PR_SET_IO_FLUSHER is refused (CAP_SYS_RESOURCE): under memory pressure clients on this machine may stall"
            );
        }
        let serve = || {
            NbdFrontend::new(self.export.clone(), self.depth, door)
                .and_then(|mut frontend| Worker::new(seat, &mut frontend).run())
        };
        let result = catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| {
            // Its rings may still write to buffers that unwinding has freed: nothing of this process can be trusted.
            tracing::error!(array = self.name, "an I/O thread has panicked; the process ends");
            std::process::abort();
        });
        if !self.stopping.load(Ordering::SeqCst) {
            let reason = result.map_or_else(|error| error.to_string(), |()| "its I/O thread has ended".to_owned());
            tracing::error!(array = self.name, reason, "an I/O thread has ended");
            (self.on_end)(reason);
        }
    }
}
