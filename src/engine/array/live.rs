//! The owner's part for an array that is in use: changes of its record under way, and what follows when they are durable.
//!
//! The record is written by one piece of work at a time, together with what the data path has asked for. A change is made in
//! memory, put on the list with what follows ([`After`]), and taken back when it could not be written. What takes long and
//! touches no record, such as making a volume, is an errand ([`super::errand`]) beside it: the data path never waits for one.

use std::collections::{BTreeMap, BTreeSet};

use super::debts::Payer;
use super::errand::Errand;
use super::grow::Growing;
use super::late::Latecomers;
use super::suspend::Hold;
use super::{Array, Effect, Halt, JobId, Life, Outcome, Owner, Ticket, Work, regroup};
use crate::control::command::{Answer, Refusal};
use crate::control::node::{NodeAsk, Suspended};
use crate::control::scrub::ScrubStatus;
use crate::control::status::ArrayStatus;
use crate::control::transfer::Transfer;
use crate::engine::losses::Memory;
use crate::engine::replicas::Saved;
use crate::engine::steer::{News, Steer};
use crate::errno::Errno;
use crate::units::{Epoch, Id, NodeId, Time};

/// What follows when the record is durable, or could not be written.
#[derive(Debug)]
pub(super) enum After {
    /// The data path is told.
    Standings,
    /// A node is to be frozen; it was held like this before.
    Held(usize, Ticket, Option<Suspended>),
    /// A node was thawed.
    Thawed(usize, Ticket),
    /// What waits at a node is to fail.
    Failing(usize, Ticket),
    /// The replicas of a node are to be compared; what was kept of the last time.
    Scrub(usize, Ticket, Option<Box<ScrubStatus>>),
    /// The errand of a node goes on.
    Errand(usize),
    /// A late node is claimed.
    Late(usize),
    /// The region logs of a node need keep nothing any more for a move that is over.
    Stay(usize),
    /// What a node has lost is accepted; this was known before.
    Accepted(usize, Ticket, Memory),
    /// The array has grown: the data path is told.
    Grown,
    /// It is to grow when it is started the next time, because of this.
    Promised(Ticket, String),
    /// Someone is answered.
    Reply(Ticket),
    /// Nothing.
    Quiet,
}

/// What is known of an array while it is in use.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Changes of the record that are not being written yet.
    pub(super) wanted: Vec<After>,
    /// Those that are.
    saving: Vec<After>,
    /// Nodes whose labels must be written before the data path is told.
    pub(super) owed: BTreeSet<usize>,
    /// Nodes whose labels are to be written when there is an opportunity.
    pub(super) polite: BTreeSet<usize>,
    /// The nodes and volumes of the labels that are being written.
    labelling: Vec<(usize, Id)>,
    /// Nodes whose requests are held.
    pub(super) holds: BTreeMap<usize, Hold>,
    /// What is under way with a node.
    pub(super) errands: BTreeMap<usize, Errand>,
    /// Nodes whose move the data path has begun, and who has asked to end it.
    pub(super) moving: BTreeMap<usize, Option<Ticket>>,
    /// Nodes whose scrub the data path has begun, and who has asked to end it.
    pub(super) scrubs: BTreeMap<usize, Vec<Ticket>>,
    /// When a transfer that could not be gone on with is tried again, and how often it was.
    pub(super) retries: BTreeMap<usize, (Time, u32)>,
    /// Transfers that are not in the record yet.
    pub(super) drafts: BTreeMap<usize, Transfer>,
    /// Nodes that move to a volume to which nothing was ever written.
    pub(super) blank: BTreeSet<usize>,
    /// Nodes whose region logs the data path keeps for a move that goes on, and those of which it need not any more, as soon as the record says so.
    pub(super) awaited: BTreeSet<usize>,
    pub(super) stays: BTreeSet<usize>,
    /// Until when the source of a node's migration is kept.
    pub(super) keeps: BTreeMap<usize, Time>,
    /// Nodes of which that is ending, and who has asked.
    pub(super) releasing: BTreeMap<usize, Option<Ticket>>,
    /// It grows.
    pub(super) growing: Option<Growing>,
    /// The record could not be written the last time.
    pub(super) unsaved: bool,
    /// Lets volumes go.
    pub(super) payer: Payer,
    /// Nodes that are late.
    pub(super) late: Latecomers,
}

impl Live {
    /// When something is to be done.
    pub(super) fn next_wake(&self) -> Time {
        let holds = self.holds.values().map(|hold| hold.expires);
        let retries = self.retries.values().map(|(at, _)| *at);
        holds
            .chain(retries)
            .chain(self.keeps.values().copied())
            .chain([self.payer.next_wake(), self.late.next_wake()])
            .min()
            .unwrap_or(Time::NEVER)
    }
}

