//! Several hosts that want one array: the former one lives on while another takes over, until it is fenced.
//!
//! Contract: [`World::daemon`] and [`World::record`] are those of the host that has begun to serve last; a former one has its own, and
//! they are exchanged for the time of what happens to it. Nothing is shared by hosts but servers and labels: what a record says only its own
//! machine knows, and each machine keeps its last one. Who begins to serve, and from what, the production owner of arrays decides (`starts.rs`).
//! While nobody moves: worlds with spare targets have one host.

use std::collections::BTreeMap;

use dst::control::member::MemberLabel;
use dst::control::replica::{ReplicaSpec, ReplicaState};
use dst::control::spec::{Alg, ArraySpec, NodeSpec, Phase, RunOptions};
use dst::control::target::Target;
use dst::engine::replicas::{Event as Told, Saved, Standing};
use dst::units::{Epoch, Id, Lba, NodeId, SECTOR_BYTES};
use dst::wire::volume::Claim;

use crate::array::{ARRAY, Daemon};
use crate::errands::{Ask, Asker, Errand};
use crate::links::session;
use crate::operator::Asked;
use crate::owner::Record;
use crate::plan::{Fault, Kind, Layout, Plan};
use crate::rng::Rng;
use crate::server::id_of;
use crate::starts::Start;
use crate::world::{Event, MILLI, World};

/// Machines that may have the array.
pub(crate) const MACHINES: usize = 3;
/// What could not be saved is tried again after so long.
const SAVE_AGAIN: u64 = 100 * MILLI;

/// A host whose array another one has taken.
struct Former {
    daemon: Daemon,
    record: Record,
}

/// What is known of hosts.
pub(crate) struct Hosts {
    /// Of daemons and claims.
    lives: u32,
    numbers: u32,
    formers: Vec<Former>,
    /// A former one acts.
    acting: bool,
    /// Somebody has served.
    pub(crate) served: bool,
    pub(crate) starts: Vec<Start>,
    /// The last record of each machine.
    pub(crate) records: Vec<Option<ArraySpec>>,
    boots: Vec<u8>,
    /// A machine that does not reach a server, until when.
    blind: (usize, usize, u64),
    /// By fault: which daemon it has brought to a standstill.
    pub(crate) paused: Vec<u32>,
    pub(crate) errands: Vec<Errand>,
    /// When the last errand of each target arrives.
    pub(crate) last_errand: Vec<u64>,
    /// Connections for a claim.
    pub(crate) claiming: BTreeMap<usize, usize>,
    ids: u64,
}

impl Hosts {
    pub(crate) fn new(faults: usize, targets: usize) -> Hosts {
        Hosts {
            lives: 0,
            numbers: 0,
            formers: Vec::new(),
            acting: false,
            served: false,
            starts: Vec::new(),
            records: vec![None; MACHINES],
            boots: vec![1; MACHINES],
            blind: (0, 0, 0),
            paused: vec![0; faults],
            errands: Vec::new(),
            last_errand: vec![0; targets],
            claiming: BTreeMap::new(),
            ids: 0,
        }
    }

    /// Whether what happens now happens to a former host.
    pub(crate) fn is_former(&self) -> bool {
        self.acting
    }

    pub(crate) fn has_formers(&self) -> bool {
        !self.formers.is_empty()
    }

    /// Whether somebody is about to serve who knows what servers have told of losses.
    pub(crate) fn is_starting(&self) -> bool {
        self.starts.iter().any(|start| !start.importing)
    }

    pub(crate) fn next_life(&mut self) -> u32 {
        self.lives += 1;
        self.lives
    }

    /// A random id, as far as anybody can tell.
    pub(crate) fn fresh(&mut self) -> Id {
        self.ids += 1;
        let mut id = [0x9e; 16];
        id[..8].copy_from_slice(&self.ids.to_le_bytes());
        Id(id)
    }

    pub(crate) fn boot(&self, machine: usize) -> u8 {
        self.boots[machine]
    }

