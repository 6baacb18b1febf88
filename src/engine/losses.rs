//! Machines that come back without what they had acknowledged and not flushed: what an array's record keeps of them, and what
//! follows at a start.
//!
//! A server counts how often its machine did that, for each volume, and tells the count whenever it is asked. The record has the
//! count up to which nothing is missed, per volume, and whether the array's device may have lived on since it was last shown:
//! whoever used it then still relies on what was acknowledged.
//!
//! What holds (the contract, 8.3): the count in the record is never greater than one whose loss was settled, so that what is not
//! written down in time is asked about once too often, never forgotten.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bugs::{Bug, planted};
use crate::units::Id;

/// What is known of one volume's machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losses {
    /// The count that its server has told.
    pub told: u64,
    /// With the last of them something went that was acknowledged, and nobody has accepted that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
}

/// What an array's record keeps of this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// The boot of the array's machine in which its device was shown and not taken away in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shown: Option<Id>,
    /// By volume. One that is not here is taken as it is found.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<Id, Losses>,
}

impl Memory {
    /// Whether those who used the device may still live in this boot of its machine.
    pub fn has_outlived(&self, boot: Id) -> bool {
        self.shown == Some(boot)
    }

    /// Whether nobody has accepted yet what a volume has lost.
    pub fn has_lost(&self, volume: Id) -> bool {
        self.volumes.get(&volume).is_some_and(|losses| losses.lost)
    }

    /// A data path tells what it knows of a volume. What was accepted under the same count stays so: it was told before that.
    pub fn keep(&mut self, volume: Id, losses: Losses) {
        let accepted = self.volumes.get(&volume).is_some_and(|known| known.told == losses.told && !known.lost);
        self.volumes.insert(volume, Losses { lost: losses.lost && !accepted, ..losses });
    }

    /// The operator's word about a volume that is in use: what it has is good enough.
    pub fn accept(&mut self, volume: Id) {
        if let Some(losses) = self.volumes.get_mut(&volume)
            && !planted(Bug::AcceptLossNotDurable)
        {
            losses.lost = false;
        }
    }

    /// Only these volumes are the array's.
    pub fn retain(&mut self, is_ours: impl Fn(Id) -> bool) {
        self.volumes.retain(|volume, _| is_ours(*volume));
    }
}

/// What was before a start.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    /// Those who used the device may still live.
    pub outlived: bool,
    /// All replicas that are in sync are the same, durably.
    pub clean: bool,
}

/// A replica that the record calls in sync.
#[derive(Clone, Copy, Debug)]
pub struct Witness {
    /// What the record has of it.
    pub known: Option<Losses>,
    /// What its server tells now; `None`: it is away.
    pub told: Option<u64>,
}

/// What is to become of such a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Whole,
    /// It lacks what another one has.
    Behind,
    /// It lacks what nobody has any more: nothing is served from it until that is accepted.
    Lost,
}

/// What is to become of a node's replicas that the record calls in sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// Of each, in order.
    Go(Vec<Verdict>),
    /// All that are there lack something, which this one may have: it is away.
    Wait(usize),
}

/// Judges the replicas of one node that the record calls in sync.
pub fn judge(past: Past, in_sync: &[Witness]) -> Ruling {
    let counted = |known: Losses, told: u64| known.told != told && !past.clean && !planted(Bug::LossForgottenAtRestart);
    let lacks = |witness: &Witness| match (witness.known, witness.told) {
        (Some(known), Some(told)) => known.lost || counted(known, told),
        _ => false,
    };
    let is_whole = |witness: &Witness| witness.told.is_some() && !lacks(witness);
    let is_lost =
        |witness: &Witness| lacks(witness) && (past.outlived || witness.known.is_some_and(|known| known.lost));
    if in_sync.iter().any(is_whole) {
        let behind = |witness| if lacks(witness) { Verdict::Behind } else { Verdict::Whole };
        return Ruling::Go(in_sync.iter().map(behind).collect());
    }
    let away = in_sync.iter().position(|witness| witness.told.is_none());
    match away.filter(|_| in_sync.iter().any(is_lost)) {
        Some(away) => Ruling::Wait(away),
        None => {
            let lost = |witness| if is_lost(witness) { Verdict::Lost } else { Verdict::Whole };
            Ruling::Go(in_sync.iter().map(lost).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTLIVED: Past = Past { outlived: true, clean: false };
    const CUT: Past = Past { outlived: false, clean: false };
    const CLEAN: Past = Past { outlived: false, clean: true };

    fn known(known: u64, told: Option<u64>) -> Witness {
        Witness { known: Some(Losses { told: known, lost: false }), told }
    }

    fn lost(told: u64) -> Witness {
        Witness { known: Some(Losses { told, lost: true }), told: Some(told) }
    }

    #[test]
    fn who_lacks_something_is_behind_or_lost_or_waits() {
        use Verdict::{Behind, Lost, Whole};
        let (fine, cut, away) = (known(3, Some(3)), known(3, Some(4)), known(3, None));
        let new = Witness { known: None, told: Some(7) };
        for (past, in_sync, ruling) in [
            (OUTLIVED, vec![fine], Ruling::Go(vec![Whole])),
            (OUTLIVED, vec![cut], Ruling::Go(vec![Lost])),
            (OUTLIVED, vec![new], Ruling::Go(vec![Whole])),
            (OUTLIVED, vec![cut, fine], Ruling::Go(vec![Behind, Whole])),
            (OUTLIVED, vec![cut, cut], Ruling::Go(vec![Lost, Lost])),
            (OUTLIVED, vec![cut, away], Ruling::Wait(1)),
            (OUTLIVED, vec![fine, away], Ruling::Go(vec![Whole, Whole])),
            (OUTLIVED, vec![away, away], Ruling::Go(vec![Whole, Whole])),
            // A power cut of the whole site stops nothing; but one that has everything is preferred.
            (CUT, vec![cut], Ruling::Go(vec![Whole])),
            (CUT, vec![cut, cut], Ruling::Go(vec![Whole, Whole])),
            (CUT, vec![cut, away], Ruling::Go(vec![Whole, Whole])),
            (CUT, vec![cut, fine], Ruling::Go(vec![Behind, Whole])),
            // What was flushed everywhere is lost nowhere.
            (CLEAN, vec![cut, fine], Ruling::Go(vec![Whole, Whole])),
            // What is known to be lost is so whatever happens, until it is accepted.
            (CLEAN, vec![lost(4)], Ruling::Go(vec![Lost])),
            (CUT, vec![lost(4), away], Ruling::Wait(1)),
            (CUT, vec![lost(4), fine], Ruling::Go(vec![Behind, Whole])),
        ] {
            assert_eq!(judge(past, &in_sync), ruling, "{past:?} {in_sync:?}");
        }
    }

    #[test]
    fn what_was_accepted_is_not_lost_by_an_older_word() {
        let (volume, mut memory) = (Id([1; 16]), Memory::default());
        memory.keep(volume, Losses { told: 4, lost: true });
        memory.keep(volume, Losses { told: 4, lost: true });
        assert!(memory.has_lost(volume));
        memory.accept(volume);
        memory.keep(volume, Losses { told: 4, lost: true });
        assert!(!memory.has_lost(volume));
        memory.keep(volume, Losses { told: 5, lost: true });
        assert!(memory.has_lost(volume));
    }
}
