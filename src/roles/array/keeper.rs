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

use tracing::{debug, info, warn};

use crate::control::target::Target;
use crate::engine::copy::{Copied, Copy, CopyConfig, CopyError, Task};
use crate::engine::losses::Losses;
use crate::engine::region::SyncMap;
use crate::engine::replicas::{Effect, Event, FreezeState, Replicas, Saved, ScrubShown, Standing};
use crate::engine::shard::Report;
use crate::engine::shared::{LinkPhase, Shared};
use crate::engine::steer::{Arrival, MoveShown, News, Steer};
use crate::engine::view::{Gate, Role, View};
use crate::errno::Errno;
use crate::io::clock;
use crate::io::copying::CopyFrontend;
use crate::io::ublk::become_io_flusher;
use crate::io::wakeup::Postbox;
use crate::limits;
use crate::roles::array::path::{Attachment, SyncSeats};
use crate::roles::array::survey::{LogAt, survey};
use crate::roles::array::worker::{Order, Seat, Worker};
use crate::units::{Id, Lba, SECTOR_BYTES, Time};

mod late;

/// The keeper looks no more often than this, whatever time it is for.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// What the keeper tells the owner of arrays.
#[derive(Clone, Debug)]
pub enum Told {
    /// What is known of each replica, and of its machine, is to be made durable. The answer comes by [`KeeperHandle::saved`].
    Save(Vec<(Id, Standing)>, Vec<(Id, Losses)>),
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
    Saved(Saved),
    /// A sync engine that was asked to end reads no more.
    SourceLeft {
        /// Its node.
        node: usize,
    },
    /// A sync engine has ended.
    Synced {
        /// Its node.
        node: usize,
        /// How.
        result: Result<Copied, CopyError>,
        /// Up to where its shard has used sequences.
        sequence: u32,
    },
    /// An I/O thread has flushed a target, or could not.
    Flushed {
        /// The flush's number.
        ticket: u64,
        /// Whether it is durable.
        durable: bool,
    },
    /// The owner of arrays asks for something.
    Steer(Steer),
    /// Where the volumes of a late node are is known, or why not.
    Opened {
        /// The node.
        node: usize,
        /// What is known of them.
        replicas: Vec<Arrival>,
        /// By their ids.
        opened: Result<BTreeMap<Id, Arc<Attachment>>, String>,
    },
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
    /// Bytes that were compared.
    pub verified: u64,
}

/// What anybody may look at.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Each target.
    pub targets: Vec<TargetShown>,
    /// Each node.
    pub nodes: Vec<NodeShown>,
}

/// What anybody may look at of a target.
#[derive(Clone, Debug)]
pub struct TargetShown {
    /// Its volume; nil: it is a spare one.
    pub volume: Id,
    /// The node whose data it has.
    pub node: usize,
    /// What it is to that node.
    pub role: Role,
    /// Where it is reached.
    pub address: Option<String>,
}

/// What anybody may look at of a node.
#[derive(Clone, Debug, Default)]
pub struct NodeShown {
    /// Whether it is suspended.
    pub freeze: FreezeState,
    /// How its move goes.
    pub moving: Option<MoveShown>,
    /// The target that is copied to, or that mirrors, and how far that is.
    pub sync: Option<(usize, Arc<SyncMap>)>,
    /// How its scrub goes.
    pub scrub: Option<ScrubShown>,
}

