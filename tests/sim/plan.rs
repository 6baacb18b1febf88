//! What a seed decides before anything happens: the array, its servers, the workload, and which faults come when.
//!
//! Swarm: each kind of fault is on in some seeds and off in others, so that no kind hides what another would show.

use crate::rng::Rng;

const MICRO: u64 = 1_000;
const MILLI: u64 = 1_000_000;

/// How the array is laid out; its own arithmetic, on purpose not the engine's.
#[derive(Clone, Debug)]
pub(crate) enum Layout {
    Linear,
    Striped { chunk: u64 },
}

/// Something that the operator does, and perhaps takes back later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// A node is suspended.
    Suspend,
    /// A node moves to another target.
    Move { verify: bool, keep: bool },
    /// It moves back to the one that was kept.
    Undo,
    /// A move is ended.
    Abort,
    /// A move waits.
    Pause,
    /// A node gets one more replica.
    Add,
    /// It loses one.
    Remove,
    /// What was kept is not any more.
    Release,
    /// A node's replicas are compared.
    Scrub { repair: bool },
    /// That is ended.
    EndScrub,
}

/// A fault that happens at a moment and may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A connection breaks; the client notices at once.
    Cut,
    /// Every connection of a server breaks.
    CutAll,
    /// A connection breaks and the client is not told.
    CutSilent,
    /// Nothing arrives at the server, at the client, or both.
    Partition { up: bool, down: bool },
    /// The link has a hundredth of its speed.
    SlowLink,
    /// The server's process is killed; it comes back after the fault's time.
    KillServer,
    /// The server is stopped in order: it says so to every request for a while, then its process ends.
    StopServer,
    /// The server stands still.
    PauseServer,
    /// The array's daemon is killed.
    KillDaemon,
    /// The array's daemon is stopped in order: it takes no more requests, ends those in flight, then its process ends.
    StopDaemon,
    /// The array's daemon stands still.
    PauseDaemon,
    /// The server's machine and the array's lose power.
    PowerCut,
    /// All machines lose power.
    PowerCutAll,
    /// The disk takes much longer.
    SlowDisk,
    /// The disk does nothing at all.
    StallDisk,
    /// The disk changes silently what it holds.
    Flip,
    /// No fault: the operator does something.
    Deed(Deed),
    /// None either: after the fault's time another machine takes the array over.
    TakeOver,
}

/// A fault of the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// It strikes soon after this many requests have been issued.
    pub(crate) after: u64,
    pub(crate) kind: Kind,
    /// Which target it concerns; where a server is meant, that of the target.
    pub(crate) node: usize,
    /// How long it lasts, ns.
    pub(crate) lasts: u64,
}

/// Errors of disks and links, each with its chance in 100,000 operations.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rates {
    pub(crate) disk_eio: u64,
    pub(crate) disk_enospc: u64,
    pub(crate) sync_eio: u64,
    pub(crate) damage: u64,
}

/// The whole plan.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) layout: Layout,
    /// Size of each node's volume, sectors.
    pub(crate) volumes: Vec<u64>,
    /// Part of it that the array uses.
    pub(crate) used: Vec<u64>,
    /// Replicas of each node. Replica k of node n is target n * copies + k.
    pub(crate) copies: usize,
    /// Volumes of each node that are not in use when it begins; they are the last targets, in the order of the nodes.
    pub(crate) spares: usize,
    /// They hold zeros, not rubbish.
    pub(crate) blank: bool,
    /// The grain of sync, sectors.
    pub(crate) region: u64,
    /// A replica that does not answer is left behind after this, ns.
    pub(crate) patience: u64,
    /// The server of each target.
    pub(crate) server_of: Vec<usize>,
    pub(crate) servers: usize,
    pub(crate) sparse: bool,
    /// Every change is durable before it is answered.
    pub(crate) write_through: bool,
    pub(crate) shards: usize,
    pub(crate) depth: usize,
    pub(crate) io_timeout: u64,
    pub(crate) latency: u64,
    pub(crate) jitter: u64,
    /// Per byte, thousandths of a ns.
    pub(crate) per_byte: u64,
    /// Shortest and longest time of a disk operation, ns.
    pub(crate) disk: (u64, u64),
    pub(crate) faults: Vec<Fault>,
    pub(crate) rates: Rates,
    /// Servers die while they write down whose a volume is, and former owners come back.
    pub(crate) zombies: bool,
    /// Sessions ask for a region log.
    pub(crate) logged: bool,
    /// Each node's first volume is empty, and its other ones have been used before: they have to be filled.
    pub(crate) used_before: bool,
    /// The operator has replicas compared, and disks may lie.
    pub(crate) scrubs: bool,
    /// Several machines want the array.
    pub(crate) hosts: bool,
    /// The disks may lose power.
    pub(crate) mortal: bool,
    pub(crate) requests: u64,
    /// Weights: read, write, write with FUA, zeroes (half of them discards), flush.
    pub(crate) mix: [u64; 5],
    /// Largest request, sectors.
    pub(crate) largest: u64,
    /// How many of 100 requests have at most 8 sectors.
    pub(crate) small: u64,
    /// Most requests start within so many sectors from here.
    pub(crate) hot: (u64, u64),
    /// Chance of a pause before the next request, percent, and how long it is at most.
    pub(crate) think: (u64, u64),
    /// Requests outside of the device are among the rest.
    pub(crate) strays: bool,
}

