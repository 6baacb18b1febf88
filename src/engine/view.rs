//! What the shards of an array work from: its layout, its nodes and their targets. Immutable; a change is a new view.
//!
//! A target's number is its place in [`View::targets`] and never changes while the array runs; behind those that an array starts
//! with each node has spare ones, for what is attached later. A node of which one target alone is attached is *single*: its
//! requests need no [`Overlap`] table and cost nothing extra.

use std::sync::Arc;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::engine::overlap::Overlap;
use crate::engine::region::SyncMap;
use crate::geometry::map::Geometry;
use crate::limits;
use crate::units::{Epoch, Id, SECTOR_BYTES};

/// What a target is to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Has everything: is written and read.
    InSync,
    /// Has everything, and is written; never read. Another one has taken its place, and it may have to come back.
    Mirror,
    /// Gets what the sync engine copies, and writes to the regions that are copied already. Never read.
    Syncing,
    /// Has failed: neither written nor read any more, but a write that it missed must not be acknowledged yet.
    Leaving,
    /// Lacks writes, and that is durably known.
    Stale,
    /// Not attached.
    Absent,
}

impl Role {
    /// Whether the shards keep a connection to it.
    pub fn is_attached(self) -> bool {
        self != Role::Absent
    }

    /// Whether writes go to it, all of them or some.
    pub fn is_written(self) -> bool {
        matches!(self, Role::InSync | Role::Mirror | Role::Syncing)
    }

    /// Whether a write that it missed may be acknowledged.
    pub fn is_settled(self) -> bool {
        matches!(self, Role::Stale | Role::Absent)
    }
}

/// Whether a node's requests may go to its targets. What waits at a gate has no deadline, unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gate {
    /// They may.
    #[default]
    Open,
    /// New ones wait. Acknowledged when nothing that has begun could go on now.
    Draining,
    /// Nothing is sent. Acknowledged when nothing is on its way.
    Frozen,
    /// New ones end with EIO, and so does what has waited.
    Failed,
    /// New ones wait. Acknowledged when nothing that has begun is left.
    Closing,
    /// New ones wait, each until its deadline: which replica has the node's data is being made durable.
    Undecided,
    /// The same: nobody has come yet who has everything.
    Late,
}

impl Gate {
    /// Whether somebody has shut it and said for how long: what waits has no deadline of its own.
    pub fn is_shut(self) -> bool {
        !matches!(self, Gate::Open | Gate::Undecided | Gate::Late)
    }
}

/// Where a node's data is, or one copy of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The volume's own id: a new volume under an old name is not the one that has the data. Nil: nothing is here.
    pub volume: Id,
    /// The node whose data it has.
    pub node: usize,
    /// What it is to that node.
    pub role: Role,
}

/// One node.
#[derive(Clone, Debug)]
pub struct Node {
    /// The numbers of its targets.
    pub targets: Vec<usize>,
    /// Where more than one target is attached, or was: what is in flight on it, for all shards.
    pub overlap: Option<Arc<Overlap>>,
    /// The one target that is attached, if it is one alone and in sync.
    pub single: Option<usize>,
    /// Whether its requests may go on.
    pub gate: Gate,
    /// While one of its targets is syncing: how far that is.
    pub sync: Option<Arc<SyncMap>>,
    /// The view in which its gate, or the role of one of its targets, changed last.
    pub changed: u64,
    /// The view in which one of its targets began to sync: what was sent under an older one does not go there.
    pub opened: u64,
    /// While it moves: how long the volume that comes may take for one request, if something was said.
    pub target_timeout: Option<Duration>,
    /// A volume that is not attached has part of its data: what that one lacks is in the region logs, and is to stay there.
    pub awaits: bool,
}

/// An array as its shards see it.
#[derive(Clone, Debug)]
pub struct View {
    /// Grows with each change.
    pub version: u64,
    /// The layout.
    pub geometry: Geometry,
    /// The epoch under which this daemon serves the array.
    pub epoch: Epoch,
    /// All targets.
    pub targets: Vec<Target>,
    /// All nodes, in order.
    pub nodes: Vec<Node>,
    /// The grain of sync, sectors: on a node with several targets no request crosses a multiple of it.
    pub region_sectors: u64,
    /// A target that does not answer is left behind after this, where another one of its node has answered.
    pub replica_timeout: Duration,
    /// The same for one that is only being filled: nobody waits long for what is not needed yet.
    pub target_timeout: Duration,
}

