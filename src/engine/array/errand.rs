//! The owner's part that changes the replicas of a node in use: makes a volume ready to be one, to take the place of one, or to be
//! moved to, and hands it to the data path.
//!
//! The order: the record says that the volume may be the array's ([`Debt`], or the transfer); it is made, assigned, claimed with the
//! array's present claim; the record says what it is; the data path has it. Whatever ends in between, the record knows
//! which volume is to be let go.

use super::live::After;
use super::{Array, Effect, Found, JobId, Outcome, Owner, Ticket, Work, plan, replicas};
use crate::control::command::Refusal;
use crate::control::node::Replace;
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::target::Target;
use crate::control::transfer::{Debt, Kept};
use crate::engine::steer::Steer;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Lba, NodeId, Time};
use crate::wire::session::features;
use crate::wire::volume::Member;

/// What for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A further replica.
    Add,
    /// A replica is to go.
    Remove(Id),
    /// It takes the place of this replica; said to have its data, or to be filled from others.
    Replace { old: Id, at: usize, same: bool },
    /// The node moves to it.
    Move,
}

/// How far it is.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// The target is still being let go after its last use.
    Waiting,
    /// It is asked what it is.
    Probing,
    /// The record is written: it may be the array's.
    Intending,
    /// Move: the record is written, in which it is not believed any more what was copied: this.
    Doubted(Kept),
    /// It is made.
    Making,
    /// It is assigned.
    Enlisting,
    /// Move: the record is written with its id.
    Enlisted,
    /// It is claimed.
    Joining,
    /// Move: its label is written.
    Labelling,
    /// Move: the labels of the node's replicas are written.
    Telling,
    /// The data path leaves the old replica.
    Leaving,
    /// The data path puts it in the place of the old one.
    Swapping,
    /// The record is written: it is a replica.
    Entering,
    /// Move: the record is written without it; then this is answered.
    Failing(Refusal),
}

/// Something under way with a node of an array in use.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) purpose: Purpose,
    pub(super) step: Step,
    /// The volume that is made ready.
    pub(super) target: Target,
    pub(super) volume: Id,
    /// The work under way.
    pub(super) job: Option<JobId>,
    /// Who asked for it.
    pub(super) ticket: Option<Ticket>,
    /// Who has asked to end it.
    pub(super) abort: Option<Ticket>,
}

impl Errand {
    /// Whether this volume must not be let go now.
    pub(super) fn needs(&self, target: &Target) -> bool {
        self.target == *target && !matches!(self.step, Step::Waiting) && !matches!(self.purpose, Purpose::Remove(_))
    }
}

/// What is done next.
pub(super) enum Next {
    /// Work.
    Work(Step, Work),
    /// The record is written.
    Save(Step),
    /// The data path has something to do.
    Steer(Step, Steer),
    /// That was all: the data path has it, the asker is answered.
    End(Option<Steer>, Vec<String>),
}

impl Owner {
    /// Gives a node of an array in use a further replica.
    pub(super) fn attach_replica(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (node, target): (NodeId, &str),
        now: Time,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let at = array.place(node)?;
        let target = replicas::addable(array, at, target)?;
        self.begin(array, at, Purpose::Add, target, Some(ticket), effects)?;
        self.pump(array, now, effects);
        Ok(())
    }