impl Owner {
    /// The time of day, seconds since 1970.
    pub(super) fn wall(&self, now: Time) -> u64 {
        let (at, wall) = self.clock;
        wall.saturating_add(now.since(at).as_secs())
    }

    /// Writes what is to be written, as soon as nothing else is under way.
    pub(super) fn pump(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        let Life::Started(device) = array.life.clone() else { return };
        let asked = array.regroup.take();
        if asked.is_none() && array.live.wanted.is_empty() {
            return self.pay(array, now, effects);
        }
        array.live.saving = std::mem::take(&mut array.live.wanted);
        if let Some(asked) = asked {
            regroup::apply(array, &asked);
            array.live.saving.push(After::Standings);
        }
        let stays = std::mem::take(&mut array.live.stays);
        array.live.saving.extend(stays.into_iter().map(After::Stay));
        let live = &array.live;
        let wanted = |node: usize| live.owed.contains(&node) || live.polite.contains(&node);
        let places =
            array.spec.nodes.iter().enumerate().flat_map(|(at, node)| node.replicas.iter().map(move |of| (at, of)));
        let told: Vec<_> = places
            .map(|(node, replica)| (wanted(node) && replica.state.is_in_sync()).then_some((node, replica.volume)))
            .collect();
        let mask: Vec<bool> = told.iter().map(Option::is_some).collect();
        let labels = array.labels(&mask, self.host);
        let Some(claim) = array.claim else { return };
        match labels {
            Ok(labels) => {
                array.live.labelling = told.into_iter().flatten().collect();
                let work = Work::Regroup(Box::new(array.spec.clone()), claim, labels);
                self.work(array, Life::Regrouping(device), work, effects);
            }
            Err(why) => self.written(array, device, (Err(why), &[]), now, effects),
        }
    }

    /// The record and the labels are written, or could not be.
    pub(super) fn written(
        &mut self,
        array: &mut Array,
        device: String,
        (record, labels): (Result<(), Refusal>, &[Result<(), Refusal>]),
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let live = &mut array.live;
        let labelled = std::mem::take(&mut live.labelling);
        let failed = labelled.iter().zip(labels).filter_map(|(of, result)| Some((of, result.as_ref().err()?)));
        let failed: Vec<((usize, Id), &Refusal)> = failed.map(|(of, why)| (*of, why)).collect();
        let unlabelled = |node: usize| failed.iter().any(|((of, _), _)| *of == node);
        let owed = failed.iter().filter(|((node, _), _)| live.owed.contains(node));
        let untold: Vec<Id> = owed.clone().map(|((_, volume), _)| *volume).collect();
        let trouble = record.as_ref().err().or_else(|| owed.map(|(_, why)| *why).next()).cloned();
        let saved = match (&record, untold.is_empty()) {
            (Err(_), _) => Saved::Nothing,
            (Ok(()), true) => Saved::All,
            (Ok(()), false) => Saved::AllBut(untold),
        };
        live.unsaved = record.is_err();
        if record.is_ok() {
            live.owed.retain(|node| unlabelled(*node));
            live.polite.retain(|node| unlabelled(*node));
        }
        let after = std::mem::take(&mut live.saving);
        array.life = Life::Started(device.clone());
        for after in after {
            self.follow(array, after, (&record, &saved, trouble.as_ref()), now, effects);
        }
        let stop = array.stop.take();
        if stop.is_some() || self.closing {
            let halt = array.halt(if self.closing { Halt::Leaving } else { Halt::Polite });
            self.work(array, Life::Halting(stop, device), halt, effects);
        }
    }

