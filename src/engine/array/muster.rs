//! The owner's judgement before a start: which replicas are there, whether they are what the record says, and what must be made
//! durable before any of them is served.
//!
//! Three things refuse a start by name: a volume that is not what the record says; a label that knows of more than the record
//! (then the record is the stale one); a claim of another host, unless the start is a take-over. A replica that is away is none
//! of these: a node goes on with those that are there, if one of them is in sync, and calls the others stale from then on. A node of
//! which nobody is there who has everything refuses the start, or is *late* ([`super::late`]).

use std::collections::BTreeMap;

use super::Found;
use super::transfer::is_told;
use crate::bugs::{Bug, planted};
use crate::control::command::{Refusal, Terms};
use crate::control::member::{MemberLabel, TransferRole};
use crate::control::replica::{ReplicaSpec, ReplicaState, Standing};
use crate::control::spec::{ArraySpec, NodeSpec};
use crate::control::target::Target;
use crate::engine::losses::{Losses, Memory, Past, Ruling, Verdict, Witness, judge};
use crate::errno::Errno;
use crate::units::{Epoch, Id, SECTOR_BYTES, format_size};

/// What a start goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Muster {
    /// Which replicas are there, in the order of [`ArraySpec::replicas`]; none of a late node.
    pub(super) present: Vec<bool>,
    /// Nodes that are late, and why.
    pub(super) late: BTreeMap<usize, String>,
    /// Of each, what its server tells of losses, if it is there, and what follows from it.
    heard: Vec<(Option<u64>, Verdict)>,
    /// The epoch of the new claim: greater than any that was ever seen.
    pub(super) epoch: Epoch,
    /// Nodes of which it is not believed what the target of their transfer has.
    pub(super) doubted: Vec<usize>,
    /// The record knows of a greater one than the volumes: a claim of another host that comes in between may be smaller.
    pub(super) ahead: bool,
    /// The volumes know of a greater one than the record: another host has had the array since, and what the record says of how it was
    /// left is not so any more.
    pub(super) behind: bool,
}

/// How a start is meant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intent<'a> {
    /// This daemon's host.
    pub(super) host: Id,
    /// What the operator has said.
    pub(super) terms: Terms,
    /// Whether replicas that are away are waited for: they may be on their way back.
    pub(super) patient: bool,
    /// Whether a node may be late.
    pub(super) late: bool,
    /// The array's name as people type it.
    pub(super) name: &'a str,
    /// This boot of the daemon's machine.
    pub(super) boot: Id,
}

/// A node with what was found of each of its replicas.
type Met<'a> = (&'a NodeSpec, &'a [Result<Found, Refusal>]);

/// Why something of a node refuses the start, and which of its replicas it is about.
type Trouble = (Errno, String);

/// Judges what the survey has found.
pub(super) fn muster(
    spec: &ArraySpec,
    found: &[Result<Found, Refusal>],
    intent: Intent<'_>,
) -> Result<Muster, Refusal> {
    let mut rest = found;
    let mut met: Vec<Met<'_>> = Vec::with_capacity(spec.nodes.len());
    for node in &spec.nodes {
        let (own, others) = rest.split_at(node.replicas.len().min(rest.len()));
        met.push((node, own));
        rest = others;
    }
    refuse(&met, |met| wrong(spec, *met))?;
    refuse(&met, |met| fenced(*met, &intent))?;
    let past = Past { outlived: spec.memory.has_outlived(intent.boot), clean: spec.clean };
    let late = if intent.late { late(spec, past, &met, &intent) } else { BTreeMap::new() };
    let in_time = met.iter().enumerate().filter(|(at, _)| !late.contains_key(at));
    let needed: Vec<Met<'_>> = in_time.map(|(_, met)| *met).collect();
    refuse(&needed, |met| away(*met, &intent))?;
    refuse(&needed, |met| bereft(spec, past, *met))?;
    let heard = met.iter().flat_map(|met| verdicts(&spec.memory, past, *met)).collect();
    let claims = found.iter().flatten().filter_map(|found| found.claim).map(|claim| claim.epoch);
    let labels = found.iter().flatten().filter_map(label).map(|label| label.epoch);
    let seen = claims.chain(labels).max().unwrap_or_default();
    let greatest = seen.max(spec.epoch);
    let there = |(at, (_, found)): (usize, &Met<'_>)| {
        let in_time = !late.contains_key(&at);
        found.iter().map(|found| in_time && found.is_ok()).collect::<Vec<bool>>()
    };
    let present = met.iter().enumerate().flat_map(there).collect();
    let epoch = Epoch(greatest.0.saturating_add(1));
    let (ahead, behind) = (spec.epoch > seen, spec.epoch < seen && !planted(Bug::OldRecordIsClean));
    let doubted = (0..met.len()).filter(|at| !is_vouched(spec, met[*at], intent.host)).collect();
    Ok(Muster { present, late, heard, epoch, doubted, ahead, behind })
}

