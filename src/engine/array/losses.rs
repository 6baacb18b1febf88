//! The owner's part of losses: what a node's machines have come back without is accepted by the operator's word.
//!
//! While the array is in use the record is written first, then the data path serves what is left. Else the record forgets what it knew
//! of the node's volumes, and the next start takes them as they are.

use super::live::After;
use super::{Array, Effect, Life, Owner, Ticket, plan};
use crate::control::command::Refusal;
use crate::engine::losses::Memory;
use crate::units::{Id, NodeId, Time};

impl Owner {
    /// What a node has lost is accepted.
    pub(super) fn accept_loss(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: NodeId,
        now: Time,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let at = match &array.life {
            Life::Corrupt(_) => return Err(array.busy()),
            _ => array.place(node)?,
        };
        let volumes = array.volumes(at);
        let former = array.spec.memory.clone();
        match array.life.clone() {
            Life::Started(_) | Life::Regrouping(_) if self.accept_late(array, at, ticket, now) => {
                self.pump(array, now, effects);
            }
            Life::Started(_) | Life::Regrouping(_) => {
                if !volumes.iter().any(|volume| former.has_lost(*volume)) {
                    return Err(plan::no_loss(&array.spec.name, node));
                }
                volumes.into_iter().for_each(|volume| array.spec.memory.accept(volume));
                array.live.wanted.push(After::Accepted(at, ticket, former));
                self.pump(array, now, effects);
            }
            life @ (Life::Stopped | Life::Failed(_) | Life::Waiting(..)) => {
                array.spec.memory.volumes.retain(|volume, _| !volumes.contains(volume));
                self.save(array, array.spec.phase, Life::Accepting(ticket, Box::new(life), former), effects);
            }
            _ => return Err(array.busy()),
        }
        Ok(())
    }
}

impl Array {
    fn volumes(&self, node: usize) -> Vec<Id> {
        self.spec.nodes[node].replicas.iter().map(|replica| replica.volume).collect()
    }

    /// What was accepted of an array that is not in use is durable, or could not be written.
    pub(super) fn accepted(
        &mut self,
        ticket: Ticket,
        life: Life,
        former: Memory,
        (saved, now): (Result<(), Refusal>, Time),
        effects: &mut Vec<Effect>,
    ) {
        self.life = match life {
            // What it waited for may have been this.
            Life::Waiting(_, why) if saved.is_ok() => Life::Waiting(now, why),
            life => life,
        };
        if saved.is_err() {
            self.spec.memory = former;
        }
        let answer = saved.map(|()| self.answer());
        effects.push(Effect::Reply(ticket, answer));
    }

    /// What is known of volumes that are the array's no more is forgotten.
    pub(super) fn forget_losses(&mut self) {
        let replicas = self.spec.replicas().map(|(_, replica)| replica.volume);
        let moving = self.spec.nodes.iter().filter_map(|node| node.transfer.as_ref());
        let ours: Vec<Id> = replicas.chain(moving.flat_map(|transfer| [transfer.from, transfer.to])).collect();
        self.spec.memory.retain(|volume| ours.contains(&volume));
    }
}
