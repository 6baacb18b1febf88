//! The owner's part for nodes that a start went on without (the contract, "Late nodes"): looks whether they have come, and has the data
//! path serve them.
//!
//! ```text
//! Away --looked at: it may be served--> Asking (whom a label names) --> Recording --> Claiming --> Labelling --> Opening --> no more late
//! ```
//!
//! From everywhere back to `Away` with what has refused. Each step is a start's, for one node; its claim is that of the start.

use std::collections::BTreeMap;

use super::live::After;
use super::muster::{self, Intent, Muster};
use super::trace::{self, Trace};
use super::{Array, Effect, Found, JobId, Outcome, Owner, Ticket, Work};
use crate::control::command::{Refusal, Terms};
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::spec::ArraySpec;
use crate::control::target::Target;
use crate::engine::replicas::Standing;
use crate::engine::steer::{Arrival, Steer};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Time};
use crate::wire::session::features;
use crate::wire::volume::Claim;

/// How far a late node is.
#[derive(Debug)]
enum Stage {
    /// It is looked at with the others.
    Away,
    /// The targets that its labels name are asked whether they have taken its place.
    Asking(JobId, Vec<Trace>, Muster),
    /// The record is written.
    Recording,
    /// The replicas that are there are claimed.
    Claiming(JobId),
    /// Their labels are written.
    Labelling(JobId),
    /// The data path has it.
    Opening,
}

/// A node that is late.
#[derive(Debug)]
struct LateNode {
    stage: Stage,
    why: String,
    /// How often it could have been served without the replicas that were still away.
    heard: u32,
    /// Which of its replicas were there when it was looked at.
    present: Vec<bool>,
}

/// All late nodes of an array in use.
#[derive(Debug, Default)]
pub(super) struct Latecomers {
    nodes: BTreeMap<usize, LateNode>,
    /// These are being looked at.
    look: Option<(JobId, Vec<usize>)>,
    /// When that is done next, and how often it was.
    at: Time,
    tries: u32,
}

impl Latecomers {
    /// Those that a start went on without.
    pub(super) fn new(late: BTreeMap<usize, String>, now: Time) -> Latecomers {
        let away = |why| LateNode { stage: Stage::Away, why, heard: 0, present: Vec::new() };
        let nodes = late.into_iter().map(|(node, why)| (node, away(why))).collect();
        Latecomers { nodes, look: None, at: now.after(limits::RECONNECT_MIN), tries: 1 }
    }

    /// Why a node is late, if it is.
    pub(super) fn why(&self, node: usize) -> Option<&str> {
        self.nodes.get(&node).map(|late| late.why.as_str())
    }

    pub(super) fn next_wake(&self) -> Time {
        let away = self.nodes.values().any(|late| matches!(late.stage, Stage::Away));
        if away && self.look.is_none() { self.at } else { Time::NEVER }
    }

    pub(super) fn is_job(&self, job: JobId) -> bool {
        self.look.as_ref().is_some_and(|(look, _)| *look == job) || self.node_of(job).is_some()
    }

    fn node_of(&self, job: JobId) -> Option<usize> {
        let works = |late: &LateNode| match late.stage {
            Stage::Asking(own, ..) | Stage::Claiming(own) | Stage::Labelling(own) => own == job,
            Stage::Away | Stage::Recording | Stage::Opening => false,
        };
        self.nodes.iter().find(|(_, late)| works(late)).map(|(node, _)| *node)
    }

    /// It is looked at again soon.
    pub(super) fn hurry(&mut self, now: Time) {
        (self.at, self.tries) = (now, 0);
    }

    /// Somebody who has everything has answered, or not. How often that was.
    fn heard(&mut self, node: usize, answered: bool, now: Time) -> u32 {
        let Some(late) = self.nodes.get_mut(&node) else { return 0 };
        late.heard += u32::from(answered);
        let heard = late.heard;
        if answered && heard == 1 {
            // The others of its node may be on their way back, too.
            self.hurry(now);
        }
        heard
    }