/// Nodes that are not waited for, and why: nobody is there who has everything. Only while those live who used the device when it was
/// last shown; never a node that moves or has a target on this machine, and never all of them.
fn late(spec: &ArraySpec, past: Past, met: &[Met<'_>], intent: &Intent<'_>) -> BTreeMap<usize, String> {
    let why = |(at, met): (usize, &Met<'_>)| {
        let trouble = if is_served(*met) { bereft(spec, past, *met) } else { away(*met, intent) };
        let afar = |replica: &ReplicaSpec| matches!(replica.target, Target::Remote { .. });
        let may_be = met.0.transfer.is_none() && met.0.replicas.iter().all(afar);
        trouble.filter(|_| may_be).map(|(_, why)| (at, why))
    };
    let late: BTreeMap<usize, String> = met.iter().enumerate().filter_map(why).collect();
    if past.outlived && !past.clean && late.len() < met.len() { late } else { BTreeMap::new() }
}

/// Whether all replicas that a node is served from prove that nobody else has used them since it was noted what the target of its transfer
/// has: their last claim is of this host, and their labels know of that transfer. Else their logs may have been cleaned without it.
fn is_vouched(spec: &ArraySpec, (node, found): Met<'_>, host: Id) -> bool {
    let Some((transfer, kept)) = node.transfer.as_ref().and_then(|transfer| Some((transfer, transfer.kept?))) else {
        return true;
    };
    let vouched = |found: &Found| {
        let told = is_told(spec.id, found.label.as_deref(), transfer.status.id, TransferRole::Open);
        told && kept.is_vouched_by(found.claim.as_ref(), host, spec.epoch)
    };
    let served = node.replicas.iter().zip(found).filter(|(replica, _)| replica.state.is_in_sync());
    served.filter_map(|(_, found)| found.as_ref().ok()).all(vouched)
}

/// Whether a replica of a node is there that the record calls in sync.
pub(super) fn is_served((node, found): Met<'_>) -> bool {
    node.replicas.iter().zip(found).any(|(replica, found)| replica.state.is_in_sync() && found.is_ok())
}

/// Calls the replicas stale that are away, or behind. Each node whose set changes by it gets a new generation. What servers have told
/// of losses is in the record before anything can be lost anew; `outlived`: what those who are away tell later is compared with
/// what is known.
pub(super) fn go_without(spec: &mut ArraySpec, muster: &Muster, outlived: bool, fresh: Id) {
    let mut heard = muster.heard.iter();
    for (at, node) in spec.nodes.iter_mut().enumerate() {
        let mut changed = false;
        let heard = heard.by_ref().take(node.replicas.len());
        if muster.late.contains_key(&at) {
            // Of whom nobody has asked nothing is known.
            heard.for_each(drop);
            continue;
        }
        let heard: Vec<(Option<u64>, Verdict)> = heard.copied().collect();
        for (replica, heard) in node.replicas.iter_mut().zip(heard) {
            let (told, verdict) = heard;
            if replica.state.is_in_sync() && (told.is_none() || verdict == Verdict::Behind) {
                replica.state = ReplicaState::Stale;
                changed = true;
            }
            match told {
                Some(told) => {
                    let lost = verdict == Verdict::Lost;
                    spec.memory.volumes.insert(replica.volume, Losses { told, lost });
                }
                None if !outlived => drop(spec.memory.volumes.remove(&replica.volume)),
                None => {}
            }
        }
        if changed {
            node.generation = node.generation.next(fresh);
        }
    }
}

/// The replicas of a node that the record calls in sync: their places, and what is known of them.
fn witnesses(memory: &Memory, (node, found): Met<'_>) -> (Vec<usize>, Vec<Witness>) {
    let witness = |(at, (replica, found)): (usize, (&ReplicaSpec, &Result<Found, Refusal>))| {
        let told = found.as_ref().ok().map(|found| found.losses);
        let known = memory.volumes.get(&replica.volume).copied();
        replica.state.is_in_sync().then_some((at, Witness { known, told }))
    };
    node.replicas.iter().zip(found).enumerate().filter_map(witness).unzip()
}

/// What is to become of each replica of a node.
fn verdicts(memory: &Memory, past: Past, met: Met<'_>) -> Vec<(Option<u64>, Verdict)> {
    let told = |found: &Result<Found, Refusal>| (found.as_ref().ok().map(|found| found.losses), Verdict::Whole);
    let mut all: Vec<(Option<u64>, Verdict)> = met.1.iter().map(told).collect();
    let (places, witnesses) = witnesses(memory, met);
    if let Ruling::Go(verdicts) = judge(past, &witnesses) {
        for (at, verdict) in places.into_iter().zip(verdicts) {
            all[at].1 = verdict;
        }
    }
    all
}

/// All replicas that are there lack something that was acknowledged, and one may have it that is away.
fn bereft(spec: &ArraySpec, past: Past, met: Met<'_>) -> Option<Trouble> {
    let (node, _) = met;
    let (places, witnesses) = witnesses(&spec.memory, met);
    let Ruling::Wait(away) = judge(past, &witnesses) else { return None };
    let (name, start, away) = (&spec.name, node.start, &node.replicas[places[away]].target);
    let text = format!(
        "node {start}: the machines of the replicas that are there have come back without writes that they had acknowledged; {away} may have \
         them, and is away: bring it back, or go on without them: 'dst accept-loss {name} {start}'"
    );
    Some((Errno::EIO, text))
}

fn label(found: &Found) -> Option<MemberLabel> {
    MemberLabel::decode(found.label.as_deref()?).ok()
}

/// The first trouble, with how many nodes more have one.
fn refuse<'a>(met: &[Met<'a>], judge: impl FnMut(&Met<'a>) -> Option<Trouble>) -> Result<(), Refusal> {
    let mut troubles = met.iter().filter_map(judge);
    let Some((errno, first)) = troubles.next() else { return Ok(()) };
    let more = match troubles.count() {
        0 => String::new(),
        1 => " (and 1 more node)".to_owned(),
        count => format!(" (and {count} more nodes)"),
    };
    Err(Refusal::new(errno, format!("{first}{more}")))
}

