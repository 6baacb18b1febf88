//! The owner's part that brings an array back out of what its volumes know of it: `dst import`.
//!
//! One volume's label names others, theirs name more, until every node has been met. Which replicas are in sync, the newest label
//! of each node says; all that it calls in sync must have been seen, because one that was not may know of more.

use std::collections::BTreeMap;

use super::{Array, Effect, Found, JobId, Life, Outcome, Owner, Ticket, Work, plan, view};
use crate::bugs::{Bug, planted};
use crate::control::command::{Answer, Import, Refusal};
use crate::control::member::{MemberLabel, NodeLabel, TransferLabel, TransferRole};
use crate::control::migration::MigrationStatus;
use crate::control::node::Migrate;
use crate::control::replica::{ReplicaSpec, ReplicaState, Standing};
use crate::control::spec::{ArraySpec, NodeSpec, Phase, RunOptions};
use crate::control::status::ArrayStatus;
use crate::control::target::Target;
use crate::control::transfer::{Stage, Transfer};
use crate::engine::losses::Memory;
use crate::errno::Errno;
use crate::limits;
use crate::units::{Epoch, Id, SECTOR_BYTES, format_size};

/// What every target that was asked has answered.
type Known = BTreeMap<Target, Result<Found, Refusal>>;

/// An import under way: not an array yet, it has no name.
pub(super) struct Gathering {
    ticket: Ticket,
    first: Target,
    name: Option<String>,
    force: bool,
    asked: Vec<Target>,
    known: Known,
}

/// What an import does next.
enum Step {
    /// Asks targets that a label has named.
    Ask(Vec<Target>),
    /// All nodes have been met: the record, what to say about it, and the epoch of the last label.
    Whole(Box<ArraySpec>, Vec<String>, Epoch),
}

/// A label with the volume that has it.
struct Told<'a> {
    target: &'a Target,
    label: MemberLabel,
}

impl Owner {
    pub(super) fn import(&mut self, ticket: Ticket, import: Import, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        let invalid = |text: String| Refusal::new(Errno::EINVAL, text);
        let first: Target = import.target.parse().map_err(invalid)?;
        if let Some(name) = &import.name {
            crate::units::check_name(name).map_err(invalid)?;
        }
        let (name, force, asked) = (import.name, import.force, vec![first.clone()]);
        self.ask(Gathering { ticket, first, name, force, asked, known: Known::new() }, effects);
        Ok(())
    }

    fn ask(&mut self, gathering: Gathering, effects: &mut Vec<Effect>) {
        self.next_job += 1;
        let job = JobId(self.next_job);
        effects.push(Effect::Work(job, Work::Survey(gathering.asked.clone())));
        self.imports.insert(job, gathering);
    }