/// The plan of a seed, for so many requests.
pub(crate) fn plan(rng: &mut Rng, requests: u64) -> Plan {
    let copies = rng.pick(&[1, 1, 2, 2, 3]);
    let nodes = if copies == 1 { rng.index(6) } else { rng.index(3) } + 1;
    let servers = (rng.index(8) + 1).max(copies);
    let layout = if rng.percent(50) { Layout::Linear } else { Layout::Striped { chunk: 8 << rng.below(3) } };
    let volumes: Vec<u64> = (0..nodes).map(|_| volume_sectors(rng, &layout)).collect();
    let used = used(&layout, &volumes);
    let array: u64 = used.iter().sum();
    let hot = rng.pick(&[8, 32, 96]).min(array);
    let hot = rng.range(if copies == 1 { 1 } else { 24.min(hot) }, hot);
    let mortal = rng.percent(60);
    let calm = rng.percent(10);
    // With replicas a request may have to wait for two of them, one after the other.
    let shortest = if copies == 1 { 300 } else { 3000 };
    let io_timeout = rng.pick(&[300, 1000, 1000, 3000, 10_000, 60_000]).max(shortest) * MILLI;
    let mut plan = Plan {
        copies,
        spares: 0,
        blank: false,
        region: rng.pick(&[8, 16, 64]),
        patience: io_timeout / 10,
        server_of: (0..nodes).flat_map(|_| some_servers(rng, servers, copies)).collect(),
        servers,
        sparse: rng.percent(30),
        write_through: false,
        shards: rng.index(4) + 1,
        // On replicas overlapping requests go one by one: many of them at the slowest disk would only wait.
        depth: rng.pick(&[1, 2, 4, 8, 16, 32, 64]).min(if copies == 1 { 64 } else { 6 }),
        io_timeout,
        latency: rng.range(10, 300) * MICRO,
        jitter: rng.pick(&[0, 20, 200, 2000]) * MICRO,
        per_byte: rng.pick(&[0, 100, 1000, 10_000]),
        disk: (10 * MICRO, rng.pick(&[20, 100, 500, 5000]) * MICRO),
        faults: Vec::new(),
        rates: Rates::default(),
        zombies: false,
        logged: copies > 1 || rng.percent(50),
        used_before: copies > 1 && array.is_multiple_of(3),
        scrubs: false,
        hosts: false,
        mortal,
        requests,
        mix: [0, 10, 2, 3, 4].map(|weight| rng.below(weight * 2 + 1)),
        small: rng.pick(&[0, 50, 50, 90]),
        largest: rng.pick(&[1, 4, 16, 64, 256]).min(array),
        hot: (rng.below(array - hot + 1), hot),
        think: (rng.below(60), rng.pick(&[1, 1, 10, 10, 10, 1000]) * MILLI),
        strays: rng.percent(5),
        layout,
        volumes,
        used,
    };
    plan.mix[0] = rng.range(4, 12);
    if !calm {
        faults(rng, &mut plan);
    }
    plan
}

