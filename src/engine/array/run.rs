//! The owner's part that starts and stops arrays.

use super::muster::{Intent, Muster};
use super::{Array, Effect, Found, Halt, Life, Outcome, Owner, Ticket, Work, muster, plan, trace};
use crate::bugs::{Bug, planted};
use crate::control::command::{Refusal, Terms};
use crate::control::member::MemberLabel;
use crate::control::replica::ReplicaSpec;
use crate::control::spec::{ArraySpec, NodeSpec, Phase, RunOptions};
use crate::control::target::Target;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Epoch, Id, NodeId, Time};
use crate::wire::session::features;
use crate::wire::volume::Claim;

impl Owner {
    pub(super) fn start(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        run: RunOptions,
        terms: Terms,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        run.check().map_err(|why| Refusal::new(Errno::EINVAL, why))?;
        match &array.life {
            Life::Stopped | Life::Failed(_) => {
                array.tries = 0;
                let survey = Work::Survey(array.targets());
                self.work(array, Life::Checking(Some(ticket), run, terms), survey, effects);
                Ok(())
            }
            Life::Started(device) | Life::Regrouping(device) => {
                Err(Refusal::new(Errno::EBUSY, format!("array '{}' is started already, as {device}", array.spec.name)))
            }
            _ => Err(array.busy()),
        }
    }

    pub(super) fn stop(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        force: bool,
        now: Time,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let how = if force { Halt::Forced } else { Halt::Polite };
        match &array.life {
            Life::Stopped => Err(Refusal::new(Errno::EINVAL, format!("array '{}' is not started", array.spec.name))),
            Life::Started(device) => {
                let life = Life::Halting(Some(ticket), device.clone());
                self.work(array, life, array.halt(how), effects);
                Ok(())
            }
            Life::Failed(_) | Life::Waiting(..) => {
                self.clear(array, ticket, how, effects);
                Ok(())
            }
            Life::Checking(None, ..) | Life::Tracing(None, ..) => {
                // A survey changes nothing: what it reports does not matter any more.
                self.give_up_job(array);
                array.life = Life::Waiting(now, array.trouble.clone().unwrap_or_default());
                self.clear(array, ticket, how, effects);
                Ok(())
            }
            Life::Minting(..)
            | Life::Claiming(..)
            | Life::Fencing(..)
            | Life::Labelling(..)
            | Life::Launching(_)
            | Life::Regrouping(_)
                if array.stop.is_none() =>
            {
                array.stop = Some(ticket);
                Ok(())
            }
            _ => Err(array.busy()),
        }
    }

    /// It is not served, but a dead daemon's device may be there, with somebody's filesystem on it.
    fn clear(&mut self, array: &mut Array, ticket: Ticket, how: Halt, effects: &mut Vec<Effect>) {
        let back = std::mem::replace(&mut array.life, Life::Stopped);
        self.work(array, Life::Clearing(ticket, Box::new(back)), array.halt(how), effects);
    }

    /// It is stopped: nothing waits any more, so nothing is held when it is started again.
    fn park(&mut self, array: &mut Array, ticket: Ticket, effects: &mut Vec<Effect>) {
        array.spec.nodes.iter_mut().for_each(|node| node.suspend = None);
        self.save(array, Phase::Stopped, Life::Parking(ticket, None), effects);
    }

    /// A data path has ended by itself. Whatever of it is left must not stay in the way of the next one.
    pub(super) fn bury(&mut self, name: &str, epoch: Epoch, why: String, effects: &mut Vec<Effect>) {
        let Some(mut array) = self.arrays.remove(name) else { return };
        if array.spec.epoch == epoch && array.is_served() {
            self.reap(&mut array, (why, None), effects);
        }
        self.arrays.insert(name.to_owned(), array);
    }

    /// Another owner has taken a volume: all of the data path ends, and that is no failure of a replica.
    pub(super) fn fenced(&mut self, array: &mut Array, volume: Id, effects: &mut Vec<Effect>) {
        self.reap(array, (plan::fenced(&array.spec.name), Some(volume)), effects);
    }

