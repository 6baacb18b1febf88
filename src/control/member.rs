//! What a volume knows of its array: enough to bring the array back on a machine that has no record of it.
//!
//! The text is stored with each volume at every start, and at every change of its node's in-sync set, by whoever holds the claim.
//! It has the volume's own node whole, and as many of the nodes after it as fit: with them all others can be found. Of another
//! node it knows where that one's volumes are; what is in sync there, their own labels say. Pure.

use serde::{Deserialize, Serialize};

use crate::control::record;
use crate::control::record::BadRecord;
use crate::control::replica;
use crate::control::replica::{Generation, ReplicaSpec};
use crate::control::spec::{Alg, ArraySpec};
use crate::control::target::Target;
use crate::control::transfer::{Moved, Stage, Transfer};
use crate::limits;
use crate::units::{Epoch, Id, NodeId, check_name};

/// The version of [`MemberLabel`] that is written. Version 1 knew no transfers; it is still read.
pub const VERSION: u32 = 2;
/// The kind of the record.
const KIND: &str = "member";

/// A node as a label describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeLabel {
    /// Its place in the array, from 0.
    pub at: usize,
    /// Its lowest array sector when it was added.
    pub start: NodeId,
    /// Sectors of each of its volumes that the array uses.
    pub sectors: u64,
    /// Its replicas.
    pub replicas: Vec<ReplicaSpec>,
}

/// What a volume is in a transfer of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferRole {
    /// A replica of a node that moves: what the target says is to be asked before this one is used.
    Open,
    /// The target. It is nothing yet.
    Candidate,
    /// The target, in its place.
    Committed,
    /// The source, which has been left: its data is at the target.
    Moved,
}

/// What a volume knows of a transfer of its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferLabel {
    /// The transfer.
    pub id: Id,
    /// What this volume is in it.
    pub role: TransferRole,
    /// The volume that is, or was, to be replaced; nil where that is not known any more.
    pub from: Id,
    /// Where the data goes.
    pub to: Target,
    /// The volume there.
    pub volume: Id,
}

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberLabel {
    /// The array.
    pub array: Id,
    /// Its name.
    pub name: String,
    /// How it is laid out.
    pub alg: Alg,
    /// Chunk of a striped array, bytes; 0 for linear.
    pub chunk: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// The epoch of the claim under which it was written.
    pub epoch: Epoch,
    /// The host that wrote it.
    pub host: Id,
    /// How many nodes the array has.
    pub count: usize,
    /// Which replica of its node the volume is.
    pub replica: usize,
    /// The node's generation.
    pub generation: Generation,
    /// The transfer of its node, or by which it was left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<TransferLabel>,
    /// The volume's own node, then those after it, the first after the last, as many as fit.
    pub nodes: Vec<NodeLabel>,
}

impl MemberLabel {
    /// What replica `replica` of node `node` is to know.
    pub fn of(spec: &ArraySpec, host: Id, node: usize, replica: usize) -> Result<String, BadRecord> {
        let transfer = spec.nodes.get(node).and_then(|node| node.transfer.as_ref());
        let role = |stage| match stage {
            Stage::Open => TransferRole::Open,
            Stage::Committed => TransferRole::Committed,
        };
        MemberLabel::with(spec, host, (node, replica), transfer.map(|transfer| told(transfer, role(transfer.stage))))
    }

    /// What the target of a node's transfer is to know before it is anything.
    pub fn candidate(spec: &ArraySpec, host: Id, node: usize) -> Result<String, BadRecord> {
        let transfer = spec.nodes.get(node).and_then(|node| node.transfer.as_ref());
        MemberLabel::with(spec, host, (node, 0), transfer.map(|transfer| told(transfer, TransferRole::Candidate)))
    }

    /// What a volume of node `node` is to know whose data has moved.
    pub fn moved(spec: &ArraySpec, host: Id, node: usize, moved: &Moved) -> Result<String, BadRecord> {
        let (to, volume) = (moved.to.clone(), moved.volume);
        let transfer = TransferLabel { id: moved.id, role: TransferRole::Moved, from: Id::NIL, to, volume };
        MemberLabel::with(spec, host, (node, 0), Some(transfer))
    }