fn named(node: &NodeSpec, replica: &ReplicaSpec, why: &str) -> String {
    format!("node {} ({}): {why}", node.start, replica.target)
}

/// A volume that is there and is not what the record says.
fn wrong(spec: &ArraySpec, (node, found): Met<'_>) -> Option<Trouble> {
    node.replicas.iter().zip(found).enumerate().find_map(|(at, (replica, found))| {
        let (errno, why) = match found {
            _ if replica.volume.is_nil() => half_done(spec, node, at),
            Ok(found) => unfit(spec, node, at, replica, found)?,
            Err(_) => return None,
        };
        Some((errno, named(node, replica, &why)))
    })
}

/// A replica without a volume: a daemon ended in the middle of a change, and this one could not free the volume.
fn half_done(spec: &ArraySpec, node: &NodeSpec, at: usize) -> Trouble {
    if node.replicas.iter().all(|replica| replica.volume.is_nil()) {
        let text = "the node was being added or removed when dstd ended, and its volume could not be freed since: bring its server back, and \
                    start dstd again";
        return (Errno::EBUSY, text.to_owned());
    }
    let again = format!("'dst replica remove {} {} {at}'", spec.name, node.start);
    (
        Errno::EBUSY,
        format!("it was being added or removed when dstd ended, and its volume could not be freed since: {again}"),
    )
}