    fn reap(&mut self, array: &mut Array, (why, by): (String, Option<Id>), effects: &mut Vec<Effect>) {
        self.give_up_job(array);
        array.regroup = None;
        self.not_served(array, effects);
        let halt = array.halt(Halt::Forced);
        self.work(array, Life::Reaping(why, by), halt, effects);
    }

    /// The part of [`Owner::advance`] that starts and stops.
    pub(super) fn advance_run(
        &mut self,
        array: &mut Array,
        outcome: Outcome,
        fresh: Id,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        match (array.life.clone(), outcome) {
            (Life::Checking(asker, run, terms), Outcome::Surveyed(found)) => {
                let patient = asker.is_none() && array.tries < limits::PATIENT_TRIES;
                let (host, boot, name) = (self.host, self.boot, array.spec.name.as_str());
                let intent = Intent { host, terms, patient, late: asker.is_none(), name, boot };
                match muster::muster(&array.spec, &found, intent) {
                    Ok(_) if self.closing => array.abandon(asker, effects),
                    Ok(muster) => {
                        let by_hand = asker.is_some() && !terms.take_over;
                        array.room = by_hand.then(|| array.room_at_start(&found)).flatten();
                        let watches = (terms.take_over || muster.ahead) && !planted(Bug::LabelsLookedAtOnce);
                        array.watched = watches.then(|| labels_of(&muster.present, &found));
                        array.traces = trace::traces(&array.spec, &found);
                        array.traces.retain(|trace| !muster.late.contains_key(&trace.node));
                        if array.traces.is_empty() {
                            return self.mint(array, (asker, run, muster), (fresh, now), effects);
                        }
                        let targets = array.traces.iter().map(|trace| trace.to.clone()).collect();
                        self.work(array, Life::Tracing(asker, run, terms, muster), Work::Survey(targets), effects);
                    }
                    Err(refusal) => array.not_begun(asker, plan::cannot_start(name, refusal), now, effects),
                }
            }
            (Life::Tracing(asker, run, terms, mut muster), Outcome::Surveyed(found)) => {
                let claims = found.iter().flatten().filter_map(|found| found.claim);
                muster.epoch =
                    claims.map(|claim| Epoch(claim.epoch.0.saturating_add(1))).fold(muster.epoch, Epoch::max);
                match trace::judge(&array.spec, &mut array.traces, &found, terms) {
                    Ok(()) if self.closing => array.abandon(asker, effects),
                    Ok(()) => {
                        array.traces.retain(|trace| terms.take_over && trace.ours);
                        self.mint(array, (asker, run, muster), (fresh, now), effects);
                    }
                    Err(refusal) => {
                        let why = plan::cannot_start(&array.spec.name, refusal);
                        array.not_begun(asker, why, now, effects);
                    }
                }
            }
            (
                Life::Minting(asker, _)
                | Life::Claiming(asker, _)
                | Life::Fencing(asker, ..)
                | Life::Labelling(asker, ..),
                Outcome::Saved(Ok(())) | Outcome::Claimed(..) | Outcome::Surveyed(_) | Outcome::Each(_),
            ) if array.stop.is_some() || self.closing => {
                self.not_started(array, asker, plan::given_up(&array.spec.name), now, effects);
            }
            (Life::Minting(asker, present), Outcome::Saved(Ok(()))) => {
                let features = |node: usize| features::of_node(array.spec.nodes[node].replicas.len());
                let ask = |(node, _, replica): (usize, usize, &ReplicaSpec)| (replica.target.clone(), features(node));
                let candidates = array.traces.iter().map(|trace| (trace.to.clone(), features::of_node(2)));
                let there = array.there(&present).map(ask).chain(candidates).collect();
                let claim = Work::Claim(array.spec.id, array.spec.epoch, there);
                self.work(array, Life::Claiming(asker, present), claim, effects);
            }
            (Life::Minting(asker, _), Outcome::Saved(Err(why))) => self.not_started(array, asker, why, now, effects),
            (Life::Claiming(asker, present), Outcome::Claimed(claim, results)) => {
                match array.refused(&present, &results) {
                    None if array.traces.is_empty() && array.watched.is_none() => {
                        self.label_all(array, (asker, claim, present), now, effects);
                    }
                    None => {
                        let watched = array.there(&present).map(|(_, _, replica)| replica.target.clone());
                        let watched = watched.filter(|_| array.watched.is_some());
                        let targets = watched.chain(array.traces.iter().map(|trace| trace.to.clone())).collect();
                        self.work(array, Life::Fencing(asker, claim, present), Work::Survey(targets), effects);
                    }
                    Some(why) => self.not_started(array, asker, why, now, effects),
                }
            }
            (Life::Fencing(asker, claim, present), Outcome::Surveyed(found)) => {
                let terms = Terms { take_over: true, force: false };
                let watched = array.watched.take().unwrap_or_default();
                let (own, targets) = found.split_at(watched.len().min(found.len()));
                let judged = trace::judge(&array.spec, &mut array.traces, targets, terms);
                match judged.and_then(|()| array.still_as_seen(&present, &watched, own)) {
                    Ok(()) => self.label_all(array, (asker, claim, present), now, effects),
                    Err(why) => {
                        let why = plan::cannot_start(&array.spec.name, why);
                        self.not_started(array, asker, why, now, effects);
                    }
                }
            }
            (Life::Labelling(asker, claim, present), Outcome::Each(results)) => match array.refused(&present, &results)
            {
                None => {
                    array.claim = Some(claim);
                    let spec = ArraySpec { clean: array.was_clean, ..array.spec.clone() };
                    let launch = Work::Launch(Box::new(spec), claim, array.late.keys().copied().collect());
                    self.work(array, Life::Launching(asker), launch, effects);
                }
                Some(why) => self.not_started(array, asker, why, now, effects),
            },
            (Life::Launching(asker), Outcome::Launched(Ok(device))) => {
                (array.tries, array.trouble) = (0, None);
                array.life = Life::Started(device.clone());
                effects.extend(asker.map(|ticket| Effect::Reply(ticket, Ok(array.answer()))));
                let stop = array.stop.take();
                if stop.is_none() && !self.closing {
                    self.served(array, now, effects);
                }
                if stop.is_some() || self.closing {
                    let halt = array.halt(if self.closing { Halt::Leaving } else { Halt::Polite });
                    self.work(array, Life::Halting(stop, device), halt, effects);
                }
            }
            (Life::Launching(asker), Outcome::Launched(Err(why))) => {
                self.not_started(array, asker, why, now, effects);
            }
            (Life::Halting(asker, _), Outcome::Halted(Ok(settled))) => {
                array.spec.clean = settled;
                if settled {
                    array.spec.memory.shown = None;
                }
                self.not_served(array, effects);
                match asker {
                    Some(ticket) => self.park(array, ticket, effects),
                    None => array.life = Life::Stopped,
                }
            }
            (Life::Regrouping(device), Outcome::Regrouped(record, labels)) => {
                self.written(array, device, (record, &labels), now, effects);
            }
            (Life::Halting(asker, device), Outcome::Halted(Err(why))) => {
                array.life = Life::Started(device);
                effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(why))));
            }
            (Life::Clearing(ticket, _), Outcome::Halted(Ok(_))) => self.park(array, ticket, effects),
            (Life::Clearing(ticket, back), Outcome::Halted(Err(why))) => {
                array.life = *back;
                effects.push(Effect::Reply(ticket, Err(why)));
            }
            (Life::Reaping(why, None), Outcome::Halted(_)) => array.life = Life::Failed(why),
            (Life::Reaping(why, Some(volume)), Outcome::Halted(_)) => {
                let target: Vec<Target> = array.place_of(volume).map(|(_, target)| target).into_iter().collect();
                self.work(array, Life::Identifying(why, volume), Work::Survey(target), effects);
            }
            (Life::Identifying(why, volume), Outcome::Surveyed(found)) => {
                let claim = found.into_iter().flatten().find_map(|found| found.claim);
                let by = claim.filter(|claim| claim.epoch > array.spec.epoch);
                let place = array.place_of(volume).map(|(node, target)| format!("node {node} ({target})"));
                array.life = Life::Failed(match (by, place) {
                    (Some(claim), Some(place)) => plan::taken(&array.spec.name, &place, &claim, self.host),
                    _ => why,
                });
            }
            (Life::Parking(ticket, failed), Outcome::Saved(Ok(()))) => {
                array.life = Life::Stopped;
                let answer = failed.map_or_else(|| Ok(array.answer()), Err);
                effects.push(Effect::Reply(ticket, answer));
            }
            (Life::Parking(ticket, failed), Outcome::Saved(Err(trouble))) => {
                array.spec.phase = Phase::Started;
                let refusal = plan::not_parked(&array.spec.name, failed, &trouble);
                array.life = Life::Failed(refusal.text.clone());
                effects.push(Effect::Reply(ticket, Err(refusal)));
            }
            (life, outcome) => {
                // A report that does not fit its work would be a bug of the performer: the array stays where it is.
                debug_assert!(false, "{life:?} does not expect {outcome:?}");
            }
        }
    }

    /// Every replica is what the record says: the new epoch is written, and what is gone on without.
    fn mint(
        &mut self,
        array: &mut Array,
        (asker, run, muster): (Option<Ticket>, RunOptions, Muster),
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) {
        array.spec.run = run;
        array.spec.epoch = muster.epoch;
        // Until the array has been stopped in order it is not known what its last writes have reached.
        array.was_clean = std::mem::take(&mut array.spec.clean) && !muster.behind;
        array.was_shown = array.spec.memory.shown.replace(self.boot);
        array.regroup = None;
        self.lapse(array, now);
        self.settle_transfers(array, now);
        let outlived = array.was_shown == Some(self.boot);
        for node in &muster.doubted {
            if let Some(transfer) = &mut array.spec.nodes[*node].transfer {
                transfer.keep(None);
            }
        }
        muster::go_without(&mut array.spec, &muster, outlived, fresh);
        if let Some(room) = array.room.take() {
            array.take_up(&room, fresh);
        }
        array.forget_losses();
        array.interrupt_scrubs(Some(self.wall(now)));
        array.late = muster.late;
        self.save(array, Phase::Started, Life::Minting(asker, muster.present), effects);
    }

    fn label_all(
        &mut self,
        array: &mut Array,
        (asker, claim, present): (Option<Ticket>, Claim, Vec<bool>),
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        match array.labels(&present, self.host) {
            Ok(labels) => {
                let label = Work::Label(array.spec.id, claim, labels);
                self.work(array, Life::Labelling(asker, claim, present), label, effects);
            }
            Err(why) => self.not_started(array, asker, why, now, effects),
        }
    }

    /// A start came to nothing: in the background it is tried again, else the record says `stopped` again.
    fn not_started(
        &mut self,
        array: &mut Array,
        asker: Option<Ticket>,
        why: Refusal,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        // It was not shown, and nothing was written.
        array.spec.memory.shown = array.was_shown;
        if let Some(stop) = array.stop.take() {
            array.life = match asker {
                None => Life::Waiting(now, why.text.clone()),
                Some(_) => Life::Failed(why.text.clone()),
            };
            effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(why))));
            return self.clear(array, stop, Halt::Polite, effects);
        }
        match asker {
            Some(ticket) => self.save(array, Phase::Stopped, Life::Parking(ticket, Some(why)), effects),
            None => array.wait(&why, now),
        }
    }
}

