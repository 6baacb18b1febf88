//! The owner's part that, before a start, asks the targets of transfers what has become of them.
//!
//! A label that says that its node moves was written before the first byte was copied. The target's own label says whether it has
//! taken the place; only that one can tell a record that is an older copy from one that is right. A take-over claims
//! the targets before it looks, so that the former host cannot commit any more.

use super::Found;
use crate::control::command::{Refusal, Terms};
use crate::control::member::{MemberLabel, TransferRole};
use crate::control::replica::Standing;
use crate::control::spec::ArraySpec;
use crate::control::target::Target;
use crate::control::transfer::Stage;
use crate::errno::Errno;
use crate::units::Id;

/// A target that a node moves to, as the record or a label says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) node: usize,
    /// Where it lives.
    pub(super) to: Target,
    volume: Id,
    transfer: Id,
    /// The record knows of it.
    recorded: bool,
    /// It is there and the array's, so that it can be claimed.
    pub(super) ours: bool,
}

/// The targets that are to be asked before the array is started.
pub(super) fn traces(spec: &ArraySpec, found: &[Result<Found, Refusal>]) -> Vec<Trace> {
    let mut traces: Vec<Trace> = Vec::new();
    let mut found = found.iter();
    for (node, own) in spec.nodes.iter().enumerate() {
        if let Some(transfer) =
            own.transfer.as_ref().filter(|transfer| transfer.stage == Stage::Open && !transfer.to.is_nil())
        {
            let (to, volume, transfer) = (transfer.status.to.clone(), transfer.to, transfer.status.id);
            traces.push(Trace { node, to, volume, transfer, recorded: true, ours: false });
        }
        for found in found.by_ref().take(own.replicas.len()) {
            let label = found.as_ref().ok().and_then(|found| MemberLabel::decode(found.label.as_deref()?).ok());
            let Some(told) = label.filter(|label| label.array == spec.id).and_then(|label| label.transfer) else {
                continue;
            };
            let known = traces.iter().any(|trace| trace.transfer == told.id);
            // What has been committed, the record has too, or the label would have refused the start.
            if told.role == TransferRole::Open && !known {
                let (to, volume, transfer) = (told.to, told.volume, told.id);
                traces.push(Trace { node, to, volume, transfer, recorded: false, ours: false });
            }
        }
    }
    traces
}

/// Whether the record may be gone on with, by what the targets say.
pub(super) fn judge(
    spec: &ArraySpec,
    traces: &mut [Trace],
    found: &[Result<Found, Refusal>],
    terms: Terms,
) -> Result<(), Refusal> {
    for (trace, found) in traces.iter_mut().zip(found) {
        let node = &spec.nodes[trace.node];
        let (start, to) = (node.start, &trace.to);
        match found {
            Ok(found) => {
                trace.ours = found.member.as_ref().is_some_and(|member| member.id == spec.id);
                let label = found.label.as_deref().and_then(|text| MemberLabel::decode(text).ok());
                let own = label.filter(|label| found.volume == trace.volume && label.array == spec.id && trace.ours);
                let newer = |label: &MemberLabel| node.generation.standing(&label.generation) == Standing::Older;
                if own.as_ref().is_some_and(newer) {
                    let text = format!(
                        "node {start} has moved to {to}, and this machine's record does not know of that: it is an older \
                         copy, or another host has moved it. 'dst import {to}' makes the record anew from the labels"
                    );
                    return Err(Refusal::new(Errno::EBUSY, text));
                }
            }
            Err(why) if why.errno == Errno::ENOENT => {}
            Err(_) if trace.recorded && (!terms.take_over || terms.force) => {}
            Err(why) => {
                let source = node.replicas.first().map_or_else(String::new, |replica| replica.target.to_string());
                let text = format!(
                    "node {start} was moving to {to}, which must say whether it has taken over: {}. Bring it back; your \
                     word that it has not is 'dst import {source} --force', or with a take-over --force",
                    why.text
                );
                return Err(Refusal::new(why.errno, text));
            }
        }
    }
    Ok(())
}
