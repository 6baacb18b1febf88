//! The owner's arrays as they are shown.

use super::{Array, Life};
use crate::control::replica::ReplicaSpec;
use crate::control::spec::NodeSpec;
use crate::control::status::{ArrayStatus, Counters, Gate, LinkState, NodeStatus, ReplicaStatus, SpecStatus, State};
use crate::engine::array::plan;
use crate::units::SECTOR_BYTES;

/// The word for what an array is doing.
pub(super) fn state(life: &Life) -> State {
    match life {
        Life::Surveying(_) | Life::Recording(_) | Life::Assigning(_) | Life::Settling(_) => State::Creating,
        Life::Checking(..) | Life::Minting(..) | Life::Claiming(..) | Life::Labelling(..) => State::Starting,
        Life::Launching(_) | Life::Waiting(..) | Life::Tracing(..) | Life::Fencing(..) => State::Starting,
        Life::Started(_) | Life::Regrouping(_) => State::Started,
        Life::Halting(..) | Life::Clearing(..) | Life::Parking(..) => State::Stopping,
        Life::Undoing(..) | Life::Forgetting(..) | Life::Stuck(..) => State::Removing,
        Life::Visiting(_) | Life::Dooming(..) | Life::Freeing(..) => State::Removing,
        Life::Failed(_) | Life::Reaping(..) | Life::Identifying(..) => State::Failed,
        Life::Accepting(_, life, _) => state(life),
        Life::Stopped | Life::Adopting(..) | Life::Changing(..) | Life::Mending | Life::Mended => State::Stopped,
        Life::Measuring(_) | Life::Promising(_) => State::Stopped,
        Life::Corrupt(_) => State::Corrupt,
    }
}

/// Whether requests of a node go through, as far as the owner knows.
fn gate(array: &Array, node: usize) -> Gate {
    match (&array.spec.nodes[node].suspend, array.live.holds.get(&node)) {
        (Some(suspend), Some(_)) if suspend.failing => Gate::Failing,
        (_, Some(hold)) if hold.frozen => Gate::Frozen,
        (_, Some(_)) => Gate::Draining,
        (_, None) => Gate::Open,
    }
}

/// An array as it is shown, without what only its data path knows.
pub(super) fn status(array: &Array) -> ArrayStatus {
    let spec = &array.spec;
    let why = match &array.life {
        Life::Waiting(_, why)
        | Life::Stuck(_, why)
        | Life::Failed(why)
        | Life::Reaping(why, _)
        | Life::Corrupt(why) => Some(why.clone()),
        Life::Identifying(why, _) => Some(why.clone()),
        // What is tried again in the background still has the trouble of the last time.
        Life::Checking(None, ..) | Life::Minting(None, _) | Life::Claiming(None, _) => array.trouble.clone(),
        Life::Labelling(None, ..) | Life::Launching(None) => array.trouble.clone(),
        Life::Tracing(None, ..) | Life::Fencing(None, ..) => array.trouble.clone(),
        Life::Started(_) | Life::Regrouping(_) => array.trouble.clone().or_else(|| array.missing()),
        Life::Undoing(None, _) | Life::Forgetting(None, _) | Life::Freeing(None, _) => array.trouble.clone(),
        _ => None,
    };
    let device = match &array.life {
        Life::Started(device) | Life::Regrouping(device) | Life::Halting(_, device) => Some(device.clone()),
        _ => None,
    };
    let replica = |replica: &ReplicaSpec| {
        let lost = replica.state.is_in_sync() && spec.memory.has_lost(replica.volume);
        ReplicaStatus { lost, ..ReplicaStatus::detached(replica) }
    };
    let node = |(at, node): (usize, &NodeSpec)| NodeStatus {
        name: node.start.to_string(),
        start: node.start,
        size: node.sectors * SECTOR_BYTES,
        state: LinkState::Detached,
        gate: gate(array, at),
        parked: 0,
        late: array.live.late.why(at).map(str::to_owned),
        suspend: node.suspend.clone(),
        migration: node.transfer.as_ref().map(|transfer| transfer.status.clone()),
        scrub: node.scrub.clone(),
        replicas: node.replicas.iter().map(replica).collect(),
        counters: Counters::default(),
    };
    let known = SpecStatus {
        id: spec.id,
        size: plan::geometry(spec).map_or(0, |geometry| geometry.sectors() * SECTOR_BYTES),
        alg: spec.alg,
        chunk: spec.chunk,
        block: spec.block,
        epoch: spec.epoch,
        run: spec.run.clone(),
        grow: spec.grow,
    };
    ArrayStatus {
        name: spec.name.clone(),
        state: state(&array.life),
        why,
        device,
        spec: (!matches!(array.life, Life::Corrupt(_))).then_some(known),
        counters: None,
        tags_free: None,
        nodes: spec.nodes.iter().enumerate().map(node).collect(),
        migrations: spec.migrations.clone(),
        kernel: std::collections::BTreeMap::new(),
        warnings: Vec::new(),
    }
}
