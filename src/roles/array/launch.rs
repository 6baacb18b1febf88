//! From a record to a running data path, and from its figures to what `status` shows.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};

use crate::control::command::Refusal;
use crate::control::migration::MoveLive;
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::scrub::ScrubLive;
use crate::control::spec::{ArraySpec, Frontend, NodeSpec};
use crate::control::status::{Counters, Gate, LinkState, Live, NodeLive, ReplicaLive, Trust};
use crate::control::target::{ServerAddress, Target};
use crate::control::why::Heard;
use crate::engine::array::plan;
use crate::engine::replicas::{FreezeState, Saved, ScrubShown, Standing};
use crate::engine::shard::why::Waiting;
use crate::engine::shared::{Gauge, LinkPhase, Shared, TargetShared};
use crate::engine::steer::{MoveShown, Steer};
use crate::engine::view::Role;
use crate::errno::Errno;
use crate::io::clock;
use crate::io::exec::Life;
use crate::io::sysfs::BlockInfo;
use crate::io::ublk;
use crate::io::wakeup::Postbox;
use crate::limits;
use crate::roles::array::devices::{self, tag};
use crate::roles::array::keeper::{KeeperHandle, Progress, Tell};
use crate::roles::array::path::{NodeTarget, PathConfig, Place};
use crate::roles::array::perform::{Died, Launcher, Running};
use crate::roles::array::pulse::Pulse;
use crate::roles::array::running;
use crate::roles::array::running::{Face, RunError};
use crate::roles::array::targets::resolve;
use crate::roles::array::worker::Order;
use crate::units::Id;
use crate::wire::nbd::address::NbdAddress;
use crate::wire::volume::Claim;

/// Starts data paths of this process.
pub struct DataPaths;