    fn again_later(&mut self, now: Time) {
        let wait = limits::RECONNECT_MIN * (1 << self.tries.min(10));
        self.tries += 1;
        self.at = now.after(wait.min(limits::RECONNECT_MAX));
    }

    /// Whatever it was, it is to be looked at anew.
    fn back(&mut self, node: usize, why: String, now: Time) {
        if let Some(late) = self.nodes.get_mut(&node) {
            (late.stage, late.why) = (Stage::Away, why);
            self.again_later(now);
        }
    }

    fn set(&mut self, node: usize, stage: Stage) {
        if let Some(late) = self.nodes.get_mut(&node) {
            late.stage = stage;
        }
    }
}

impl Owner {
    /// Looks whether those that are away have come.
    pub(super) fn look_for_late(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        if array.live.late.next_wake() > now {
            return;
        }
        let away = array.live.late.nodes.iter().filter(|(_, late)| matches!(late.stage, Stage::Away));
        let nodes: Vec<usize> = away.map(|(node, _)| *node).collect();
        let replicas = nodes.iter().flat_map(|node| &array.spec.nodes[*node].replicas);
        let targets = replicas.map(|replica| replica.target.clone()).collect();
        let job = self.side_work(array, Work::Survey(targets), effects);
        array.live.late.look = Some((job, nodes));
    }

    /// Work about late nodes has ended.
    pub(super) fn late_step(
        &mut self,
        array: &mut Array,
        job: JobId,
        outcome: Outcome,
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) {
        // While it is being stopped nothing more begins; that may be refused.
        let served = array.is_served();
        if let Some((_, nodes)) = array.live.late.look.take_if(|(look, _)| *look == job) {
            array.live.late.again_later(now);
            if let Outcome::Surveyed(found) = outcome
                && served
            {
                self.looked_for_late(array, &nodes, &found, (fresh, now), effects);
            }
            return;
        }
        let Some(node) = array.live.late.node_of(job) else { return };
        let Some(late) = array.live.late.nodes.get_mut(&node) else { return };
        if !served {
            let why = late.why.clone();
            return array.live.late.back(node, why, now);
        }
        let next = match (std::mem::replace(&mut late.stage, Stage::Away), outcome) {
            (Stage::Asking(_, mut traces, muster), Outcome::Surveyed(found)) => {
                let own = array.alone(node);
                let judged = trace::judge(&own, &mut traces, &found, Terms::default());
                judged.map(|()| array.count_in(node, own, &muster, fresh))
            }
            (Stage::Claiming(_), Outcome::Each(results)) => {
                array.all_of(node, &results).and_then(|()| self.label_late(array, node, effects))
            }
            (Stage::Labelling(_), Outcome::Each(results)) => array.all_of(node, &results).map(|()| {
                let replicas = array.arrivals(node);
                effects.push(Effect::Steer(array.spec.name.clone(), Steer::Arrive { node, replicas }));
                array.live.late.set(node, Stage::Opening);
            }),
            (stage, outcome) => {
                debug_assert!(false, "{stage:?} does not expect {outcome:?}");
                Err(Refusal::new(Errno::EIO, "an answer is not understood"))
            }
        };
        if let Err(why) = next {
            array.live.late.back(node, why.text, now);
        }
    }

    /// Judges what was found of each late node by itself.
    fn looked_for_late(
        &mut self,
        array: &mut Array,
        nodes: &[usize],
        found: &[Result<Found, Refusal>],
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) {
        let taken = |found: &&Found| {
            let ours = found.member.as_ref().is_some_and(|member| member.id == array.spec.id);
            let greater = |claim: Claim| claim.host != self.host && claim.epoch > array.spec.epoch;
            ours && array.place_of(found.volume).is_some() && found.claim.is_some_and(greater)
        };
        if let Some(volume) = found.iter().flatten().find(taken).map(|found| found.volume) {
            // It has every node by now, or is about to.
            return self.fenced(array, volume, effects);
        }
        let mut found = found;
        for node in nodes.iter().copied() {
            let (own, others) = found.split_at(array.spec.nodes[node].replicas.len().min(found.len()));
            found = others;
            if let Err(why) = self.judge_late(array, (node, own), (fresh, now), effects)
                && let Some(late) = array.live.late.nodes.get_mut(&node)
            {
                late.why = why.text;
            }
        }
    }

