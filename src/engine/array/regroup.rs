//! The owner's part that makes changes of a started array's replicas durable: in the record first, then on the labels of those that
//! are in sync. A label that is newer than the record would say that the record is an old copy.

use super::{Array, Effect, Life, Owner, Work};
use crate::control::command::Refusal;
use crate::control::replica::ReplicaState;
use crate::engine::replicas::Standing;
use crate::units::Id;

impl Owner {
    /// Begins with what the array's data path has asked for, as soon as nothing else is under way.
    pub(super) fn regroup(&mut self, array: &mut Array, effects: &mut Vec<Effect>) {
        let Life::Started(device) = array.life.clone() else { return };
        let Some((standings, fresh)) = array.regroup.take() else { return };
        apply(array, &standings, fresh);
        let in_sync: Vec<bool> = array.spec.replicas().map(|(_, replica)| replica.state.is_in_sync()).collect();
        match (array.claim, array.labels(&in_sync, self.host)) {
            (Some(claim), Ok(labels)) => {
                let work = Work::Regroup(Box::new(array.spec.clone()), claim, labels);
                self.work(array, Life::Regrouping(device), work, effects);
            }
            _ => effects.push(Effect::Regrouped(array.spec.name.clone(), false)),
        }
    }

    /// It is durable, or could not be made so; then the data path asks again.
    pub(super) fn regrouped(
        &mut self,
        array: &mut Array,
        device: String,
        result: Result<(), Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        array.trouble = result.as_ref().err().map(|why| format!("a change of its replicas is not durable yet: {why}"));
        array.life = Life::Started(device.clone());
        effects.push(Effect::Regrouped(array.spec.name.clone(), result.is_ok()));
        let stop = array.stop.take();
        if stop.is_some() || self.closing {
            let halt = Work::Halt { name: array.spec.name.clone(), force: self.closing };
            return self.work(array, Life::Halting(stop, device), halt, effects);
        }
        self.regroup(array, effects);
    }
}

/// Puts the standings into the record; a node whose in-sync set has changed has a new generation.
fn apply(array: &mut Array, standings: &[Standing], fresh: Id) {
    let mut standings = standings.iter();
    for node in &mut array.spec.nodes {
        let before: Vec<bool> = node.replicas.iter().map(|replica| replica.state.is_in_sync()).collect();
        for (replica, standing) in node.replicas.iter_mut().zip(standings.by_ref()) {
            match standing {
                Standing::InSync => replica.state = ReplicaState::InSync,
                Standing::Stale if replica.state.is_in_sync() => replica.state = ReplicaState::Stale,
                Standing::Stale | Standing::Absent => {}
            }
        }
        let after: Vec<bool> = node.replicas.iter().map(|replica| replica.state.is_in_sync()).collect();
        if before != after {
            node.generation = node.generation.next(fresh);
        }
    }
}
