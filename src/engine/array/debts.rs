//! The owner's part that lets volumes go which an array in use needs no more.
//!
//! What is to be let go is in the record ([`Debt`]) until it has been, however often that is tried. One after the other: the volume
//! is looked at; where it is still the array's, and its data has moved, its label says where; then it is freed.

use std::collections::VecDeque;

use super::errand::{Errand, Step};
use super::live::After;
use super::{Array, Effect, Found, JobId, Life, Outcome, Owner, Ticket, Work, plan};
use crate::control::command::Refusal;
use crate::control::member::MemberLabel;
use crate::control::target::Target;
use crate::control::transfer::Debt;
use crate::errno::Errno;
use crate::limits;
use crate::units::Time;
use crate::wire::session::features;

/// What is done about a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pay {
    Looking,
    Claiming,
    Labelling,
    Freeing,
}

/// Lets volumes go, one after the other.
#[derive(Debug)]
pub(super) struct Payer {
    /// When the next round begins, where something is left.
    at: Time,
    tries: u32,
    queue: VecDeque<Debt>,
    current: Option<(Debt, Pay, JobId)>,
    /// Who waits for a volume to be free.
    waiters: Vec<(Target, Ticket)>,
}

impl Default for Payer {
    fn default() -> Payer {
        Payer { at: Time(0), tries: 0, queue: VecDeque::new(), current: None, waiters: Vec::new() }
    }
}

impl Payer {
    pub(super) fn next_wake(&self) -> Time {
        if self.current.is_none() && self.at != Time(0) { self.at } else { Time::NEVER }
    }

    pub(super) fn is_job(&self, job: JobId) -> bool {
        self.current.as_ref().is_some_and(|(_, _, current)| *current == job)
    }

    /// There is something new.
    pub(super) fn hurry(&mut self) {
        (self.at, self.tries) = (Time(0), 0);
    }

    /// Someone is answered when this has been tried.
    pub(super) fn wait(&mut self, target: Target, ticket: Ticket) {
        self.waiters.push((target, ticket));
        self.hurry();
    }

    pub(super) fn tickets(self) -> impl Iterator<Item = Ticket> {
        self.waiters.into_iter().map(|(_, ticket)| ticket)
    }
}

impl Owner {
    /// Begins with the next volume, if there is one and what the record says of it is durable.
    pub(super) fn pay(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        let quiet = matches!(array.life, Life::Started(_)) && array.live.wanted.is_empty() && !array.live.unsaved;
        if !quiet || array.live.payer.current.is_some() {
            return;
        }
        if array.live.payer.queue.is_empty() {
            if array.live.payer.at > now {
                return;
            }
            let busy = |debt: &&Debt| array.live.errands.values().any(|errand| errand.needs(&debt.target));
            let due: VecDeque<Debt> = array.spec.debts.iter().filter(|debt| !busy(debt)).cloned().collect();
            array.live.payer.at = Time::NEVER;
            array.live.payer.queue = due;
        }
        let Some(debt) = array.live.payer.queue.pop_front() else { return self.probe_waiting(array, effects) };
        let job = self.side_work(array, Work::Survey(vec![debt.target.clone()]), effects);
        array.live.payer.current = Some((debt, Pay::Looking, job));
    }

    /// Work about a volume has ended.
    pub(super) fn pay_step(&mut self, array: &mut Array, outcome: Outcome, now: Time, effects: &mut Vec<Effect>) {
        let Some((debt, step, _)) = array.live.payer.current.take() else { return };
        let next = match (step, outcome) {
            (Pay::Looking, Outcome::Surveyed(found)) => self.looked(array, &debt, found.into_iter().next()),
            (Pay::Claiming, Outcome::Each(results)) => match results.into_iter().next() {
                Some(Ok(())) => self.label_moved(array, &debt),
                // It is another's now.
                Some(Err(why)) if why.errno == Errno::EBADE => Ok(None),
                Some(Err(why)) => Err(why),
                None => Ok(None),
            },
            (Pay::Labelling, Outcome::Each(results)) => match results.into_iter().next() {
                Some(Err(why)) => Err(why),
                _ => Ok(Some((Pay::Freeing, discard(array, &debt)))),
            },
            (Pay::Freeing, Outcome::Each(results)) => results.into_iter().next().unwrap_or(Ok(())).map(|()| None),
            (step, outcome) => {
                debug_assert!(false, "{step:?} does not expect {outcome:?}");
                Err(Refusal::new(Errno::EIO, "its answer is not understood"))
            }
        };
        match next {
            Ok(Some((step, work))) => {
                let job = self.side_work(array, work, effects);
                array.live.payer.current = Some((debt, step, job));
            }
            Ok(None) => self.paid(array, &debt, Ok(()), now, effects),
            Err(why) => self.paid(array, &debt, Err(why), now, effects),
        }
    }