    /// Takes a replica from a node of an array in use.
    pub(super) fn detach_replica(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (node, replica): (NodeId, usize),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let at = array.place(node)?;
        array.free_of_errands(at)?;
        let gone = replicas::removable(array, at, replica)?;
        if let Some(transfer) = array.spec.nodes[at].transfer.as_ref().filter(|transfer| transfer.from == gone.volume) {
            let (name, number) = (&array.spec.name, transfer.status.number);
            let text = format!(
                "replica {replica} of node {node} is moving (migration {number}): 'dst migration abort {name} {node}' first"
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        let (volume, target) = (gone.volume, gone.target.clone());
        let (purpose, step) = (Purpose::Remove(volume), Step::Leaving);
        let errand = Errand { purpose, step, target, volume, job: None, ticket: Some(ticket), abort: None };
        array.live.errands.insert(at, errand);
        effects.push(Effect::Steer(array.spec.name.clone(), Steer::Detach { node: at, volume }));
        Ok(())
    }

    /// Puts another volume in the place of a suspended node's replica.
    pub(super) fn replace(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        at: usize,
        replace: &Replace,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let (name, spec) = (&array.spec.name, &array.spec.nodes[at]);
        let start = spec.start;
        let held = array.live.holds.get(&at).is_some_and(|hold| hold.frozen);
        if spec.suspend.as_ref().is_none_or(|suspend| suspend.failing) || !held {
            let text = format!("node {start} is not suspended: 'dst suspend {name} {start} --ttl none' first");
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        array.free_of_errands(at)?;
        if let Some(transfer) = &spec.transfer {
            let text = format!(
                "node {start} is moving (migration {}): 'dst migration abort {name} {start}' first",
                transfer.status.number
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        let replica = array.which_replica(at, replace.replica)?;
        let old = &spec.replicas[replica];
        let target: Target = replace.to.parse().map_err(|why: String| Refusal::new(Errno::EINVAL, why))?;
        array.unused(&target)?;
        let others = spec.replicas.iter().enumerate().filter(|(other, _)| *other != replica);
        let spare = others.clone().any(|(_, other)| other.state.is_in_sync());
        if !spare && !replace.force {
            let text = format!(
                "{} has the only copy of node {start}'s data that is in sync: replaced, it would be lost. To move it, 'dst migrate'; if you have \
                 copied it to {target} since the node was suspended, --force",
                old.target
            );
            return Err(Refusal::new(Errno::EPERM, text));
        }
        let same = replace.force && old.state.is_in_sync();
        let purpose = Purpose::Replace { old: old.volume, at: replica, same };
        self.begin(array, at, purpose, target, Some(ticket), effects)
    }

    /// Begins to make a volume ready.
    pub(super) fn begin(
        &mut self,
        array: &mut Array,
        at: usize,
        purpose: Purpose,
        target: Target,
        ticket: Option<Ticket>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        array.free_of_errands(at)?;
        let mut errand =
            Errand { purpose, step: Step::Waiting, target, volume: Id::NIL, job: None, ticket, abort: None };
        if array.spec.debts.iter().any(|debt| debt.target == errand.target) {
            array.live.payer.hurry();
        } else {
            errand.step = Step::Probing;
            errand.job = Some(self.side_work(array, Work::Survey(vec![errand.target.clone()]), effects));
        }
        array.live.errands.insert(at, errand);
        Ok(())
    }

    /// Work of a node's errand has ended.
    pub(super) fn errand_step(
        &mut self,
        array: &mut Array,
        node: usize,
        outcome: Outcome,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut errand) = array.live.errands.remove(&node) else { return };
        errand.job = None;
        let next = match errand.abort {
            Some(_) => Err(Refusal::new(Errno::ECANCELED, "it was asked to end")),
            None => self.after_work(array, node, &mut errand, outcome),
        };
        self.take(array, node, errand, next, now, effects);
    }

    fn after_work(
        &mut self,
        array: &mut Array,
        node: usize,
        errand: &mut Errand,
        outcome: Outcome,
    ) -> Result<Next, Refusal> {
        let one = |results: Vec<Result<(), Refusal>>| results.into_iter().next().unwrap_or(Ok(()));
        match (&errand.step, outcome) {
            (Step::Probing, Outcome::Surveyed(found)) => {
                let found = found.into_iter().next();
                match errand.purpose {
                    Purpose::Move => self.probed_move(array, node, errand, found),
                    _ => self.probed(array, node, errand, found),
                }
            }
            (Step::Making, Outcome::Each(results)) => {
                one(results)?;
                if let Some(transfer) = &mut array.spec.nodes[node].transfer {
                    transfer.made = true;
                }
                Ok(enlist(array, node, errand))
            }
            (Step::Enlisting, Outcome::Assigned(results)) => {
                let missing = || Err(Refusal::new(Errno::EIO, "its volume was not assigned"));
                let enlisted = results.into_iter().next().unwrap_or_else(missing)?;
                errand.volume = enlisted.volume;
                match enlisted.blank {
                    true => array.live.blank.insert(node),
                    false => array.live.blank.remove(&node),
                };
                match (&errand.purpose, &mut array.spec.nodes[node].transfer) {
                    (Purpose::Move, Some(transfer)) if transfer.to != errand.volume => {
                        transfer.to = errand.volume;
                        Ok(Next::Save(Step::Enlisted))
                    }
                    _ => join(array, errand),
                }
            }
            (Step::Joining, Outcome::Each(results)) => {
                one(results)?;
                self.joined(array, node, errand)
            }
            (Step::Labelling, Outcome::Each(results)) => one(results).and_then(|()| self.tell_siblings(array, node)),
            (Step::Telling, Outcome::Each(results)) => {
                results.into_iter().collect::<Result<(), Refusal>>()?;
                self.hand_over(array, node)
            }
            (step, outcome) => {
                debug_assert!(false, "{step:?} does not expect {outcome:?}");
                Err(Refusal::new(Errno::EIO, "an answer is not understood"))
            }
        }
    }

    /// A volume that may become a replica was looked at.
    fn probed(
        &mut self,
        array: &mut Array,
        node: usize,
        errand: &mut Errand,
        found: Option<Result<Found, Refusal>>,
    ) -> Result<Next, Refusal> {
        replicas::fit(array, node, &errand.target, found)?;
        let start = array.spec.nodes[node].start;
        let (target, volume) = (errand.target.clone(), Id::NIL);
        array.spec.debts.push(Debt { node: start, target, volume, remove: false, moved: None });
        Ok(Next::Save(Step::Intending))
    }

    fn joined(&mut self, array: &mut Array, node: usize, errand: &Errand) -> Result<Next, Refusal> {
        match errand.purpose {
            Purpose::Add | Purpose::Remove(_) => {
                let at = array.spec.nodes[node].replicas.len();
                array.enter(node, at, errand);
                Ok(Next::Save(Step::Entering))
            }
            Purpose::Replace { old, same: false, .. } => {
                Ok(Next::Steer(Step::Leaving, Steer::Detach { node, volume: old }))
            }
            Purpose::Replace { old, same: true, .. } => {
                let (to, target) = (errand.volume, errand.target.clone());
                Ok(Next::Steer(Step::Swapping, Steer::Replace { node, from: old, to, target }))
            }
            Purpose::Move => self.label_candidate(array, node),
        }
    }

    /// The record of a node's errand is written, or could not be.
    pub(super) fn errand_saved(
        &mut self,
        array: &mut Array,
        node: usize,
        record: &Result<(), Refusal>,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let Some(errand) = array.live.errands.remove(&node) else { return };
        let next = match (&errand.step, record) {
            (Step::Failing(why), _) => {
                let why = why.clone();
                effects.extend(errand.ticket.map(|ticket| Effect::Reply(ticket, Err(why))));
                let aborted = record.clone().map(|()| array.answer());
                effects.extend(errand.abort.map(|ticket| Effect::Reply(ticket, aborted)));
                return;
            }
            (Step::Intending, Err(why)) => {
                array.spec.debts.retain(|debt| debt.target != errand.target);
                if errand.purpose == Purpose::Move {
                    array.spec.nodes[node].transfer = None;
                }
                effects.extend(errand.ticket.map(|ticket| Effect::Reply(ticket, Err(why.clone()))));
                effects.extend(errand.abort.map(|ticket| Effect::Reply(ticket, Ok(array.answer()))));
                return;
            }
            (Step::Entering, Err(why)) => {
                let start = array.spec.nodes[node].start;
                array.spec.nodes[node].replicas.retain(|replica| replica.volume != errand.volume);
                let (target, volume) = (errand.target.clone(), errand.volume);
                array.spec.debts.push(Debt { node: start, target, volume, remove: false, moved: None });
                Err(why.clone())
            }
            (Step::Doubted(kept), Err(why)) => {
                // As it is in the record.
                if let Some(transfer) = &mut array.spec.nodes[node].transfer {
                    transfer.keep(Some(*kept));
                }
                Err(why.clone())
            }
            (_, Err(why)) => Err(why.clone()),
            _ if errand.abort.is_some() => Err(Refusal::new(Errno::ECANCELED, "it was asked to end")),
            (Step::Intending, Ok(())) => self.intended(array, node, &errand),
            (Step::Doubted(_), Ok(())) => Ok(enlist(array, node, &errand)),
            (Step::Enlisted, Ok(())) => join(array, &errand),
            (Step::Entering, Ok(())) => {
                let (target, volume) = (errand.target.clone(), errand.volume);
                Ok(Next::End(Some(Steer::Attach { node, target, volume }), plan::shared_fate(&array.spec)))
            }
            (step, Ok(())) => {
                debug_assert!(false, "{step:?} was not written");
                Err(Refusal::new(Errno::EIO, "a step of it is not understood"))
            }
        };
        self.take(array, node, errand, next, now, effects);
    }

    /// The target of a transfer that is gone on with is still as it was.
    pub(super) fn intended_again(&mut self, array: &mut Array, node: usize, errand: &Errand) -> Result<Next, Refusal> {
        Ok(enlist(array, node, errand))
    }

    fn intended(&mut self, array: &mut Array, node: usize, errand: &Errand) -> Result<Next, Refusal> {
        match &array.spec.nodes[node].transfer {
            // Moving back: the volume is the array's still, and claimed.
            Some(transfer) if errand.purpose == Purpose::Move && !transfer.to.is_nil() => {
                self.label_candidate(array, node)
            }
            Some(transfer) if errand.purpose == Purpose::Move && transfer.made => {
                let bytes = transfer.status.size.next_multiple_of(limits::VOLUME_BYTES_MULTIPLE);
                Ok(Next::Work(Step::Making, Work::Make(errand.target.clone(), bytes)))
            }
            _ => Ok(enlist(array, node, errand)),
        }
    }

    /// Does what is next.
    fn take(
        &mut self,
        array: &mut Array,
        node: usize,
        mut errand: Errand,
        next: Result<Next, Refusal>,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        match next {
            Ok(Next::Work(step, work)) => {
                errand.job = Some(self.side_work(array, work, effects));
                errand.step = step;
                array.live.errands.insert(node, errand);
            }
            Ok(Next::Save(step)) => {
                errand.step = step;
                array.live.errands.insert(node, errand);
                array.live.wanted.push(After::Errand(node));
            }
            Ok(Next::Steer(step, steer)) => {
                errand.step = step;
                effects.push(Effect::Steer(array.spec.name.clone(), steer));
                array.live.errands.insert(node, errand);
            }
            Ok(Next::End(steer, warnings)) => {
                effects.extend(steer.map(|steer| Effect::Steer(array.spec.name.clone(), steer)));
                array.live.payer.hurry();
                let answer = array.answer_with(warnings);
                effects.extend(errand.ticket.map(|ticket| Effect::Reply(ticket, Ok(answer))));
            }
            Err(why) if errand.purpose == Purpose::Move => self.not_ready(array, node, errand, why, now, effects),
            Err(why) => {
                // What was assigned is in the record as something to be let go.
                array.live.payer.hurry();
                effects.extend(errand.ticket.map(|ticket| Effect::Reply(ticket, Err(why))));
            }
        }
    }

    /// The data path uses a replica no more.
    pub(super) fn detached(
        &mut self,
        array: &mut Array,
        node: usize,
        volume: Id,
        now: Time,
        effects: &mut Vec<Effect>,
    ) {
        let ours = |errand: &Errand| match errand.purpose {
            Purpose::Remove(gone) => gone == volume,
            Purpose::Replace { old, .. } => old == volume && matches!(errand.step, Step::Leaving),
            Purpose::Add | Purpose::Move => false,
        };
        if !array.live.errands.get(&node).is_some_and(ours) {
            return self.let_go(array, node, volume, now);
        }
        let Some(errand) = array.live.errands.remove(&node) else { return };
        if let Purpose::Replace { at, .. } = errand.purpose {
            let at = at.min(array.spec.nodes[node].replicas.len());
            array.enter(node, at, &errand);
            return self.take(array, node, errand, Ok(Next::Save(Step::Entering)), now, effects);
        }
        match errand.ticket {
            Some(ticket) if array.spec.debts.iter().any(|debt| debt.target == errand.target) => {
                array.live.payer.wait(errand.target, ticket);
            }
            ticket => effects.extend(ticket.map(|ticket| Effect::Reply(ticket, Ok(array.answer())))),
        }
    }

    /// One replica has taken the place of another, or could not.
    pub(super) fn swapped(&mut self, array: &mut Array, node: usize, done: bool, now: Time, effects: &mut Vec<Effect>) {
        let Some(errand) = array.live.errands.remove(&node) else { return };
        let start = array.spec.nodes[node].start;
        let next = if done {
            Ok(Next::End(None, plan::shared_fate(&array.spec)))
        } else {
            let text = format!(
                "node {start} is not replaced: it was resumed, or its replicas have changed meanwhile; {} is let go again",
                errand.target
            );
            Err(Refusal::new(Errno::EBUSY, text))
        };
        self.take(array, node, errand, next, now, effects);
    }
}

/// Assigns the volume to the array.
fn enlist(array: &Array, node: usize, errand: &Errand) -> Next {
    let (id, name) = (array.spec.id, array.spec.name.clone());
    let member = Member { id, name, node: array.spec.nodes[node].start.to_string() };
    Next::Work(Step::Enlisting, Work::Assign(vec![(errand.target.clone(), member)]))
}

/// Claims the volume with the claim that the array runs under. It is one of several of its node.
fn join(array: &Array, errand: &Errand) -> Result<Next, Refusal> {
    let claim = array.claim.ok_or_else(|| Refusal::new(Errno::EIO, "the array has no claim"))?;
    let join = Work::Join(array.spec.id, claim, vec![(errand.target.clone(), features::of_node(2))]);
    Ok(Next::Work(Step::Joining, join))
}

impl Array {
    /// Whether the data path puts another volume in the place of a replica.
    pub(super) fn is_swapping(&self, node: usize) -> bool {
        self.live.errands.get(&node).is_some_and(|errand| matches!(errand.step, Step::Swapping))
    }

    /// One thing at a time for each node.
    pub(super) fn free_of_errands(&self, node: usize) -> Result<(), Refusal> {
        self.in_time(node)?;
        let Some(errand) = self.live.errands.get(&node) else { return Ok(()) };
        let what = match errand.purpose {
            Purpose::Add => "is getting a replica",
            Purpose::Remove(_) => "is losing a replica",
            Purpose::Replace { .. } => "is getting another replica",
            Purpose::Move => "is beginning to move",
        };
        let text = format!("node {} {what}: try again when that is done", self.spec.nodes[node].start);
        Err(Refusal::new(Errno::EBUSY, text))
    }

    /// A replica of a node, which must be named where there are several.
    pub(super) fn which_replica(&self, node: usize, replica: Option<usize>) -> Result<usize, Refusal> {
        let (name, spec) = (&self.spec.name, &self.spec.nodes[node]);
        let (start, count) = (spec.start, spec.replicas.len());
        match replica {
            None if count == 1 => Ok(0),
            None => {
                let text = format!(
                    "node {start} has {count} replicas: say which with --replica, as in 'dst replica list {name}'"
                );
                Err(Refusal::new(Errno::EINVAL, text))
            }
            Some(replica) if replica < count => Ok(replica),
            Some(replica) => {
                let text =
                    format!("node {start} has no replica {replica}: 'dst replica list {name}' shows those there are");
                Err(Refusal::new(Errno::ENOENT, text))
            }
        }
    }

    /// Refuses a target that the array uses already.
    pub(super) fn unused(&self, target: &Target) -> Result<(), Refusal> {
        let debts = self.spec.debts.len();
        let held: Vec<(String, &Target)> = self.spec.held().collect();
        // What is being let go is waited for.
        match held[..held.len() - debts].iter().find(|(_, other)| *other == target) {
            Some((what, _)) => Err(Refusal::new(Errno::EINVAL, format!("{target} is in use already, for {what}"))),
            None => Ok(()),
        }
    }

    /// The volume is a replica that has nothing yet, and no longer one to be let go.
    fn enter(&mut self, node: usize, at: usize, errand: &Errand) {
        let (target, volume) = (errand.target.clone(), errand.volume);
        self.spec.debts.retain(|debt| debt.target != target);
        let state = ReplicaState::Syncing { from: Lba(0) };
        self.spec.nodes[node].replicas.insert(at, ReplicaSpec { target, volume, state });
        self.live.polite.insert(node);
    }
}