    fn with(
        spec: &ArraySpec,
        host: Id,
        (node, replica): (usize, usize),
        transfer: Option<TransferLabel>,
    ) -> Result<String, BadRecord> {
        let own = spec.nodes.get(node).ok_or_else(|| BadRecord::Content("no such node".to_owned()))?;
        let mut label = MemberLabel {
            array: spec.id,
            name: spec.name.clone(),
            alg: spec.alg,
            chunk: spec.chunk,
            block: spec.block,
            epoch: spec.epoch,
            host,
            count: spec.nodes.len(),
            replica,
            generation: own.generation.clone(),
            transfer,
            nodes: Vec::new(),
        };
        let around = spec.nodes.iter().enumerate().cycle().skip(node).take(spec.nodes.len());
        let mut left = limits::LABEL_BYTES_MAX.saturating_sub(label.encode()?.len());
        for (at, other) in around {
            let (start, sectors, replicas) = (other.start, other.sectors, other.replicas.clone());
            let other = NodeLabel { at, start, sectors, replicas };
            let bytes = serde_json::to_vec(&other).map_err(|error| BadRecord::Content(error.to_string()))?.len() + 1;
            if bytes > left {
                break;
            }
            left -= bytes;
            label.nodes.push(other);
        }
        label.encode()
    }

    fn encode(&self) -> Result<String, BadRecord> {
        let bytes = record::encode_line(KIND, VERSION, self)?;
        String::from_utf8(bytes).map_err(|error| BadRecord::Content(error.to_string()))
    }

    /// Checks and decodes.
    pub fn decode(text: &str) -> Result<MemberLabel, BadRecord> {
        // What version 1 did not have is not there.
        let version = record::version(KIND, text.as_bytes()).filter(|found| *found == 1).unwrap_or(VERSION);
        let label: MemberLabel = record::decode(KIND, version, text.as_bytes())?;
        let wrong = |why: String| Err(BadRecord::Content(why));
        if label.count == 0 || label.count > limits::NODES_MAX {
            return wrong(format!("{} nodes", label.count));
        }
        if !matches!(label.block, 512 | 4096) {
            return wrong(format!("a logical block of {} bytes", label.block));
        }
        let Some(own) = label.nodes.first() else { return wrong("its own node is missing".to_owned()) };
        let checked = check_name(&label.name).and_then(|()| replica::check(&own.replicas, &label.generation));
        if let Err(why) = checked {
            return wrong(why);
        }
        let full = label.nodes.iter().all(|node| (1..=limits::REPLICAS_MAX).contains(&node.replicas.len()));
        if label.replica >= own.replicas.len() || !full || label.nodes.iter().any(|node| node.at >= label.count) {
            return wrong("a node or replica that cannot be".to_owned());
        }
        Ok(label)
    }

    /// Where the data of a volume that was left is now.
    pub fn forward(&self) -> Option<&TransferLabel> {
        self.transfer.as_ref().filter(|transfer| transfer.role == TransferRole::Moved)
    }

    /// The node that the volume stores. A label that decodes has it.
    pub fn node(&self) -> Option<&NodeLabel> {
        self.nodes.first()
    }
}