    pub(crate) fn reboots(&mut self, machine: usize, boot: u8) {
        self.boots[machine] = boot;
    }

    pub(crate) fn is_blind(&self, machine: usize, server: usize, now: u64) -> bool {
        self.blind.0 == machine && self.blind.1 == server && now < self.blind.2
    }

    /// Whether a connection was made for a claim.
    pub(crate) fn claims(&self, conn: usize) -> bool {
        self.claiming.contains_key(&conn)
    }

    /// What servers have been asked and have not answered.
    pub(crate) fn open_errands(&self) -> Vec<usize> {
        let open = self.errands.iter().enumerate().filter(|(_, errand)| errand.is_open());
        open.map(|(at, _)| at).collect()
    }
}

/// The id of a machine.
pub(crate) fn host_id(machine: usize) -> Id {
    Id([0x77 + u8::try_from(machine).unwrap_or(0); 16])
}

impl World {
    /// An event happens to whom it concerns.
    pub(crate) fn hand_out(&mut self, event: Event) {
        let life = match event {
            Event::OwnerTick { life } | Event::Reported { life, .. } | Event::Recorded { life } => life,
            Event::SaveAgain { life } | Event::Survey { life, .. } | Event::StopSync { life, .. } => life,
            Event::Adopt { life, .. } | Event::Look { life, .. } | Event::Client { life, .. } => life,
            Event::Timer { life, .. } | Event::DaemonAbort { life, .. } | Event::DaemonEnd { life, .. } => life,
            Event::Labelled { life, .. } | Event::Fenced { life } => life,
            Event::Connected { conn } | Event::Down { conn } | Event::Sent { conn } => self.conns[conn].life,
            Event::Reaped { conn, .. } => self.conns[conn].life,
            _ => return self.happen(event),
        };
        match self.hosts.formers.iter().position(|former| former.daemon.life == life) {
            None => self.happen(event),
            Some(at) => self.as_former(at, |world| world.happen(event)),
        }
    }

    fn swap(&mut self, at: usize) {
        let former = &mut self.hosts.formers[at];
        std::mem::swap(&mut self.daemon, &mut former.daemon);
        std::mem::swap(&mut self.record, &mut former.record);
    }

    fn as_former(&mut self, at: usize, act: impl FnOnce(&mut World)) {
        self.swap(at);
        self.hosts.acting = true;
        act(self);
        self.hosts.acting = false;
        self.swap(at);
        self.hosts.formers.retain(|former| former.daemon.is_up());
        // What has ended there may be the last that was outstanding.
        self.calm();
    }

    /// Does something to one of the daemons, if it still is there.
    pub(crate) fn with_daemon(&mut self, number: u32, act: impl FnOnce(&mut World)) {
        if self.daemon.number == number {
            act(self);
        } else if let Some(at) = self.hosts.formers.iter().position(|former| former.daemon.number == number) {
            self.as_former(at, act);
        }
    }

    /// Connections in use, of all hosts.
    pub(crate) fn all_connections(&self) -> Vec<usize> {
        let formers = self.hosts.formers.iter().flat_map(|former| former.daemon.connections());
        self.daemon.connections().into_iter().chain(formers).collect()
    }

    /// The former host's daemon ends.
    pub(crate) fn former_dies(&mut self, power: bool) {
        self.trace.note(self.now, 260, u64::from(self.daemon.life));
        self.trace.say(self.now, || format!("!! the former daemon of machine {} ends", self.daemon.machine));
        self.judge.daemon_died(self.now, self.daemon.life);
        self.owner_dies();
        for conn in self.daemon.ends() {
            self.hang_up_client(conn, !power);
        }
        self.keep_record();
    }