/// Whether what is changed on the targets of a node is in their region logs from their first HELLO on: of one with a single target there is
/// nobody to tell what it has missed, unless a volume is to come that has part of its data.
pub fn is_logged(targets: usize, awaits: bool) -> bool {
    targets > 1 || (awaits && !planted(Bug::UnloggedAfterRestart))
}

impl View {
    /// The first view of an array: for each node its volumes, all of them in sync; none of one that is late.
    pub fn new(geometry: Geometry, volumes: &[Vec<Id>], epoch: Epoch) -> View {
        let mut targets = Vec::new();
        let mut nodes = Vec::with_capacity(volumes.len());
        for (node, volumes) in volumes.iter().enumerate() {
            debug_assert!(volumes.len() <= limits::TARGETS_PER_NODE_MAX);
            let first = targets.len();
            targets.extend(volumes.iter().map(|volume| Target { volume: *volume, node, role: Role::InSync }));
            nodes.push(Node {
                targets: (first..targets.len()).collect(),
                overlap: None,
                single: None,
                gate: Gate::Open,
                sync: None,
                changed: 0,
                opened: 0,
                target_timeout: None,
                awaits: false,
            });
        }
        let mut view = View {
            version: 1,
            geometry,
            epoch,
            targets,
            nodes,
            region_sectors: limits::REGION_BYTES / SECTOR_BYTES,
            replica_timeout: limits::REPLICA_TIMEOUT_DEFAULT,
            target_timeout: limits::TARGET_TIMEOUT,
        };
        view.see_singles();
        view
    }

    /// How long a target of a node that is only being filled may take for one request.
    pub fn target_timeout(&self, node: usize) -> Duration {
        self.nodes[node].target_timeout.unwrap_or(self.target_timeout)
    }

    /// With spare targets, so that each node has `most` of them.
    #[must_use]
    pub fn with_spares(mut self, most: usize) -> View {
        for (number, node) in self.nodes.iter_mut().enumerate() {
            while node.targets.len() < most {
                node.targets.push(self.targets.len());
                self.targets.push(Target { volume: Id::NIL, node: number, role: Role::Absent });
            }
        }
        self
    }

    /// Sees which nodes have one target alone. To be called after roles have changed.
    pub fn see_singles(&mut self) {
        for node in &mut self.nodes {
            let mut attached = node.targets.iter().copied().filter(|target| self.targets[*target].role.is_attached());
            let first = attached.next();
            let alone = attached.next().is_none();
            node.single = first.filter(|target| alone && self.targets[*target].role == Role::InSync);
            if node.single.is_none() && node.overlap.is_none() {
                node.overlap = Some(Arc::default());
            }
        }
    }

    /// The view of a sync engine: these targets alone, whatever gate is shut for others.
    #[must_use]
    pub fn for_copying(&self, targets: &[usize]) -> View {
        let mut view = self.clone();
        for (index, of) in view.targets.iter_mut().enumerate() {
            of.role = if targets.contains(&index) { Role::InSync } else { Role::Absent };
        }
        view.nodes.iter_mut().for_each(|node| node.gate = Gate::Open);
        view
    }

    /// What a target is to its node.
    pub fn role(&self, target: usize) -> Role {
        self.targets[target].role
    }

    /// The target that a node's requests go to at once: the only one that is attached, and no gate is shut.
    pub fn straight(&self, node: usize) -> Option<usize> {
        self.nodes[node].single.filter(|_| self.nodes[node].gate == Gate::Open)
    }

    /// Whether a node has one target alone.
    pub fn is_single(&self, node: usize) -> bool {
        self.nodes[node].single.is_some()
    }

    /// The targets of a node that have one of these roles.
    pub fn with_role(&self, node: usize, role: Role) -> impl Iterator<Item = usize> + '_ {
        self.nodes[node].targets.iter().copied().filter(move |target| self.role(*target) == role)
    }

    /// Whether what a sync engine copies to a target is to be in its region log. Between the only two targets of a node it need
    /// not: until it is copied for good, it is marked where it comes from, or known to be still to be copied. A third one, also one that is
    /// to come, would not know that the two have it.
    pub fn logs_copies(&self, target: usize) -> bool {
        let attached = |target: &&usize| self.role(**target).is_attached();
        let node = &self.nodes[self.targets[target].node];
        let awaited = usize::from(node.awaits && !planted(Bug::AwaitedForgotten));
        node.targets.iter().filter(attached).count() + awaited > 2
    }

    /// The most targets that a node has.
    pub fn width(&self) -> usize {
        self.nodes.iter().map(|node| node.targets.len()).max().unwrap_or(1)
    }
}
