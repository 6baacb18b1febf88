//! `dst why`: for every request that has waited for long, where it is, what for, and what happens at its deadline. Made of what the shards
//! say and of what the owner publishes; pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::status::{ArrayStatus, LinkState, NodeStatus, ReplicaStatus};
use crate::control::target::Target;
use crate::engine::request::RequestOp;
use crate::engine::shard::why::{Cause, Waiting};
use crate::engine::view::Gate;
use crate::limits;
use crate::units::{Id, format_duration};

/// What the I/O threads of an array have said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// What waits, with the volume that it is for.
    pub waiting: Vec<(Waiting, Option<Id>)>,
    /// I/O threads that have not said anything in time.
    pub silent: usize,
}

/// One piece of a request that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// For how long its request has been there, milliseconds.
    pub age_ms: u64,
    /// `read`, `write`, `flush`, `discard`, `write_zeroes`.
    pub op: String,
    /// Its request's first sector of the array.
    pub start: u64,
    /// Its request's sectors; 0 for a flush.
    pub sectors: u64,
    /// The node that it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Which of the node's replicas, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<usize>,
    /// What it waits for.
    pub waits_for: String,
    /// When it ends at the latest, and how.
    pub deadline: String,
}

/// Answer to `GET /v1/arrays/NAME/why`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// What waits, the oldest first.
    pub waiting: Vec<Entry>,
    /// There is more than is told.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// I/O threads that have not answered in time.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub silent: usize,
    /// Why requests of some nodes fail without waiting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failing: Vec<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// Says it all in words. `now` is in seconds since 1970.
pub fn explain(array: &ArrayStatus, heard: &Heard, now: u64) -> Why {
    let mut waiting: Vec<&(Waiting, Option<Id>)> = heard.waiting.iter().collect();
    waiting.sort_by_key(|(waiting, _)| std::cmp::Reverse(waiting.age));
    let more = waiting.len() >= limits::WHY_MAX;
    waiting.truncate(limits::WHY_MAX);
    let waiting = waiting.into_iter().map(|(waiting, volume)| entry(array, waiting, *volume, now)).collect();
    Why { waiting, more, silent: heard.silent, failing: array.losses() }
}

fn entry(array: &ArrayStatus, waiting: &Waiting, volume: Option<Id>, now: u64) -> Entry {
    let node = waiting.node.and_then(|node| array.nodes.get(node));
    let found = |node: &'_ NodeStatus| node.replicas.iter().position(|replica| Some(replica.volume) == volume);
    let at = node.and_then(found);
    let replica = node.zip(at).and_then(|(node, at)| node.replicas.get(at));
    Entry {
        age_ms: u64::try_from(waiting.age.as_millis()).unwrap_or(u64::MAX),
        op: op(waiting.op).to_owned(),
        start: waiting.extent.start.0,
        sectors: waiting.extent.sectors,
        node: node.map(|node| node.name.clone()),
        replica: at,
        waits_for: cause(waiting.cause, node, replica, now),
        deadline: deadline(waiting, node, now),
    }
}

fn op(op: RequestOp) -> &'static str {
    match op {
        RequestOp::Read => "read",
        RequestOp::Write { .. } => "write",
        RequestOp::Flush => "flush",
        RequestOp::Discard => "discard",
        RequestOp::WriteZeroes { .. } => "write_zeroes",
        RequestOp::Digest => "digest",
    }
}

fn cause(cause: Cause, node: Option<&NodeStatus>, replica: Option<&ReplicaStatus>, now: u64) -> String {
    let place =
        replica.map_or_else(|| "a target that is leaving or joining".to_owned(), |replica| place(&replica.target));
    match cause {
        Cause::Room => "room: too many pieces of requests are in flight".to_owned(),
        Cause::Gate(gate) => at_gate(gate, node, now),
        Cause::NoReplica => "a replica of the node that is in sync: there is none".to_owned(),
        Cause::Window => "its region, which is being copied".to_owned(),
        Cause::Range => "another request of the same sectors".to_owned(),
        Cause::Record => "the record: a replica has missed it, which is being made durable".to_owned(),
        Cause::Link => link(&place, replica),
        Cause::Fate => format!("{place} to say what became of an older write whose connection broke"),
        Cause::Turn => format!("its turn on the connection to {place}"),
        Cause::Answer => format!("the answer of {place}"),
    }
}