/// What the operator does, decided by a generator of its own, so that the rest of a seed's plan does not depend on it.
pub(crate) fn deeds(rng: &mut Rng, plan: &mut Plan) {
    if rng.percent(50) {
        return;
    }
    plan.spares = 1;
    plan.blank = rng.percent(30);
    let spares: Vec<usize> = plan.volumes.iter().map(|_| rng.index(plan.servers)).collect();
    plan.server_of.extend(spares);
    // A write may have to wait for two targets, one after the other, and for what overlaps it.
    plan.io_timeout = plan.io_timeout.max(3000 * MILLI);
    plan.patience = plan.io_timeout / 10;
    plan.depth = plan.depth.min(6);
    let mut deeds = vec![
        Deed::Suspend,
        Deed::Move { verify: true, keep: false },
        Deed::Move { verify: false, keep: false },
        Deed::Move { verify: true, keep: true },
        Deed::Undo,
        Deed::Abort,
        Deed::Pause,
        Deed::Release,
    ];
    if plan.copies > 1 {
        deeds.extend([Deed::Add, Deed::Remove]);
    }
    deeds.retain(|_| rng.percent(50));
    if deeds.is_empty() {
        deeds.push(Deed::Move { verify: true, keep: false });
    }
    for _ in 0..rng.range(1, 10) {
        let longest = rng.pick(&[10, 100, 1000, 5000]) * MILLI;
        plan.faults.push(Fault {
            after: rng.below(plan.requests),
            kind: Kind::Deed(rng.pick(&deeds)),
            node: rng.index(plan.server_of.len()),
            lasts: rng.range(MILLI, longest),
        });
    }
    plan.faults.sort_by_key(|fault| fault.after);
}

/// In some worlds, decided by a generator of its own, too: the daemon ends again and again while nodes move, and goes on with them.
pub(crate) fn interruptions(rng: &mut Rng, plan: &mut Plan) {
    if !rng.percent(12) || plan.spares == 0 {
        return;
    }
    for _ in 0..rng.range(1, 4) {
        let (mut after, node) = (rng.below(plan.requests), rng.index(plan.server_of.len()));
        let kind = Kind::Deed(Deed::Move { verify: rng.percent(50), keep: false });
        plan.faults.push(Fault { after, kind, node, lasts: MILLI });
        for _ in 0..rng.range(1, 3) {
            after += rng.range(1, 40);
            let kind = rng.pick(&[Kind::KillDaemon, Kind::KillDaemon, Kind::StopDaemon]);
            plan.faults.push(Fault { after, kind, node, lasts: rng.range(MILLI, 100 * MILLI) });
        }
    }
    plan.faults.sort_by_key(|fault| fault.after);
}

/// In few worlds, decided by a generator of its own, too: the queue is full of requests that have many parts each, and one server is silent
/// for longer than requests wait. Those of the other nodes must go on.
pub(crate) fn crowd(rng: &mut Rng, plan: &mut Plan) {
    let nodes = plan.volumes.len();
    let striped = matches!(plan.layout, Layout::Striped { .. });
    if plan.hosts || plan.is_plural() || nodes < 2 || !striped || !rng.percent(25) {
        return;
    }
    let array = plan.sectors();
    (plan.depth, plan.largest, plan.small) = (64, 256.min(array), rng.pick(&[30, 50, 80]));
    (plan.hot, plan.think) = ((0, array), (0, plan.think.1));
    let node = rng.index(nodes);
    plan.faults.retain(|fault| !matches!(fault.kind, Kind::KillDaemon | Kind::PauseDaemon | Kind::StopDaemon));
    for _ in 0..rng.range(1, 3) {
        let kind = rng.pick(&[Kind::PauseServer, Kind::Partition { up: true, down: true }, Kind::StallDisk]);
        let lasts = plan.io_timeout.min(5000 * MILLI) * rng.range(11, 30) / 10;
        plan.faults.push(Fault { after: rng.below(plan.requests), kind, node, lasts });
    }
    plan.faults.sort_by_key(|fault| fault.after);
}

