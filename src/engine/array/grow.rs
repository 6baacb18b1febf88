//! The owner's part that lets an array take up what its volumes have come to have.
//!
//! *At a start* (the rule): a wish to grow is in the record ([`ArraySpec::grow`]). The next start by hand that finds all replicas takes up
//! what they have, after it has judged which of them are in sync. Behind the former end nothing is known of what they hold: the first one that
//! is in sync has it, the others are to be filled from there on. Never with the device of a dead daemon: that one is as large as it was.
//!
//! *At once*, where the device can become larger under those who use it and each node that grows has one replica, so that there is nothing to
//! differ: record and labels are written, every shard works with the new layout, then the device is told ([`Step`]). Whoever dies
//! in between, the record is never behind the device, and nothing is beyond the former end yet.

use super::live::After;
use super::{Array, Effect, Found, JobId, Life, Outcome, Owner, Ticket, Work, plan};
use crate::control::command::Refusal;
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::spec::{Alg, ArraySpec, Frontend, NodeSpec, Phase};
use crate::engine::replicas::Saved;
use crate::engine::steer::Steer;
use crate::errno::Errno;
use crate::units::{Id, Lba, SECTOR_BYTES, Time, format_size};

/// How far the growing of an array in use is.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Its replicas are asked what they have.
    Measuring,
    /// Its device is asked whether it could become larger.
    Asking,
    /// The record and the labels are written; what the nodes had.
    Recording(Vec<u64>),
    /// The shards adopt it.
    Adopting(Vec<u64>),
    /// The device is told.
    Resizing,
}

/// The growing of an array in use.
#[derive(Debug)]
pub(super) struct Growing {
    step: Step,
    pub(super) ticket: Ticket,
    /// The work under way.
    pub(super) job: Option<JobId>,
    /// What the nodes are to have.
    sectors: Vec<u64>,
}

impl Owner {
    /// The volumes of an array have become larger, or some of them.
    pub(super) fn grow(&mut self, ticket: Ticket, array: &mut Array, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        let survey = Work::Survey(array.targets());
        match &array.life {
            Life::Stopped => {
                self.work(array, Life::Measuring(ticket), survey, effects);
                Ok(())
            }
            Life::Started(_) | Life::Regrouping(_) if array.live.growing.is_none() => {
                let job = Some(self.side_work(array, survey, effects));
                array.live.growing = Some(Growing { step: Step::Measuring, ticket, job, sectors: Vec::new() });
                Ok(())
            }
            Life::Started(_) | Life::Regrouping(_) => {
                let text = format!("array '{}' is growing already: try again when that is done", array.spec.name);
                Err(Refusal::new(Errno::EBUSY, text))
            }
            _ => Err(array.busy()),
        }
    }

    /// The part of [`Owner::advance`] for one that is stopped.
    pub(super) fn measured(
        &mut self,
        array: &mut Array,
        ticket: Ticket,
        found: &[Result<Found, Refusal>],
        effects: &mut Vec<Effect>,
    ) {
        match room(&array.spec, found) {
            Ok(_) => {
                array.spec.grow = true;
                self.save(array, Phase::Stopped, Life::Promising(ticket), effects);
            }
            Err(why) => {
                array.life = Life::Stopped;
                effects.push(Effect::Reply(ticket, Err(why)));
            }
        }
    }

    /// The wish is in the record of one that is stopped, or could not be written.
    pub(super) fn promised(array: &mut Array, ticket: Ticket, saved: Result<(), Refusal>, effects: &mut Vec<Effect>) {
        array.life = Life::Stopped;
        array.spec.grow = saved.is_ok();
        let answer = saved.map(|()| array.answer_with(vec![array.grows_later("it is stopped now")]));
        effects.push(Effect::Reply(ticket, answer));
    }

