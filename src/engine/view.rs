//! What the shards of an array work from: its layout, its nodes and their targets. Immutable; a change is a new view.
//!
//! A target's number is its place in [`View::targets`] and never changes while the array runs. A node whose data lives on one
//! target alone has no [`Overlap`] table and costs nothing extra.

use std::sync::Arc;
use std::time::Duration;

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

    /// Whether a write that it missed may be acknowledged.
    pub fn is_settled(self) -> bool {
        matches!(self, Role::Stale | Role::Absent)
    }
}

/// Where a node's data is, or one copy of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The volume's own id: a new volume under an old name is not the one that has the data.
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
    /// With more than one target: what is in flight on it, for all shards.
    pub overlap: Option<Arc<Overlap>>,
    /// While one of its targets is syncing: how far that is.
    pub sync: Option<Arc<SyncMap>>,
    /// The view in which the role of one of its targets changed last.
    pub changed: u64,
    /// The view in which one of its targets began to sync: what was sent under an older one does not go there.
    pub opened: u64,
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
}

impl View {
    /// The first view of an array: for each node its volumes, all of them in sync.
    pub fn new(geometry: Geometry, volumes: &[Vec<Id>], epoch: Epoch) -> View {
        let mut targets = Vec::new();
        let mut nodes = Vec::with_capacity(volumes.len());
        for (node, volumes) in volumes.iter().enumerate() {
            debug_assert!((1..=limits::TARGETS_PER_NODE_MAX).contains(&volumes.len()));
            let first = targets.len();
            targets.extend(volumes.iter().map(|volume| Target { volume: *volume, node, role: Role::InSync }));
            let overlap = (volumes.len() > 1).then(Arc::default);
            nodes.push(Node { targets: (first..targets.len()).collect(), overlap, sync: None, changed: 0, opened: 0 });
        }
        View {
            version: 1,
            geometry,
            epoch,
            targets,
            nodes,
            region_sectors: limits::REGION_BYTES / SECTOR_BYTES,
            replica_timeout: limits::REPLICA_TIMEOUT_DEFAULT,
        }
    }

    /// What a target is to its node.
    pub fn role(&self, target: usize) -> Role {
        self.targets[target].role
    }

    /// Whether a node has one target alone.
    pub fn is_single(&self, node: usize) -> bool {
        self.nodes[node].overlap.is_none()
    }

    /// The targets of a node that have one of these roles.
    pub fn with_role(&self, node: usize, role: Role) -> impl Iterator<Item = usize> + '_ {
        self.nodes[node].targets.iter().copied().filter(move |target| self.role(*target) == role)
    }

    /// The most targets that a node has.
    pub fn width(&self) -> usize {
        self.nodes.iter().map(|node| node.targets.len()).max().unwrap_or(1)
    }
}