    /// Takes the answers of the targets that were asked.
    pub(super) fn gather(&mut self, mut gathering: Gathering, outcome: Outcome, effects: &mut Vec<Effect>) {
        let Outcome::Surveyed(found) = outcome else {
            debug_assert!(false, "an import does not expect {outcome:?}");
            return;
        };
        let ticket = gathering.ticket;
        gathering.known.extend(std::mem::take(&mut gathering.asked).into_iter().zip(found));
        let next = match self.closing {
            true => Err(Refusal::new(Errno::ESHUTDOWN, "dstd is ending: nothing was imported")),
            false => step(&gathering, self.host),
        };
        let adopted = match next {
            Ok(Step::Ask(targets)) => {
                gathering.asked = targets;
                return self.ask(gathering, effects);
            }
            Ok(Step::Whole(spec, warnings, told)) => self.adopt(ticket, *spec, (warnings, told), effects),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = adopted {
            effects.push(Effect::Reply(ticket, Err(refusal)));
        }
    }

    /// Makes the record this machine's, in place of a stale one of the same array.
    fn adopt(
        &mut self,
        ticket: Ticket,
        spec: ArraySpec,
        (warnings, told): (Vec<String>, Epoch),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let name = spec.name.clone();
        if let Some(other) = self.arrays.values().find(|array| array.spec.id == spec.id && array.spec.name != name) {
            let text = format!("this array is here already, as '{}': import it under that name", other.spec.name);
            return Err(Refusal::new(Errno::EEXIST, text));
        }
        let former = match self.arrays.get(&name) {
            None if self.arrays.len() >= limits::ARRAYS_MAX => return Err(plan::too_many()),
            None => None,
            Some(array) if array.spec.id != spec.id => return Err(array.name_taken()),
            Some(array) if !matches!(array.life, Life::Stopped) => {
                let text = format!("array '{name}' is here and in use: 'dst stop {name}' first");
                return Err(Refusal::new(Errno::EBUSY, text));
            }
            Some(array) => {
                supersedes(&spec, told, &array.spec)?;
                Some(Box::new(array.spec.clone()))
            }
        };
        let mut array = Array::new(spec, Life::Stopped);
        self.save(&mut array, Phase::Stopped, Life::Adopting(ticket, warnings, former), effects);
        self.arrays.insert(name, array);
        Ok(())
    }

    /// The record is written, or not. `None`: the array is no more.
    pub(super) fn adopted(
        &mut self,
        mut array: Array,
        (ticket, warnings, former): (Ticket, Vec<String>, Option<Box<ArraySpec>>),
        saved: Result<(), Refusal>,
        effects: &mut Vec<Effect>,
    ) -> Option<Array> {
        array.life = Life::Stopped;
        match saved {
            Ok(()) => {
                let status = ArrayStatus { warnings, ..view::status(&array) };
                effects.push(Effect::Reply(ticket, Ok(Answer::Array(Box::new(status)))));
                Some(array)
            }
            Err(why) => {
                effects.push(Effect::Reply(ticket, Err(why)));
                array.spec = *former?;
                Some(array)
            }
        }
    }
}

/// Whether what the labels say may take the place of the record that is here. If another host has begun since, what the record says beyond them
/// was never completed.
fn supersedes(labels: &ArraySpec, last: Epoch, record: &ArraySpec) -> Result<(), Refusal> {
    for (told, here) in labels.nodes.iter().zip(&record.nodes) {
        let why = match told.generation.standing(&here.generation) {
            Standing::Same | Standing::Newer => continue,
            Standing::Older if last > record.epoch => continue,
            Standing::Older => "the record here is newer than the labels: 'dst start' goes on with it",
            Standing::Split => {
                "split brain: neither the labels nor the record here come from the other. To keep what the volumes have, stop dstd, move \
                 the array's record away, and import again"
            }
        };
        return Err(Refusal::new(Errno::EEXIST, format!("array '{}', node {}: {why}", record.name, here.start)));
    }
    Ok(())
}

fn refuse<T>(errno: Errno, why: &str) -> Result<T, Refusal> {
    Err(Refusal::new(errno, format!("nothing was imported: {why}")))
}

/// The label of a volume of the array, if it is this volume's own.
fn told<'a>(array: Id, target: &'a Target, found: &Found) -> Option<Told<'a>> {
    let label = MemberLabel::decode(found.label.as_deref()?).ok()?;
    let own = label.node()?.replicas.get(label.replica)?.volume == found.volume;
    let ours = found.member.as_ref().is_some_and(|member| member.id == array) && label.array == array;
    (own && ours && left(found).is_none()).then_some(Told { target, label })
}