impl NodeShown {
    /// The target that is copied to, and how many bytes of the node are the same there.
    pub fn progress(&self) -> Option<Progress> {
        let (target, map) = self.sync.as_ref()?;
        let bytes = |regions: u64| regions * map.region_sectors() * SECTOR_BYTES;
        let synced = bytes(map.regions() as u64 - map.left());
        Some(Progress { target: *target, synced, verified: bytes(map.verified()) })
    }
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
        let addresses = config.seats.addresses();
        let shown = Arc::new(Mutex::new(show(&config.rules, &addresses)));
        let settled = Arc::new(AtomicU64::new(0));
        let nodes = config.rules.view().nodes.len();
        let mut worker = Work {
            adopted: vec![vec![config.rules.view().version; nodes]; config.threads.len()],
            addresses,
            sequences: vec![0; nodes],
            syncs: BTreeMap::new(),
            opened: BTreeMap::new(),
            retry_at: None,
            shown: Arc::clone(&shown),
            settled: Arc::clone(&settled),
            config,
        };
        let name = format!("keeper-{}", worker.config.name);
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(limits::THREAD_STACK_BYTES)
            .spawn(move || worker.run())?;
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
    /// What has become of what was to be made durable.
    pub fn saved(&self, saved: Saved) {
        let _ = self.sender.send(Note::Saved(saved));
    }

    /// Something is asked for.
    pub fn steer(&self, steer: Steer) {
        let _ = self.sender.send(Note::Steer(steer));
    }

    /// What is to be seen now.
    pub fn look(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.join();
    }
}

