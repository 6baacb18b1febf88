//! `dst scrub`: the replicas of nodes are compared, and perhaps put right, while the array is in use.

use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use clap::Args;
use dst::control::scrub::{Fault, Found, Scrub, ScrubState, ScrubStatus};
use dst::control::status::{ArrayStatus, NodeStatus};
use dst::units::{Id, NodeId, SECTOR_BYTES, format_duration, format_size, parse_size};
use serde::Serialize;

use crate::args::name;
use crate::client::Daemon;
use crate::commands::warn;
use crate::nodes::{LOOK_INTERVAL, Pace, bar};
use crate::render;

/// Arguments of `scrub`.
#[derive(Args)]
pub(crate) struct ScrubArguments {
    /// The array
    #[arg(value_parser = name)]
    array: String,
    /// The node, such as n-800 [default: all that have several replicas]
    node: Option<NodeId>,
    /// Put right what differs: from what two of three replicas hold, or from the one that --from names
    #[arg(long)]
    repair: bool,
    /// Which replica is right where they differ: K of 'dst replica list'
    #[arg(long, value_name = "K", requires = "repair")]
    from: Option<usize>,
    /// Compare at most so much of a node in a second; 0: no bound
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "200M")]
    rate: u64,
    /// Return as soon as it has begun
    #[arg(long)]
    detach: bool,
    /// Show the scrub under way, or what the last one has found
    #[arg(long, conflicts_with_all = ["repair", "from", "rate", "detach", "abort"])]
    show: bool,
    /// End the scrub under way
    #[arg(long, conflicts_with_all = ["repair", "from", "rate", "detach"])]
    abort: bool,
}

/// A node and its scrub, as JSON.
#[derive(Serialize)]
struct Shown<'a> {
    node: &'a str,
    scrub: Option<&'a ScrubStatus>,
}

/// Does what was typed.
pub(crate) fn run(daemon: &Daemon, typed: &ScrubArguments, json: bool) -> Result<(), String> {
    let path = format!("/v1/arrays/{}", typed.array);
    let array: ArrayStatus = daemon.ask("GET", &path, &())?;
    let all: Vec<NodeId> = array.nodes.iter().filter(|node| node.replicas.len() > 1).map(|node| node.start).collect();
    let nodes = match typed.node {
        Some(node) => vec![node],
        // One that has nothing to be compared with says so.
        None if all.is_empty() => array.nodes.first().map(|node| node.start).into_iter().collect(),
        None => all,
    };
    if typed.show {
        return show(&array, &nodes, json);
    }
    if typed.abort {
        return abort(daemon, &path, &array, (&nodes, typed.node.is_none()), json);
    }
    let body = Scrub { repair: typed.repair, from: typed.from, rate: typed.rate };
    for node in &nodes {
        let begun: ArrayStatus = daemon.ask("POST", &format!("{path}/nodes/{node}/scrub"), &body)?;
        warn(&begun.warnings);
    }
    if typed.detach {
        let array: ArrayStatus = daemon.ask("GET", &path, &())?;
        return render::one(&shown(&array, &nodes), json, |_| {
            format!("{} node(s) of {} are being scrubbed: 'dst scrub {} --show'", nodes.len(), array.name, array.name)
        });
    }
    let array = watch(daemon, &path, &nodes)?;
    show(&array, &nodes, json)?;
    let scrubs = || of(&array, &nodes).filter_map(|node| node.scrub.as_ref());
    let wrong: u64 = scrubs().map(ScrubStatus::wrong).sum();
    if scrubs().any(|scrub| scrub.state != ScrubState::Done) {
        return Err(format!("not all of {} was compared", array.name));
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(format!("{wrong} region(s) of {} are not the same on all replicas", array.name)),
    }
}

fn of<'a>(array: &'a ArrayStatus, nodes: &'a [NodeId]) -> impl Iterator<Item = &'a NodeStatus> {
    array.nodes.iter().filter(|node| nodes.contains(&node.start))
}

fn shown<'a>(array: &'a ArrayStatus, nodes: &'a [NodeId]) -> Vec<Shown<'a>> {
    of(array, nodes).map(|node| Shown { node: &node.name, scrub: node.scrub.as_ref() }).collect()
}

fn show(array: &ArrayStatus, nodes: &[NodeId], json: bool) -> Result<(), String> {
    render::one(&shown(array, nodes), json, |_| of(array, nodes).map(text).collect())
}

/// Ends what is under way; of all nodes, those where something is.
fn abort(
    daemon: &Daemon,
    path: &str,
    array: &ArrayStatus,
    (nodes, all): (&[NodeId], bool),
    json: bool,
) -> Result<(), String> {
    let runs = |node: &NodeStatus| node.scrub.as_ref().is_some_and(|scrub| scrub.state == ScrubState::Running);
    let mut under_way: Vec<NodeId> = of(array, nodes).filter(|node| runs(node)).map(|node| node.start).collect();
    if under_way.is_empty() {
        under_way.extend(nodes.first());
    }
    for node in if all { &under_way } else { nodes } {
        let _: ArrayStatus = daemon.ask("POST", &format!("{path}/nodes/{node}/scrub/abort"), &())?;
    }
    let array: ArrayStatus = daemon.ask("GET", path, &())?;
    show(&array, nodes, json)
}