fn at_gate(gate: Gate, node: Option<&NodeStatus>, now: u64) -> String {
    let suspend = node.and_then(|node| node.suspend.as_ref());
    match (gate, suspend) {
        (Gate::Undecided, _) => "the record: which replica has the node's data is being made durable".to_owned(),
        (Gate::Late, _) => match node.and_then(|node| node.late.as_ref()) {
            Some(why) => format!("the node, which is late: {why}"),
            None => "the node, which is late".to_owned(),
        },
        (Gate::Closing, _) => "the cut-over of the node's migration".to_owned(),
        (Gate::Failed, _) => "nothing: requests of the node are failed".to_owned(),
        (_, Some(suspend)) => {
            format!("the node, suspended by {} {} ago", suspend.by, seconds(now.saturating_sub(suspend.since)))
        }
        _ => "the node, which is suspended".to_owned(),
    }
}

fn place(target: &Target) -> String {
    match target {
        Target::Remote { server, .. } => format!("server {server}"),
        Target::Local(path) => format!("the disk {path}"),
    }
}

fn link(place: &str, replica: Option<&ReplicaStatus>) -> String {
    let Some(replica) = replica else { return format!("a connection to {place}") };
    let error = replica.last_error.as_deref().map_or_else(String::new, |error| format!(": {error}"));
    match replica.link {
        LinkState::Reconnecting => {
            let (tries, down) = (replica.tries, seconds(replica.down_seconds));
            format!("{place}: reconnecting, try {tries}, for {down}{error}")
        }
        LinkState::Fenced => format!("nothing: {place} serves another owner now"),
        LinkState::Detached | LinkState::Connecting | LinkState::Connected => format!("a connection to {place}{error}"),
    }
}

fn deadline(waiting: &Waiting, node: Option<&NodeStatus>, now: u64) -> String {
    let left = seconds(waiting.left.as_secs());
    match waiting.cause {
        Cause::Gate(Gate::Closing) => "none: it goes on after the cut-over, or without it".to_owned(),
        Cause::Gate(Gate::Draining | Gate::Frozen) => match node.and_then(|node| node.suspend.as_ref()) {
            Some(suspend) => {
                let until = |until: u64| format!("in {}: {}", seconds(until.saturating_sub(now)), suspend.on_expire);
                suspend.until.map_or_else(|| "none: it goes on at 'dst resume'".to_owned(), until)
            }
            None => "none: it goes on at 'dst resume'".to_owned(),
        },
        _ => format!("in {left}: ETIMEDOUT"),
    }
}