fn show(rules: &Replicas, addresses: &[Option<String>]) -> Shown {
    let view = rules.view();
    let node = |number: usize| {
        let syncing = view.with_role(number, Role::Syncing).next();
        let sync = syncing.zip(view.nodes[number].sync.clone());
        let (freeze, moving) = (rules.freeze_state(number), rules.move_shown(number));
        NodeShown { freeze, moving, sync, scrub: rules.scrub_shown(number) }
    };
    let target = |(target, address): (&crate::engine::view::Target, &Option<String>)| TargetShown {
        volume: target.volume,
        node: target.node,
        role: target.role,
        address: address.clone(),
    };
    Shown {
        targets: view.targets.iter().zip(addresses).map(target).collect(),
        nodes: (0..view.nodes.len()).map(node).collect(),
    }
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
    /// Where each target is reached, for people.
    addresses: Vec<Option<String>>,
    /// Per node, up to where its sync engines have used sequences.
    sequences: Vec<u32>,
    syncs: BTreeMap<usize, Syncing>,
    /// What is about to be attached and is known to be there, by its volume.
    opened: BTreeMap<Id, Arc<Attachment>>,
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
                self.handle(Event::Saved(Saved::Nothing));
            }
            // What is not settled is looked at more often, from the moment on at which it is not.
            tick_at = tick_at.min(Instant::now() + self.tick());
            if let Some(wait) = self.wait() {
                tick_at = tick_at.min(Instant::now() + wait);
            }
            if tick_at <= Instant::now() {
                self.look();
                tick_at = Instant::now() + self.tick();
            }
            match self.config.notes.recv_timeout(tick_at.saturating_duration_since(Instant::now())) {
                Ok(Note::End) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(note) => self.note(note),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        self.settled.store(u64::from(self.config.rules.is_clean(&self.config.shared)), Ordering::SeqCst);
        for (_, sync) in std::mem::take(&mut self.syncs) {
            let _ = sync.orders.post(Order::Stop);
            let _ = sync.thread.join();
        }
    }

    /// Until the rules have something to do, if that is soon.
    fn wait(&self) -> Option<Duration> {
        let at = self.config.rules.next_timeout();
        (at != Time::NEVER).then(|| at.since(clock::now()).max(SHORTEST_WAIT))
    }

    fn tick(&self) -> Duration {
        if self.config.rules.is_idle() { limits::KEEPER_TICK } else { limits::KEEPER_TICK_BUSY }
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
            Note::Saved(saved) => {
                if saved != Saved::All {
                    self.retry_at = Some(Instant::now() + limits::REGROUP_RETRY);
                }
                if saved != Saved::Nothing {
                    self.handle(Event::Saved(saved));
                }
            }
            Note::SourceLeft { node } => self.handle(Event::SourceLeft { node }),
            Note::Synced { node, result, sequence } => self.synced(node, result, sequence),
            Note::Flushed { ticket, durable } => self.handle(Event::Flushed { ticket, durable }),
            Note::Steer(Steer::Arrive { node, replicas }) => self.expect(node, replicas),
            Note::Opened { node, replicas, opened } => self.arrive(node, replicas, opened),
            Note::Steer(steer) => {
                info!(array = self.config.name, ?steer, "asked");
                // What is asked for right after a start must not find the links as they were before.
                self.look();
                self.handle(Event::Steer(steer));
            }
            Note::End => {}
        }
    }

    /// Looks at the links of the I/O threads.
    fn look(&mut self) {
        self.config.rules.look_at_losses(&self.config.shared);
        self.handle(Event::Tick(self.reachable()));
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
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = show(&self.config.rules, &self.addresses);
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Publish(view) => self.publish(&view),
            Effect::Save(standings) => {
                let losses = self.config.rules.losses(&self.config.shared);
                (self.config.tell)(Told::Save(standings, losses));
            }
            Effect::Forgive { target } => self.config.shared.target(target).forget_loss(),
            Effect::Flush { ticket, target } => {
                // Any thread will do.
                let asked = self.config.threads.first().map(|thread| thread.post(Order::Flush { ticket, target }));
                if asked != Some(Ok(())) {
                    self.handle(Event::Flushed { ticket, durable: false });
                }
            }
            Effect::Attach { target, at, volume, known, logged } => {
                if let Err((errno, why)) = self.attach(target, (&at, volume), known, logged) {
                    warn!(array = self.config.name, target, %at, why, "a volume cannot be attached");
                    self.handle(Event::NotAttached { target, errno });
                }
            }
            Effect::Tell(news) => {
                info!(array = self.config.name, ?news, "done");
                (self.config.tell)(Told::News(news));
            }
            Effect::Sync { node, source, target, map, task, rate } => {
                if let Err(error) = self.sync(node, (source, target), &map, task, rate) {
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
        let roles: Vec<Role> =
            view.targets.iter().map(|target| target.role).filter(|role| *role != Role::Absent).collect();
        let gates: Vec<Gate> = view.nodes.iter().map(|node| node.gate).collect();
        info!(array = self.config.name, view = view.version, ?roles, ?gates, "a new view");
        self.order_all(&Order::Adopt(Arc::clone(view)));
    }

    /// Gives every thread an order, in the order in which they are given.
    fn order_all(&self, order: &Order) {
        for thread in &self.config.threads {
            // A box that is full is being emptied; one whose thread has ended needs no order.
            while thread.post(order.clone()) == Err(Errno::EBUSY) {
                std::thread::sleep(limits::TICK / 50);
            }
        }
    }

    /// A spare target has a volume from now on.
    fn attach(
        &mut self,
        target: usize,
        (at, volume): (&Target, Id),
        known: Option<Losses>,
        logged: bool,
    ) -> Result<(), (Errno, String)> {
        let opened = match self.opened.remove(&volume) {
            Some(opened) => opened,
            None => {
                let node = self.config.rules.view().targets[target].node;
                late::open(at, volume, (node, self.config.rules.view().geometry.node_sectors(node)), logged)?
            }
        };
        self.config.shared.target(target).renew();
        if let Some(known) = known {
            self.config.shared.target(target).begin(known);
        }
        self.config.seats.attach(target, &opened);
        self.addresses[target] = opened.address();
        self.order_all(&Order::Attach { target, at: opened });
        Ok(())
    }

    fn sync(
        &mut self,
        node: usize,
        (source, target): (usize, usize),
        map: &Arc<SyncMap>,
        task: Task,
        rate: u64,
    ) -> std::io::Result<()> {
        let view = Arc::clone(self.config.rules.view());
        let Some(overlap) = view.nodes[node].overlap.clone() else { return Ok(()) };
        let (targets, logged) = task.targets(&view, source, target);
        let patience = match task {
            Task::Scrub(_) => limits::SCRUB_TIMEOUT,
            Task::Copy { .. } | Task::Verify => view.target_timeout(node),
        };
        let (seat, orders) = self.config.seats.seat(&view, (&targets, logged), self.sequences[node], patience)?;
        info!(array = self.config.name, node, ?targets, ?task, regions = map.left(), "a sync engine begins");
        let shard = seat.index;
        let config = CopyConfig {
            task,
            source,
            target,
            shard,
            windows: limits::SYNC_WINDOWS,
            rate,
            checkpoint: limits::SYNC_CHECKPOINT,
        };
        let rules = Copy::new(config, Arc::clone(map), overlap);
        let (threads, sender) = (self.config.threads.clone(), self.config.sender.clone());
        let wake = move |shards: u32| {
            for (_, thread) in threads.iter().enumerate().filter(|(index, _)| shards & 1 << index != 0) {
                let _ = thread.post(Order::Look);
            }
        };
        let left = {
            let sender = self.config.sender.clone();
            move || drop(sender.send(Note::SourceLeft { node }))
        };
        let logs = self.logs(node, source, target);
        let (name, map_of, regions) = (self.config.name.clone(), Arc::clone(map), view.region_sectors);
        let run = move || {
            // Writes to the device may wait for what this thread does: it must not wait for such a write.
            become_io_flusher();
            let sequence = seat.shard.sequence();
            let surveyed =
                if map_of.needs_survey() { survey(&logs, regions).map(|marked| map_of.mark(&marked)) } else { Ok(()) };
            let (result, sequence) = match surveyed {
                Ok(()) => {
                    debug!(array = name, node, regions = map_of.left(), "the region logs were asked");
                    copy(seat, rules, wake, left)
                }
                Err(why) => {
                    // Any of them: it is asked again.
                    warn!(array = name, node, %why, "the region logs cannot be asked");
                    (Err(CopyError::Source(Lba(0), Errno::ETIMEDOUT)), sequence)
                }
            };
            let _ = sender.send(Note::Synced { node, result, sequence });
        };
        let thread = std::thread::Builder::new().name(format!("sync-{}-{node}", self.config.name));
        let thread = thread.stack_size(limits::THREAD_STACK_BYTES).spawn(run)?;
        self.syncs.insert(node, Syncing { orders, thread });
        Ok(())
    }

    /// The logs that tell what a target lacks: of those in sync that can be asked, the source among them, and its own.
    fn logs(&self, node: usize, source: usize, target: usize) -> Vec<LogAt> {
        let (view, reachable) = (self.config.rules.view(), self.reachable());
        let asked = |other: &usize| {
            *other == source || *other == target || (view.role(*other) == Role::InSync && reachable[*other])
        };
        let asked = view.nodes[node].targets.iter().copied().filter(asked);
        asked.map(|target| self.config.seats.log(target)).collect()
    }

    fn synced(&mut self, node: usize, result: Result<Copied, CopyError>, sequence: u32) {
        match &result {
            Ok(copied) => info!(array = self.config.name, node, copied.regions, "a sync engine is done"),
            Err(CopyError::Stopped) => info!(array = self.config.name, node, "a sync engine was stopped"),
            Err(error) => warn!(array = self.config.name, node, ?error, "a sync engine has failed"),
        }
        self.sequences[node] = sequence;
        if let Some(sync) = self.syncs.remove(&node) {
            let _ = sync.thread.join();
        }
        self.handle(Event::Synced { node, result });
    }
}

/// Copies until it is done, or stopped. How it ended, and up to where the shard has used sequences.
fn copy(seat: Seat, rules: Copy, wake: impl FnMut(u32), left: impl FnMut()) -> (Result<Copied, CopyError>, u32) {
    let unusable = |error: &std::io::Error| Err(CopyError::Target(Errno::from(error)));
    let sequence = seat.shard.sequence();
    let mut frontend = match CopyFrontend::new(rules, clock::now, wake, left) {
        Ok(frontend) => frontend,
        Err(error) => return (unusable(&error), sequence),
    };
    let (result, sequence) = Worker::new(seat, &mut frontend).run_to_sequence();
    match result {
        Ok(()) => (frontend.outcome(), sequence),
        Err(error) => (unusable(&error), sequence),
    }
}