    fn follow(
        &mut self,
        array: &mut Array,
        after: After,
        (record, saved, trouble): (&Result<(), Refusal>, &Saved, Option<&Refusal>),
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        match after {
            After::Standings => {
                array.trouble = trouble.map(|why| format!("a change of its replicas is not durable yet: {why}"));
                effects.push(Effect::Regrouped(array.spec.name.clone(), saved.clone()));
            }
            After::Held(node, ticket, former) => self.held(array, node, ticket, former, record, effects),
            After::Thawed(node, ticket) => {
                let start = array.spec.nodes[node].start;
                let answer = record.clone().map(|()| array.answer()).map_err(|why| {
                    let text = format!(
                        "node {start} is resumed, but that could not be written ({why}): after a restart of dstd it would be suspended \
                         again. Make room in the state directory, suspend and resume it once more"
                    );
                    Refusal::new(why.errno, text)
                });
                effects.push(Effect::Reply(ticket, answer));
            }
            After::Failing(node, ticket) => self.failing(array, node, ticket, record, effects),
            After::Scrub(node, ticket, former) => {
                Owner::scrub_recorded(array, (node, ticket), former, record, effects);
            }
            After::Stay(node) => match record {
                Ok(()) => effects.push(Effect::Steer(array.spec.name.clone(), Steer::Stay { node })),
                // The record may still say that it goes on: with the next one.
                Err(_) => drop(array.live.stays.insert(node)),
            },
            After::Late(node) => self.late_recorded(array, node, record, now, effects),
            After::Errand(node) => self.errand_saved(array, node, record, now, effects),
            After::Accepted(node, ticket, former) => {
                match record {
                    Ok(()) => effects.push(Effect::Steer(array.spec.name.clone(), Steer::AcceptLoss { node })),
                    Err(_) => array.spec.memory = former,
                }
                let answer = record.clone().map(|()| array.answer());
                effects.push(Effect::Reply(ticket, answer));
            }
            After::Grown => Owner::grow_recorded(array, record, saved, trouble, effects),
            After::Promised(ticket, why) => {
                let reply = array.promised_live(ticket, &why, record);
                effects.push(reply);
            }
            After::Reply(ticket) => {
                let answer = record.clone().map(|()| array.answer());
                effects.push(Effect::Reply(ticket, answer));
            }
            After::Quiet => {
                if let Err(why) = record {
                    array.trouble = Some(format!("its record could not be written: {why}"));
                }
            }
        }
    }

    /// Something is asked about a node.
    pub(super) fn ask_node(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (node, ask): (NodeId, NodeAsk),
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if ask == NodeAsk::AcceptLoss {
            return self.accept_loss(ticket, array, node, now, effects);
        }
        let at = array.served_node(node)?;
        if !matches!(ask, NodeAsk::Resume | NodeAsk::Fail) {
            array.in_time(at)?;
        }
        match ask {
            // Asked of arrays that are not in use, too.
            NodeAsk::AcceptLoss => Ok(()),
            NodeAsk::Suspend(suspend) => self.suspend(ticket, array, at, &suspend, now),
            NodeAsk::Resume => self.thaw(ticket, array, at, effects),
            NodeAsk::Fail => Owner::fail(ticket, array, at),
            NodeAsk::Replace(replace) => self.replace(ticket, array, at, &replace, effects),
            NodeAsk::Migrate(migrate) => self.migrate(ticket, array, at, &migrate, (fresh, now), effects),
            NodeAsk::Scrub(scrub) => self.scrub(ticket, array, at, &scrub, now),
            NodeAsk::EndScrub => Owner::end_scrub(ticket, array, at, effects),
            NodeAsk::Migration(act, which) => self.act(ticket, array, at, (act, which), (fresh, now), effects),
        }?;
        self.pump(array, now, effects);
        Ok(())
    }

    /// A data path tells how something ended.
    pub(super) fn news(&mut self, name: &str, epoch: Epoch, news: News, now: Time, effects: &mut Vec<Effect>) {
        let Some(mut array) = self.arrays.remove(name) else { return };
        if let News::Arrived { node, result } = news {
            // Also while it is being stopped, which may be refused.
            if array.spec.epoch == epoch {
                self.arrived(&mut array, node, result, now);
            }
        } else if array.spec.epoch == epoch && array.is_served() {
            match news {
                News::Fenced { volume } => self.fenced(&mut array, volume, effects),
                News::Frozen { node, flushed } => array.frozen(node, flushed, effects),
                News::Arrived { .. } => {}
                News::Detached { node, volume } => self.detached(&mut array, node, volume, now, effects),
                News::Moved { node, result } if array.is_swapping(node) => {
                    self.swapped(&mut array, node, result.is_ok(), now, effects);
                }
                News::Moved { node, result } => self.moved(&mut array, node, result, now, effects),
                News::Grown { done } => self.grown(&mut array, done, effects),
                News::Scrubbed { node, scrubbed } => self.scrubbed(&mut array, node, &scrubbed, now),
            }
            self.pump(&mut array, now, effects);
        }
        self.arrays.insert(name.to_owned(), array);
    }

    /// The array is in use from now on.
    pub(super) fn served(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        array.live = Live::default();
        let awaits = array.spec.nodes.iter().enumerate().filter(|(_, node)| node.awaits());
        array.live.awaited = awaits.map(|(at, _)| at).collect();
        array.live.late = Latecomers::new(std::mem::take(&mut array.late), now);
        self.restore_holds(array, now, effects);
        self.go_on(array, now, effects);
        self.pump(array, now, effects);
    }

