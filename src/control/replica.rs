//! The copies of one node's data, and the rules that say which of them can be trusted.
//!
//! A **generation** names a node's set of in-sync replicas: 128 random bits, new at every change of the set, with the ids that it
//! came from. Numbers would not do: two daemons that went on from the same number, each with half of the replicas, would both
//! reach the next one, and their replicas would look alike although each side has acknowledged writes that the other lacks.

use serde::{Deserialize, Serialize};

use crate::bugs::{Bug, planted};
use crate::control::target::Target;
use crate::limits;
use crate::units::{Id, Lba};

/// How far a replica's data can be trusted. Durable: in the array's record and on the labels of its node's replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// It has every write that was acknowledged. Only such a replica is ever read.
    #[default]
    InSync,
    /// It was in sync and has missed writes: what the logs of its in-sync siblings have marked must be copied to it.
    Stale,
    /// It is being filled: what lies from here on was never copied to it; below, what the logs have marked must be copied again.
    Syncing {
        /// The first sector of the node that was never copied.
        from: Lba,
    },
}

impl ReplicaState {
    /// Whether it may be read.
    pub const fn is_in_sync(self) -> bool {
        matches!(self, ReplicaState::InSync)
    }

    /// The word of tables.
    pub const fn word(self) -> &'static str {
        match self {
            ReplicaState::InSync => "in sync",
            ReplicaState::Stale => "stale",
            ReplicaState::Syncing { .. } => "syncing",
        }
    }
}

/// One copy of a node's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaSpec {
    /// Where it lives.
    pub target: Target,
    /// The id of the volume there: another volume under the same name does not have this array's data.
    pub volume: Id,
    /// How far it can be trusted.
    pub state: ReplicaState,
}

/// A node's set of in-sync replicas, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Random; the array's own id for the set that the node was made with.
    pub id: Id,
    /// What it came from, the newest first; at most `limits::ANCESTORS_MAX`.
    pub ancestors: Vec<Id>,
}

/// How one generation of a node stands to another of the same node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The same set.
    Same,
    /// It came from the other one: it is the newer.
    Newer,
    /// The other one came from it: it is stale.
    Older,
    /// Neither came from the other: both sides have gone on alone, and each may have what the other lacks.
    Split,
}

impl Generation {
    /// The first generation of every node of an array.
    pub fn first(array: Id) -> Generation {
        Generation { id: array, ancestors: Vec::new() }
    }

    /// The one that follows a change of the set.
    pub fn next(&self, fresh: Id) -> Generation {
        let mut ancestors = vec![self.id];
        // What is forgotten of a long past looks like a split later on: refused, never taken.
        ancestors.extend(self.ancestors.iter().take(limits::ANCESTORS_MAX - 1));
        Generation { id: fresh, ancestors }
    }

    /// Whether it came from the generation `other`, over any number of steps.
    pub fn descends(&self, other: Id) -> bool {
        self.ancestors.contains(&other)
    }

    /// How it stands to `other`.
    pub fn standing(&self, other: &Generation) -> Standing {
        if self.id == other.id || planted(Bug::SplitIsSame) {
            Standing::Same
        } else if self.descends(other.id) {
            Standing::Newer
        } else if other.descends(self.id) {
            Standing::Older
        } else {
            Standing::Split
        }
    }
}

/// What is wrong with the replicas of a node that a record or a label describes.
pub fn check(replicas: &[ReplicaSpec], generation: &Generation) -> Result<(), String> {
    if replicas.is_empty() || replicas.len() > limits::REPLICAS_MAX {
        return Err(format!("a node with {} replicas", replicas.len()));
    }
    if !replicas.iter().any(|replica| replica.state.is_in_sync()) {
        return Err("a node without a replica that is in sync".to_owned());
    }
    if generation.id.is_nil() || generation.ancestors.len() > limits::ANCESTORS_MAX {
        return Err("a generation that cannot be".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(at: u8) -> Id {
        Id([at; 16])
    }

    #[test]
    fn generations_are_told_apart() {
        let first = Generation::first(id(1));
        let left = first.next(id(2));
        let (leftmost, right) = (left.next(id(3)), first.next(id(4)));
        for (one, other, standing) in [
            (&first, &first, Standing::Same),
            (&left, &first, Standing::Newer),
            (&leftmost, &first, Standing::Newer),
            (&leftmost, &left, Standing::Newer),
            (&first, &leftmost, Standing::Older),
            (&left, &leftmost, Standing::Older),
            (&left, &right, Standing::Split),
            (&right, &leftmost, Standing::Split),
            (&Generation::first(id(9)), &leftmost, Standing::Split),
        ] {
            assert_eq!(one.standing(other), standing, "{one:?} {other:?}");
        }
    }

    #[test]
    fn a_past_that_is_forgotten_is_a_split() {
        let first = Generation::first(id(200));
        let mut now = first.clone();
        for at in 0..limits::ANCESTORS_MAX {
            assert_ne!(now.standing(&first), Standing::Split, "after {at} changes");
            now = now.next(id(u8::try_from(at).unwrap()));
            assert!(now.descends(first.id));
        }
        now = now.next(id(100));
        assert_eq!(now.ancestors.len(), limits::ANCESTORS_MAX);
        assert_eq!(now.standing(&first), Standing::Split);
    }

    #[test]
    fn states_keep_their_words() {
        for (state, text) in [
            (ReplicaState::InSync, r#""in_sync""#),
            (ReplicaState::Stale, r#""stale""#),
            (ReplicaState::Syncing { from: Lba(8) }, r#"{"syncing":{"from":8}}"#),
        ] {
            assert_eq!(serde_json::to_string(&state).unwrap(), text);
            assert_eq!(serde_json::from_str::<ReplicaState>(text).unwrap(), state);
        }
    }

    #[test]
    fn nodes_that_cannot_be_are_refused() {
        let replica = |state| ReplicaSpec { target: "h:1/v".parse().unwrap(), volume: id(1), state };
        let good = Generation::first(id(1));
        assert!(check(&[replica(ReplicaState::Stale), replica(ReplicaState::InSync)], &good).is_ok());
        assert!(check(&[], &good).is_err());
        assert!(check(&vec![replica(ReplicaState::InSync); 4], &good).is_err());
        assert!(check(&[replica(ReplicaState::Stale)], &good).is_err());
        assert!(check(&[replica(ReplicaState::InSync)], &Generation::first(Id::NIL)).is_err());
        let endless = Generation { id: id(1), ancestors: vec![id(2); limits::ANCESTORS_MAX + 1] };
        assert!(check(&[replica(ReplicaState::InSync)], &endless).is_err());
    }
}