/// The replicas of a node are on different servers.
fn some_servers(rng: &mut Rng, servers: usize, copies: usize) -> Vec<usize> {
    let first = rng.index(servers);
    (0..copies).map(|copy| (first + copy) % servers).collect()
}

fn volume_sectors(rng: &mut Rng, layout: &Layout) -> u64 {
    match layout {
        Layout::Linear => rng.range(1, 200),
        Layout::Striped { chunk } => rng.range(*chunk, chunk * 12),
    }
}

fn used(layout: &Layout, volumes: &[u64]) -> Vec<u64> {
    match layout {
        Layout::Linear => volumes.to_vec(),
        Layout::Striped { chunk } => {
            let smallest = volumes.iter().copied().min().unwrap_or(0);
            vec![smallest / chunk * chunk; volumes.len()]
        }
    }
}

fn faults(rng: &mut Rng, plan: &mut Plan) {
    let both = Kind::Partition { up: true, down: true };
    let mut kinds = vec![
        Kind::Cut,
        Kind::CutAll,
        Kind::CutSilent,
        both,
        Kind::Partition { up: true, down: false },
        Kind::Partition { up: false, down: true },
        Kind::SlowLink,
        Kind::PauseServer,
        Kind::KillDaemon,
        Kind::PauseDaemon,
        Kind::SlowDisk,
        Kind::StallDisk,
        Kind::KillServer,
        Kind::StopServer,
        Kind::StopDaemon,
    ];
    if plan.mortal {
        kinds.extend([Kind::PowerCut, Kind::PowerCutAll]);
    }
    kinds.retain(|_| rng.percent(35));
    let rate = |rng: &mut Rng, percent: u64, most: u64| if rng.percent(percent) { rng.range(1, most) } else { 0 };
    plan.rates = Rates {
        disk_eio: rate(rng, 20, 1000),
        disk_enospc: rate(rng, 20, 1000),
        sync_eio: rate(rng, 10, 2000),
        damage: rate(rng, 25, 2000),
    };
    plan.zombies = rng.percent(35);
    if kinds.is_empty() {
        return;
    }
    let count = rng.pick(&[1, 2, 4, 8, 16]);
    for _ in 0..count {
        let shortest = rng.pick(&[1, 1, 100]) * MILLI;
        let longest = (rng.pick(&[1, 4, 12]) * plan.io_timeout / 4).clamp(shortest, 40_000 * MILLI);
        plan.faults.push(Fault {
            after: rng.below(plan.requests),
            kind: rng.pick(&kinds),
            node: rng.index(plan.server_of.len()),
            lasts: rng.range(shortest, longest),
        });
    }
    plan.faults.sort_by_key(|fault| fault.after);
}

impl Plan {
    /// The node whose data a target has.
    pub(crate) fn node_of(&self, target: usize) -> usize {
        let replicas = self.volumes.len() * self.copies;
        if target < replicas { target / self.copies } else { (target - replicas) / self.spares }
    }

    /// Whether a node may have several targets.
    pub(crate) fn is_plural(&self) -> bool {
        self.copies > 1 || self.spares > 0
    }

    /// Size of the array, sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.used.iter().sum()
    }

    /// Where an array sector must be: node and sector of its volume.
    pub(crate) fn locate(&self, sector: u64) -> (usize, u64) {
        match self.layout {
            Layout::Linear => {
                let (mut node, mut rest) = (0, sector);
                while rest >= self.used[node] {
                    rest -= self.used[node];
                    node += 1;
                }
                (node, rest)
            }
            Layout::Striped { chunk } => {
                let (turn, within) = (sector / chunk, sector % chunk);
                let nodes = self.used.len() as u64;
                (usize::try_from(turn % nodes).unwrap_or(0), turn / nodes * chunk + within)
            }
        }
    }

    /// Which array sector is at this place of a node's volume; the inverse of `locate`.
    pub(crate) fn array_sector(&self, node: usize, sector: u64) -> u64 {
        match self.layout {
            Layout::Linear => self.used[..node].iter().sum::<u64>() + sector,
            Layout::Striped { chunk } => {
                let (row, within) = (sector / chunk, sector % chunk);
                (row * self.used.len() as u64 + node as u64) * chunk + within
            }
        }
    }
}
