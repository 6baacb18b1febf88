//! What the owner of arrays decides: create, start, stop, remove, what is made durable when, what is undone after a failure.
//!
//! Sans-io: [`Owner::handle`] takes an event and the time and returns effects; whoever performs them reports each [`Work`] with
//! [`Event::Done`]. An array has at most one piece of work under way, and a state ([`Life`]) that says which.
//!
//! The order of durable things: *create* writes the record as `creating`, assigns the volumes, writes `stopped`; a daemon that
//! finds `creating` frees the volumes and forgets the record. *Start* writes a greater epoch, and which replicas are gone on
//! without, before anything speaks to a volume with it; claims every replica that is there; writes their labels; serves, and does the same later for nodes that are late. *Remove* writes `removing`, frees the volumes, forgets the record; a daemon that finds `removing` goes on.

use self::import::Gathering;
use self::live::Live;
use self::muster::Muster;
use self::replicas::Change;
use self::trace::Trace;
use crate::control::command::{Answer, Command, Create, Refusal, Removed, Terms};
use crate::control::replica::ReplicaSpec;
use crate::control::spec::{ArraySpec, NodeSpec, Phase, RunOptions};
use crate::control::status::ArrayStatus;
use crate::control::target::Target;
use crate::engine::losses::{Losses, Memory};
use crate::engine::replicas::Standing;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Time};
use crate::wire::volume::{Claim, Member};
use std::collections::BTreeMap;

mod debts;
mod errand;
mod grow;
mod import;
mod late;
mod live;
mod losses;
mod muster;
mod nodes;
pub mod plan;
mod regroup;
mod replicas;
mod run;
mod scrub;
mod suspend;
#[cfg(test)]
mod tests;
mod trace;
mod transfer;
mod view;
mod words;

pub use words::{Effect, Enlisted, Event, Found, Halt, JobId, Outcome, Ticket, Work};

/// What an array is doing. Every state but the last six has one piece of work under way.
#[derive(Clone, Debug)]
enum Life {
    /// Create: the targets are asked what they are. Nothing is recorded.
    Surveying(Ticket),
    /// Create: the record is written as `creating`.
    Recording(Ticket),
    /// Create: the volumes are assigned.
    Assigning(Ticket),
    /// Create: the record is written as `stopped`.
    Settling(Ticket),
    /// Create failed: the volumes are freed.
    Undoing(Option<Ticket>, Refusal),
    /// The record is removed; then this is answered.
    Forgetting(Option<Ticket>, Result<Answer, Refusal>),
    /// Start: the targets are asked whether they are there and ours.
    Checking(Option<Ticket>, RunOptions, Terms),
    /// Start: the targets of transfers are asked whether they have taken over.
    Tracing(Option<Ticket>, RunOptions, Terms, Muster),
    /// Start: the new epoch is written.
    Minting(Option<Ticket>, Vec<bool>),
    /// Start: the replicas that are there are claimed.
    Claiming(Option<Ticket>, Vec<bool>),
    /// Everything is claimed, and what another host may have written meanwhile is asked again: labels, and at a take-over the targets of transfers.
    Fencing(Option<Ticket>, Claim, Vec<bool>),
    /// Start: their labels are written.
    Labelling(Option<Ticket>, Claim, Vec<bool>),
    /// Start: the data path comes up.
    Launching(Option<Ticket>),
    /// In use under this device, while a change of its replicas is made durable.
    Regrouping(String),
    /// Stop: the data path ends.
    Halting(Option<Ticket>, String),
    /// Stop of what is not served: what a dead daemon has left of it is cleared away. It goes back to this if that is refused.
    Clearing(Ticket, Box<Life>),
    /// Stop, or a failed start: the record is written as `stopped`; then this is answered.
    Parking(Ticket, Option<Refusal>),
    /// Ended by itself: what is left of it is cleared away. If another owner has taken a volume: which one.
    Reaping(String, Option<Id>),
    /// Another owner has taken this volume: it is asked whose it is.
    Identifying(String, Id),
    /// Import: the record is written, in place of a former one.
    Adopting(Ticket, Vec<String>, Option<Box<ArraySpec>>),
    /// What a node has lost is accepted: the record is written; then it is this again.
    Accepting(Ticket, Box<Life>, Memory),
    /// The replicas of a node are changed.
    Changing(Ticket, usize, Change),
    /// Grow: its replicas are asked what they have.
    Measuring(Ticket),
    /// Grow: the record is written with the wish.
    Promising(Ticket),
    /// The volumes of replicas that were half added or removed are freed.
    Mending,
    /// The record is written without such replicas.
    Mended,
    /// Remove: the targets are asked whether they are there.
    Visiting(Ticket),
    /// Remove: the record is written as `removing`.
    Dooming(Ticket, bool),
    /// Remove: the volumes are freed.
    Freeing(Option<Ticket>, bool),
    /// Undoing or freeing goes on at this time.
    Stuck(Time, String),
    /// The start is tried again at this time.
    Waiting(Time, String),
    /// In use under this device.
    Started(String),
    /// Ended by itself.
    Failed(String),
    /// Complete and not in use.
    Stopped,
    /// Its record cannot be read.
    Corrupt(String),
}