/// What the labels say of those that are there.
fn labels_of(present: &[bool], found: &[Result<Found, Refusal>]) -> Vec<Option<String>> {
    let there = present.iter().zip(found).filter(|(present, _)| **present);
    there.map(|(_, found)| found.as_ref().ok().and_then(|found| found.label.clone())).collect()
}

impl Array {
    /// Where a volume lives that is the array's, and its node.
    pub(super) fn place_of(&self, volume: Id) -> Option<(NodeId, Target)> {
        let replicas = self.spec.replicas().map(|(node, of)| (node.start, of.volume, &of.target));
        let moving = self.spec.nodes.iter().filter_map(|node| Some((node.start, node.transfer.as_ref()?)));
        let moving = moving.map(|(start, of)| (start, of.to, &of.status.to));
        let found = replicas.chain(moving).find(|(_, of, _)| *of == volume);
        found.map(|(start, _, target)| (start, target.clone()))
    }

    pub(super) fn halt(&self, how: Halt) -> Work {
        Work::Halt { name: self.spec.name.clone(), array: self.spec.id, how }
    }

    /// The replicas that are there, each with the places of its node and of itself.
    fn there(&self, present: &[bool]) -> impl Iterator<Item = (usize, usize, &ReplicaSpec)> {
        let places = |(node, spec): (usize, &'_ NodeSpec)| (0..spec.replicas.len()).map(move |replica| (node, replica));
        let all: Vec<(usize, usize)> = self.spec.nodes.iter().enumerate().flat_map(places).collect();
        let there = all.into_iter().zip(self.spec.replicas()).zip(present).filter(|(_, present)| **present);
        there.map(|(((node, replica), (_, spec)), _)| (node, replica, spec))
    }

    /// What each replica that is there is to know.
    pub(super) fn labels(&self, present: &[bool], host: Id) -> Result<Vec<(Target, String)>, Refusal> {
        let label = |(node, replica, spec): (usize, usize, &ReplicaSpec)| {
            let text = MemberLabel::of(&self.spec, host, node, replica);
            let bad =
                |bad| Refusal::new(Errno::EINVAL, format!("the label of {} cannot be made: it is {bad}", spec.target));
            Ok((spec.target.clone(), text.map_err(bad)?))
        };
        self.there(present).map(label).collect()
    }

    /// The first replica that has refused what was asked of all that are there.
    fn refused_by(&self, present: &[bool], results: &[Result<(), Refusal>]) -> Option<Refusal> {
        let (name, nodes) = (&self.spec.name, &self.spec.nodes);
        self.there(present).zip(results).find_map(|((node, _, replica), result)| {
            let why = result.as_ref().err()?;
            let start = nodes[node].start;
            let text = format!("array '{name}' cannot start: node {start} ({}): {}", replica.target, why.text);
            Some(Refusal::new(why.errno, text))
        })
    }

    /// Whether nobody has gone on with the array between the look at its labels and the claim, after which nobody can.
    fn still_as_seen(
        &self,
        present: &[bool],
        watched: &[Option<String>],
        found: &[Result<Found, Refusal>],
    ) -> Result<(), Refusal> {
        for (((node, _, replica), seen), found) in self.there(present).zip(watched).zip(found) {
            let (start, target) = (self.spec.nodes[node].start, &replica.target);
            let refuse = |errno, why: &str| Err(Refusal::new(errno, format!("node {start} ({target}): {why}")));
            match found {
                Err(why) => return refuse(why.errno, &why.text),
                Ok(found) if found.label != *seen => {
                    let why = "another host has gone on with the array while it was being claimed; now it cannot any more: try again";
                    return refuse(Errno::EBUSY, why);
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// A start was refused before it has changed anything.
    fn not_begun(&mut self, asker: Option<Ticket>, why: Refusal, now: Time, effects: &mut Vec<Effect>) {
        match asker {
            None => self.wait(&why, now),
            Some(ticket) => {
                self.life = self.idle(&why.text);
                effects.push(Effect::Reply(ticket, Err(why)));
            }
        }
    }

    /// The first target of a transfer, or replica, that has refused what was asked of all that are there.
    fn refused(&self, present: &[bool], results: &[Result<(), Refusal>]) -> Option<Refusal> {
        let (name, count) = (&self.spec.name, self.there(present).count());
        let candidate = self.traces.iter().zip(results.iter().skip(count)).find_map(|(trace, result)| {
            let why = result.as_ref().err()?;
            let text = format!("array '{name}' cannot start: the target of a migration ({}): {}", trace.to, why.text);
            Some(Refusal::new(why.errno, text))
        });
        self.refused_by(present, results).or(candidate)
    }

    /// What an array is after a start that changed nothing.
    fn idle(&self, why: &str) -> Life {
        match self.spec.phase {
            Phase::Started => Life::Failed(why.to_owned()),
            _ => Life::Stopped,
        }
    }

    /// The daemon ends: a start goes no further.
    fn abandon(&mut self, asker: Option<Ticket>, effects: &mut Vec<Effect>) {
        let text = format!("dstd is ending: array '{}' was not started", self.spec.name);
        self.life = self.idle(&text);
        let refusal = Refusal::new(Errno::ESHUTDOWN, text);
        effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(refusal))));
    }

    fn wait(&mut self, why: &Refusal, now: Time) {
        self.trouble = Some(why.text.clone());
        self.life = Life::Waiting(self.back_off(now), why.text.clone());
    }
}
