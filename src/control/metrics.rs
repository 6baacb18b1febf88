//! The figures of all arrays in the text format of Prometheus (version 0.0.4), made of what the owner publishes.
//!
//! One table of rows, as in the control tree: a name, a kind, a help, and what it is of an array, a node or a replica. Names have their
//! unit; counters begin at zero with each start of the array.

use std::fmt::Write as _;

use crate::control::scrub::{ScrubState, ScrubStatus};
use crate::control::status::{ArrayStatus, LinkState, NodeStatus, ReplicaStatus, State, Trust};

/// The type of the text, for HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whose figure it is. `None`: there is none now.
#[derive(Clone, Copy)]
enum Of {
    Array(fn(&ArrayStatus) -> Option<u64>),
    Node(fn(&NodeStatus) -> Option<u64>),
    Replica(fn(&NodeStatus, &ReplicaStatus) -> Option<u64>),
}

struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    of: Of,
}

const fn gauge(name: &'static str, help: &'static str, of: Of) -> Metric {
    Metric { name, kind: "gauge", help, of }
}

const fn counter(name: &'static str, help: &'static str, of: Of) -> Metric {
    Metric { name, kind: "counter", help, of }
}

/// All of them. `docs/OPERATING.md` says which are worth an alarm.
const METRICS: &[Metric] = &[
    gauge("dst_array_started", "1 while the array is in use.", Of::Array(|array| flag(array.state == State::Started))),
    gauge(
        "dst_array_trouble",
        "1 while the array is not doing what it should: 'dst status' says why.",
        Of::Array(|array| flag(array.why.is_some())),
    ),
    gauge("dst_array_size_bytes", "Size of the array.", Of::Array(|array| array.spec.as_ref().map(|spec| spec.size))),
    gauge(
        "dst_array_tags_free",
        "Requests that can still be taken before the device has to wait.",
        Of::Array(|array| array.tags_free),
    ),
    gauge("dst_node_size_bytes", "Size of the node.", Of::Node(|node| Some(node.size))),
    gauge(
        "dst_node_served",
        "1 while an in-sync replica of the node is connected, or connecting for the first time.",
        Of::Node(|node| flag(node.state >= LinkState::Connecting)),
    ),
    gauge("dst_node_suspended", "1 while the node is suspended.", Of::Node(|node| flag(node.suspend.is_some()))),
    gauge("dst_node_parked", "Requests that wait at the node's gate.", Of::Node(|node| Some(node.parked))),
    gauge(
        "dst_node_in_sync_replicas",
        "Replicas that have every write that was acknowledged.",
        Of::Node(|node| Some(node.replicas.iter().filter(|replica| replica.state == Trust::InSync).count() as u64)),
    ),
    gauge(
        "dst_scrub_running",
        "1 while the replicas of the node are compared.",
        Of::Node(|node| node.scrub.as_ref().and_then(|scrub| flag(scrub.state == ScrubState::Running))),
    ),
    gauge(
        "dst_scrub_compared_bytes",
        "Bytes of the node that the scrub under way, or the last one, has compared.",
        Of::Node(|node| node.scrub.as_ref().map(|scrub| scrub.compared)),
    ),
    gauge(
        "dst_scrub_wrong_regions",
        "Regions in which that one has found replicas that differ or cannot be read, and that are not put right.",
        Of::Node(|node| node.scrub.as_ref().map(ScrubStatus::wrong)),
    ),
    gauge(
        "dst_scrub_ended_seconds",
        "When the last scrub ended, seconds since 1970.",
        Of::Node(|node| node.scrub.as_ref().and_then(|scrub| scrub.ended)),
    ),
    gauge(
        "dst_migration_size_bytes",
        "Bytes that a migration under way moves.",
        Of::Node(|node| node.migration.as_ref().map(|migration| migration.size)),
    ),
    gauge(
        "dst_migration_copied_bytes",
        "Bytes of it that are copied.",
        Of::Node(|node| node.migration.as_ref().map(|migration| migration.copied)),
    ),
    gauge(
        "dst_replica_in_sync",
        "1 while the replica has every write that was acknowledged.",
        Of::Replica(|_, replica| flag(replica.state == Trust::InSync)),
    ),
    gauge(
        "dst_replica_synced_bytes",
        "Bytes of the node that the replica has been given.",
        Of::Replica(|node, replica| match replica.state {
            Trust::InSync => Some(node.size),
            Trust::Stale | Trust::Syncing => replica.synced,
        }),
    ),
    gauge(
        "dst_replica_connected",
        "1 while all connections to the replica are up.",
        Of::Replica(|_, replica| flag(replica.link == LinkState::Connected)),
    ),
    gauge(
        "dst_replica_down_seconds",
        "For how long a connection to the replica has been lost.",
        Of::Replica(|_, replica| Some(replica.down_seconds)),
    ),
    gauge(
        "dst_replica_in_flight",
        "Requests not answered yet.",
        Of::Replica(|_, replica| Some(replica.counters.in_flight)),
    ),
    counter("dst_replica_reads_total", "Reads completed.", Of::Replica(|_, replica| Some(replica.counters.reads))),
    counter("dst_replica_read_bytes_total", "Bytes read.", Of::Replica(|_, replica| Some(replica.counters.read_bytes))),
    counter(
        "dst_replica_writes_total",
        "Writes, discards and writes of zeros completed.",
        Of::Replica(|_, replica| Some(replica.counters.writes)),
    ),
    counter(
        "dst_replica_written_bytes_total",
        "Bytes written.",
        Of::Replica(|_, replica| Some(replica.counters.written_bytes)),
    ),
    counter(
        "dst_replica_flushes_total",
        "Flushes completed.",
        Of::Replica(|_, replica| Some(replica.counters.flushes)),
    ),
    counter(
        "dst_replica_errors_total",
        "Requests that ended in an error.",
        Of::Replica(|_, replica| Some(replica.counters.errors)),
    ),
    counter(
        "dst_replica_rescued_reads_total",
        "Reads that this replica has refused, and another one has answered.",
        Of::Replica(|_, replica| Some(replica.counters.rescued_reads)),
    ),
    counter(
        "dst_replica_damaged_total",
        "Data that arrived damaged, and was asked for or sent again.",
        Of::Replica(|_, replica| Some(replica.counters.damaged)),
    ),
];