impl Launcher for DataPaths {
    fn launch(
        &self,
        spec: &ArraySpec,
        (claim, late): (&Claim, &[usize]),
        died: Died,
        tell: Tell,
    ) -> Result<Arc<dyn Running>, Refusal> {
        let config = path_config(spec, claim, late)?;
        let face = match &spec.run.frontend {
            Frontend::Ublk => Face::Ublk,
            Frontend::Nbd(address) => {
                check_listen(spec, address)?;
                no_device_waits(spec)?;
                Face::Nbd(address.clone())
            }
        };
        let tag = tag(spec.id);
        let died = Mutex::new(Some(died));
        let on_end = move |why| {
            if let Some(died) = died.lock().unwrap_or_else(PoisonError::into_inner).take() {
                died(why);
            }
        };
        let started = running::Running::start(config, &face, spec.block, tag, Arc::new(on_end), tell);
        let running = started.map_err(|error| not_started(spec, error))?;
        let (device, shared) = (running.device().to_owned(), Arc::clone(running.shared()));
        let (keeper, threads) = (running.keeper(), running.threads().to_vec());
        let tags = shared.loads().len() as u64 * spec.run.depth as u64;
        let waited = Life::own().left_at.filter(|_| running.is_recovered()).map(|left| clock::now().since(left));
        if let Some(waited) = waited {
            tracing::info!(array = spec.name, device, ?waited, "its users waited for the upgrade");
        }
        let waited_us = waited.map(|waited| u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
        let (clients, pulse) = (running.clients(), Pulse::default());
        let (name, running) = (spec.name.clone(), Mutex::new(running));
        Ok(Arc::new(Started { name, device, shared, tags, threads, keeper, pulse, clients, waited_us, running }))
    }

    fn clear_away(&self, started: &[Id]) {
        let leftovers = match ublk::leftovers() {
            Ok(leftovers) => leftovers,
            Err(error) => return tracing::warn!(%error, "cannot look for devices of a dead daemon"),
        };
        for leftover in leftovers {
            let id = leftover.id;
            if started.iter().any(|array| tag(*array) == leftover.owner) && leftover.live {
                tracing::info!(id, "a dead daemon's device waits for its array");
            } else if leftover.live {
                tracing::warn!(
                    id,
                    "a dead daemon has left a device of no array that is started here: see 'dst device list'"
                );
            } else {
                match ublk::delete_leftover(leftover) {
                    Ok(()) => tracing::info!(id, "removed what a dead daemon had left"),
                    Err(error) => tracing::warn!(id, %error, "cannot remove what a dead daemon had left"),
                }
            }
        }
    }

    fn discard(&self, array: Id, force: bool) -> Result<(), Refusal> {
        let refused = |error: ublk::UblkError| Refusal::new(error.errno(), format!("not stopped: {error}"));
        for leftover in ublk::leftovers().map_err(refused)? {
            if leftover.owner == tag(array) {
                devices::remove(leftover, force).map_err(refused)?;
            }
        }
        Ok(())
    }
}

/// An array is shown once: while a dead daemon's device waits for it, with requests that may have begun, it is that device.
fn no_device_waits(spec: &ArraySpec) -> Result<(), Refusal> {
    // Without the driver there is none.
    let left = ublk::leftovers().unwrap_or_default();
    let Some(device) = left.iter().find(|leftover| leftover.owner == tag(spec.id) && leftover.live) else {
        return Ok(());
    };
    let (name, id) = (&spec.name, device.id);
    let text = format!(
        "array '{name}' cannot start: a dead daemon has left /dev/ublkb{id} of it: 'dst start {name}' serves that on, 'dst device delete {id}' removes it"
    );
    Err(Refusal::new(Errno::EBUSY, text))
}

/// NBD has neither encryption nor authentication here: beyond this machine only by the operator's word.
fn check_listen(spec: &ArraySpec, address: &NbdAddress) -> Result<(), Refusal> {
    let NbdAddress::Tcp { host, port } = address else { return Ok(()) };
    let server = ServerAddress { host: host.clone(), port: *port };
    if spec.run.danger_cleartext || resolve(&server)?.iter().all(|address| address.ip().is_loopback()) {
        return Ok(());
    }
    let text = format!(
        "array '{}' cannot start: on {address} it would be offered, unencrypted, to anyone who reaches that; use a unix socket or a loopback \
         address, or --danger-cleartext on a network that you trust",
        spec.name
    );
    Err(Refusal::new(Errno::EPERM, text))
}

fn path_config(spec: &ArraySpec, claim: &Claim, late: &[usize]) -> Result<PathConfig, Refusal> {
    let geometry = plan::geometry(spec).map_err(|bad| Refusal::new(Errno::EINVAL, bad.to_string()))?;
    let replica = |replica: &ReplicaSpec| {
        let place = match &replica.target {
            Target::Remote { server, volume } => Place::Remote { address: resolve(server)?[0], volume: volume.clone() },
            Target::Local(path) => Place::Local(path.into()),
        };
        let standing = match replica.state {
            ReplicaState::InSync => Standing::InSync,
            ReplicaState::Stale => Standing::Stale,
            ReplicaState::Syncing { from } => Standing::Filling { from },
        };
        let losses = spec.memory.volumes.get(&replica.volume).copied();
        Ok(NodeTarget { place, volume: replica.volume, standing, losses })
    };
    // Where a late node lives may not even be known by name now.
    let node = |(at, node): (usize, &NodeSpec)| {
        let replicas = node.replicas.iter().filter(|_| !late.contains(&at));
        replicas.map(replica).collect::<Result<Vec<_>, Refusal>>()
    };
    let queues = match spec.run.queues {
        0 => std::thread::available_parallelism().map_or(1, usize::from).min(limits::QUEUES_DEFAULT_MAX),
        given => given,
    };
    Ok(PathConfig {
        name: spec.name.clone(),
        array: spec.id,
        session: claim.owner,
        host: claim.host,
        epoch: claim.epoch,
        geometry,
        frozen: spec.nodes.iter().map(|node| node.suspend.is_some()).collect(),
        awaits: spec.nodes.iter().map(NodeSpec::awaits).collect(),
        clean: spec.clean,
        nodes: spec.nodes.iter().enumerate().map(node).collect::<Result<_, Refusal>>()?,
        queues,
        depth: spec.run.depth,
        io_timeout: spec.run.io_timeout,
        data_digest: spec.run.data_digest,
    })
}

fn not_started(spec: &ArraySpec, error: RunError) -> Refusal {
    let name = &spec.name;
    match error {
        RunError::Node(error) => {
            let node = spec.nodes.get(error.node);
            let node = node.and_then(|node| Some((node, node.replicas.first()?)));
            let node = node.map_or_else(String::new, |(node, at)| format!("node {} ({}): ", node.start, at.target));
            Refusal::new(error.refusal.errno, format!("array '{name}' cannot start: {node}{}", error.refusal.text))
        }
        RunError::Frontend(refusal) => {
            Refusal::new(refusal.errno, format!("array '{name}' cannot start: {}", refusal.text))
        }
    }
}

/// A data path of this process.
struct Started {
    name: String,
    device: String,
    shared: Arc<Shared>,
    /// Requests that it can have at the same time.
    tags: u64,
    threads: Vec<Postbox<Order>>,
    keeper: Option<KeeperHandle>,
    pulse: Pulse,
    clients: Vec<Arc<AtomicUsize>>,
    waited_us: Option<u64>,
    /// Locked while it is stopped, never by readers.
    running: Mutex<running::Running>,
}

impl Running for Started {
    fn device(&self) -> String {
        self.device.clone()
    }