fn told(transfer: &Transfer, role: TransferRole) -> TransferLabel {
    let (from, to) = (transfer.from, transfer.status.to.clone());
    TransferLabel { id: transfer.status.id, role, from, to, volume: transfer.to }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::replica::ReplicaState;
    use crate::control::spec::{NodeSpec, Phase, RunOptions};
    use crate::engine::losses::Memory;
    use crate::units::Lba;
    use proptest::prelude::*;

    fn spec(nodes: u64) -> ArraySpec {
        let replica = |name: String| ReplicaSpec {
            target: name.parse().unwrap(),
            volume: Id([9; 16]),
            state: ReplicaState::InSync,
        };
        let node = |at: u64| NodeSpec {
            start: NodeId(Lba(at * 8)),
            sectors: 8,
            replicas: vec![replica(format!("store-{at}:1/v")), replica(format!("store-{at}:2/v"))],
            generation: Generation::first(Id([7; 16])),
            suspend: None,
            transfer: None,
            scrub: None,
        };
        ArraySpec {
            name: "a".to_owned(),
            id: Id([7; 16]),
            phase: Phase::Started,
            alg: Alg::Linear,
            chunk: 0,
            block: 512,
            epoch: Epoch(3),
            nodes: (0..nodes).map(node).collect(),
            clean: false,
            memory: Memory::default(),
            debts: Vec::new(),
            migrations: Vec::new(),
            migrated: 0,
            grow: false,
            run: RunOptions::default(),
        }
    }

    #[test]
    fn it_round_trips() {
        let text = MemberLabel::of(&spec(3), Id([5; 16]), 1, 1).unwrap();
        assert!(text.starts_with("dst member 2 ") && text.lines().count() == 2, "{text}");
        let label = MemberLabel::decode(&text).unwrap();
        assert_eq!(label.nodes.iter().map(|node| node.at).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!((label.count, label.replica, label.epoch, label.host), (3, 1, Epoch(3), Id([5; 16])));
        assert_eq!(label.node().unwrap().replicas, spec(3).nodes[1].replicas);
        assert_eq!((label.transfer.as_ref(), label.forward()), (None, None));
        let old = record::encode_line(KIND, 1, &label).unwrap();
        assert_eq!(MemberLabel::decode(std::str::from_utf8(&old).unwrap()), Ok(label), "version 1 knew no transfers");
        let moved = Moved { id: Id([1; 16]), volume: Id([2; 16]), to: "k:1/v".parse().unwrap() };
        let label = MemberLabel::decode(&MemberLabel::moved(&spec(3), Id([5; 16]), 1, &moved).unwrap()).unwrap();
        assert_eq!(label.forward().map(|forward| forward.to.to_string()).as_deref(), Some("k:1/v"));
    }

    #[test]
    fn what_does_not_fit_is_left_to_the_others() {
        let spec = spec(limits::NODES_MAX as u64);
        let mut seen = std::collections::BTreeSet::new();
        let mut next = 1000;
        for _ in 0..limits::NODES_MAX {
            let text = MemberLabel::of(&spec, Id([5; 16]), next, 0).unwrap();
            assert!(text.len() <= limits::LABEL_BYTES_MAX, "{}", text.len());
            let label = MemberLabel::decode(&text).unwrap();
            assert!(label.nodes.len() > 30 && label.nodes[0].at == next, "{}", label.nodes.len());
            seen.extend(label.nodes.iter().map(|node| node.at));
            next = label.nodes.last().unwrap().at;
            if seen.len() == limits::NODES_MAX {
                return;
            }
        }
        panic!("from one label to the next not all nodes are found");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = MemberLabel::decode(&MemberLabel::of(&spec(2), Id([5; 16]), 0, 0).unwrap()).unwrap();
        let refused = |change: &dyn Fn(&mut MemberLabel)| {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(MemberLabel::decode(&bad.encode().unwrap()).is_err(), "{bad:?}");
        };
        refused(&|label| label.count = 0);
        refused(&|label| label.count = limits::NODES_MAX + 1);
        refused(&|label| label.count = 1);
        refused(&|label| label.block = 1024);
        refused(&|label| label.nodes.clear());
        refused(&|label| label.name = "a/b".to_owned());
        refused(&|label| label.replica = 2);
        refused(&|label| label.nodes[1].replicas.clear());
        refused(&|label| label.nodes[0].replicas.iter_mut().for_each(|replica| replica.state = ReplicaState::Stale));
        assert!(MemberLabel::of(&spec(2), Id([5; 16]), 2, 0).is_err());
    }

    proptest! {
        #[test]
        fn any_text_decodes_without_panic(text in "\\PC{0,200}") {
            prop_assert!(MemberLabel::decode(&text).is_err());
        }
    }
}