    /// A data path is told that a volume is another owner's.
    pub(crate) fn is_fenced(&mut self, volume: Id) {
        let (life, epoch) = (self.daemon.life, self.daemon.epoch);
        let state =
            self.target_of(volume).and_then(|target| self.nodes[target].rules.as_ref()).map(|rules| rules.state());
        let ours = state
            .and_then(|state| state.claim)
            .is_some_and(|claim| claim.epoch.0 < epoch || (claim.epoch.0 == epoch && claim.session == session(life)));
        if ours || !self.judge.is_taken(life) {
            return self.fail("4.2", format!("{volume} is said to be another owner's, and is not"));
        }
        let longest = self.rng.pick(&[1, 20, 500]) * MILLI;
        let at = self.now + self.rng.below(longest);
        self.queue.push(at, Event::Fenced { life });
    }

    /// Its owner ends it.
    pub(crate) fn fenced(&mut self, life: u32) {
        if life != self.daemon.life || !self.hears(Event::Fenced { life }) {
            return;
        }
        if self.hosts.is_former() {
            return self.former_dies(false);
        }
        self.daemon_ends(false);
        self.daemon.life = self.hosts.next_life();
        self.daemon_trouble(true);
        // Whoever has begun to take it may have given up.
        if !self.hosts.starts.iter().any(|start| start.take) {
            let machine = self.rng.index(MACHINES);
            let at = self.now + self.rng.below(500 * MILLI);
            self.queue.push(at, Event::TakeOver { machine });
        }
    }

    /// The machine keeps what it knows of the array.
    pub(crate) fn keep_record(&mut self) {
        if self.plan.hosts {
            let machine = self.daemon.machine;
            self.hosts.records[machine] = Some(self.spec_of(&self.record));
        }
    }

    /// The plan wants a take-over.
    pub(crate) fn ask_take_over(&mut self, later: u64) {
        let machine = (self.daemon.machine + 1 + self.rng.index(MACHINES - 1)) % MACHINES;
        if self.rng.percent(20) {
            let server = self.rng.index(self.servers.len());
            self.hosts.blind = (machine, server, self.now + later + self.rng.below(3000 * MILLI));
        }
        self.queue.push(self.now + later, Event::TakeOver { machine });
    }

    /// A machine is told to take the array over.
    pub(crate) fn take_over(&mut self, machine: usize) {
        if self.hosts.starts.iter().any(|start| start.take) || (self.daemon.is_up() && self.daemon.machine == machine) {
            return;
        }
        // What it still serves itself is stopped by force.
        while let Some(at) = self.hosts.formers.iter().position(|former| former.daemon.machine == machine) {
            self.as_former(at, |world| world.former_dies(false));
        }
        self.hosts.starts.retain(|start| start.machine != machine);
        self.trace.note(self.now, 261, machine as u64);
        self.trace.say(self.now, || format!("!! machine {machine} is to take the array over"));
        self.begin_start(machine, true);
    }

    /// A daemon is killed: the one that serves, a former one, or one that begins to.
    pub(crate) fn kill_some_daemon(&mut self, lasts: u64) {
        if self.hosts.has_formers() && self.rng.one_in(3) {
            let at = self.rng.index(self.hosts.formers.len());
            return self.as_former(at, |world| world.former_dies(false));
        }
        if !self.hosts.starts.is_empty() && self.rng.percent(50) {
            return self.starts_die(lasts);
        }
        self.kill_daemon(lasts, false);
    }

    /// Whoever begins to serve dies, and begins anew.
    fn starts_die(&mut self, lasts: u64) {
        for start in std::mem::take(&mut self.hosts.starts) {
            let (machine, life) = (start.machine, self.daemon.life);
            let again = if start.take { Event::TakeOver { machine } } else { Event::DaemonStart { life } };
            self.queue.push(self.now + lasts, again);
        }
    }

    /// All machines that have or want the array lose power, but for the one that serves.
    pub(crate) fn hosts_lose_power(&mut self, lasts: u64) {
        while self.hosts.has_formers() {
            self.as_former(0, |world| world.former_dies(true));
        }
        self.starts_die(lasts);
        for machine in (0..MACHINES).filter(|machine| *machine != self.daemon.machine) {
            self.hosts.boots[machine] = self.hosts.boots[machine].wrapping_add(1);
        }
    }