    /// Work for the growing of an array in use has ended.
    pub(super) fn grow_step(&mut self, array: &mut Array, outcome: Outcome, now: Time, effects: &mut Vec<Effect>) {
        let Some(mut growing) = array.live.growing.take() else { return };
        growing.job = None;
        match (growing.step.clone(), outcome) {
            (Step::Measuring, Outcome::Surveyed(found)) => match room(&array.spec, &found) {
                Err(why) => effects.push(Effect::Reply(growing.ticket, Err(why))),
                Ok(sectors) => match array.hinders_growth(&sectors) {
                    Some(why) => array.grow_later(growing.ticket, why),
                    None => {
                        let ask = Work::Resize(array.spec.name.clone(), None);
                        let job = Some(self.side_work(array, ask, effects));
                        array.live.growing = Some(Growing { step: Step::Asking, job, sectors, ..growing });
                    }
                },
            },
            (Step::Asking, Outcome::Each(results)) => {
                let refused = results.into_iter().find_map(Result::err).map(|why| why.text);
                match refused.or_else(|| array.hinders_growth(&growing.sectors)) {
                    Some(why) => array.grow_later(growing.ticket, why),
                    None => {
                        let former = array.resize(&growing.sectors);
                        array.spec.grow = false;
                        array.live.growing = Some(Growing { step: Step::Recording(former), ..growing });
                        array.live.wanted.push(After::Grown);
                    }
                }
            }
            (Step::Resizing, Outcome::Each(results)) => {
                let name = &array.spec.name;
                let answer = match results.into_iter().find_map(Result::err) {
                    None => Ok(array.answer()),
                    Some(why) => {
                        let text = format!(
                            "array '{name}' has grown, but its device has not: {}. It is larger after 'dst stop {name}' and 'dst start {name}'",
                            why.text
                        );
                        Err(Refusal::new(why.errno, text))
                    }
                };
                effects.push(Effect::Reply(growing.ticket, answer));
            }
            (step, outcome) => debug_assert!(false, "{step:?} does not expect {outcome:?}"),
        }
        self.pump(array, now, effects);
    }

    /// The record and the labels of an array in use that grows are written, or could not be.
    pub(super) fn grow_recorded(
        array: &mut Array,
        record: &Result<(), Refusal>,
        saved: &Saved,
        trouble: Option<&Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(growing) = array.live.growing.take() else { return };
        let Step::Recording(former) = growing.step else { return };
        let step = match (record, saved) {
            (Ok(()), Saved::All) => Step::Adopting(former),
            // A label that says less would, at an import, take what is written beyond.
            _ => {
                array.resize(&former);
                array.live.wanted.push(After::Quiet);
                let name = &array.spec.name;
                let why = trouble.map_or_else(|| "a label could not be written".to_owned(), |why| why.text.clone());
                let errno = trouble.map_or(Errno::EIO, |why| why.errno);
                let text = format!("array '{name}' has not grown: {why}. Try again when that is mended");
                return effects.push(Effect::Reply(growing.ticket, Err(Refusal::new(errno, text))));
            }
        };
        match plan::geometry(&array.spec) {
            Ok(geometry) => effects.push(Effect::Steer(array.spec.name.clone(), Steer::Grow(geometry))),
            Err(bad) => debug_assert!(false, "{bad} was looked at before"),
        }
        array.live.growing = Some(Growing { step, ..growing });
    }

    /// Every shard works with the new layout, or the data path could not take it.
    pub(super) fn grown(&mut self, array: &mut Array, done: bool, effects: &mut Vec<Effect>) {
        let Some(mut growing) = array.live.growing.take() else { return };
        let Step::Adopting(former) = &growing.step else { return };
        if !done {
            array.resize(former);
            let why = "a node has changed meanwhile".to_owned();
            return array.grow_later(growing.ticket, why);
        }
        let sectors = plan::geometry(&array.spec).map_or(0, |geometry| geometry.sectors());
        let resize = Work::Resize(array.spec.name.clone(), Some(sectors));
        (growing.step, growing.job) = (Step::Resizing, Some(self.side_work(array, resize, effects)));
        array.live.growing = Some(growing);
    }
}

