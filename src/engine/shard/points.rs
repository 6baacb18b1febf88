//! What a shard does for the points of its nodes ([`crate::engine::points`]): it counts its changes, and moves the proof on with
//! each flush. Nodes with one target have none of it.

use crate::engine::shard::Shard;
use crate::engine::shard::group::Group;
use crate::engine::view::Role;
use crate::errno::Errno;
use crate::wire::frame::Header;

impl Shard {
    /// A group is about to be sent.
    pub(super) fn count_in(&mut self, index: u16) {
        let group = *self.groups.at(index);
        let Some(overlap) = self.view.nodes[group.node].overlap.clone() else { return };
        if group.mutates() {
            self.groups.at_mut(index).turn = Some(overlap.points.begin(self.config.index));
        } else if !group.op.has_range() {
            let node = &self.view.nodes[group.node];
            let places = node.targets.iter().copied().enumerate();
            overlap.points.look(&self.shared, places.filter(|(_, target)| self.view.role(*target) == Role::InSync));
        }
    }

    /// A group is over.
    pub(super) fn count_out(&mut self, group: &Group, result: Result<(), Errno>) {
        let Some(overlap) = self.view.nodes[group.node].overlap.as_ref() else { return };
        let Some(turn) = group.turn else { return };
        let attached = self.view.nodes[group.node]
            .targets
            .iter()
            .filter(|target| self.view.role(**target).is_written() || self.view.role(**target) == Role::Leaving);
        if result.is_err() && group.is_anywhere() && attached.count() > 1 {
            overlap.points.spoil();
        }
        overlap.points.end(self.config.index, turn);
    }

    /// What a flush tells a target.
    pub(super) fn point_for(&self, node: usize, target: usize) -> u64 {
        let node = &self.view.nodes[node];
        let place = node.targets.iter().position(|other| *other == target);
        let points = node.overlap.as_ref().map(|overlap| &overlap.points);
        points.zip(place).map_or(0, |(points, place)| points.to_tell(place))
    }

    /// A target has answered a flush.
    pub(super) fn hear_point(&self, target: usize, reply: &Header) {
        let node = &self.view.nodes[self.view.targets[target].node];
        if let Some(overlap) = &node.overlap
            && let Some(place) = node.targets.iter().position(|other| *other == target)
        {
            overlap.points.told(place, reply.point());
        }
    }
}
