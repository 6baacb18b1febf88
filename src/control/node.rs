//! What can be asked about one node of a started array: hold its requests, move it, replace its replica. Bodies of the API, and
//! the values that the command line and the control tree send.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::scrub::Scrub;
use crate::control::spec::duration_text;
use crate::limits;
use crate::units::{format_duration, format_size, parse_duration};

/// What happens to waiting requests when a suspend has lasted as long as it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExpire {
    /// They go on.
    #[default]
    Resume,
    /// They end with EIO, and so does what comes, until the node is resumed.
    Fail,
}

impl FromStr for OnExpire {
    type Err = String;

    fn from_str(text: &str) -> Result<OnExpire, String> {
        match text {
            "resume" => Ok(OnExpire::Resume),
            "fail" => Ok(OnExpire::Fail),
            _ => Err(format!("'{}' is not what can happen: use resume or fail", text.escape_default())),
        }
    }
}

impl fmt::Display for OnExpire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnExpire::Resume => "resume",
            OnExpire::Fail => "fail",
        })
    }
}

/// How long a suspend lasts at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ttl(pub Option<Duration>);

impl Default for Ttl {
    fn default() -> Ttl {
        Ttl(Some(limits::SUSPEND_TTL_DEFAULT))
    }
}

impl FromStr for Ttl {
    type Err = String;

    fn from_str(text: &str) -> Result<Ttl, String> {
        if text == "none" {
            return Ok(Ttl(None));
        }
        let ttl = parse_duration(text).map_err(|why| format!("{why}, or none"))?;
        if !(limits::SUSPEND_TTL_MIN..=limits::SUSPEND_TTL_MAX).contains(&ttl) {
            return Err(format!(
                "a suspend of {}: it is a time from {} to {}, or none",
                format_duration(ttl),
                format_duration(limits::SUSPEND_TTL_MIN),
                format_duration(limits::SUSPEND_TTL_MAX)
            ));
        }
        Ok(Ttl(Some(ttl)))
    }
}

impl fmt::Display for Ttl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(ttl) => f.write_str(&format_duration(ttl)),
            None => f.write_str("none"),
        }
    }
}

impl Serialize for Ttl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Ttl, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Body of `POST …/suspend`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Suspend {
    /// For how long at most.
    pub ttl: Ttl,
    /// What happens then.
    pub on_expire: OnExpire,
    /// Who asks, for people; see [`Suspend::by`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

impl Suspend {
    /// Who asks, in a form that is safe to keep and to show.
    pub fn by(&self) -> String {
        let by = self.by.as_deref().unwrap_or("the control socket");
        by.chars().filter(|c| !c.is_control()).take(limits::NAME_BYTES_MAX).collect()
    }
}

/// A suspend, as it is kept and shown. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suspended {
    /// Who asked for it.
    pub by: String,
    /// Since when.
    pub since: u64,
    /// Until when; absent: until it is resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// What happens then.
    pub on_expire: OnExpire,
    /// That has happened, or was asked for: what comes ends with EIO.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failing: bool,
}

/// Body of `POST …/replace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replace {
    /// The target that takes the place.
    pub to: String,
    /// Of this replica, from 0. May be left out where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<usize>,
    /// The operator's word that the new target has the data already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// Body of `POST …/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Where the node's data goes: a target, or `HOST:PORT/` for a new volume whose name is picked.
    pub to: String,
    /// Of this replica, from 0. May be left out where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<usize>,
    /// Bytes a second that are copied at most; 0: no bound.
    #[serde(default = "rate_default")]
    pub rate: u64,
    /// For so long requests of the node may wait before the cut-over is recorded; else it is tried again later.
    #[serde(default = "max_freeze_default", with = "duration_text")]
    pub max_freeze: Duration,
    /// The new target is given up when it takes longer than this for one request.
    #[serde(default = "target_timeout_default", with = "duration_text")]
    pub target_timeout: Duration,
    /// Compare the two before the cut-over.
    #[serde(default = "verify_default")]
    pub verify: bool,
    /// For so long the former target is written, too, so that the migration can be undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_source: Option<Keep>,
}

/// For how long a former target is kept up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Keep(#[serde(with = "duration_text")] pub Duration);

const fn rate_default() -> u64 {
    limits::SYNC_RATE
}

const fn max_freeze_default() -> Duration {
    limits::MAX_FREEZE_DEFAULT
}

/// A new target is given up when it takes longer than this, unless it is said otherwise.
pub(crate) const fn target_timeout_default() -> Duration {
    limits::TARGET_TIMEOUT
}