    /// Somebody who has claimed everything that is there, and written all labels, serves from now on.
    pub(crate) fn launch(&mut self, start: &Start, spec: &ArraySpec, claim: Claim) {
        let mut record = self.record_of(spec);
        let machine = start.machine;
        let present = self.daemon.is_up();
        let here = self.daemon.machine == machine && !present;
        let mut daemon = Daemon::off();
        (daemon.life, daemon.epoch, daemon.machine) = (start.life, claim.epoch.0, machine);
        daemon.boot = self.hosts.boots[machine];
        self.hosts.numbers += 1;
        daemon.number = self.hosts.numbers;
        self.trace.say(self.now, || format!("machine {machine} serves, epoch {}", claim.epoch.0));
        if present && claim.epoch.0 < self.daemon.epoch {
            // Another one has taken it while this one was about to.
            self.judge.replaced_before(self.now, start.life);
            let known = record.clone();
            self.hosts.formers.push(Former { daemon, record });
            return self.as_former(self.hosts.formers.len() - 1, |world| world.serve(&known, Vec::new(), false));
        }
        if here {
            (self.daemon.life, self.daemon.epoch) = (start.life, claim.epoch.0);
            record.asked = self.record.asked.clone();
        } else {
            let daemon = std::mem::replace(&mut self.daemon, daemon);
            let record = self.record.clone();
            if present {
                let shut =
                    |owner: &crate::owner::Owner| owner.rules.view().nodes.iter().any(|node| node.gate.is_shut());
                if daemon.owner.as_ref().is_some_and(shut) {
                    self.judge.parks(daemon.life);
                }
                self.hosts.formers.push(Former { daemon, record });
                self.daemon_trouble(true);
            }
            self.stats.taken += u64::from(start.take);
        }
        if start.is_taken {
            self.judge.taken(self.now, start.life);
        }
        if start.take {
            let lives: Vec<u32> = self.hosts.formers.iter().map(|former| former.daemon.life).collect();
            self.judge.replaced(self.now, &lives);
        }
        let known = record.clone();
        self.record = record;
        for device in 0..u16::try_from(self.plan.volumes.len()).unwrap_or(0) {
            self.judge.excuses.suspended(self.now, device, false);
        }
        self.settle_losses(start.outlived);
        let again = std::mem::replace(&mut self.hosts.served, true);
        self.serve(&known, Vec::new(), again);
    }

    /// What servers have lost while nobody relied on it does not matter any more; what is known to be lost is, until it is accepted.
    fn settle_losses(&mut self, outlived: bool) {
        for target in 0..self.nodes.len() {
            let (volume, in_sync) = (id_of(target), self.record.standings[target] == Standing::InSync);
            if in_sync && self.record.memory.has_lost(volume) {
                self.loses(target);
                continue;
            }
            if outlived || !self.lossy[target] {
                continue;
            }
            let told = self.record.memory.volumes.get(&volume).map(|losses| losses.told);
            if !in_sync {
                self.lossy[target] = false;
            } else if told == Some(self.nodes[target].kept.losses_told(self.plan.write_through)) {
                self.forgive(target);
            }
        }
        self.condemn();
    }

    /// Each node whose replicas in sync are others than before has a new generation, in the same record.
    pub(crate) fn name_sets(&mut self, before: &[Standing]) {
        for node in 0..self.plan.volumes.len() {
            let is_in_sync = |standings: &[Standing], of: usize| standings[of] == Standing::InSync;
            let differs = |of: usize| is_in_sync(before, of) != is_in_sync(&self.record.standings, of);
            if self.targets_of(node).any(differs) {
                let fresh = self.hosts.fresh();
                self.record.generations[node] = self.record.generations[node].next(fresh);
            }
        }
    }