    /// Whether a node may be served with what was found of it; then that begins.
    fn judge_late(
        &mut self,
        array: &mut Array,
        (node, found): (usize, &[Result<Found, Refusal>]),
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let own = array.alone(node);
        let heard = array.live.late.heard(node, muster::is_served((&own.nodes[0], found)), now);
        let patient = heard <= limits::PATIENT_TRIES;
        let (host, boot, terms, name) = (self.host, self.boot, Terms::default(), own.name.as_str());
        let muster = muster::muster(&own, found, Intent { host, terms, patient, late: false, name, boot })?;
        if muster.epoch.0 > own.epoch.0.saturating_add(1) {
            let (start, seen, epoch) = (own.nodes[0].start, muster.epoch.0 - 1, own.epoch.0);
            let text = format!(
                "node {start}: epoch {seen} has been used there, and this machine's record of the array has got to {epoch} only: it is an older copy. \
                 'dst stop {name}' and 'dst start {name}' go on with a greater one"
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        if let Some(late) = array.live.late.nodes.get_mut(&node) {
            late.present.clone_from(&muster.present);
        }
        let traces = trace::traces(&own, found);
        if traces.is_empty() {
            array.count_in(node, own, &muster, fresh);
            return Ok(());
        }
        let targets: Vec<Target> = traces.iter().map(|trace| trace.to.clone()).collect();
        let job = self.side_work(array, Work::Survey(targets), effects);
        array.live.late.set(node, Stage::Asking(job, traces, muster));
        Ok(())
    }

    /// The record of a late node is written, or could not be.
    pub(super) fn late_recorded(
        &mut self,
        array: &mut Array,
        node: usize,
        record: &Result<(), Refusal>,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let claim = match (record, array.claim) {
            (Ok(()), Some(claim)) => claim,
            (Err(why), _) => return array.live.late.back(node, why.text.clone(), now),
            (Ok(()), None) => return,
        };
        let features = features::of_node(array.spec.nodes[node].replicas.len());
        let there = array.present_of(node).map(|replica| (replica.target.clone(), features)).collect();
        let job = self.side_work(array, Work::Join(array.spec.id, claim, there), effects);
        array.live.late.set(node, Stage::Claiming(job));
    }

    fn label_late(&mut self, array: &mut Array, node: usize, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        let claim = array.claim.ok_or_else(|| Refusal::new(Errno::EIO, "the array has no claim"))?;
        let Some(late) = array.live.late.nodes.get(&node) else { return Ok(()) };
        let mut own = late.present.iter().copied();
        let replicas = array.spec.nodes.iter().enumerate().flat_map(|(at, of)| of.replicas.iter().map(move |_| at));
        let mask: Vec<bool> = replicas.map(|at| at == node && own.next().unwrap_or(false)).collect();
        let labels = array.labels(&mask, self.host)?;
        let job = self.side_work(array, Work::Label(array.spec.id, claim, labels), effects);
        array.live.late.set(node, Stage::Labelling(job));
        Ok(())
    }

    /// The data path serves a late node, or cannot yet.
    pub(super) fn arrived(&mut self, array: &mut Array, node: usize, result: Result<(), String>, now: Time) {
        match result {
            Ok(()) => drop(array.live.late.nodes.remove(&node)),
            Err(why) => array.live.late.back(node, why, now),
        }
    }

    /// The operator's word that what is there of a late node is good enough. Whether it is late.
    pub(super) fn accept_late(&mut self, array: &mut Array, node: usize, ticket: Ticket, now: Time) -> bool {
        let late = array.live.late.nodes.get(&node);
        if !late.is_some_and(|late| matches!(late.stage, Stage::Away)) {
            return false;
        }
        let former = array.spec.memory.clone();
        for replica in &array.spec.nodes[node].replicas {
            array.spec.memory.volumes.remove(&replica.volume);
        }
        array.live.late.hurry(now);
        array.live.wanted.push(After::Accepted(node, ticket, former));
        true
    }
}

impl Array {
    /// Refuses what cannot be asked about a node that is late.
    pub(super) fn in_time(&self, node: usize) -> Result<(), Refusal> {
        let Some(why) = self.live.late.why(node) else { return Ok(()) };
        let start = self.spec.nodes[node].start;
        let text = format!("node {start} is late, and nothing can be done with it before it is served: {why}");
        Err(Refusal::new(Errno::EBUSY, text))
    }

    /// What is said of an array with late nodes.
    pub(super) fn missing(&self) -> Option<String> {
        let (_, first) = self.live.late.nodes.first_key_value()?;
        let more = match self.live.late.nodes.len() - 1 {
            0 => String::new(),
            1 => " (and 1 more node)".to_owned(),
            count => format!(" (and {count} more nodes)"),
        };
        Some(format!("served without a node that is late: {}{more}", first.why))
    }

    /// The array as if it had one node.
    fn alone(&self, node: usize) -> ArraySpec {
        let spec = &self.spec;
        let memory = spec.memory.clone();
        let (name, run, nodes) = (spec.name.clone(), spec.run.clone(), vec![spec.nodes[node].clone()]);
        ArraySpec { name, run, nodes, memory, debts: Vec::new(), migrations: Vec::new(), ..*spec }
    }

    /// Puts into the record what follows from who has come.
    fn count_in(&mut self, node: usize, mut own: ArraySpec, muster: &Muster, fresh: Id) {
        muster::go_without(&mut own, muster, true, fresh);
        if let Some(of) = own.nodes.pop() {
            self.spec.nodes[node] = of;
        }
        for replica in &self.spec.nodes[node].replicas {
            if let Some(losses) = own.memory.volumes.get(&replica.volume) {
                self.spec.memory.volumes.insert(replica.volume, *losses);
            }
        }
        self.live.late.set(node, Stage::Recording);
        self.live.wanted.push(After::Late(node));
    }

    /// The replicas of a late node that were there when it was looked at.
    fn present_of(&self, node: usize) -> impl Iterator<Item = &ReplicaSpec> {
        let present = self.live.late.nodes.get(&node).map_or(&[][..], |late| late.present.as_slice());
        let replicas = self.spec.nodes[node].replicas.iter().zip(present);
        replicas.filter(|(_, present)| **present).map(|(replica, _)| replica)
    }

    /// Whether all of them have done what was asked.
    fn all_of(&self, node: usize, results: &[Result<(), Refusal>]) -> Result<(), Refusal> {
        let start = self.spec.nodes[node].start;
        for (replica, result) in self.present_of(node).zip(results) {
            if let Err(why) = result {
                return Err(Refusal::new(why.errno, format!("node {start} ({}): {}", replica.target, why.text)));
            }
        }
        Ok(())
    }

    /// The replicas of a node as its data path is to know them.
    fn arrivals(&self, node: usize) -> Vec<Arrival> {
        let arrival = |replica: &ReplicaSpec| Arrival {
            target: replica.target.clone(),
            volume: replica.volume,
            standing: match replica.state {
                ReplicaState::InSync => Standing::InSync,
                ReplicaState::Stale => Standing::Stale,
                ReplicaState::Syncing { from } => Standing::Filling { from },
            },
            losses: self.spec.memory.volumes.get(&replica.volume).copied(),
        };
        self.spec.nodes[node].replicas.iter().map(arrival).collect()
    }
}
