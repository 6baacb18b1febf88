//! What the shards of an array work from: its layout and its targets. Immutable; a change is a new view.

use crate::geometry::map::Geometry;
use crate::units::{Epoch, Id};

/// Where one node's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The volume's own id: a new volume under an old name is not the one that has the data.
    pub volume: Id,
}

/// An array as its shards see it. Target k holds node k.
#[derive(Clone, Debug)]
pub struct View {
    /// The layout.
    pub geometry: Geometry,
    /// One target for each node.
    pub targets: Vec<Target>,
    /// The epoch under which this daemon serves the array.
    pub epoch: Epoch,
}