fn flag(is: bool) -> Option<u64> {
    Some(u64::from(is))
}

/// The text of all figures.
pub fn text(arrays: &[ArrayStatus]) -> String {
    let mut text = String::new();
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(
        text,
        "# HELP dst_info The daemon's version.\n# TYPE dst_info gauge\ndst_info{{version=\"{version}\"}} 1"
    );
    for Metric { name, kind, help, of } in METRICS {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for array in arrays {
            each(array, *of, &mut |labels, value| {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            });
        }
    }
    text
}

fn each(array: &ArrayStatus, of: Of, show: &mut dyn FnMut(&str, u64)) {
    let label = format!("array=\"{}\"", escaped(&array.name));
    if let Of::Array(figure) = of {
        figure(array).into_iter().for_each(|value| show(&label, value));
    }
    for node in &array.nodes {
        let label = format!("{label},node=\"{}\"", escaped(&node.name));
        if let Of::Node(figure) = of {
            figure(node).into_iter().for_each(|value| show(&label, value));
        }
        let Of::Replica(figure) = of else { continue };
        for (at, replica) in node.replicas.iter().enumerate() {
            let label = format!("{label},replica=\"{at}\",target=\"{}\"", escaped(&replica.target.to_string()));
            figure(node, replica).into_iter().for_each(|value| show(&label, value));
        }
    }
}

/// A local path may have anything in it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ArrayStatus {
        let data = include_str!("../../tests/data/tree.txt");
        let line = data.lines().find(|line| line.starts_with('{') && line.contains("\"busy\"")).unwrap();
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn each_figure_has_its_labels() {
        let text = text(&[example()]);
        for line in [
            "dst_array_started{array=\"busy\"} 1",
            "dst_array_trouble{array=\"busy\"} 0",
            "dst_array_tags_free{array=\"busy\"} 12",
            "dst_node_parked{array=\"busy\",node=\"n-2048\"} 7",
            "dst_node_suspended{array=\"busy\",node=\"n-2048\"} 1",
            "dst_node_in_sync_replicas{array=\"busy\",node=\"n-0\"} 1",
            "dst_migration_copied_bytes{array=\"busy\",node=\"n-0\"} 1024000",
            "dst_scrub_running{array=\"busy\",node=\"n-0\"} 1",
            "dst_scrub_wrong_regions{array=\"busy\",node=\"n-0\"} 2",
            "dst_replica_in_sync{array=\"busy\",node=\"n-0\",replica=\"1\",target=\"i:1/b\"} 0",
            "dst_replica_synced_bytes{array=\"busy\",node=\"n-0\",replica=\"1\",target=\"i:1/b\"} 512000",
            "dst_replica_reads_total{array=\"busy\",node=\"n-2048\",replica=\"0\",target=\"k:1/c\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("dst_migration_size_bytes{array=\"busy\",node=\"n-2048\"}"), "nothing moves there");
    }

    #[test]
    fn the_text_is_one_of_the_format() {
        let mut local = example();
        local.nodes[0].replicas[0].target = "/srv/a \"b\\c".parse().unwrap();
        let text = text(&[local]);
        let (mut name, mut kind) = ("", "");
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                name = help.split(' ').next().unwrap();
                assert!(help.ends_with('.'), "{help}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                kind = rest.strip_prefix(name).unwrap().trim();
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            } else {
                let (labels, value) = line.strip_prefix(name).unwrap().rsplit_once(' ').unwrap();
                assert!(labels.starts_with('{') && labels.ends_with('}') && value.parse::<u64>().is_ok(), "{line}");
            }
        }
        assert!(text.contains(r#"target="/srv/a \"b\\c"}"#), "{text}");
        assert!(!kind.is_empty());
    }
}