struct Array {
    /// For a corrupt record only the name means anything.
    spec: ArraySpec,
    life: Life,
    job: Option<JobId>,
    /// How often what is tried in the background has failed.
    tries: u32,
    /// Why it failed last, shown until it has succeeded.
    trouble: Option<String>,
    /// A stop that came while a start was under way.
    stop: Option<Ticket>,
    /// The claim that it runs under.
    claim: Option<Claim>,
    /// What its record said of the replicas before this start: see [`ArraySpec::clean`].
    was_clean: bool,
    /// And of the device: see [`crate::engine::losses::Memory::shown`].
    was_shown: Option<Id>,
    /// A change of its replicas that is to be made durable.
    regroup: Option<Regroup>,
    /// What is known while it is in use.
    live: Live,
    /// Targets of transfers that a start asks; a take-over claims them.
    traces: Vec<Trace>,
    /// What the labels said of the replicas that a start claims, where another host may still write them.
    watched: Option<Vec<Option<String>>>,
    /// What its nodes take up at this start, sectors.
    room: Option<Vec<u64>>,
    /// Nodes that a start goes on without, and why.
    late: BTreeMap<usize, String>,
}

/// What a data path has asked to be made durable.
#[derive(Debug)]
struct Regroup {
    standings: Vec<(Id, Standing)>,
    losses: Vec<(Id, Losses)>,
    /// Random.
    fresh: Id,
}

/// The owner of all arrays of one state directory.
#[derive(Default)]
pub struct Owner {
    host: Id,
    /// This boot of its machine.
    boot: Id,
    /// A moment, and the time of day then, seconds since 1970.
    clock: (Time, u64),
    arrays: BTreeMap<String, Array>,
    jobs: BTreeMap<JobId, String>,
    imports: BTreeMap<JobId, Gathering>,
    next_job: u64,
    closing: bool,
}