    /// The labels of these nodes, and of those that are owed some, are written.
    pub(crate) fn write_labels(&mut self, life: u32, changed: &[usize]) {
        let Some(owner) = &mut self.daemon.owner else { return };
        owner.owed.extend(changed);
        let owed: Vec<usize> = owner.owed.iter().copied().collect();
        let targets: Vec<usize> = owed.into_iter().flat_map(|node| self.in_sync(node)).collect();
        if let Some(owner) = &mut self.daemon.owner {
            (owner.telling, owner.untold) = (targets.len(), Vec::new());
        }
        if targets.is_empty() {
            return self.owner_hears(life, Told::Saved(Saved::All));
        }
        let machine = self.daemon.machine;
        let claim = Claim { epoch: Epoch(self.daemon.epoch), owner: session(life), host: host_id(machine) };
        let spec = self.spec_of(&self.record);
        for target in targets {
            match self.label_of(&spec, machine, target) {
                Some(text) => self.begin_errand(Asker::Owner { life }, machine, target, Ask::Label(claim, text)),
                None => self.fail("hosts", format!("no label for target {target}")),
            }
        }
    }

    fn label_of(&self, spec: &ArraySpec, machine: usize, target: usize) -> Option<String> {
        let node = self.plan.node_of(target);
        let place = spec.nodes[node].replicas.iter().position(|replica| replica.volume == id_of(target))?;
        MemberLabel::of(spec, host_id(machine), node, place).ok()
    }

    /// The owner hears what became of a label.
    pub(crate) fn labelled(&mut self, life: u32, volume: usize, done: bool) {
        if life != self.daemon.life || !self.hears(Event::Labelled { life, volume, done }) {
            return;
        }
        let Some(owner) = &mut self.daemon.owner else { return };
        owner.telling = owner.telling.saturating_sub(1);
        if !done {
            owner.untold.push(id_of(volume));
        }
        if owner.telling > 0 {
            return;
        }
        let untold = std::mem::take(&mut owner.untold);
        let plan = &self.plan;
        let owes =
            |node: &usize| (0..self.nodes.len()).any(|of| plan.node_of(of) == *node && untold.contains(&id_of(of)));
        owner.owed.retain(owes);
        if untold.is_empty() {
            return self.owner_hears(life, Told::Saved(Saved::All));
        }
        self.queue.push(self.now + SAVE_AGAIN, Event::SaveAgain { life });
        self.owner_hears(life, Told::Saved(Saved::AllBut(untold)));
    }

    /// A node's name.
    pub(crate) fn start_of(&self, node: usize) -> NodeId {
        NodeId(Lba(self.plan.used[..node].iter().sum()))
    }

    pub(crate) fn place_of(&self, target: usize) -> Option<Target> {
        format!("s{}:1/v{target}", self.nodes[target].server).parse().ok()
    }

    /// The target that is meant.
    pub(crate) fn target_at(&self, place: &Target) -> Option<usize> {
        (0..self.nodes.len()).find(|target| self.place_of(*target).as_ref() == Some(place))
    }

    /// What a record says, as production keeps it.
    pub(crate) fn spec_of(&self, record: &Record) -> ArraySpec {
        let replica = |target: usize| {
            let state = match record.standings[target] {
                Standing::InSync => ReplicaState::InSync,
                Standing::Stale => ReplicaState::Stale,
                Standing::Filling { from } => ReplicaState::Syncing { from },
                Standing::Candidate { .. } | Standing::Absent => return None,
            };
            Some(ReplicaSpec { target: self.place_of(target)?, volume: id_of(target), state })
        };
        let node = |node: usize| NodeSpec {
            start: self.start_of(node),
            sectors: self.plan.used[node],
            replicas: self.targets_of(node).filter_map(replica).collect(),
            generation: record.generations[node].clone(),
            suspend: None,
            transfer: None,
            scrub: None,
        };
        let (alg, chunk) = match self.plan.layout {
            Layout::Linear => (Alg::Linear, 0),
            Layout::Striped { chunk } => (Alg::Striped, chunk * SECTOR_BYTES),
        };
        ArraySpec {
            name: "a".to_owned(),
            id: ARRAY,
            phase: Phase::Stopped,
            alg,
            chunk,
            block: 512,
            epoch: Epoch(record.epoch),
            nodes: (0..self.plan.volumes.len()).map(node).collect(),
            clean: record.clean,
            memory: record.memory.clone(),
            debts: Vec::new(),
            migrations: Vec::new(),
            migrated: 0,
            grow: false,
            run: RunOptions::default(),
        }
    }