/// Shows how far it is until nothing is under way any more.
fn watch(daemon: &Daemon, path: &str, nodes: &[NodeId]) -> Result<ArrayStatus, String> {
    let terminal = std::io::stderr().is_terminal();
    let mut pace = Pace::default();
    let mut told = None;
    loop {
        let array: ArrayStatus = daemon.ask("GET", path, &())?;
        let scrubs: Vec<&ScrubStatus> = of(&array, nodes).filter_map(|node| node.scrub.as_ref()).collect();
        let over = scrubs.iter().all(|scrub| scrub.state != ScrubState::Running);
        let line = progress(&scrubs, &mut pace);
        if terminal {
            eprint!("\r\x1b[K{line}{}", if over { "\n" } else { "" });
            let _ = std::io::stderr().flush();
        } else if told != Some(over) {
            eprintln!("{line}");
        }
        told = Some(over);
        if over {
            return Ok(array);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// One line: bar, rate, time that is left, what was found.
fn progress(scrubs: &[&ScrubStatus], pace: &mut Pace) -> String {
    let (size, compared) = (sum(scrubs, |scrub| scrub.size), sum(scrubs, |scrub| scrub.compared));
    let mut line = bar(compared, size);
    if let Some(rate) = pace.at(Instant::now(), compared) {
        let left = Duration::from_secs(size.saturating_sub(compared) / rate);
        line += &format!(", {}/s, {} left", format_size(rate), format_duration(left));
    }
    for (count, what) in [
        (sum(scrubs, |scrub| scrub.different), "region(s) differ"),
        (sum(scrubs, |scrub| scrub.unreadable), "cannot be read"),
        (sum(scrubs, |scrub| scrub.repaired), "put right"),
    ] {
        if count > 0 {
            line += &format!(", {count} {what}");
        }
    }
    if let Some(why) = scrubs.iter().find_map(|scrub| scrub.why.as_ref()) {
        line += &format!(", {why}");
    }
    line
}

fn sum(scrubs: &[&ScrubStatus], of: impl Fn(&ScrubStatus) -> u64) -> u64 {
    scrubs.iter().map(|scrub| of(scrub)).sum()
}

/// Everything that is known of a node's scrub.
fn text(node: &NodeStatus) -> String {
    let Some(scrub) = &node.scrub else { return format!("{}: never scrubbed\n", node.name) };
    let (compared, size) = (format_size(scrub.compared), format_size(scrub.size));
    let repair = match (&scrub.from, scrub.repair) {
        (Some(from), _) => format!(", repair from {from}"),
        (None, true) => ", repair by majority".to_owned(),
        (None, false) => String::new(),
    };
    let took = match scrub.ended {
        Some(ended) => format!(", took {}", format_duration(Duration::from_secs(ended.saturating_sub(scrub.begun)))),
        None => String::new(),
    };
    let mut text = format!(
        "{}: scrub {}, {compared} of {size} compared{repair}{took}\n  {} region(s) differ, {} cannot be read, {} put right\n",
        node.name,
        scrub.state.word(),
        scrub.different,
        scrub.unreadable,
        scrub.repaired
    );
    for found in &scrub.found {
        text += &place(node, found);
    }
    if scrub.more {
        text += "  and more\n";
    }
    if let Some(why) = &scrub.why {
        text += &format!("  {why}\n");
    }
    text
}

fn place(node: &NodeStatus, found: &Found) -> String {
    let replica = |volume: &Id| {
        let at = node.replicas.iter().position(|replica| replica.volume == *volume);
        at.map_or_else(|| format!("volume {volume}"), |at| format!("{at} ({})", node.replicas[at].target))
    };
    let at_fault: Vec<String> = found.at_fault.iter().map(replica).collect();
    let whose = match at_fault.is_empty() {
        true => String::new(),
        false => format!(" on replica {}", at_fault.join(", ")),
    };
    let what = match found.fault {
        Fault::Different => "different",
        Fault::Unreadable => "unreadable",
    };
    let repaired = if found.repaired { ", put right" } else { "" };
    let size = format_size(found.sectors * SECTOR_BYTES);
    format!("  sectors {}+{} of the node ({size}): {what}{whose}{repaired}\n", found.start, found.sectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_has_its_place_and_whose_fault_it_is() {
        let json = r#"{
            "name": "n-0", "start": 0, "size": 4194304, "state": "connected", "counters": {"in_flight": 0, "reads": 0, "read_bytes": 0,
            "writes": 0, "written_bytes": 0, "flushes": 0, "errors": 0}, "replicas": [
                {"target": "kano:20070/a", "volume": "01010101010101010101010101010101", "state": "in_sync", "link": "connected",
                "counters": {"in_flight": 0, "reads": 0, "read_bytes": 0, "writes": 0, "written_bytes": 0, "flushes": 0, "errors": 0}}],
            "scrub": {"state": "done", "repair": true, "rate": 0, "begun": 5, "ended": 67, "size": 4194304, "compared": 4194304,
                "different": 2, "unreadable": 1, "repaired": 1, "more": true, "found": [
                {"start": 2048, "sectors": 2048, "fault": "different", "at_fault": ["01010101010101010101010101010101"], "repaired": true},
                {"start": 6144, "sectors": 2048, "fault": "unreadable"}]}
        }"#;
        let node: NodeStatus = serde_json::from_str(json).unwrap();
        let expected = "\
n-0: scrub done, 4M of 4M compared, repair by majority, took 62s
  2 region(s) differ, 1 cannot be read, 1 put right
  sectors 2048+2048 of the node (1M): different on replica 0 (kano:20070/a), put right
  sectors 6144+2048 of the node (1M): unreadable
  and more
";
        assert_eq!(text(&node), expected);
        let mut pace = Pace::default();
        let line = progress(&[node.scrub.as_ref().unwrap()], &mut pace);
        assert_eq!(
            line,
            "[==============================] 100% of 4M, 2 region(s) differ, 1 cannot be read, 1 put right"
        );
    }
}
