//! The keeper of an array's replicas: a thread that performs what [`Replicas`] decides.
//!
//! It hears the I/O threads ([`Note`]), looks at their links now and then, gives them views, has changes made durable by the owner
//! of arrays, and runs the sync engines, each in a thread with connections and buffers of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::engine::copy::{Copy, CopyConfig, CopyError};
use crate::engine::region::SyncMap;
use crate::engine::replicas::{Effect, Event, Replicas, Standing};
use crate::engine::shard::Report;
use crate::engine::shared::{LinkPhase, Shared};
use crate::engine::steer::{News, Steer};
use crate::engine::view::{Role, View};
use crate::errno::Errno;
use crate::io::clock;
use crate::io::copying::CopyFrontend;
use crate::io::ublk::become_io_flusher;
use crate::io::wakeup::Postbox;
use crate::limits;
use crate::roles::array::path::SyncSeats;
use crate::roles::array::worker::{Order, Seat, Worker};
use crate::units::{Id, SECTOR_BYTES};

/// What the keeper tells the owner of arrays.
#[derive(Clone, Debug)]
pub enum Told {
    /// What is known of each replica is to be made durable. The answer comes by [`KeeperHandle::saved`].
    Save(Vec<(Id, Standing)>),
    /// Something that was asked for has ended.
    News(News),
}

/// The way to the owner of arrays.
pub type Tell = Arc<dyn Fn(Told) + Send + Sync>;

/// What reaches the keeper.
#[derive(Clone, Debug)]
pub enum Note {
    /// An I/O thread says that something is wrong.
    Report(Report),
    /// An I/O thread works from a view on a node.
    Adopted {
        /// The thread.
        shard: usize,
        /// The node.
        node: usize,
        /// The view's version.
        version: u64,
    },
    /// What was to be made durable is, or could not be.
    Saved(bool),
    /// A sync engine has ended.
    Synced {
        /// Its node.
        node: usize,
        /// How.
        result: Result<(), CopyError>,
        /// Up to where its shard has used sequences.
        sequence: u32,
    },
    /// The owner of arrays asks for something.
    Steer(Steer),
    /// The array ends.
    End,
}

/// How far the copying to a node's target is, and the target; for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The target.
    pub target: usize,
    /// Bytes of the node that are the same on it.
    pub synced: u64,
}

/// What anybody may look at.
#[derive(Debug, Default)]
pub struct Shown {
    /// The role of each target.
    pub roles: Vec<Role>,
    /// What is being copied, by node.
    pub syncs: BTreeMap<usize, (usize, Arc<SyncMap>)>,
}

/// The way to a keeper, for others; it may have ended.
#[derive(Clone)]
pub struct KeeperHandle {
    sender: Sender<Note>,
    shown: Arc<Mutex<Shown>>,
}

/// A running keeper. Dropping it ends it.
pub struct Keeper {
    handle: KeeperHandle,
    settled: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// What a keeper is started with.
pub struct KeeperConfig {
    /// The array's name, for the log.
    pub name: String,
    /// The rules, with the view that the threads have begun with.
    pub rules: Replicas,
    /// What all shards share.
    pub shared: Arc<Shared>,
    /// Every I/O thread.
    pub threads: Vec<Postbox<Order>>,
    /// Where notes go, and where they come from.
    pub sender: Sender<Note>,
    /// See there.
    pub notes: Receiver<Note>,
    /// Makes seats for sync engines.
    pub seats: SyncSeats,
    /// The way to the owner of arrays, who makes changes durable.
    pub tell: Tell,
}

impl Keeper {
    /// Starts the thread.
    pub fn start(config: KeeperConfig) -> std::io::Result<Keeper> {
        let sender = config.sender.clone();
        let shown = Arc::new(Mutex::new(Shown { roles: roles(config.rules.view()), syncs: BTreeMap::new() }));
        let settled = Arc::new(AtomicU64::new(0));
        let nodes = config.rules.view().nodes.len();
        let mut worker = Work {
            adopted: vec![vec![config.rules.view().version; nodes]; config.threads.len()],
            sequences: vec![0; nodes],
            syncs: BTreeMap::new(),
            retry_at: None,
            shown: Arc::clone(&shown),
            settled: Arc::clone(&settled),
            config,
        };
        let name = format!("keeper-{}", worker.config.name);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
        Ok(Keeper { handle: KeeperHandle { sender, shown }, settled, thread: Some(thread) })
    }