/// The array that the first volume belongs to.
fn identity(first: &Target, known: &Known) -> Result<Id, Refusal> {
    let found = match known.get(first) {
        Some(Ok(found)) => found,
        Some(Err(why)) => return refuse(why.errno, &format!("{first}: {}", why.text)),
        None => return refuse(Errno::EINVAL, &format!("{first} was not asked")),
    };
    let Some(member) = &found.member else {
        return match left(found) {
            Some(label) => Ok(label.array),
            None => refuse(Errno::EINVAL, &format!("{first} belongs to no array")),
        };
    };
    let Some(text) = &found.label else {
        let why = format!(
            "{first} belongs to array '{}', but has no label: labels are written when an array is started, and this one never was, so \
             it has no data. Free the volume and create the array anew",
            member.name
        );
        return refuse(Errno::EINVAL, &why);
    };
    let label = match MemberLabel::decode(text) {
        Ok(label) => label,
        Err(bad) => return refuse(Errno::EIO, &format!("the label of {first} is {bad}")),
    };
    if label.array == member.id && label.transfer.is_some_and(|transfer| transfer.role == TransferRole::Candidate) {
        // Its label names those that have the data.
        return Ok(member.id);
    }
    if told(member.id, first, found).is_none() {
        let why =
            format!("{first} has the label of another volume: it is a copy, or was made again; it is not this array's");
        return refuse(Errno::EINVAL, &why);
    }
    Ok(member.id)
}

fn step(gathering: &Gathering, host: Id) -> Result<Step, Refusal> {
    let Gathering { first, known, force, .. } = gathering;
    let array = identity(first, known)?;
    let all = known.iter().filter_map(|(target, found)| told(array, target, found.as_ref().ok()?));
    let labels: Vec<Told<'_>> = all.collect();
    // Volumes that are no replicas, and know of some: one that was left, and one that was to take its place.
    let aside: Vec<MemberLabel> =
        known.values().flatten().filter_map(left).filter(|label| label.array == array).collect();
    let all = || labels.iter().map(|told| &told.label).chain(&aside);
    let named = all().flat_map(|label| &label.nodes).flat_map(|node| &node.replicas).map(|replica| &replica.target);
    let named = named.chain(all().filter_map(|label| label.transfer.as_ref()).map(|transfer| &transfer.to));
    let ask: std::collections::BTreeSet<&Target> = named.filter(|target| !known.contains_key(*target)).collect();
    if !ask.is_empty() {
        if known.len() + ask.len() > limits::NODES_MAX * limits::REPLICAS_MAX {
            return refuse(Errno::EOVERFLOW, "the labels name more volumes than an array can have");
        }
        return Ok(Step::Ask(ask.into_iter().cloned().collect()));
    }
    let Some(last) = labels.iter().max_by_key(|told| told.label.epoch) else {
        return refuse(Errno::EIO, "no label can be used");
    };
    let like = &last.label;
    let differs = |told: &&Told<'_>| {
        let label = &told.label;
        (label.alg, label.chunk, label.block, label.count) != (like.alg, like.chunk, like.block, like.count)
    };
    if let Some(other) = labels.iter().find(differs) {
        return refuse(
            Errno::EIO,
            &format!("the labels of {} and {} describe different arrays", last.target, other.target),
        );
    }
    let mut warnings = Vec::new();
    let nodes = (0..like.count).map(|at| node(at, &labels, known, *force, &mut warnings)).collect::<Result<_, _>>()?;
    let claims =
        known.values().flatten().filter(|found| found.member.as_ref().is_some_and(|member| member.id == array));
    let claims: Vec<_> = claims.filter_map(|found| found.claim).collect();
    if let Some(claim) = claims.iter().find(|claim| claim.host != host) {
        let by = format!("host {}, epoch {}", claim.host, claim.epoch.0);
        warnings.push(format!("its volumes are claimed by another host ({by}): 'dst start --take-over' takes them"));
    }
    let epoch = claims.iter().map(|claim| claim.epoch).fold(like.epoch, Epoch::max);
    let spec = ArraySpec {
        name: gathering.name.clone().unwrap_or_else(|| like.name.clone()),
        id: array,
        phase: Phase::Stopped,
        alg: like.alg,
        chunk: like.chunk,
        block: like.block,
        epoch,
        nodes,
        clean: false,
        memory: Memory::default(),
        debts: Vec::new(),
        migrations: Vec::new(),
        migrated: 0,
        grow: false,
        run: RunOptions::default(),
    };
    if let Err(bad) = plan::geometry(&spec) {
        return refuse(Errno::EIO, &format!("the labels describe an array that cannot be: {bad}"));
    }
    Ok(Step::Whole(Box::new(spec), warnings, like.epoch))
}