fn unfit(spec: &ArraySpec, node: &NodeSpec, at: usize, replica: &ReplicaSpec, found: &Found) -> Option<Trouble> {
    let (name, start) = (&spec.name, node.start);
    let again = format!("'dst replica remove {name} {start} {at}'");
    match &found.member {
        Some(member) if member.id != spec.id => {
            let text = format!("the volume belongs to array '{}' now: it may not have this array's data", member.name);
            return Some((Errno::EBUSY, text));
        }
        None => {
            let text = match label(found).filter(|label| label.array == spec.id).as_ref().and_then(MemberLabel::forward)
            {
                Some(forward) => format!(
                    "its data has moved to {}, and this machine's record does not know of that: it is an older copy, or another host has moved \
                     it. 'dst import {}' makes the record anew from the labels",
                    forward.to, forward.to
                ),
                None => {
                    "the volume is not assigned to this array any more: it may not have this array's data".to_owned()
                }
            };
            return Some((Errno::EBUSY, text));
        }
        Some(member) if member.node != start.to_string() => {
            return Some((Errno::EBUSY, format!("the volume is that of node {}", member.node)));
        }
        Some(_) => {}
    }
    if found.volume != replica.volume {
        let text = format!(
            "the volume is another one than when it was added (id {}, not {}): it was removed and made again, and has none of \
             the array's data",
            found.volume, replica.volume
        );
        return Some((Errno::EINVAL, text));
    }
    if found.sectors < node.sectors {
        let has = format_size(found.sectors * SECTOR_BYTES);
        let uses = format_size(node.sectors * SECTOR_BYTES);
        let text = format!("the volume is too small: it has {has}, and the array uses {uses} of it");
        return Some((Errno::EINVAL, text));
    }
    let label = match MemberLabel::decode(found.label.as_deref()?) {
        Ok(label) => label,
        Err(bad) => return Some((Errno::EIO, format!("its label is {bad}"))),
    };
    let own = label.node()?;
    if label.array != spec.id || own.start != start {
        return Some((Errno::EBUSY, format!("its label is that of node {} of array '{}'", own.start, label.name)));
    }
    match node.generation.standing(&label.generation) {
        // What it says beyond the label was never durable on those who must know, or another host could not have begun from there.
        Standing::Newer if label.epoch > spec.epoch && !planted(Bug::RecordPastLabels) => Some((
            Errno::EBUSY,
            format!(
                "host {} has gone on with the array from before this machine's last change of the node's replicas, which was never \
                 completed. The record is not used: 'dst import {}' makes it anew from the labels",
                label.host, replica.target
            ),
        )),
        Standing::Same | Standing::Newer => None,
        Standing::Older if planted(Bug::OldRecordTrusted) => None,
        Standing::Older => Some((
            Errno::EBUSY,
            format!(
                "its label is newer than this machine's record of the array: host {} has gone on with it, or the state \
                 directory is an older copy. The record is not used: 'dst import {}' makes it anew from the labels",
                label.host, replica.target
            ),
        )),
        Standing::Split => Some((
            Errno::EBUSY,
            format!(
                "split brain: its label has generation {} (written by host {}), the record here has {}, and neither came from \
                 the other: both sides may have acknowledged writes that the other lacks. Nothing is served until you choose: \
                 {again} gives up what that volume has; to keep that instead, free the node's other volumes with 'dst volume \
                 free' and 'dst import {}' on a host that has no record of the array",
                label.generation.id, label.host, node.generation.id, replica.target
            ),
        )),
    }
}

/// A claim of another host: its daemon may be serving the array.
fn fenced((node, found): Met<'_>, intent: &Intent<'_>) -> Option<Trouble> {
    if intent.terms.take_over {
        return None;
    }
    node.replicas.iter().zip(found).find_map(|(replica, found)| {
        let claim = found.as_ref().ok()?.claim.filter(|claim| claim.host != intent.host)?;
        let why = format!(
            "it is claimed by another host ({}, epoch {}), which may be using the array: stop it there; when it is stopped, or \
             dead for good, 'dst start {} --take-over' takes it, and nothing of that host is written from then on",
            claim.host, claim.epoch.0, intent.name
        );
        Some((Errno::EBUSY, named(node, replica, &why)))
    })
}

/// Replicas that are away, and are needed.
fn away((node, found): Met<'_>, intent: &Intent<'_>) -> Option<Trouble> {
    let both = || node.replicas.iter().zip(found);
    let missing = |wanted: fn(ReplicaState) -> bool| {
        both().find_map(|(replica, found)| {
            found.as_ref().err().filter(|_| wanted(replica.state)).map(|why| (replica, why))
        })
    };
    let served = is_served((node, found));
    let (replica, why) = missing(ReplicaState::is_in_sync).or_else(|| missing(|_| true))?;
    let trouble = |text: &str| Some((why.errno, named(node, replica, text)));
    if !served {
        if let [_] = node.replicas.as_slice() {
            return trouble(&why.text);
        }
        return trouble(&format!("{}; no other replica of this node that is in sync is there", why.text));
    }
    if intent.terms.take_over && !intent.terms.force && !planted(Bug::TakeOverOfSome) {
        return trouble(&format!(
            "{}; a take-over serves nothing before every replica has accepted it, because the former host may still reach this \
             one: bring it back; if that host is dead for good: 'dst start {} --take-over --force'",
            why.text, intent.name
        ));
    }
    if intent.patient && replica.state.is_in_sync() {
        return trouble(&format!("{}; it is waited for a little before the node goes on without it", why.text));
    }
    None
}