    /// The way to it.
    pub fn handle(&self) -> KeeperHandle {
        self.handle.clone()
    }

    /// Ends it. Whether nothing was left to be done about any replica.
    pub fn end(mut self) -> bool {
        self.join();
        self.settled.load(Ordering::SeqCst) == 1
    }

    fn join(&mut self) {
        let _ = self.handle.sender.send(Note::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl KeeperHandle {
    /// What was to be made durable is, or could not be.
    pub fn saved(&self, durable: bool) {
        let _ = self.sender.send(Note::Saved(durable));
    }

    /// Something is asked for.
    pub fn steer(&self, steer: Steer) {
        let _ = self.sender.send(Note::Steer(steer));
    }

    /// The role of each target, and what is being copied to it.
    pub fn look(&self) -> (Vec<Role>, Vec<Progress>) {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let progress = |(target, map): &(usize, Arc<SyncMap>)| Progress {
            target: *target,
            synced: (map.regions() as u64 - map.left()) * map.region_sectors() * SECTOR_BYTES,
        };
        (shown.roles.clone(), shown.syncs.values().map(progress).collect())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.join();
    }
}

fn roles(view: &View) -> Vec<Role> {
    view.targets.iter().map(|target| target.role).collect()
}

/// A sync engine under way.
struct Syncing {
    orders: Postbox<Order>,
    thread: JoinHandle<()>,
}

/// The thread's own state.
struct Work {
    config: KeeperConfig,
    /// Per thread and node, the view that it works from.
    adopted: Vec<Vec<u64>>,
    /// Per node, up to where its sync engines have used sequences.
    sequences: Vec<u32>,
    syncs: BTreeMap<usize, Syncing>,
    /// When a save that has failed is tried again.
    retry_at: Option<Instant>,
    shown: Arc<Mutex<Shown>>,
    settled: Arc<AtomicU64>,
}

impl Work {
    fn run(&mut self) {
        // As for the sync engines: a write that waits for a change of the replicas waits for this thread.
        become_io_flusher();
        let mut tick_at = Instant::now();
        loop {
            if self.retry_at.is_some_and(|at| at <= Instant::now()) {
                self.retry_at = None;
                self.handle(Event::Saved(false));
            }
            // What is not settled is looked at more often, from the moment on at which it is not.
            tick_at = tick_at.min(Instant::now() + self.tick());
            if tick_at <= Instant::now() {
                self.handle(Event::Tick(self.reachable()));
                tick_at = Instant::now() + self.tick();
            }
            match self.config.notes.recv_timeout(tick_at.saturating_duration_since(Instant::now())) {
                Ok(Note::End) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(note) => self.note(note),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        self.settled.store(u64::from(self.config.rules.is_settled()), Ordering::SeqCst);
        for (_, sync) in std::mem::take(&mut self.syncs) {
            let _ = sync.orders.post(Order::Stop);
            let _ = sync.thread.join();
        }
    }

    fn tick(&self) -> Duration {
        if self.config.rules.is_settled() { limits::KEEPER_TICK } else { limits::KEEPER_TICK_BUSY }
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Report(report) => {
                warn!(array = self.config.name, ?report, "a replica is in trouble");
                self.handle(Event::Report(report));
            }
            Note::Adopted { shard, node, version } => {
                self.adopted[shard][node] = version;
                let version = self.adopted.iter().map(|nodes| nodes[node]).min().unwrap_or(version);
                self.handle(Event::Adopted { node, version });
            }
            Note::Saved(true) => self.handle(Event::Saved(true)),
            Note::Saved(false) => self.retry_at = Some(Instant::now() + limits::REGROUP_RETRY),
            Note::Synced { node, result, sequence } => self.synced(node, result, sequence),
            Note::Steer(_) | Note::End => {}
        }
    }

    /// Which targets every thread could use now.
    fn reachable(&self) -> Vec<bool> {
        let up = |target: &crate::engine::shared::TargetShared| {
            target.gauges().iter().all(|gauge| gauge.phase() == LinkPhase::Up) && !target.is_held()
        };
        self.config.shared.targets().iter().map(up).collect()
    }

    fn handle(&mut self, event: Event) {
        self.config.rules.handle(event, clock::now());
        while let Some(effect) = self.config.rules.poll() {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Publish(view) => self.publish(&view),
            Effect::Save(standings) => (self.config.tell)(Told::Save(standings)),
            Effect::Sync { node, source, target, map } => {
                if let Err(error) = self.sync(node, source, target, &map) {
                    warn!(array = self.config.name, node, %error, "a replica cannot be synced");
                    self.synced(node, Err(CopyError::Target(Errno::from(&error))), self.sequences[node]);
                }
            }
            Effect::StopSync { node } => {
                if let Some(sync) = self.syncs.get(&node) {
                    let _ = sync.orders.post(Order::Stop);
                }
            }
        }
    }

    fn publish(&mut self, view: &Arc<View>) {
        let roles = roles(view);
        info!(array = self.config.name, view = view.version, ?roles, "the replicas' roles have changed");
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).roles = roles;
        for thread in &self.config.threads {
            // A box that is full is being emptied; one whose thread has ended needs no view.
            while thread.post(Order::Adopt(Arc::clone(view))) == Err(Errno::EBUSY) {
                std::thread::sleep(limits::TICK / 50);
            }
        }
    }

    fn sync(&mut self, node: usize, source: usize, target: usize, map: &Arc<SyncMap>) -> std::io::Result<()> {
        let view = Arc::clone(self.config.rules.view());
        let Some(overlap) = view.nodes[node].overlap.clone() else { return Ok(()) };
        let (seat, orders) = self.config.seats.seat(&view, source, target, self.sequences[node])?;
        let shard = seat.index;
        let config = CopyConfig { source, target, shard, windows: limits::SYNC_WINDOWS, rate: limits::SYNC_RATE };
        let rules = Copy::new(config, Arc::clone(map), overlap);
        let (threads, sender) = (self.config.threads.clone(), self.config.sender.clone());
        let wake = move |shards: u32| {
            for (_, thread) in threads.iter().enumerate().filter(|(index, _)| shards & 1 << index != 0) {
                let _ = thread.post(Order::Look);
            }
        };
        info!(array = self.config.name, node, source, target, regions = map.left(), "a replica is being synced");
        let run = move || {
            // Writes to the device may wait for what this thread does: it must not wait for such a write.
            become_io_flusher();
            let (result, sequence) = copy(seat, rules, wake);
            let _ = sender.send(Note::Synced { node, result, sequence });
        };
        let thread = std::thread::Builder::new().name(format!("sync-{}-{node}", self.config.name)).spawn(run)?;
        self.syncs.insert(node, Syncing { orders, thread });
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.syncs.insert(node, (target, Arc::clone(map)));
        Ok(())
    }

    fn synced(&mut self, node: usize, result: Result<(), CopyError>, sequence: u32) {
        match result {
            Ok(()) => info!(array = self.config.name, node, "everything is copied"),
            Err(error) => warn!(array = self.config.name, node, ?error, "copying has ended early"),
        }
        self.sequences[node] = sequence;
        if let Some(sync) = self.syncs.remove(&node) {
            let _ = sync.thread.join();
        }
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).syncs.remove(&node);
        self.handle(Event::Synced { node, whole: result.is_ok() });
    }
}

/// Copies until it is done, or stopped. How it ended, and up to where the shard has used sequences.
fn copy(seat: Seat, rules: Copy, wake: impl FnMut(u32)) -> (Result<(), CopyError>, u32) {
    let unusable = |error: &std::io::Error| Err(CopyError::Target(Errno::from(error)));
    let sequence = seat.shard.sequence();
    let mut frontend = match CopyFrontend::new(rules, clock::now, wake) {
        Ok(frontend) => frontend,
        Err(error) => return (unusable(&error), sequence),
    };
    let (result, sequence) = Worker::new(seat, &mut frontend).run_to_sequence();
    match result {
        Ok(()) => (frontend.outcome(), sequence),
        Err(error) => (unusable(&error), sequence),
    }
}