impl Owner {
    /// Decides what follows from an event.
    pub fn handle(&mut self, event: Event, now: Time) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Boot { host, boot, wall, records } => {
                (self.host, self.boot) = (host, boot);
                self.clock = (now, wall);
                self.boot(records, &mut effects);
            }
            Event::Command { ticket, command, fresh } => {
                if let Err(refusal) = self.command(ticket, command, (fresh, now), &mut effects) {
                    effects.push(Effect::Reply(ticket, Err(refusal)));
                }
            }
            Event::Done { job, outcome, fresh } => {
                // Work of a start that was given up reports to nobody.
                if let Some(gathering) = self.imports.remove(&job) {
                    self.gather(gathering, outcome, &mut effects);
                } else if let Some(name) = self.jobs.remove(&job)
                    && let Some(mut array) = self.arrays.remove(&name)
                {
                    if array.job == Some(job) {
                        array.job = None;
                        if let Some(mut array) = self.advance(array, outcome, fresh, now, &mut effects) {
                            self.pump(&mut array, now, &mut effects);
                            self.arrays.insert(name, array);
                        }
                    } else {
                        self.errand_done(&mut array, job, outcome, (fresh, now), &mut effects);
                        self.pump(&mut array, now, &mut effects);
                        self.arrays.insert(name, array);
                    }
                }
            }
            Event::Died { name, epoch, why } => self.bury(&name, epoch, why, &mut effects),
            Event::News { name, epoch, news } => self.news(&name, epoch, news, now, &mut effects),
            Event::Regroup { name, epoch, standings, losses, fresh } => {
                if let Some(mut array) = self.arrays.remove(&name) {
                    if array.spec.epoch == epoch {
                        array.regroup = Some(Regroup { standings, losses, fresh });
                        self.pump(&mut array, now, &mut effects);
                    }
                    self.arrays.insert(name, array);
                }
            }
            Event::Tick => self.tick(now, &mut effects),
            Event::Shutdown => self.close(&mut effects),
        }
        if self.closing && self.imports.is_empty() && self.arrays.values().all(|array| array.job.is_none()) {
            effects.push(Effect::Exit);
        }
        effects
    }

    /// When [`Event::Tick`] is wanted next.
    pub fn next_wake(&self) -> Time {
        let wakes = self.arrays.values().map(|array| match array.life {
            Life::Stuck(until, _) | Life::Waiting(until, _) => until,
            _ => array.live.next_wake(),
        });
        if self.closing { Time::NEVER } else { wakes.min().unwrap_or(Time::NEVER) }
    }

    /// All arrays as they are now, without what only their data paths know.
    pub fn view(&self) -> Vec<ArrayStatus> {
        self.arrays.values().map(view::status).collect()
    }

    fn boot(&mut self, records: Vec<(String, Result<ArraySpec, String>)>, effects: &mut Vec<Effect>) {
        for (name, record) in records {
            let array = match record {
                Ok(spec) => {
                    let mut array = Array::new(spec, Life::Stopped);
                    self.resume(&mut array, effects);
                    array
                }
                Err(why) => Array::new(plan::nameless(&name), Life::Corrupt(why)),
            };
            self.arrays.insert(name, array);
        }
    }

    /// Goes on in the background with what the record says is to be done.
    fn resume(&mut self, array: &mut Array, effects: &mut Vec<Effect>) {
        let targets = array.targets();
        match array.spec.phase {
            Phase::Stopped => self.mend(array, effects),
            Phase::Started => {
                let life = Life::Checking(None, array.spec.run.clone(), Terms::default());
                self.work(array, life, Work::Survey(targets), effects);
            }
            Phase::Creating => {
                let why = Refusal::new(Errno::ECANCELED, "dstd ended while the array was being created");
                let free = Work::Free(array.spec.id, targets);
                self.work(array, Life::Undoing(None, why), free, effects);
            }
            Phase::Removing => {
                let free = Work::Free(array.spec.id, array.held());
                self.work(array, Life::Freeing(None, false), free, effects);
            }
        }
    }

    fn tick(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.closing {
            return;
        }
        let due: Vec<String> = self
            .arrays
            .iter()
            .filter(|(_, array)| match array.life {
                Life::Stuck(until, _) | Life::Waiting(until, _) => until <= now,
                _ => array.is_served() && array.live.next_wake() <= now,
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            if let Some(mut array) = self.arrays.remove(&name) {
                match array.is_served() {
                    true => self.tick_live(&mut array, now, effects),
                    false => self.resume(&mut array, effects),
                }
                self.arrays.insert(name, array);
            }
        }
    }

    fn close(&mut self, effects: &mut Vec<Effect>) {
        self.closing = true;
        let names: Vec<String> = self.arrays.keys().cloned().collect();
        for name in names {
            if let Some(mut array) = self.arrays.remove(&name) {
                if let Life::Started(device) = &array.life {
                    let life = Life::Halting(None, device.clone());
                    let halt = array.halt(Halt::Leaving);
                    self.work(&mut array, life, halt, effects);
                }
                self.arrays.insert(name, array);
            }
        }
    }

    fn work(&mut self, array: &mut Array, life: Life, work: Work, effects: &mut Vec<Effect>) {
        self.next_job += 1;
        let job = JobId(self.next_job);
        self.jobs.insert(job, array.spec.name.clone());
        array.life = life;
        array.job = Some(job);
        effects.push(Effect::Work(job, work));
    }

    fn save(&mut self, array: &mut Array, phase: Phase, life: Life, effects: &mut Vec<Effect>) {
        array.spec.phase = phase;
        let record = Box::new(array.spec.clone());
        self.work(array, life, Work::Save(record), effects);
    }

    fn command(
        &mut self,
        ticket: Ticket,
        command: Command,
        (fresh, now): (Id, Time),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if self.closing {
            return Err(Refusal::new(Errno::ESHUTDOWN, "dstd is ending: try again when it runs"));
        }
        let name = match command {
            Command::Create(create) => return self.create(ticket, &create, fresh, effects),
            Command::Import(import) => return self.import(ticket, import, effects),
            Command::Start { ref name, .. } | Command::Stop { ref name, .. } | Command::Remove { ref name, .. } => name,
            Command::AddReplica { ref name, .. } | Command::RemoveReplica { ref name, .. } => name,
            Command::AddNode { ref name, .. } | Command::RemoveNode { ref name, .. } | Command::Grow { ref name } => {
                name
            }
            Command::Node { ref name, .. } => name,
        };
        let Some(mut array) = self.arrays.remove(name) else {
            return Err(Refusal::no_such_array(name));
        };
        let name = array.spec.name.clone();
        let result = match command {
            Command::Start { run, terms, .. } => self.start(ticket, &mut array, run, terms, effects),
            Command::Stop { force, .. } => self.stop(ticket, &mut array, force, now, effects),
            Command::Remove { force, .. } => self.remove(ticket, &mut array, force, effects),
            Command::AddReplica { node, target, .. } if array.is_served() => {
                self.attach_replica(ticket, &mut array, (node, &target), now, effects)
            }
            Command::RemoveReplica { node, replica, .. } if array.is_served() => {
                self.detach_replica(ticket, &mut array, (node, replica), effects)
            }
            Command::AddReplica { node, target, .. } => self.add_replica(ticket, &mut array, node, &target, effects),
            Command::RemoveReplica { node, replica, .. } => {
                self.remove_replica(ticket, &mut array, (node, replica), fresh, effects)
            }
            Command::AddNode { target, size, .. } => self.add_node(ticket, &mut array, (&target, size), effects),
            Command::Grow { .. } => self.grow(ticket, &mut array, effects),
            Command::RemoveNode { node, .. } => self.remove_node(ticket, &mut array, node, effects),
            Command::Node { node, ask, .. } => self.ask_node(ticket, &mut array, (node, ask), (fresh, now), effects),
            Command::Create(_) | Command::Import(_) => Ok(()),
        };
        self.arrays.insert(name, array);
        result
    }

    fn create(&mut self, ticket: Ticket, create: &Create, id: Id, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        let spec = plan::draft(create, id)?;
        if let Some(array) = self.arrays.get(&create.name) {
            return Err(array.name_taken());
        }
        if self.arrays.len() >= limits::ARRAYS_MAX {
            return Err(plan::too_many());
        }
        let mut array = Array::new(spec, Life::Stopped);
        let survey = Work::Survey(array.targets());
        self.work(&mut array, Life::Surveying(ticket), survey, effects);
        self.arrays.insert(create.name.clone(), array);
        Ok(())
    }

    fn remove(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        force: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        match &array.life {
            Life::Stopped if force => {
                self.save(array, Phase::Removing, Life::Dooming(ticket, true), effects);
                Ok(())
            }
            Life::Stopped => {
                let survey = Work::Survey(array.held());
                self.work(array, Life::Visiting(ticket), survey, effects);
                Ok(())
            }
            Life::Stuck(..) if force => {
                let free = Work::Free(array.spec.id, array.held());
                self.work(array, Life::Freeing(Some(ticket), true), free, effects);
                Ok(())
            }
            Life::Started(_)
            | Life::Regrouping(_)
            | Life::Failed(_)
            | Life::Waiting(..)
            | Life::Checking(None, ..)
            | Life::Tracing(None, ..) => {
                let name = &array.spec.name;
                Err(Refusal::new(Errno::EBUSY, format!("array '{name}' is started: 'dst stop {name}' first")))
            }
            _ => Err(array.busy()),
        }
    }

    /// Forgets the work under way; its report will find nobody.
    fn give_up_job(&mut self, array: &mut Array) {
        if let Some(job) = array.job.take() {
            self.jobs.remove(&job);
        }
    }

    /// Takes the report of an array's work. `None`: the array is no more.
    fn advance(
        &mut self,
        mut array: Array,
        outcome: Outcome,
        fresh: Id,
        now: Time,
        effects: &mut Vec<Effect>,
    ) -> Option<Array> {
        match (array.life.clone(), outcome) {
            (Life::Surveying(ticket), Outcome::Surveyed(found)) => {
                if let Err(refusal) = plan::lay_out(&mut array.spec, &found) {
                    effects.push(Effect::Reply(ticket, Err(refusal)));
                    return None;
                }
                self.save(&mut array, Phase::Creating, Life::Recording(ticket), effects);
            }
            (Life::Recording(ticket), Outcome::Saved(Ok(()))) => {
                let assign = Work::Assign(array.members());
                self.work(&mut array, Life::Assigning(ticket), assign, effects);
            }
            (Life::Recording(ticket), Outcome::Saved(Err(why))) => {
                self.forget(&mut array, Some(ticket), Err(why), effects)
            }
            (Life::Assigning(ticket), Outcome::Assigned(results)) => match plan::first_error(&array.spec, &results) {
                None => {
                    plan::enlist(&mut array.spec, results.into_iter().flatten());
                    self.save(&mut array, Phase::Stopped, Life::Settling(ticket), effects);
                }
                Some(why) => self.undo(&mut array, ticket, why, effects),
            },
            (Life::Settling(ticket), Outcome::Saved(Ok(()))) => {
                array.life = Life::Stopped;
                let made = ArrayStatus { warnings: plan::shared_fate(&array.spec), ..view::status(&array) };
                effects.push(Effect::Reply(ticket, Ok(Answer::Array(Box::new(made)))));
            }
            (Life::Settling(ticket), Outcome::Saved(Err(why))) => {
                array.spec.phase = Phase::Creating;
                self.undo(&mut array, ticket, why, effects);
            }
            (Life::Undoing(asker, why), Outcome::Each(results)) => match plan::first_error(&array.spec, &results) {
                None => self.forget(&mut array, asker, Err(why), effects),
                Some(trouble) => {
                    let left = format!("its volumes could not be freed again yet: {trouble}");
                    array.stuck(asker, plan::half_done(&array.spec, &why, &left), left, now, effects);
                }
            },
            (Life::Forgetting(asker, answer), Outcome::Saved(Ok(()))) => {
                effects.extend(asker.map(|ticket| Effect::Reply(ticket, answer)));
                return None;
            }
            (Life::Forgetting(asker, _), Outcome::Saved(Err(trouble))) => {
                let left = format!("its record could not be removed yet: {trouble}");
                array.stuck(asker, plan::half_gone(&array.spec, &left), left, now, effects);
            }
            (Life::Visiting(ticket), Outcome::Surveyed(found)) => {
                match plan::check_removal(&array.spec, self.host, &found) {
                    Ok(()) => self.save(&mut array, Phase::Removing, Life::Dooming(ticket, false), effects),
                    Err(refusal) => {
                        array.life = Life::Stopped;
                        effects.push(Effect::Reply(ticket, Err(refusal)));
                    }
                }
            }
            (Life::Dooming(ticket, force), Outcome::Saved(Ok(()))) => {
                let free = Work::Free(array.spec.id, array.held());
                self.work(&mut array, Life::Freeing(Some(ticket), force), free, effects);
            }
            (Life::Dooming(ticket, _), Outcome::Saved(Err(why))) => {
                array.spec.phase = Phase::Stopped;
                array.life = Life::Stopped;
                effects.push(Effect::Reply(ticket, Err(why)));
            }
            (Life::Freeing(asker, force), Outcome::Each(results)) => {
                let trouble = plan::first_error(&array.spec, &results);
                match trouble {
                    Some(trouble) if !force => {
                        let left = format!("its volumes could not be freed yet: {trouble}");
                        array.stuck(asker, plan::half_gone(&array.spec, &left), left, now, effects);
                    }
                    _ => {
                        let warnings = plan::left_assigned(&array.spec, &results);
                        let removed = Removed { name: array.spec.name.clone(), warnings };
                        self.forget(&mut array, asker, Ok(Answer::Removed(removed)), effects);
                    }
                }
            }
            (Life::Adopting(ticket, warnings, former), Outcome::Saved(saved)) => {
                return self.adopted(array, (ticket, warnings, former), saved, effects);
            }
            (Life::Accepting(ticket, life, former), Outcome::Saved(saved)) => {
                array.accepted(ticket, *life, former, (saved, now), effects);
            }
            (Life::Measuring(ticket), Outcome::Surveyed(found)) => self.measured(&mut array, ticket, &found, effects),
            (Life::Promising(ticket), Outcome::Saved(saved)) => Owner::promised(&mut array, ticket, saved, effects),
            (Life::Mending, Outcome::Each(results)) => self.mended(&mut array, &results, effects),
            (Life::Mended, Outcome::Saved(_)) => array.life = Life::Stopped,
            (Life::Changing(ticket, node, change), outcome) => {
                self.advance_change(&mut array, (ticket, node, change), outcome, effects);
            }
            (_, outcome) => self.advance_run(&mut array, outcome, fresh, now, effects),
        }
        Some(array)
    }

    fn undo(&mut self, array: &mut Array, ticket: Ticket, why: Refusal, effects: &mut Vec<Effect>) {
        let free = Work::Free(array.spec.id, array.targets());
        self.work(array, Life::Undoing(Some(ticket), why), free, effects);
    }

    fn forget(
        &mut self,
        array: &mut Array,
        asker: Option<Ticket>,
        answer: Result<Answer, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let forget = Work::Forget(array.spec.name.clone());
        self.work(array, Life::Forgetting(asker, answer), forget, effects);
    }
}