    fn live(&self) -> Live {
        let shown = self.keeper.as_ref().map(KeeperHandle::look).unwrap_or_default();
        let mut nodes = vec![NodeLive::default(); shown.nodes.len()];
        for (target, at) in shown.targets.iter().enumerate() {
            let shared = self.shared.target(target);
            let node = &shown.nodes[at.node];
            let parked =
                shared.gauges().iter().map(|gauge| u64::from(gauge.parked.load(Ordering::Relaxed))).sum::<u64>();
            nodes[at.node].parked += parked;
            if at.volume.is_nil() {
                continue;
            }
            let synced = node.progress().filter(|progress| progress.target == target).map(|progress| progress.synced);
            let trust = Some((trust(at.role), synced));
            let address = at.address.clone();
            nodes[at.node].replicas.push(ReplicaLive { volume: at.volume, trust, address, ..live(shared) });
        }
        for (live, node) in nodes.iter_mut().zip(&shown.nodes) {
            live.gate = gate(node.freeze);
            live.migration = node.moving.map(|moving| move_live(moving, node.progress()));
            live.scrub = node.scrub.as_ref().map(scrub_live);
        }
        let replicas = nodes.iter().flat_map(|node| &node.replicas);
        let counters = replicas.fold(Counters::default(), |sum, replica| sum.plus(replica.counters));
        let tags_free = self.tags.saturating_sub(self.shared.loads().sum());
        Live {
            counters,
            tags_free,
            nodes,
            device: self.device.strip_prefix("/dev/").map(kernel_facts).unwrap_or_default(),
        }
    }

    fn why(&self) -> Heard {
        let (asker, answers) = sync_channel(self.threads.len());
        for thread in &self.threads {
            // One whose box is full says nothing in time, like one that is stuck.
            let _ = thread.post(Order::Why(asker.clone()));
        }
        drop(asker);
        let shown = self.keeper.as_ref().map(KeeperHandle::look).unwrap_or_default();
        let volume = |waiting: &Waiting| shown.targets.get(waiting.target?).map(|target| target.volume);
        let mut heard = Heard { waiting: Vec::new(), silent: self.threads.len() };
        let until = clock::now().after(limits::WHY_PATIENCE);
        while let Ok(waiting) = answers.recv_timeout(until.since(clock::now())) {
            heard.silent -= 1;
            heard.waiting.extend(waiting.into_iter().map(|waiting| (waiting, volume(&waiting))));
        }
        heard
    }

    fn clients(&self) -> usize {
        self.clients.iter().map(|clients| clients.load(Ordering::Relaxed)).sum()
    }

    fn waited_us(&self) -> Option<u64> {
        self.waited_us
    }

    fn goes_round(&self) -> bool {
        // One that is being stopped waits for what the kernel still has, which may be a slow disk.
        self.running.try_lock().is_err() || self.pulse.is_felt(&self.threads)
    }

    fn regrouped(&self, saved: Saved) {
        if let Some(keeper) = &self.keeper {
            keeper.saved(saved);
        }
    }

    fn steer(&self, steer: Steer) {
        if let Some(keeper) = &self.keeper {
            keeper.steer(steer);
        }
    }

    fn resize(&self, sectors: Option<u64>) -> Result<(), Refusal> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.resize(sectors).map_err(|refusal| Refusal::new(refusal.errno, refusal.text))
    }

    fn stop(&self, force: bool) -> Result<bool, Refusal> {
        let parked: u64 = self.live().nodes.iter().map(|node| node.parked).sum();
        if parked > 0 && !force {
            let name = &self.name;
            let text = format!(
                "array '{name}' is not stopped: {parked} request(s) wait at suspended nodes: 'dst status {name}' shows which; 'dst resume' lets them go on, \
                 --force ends them with EIO"
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.stop(force, limits::HALT_MAX).map_err(|refusal| {
            Refusal::new(refusal.errno, format!("array '{}' is not stopped: {}", self.name, refusal.text))
        })
    }

    fn leave(&self) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).leave()
    }

