//! The owner's part that gives a stopped linear array a further node at its end, or takes the last one away.
//!
//! In between the record has a node whose volumes have no id, as with replicas: a daemon that finds one frees them and takes the node out,
//! whichever it was. A node in the middle never goes: what lies behind it would move, and a node's name is where it begins.

use super::replicas::Change;
use super::{Array, Effect, Found, Life, Owner, Ticket, Work, plan};
use crate::control::command::Refusal;
use crate::control::replica::{Generation, ReplicaSpec, ReplicaState};
use crate::control::spec::{Alg, NodeSpec, Phase};
use crate::control::target::Target;
use crate::errno::Errno;
use crate::geometry::map::BadGeometry;
use crate::limits;
use crate::units::{Id, Lba, NodeId};

impl Owner {
    pub(super) fn add_node(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (target, size): (&str, Option<u64>),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        array.check_stretchable()?;
        let target: Target = target.parse().map_err(|why: String| Refusal::new(Errno::EINVAL, why))?;
        let sectors = size.map(plan::node_sectors).transpose()?.unwrap_or(0);
        let count = array.spec.nodes.len();
        if count >= limits::NODES_MAX {
            return Err(Refusal::new(Errno::EINVAL, BadGeometry::NodeCount(count + 1).to_string()));
        }
        if let Some((other, _)) = array.spec.replicas().find(|(_, replica)| replica.target == target) {
            let text = format!("{target} is a replica of node {} already", other.start);
            return Err(Refusal::new(Errno::EINVAL, text));
        }
        array.unused(&target)?;
        let survey = Work::Survey(vec![target.clone()]);
        self.work(array, Life::Changing(ticket, count, Change::Extending(target, sectors)), survey, effects);
        Ok(())
    }

    pub(super) fn remove_node(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: NodeId,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        array.check_stretchable()?;
        let at = array.stopped_node(node)?;
        let name = &array.spec.name;
        if array.spec.nodes.len() == 1 {
            let text = format!("node {node} is the only one of array '{name}': 'dst remove {name}' removes the array");
            return Err(Refusal::new(Errno::EINVAL, text));
        }
        if at + 1 != array.spec.nodes.len() {
            let last = array.spec.nodes.last().map_or(node, |last| last.start);
            let text = format!(
                "node {node} is not the last one: without it what lies behind would move. Only {last} can be removed from array '{name}'"
            );
            return Err(Refusal::new(Errno::EINVAL, text));
        }
        if array.spec.nodes[at].transfer.is_some() {
            let text = format!("node {node} moves: end its migration first, see 'dst migration list {name}'");
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        let former = Box::new(array.spec.nodes[at].clone());
        for replica in &mut array.spec.nodes[at].replicas {
            replica.volume = Id::NIL;
        }
        self.save(array, Phase::Stopped, Life::Changing(ticket, at, Change::Leaving(former)), effects);
        Ok(())
    }
}

impl Array {
    /// Whether nodes can be added and removed.
    fn check_stretchable(&self) -> Result<(), Refusal> {
        self.check_stopped()?;
        match self.spec.alg {
            Alg::Linear => Ok(()),
            Alg::Striped => {
                let name = &self.spec.name;
                let text = format!(
                    "array '{name}' is striped: its chunks are dealt out to all of its nodes, so none comes or goes. 'dst create' makes an array \
                     of other nodes"
                );
                Err(Refusal::new(Errno::EINVAL, text))
            }
        }
    }

    /// The node that a target becomes at the end; its volume is still to be assigned.
    pub(super) fn new_node(
        &self,
        target: Target,
        sectors: u64,
        found: Option<Result<Found, Refusal>>,
    ) -> Result<NodeSpec, Refusal> {
        let found = found.unwrap_or_else(|| Err(Refusal::new(Errno::EIO, "it was not asked")));
        let refuse = |errno, why: String| Err(Refusal::new(errno, format!("{target}: {why}; nothing was changed")));
        let found = match found {
            Ok(found) => found,
            Err(why) => return refuse(why.errno, why.text),
        };
        let same = |replica: &ReplicaSpec| !found.volume.is_nil() && replica.volume == found.volume;
        if let Some((node, same)) = self.spec.replicas().find(|(_, replica)| same(replica)) {
            return refuse(Errno::EINVAL, format!("it is the volume of node {} ({})", node.start, same.target));
        }
        if let Some(member) = &found.member {
            return refuse(Errno::EBUSY, plan::in_use(member, &target));
        }
        let sectors = match plan::usable(found.sectors, sectors) {
            Ok(sectors) => sectors,
            Err(why) => return refuse(Errno::EINVAL, why),
        };
        let mut spec = self.spec.clone();
        let replica = ReplicaSpec { target: target.clone(), volume: Id::NIL, state: ReplicaState::InSync };
        let generation = Generation::first(spec.id);
        let (start, replicas) = (NodeId(Lba(0)), vec![replica]);
        spec.nodes.push(NodeSpec { start, sectors, replicas, generation, suspend: None, transfer: None, scrub: None });
        match plan::geometry(&spec) {
            Ok(geometry) => {
                let start = NodeId(geometry.node_start(spec.nodes.len() - 1));
                spec.nodes.pop().map(|node| NodeSpec { start, ..node }).ok_or_else(|| self.busy())
            }
            Err(bad) => refuse(Errno::EINVAL, bad.to_string()),
        }
    }

    /// What was to be added is taken out of the record again.
    pub(super) fn take_back(&mut self, at: usize) {
        self.spec.nodes[at].replicas.pop();
        if self.spec.nodes[at].replicas.is_empty() {
            self.spec.nodes.remove(at);
        }
    }
}