impl Array {
    fn new(spec: ArraySpec, life: Life) -> Array {
        Array {
            spec,
            life,
            job: None,
            tries: 0,
            trouble: None,
            stop: None,
            claim: None,
            was_clean: false,
            was_shown: None,
            regroup: None,
            live: Live::default(),
            traces: Vec::new(),
            watched: None,
            room: None,
            late: BTreeMap::new(),
        }
    }

    fn targets(&self) -> Vec<Target> {
        self.spec.replicas().map(|(_, replica)| replica.target.clone()).collect()
    }

    /// Every volume that is or may be its own.
    fn held(&self) -> Vec<Target> {
        self.spec.held().map(|(_, target)| target.clone()).collect()
    }

    fn members(&self) -> Vec<(Target, Member)> {
        let member = |node: String| Member { id: self.spec.id, name: self.spec.name.clone(), node };
        let of = |(node, replica): (&NodeSpec, &ReplicaSpec)| (replica.target.clone(), member(node.start.to_string()));
        self.spec.replicas().map(of).collect()
    }

    fn answer(&self) -> Answer {
        Answer::Array(Box::new(view::status(self)))
    }

    fn stuck(&mut self, asker: Option<Ticket>, answer: Refusal, why: String, now: Time, effects: &mut Vec<Effect>) {
        self.trouble = Some(why.clone());
        self.life = Life::Stuck(self.back_off(now), why);
        effects.extend(asker.map(|ticket| Effect::Reply(ticket, Err(answer))));
    }