    /// Time has passed for an array in use.
    pub(super) fn tick_live(&mut self, array: &mut Array, now: Time, effects: &mut Vec<Effect>) {
        self.expire(array, now, effects);
        self.look_for_late(array, now, effects);
        self.go_on(array, now, effects);
        self.pump(array, now, effects);
    }

    /// The array is in use no more: who waits for something is told.
    pub(super) fn not_served(&mut self, array: &mut Array, effects: &mut Vec<Effect>) {
        array.interrupt_scrubs(None);
        let live = std::mem::take(&mut array.live);
        let of_errand = |job: JobId| live.errands.values().any(|errand| errand.job == Some(job));
        let grows = |job: JobId| live.growing.as_ref().is_some_and(|growing| growing.job == Some(job));
        let aside = |job: JobId| of_errand(job) || grows(job) || live.payer.is_job(job) || live.late.is_job(job);
        self.jobs.retain(|job, _| !aside(*job));
        let name = &array.spec.name;
        let text = format!("array '{name}' is in use no more: what is recorded goes on when it is started again");
        let waiting = live.holds.into_values().flat_map(|hold| hold.waiting);
        let errands = live.errands.into_values().flat_map(|errand| [errand.ticket, errand.abort]).flatten();
        let after = live.wanted.into_iter().chain(live.saving).filter_map(|after| match after {
            After::Held(_, ticket, _) | After::Thawed(_, ticket) | After::Failing(_, ticket) | After::Reply(ticket) => {
                Some(ticket)
            }
            After::Accepted(_, ticket, _) => Some(ticket),
            After::Scrub(_, ticket, _) | After::Promised(ticket, _) => Some(ticket),
            After::Standings | After::Errand(_) | After::Late(_) | After::Stay(_) | After::Grown | After::Quiet => None,
        });
        let tickets = waiting
            .chain(errands)
            .chain(after)
            .chain(live.moving.into_values().flatten())
            .chain(live.releasing.into_values().flatten())
            .chain(live.scrubs.into_values().flatten())
            .chain(live.growing.map(|growing| growing.ticket))
            .chain(live.payer.tickets());
        let refuse = |ticket| Effect::Reply(ticket, Err(Refusal::new(Errno::ECANCELED, text.clone())));
        effects.extend(tickets.map(refuse));
    }

    /// Work of an errand has ended.
    pub(super) fn errand_done(
        &mut self,
        array: &mut Array,
        job: JobId,
        outcome: Outcome,
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) {
        let errand = array.live.errands.iter().find(|(_, errand)| errand.job == Some(job)).map(|(node, _)| *node);
        if let Some(node) = errand {
            self.errand_step(array, node, outcome, now, effects);
        } else if array.live.growing.as_ref().is_some_and(|growing| growing.job == Some(job)) {
            self.grow_step(array, outcome, now, effects);
        } else if array.live.payer.is_job(job) {
            self.pay_step(array, outcome, now, effects);
        } else if array.live.late.is_job(job) {
            self.late_step(array, job, outcome, (fresh, now), effects);
        }
    }

    /// Begins work beside the array's own.
    pub(super) fn side_work(&mut self, array: &Array, work: Work, effects: &mut Vec<Effect>) -> JobId {
        self.next_job += 1;
        let job = JobId(self.next_job);
        self.jobs.insert(job, array.spec.name.clone());
        effects.push(Effect::Work(job, work));
        job
    }
}

impl Array {
    /// Whether it is in use, and goes on being so.
    pub(super) fn is_served(&self) -> bool {
        matches!(self.life, Life::Started(_) | Life::Regrouping(_))
    }

    /// The place of a node of an array that is in use.
    fn served_node(&self, node: NodeId) -> Result<usize, Refusal> {
        let name = &self.spec.name;
        match &self.life {
            Life::Started(_) | Life::Regrouping(_) => {}
            Life::Stopped | Life::Failed(_) => {
                let text = format!(
                    "array '{name}' is not started: there is nothing to hold or to move. 'dst start {name}' first"
                );
                return Err(Refusal::new(Errno::EINVAL, text));
            }
            _ => return Err(self.busy()),
        }
        self.place(node)
    }

    /// The place of a node.
    pub(super) fn place(&self, node: NodeId) -> Result<usize, Refusal> {
        let name = &self.spec.name;
        self.spec.nodes.iter().position(|other| other.start == node).ok_or_else(|| {
            let text = format!("array '{name}' has no node {node}: 'dst status {name}' shows its nodes");
            Refusal::new(Errno::ENOENT, text)
        })
    }

    /// The answer to a command that was done, with what may be regretted.
    pub(super) fn answer_with(&self, warnings: Vec<String>) -> Answer {
        Answer::Array(Box::new(ArrayStatus { warnings, ..super::view::status(self) }))
    }
}
