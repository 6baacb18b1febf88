//! The owner's part that gives a stopped array's node a further replica, or takes one away.
//!
//! In between the record has a replica without a volume: it has nothing, and is never started with. *Adding* writes it so, assigns
//! the volume, writes the volume's id. *Removing* writes it so, frees the volume, writes the record without it. A daemon that finds
//! one frees its volume and takes it out, whichever it was. The labels learn of a change at the next start.

use super::{Array, Effect, Found, Life, Outcome, Owner, Ticket, Work, plan, view};
use crate::control::command::{Answer, Refusal};
use crate::control::replica::{ReplicaSpec, ReplicaState};
use crate::control::spec::{NodeSpec, Phase};
use crate::control::status::ArrayStatus;
use crate::control::target::Target;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Lba, NodeId, SECTOR_BYTES, format_size};
use crate::wire::volume::Member;

/// What is under way with a node's replicas.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Add: the target is asked what it is.
    Probing(Target),
    /// Add a node at the end: the same, for one of so many sectors; 0: all that there are.
    Extending(Target, u64),
    /// Add: the record is written with the replica.
    Growing,
    /// Add: its volume is assigned.
    Enlisting,
    /// Add: the record is written with the volume's id.
    Enlisted,
    /// Add failed: the record is written without the replica.
    Shrinking(Refusal),
    /// Remove: the record is written with the replica, but without its volume; the node as it was.
    Dropping(Box<NodeSpec>, usize),
    /// Remove: its volume is freed.
    Releasing(usize),
    /// Remove a node: the record is written without its volumes; the node as it was.
    Leaving(Box<NodeSpec>),
    /// Remove a node: they are freed.
    Vacating,
    /// Remove: the record is written without the replica; then this is said.
    Dropped(Vec<String>),
}

/// A replica that has nothing of the node.
const EMPTY: ReplicaState = ReplicaState::Syncing { from: Lba(0) };

impl Owner {
    /// Ends a change that was cut off by the end of the daemon that made it, if there is one.
    pub(super) fn mend(&mut self, array: &mut Array, effects: &mut Vec<Effect>) {
        let half = array.spec.replicas().filter(|(_, replica)| replica.volume.is_nil());
        let half: Vec<Target> = half.map(|(_, replica)| replica.target.clone()).collect();
        if half.is_empty() {
            array.life = Life::Stopped;
            return;
        }
        self.work(array, Life::Mending, Work::Free(array.spec.id, half), effects);
    }

    /// The volumes of such changes are free, or could not be freed: then the start is refused by their names.
    pub(super) fn mended(&mut self, array: &mut Array, results: &[Result<(), Refusal>], effects: &mut Vec<Effect>) {
        if results.iter().any(Result::is_err) {
            array.life = Life::Stopped;
            return;
        }
        for node in &mut array.spec.nodes {
            node.replicas.retain(|replica| !replica.volume.is_nil());
        }
        array.spec.nodes.retain(|node| !node.replicas.is_empty());
        self.save(array, Phase::Stopped, Life::Mended, effects);
    }

    pub(super) fn add_replica(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        node: NodeId,
        target: &str,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let at = array.stopped_node(node)?;
        let target = addable(array, at, target)?;
        let survey = Work::Survey(vec![target.clone()]);
        self.work(array, Life::Changing(ticket, at, Change::Probing(target)), survey, effects);
        Ok(())
    }

    pub(super) fn remove_replica(
        &mut self,
        ticket: Ticket,
        array: &mut Array,
        (node, replica): (NodeId, usize),
        fresh: Id,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let at = array.stopped_node(node)?;
        let in_sync = removable(array, at, replica)?.state.is_in_sync();
        let spec = &mut array.spec.nodes[at];
        let former = Box::new(spec.clone());
        if in_sync {
            spec.generation = spec.generation.next(fresh);
        }
        let (target, volume) = (spec.replicas[replica].target.clone(), Id::NIL);
        spec.replicas[replica] = ReplicaSpec { target, volume, state: EMPTY };
        self.save(array, Phase::Stopped, Life::Changing(ticket, at, Change::Dropping(former, replica)), effects);
        Ok(())
    }

