//! What a data path has asked to be made durable of its replicas, put into the record. A label that is newer than the record would
//! say that the record is an old copy, so the record is written first.

use super::errand::{Errand, Purpose, Step};
use super::{Array, Regroup};
use crate::control::migration::MigrationState;
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::spec::NodeSpec;
use crate::control::transfer::{Debt, Kept, Stage};
use crate::engine::replicas::Standing;
use crate::units::{Epoch, Id, Lba};

/// Puts the standings into the record; a node whose in-sync set has changed has a new generation, and its labels are to be written.
pub(super) fn apply(array: &mut Array, asked: &Regroup) {
    let standing = |volume: Id| asked.standings.iter().find(|(of, _)| *of == volume).map(|(_, standing)| *standing);
    let mut released = Vec::new();
    for (at, node) in array.spec.nodes.iter_mut().enumerate() {
        let before = in_sync(node);
        keep(node, array.spec.epoch, standing);
        commit(node, standing);
        if let Some(errand) = array.live.errands.get(&at) {
            swap(node, errand, &mut array.spec.debts, standing);
        }
        for replica in &mut node.replicas {
            match standing(replica.volume) {
                Some(Standing::InSync) => replica.state = ReplicaState::InSync,
                Some(Standing::Stale) if replica.state.is_in_sync() => replica.state = ReplicaState::Stale,
                Some(Standing::Filling { from }) => replica.state = ReplicaState::Syncing { from },
                _ => {}
            }
        }
        leave(node, &mut array.spec.debts, standing);
        let kept = node.transfer.as_ref().filter(|transfer| transfer.stage == Stage::Committed);
        if kept.is_some_and(|transfer| transfer.keep.is_some() && standing(transfer.from) == Some(Standing::Absent)) {
            released.push(at);
        }
        if in_sync(node) != before {
            node.generation = node.generation.next(asked.fresh);
            array.live.owed.insert(at);
        }
    }
    for (volume, losses) in &asked.losses {
        array.spec.memory.keep(*volume, *losses);
    }
    array.forget_losses();
    for node in released {
        // It ended when the node had moved.
        array.close_transfer(node, MigrationState::Done, None, 0);
    }
}

fn in_sync(node: &NodeSpec) -> Vec<Id> {
    let in_sync = node.replicas.iter().filter(|replica| replica.state.is_in_sync());
    in_sync.map(|replica| replica.volume).collect()
}

/// What the target of a transfer has. As soon as it is left, nothing: from then on the logs need not know what it lacks.
fn keep(node: &mut NodeSpec, epoch: Epoch, standing: impl Fn(Id) -> Option<Standing>) {
    let Some(transfer) = node.transfer.as_mut().filter(|transfer| transfer.stage == Stage::Open) else { return };
    match standing(transfer.to).filter(|_| !transfer.to.is_nil()) {
        Some(Standing::Candidate { from }) if from > Lba(0) => transfer.keep(Some(Kept { below: from, epoch })),
        Some(_) => transfer.keep(None),
        None => {}
    }
}

/// The target of a transfer takes the place of its source.
fn commit(node: &mut NodeSpec, standing: impl Fn(Id) -> Option<Standing>) {
    let Some(transfer) = node.transfer.as_mut().filter(|transfer| transfer.stage == Stage::Open) else { return };
    if transfer.to.is_nil() || standing(transfer.to) != Some(Standing::InSync) {
        return;
    }
    let (target, volume) = (transfer.status.to.clone(), transfer.to);
    let replica = ReplicaSpec { target, volume, state: ReplicaState::InSync };
    match node.replicas.iter_mut().find(|replica| replica.volume == transfer.from) {
        Some(place) => *place = replica,
        None => node.replicas.push(replica),
    }
    (transfer.stage, transfer.status.state) = (Stage::Committed, MigrationState::CutOver);
}

/// A volume that is said to have the data takes the place of a replica.
fn swap(node: &mut NodeSpec, errand: &Errand, debts: &mut Vec<Debt>, standing: impl Fn(Id) -> Option<Standing>) {
    let Purpose::Replace { old, same: true, .. } = errand.purpose else { return };
    if !matches!(errand.step, Step::Swapping) || standing(errand.volume) != Some(Standing::InSync) {
        return;
    }
    let Some(place) = node.replicas.iter_mut().find(|replica| replica.volume == old) else { return };
    let (target, volume, state) = (errand.target.clone(), errand.volume, ReplicaState::InSync);
    let former = std::mem::replace(place, ReplicaSpec { target, volume, state });
    debts.retain(|debt| debt.target != errand.target);
    debts.push(debt(node, former));
}

/// Replicas that are none any more are to be let go.
fn leave(node: &mut NodeSpec, debts: &mut Vec<Debt>, standing: impl Fn(Id) -> Option<Standing>) {
    let absent = |replica: &ReplicaSpec| standing(replica.volume) == Some(Standing::Absent);
    let (gone, stay): (Vec<ReplicaSpec>, Vec<ReplicaSpec>) = node.replicas.drain(..).partition(absent);
    node.replicas = stay;
    if !node.replicas.iter().any(|replica| replica.state.is_in_sync()) {
        // Never asked for: the record must have one that can be trusted.
        debug_assert!(gone.is_empty(), "the last one in sync is never left");
        return node.replicas.extend(gone);
    }
    for replica in gone {
        debts.push(debt(node, replica));
    }
}

fn debt(node: &NodeSpec, former: ReplicaSpec) -> Debt {
    Debt { node: node.start, target: former.target, volume: former.volume, remove: false, moved: None }
}