    fn quiesce(&self) {
        let name = &self.name;
        // What waits at a suspended node does not end in time, and the others would wait for it in vain.
        let parked: u64 = self.live().nodes.iter().map(|node| node.parked).sum();
        if parked > 0 {
            return tracing::info!(array = name, parked, "left as it is: requests wait at suspended nodes");
        }
        // One that is being stopped ends as it may.
        let Ok(running) = self.running.try_lock() else { return };
        let begun = clock::now();
        match running.quiesce() {
            Some(Ok(())) => {
                let took = clock::now().since(begun);
                tracing::info!(array = name, device = self.device, ?took, "quiesced: nothing is in flight");
            }
            Some(Err(why)) => {
                tracing::warn!(
                    array = name,
                    device = self.device,
                    why = why.text,
                    "not quiesced: left as after a death"
                );
            }
            None => {}
        }
    }
}

fn trust(role: Role) -> Trust {
    match role {
        Role::InSync => Trust::InSync,
        Role::Syncing | Role::Mirror => Trust::Syncing,
        Role::Leaving | Role::Stale | Role::Absent => Trust::Stale,
    }
}

fn gate(freeze: FreezeState) -> Gate {
    match freeze {
        FreezeState::Open => Gate::Open,
        FreezeState::Draining => Gate::Draining,
        FreezeState::Frozen => Gate::Frozen,
        FreezeState::Failed => Gate::Failing,
    }
}

fn move_live(moving: MoveShown, progress: Option<Progress>) -> MoveLive {
    MoveLive {
        state: moving.phase,
        copied: progress.map_or(0, |progress| progress.synced),
        rolled_back: moving.rolled_back,
    }
}

fn scrub_live(scrub: &ScrubShown) -> ScrubLive {
    let compared = scrub.map.regions() as u64 - scrub.map.left();
    ScrubLive { compared, findings: scrub.tally.findings(), waits: scrub.waits }
}

fn live(target: &TargetShared) -> ReplicaLive {
    let gauges = target.gauges();
    let counters = gauges.iter().map(counted).fold(Counters::default(), Counters::plus);
    let all = |phase| gauges.iter().all(|gauge| gauge.phase() == phase);
    let lost = gauges.iter().any(|gauge| gauge.down_since().is_some());
    let link = if gauges.iter().any(|gauge| gauge.phase() == LinkPhase::Fenced) {
        LinkState::Fenced
    } else if all(LinkPhase::Up) {
        LinkState::Connected
    } else if lost {
        LinkState::Reconnecting
    } else {
        LinkState::Connecting
    };
    let tries = gauges.iter().map(|gauge| u64::from(gauge.attempts.load(Ordering::Relaxed))).max();
    let now = clock::now();
    let down = gauges.iter().filter_map(Gauge::down_since).map(|since| now.since(since)).max().unwrap_or_default();
    let last_error = if target.has_failed_flush() {
        Some(
            "a flush has failed: nothing more is written here; stop the array and look at the server's disk".to_owned(),
        )
    } else {
        gauges.iter().find_map(Gauge::last_error).map(|error| error.text().to_owned())
    };
    ReplicaLive {
        volume: Id::NIL,
        trust: None,
        address: None,
        link,
        tries: tries.unwrap_or(0),
        down,
        last_error,
        lost: target.has_lost(),
        counters,
    }
}

fn counted(gauge: &Gauge) -> Counters {
    let waiting = gauge.waiting.load(Ordering::Relaxed);
    Counters {
        in_flight: u64::from(gauge.in_flight.load(Ordering::Relaxed)) + u64::from(waiting),
        reads: gauge.reads.load(Ordering::Relaxed),
        read_bytes: gauge.read_bytes.load(Ordering::Relaxed),
        writes: gauge.writes.load(Ordering::Relaxed),
        written_bytes: gauge.write_bytes.load(Ordering::Relaxed),
        flushes: gauge.flushes.load(Ordering::Relaxed),
        errors: gauge.errors.load(Ordering::Relaxed),
        rescued_reads: gauge.rescued.load(Ordering::Relaxed),
        damaged: gauge.damaged.load(Ordering::Relaxed),
    }
}

/// What sysfs says; nothing while the device is going away.
fn kernel_facts(name: &str) -> Vec<(String, String)> {
    let facts = BlockInfo::read(name).ok().and_then(|info| serde_json::to_value(info).ok());
    let Some(serde_json::Value::Object(facts)) = facts else { return Vec::new() };
    facts.into_iter().map(|(name, value)| (name, value.to_string())).collect()
}