fn seconds(seconds: u64) -> String {
    format_duration(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Extent;

    /// `n-0` moves from volume 1 to volume 2, `n-2048` (volume 3) is suspended.
    fn example() -> ArrayStatus {
        let data = include_str!("../../tests/data/tree.txt");
        let line = data.lines().find(|line| line.starts_with('{') && line.contains("\"busy\"")).unwrap();
        let mut array: ArrayStatus = serde_json::from_str(line).unwrap();
        for (replica, at) in array.nodes.iter_mut().flat_map(|node| &mut node.replicas).zip(1u8..) {
            replica.volume = Id([at; 16]);
        }
        array
    }

    fn waiting(age: u64, node: Option<usize>, cause: Cause) -> Waiting {
        let (age, left, extent) = (Duration::from_secs(age), Duration::from_secs(42), Extent::new(8, 16));
        Waiting { age, op: RequestOp::Write { fua: false }, extent, left, node, target: None, cause }
    }

    #[test]
    fn each_cause_has_its_words() {
        let mut array = example();
        array.nodes[0].replicas[0].link = LinkState::Reconnecting;
        array.nodes[0].replicas[0].tries = 7;
        array.nodes[0].replicas[0].down_seconds = 12;
        array.nodes[0].replicas[0].last_error = Some("connection refused".to_owned());
        for (node, volume, cause, words, deadline) in [
            (None, None, Cause::Room, "room", "in 42s: ETIMEDOUT"),
            (Some(1), None, Cause::Gate(Gate::Frozen), "the node, suspended by root 9s ago", "in 51s: resume"),
            (Some(0), None, Cause::Gate(Gate::Closing), "the cut-over of", "none: it goes on"),
            (
                Some(0),
                None,
                Cause::Gate(Gate::Frozen),
                "the node, which is suspended",
                "none: it goes on at 'dst resume'",
            ),
            (Some(0), None, Cause::Window, "its region, which is being copied", "in 42s: ETIMEDOUT"),
            (Some(0), None, Cause::Range, "another request of the same sectors", "in 42s"),
            (Some(0), None, Cause::Record, "the record", "in 42s"),
            (Some(0), None, Cause::NoReplica, "there is none", "in 42s"),
            (
                Some(0),
                Some(1),
                Cause::Link,
                "server h:1: reconnecting, try 7, for 12s: connection refused",
                "in 42s: ETIMEDOUT",
            ),
            (Some(0), Some(2), Cause::Answer, "the answer of server i:1", "in 42s"),
            (Some(0), Some(2), Cause::Turn, "its turn on the connection to server i:1", "in 42s"),
            (Some(0), Some(1), Cause::Fate, "server h:1 to say what became of an older write", "in 42s"),
            (Some(0), Some(9), Cause::Answer, "the answer of a target that is leaving or joining", "in 42s"),
        ] {
            let heard = Heard { waiting: vec![(waiting(3, node, cause), volume.map(|at| Id([at; 16])))], silent: 0 };
            let why = explain(&array, &heard, 10);
            let [entry] = why.waiting.as_slice() else { panic!("{why:?}") };
            assert!(entry.waits_for.starts_with(words) || entry.waits_for.ends_with(words), "{cause:?}: {entry:?}");
            assert!(entry.deadline.starts_with(deadline), "{cause:?}: {entry:?}");
            assert_eq!((entry.age_ms, entry.op.as_str(), entry.start, entry.sectors), (3000, "write", 8, 16));
            assert_eq!(entry.node.as_deref(), node.map(|node| ["n-0", "n-2048"][node]), "{cause:?}");
            assert_eq!(entry.replica, volume.filter(|at| *at < 9).map(|at| usize::from(at) - 1), "{cause:?}");
        }
    }

    #[test]
    fn who_has_lost_something_is_named_with_what_to_do() {
        let mut array = example();
        array.nodes[1].replicas.iter_mut().for_each(|replica| replica.lost = true);
        let why = explain(&array, &Heard::default(), 10);
        let [text] = why.failing.as_slice() else { panic!("{why:?}") };
        assert!(
            text.starts_with("n-2048: lost acknowledged writes") && text.contains("dst accept-loss busy n-2048"),
            "{text}"
        );
    }

    #[test]
    fn the_oldest_come_first_and_what_is_left_out_is_said() {
        let waits = |count: u64| (0..count).map(|age| (waiting(age, None, Cause::Room), None)).collect();
        let why = explain(&example(), &Heard { waiting: waits(3), silent: 1 }, 10);
        assert_eq!(why.waiting.iter().map(|entry| entry.age_ms).collect::<Vec<u64>>(), [2000, 1000, 0]);
        assert_eq!((why.more, why.silent), (false, 1));
        let why = explain(&example(), &Heard { waiting: waits(limits::WHY_MAX as u64 + 5), silent: 0 }, 10);
        assert_eq!((why.waiting.len(), why.more), (limits::WHY_MAX, true));
        assert_eq!(why.waiting[0].age_ms, (limits::WHY_MAX as u64 + 4) * 1000);
    }
}