    /// The part of [`Owner::advance`] that changes replicas.
    pub(super) fn advance_change(
        &mut self,
        array: &mut Array,
        (ticket, at, change): (Ticket, usize, Change),
        outcome: Outcome,
        effects: &mut Vec<Effect>,
    ) {
        let next = |change| Life::Changing(ticket, at, change);
        match (change, outcome) {
            (Change::Probing(target), Outcome::Surveyed(found)) => {
                match fit(array, at, &target, found.into_iter().next()) {
                    Ok(()) => {
                        let state = ReplicaState::Syncing { from: Lba(0) };
                        array.spec.nodes[at].replicas.push(ReplicaSpec { target, volume: Id::NIL, state });
                        self.save(array, Phase::Stopped, next(Change::Growing), effects);
                    }
                    Err(refusal) => array.unchanged(ticket, refusal, effects),
                }
            }
            (Change::Extending(target, sectors), Outcome::Surveyed(found)) => {
                match array.new_node(target, sectors, found.into_iter().next()) {
                    Ok(node) => {
                        array.spec.nodes.push(node);
                        self.save(array, Phase::Stopped, next(Change::Growing), effects);
                    }
                    Err(refusal) => array.unchanged(ticket, refusal, effects),
                }
            }
            (Change::Growing, Outcome::Saved(Ok(()))) => {
                let (id, name) = (array.spec.id, array.spec.name.clone());
                let node = &array.spec.nodes[at];
                let member = Member { id, name, node: node.start.to_string() };
                let added = node.replicas.last().map(|replica| (replica.target.clone(), member));
                let assign = Work::Assign(added.into_iter().collect());
                self.work(array, next(Change::Enlisting), assign, effects);
            }
            (Change::Growing, Outcome::Saved(Err(why))) => {
                array.take_back(at);
                array.unchanged(ticket, why, effects);
            }
            (Change::Enlisting, Outcome::Assigned(results)) => match results.into_iter().next() {
                Some(Ok(enlisted)) => {
                    if let Some(added) = array.spec.nodes[at].replicas.last_mut() {
                        added.volume = enlisted.volume;
                    }
                    self.save(array, Phase::Stopped, next(Change::Enlisted), effects);
                }
                other => {
                    let why = other.and_then(Result::err);
                    let why = why.unwrap_or_else(|| Refusal::new(Errno::EIO, "its volume was not assigned"));
                    array.take_back(at);
                    self.save(array, Phase::Stopped, next(Change::Shrinking(why)), effects);
                }
            },
            (Change::Enlisted, Outcome::Saved(Ok(()))) => {
                array.life = Life::Stopped;
                let status = ArrayStatus { warnings: plan::shared_fate(&array.spec), ..view::status(array) };
                effects.push(Effect::Reply(ticket, Ok(Answer::Array(Box::new(status)))));
            }
            (Change::Enlisted, Outcome::Saved(Err(why))) => {
                // As it is in the record: known, and not to be used.
                let node = &mut array.spec.nodes[at];
                if let Some(added) = node.replicas.last_mut() {
                    added.volume = Id::NIL;
                }
                let (name, start, replica) = (&array.spec.name, node.start, node.replicas.len() - 1);
                let text = match replica {
                    0 => format!(
                        "{why}. Node {start} is half added: start dstd again when there is room, and add it again"
                    ),
                    _ => format!(
                        "{why}. The replica is half added: 'dst replica remove {name} {start} {replica}', and add it again"
                    ),
                };
                array.unchanged(ticket, Refusal::new(why.errno, text), effects);
            }
            (Change::Shrinking(why), Outcome::Saved(_)) => array.unchanged(ticket, why, effects),
            (Change::Dropping(_, replica), Outcome::Saved(Ok(()))) => {
                let free = Work::Free(array.spec.id, vec![array.spec.nodes[at].replicas[replica].target.clone()]);
                self.work(array, next(Change::Releasing(replica)), free, effects);
            }
            (Change::Dropping(former, _), Outcome::Saved(Err(why))) => {
                array.spec.nodes[at] = *former;
                array.unchanged(ticket, why, effects);
            }
            (Change::Releasing(replica), Outcome::Each(results)) => {
                let gone = array.spec.nodes[at].replicas.remove(replica);
                let failed = results.into_iter().next().and_then(Result::err);
                let warnings = failed.map(|why| plan::left(&gone.target, &array.spec.name, &why)).into_iter().collect();
                self.save(array, Phase::Stopped, next(Change::Dropped(warnings)), effects);
            }
            (Change::Leaving(_), Outcome::Saved(Ok(()))) => {
                let targets = array.spec.nodes[at].replicas.iter().map(|replica| replica.target.clone()).collect();
                self.work(array, next(Change::Vacating), Work::Free(array.spec.id, targets), effects);
            }
            (Change::Leaving(former), Outcome::Saved(Err(why))) => {
                array.spec.nodes[at] = *former;
                array.unchanged(ticket, why, effects);
            }
            (Change::Vacating, Outcome::Each(results)) => {
                let gone = array.spec.nodes.remove(at);
                let left = gone.replicas.iter().zip(results).filter_map(|(replica, result)| {
                    Some(plan::left(&replica.target, &array.spec.name, &result.err()?))
                });
                let warnings = left.collect();
                self.save(array, Phase::Stopped, next(Change::Dropped(warnings)), effects);
            }
            (Change::Dropped(warnings), Outcome::Saved(Ok(()))) => {
                array.life = Life::Stopped;
                let status = ArrayStatus { warnings, ..view::status(array) };
                effects.push(Effect::Reply(ticket, Ok(Answer::Array(Box::new(status)))));
            }
            (Change::Dropped(_), Outcome::Saved(Err(why))) => {
                let text =
                    format!("{why}. It is gone, and the record here still has it: start dstd again when there is room");
                array.unchanged(ticket, Refusal::new(why.errno, text), effects);
            }
            (change, outcome) => debug_assert!(false, "{change:?} does not expect {outcome:?}"),
        }
    }
}

