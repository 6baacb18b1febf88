//! The scrub of a node: what may be asked, and what is shown of the one under way or the last one; that one is kept in the record.

use serde::{Deserialize, Serialize};

use crate::control::target::Target;
use crate::engine::scrub::{Finding, Findings, Wrong};
use crate::engine::steer::ScrubWait;
use crate::limits;
use crate::units::{Id, format_size};

/// Body of `POST …/scrub`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scrub {
    /// What differs is put right.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub repair: bool,
    /// From this replica, from 0; absent: from what two of three hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<usize>,
    /// Bytes of the node that are compared in a second at most; 0: no bound.
    pub rate: u64,
}

impl Default for Scrub {
    fn default() -> Scrub {
        Scrub { repair: false, from: None, rate: limits::SYNC_RATE }
    }
}

impl Scrub {
    /// Says what makes no sense, whatever node is meant.
    pub fn check(&self) -> Result<(), String> {
        if self.rate != 0 && self.rate < limits::MIGRATE_RATE_MIN {
            let least = format_size(limits::MIGRATE_RATE_MIN);
            return Err(format!("a rate of {} bytes a second: it is at least {least}, or 0 for no bound", self.rate));
        }
        if self.from.is_some() && !self.repair {
            return Err("a replica to go by is for a repair: without it nothing is written".to_owned());
        }
        Ok(())
    }
}

/// How far a scrub has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// It is under way, or waits for something.
    Running,
    /// Everything was compared.
    Done,
    /// It was asked to end.
    Aborted,
    /// The array was stopped, or its daemon ended.
    Interrupted,
    /// It could not go on.
    Failed,
}

impl ScrubState {
    /// The word of tables and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            ScrubState::Running => "running",
            ScrubState::Done => "done",
            ScrubState::Aborted => "aborted",
            ScrubState::Interrupted => "interrupted",
            ScrubState::Failed => "failed",
        }
    }
}

/// What is wrong with a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The replicas differ.
    Different,
    /// Some of them cannot be read.
    Unreadable,
}

/// A place where something was wrong: whole regions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// Its first sector on the node.
    pub start: u64,
    /// Its length, sectors.
    pub sectors: u64,
    /// What was wrong.
    pub fault: Fault,
    /// The volumes of the replicas at fault, as far as that could be told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub at_fault: Vec<Id>,
    /// All replicas hold the same now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repaired: bool,
}

impl From<&Finding> for Found {
    fn from(finding: &Finding) -> Found {
        let fault = match finding.wrong {
            Wrong::Different => Fault::Different,
            Wrong::Unreadable(_) => Fault::Unreadable,
        };
        let (start, sectors) = (finding.extent.start.0, finding.extent.sectors);
        Found { start, sectors, fault, at_fault: finding.at_fault.clone(), repaired: finding.repaired }
    }
}

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubStatus {
    /// How far it has come.
    pub state: ScrubState,
    /// What differs is put right.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repair: bool,
    /// From here; absent: from what two of three hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Target>,
    /// Bytes of the node that are compared in a second at most; 0: no bound.
    pub rate: u64,
    /// When it began, seconds since 1970.
    pub begun: u64,
    /// When it ended, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// Bytes of the node.
    pub size: u64,
    /// Bytes that were compared.
    #[serde(default)]
    pub compared: u64,
    /// Regions in which replicas differed.
    #[serde(default)]
    pub different: u64,
    /// Regions that some replica could not read.
    #[serde(default)]
    pub unreadable: u64,
    /// Of both, those in which all replicas hold the same now.
    #[serde(default)]
    pub repaired: u64,
    /// The first places that were found, `limits::SCRUB_FINDINGS_MAX` at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub found: Vec<Found>,
    /// There are more of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// What it waits for, or why it has ended before everything was compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What the data path says of a scrub under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubLive {
    /// Regions that were compared.
    pub compared: u64,
    /// What was found.
    pub findings: Findings,
    /// What it waits for.
    pub waits: Option<ScrubWait>,
}

impl ScrubStatus {
    /// So many regions were compared, and this was found.
    pub fn count(&mut self, compared: u64, findings: &Findings) {
        self.compared = compared.saturating_mul(limits::REGION_BYTES).min(self.size);
        (self.different, self.unreadable) = (findings.different, findings.unreadable);
        (self.repaired, self.more) = (findings.repaired, findings.more);
        self.found = findings.list.iter().map(Found::from).collect();
    }

    /// Adds what the data path says.
    pub fn with_live(&mut self, live: &ScrubLive) {
        if self.state == ScrubState::Running {
            self.count(live.compared, &live.findings);
            self.why = live.waits.map(|wait| format!("waits: {}", words(wait)));
        }
    }

    /// Regions that are not as they should be.
    pub fn wrong(&self) -> u64 {
        (self.different + self.unreadable).saturating_sub(self.repaired)
    }
}

/// What a scrub waits for, in words.
const fn words(wait: ScrubWait) -> &'static str {
    match wait {
        ScrubWait::Suspended => "the node is suspended",
        ScrubWait::Moving => "the node is moving",
        ScrubWait::Syncing => "a replica is being synced",
        ScrubWait::NotInSync => "too few replicas are in sync, or not the one to go by",
        ScrubWait::Unreachable => "a replica does not answer",
        ScrubWait::Turn => "other nodes of the array are being scrubbed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(Scrub::default().check().is_ok());
        assert!(Scrub { repair: true, from: Some(1), rate: 0 }.check().is_ok());
        assert!(Scrub { from: Some(1), ..Scrub::default() }.check().is_err());
        assert!(Scrub { rate: 1, ..Scrub::default() }.check().is_err());
    }
}