    fn back_off(&mut self, now: Time) -> Time {
        let wait = limits::RECONNECT_MIN * (1 << self.tries.min(10));
        self.tries += 1;
        now.after(wait.min(limits::RECONNECT_MAX))
    }

    fn name_taken(&self) -> Refusal {
        let name = &self.spec.name;
        let text = match &self.life {
            Life::Corrupt(why) => format!("the name '{name}' is taken, and {why}"),
            _ => format!("there is an array '{name}' already: choose another name, or 'dst remove {name}' first"),
        };
        Refusal::new(Errno::EEXIST, text)
    }

    /// What is said of a start that nobody waits for.
    fn in_background(&self) -> String {
        let (name, why) = (&self.spec.name, self.trouble.as_deref().unwrap_or("its first try"));
        format!("array '{name}' is being started in the background ({why}): wait, or give up with 'dst stop {name}'")
    }

    /// Why nothing can be asked of the array now.
    fn busy(&self) -> Refusal {
        let name = &self.spec.name;
        let text = match &self.life {
            Life::Corrupt(why) => return Refusal::new(Errno::EIO, format!("array '{name}': {why}")),
            // One of its tries may be under way.
            Life::Waiting(..) | Life::Checking(None, ..) | Life::Minting(None, _) => self.in_background(),
            Life::Tracing(None, ..) | Life::Fencing(None, ..) => self.in_background(),
            Life::Claiming(None, _) | Life::Labelling(None, ..) | Life::Launching(None) => self.in_background(),
            Life::Stuck(_, why) => format!(
                "array '{name}' is being removed in the background ({why}): wait, or forget it with 'dst remove {name} --force'"
            ),
            _ => format!("array '{name}' is busy ({}): try again when that is done", view::state(&self.life).word()),
        };
        Refusal::new(Errno::EBUSY, text)
    }
}