/// One node as its newest label describes it, if what it calls in sync has been seen.
fn node(
    at: usize,
    labels: &[Told<'_>],
    known: &Known,
    force: bool,
    warnings: &mut Vec<String>,
) -> Result<NodeSpec, Refusal> {
    let own: Vec<&Told<'_>> =
        labels.iter().filter(|told| told.label.node().is_some_and(|node| node.at == at)).collect();
    let newest = own.iter().filter(|told| {
        let newer = |other: &&Told<'_>| {
            matches!(told.label.generation.standing(&other.label.generation), Standing::Same | Standing::Newer)
        };
        own.iter().all(newer)
    });
    let newest = newest.max_by_key(|told| told.label.epoch);
    let newest = if planted(Bug::ImportByAnyLabel) { own.first() } else { newest };
    let Some(newest) = newest else {
        let Some(one) = own.first() else { return unmet(at, labels, known) };
        let split = |told: &&&Told<'_>| told.label.generation.standing(&one.label.generation) == Standing::Split;
        let other = own.iter().find(split).map_or_else(|| one.target.to_string(), |told| told.target.to_string());
        let why = format!(
            "split brain: the labels of {} and {other} have generations of which neither came from the other: each side may have \
             acknowledged writes that the other lacks. Import nothing until you have chosen: free the volume that loses with 'dst volume free'",
            one.target
        );
        return refuse(Errno::EBUSY, &why);
    };
    let label = newest.label.node().ok_or_else(|| Refusal::new(Errno::EIO, "a label without its node"))?;
    let array = newest.label.array;
    let moving = newest.label.transfer.as_ref().filter(|transfer| transfer.role == TransferRole::Open);
    let transfer = match moving {
        Some(moving) => open(label, moving, (array, known), force, warnings)?,
        None => None,
    };
    let mut seen = 0;
    for replica in &label.replicas {
        let what = format!("node {} ({})", label.start, replica.target);
        match (met(array, known, replica, label.sectors), replica.state.is_in_sync()) {
            (Ok(()), true) => seen += 1,
            (Ok(()), false) => warnings.push(format!("{what} is {}", replica.state.word())),
            (Err(why), false) => {
                warnings.push(format!("{what}, which is {}, cannot be used: {why}", replica.state.word()))
            }
            (Err(why), true) if force => warnings.push(format!("{what}, which is in sync, was not seen: {why}")),
            (Err(why), true) => {
                let text = format!(
                    "{what}: {why}. The others call it in sync, so it may know of more than they do: bring it back, or import with --force"
                );
                return refuse(why.errno, &text);
            }
        }
    }
    if seen == 0 {
        let why = format!("node {}: none of its replicas that are in sync was seen", label.start);
        return refuse(Errno::ENOENT, &why);
    }
    let (start, sectors, mut replicas) = (label.start, label.sectors, label.replicas.clone());
    if planted(Bug::ImportTrustsAll) {
        replicas.iter_mut().for_each(|replica| replica.state = ReplicaState::InSync);
    }
    let generation = newest.label.generation.clone();
    Ok(NodeSpec { start, sectors, replicas, generation, suspend: None, transfer, scrub: None })
}