const fn verify_default() -> bool {
    true
}

impl Migrate {
    /// With everything but the target left out.
    pub fn to(target: &str) -> Migrate {
        Migrate {
            to: target.to_owned(),
            replica: None,
            rate: rate_default(),
            max_freeze: max_freeze_default(),
            target_timeout: target_timeout_default(),
            verify: verify_default(),
            keep_source: None,
        }
    }

    /// Says what is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        let within = |what: &str, time: Duration, least: Duration, most: Duration| {
            if (least..=most).contains(&time) {
                return Ok(());
            }
            let (time, least, most) = (format_duration(time), format_duration(least), format_duration(most));
            Err(format!("{what} of {time}: it is a time from {least} to {most}"))
        };
        within("a freeze", self.max_freeze, limits::MAX_FREEZE_MIN, limits::MAX_FREEZE_MAX)?;
        within("a target's time", self.target_timeout, limits::TARGET_TIMEOUT_MIN, limits::TARGET_TIMEOUT_MAX)?;
        if let Some(Keep(keep)) = self.keep_source {
            within("keeping the source for a time", keep, limits::KEEP_SOURCE_MIN, limits::KEEP_SOURCE_MAX)?;
        }
        if self.rate != 0 && self.rate < limits::MIGRATE_RATE_MIN {
            let least = format_size(limits::MIGRATE_RATE_MIN);
            return Err(format!("a rate of {} bytes a second: it is at least {least}, or 0 for no bound", self.rate));
        }
        Ok(())
    }
}

/// What is asked about a migration under way, or one that can still be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It begins nothing further.
    Pause,
    /// It goes on.
    Resume,
    /// It ends; the node stays where it is.
    Abort,
    /// After the cut-over, while the source is kept: back to it.
    Undo,
    /// The source is kept no longer.
    Release,
}

impl Act {
    /// All of them.
    pub const ALL: [Act; 5] = [Act::Pause, Act::Resume, Act::Abort, Act::Undo, Act::Release];

    /// The word in paths and on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Act::Pause => "pause",
            Act::Resume => "resume",
            Act::Abort => "abort",
            Act::Undo => "undo",
            Act::Release => "release",
        }
    }
}

/// Body of `POST …/migration/ACT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Which {
    /// Only if it is this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
}

/// What is asked about one node of a started array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeAsk {
    /// Its requests wait. Answered when nothing is in flight there. Where they wait already, this one's terms hold from now on.
    Suspend(Suspend),
    /// They go on.
    Resume,
    /// What waits ends with EIO, and so does what comes, until the node is resumed.
    Fail,
    /// A replica of a suspended node is replaced.
    Replace(Replace),
    /// It moves to another target. Answered when that has begun.
    Migrate(Migrate),
    /// Something about its migration.
    Migration(Act, Which),
    /// What its machines have come back without is accepted: what is left is served. Also of an array that is not started.
    AcceptLoss,
    /// Its replicas are compared. Answered when that has begun.
    Scrub(Scrub),
    /// That ends.
    EndScrub,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_cannot_be_are_refused() {
        for good in ["100ms", "60s", "none", "24h"] {
            assert_eq!(good.parse::<Ttl>().unwrap(), Ttl(parse_duration(good).ok()), "{good}");
        }
        for bad in ["", "0", "99ms", "never", "10000h"] {
            assert!(bad.parse::<Ttl>().is_err(), "{bad}");
        }
        assert_eq!(serde_json::to_string(&Suspend::default()).unwrap(), r#"{"ttl":"1m","on_expire":"resume"}"#);
        let migrate = Migrate::to("h/v");
        assert!(migrate.check().is_ok());
        let keep = |keep| Migrate { keep_source: Some(Keep(keep)), ..migrate.clone() };
        assert!(keep(Duration::from_secs(3600)).check().is_ok());
        for bad in [
            keep(Duration::from_millis(1)),
            Migrate { max_freeze: Duration::ZERO, ..migrate.clone() },
            Migrate { max_freeze: Duration::from_secs(3600), ..migrate.clone() },
            Migrate { target_timeout: Duration::ZERO, ..migrate.clone() },
            Migrate { target_timeout: Duration::from_secs(60), ..migrate.clone() },
            Migrate { rate: 1, ..migrate.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert_eq!(serde_json::from_str::<Migrate>(r#"{"to": "h/v"}"#).unwrap(), migrate);
    }
}