    /// What is to be done about a volume as it was found. `Ok(None)`: nothing any more.
    fn looked(
        &self,
        array: &Array,
        debt: &Debt,
        found: Option<Result<Found, Refusal>>,
    ) -> Result<Option<(Pay, Work)>, Refusal> {
        let found = match found {
            Some(Ok(found)) => found,
            Some(Err(why)) if why.errno != Errno::ENOENT => return Err(why),
            _ => return Ok(None),
        };
        let ours = found.member.as_ref().is_some_and(|member| member.id == array.spec.id);
        let known = !debt.volume.is_nil();
        let other = known && debt.volume != found.volume;
        let elsewhere = found.claim.is_some_and(|claim| ours && claim.host != self.host);
        // It was freed, and not removed yet.
        let orphan = debt.remove && known && found.member.is_none();
        if other || elsewhere || !(ours || orphan) {
            return Ok(None);
        }
        match (&debt.moved, array.claim) {
            (Some(_), Some(claim)) => {
                let join = Work::Join(array.spec.id, claim, vec![(debt.target.clone(), features::of_node(2))]);
                Ok(Some((Pay::Claiming, join)))
            }
            _ => Ok(Some((Pay::Freeing, discard(array, debt)))),
        }
    }

    fn label_moved(&self, array: &Array, debt: &Debt) -> Result<Option<(Pay, Work)>, Refusal> {
        let Some((moved, claim)) = debt.moved.as_ref().zip(array.claim) else { return Ok(None) };
        let node = array.spec.nodes.iter().position(|node| node.start == debt.node).unwrap_or(0);
        let label = MemberLabel::moved(&array.spec, self.host, node, moved);
        let label =
            label.map_err(|bad| Refusal::new(Errno::EINVAL, format!("its label cannot be made: it is {bad}")))?;
        Ok(Some((Pay::Labelling, Work::Label(array.spec.id, claim, vec![(debt.target.clone(), label)]))))
    }

    /// A volume is free, or could not be freed this time.
    fn paid(
        &mut self,
        array: &mut Array,
        debt: &Debt,
        result: Result<(), Refusal>,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let payer = &mut array.live.payer;
        let (waiting, rest) =
            std::mem::take(&mut payer.waiters).into_iter().partition(|(target, _)| *target == debt.target);
        payer.waiters = rest;
        let waiting: Vec<(Target, Ticket)> = waiting;
        match result {
            Ok(()) => {
                array.spec.debts.retain(|other| other != debt);
                array.live.wanted.push(After::Quiet);
                array.live.wanted.extend(waiting.into_iter().map(|(_, ticket)| After::Reply(ticket)));
            }
            Err(why) => {
                let wait = limits::RECONNECT_MIN * (1 << payer.tries.min(10));
                payer.tries += 1;
                payer.at = now.after(wait.min(limits::RECONNECT_MAX));
                let warning = plan::left(&debt.target, &array.spec.name, &why);
                let warning = format!("{warning}, or wait: it is tried again in the background");
                let reply = |(_, ticket)| Effect::Reply(ticket, Ok(array.answer_with(vec![warning.clone()])));
                effects.extend(waiting.into_iter().map(reply));
            }
        }
        self.probe_waiting(array, effects);
    }

    /// Errands that wait for a volume to be let go look at it now.
    fn probe_waiting(&mut self, array: &mut Array, effects: &mut Vec<Effect>) {
        let waits = |(node, errand): (&usize, &Errand)| matches!(errand.step, Step::Waiting).then_some(*node);
        let nodes: Vec<usize> = array.live.errands.iter().filter_map(waits).collect();
        for node in nodes {
            let Some(errand) = array.live.errands.get(&node) else { continue };
            let target = errand.target.clone();
            let job = self.side_work(array, Work::Survey(vec![target]), effects);
            if let Some(errand) = array.live.errands.get_mut(&node) {
                (errand.step, errand.job) = (Step::Probing, Some(job));
            }
        }
    }
}

fn discard(array: &Array, debt: &Debt) -> Work {
    Work::Discard(array.spec.id, vec![(debt.target.clone(), debt.remove)])
}