    /// The other way round.
    fn record_of(&self, spec: &ArraySpec) -> Record {
        let mut standings = vec![Standing::Absent; self.nodes.len()];
        for (_, replica) in spec.replicas() {
            if let Some(target) = self.target_of(replica.volume) {
                standings[target] = match replica.state {
                    ReplicaState::InSync => Standing::InSync,
                    ReplicaState::Stale => Standing::Stale,
                    ReplicaState::Syncing { from } => Standing::Filling { from },
                };
            }
        }
        Record {
            standings,
            clean: spec.clean,
            memory: spec.memory.clone(),
            asked: Asked::new(self.plan.volumes.len()),
            epoch: spec.epoch.0,
            generations: spec.nodes.iter().map(|node| node.generation.clone()).collect(),
        }
    }

    /// Daemons that serve on other machines than this one.
    pub(crate) fn lives_elsewhere(&self, machine: usize) -> Vec<u32> {
        let formers = self.hosts.formers.iter().map(|former| &former.daemon);
        let all = std::iter::once(&self.daemon).chain(formers);
        all.filter(|daemon| daemon.is_up() && daemon.machine != machine).map(|daemon| daemon.life).collect()
    }
}

/// Which machines take the array when, and what else happens then; decided by a generator of its own.
pub(crate) fn plan(rng: &mut Rng, plan: &mut Plan) {
    if plan.spares > 0 || !rng.percent(40) {
        return;
    }
    plan.hosts = true;
    let both = Kind::Partition { up: true, down: true };
    for _ in 0..rng.range(1, 4) {
        let (after, node) = (rng.below(plan.requests), rng.index(plan.server_of.len()));
        let longest = rng.pick(&[100, 1000, 4000]) * MILLI;
        let lasts = rng.range(MILLI, longest);
        let longest = rng.pick(&[2, 60]) * MILLI;
        let soon = rng.below(longest);
        let mut add = |after, kind, lasts| plan.faults.push(Fault { after, kind, node, lasts });
        match rng.below(8) {
            0 => add(after, Kind::PauseDaemon, lasts),
            1 => add(after, rng.pick(&[both, Kind::Partition { up: false, down: true }]), lasts),
            2 => add(after, Kind::KillDaemon, lasts),
            3 => add(after, Kind::StopDaemon, 1000 * MILLI + lasts),
            4 => add(after, rng.pick(&[Kind::PauseServer, Kind::StallDisk, Kind::SlowDisk, Kind::SlowLink]), lasts),
            5 => add(after, rng.pick(&[Kind::KillServer, Kind::CutAll, Kind::CutSilent]), lasts),
            _ => {}
        }
        add(after, Kind::TakeOver, rng.pick(&[soon, soon, 400 * MILLI]));
        // What the next one finds is not what the last one has left.
        let late = after + rng.range(1, 60);
        match rng.below(4) {
            0 => add(late, Kind::KillDaemon, lasts),
            1 => add(late, Kind::StopDaemon, 1000 * MILLI),
            2 => add(late, Kind::CutAll, 0),
            _ => {}
        }
        // The one that had it before may take it back at once, with what it has a record of.
        if rng.percent(40) {
            add(after + rng.range(1, 12), Kind::TakeOver, soon);
        }
    }
    plan.faults.sort_by_key(|fault| fault.after);
}