/// The node was moving. Its own volumes are the ones to go by unless the target says that it has taken their place; what it says
/// must have been seen. Had it said so, its label would be the newest. The start asks it again under a claim, and goes on.
fn open(
    node: &NodeLabel,
    transfer: &TransferLabel,
    (array, known): (Id, &Known),
    force: bool,
    warnings: &mut Vec<String>,
) -> Result<Option<Transfer>, Refusal> {
    let (start, to) = (node.start, &transfer.to);
    match known.get(to) {
        Some(Ok(found))
            if found.member.as_ref().is_some_and(|member| member.id == array) && found.volume == transfer.volume =>
        {
            warnings.push(format!("node {start} was moving to {to}: that begins anew with the start"));
        }
        // It was let go, or is another one's.
        Some(Ok(_)) => return Ok(None),
        Some(Err(why)) if why.errno == Errno::ENOENT => return Ok(None),
        Some(Err(why)) if !force => {
            let text = format!(
                "node {start} was moving to {to}, which was not seen: {why}. It may be where the data is now: bring it back, or import with --force, \
                 your word that it had not taken over"
            );
            return refuse(why.errno, &text);
        }
        _ => warnings.push(format!("node {start} was moving to {to}, which was not seen")),
    }
    let Some(from) = node.replicas.iter().find(|replica| replica.volume == transfer.from) else { return Ok(None) };
    let Migrate { rate, max_freeze, verify, .. } = Migrate::to("");
    let status = MigrationStatus {
        rate,
        max_freeze,
        verify,
        size: node.sectors * SECTOR_BYTES,
        // Numbers count again from here.
        ..MigrationStatus::new(0, transfer.id, start, from.target.clone(), to.clone())
    };
    let (from, to) = (transfer.from, transfer.volume);
    Ok(Some(Transfer { status, from, to, made: false, keep: None, stage: Stage::Open, kept: None }))
}

/// The label of a volume that is no replica: it was left, or was to take the place of one.
fn left(found: &Found) -> Option<MemberLabel> {
    let label = MemberLabel::decode(found.label.as_deref()?).ok()?;
    let role = label.transfer.as_ref()?.role;
    matches!(role, TransferRole::Moved | TransferRole::Candidate).then_some(label)
}

/// A node of which no volume has a label that can be used.
fn unmet(at: usize, labels: &[Told<'_>], known: &Known) -> Result<NodeSpec, Refusal> {
    let told = labels.iter().flat_map(|told| &told.label.nodes).find(|node| node.at == at);
    let Some(node) = told else {
        return refuse(Errno::ENOENT, &format!("no label names node {} of the array", at + 1));
    };
    let array = labels.first().map_or(Id::NIL, |told| told.label.array);
    let whys = node.replicas.iter().map(|replica| match met(array, known, replica, node.sectors) {
        Ok(()) => format!("{}: it has no label of its own", replica.target),
        Err(why) => format!("{}: {why}", replica.target),
    });
    let whys: Vec<String> = whys.collect();
    refuse(Errno::ENOENT, &format!("node {} has no volume that is there and known: {}", node.start, whys.join("; ")))
}

/// Whether a replica is there, and is what a label says.
fn met(array: Id, known: &Known, replica: &ReplicaSpec, sectors: u64) -> Result<(), Refusal> {
    let found = match known.get(&replica.target) {
        Some(found) => found.as_ref().map_err(Clone::clone)?,
        None => return Err(Refusal::new(Errno::ENOENT, "it was not asked")),
    };
    let foreign = |why: String| Err(Refusal::new(Errno::EINVAL, why));
    if found.volume != replica.volume {
        let ids = format!("id {}, not {}", found.volume, replica.volume);
        return foreign(format!("another volume is there ({ids}), without this array's data"));
    }
    match &found.member {
        Some(member) if member.id == array => {}
        Some(member) => return foreign(format!("it belongs to array '{}' now", member.name)),
        None => return foreign("it was freed and belongs to no array".to_owned()),
    }
    if let Some(text) = &found.label {
        match MemberLabel::decode(text) {
            Ok(label) if label.array == array => {}
            Ok(label) => return foreign(format!("its label is of another array, '{}'", label.name)),
            Err(bad) => return Err(Refusal::new(Errno::EIO, format!("its label is {bad}"))),
        }
    }
    if found.sectors < sectors {
        let (has, uses) = (format_size(found.sectors * SECTOR_BYTES), format_size(sectors * SECTOR_BYTES));
        return foreign(format!("it is too small: it has {has}, and the array uses {uses} of it"));
    }
    Ok(())
}
