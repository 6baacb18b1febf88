//! The owner's part that has the replicas of a node compared: what is asked, and what is kept of it.
//!
//! The order: the record says that it is under way, then the data path has it. Its result is in the record until the next one. It does
//! not outlive the data path: what a daemon finds under way in the record was interrupted.

use super::live::After;
use super::{Array, Effect, Owner, Ticket};
use crate::control::command::Refusal;
use crate::control::scrub::{Scrub, ScrubState, ScrubStatus};
use crate::engine::scrub::Repair;
use crate::engine::steer::{ScrubError, ScrubOrder, Scrubbed, Steer};
use crate::errno::Errno;
use crate::limits;
use crate::units::{SECTOR_BYTES, Time};

impl Owner {
    /// The replicas of a node are to be compared.
    pub(super) fn scrub(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        at: usize,
        scrub: &Scrub,
        now: Time,
    ) -> Result<(), Refusal> {
        scrub.check().map_err(|why| Refusal::new(Errno::EINVAL, why))?;
        let (name, spec) = (&array.spec.name, &array.spec.nodes[at]);
        let (start, count) = (spec.start, spec.replicas.len());
        let refuse = |errno, text: String| Err(Refusal::new(errno, text));
        if count < 2 {
            return refuse(
                Errno::EINVAL,
                format!(
                    "node {start} has one replica: there is nothing to compare it with. 'dst replica add {name} {start} TARGET' gives it another"
                ),
            );
        }
        if spec.scrub.as_ref().is_some_and(|scrub| scrub.state == ScrubState::Running) {
            return refuse(
                Errno::EBUSY,
                format!("node {start} is being scrubbed already: wait, or 'dst scrub {name} {start} --abort'"),
            );
        }
        if scrub.repair && scrub.from.is_none() && count < limits::REPLICAS_MAX {
            return refuse(
                Errno::EINVAL,
                format!(
                    "node {start} has two replicas: where they differ nobody can say which of them is right. Say whom to go by with --from K \
                     ('dst replica list {name}' shows them), or scrub without --repair first"
                ),
            );
        }
        let from = match scrub.from {
            None => None,
            Some(number) => {
                let Some(replica) = spec.replicas.get(number) else {
                    let text = format!(
                        "node {start} has no replica {number}: 'dst replica list {name}' shows those there are"
                    );
                    return refuse(Errno::ENOENT, text);
                };
                if !replica.state.is_in_sync() {
                    let (target, word) = (&replica.target, replica.state.word());
                    let text =
                        format!("replica {number} of node {start} ({target}) is {word}: nothing is put right by it");
                    return refuse(Errno::EBUSY, text);
                }
                Some(replica.target.clone())
            }
        };
        let status = ScrubStatus {
            state: ScrubState::Running,
            repair: scrub.repair,
            from,
            rate: scrub.rate,
            begun: self.wall(now),
            ended: None,
            size: spec.sectors * SECTOR_BYTES,
            compared: 0,
            different: 0,
            unreadable: 0,
            repaired: 0,
            found: Vec::new(),
            more: false,
            why: None,
        };
        let former = array.spec.nodes[at].scrub.replace(status).map(Box::new);
        array.live.wanted.push(After::Scrub(at, ticket, former));
        Ok(())
    }

    /// That it is under way is in the record, or could not be written.
    pub(super) fn scrub_recorded(
        array: &mut Array,
        (node, ticket): (usize, Ticket),
        former: Option<Box<ScrubStatus>>,
        record: &Result<(), Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        if let Err(why) = record {
            array.spec.nodes[node].scrub = former.map(|former| *former);
            return effects.push(Effect::Reply(ticket, Err(why.clone())));
        }
        let spec = &array.spec.nodes[node];
        let Some(scrub) = &spec.scrub else { return };
        let named = scrub.from.as_ref().and_then(|from| spec.replicas.iter().find(|replica| replica.target == *from));
        let repair = match (scrub.repair, named) {
            (false, _) => Repair::No,
            (true, None) => Repair::Majority,
            (true, Some(replica)) => Repair::From(replica.volume),
        };
        let order = ScrubOrder { node, repair, rate: scrub.rate };
        array.live.scrubs.insert(node, Vec::new());
        effects.push(Effect::Steer(array.spec.name.clone(), Steer::Scrub(order)));
        effects.push(Effect::Reply(ticket, Ok(array.answer())));
    }

    /// A scrub is to end; answered when it has.
    pub(super) fn end_scrub(
        ticket: Ticket,
        array: &mut Array,
        node: usize,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Some(waiting) = array.live.scrubs.get_mut(&node) else {
            let (name, start) = (&array.spec.name, array.spec.nodes[node].start);
            let text =
                format!("node {start} is not being scrubbed: 'dst scrub {name} {start} --show' has the last one");
            return Err(Refusal::new(Errno::ENOENT, text));
        };
        waiting.push(ticket);
        effects.push(Effect::Steer(array.spec.name.clone(), Steer::EndScrub { node }));
        Ok(())
    }

    /// A scrub has ended.
    pub(super) fn scrubbed(&mut self, array: &mut Array, node: usize, scrubbed: &Scrubbed, now: Time) {
        let Some(waiting) = array.live.scrubs.remove(&node) else { return };
        let wall = self.wall(now);
        let replicas = array.spec.nodes[node].replicas.clone();
        if let Some(status) = &mut array.spec.nodes[node].scrub {
            status.count(scrubbed.compared, &scrubbed.findings);
            status.ended = Some(wall);
            (status.state, status.why) = match scrubbed.error {
                None => (ScrubState::Done, None),
                Some(ScrubError::Aborted) => (ScrubState::Aborted, None),
                Some(ScrubError::Alone) => {
                    (ScrubState::Failed, Some("the node has too few replicas for it by now".to_owned()))
                }
                Some(ScrubError::SourceGone) => {
                    (ScrubState::Failed, Some("the replica to go by is none any more".to_owned()))
                }
                Some(ScrubError::Repair(volume, errno)) => {
                    let found = replicas.iter().find(|replica| replica.volume == volume);
                    let target = found.map_or_else(|| volume.to_string(), |replica| replica.target.to_string());
                    let text = format!(
                        "{target} could not be put right: {}. It is left, and filled anew from the others",
                        errno.text()
                    );
                    (ScrubState::Failed, Some(text))
                }
            };
        }
        array.live.wanted.push(After::Quiet);
        array.live.wanted.extend(waiting.into_iter().map(After::Reply));
    }
}

impl Array {
    /// What was under way ended with the data path; when, if that is known.
    pub(super) fn interrupt_scrubs(&mut self, wall: Option<u64>) {
        for node in &mut self.spec.nodes {
            if let Some(scrub) = node.scrub.as_mut().filter(|scrub| scrub.state == ScrubState::Running) {
                (scrub.state, scrub.ended) = (ScrubState::Interrupted, wall);
                scrub.why = Some("the array was stopped, or dstd ended: begin it again".to_owned());
            }
        }
    }
}
