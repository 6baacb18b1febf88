//! How nodes get more sectors while they are in use. What is in flight lies where it lay, so a shard may work with the larger layout at any moment;
//! that all of them do is told, and only then may a request reach beyond the former end.
//!
//! Only nodes of one target: behind the former end nothing is known of what several hold.

use std::sync::Arc;

use super::Replicas;
use crate::bugs::{Bug, planted};
use crate::engine::steer::News;
use crate::engine::view::View;
use crate::geometry::map::Geometry;

/// A layout that the shards are adopting: known when they all work from this view on this node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growing {
    node: usize,
    version: u64,
}

impl Replicas {
    pub(super) fn grow(&mut self, geometry: Geometry) {
        let former = &self.view.geometry;
        let nodes = self.nodes.len();
        let differs = |node: &usize| geometry.node_sectors(*node) != former.node_sectors(*node);
        let grows: Vec<usize> =
            if geometry.nodes() == nodes { (0..nodes).filter(differs).collect() } else { Vec::new() };
        let able = |node: usize| {
            let larger = geometry.node_sectors(node) > former.node_sectors(node);
            let sure = self.view.is_single(node) && self.nodes[node].moving.is_none();
            larger && (sure || planted(Bug::GrowsDoubtful))
        };
        let Some(node) = grows.first().copied().filter(|_| grows.iter().all(|node| able(*node))) else {
            return self.tell(News::Grown { done: false });
        };
        let mut view = View::clone(&self.view);
        view.geometry = geometry;
        // It is this view in which the node changes: the next one, which is published.
        view.nodes[node].changed = view.version + 1;
        self.view = Arc::new(view);
        let version = self.publish();
        self.growing = Some(Growing { node, version });
        if planted(Bug::GrownTooEarly) {
            self.grow_adopted(node, version);
        }
    }

    pub(super) fn grow_adopted(&mut self, node: usize, version: u64) {
        if self.growing.is_some_and(|growing| growing.node == node && growing.version <= version) {
            self.growing = None;
            self.tell(News::Grown { done: true });
        }
    }
}
