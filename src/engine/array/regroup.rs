//! The owner's part that makes changes of a started array's replicas durable: in the record first, then on the labels of those that
//! are in sync. A label that is newer than the record would say that the record is an old copy.

use super::{Array, Effect, Life, Owner, Work};
use crate::control::command::Refusal;
use crate::control::replica::ReplicaState;
use crate::engine::replicas::Standing;
use crate::engine::steer::News;
use crate::units::{Epoch, Id};

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

    /// A data path tells how something ended.
    pub(super) fn news(&mut self, name: &str, epoch: Epoch, news: &News, _effects: &mut Vec<Effect>) {
        let array = self.arrays.get(name).filter(|array| array.spec.epoch == epoch);
        debug_assert!(array.is_none(), "nothing is asked yet, and {news:?} told");
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
fn apply(array: &mut Array, standings: &[(Id, Standing)], fresh: Id) {
    let standing = |volume: Id| standings.iter().find(|(of, _)| *of == volume).map(|(_, standing)| *standing);
    for node in &mut array.spec.nodes {
        let before: Vec<bool> = node.replicas.iter().map(|replica| replica.state.is_in_sync()).collect();
        for replica in &mut node.replicas {
            match standing(replica.volume) {
                Some(Standing::InSync) => replica.state = ReplicaState::InSync,
                Some(Standing::Stale) if replica.state.is_in_sync() => replica.state = ReplicaState::Stale,
                _ => {}
            }
        }
        let after: Vec<bool> = node.replicas.iter().map(|replica| replica.state.is_in_sync()).collect();
        if before != after {
            node.generation = node.generation.next(fresh);
        }
    }
}