/// The target that is to be a further replica of a node, if there can be one more.
pub(super) fn addable(array: &Array, at: usize, target: &str) -> Result<Target, Refusal> {
    let target: Target = target.parse().map_err(|why: String| Refusal::new(Errno::EINVAL, why))?;
    let (count, node) = (array.spec.nodes[at].replicas.len(), array.spec.nodes[at].start);
    if count >= limits::REPLICAS_MAX {
        let text = format!("node {node} has {count} replicas already, the most there can be: remove one first");
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    if let Some((other, _)) = array.spec.replicas().find(|(_, replica)| replica.target == target) {
        let text = format!("{target} is a replica of node {} already", other.start);
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    array.unused(&target)?;
    Ok(target)
}

/// A replica that the node can do without.
pub(super) fn removable(array: &Array, at: usize, replica: usize) -> Result<&ReplicaSpec, Refusal> {
    let (name, spec) = (&array.spec.name, &array.spec.nodes[at]);
    let node = spec.start;
    let Some(gone) = spec.replicas.get(replica) else {
        let text = format!("node {node} has no replica {replica}: 'dst replica list {name}' shows those there are");
        return Err(Refusal::new(Errno::ENOENT, text));
    };
    let others = spec.replicas.iter().enumerate().filter(|(other, _)| *other != replica);
    if !others.map(|(_, replica)| replica.state).any(ReplicaState::is_in_sync) {
        let text = format!(
            "replica {replica} of node {node} ({}) is the last one that is in sync: without it the node's data is lost. Add another and let \
             it fill first, or 'dst remove {name}' the array",
            gone.target
        );
        return Err(Refusal::new(Errno::EBUSY, text));
    }
    Ok(gone)
}

/// Whether a target can become a replica of a node.
pub(super) fn fit(
    array: &Array,
    at: usize,
    target: &Target,
    found: Option<Result<Found, Refusal>>,
) -> Result<(), Refusal> {
    let found = found.unwrap_or_else(|| Err(Refusal::new(Errno::EIO, "it was not asked")));
    let refuse = |errno, why: String| Err(Refusal::new(errno, format!("{target}: {why}; nothing was changed")));
    let found = match found {
        Ok(found) => found,
        Err(why) => return refuse(why.errno, why.text),
    };
    let spec = &array.spec;
    if let Some((node, same)) =
        spec.replicas().find(|(_, replica)| !found.volume.is_nil() && replica.volume == found.volume)
    {
        return refuse(Errno::EINVAL, format!("it is the volume of node {} ({})", node.start, same.target));
    }
    if let Some(member) = &found.member {
        return refuse(Errno::EBUSY, plan::in_use(member, target));
    }
    let needed = spec.nodes[at].sectors;
    if found.sectors < needed {
        let (has, needs) = (format_size(found.sectors * SECTOR_BYTES), format_size(needed * SECTOR_BYTES));
        return refuse(Errno::EINVAL, format!("too small with {has}: the node has {needs}"));
    }
    Ok(())
}

impl Array {
    /// The place of a node of an array that is not in use.
    pub(super) fn stopped_node(&self, node: NodeId) -> Result<usize, Refusal> {
        self.check_stopped()?;
        self.place(node)
    }

    /// Whether it is not in use.
    pub(super) fn check_stopped(&self) -> Result<(), Refusal> {
        let name = &self.spec.name;
        match &self.life {
            Life::Stopped => Ok(()),
            Life::Started(_) => {
                let text = format!("array '{name}' is started: 'dst stop {name}' first");
                Err(Refusal::new(Errno::EBUSY, text))
            }
            Life::Failed(_) | Life::Waiting(..) => {
                let text = format!("array '{name}' is not stopped in order: 'dst stop {name}' first");
                Err(Refusal::new(Errno::EBUSY, text))
            }
            _ => Err(self.busy()),
        }
    }

    /// A change that came to nothing.
    fn unchanged(&mut self, ticket: Ticket, why: Refusal, effects: &mut Vec<Effect>) {
        self.life = Life::Stopped;
        effects.push(Effect::Reply(ticket, Err(why)));
    }
}