impl Array {
    /// At a start by hand: what the nodes can take up, if that is wished for and nothing is in the way. Else the wish stays.
    pub(super) fn room_at_start(&self, found: &[Result<Found, Refusal>]) -> Option<Vec<u64>> {
        let wished = self.spec.grow && self.spec.phase == Phase::Stopped;
        wished.then(|| room(&self.spec, found).ok()).flatten()
    }

    /// It is known which replicas are in sync: the nodes take up what there is.
    pub(super) fn take_up(&mut self, sectors: &[u64], fresh: Id) {
        self.spec.grow = false;
        let memory = &self.spec.memory;
        for (node, sectors) in self.spec.nodes.iter_mut().zip(sectors) {
            let former = std::mem::replace(&mut node.sectors, *sectors);
            if former == *sectors || node.replicas.len() == 1 {
                continue;
            }
            let sound = |replica: &ReplicaSpec| replica.state.is_in_sync() && !memory.has_lost(replica.volume);
            let keeper = node.replicas.iter().position(sound);
            let keeper = keeper.or_else(|| node.replicas.iter().position(|replica| replica.state.is_in_sync()));
            let before = node.replicas.iter().filter(|replica| replica.state.is_in_sync()).count();
            for (at, replica) in node.replicas.iter_mut().enumerate() {
                let from = match replica.state {
                    ReplicaState::Syncing { from } => Lba(from.0.min(former)),
                    ReplicaState::InSync | ReplicaState::Stale => Lba(former),
                };
                if Some(at) != keeper {
                    replica.state = ReplicaState::Syncing { from };
                }
            }
            if before > 1 {
                node.generation = node.generation.next(fresh);
            }
        }
    }

    /// What keeps an array in use from growing at once.
    fn hinders_growth(&self, sectors: &[u64]) -> Option<String> {
        if self.spec.run.frontend != Frontend::Ublk {
            return Some("a client of NBD learns the size when it connects".to_owned());
        }
        let grows =
            self.spec.nodes.iter().zip(sectors).enumerate().filter(|(_, (node, sectors))| node.sectors < **sectors);
        for (at, (node, _)) in grows {
            if node.replicas.len() > 1 {
                return Some(format!(
                    "node {} has {} replicas, and what they hold behind their former end has to be made the same first",
                    node.start,
                    node.replicas.len()
                ));
            }
            if node.transfer.is_some() || self.live.errands.contains_key(&at) || self.live.late.why(at).is_some() {
                return Some(format!("node {} is being moved or changed, or is late", node.start));
            }
        }
        None
    }

    /// Gives the nodes these sizes; what they had. Their labels are to be written before anything else.
    fn resize(&mut self, sectors: &[u64]) -> Vec<u64> {
        let former: Vec<u64> = self.spec.nodes.iter().map(|node| node.sectors).collect();
        for (at, (node, sectors)) in self.spec.nodes.iter_mut().zip(sectors).enumerate() {
            if node.sectors != *sectors {
                node.sectors = *sectors;
                self.live.owed.insert(at);
            }
        }
        former
    }

    /// It is in use, and grows when it is started the next time.
    fn grow_later(&mut self, ticket: Ticket, why: String) {
        self.spec.grow = true;
        self.live.wanted.push(After::Promised(ticket, why));
    }

    /// The wish of one in use is in the record, or could not be written.
    pub(super) fn promised_live(&mut self, ticket: Ticket, why: &str, record: &Result<(), Refusal>) -> Effect {
        self.spec.grow = record.is_ok();
        Effect::Reply(ticket, record.clone().map(|()| self.answer_with(vec![self.grows_later(why)])))
    }

    fn grows_later(&self, why: &str) -> String {
        let name = &self.spec.name;
        let how = match self.life {
            Life::Stopped => format!("'dst start {name}'"),
            _ => format!("'dst stop {name}' and 'dst start {name}'"),
        };
        format!("array '{name}' grows with {how}: {why}")
    }
}

/// Sizes that its nodes could have, sectors, out of what all of its replicas have; or why it cannot become larger.
fn room(spec: &ArraySpec, found: &[Result<Found, Refusal>]) -> Result<Vec<u64>, Refusal> {
    let refuse = |errno, why: String| {
        let name = &spec.name;
        Err(Refusal::new(errno, format!("array '{name}' cannot grow: {why}")))
    };
    let mut most: Vec<u64> = Vec::with_capacity(spec.nodes.len());
    let mut rest = found.iter();
    for node in &spec.nodes {
        let mut sectors = u64::MAX;
        for replica in &node.replicas {
            let here = match rest.next() {
                Some(Ok(here)) => here,
                Some(Err(why)) => {
                    return refuse(why.errno, format!("node {} ({}): {}", node.start, replica.target, why.text));
                }
                None => return refuse(Errno::EIO, "not all of its replicas were asked".to_owned()),
            };
            if here.volume != replica.volume || here.member.as_ref().is_none_or(|member| member.id != spec.id) {
                let text =
                    format!("node {} ({}): the volume is not that of this array any more", node.start, replica.target);
                return refuse(Errno::EBUSY, text);
            }
            sectors = sectors.min(plan::usable(here.sectors, 0).unwrap_or(0));
        }
        most.push(sectors);
    }
    let larger = match spec.alg {
        Alg::Linear => linear(spec, &most),
        Alg::Striped => striped(spec, &most),
    };
    let sectors = match larger {
        Ok(sectors) => sectors,
        Err(why) => return refuse(Errno::EINVAL, why),
    };
    let nodes = spec.nodes.iter().zip(&sectors).map(|(node, sectors)| NodeSpec { sectors: *sectors, ..node.clone() });
    let larger = ArraySpec { nodes: nodes.collect(), ..spec.clone() };
    match plan::geometry(&larger) {
        Ok(_) => Ok(sectors),
        Err(bad) => refuse(Errno::EINVAL, bad.to_string()),
    }
}

/// A linear array grows at its end: what lies behind a node would move with it.
fn linear(spec: &ArraySpec, most: &[u64]) -> Result<Vec<u64>, String> {
    let mut sectors: Vec<u64> = spec.nodes.iter().map(|node| node.sectors).collect();
    let (Some(last), Some(room), Some(node)) = (sectors.last_mut(), most.last(), spec.nodes.last()) else {
        return Err("it has no nodes".to_owned());
    };
    if *room > *last {
        *last = *room;
        return Ok(sectors);
    }
    let elsewhere = spec.nodes.iter().zip(most).find(|(node, most)| node.sectors < **most);
    Err(match elsewhere {
        Some((larger, _)) => format!(
            "of a linear array only the last node can become larger, which is {}: what lies behind {} would move",
            node.start, larger.start
        ),
        None => format!(
            "its last node {} uses all that its volumes have ({}): make them larger first, as with 'dst volume resize', or give it a \
             further node with 'dst grow {} TARGET'",
            node.start,
            format_size(node.sectors * SECTOR_BYTES),
            spec.name
        ),
    })
}

/// A striped array grows as far as all of its nodes can.
fn striped(spec: &ArraySpec, most: &[u64]) -> Result<Vec<u64>, String> {
    let (now, chunk) = (spec.nodes.first().map_or(0, |node| node.sectors), spec.chunk / SECTOR_BYTES);
    let room = most.iter().copied().min().unwrap_or(0);
    let room = room - room % chunk.max(1);
    if room > now {
        return Ok(vec![room; spec.nodes.len()]);
    }
    let short =
        spec.nodes.iter().zip(most).filter(|(_, most)| **most < now + chunk).map(|(node, _)| node.start.to_string());
    let short: Vec<String> = short.collect();
    Err(format!(
        "it is striped, and becomes larger when the volumes of all of its nodes have: those of {} have no room for a further chunk; \
         make them larger, as with 'dst volume resize'",
        short.join(", ")
    ))
}
