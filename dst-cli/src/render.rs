//! What is printed: tables for people, JSON with the same data for programs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, SystemTime};

use dst::control::device::{Device, DeviceState};
use dst::control::migration::MigrationStatus;
use dst::control::scrub::{ScrubState, ScrubStatus};
use dst::control::spec::DataDigest;
use dst::control::status::{ArrayStatus, Counters, Gate, LinkState, NodeStatus, ReplicaStatus, State, Trust};
use dst::control::target::ServerAddress;
use dst::control::why::Why;
use dst::units::{format_duration, format_size};
use dst::wire::volume::Volume;
use serde::Serialize;

/// Prints a value: as JSON, or as the text that `table` makes of it.
pub(crate) fn one<T: Serialize + ?Sized>(value: &T, json: bool, table: impl Fn(&T) -> String) -> Result<(), String> {
    let text = if json {
        serde_json::to_string_pretty(value).map_err(|error| error.to_string())?
    } else {
        table(value).trim_end().to_owned()
    };
    if text.is_empty() {
        return Ok(());
    }
    print(&format!("{text}\n"))
}

/// Prints a line, which may be empty.
pub(crate) fn line(text: &str) -> Result<(), String> {
    print(&format!("{text}\n"))
}

/// Prints a text as it is.
pub(crate) fn text(text: &str) -> Result<(), String> {
    print(text)
}

/// Prints a value; with `again` in place of the former one, and JSON values one to a line.
pub(crate) fn page<T: Serialize>(
    value: &T,
    again: bool,
    json: bool,
    table: impl Fn(&T) -> String,
) -> Result<(), String> {
    if !again {
        return one(value, json, table);
    }
    if json {
        let line = serde_json::to_string(value).map_err(|error| error.to_string())?;
        return print(&format!("{line}\n"));
    }
    let clear = if std::io::IsTerminal::is_terminal(&std::io::stdout()) { "\x1b[H\x1b[2J" } else { "" };
    print(&format!("{clear}{}\n", table(value).trim_end()))
}

/// A reader that has seen enough, such as `head`, ends the program quietly.
fn print(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|error| format!("cannot print: {error}")),
    }
}

/// Columns as wide as their widest cell; the last one is not padded.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// The answer to `create` and `import`.
pub(crate) fn made(how: &str, array: &ArrayStatus) -> String {
    let (size, layout) = size_and_layout(array);
    format!("{how} {}: {size}, {layout}, {}. Start it with: dst start {}", array.name, nodes(array), array.name)
}

/// How large an array is after it was to grow.
pub(crate) fn grown(array: &ArrayStatus) -> String {
    let (size, layout) = size_and_layout(array);
    let how = if array.spec.as_ref().is_some_and(|spec| spec.grow) { "still has" } else { "has" };
    format!("{} {how} {size}, {layout}, {}", array.name, nodes(array))
}

fn nodes(array: &ArrayStatus) -> String {
    let most = array.nodes.iter().map(|node| node.replicas.len()).max().unwrap_or(0);
    let copies = if most > 1 { format!(" of up to {most} replicas") } else { String::new() };
    match array.nodes.len() {
        1 => format!("1 node{copies}"),
        count => format!("{count} nodes{copies}"),
    }
}

fn size_and_layout(array: &ArrayStatus) -> (String, String) {
    let Some(spec) = &array.spec else { return ("-".to_owned(), "-".to_owned()) };
    let layout = match spec.chunk {
        0 => spec.alg.to_string(),
        chunk => format!("{} {}", spec.alg, format_size(chunk)),
    };
    (format_size(spec.size), layout)
}

/// The table of `list`.
pub(crate) fn arrays(arrays: &[ArrayStatus]) -> String {
    if arrays.is_empty() {
        return "no arrays: 'dst create' makes one".to_owned();
    }
    let mut rows = vec![cells(["NAME", "STATE", "SIZE", "ALG", "NODES", "DEVICE"])];
    for array in arrays {
        let (size, layout) = size_and_layout(array);
        let device = array.device.as_deref().unwrap_or("-");
        rows.push(cells([&array.name, array.state.word(), &size, &layout, &array.nodes.len().to_string(), device]));
    }
    let mut text = columns(&rows);
    for array in arrays {
        if let Some(why) = &array.why {
            let _ = writeln!(text, "{}: {why}", array.name);
        }
    }
    text
}

/// The table of `device list`.
pub(crate) fn devices(devices: &[Device]) -> String {
    if devices.is_empty() {
        return "no devices: 'dst start' makes one".to_owned();
    }
    let mut rows = vec![cells(["DEVICE", "ARRAY", "STATE", "PID", "QUEUES", "DEPTH"])];
    for device in devices {
        let array = device.array.as_deref().unwrap_or("-");
        let pid = device.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let (queues, depth) = (device.queues.to_string(), device.depth.to_string());
        rows.push(cells([&device.path, array, device.state.word(), &pid, &queues, &depth]));
    }
    let mut text = columns(&rows);
    if devices.iter().any(|device| device.state == DeviceState::Waiting) {
        text.push_str("whoever uses a waiting device waits until 'dst device recover N', or 'dst device delete N'\n");
    }
    text
}

/// The table of `why`.
pub(crate) fn why(why: &Why) -> String {
    let mut rows = vec![cells(["AGE", "REQUEST", "NODE", "K", "WAITS FOR", "DEADLINE"])];
    for entry in &why.waiting {
        let age = format!("{}.{}s", entry.age_ms / 1000, entry.age_ms % 1000 / 100);
        let request = match entry.sectors {
            0 => entry.op.clone(),
            sectors => format!("{} {}+{sectors}", entry.op, entry.start),
        };
        let replica = entry.replica.map_or_else(|| "-".to_owned(), |replica| replica.to_string());
        let node = entry.node.as_deref().unwrap_or("-");
        rows.push(cells([&age, &request, node, &replica, &entry.waits_for, &entry.deadline]));
    }
    let mut text =
        if why.waiting.is_empty() { "no request waits for longer than a second\n".to_owned() } else { columns(&rows) };
    if why.more {
        text.push_str("there is more; these are the oldest\n");
    }
    for failing in &why.failing {
        let _ = writeln!(text, "{failing}");
    }
    if why.silent > 0 {
        let _ = writeln!(text, "{} I/O thread(s) did not answer in time", why.silent);
    }
    text
}

/// The page of `status`.
pub(crate) fn status(arrays: &[ArrayStatus]) -> String {
    if arrays.is_empty() {
        return self::arrays(arrays);
    }
    arrays.iter().map(array).collect::<Vec<String>>().join("\n")
}

fn array(array: &ArrayStatus) -> String {
    let mut text = format!("{}: {}", array.name, array.state.word());
    if let Some(device) = &array.device {
        let _ = write!(text, " as {device}");
    }
    text.push('\n');
    if let Some(why) = &array.why {
        let what = if array.state == State::Starting { "waiting for" } else { "why" };
        let _ = writeln!(text, "  {what}: {why}");
    }
    if let Some(spec) = &array.spec {
        let (size, layout) = size_and_layout(array);
        let _ = writeln!(text, "  {size}, {layout}, {}, block {}, epoch {}", nodes(array), spec.block, spec.epoch.0);
        if spec.grow {
            let _ = writeln!(text, "  takes up what its volumes have when it is started the next time");
        }
        if array.state == State::Started {
            let queues = match spec.run.queues {
                0 => "queues by CPUs".to_owned(),
                queues => format!("{queues} queues"),
            };
            let timeout = format_duration(spec.run.io_timeout);
            let digest = match spec.run.data_digest {
                DataDigest::Crc32c => "",
                DataDigest::None => ", no data digest",
            };
            let _ = writeln!(
                text,
                "  frontend {}, {queues}, depth {}, I/O timeout {timeout}{digest}",
                spec.run.frontend, spec.run.depth
            );
        }
    }
    if let Some(counters) = &array.counters {
        let _ = writeln!(text, "  {}", work(counters));
    }
    for loss in array.losses() {
        let _ = writeln!(text, "  {loss}");
    }
    if let Some(warning) = tags_run_out(array) {
        let _ = writeln!(text, "  {warning}");
    }
    if !array.kernel.is_empty() {
        let facts: Vec<String> = array.kernel.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let _ = writeln!(text, "  kernel: {}", facts.join(", "));
    }
    if !array.nodes.is_empty() {
        text.push_str(&node_table(array));
    }
    text
}

/// What to say while requests that wait at gates may soon leave no room for others.
fn tags_run_out(array: &ArrayStatus) -> Option<String> {
    let parked: u64 = array.nodes.iter().map(|node| node.parked).sum();
    let free = array.tags_free.filter(|free| *free < parked)?;
    Some(format!(
        "warning: {parked} request(s) wait at suspended nodes, and only {free} more can be taken: then the whole device waits. Resume, or start with a \
         greater --depth next time"
    ))
}

fn node_table(array: &ArrayStatus) -> String {
    let live = array.counters.is_some();
    let copies = array.nodes.iter().any(|node| node.replicas.len() > 1);
    let mut rows = vec![cells(["  NODE", "SIZE", "TARGET", "STATE"])];
    if copies {
        rows[0].push("DATA".to_owned());
    }
    if live {
        rows[0].extend(cells(["IN-FLIGHT", "READS", "READ", "WRITES", "WRITTEN", "ERRORS"]));
    }
    let mut errors = String::new();
    for node in &array.nodes {
        for (at, replica) in node.replicas.iter().enumerate() {
            let (name, size) = if at == 0 { (node.name.as_str(), format_size(node.size)) } else { ("", String::new()) };
            let mut row = vec![format!("  {name}"), size, replica.target.to_string(), link(replica)];
            if copies {
                row.push(data(node, replica));
            }
            if live {
                let counters = &replica.counters;
                row.extend([
                    counters.in_flight.to_string(),
                    counters.reads.to_string(),
                    format_size(counters.read_bytes),
                    counters.writes.to_string(),
                    format_size(counters.written_bytes),
                    counters.errors.to_string(),
                ]);
            }
            rows.push(row);
            if at == 0 {
                errors += &held(node);
            }
            errors += &hidden(node, replica);
            if let Some(error) = replica.last_error.as_deref().filter(|_| replica.link != LinkState::Connected) {
                let which = if node.replicas.len() > 1 { format!(" ({})", replica.target) } else { String::new() };
                let _ = writeln!(errors, "  {}{which}: {error}", node.name);
            }
        }
    }
    columns(&rows) + &errors
}

/// The time from now to one that is given in seconds since 1970.
fn until_then(then: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    format_duration(Duration::from_secs(then.saturating_sub(now)))
}

/// Lines about a node whose requests are held, or that moves.
fn held(node: &NodeStatus) -> String {
    let mut text = String::new();
    let waiting = match node.parked {
        0 => String::new(),
        parked => format!(", {parked} request(s) wait"),
    };
    if let Some(suspend) = &node.suspend {
        let what = if suspend.failing { "failing" } else { "suspended" };
        let end = match suspend.until {
            None => "without end".to_owned(),
            Some(until) => format!("{} left, then {}", until_then(until), suspend.on_expire),
        };
        let _ = writeln!(text, "  {}: {what} by {} ({end}), gate {}{waiting}", node.name, suspend.by, node.gate.word());
    } else if node.gate != Gate::Open {
        let _ = writeln!(text, "  {}: gate {}{waiting}", node.name, node.gate.word());
    }
    if let Some(why) = &node.late {
        let _ = writeln!(text, "  {}: late, its requests wait until it has come: {why}", node.name);
    }
    if let Some(scrub) = &node.scrub {
        text += &scrubbed(node, scrub);
    }
    if let Some(migration) = &node.migration {
        let (copied, size) = (format_size(migration.copied), format_size(migration.size));
        let paused = if migration.paused { ", paused" } else { "" };
        let why = migration.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        let _ = writeln!(
            text,
            "  {}: migration {} to {}: {}{paused}, {copied} of {size}{why}",
            node.name,
            migration.number,
            migration.to,
            migration.state.word()
        );
    }
    text
}

/// A line about what a replica has done wrong and nobody has noticed.
fn hidden(node: &NodeStatus, replica: &ReplicaStatus) -> String {
    let counters = &replica.counters;
    let mut text = String::new();
    if counters.rescued_reads > 0 {
        let _ = writeln!(
            text,
            "  {} ({}): {} read(s) were refused here and answered by another replica: look at its disk; 'dst scrub' finds where",
            node.name, replica.target, counters.rescued_reads
        );
    }
    if counters.damaged > 0 {
        let _ = writeln!(
            text,
            "  {} ({}): data arrived damaged {} time(s) and was sent again: a cable, a network card, memory",
            node.name, replica.target, counters.damaged
        );
    }
    text
}

/// A line about the scrub of a node, while one is under way or where the last one has left something to be done.
fn scrubbed(node: &NodeStatus, scrub: &ScrubStatus) -> String {
    let counts = format!(
        "{} region(s) differ, {} cannot be read, {} put right",
        scrub.different, scrub.unreadable, scrub.repaired
    );
    let why = scrub.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    match scrub.state {
        ScrubState::Running => {
            let (compared, size) = (format_size(scrub.compared), format_size(scrub.size));
            format!("  {}: being scrubbed, {compared} of {size}, {counts}{why}\n", node.name)
        }
        _ if scrub.wrong() > 0 => format!("  {}: the last scrub has found: {counts}{why}\n", node.name),
        _ => String::new(),
    }
}

fn link(replica: &ReplicaStatus) -> String {
    match replica.link {
        LinkState::Reconnecting => {
            let down = format_duration(Duration::from_secs(replica.down_seconds));
            format!("reconnecting (try {}, for {down})", replica.tries)
        }
        link => link.word().to_owned(),
    }
}

/// How far a replica can be trusted.
fn data(node: &NodeStatus, replica: &ReplicaStatus) -> String {
    match (replica.state, replica.synced) {
        (Trust::InSync, _) => "in sync".to_owned(),
        (Trust::Stale, _) => "stale".to_owned(),
        (Trust::Syncing, synced) => {
            format!("syncing, {} of {}", format_size(synced.unwrap_or(0)), format_size(node.size))
        }
    }
}

/// The table of `replica list`.
pub(crate) fn replicas(array: &ArrayStatus) -> String {
    let mut rows = vec![cells(["NODE", "K", "TARGET", "DATA", "STATE"])];
    for node in &array.nodes {
        for (at, replica) in node.replicas.iter().enumerate() {
            let target = replica.target.to_string();
            rows.push(cells([&node.name, &at.to_string(), &target, &data(node, replica), &link(replica)]));
        }
    }
    columns(&rows)
}

/// The table of `migration list`.
pub(crate) fn migrations(migrations: &[&MigrationStatus]) -> String {
    if migrations.is_empty() {
        return "no migrations".to_owned();
    }
    let mut rows = vec![cells(["N", "NODE", "FROM", "TO", "STATE", "WHY"])];
    for migration in migrations {
        let (number, node) = (migration.number.to_string(), migration.node.to_string());
        let (from, to) = (migration.from.to_string(), migration.to.to_string());
        let paused = if migration.paused { ", paused" } else { "" };
        let unverified = if migration.verify { "" } else { ", NOT VERIFIED" };
        let state = format!("{}{paused}{unverified}", migration.state.word());
        rows.push(cells([&number, &node, &from, &to, &state, migration.why.as_deref().unwrap_or("")]));
    }
    columns(&rows)
}

fn work(counters: &Counters) -> String {
    format!(
        "{} in flight; {} reads ({}), {} writes ({}), {} flushes, {} errors",
        counters.in_flight,
        counters.reads,
        format_size(counters.read_bytes),
        counters.writes,
        format_size(counters.written_bytes),
        counters.flushes,
        counters.errors
    )
}

/// The table of volumes.
pub(crate) fn volumes(volumes: &[Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes: 'dst volume create' makes one".to_owned();
    }
    let mut rows = vec![cells(["NAME", "SIZE", "ALLOCATED", "KIND", "ARRAY", "NODE", "CONNECTIONS", "ID"])];
    for volume in volumes {
        let (array, node) =
            volume.array.as_ref().map_or(("-", "-"), |member| (member.name.as_str(), member.node.as_str()));
        rows.push(cells([
            &volume.name,
            &format_size(volume.size),
            &format_size(volume.allocated),
            &kind(volume),
            array,
            node,
            &volume.connections.to_string(),
            &volume.id.to_string(),
        ]));
    }
    columns(&rows)
}

/// How a volume takes its space, and when it answers.
fn kind(volume: &Volume) -> String {
    let space = if volume.sparse { "sparse" } else { "preallocated" };
    format!("{space}{}", if volume.write_through { ", write-through" } else { "" })
}

/// What was done with a volume.
pub(crate) fn volume_done(what: &str, server: &ServerAddress, volume: &Volume) -> String {
    let sparse = if volume.sparse { ", sparse" } else { "" };
    let kind = format!("{sparse}{}", if volume.write_through { ", write-through" } else { "" });
    format!("{what} {server}/{} ({}{kind})", volume.name, format_size(volume.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ArrayStatus {
        let json = r#"{
            "name": "storage", "state": "started", "device": "/dev/ublkb0",
            "spec": {
                "id": "00112233445566778899aabbccddeeff", "size": 3221225472, "alg": "striped", "chunk": 65536, "block": 512,
                "epoch": 4, "run": {"frontend": "ublk", "queues": 0, "depth": 128, "io_timeout": "60s"}
            },
            "counters": {"in_flight": 1, "reads": 2, "read_bytes": 8192, "writes": 3, "written_bytes": 1048576, "flushes": 1,
                "errors": 0},
            "nodes": [
                {"name": "n-0", "start": 0, "size": 1610612736, "state": "connected", "replicas": [
                    {"target": "kano:20070/a", "state": "in_sync", "link": "connected", "counters": {"in_flight": 0, "reads": 2,
                    "read_bytes": 8192, "writes": 3, "written_bytes": 1048576, "flushes": 1, "errors": 0}}
                ], "counters": {"in_flight": 0, "reads": 2, "read_bytes": 8192, "writes": 3, "written_bytes": 1048576,
                "flushes": 1, "errors": 0}},
                {"name": "n-128", "start": 128, "size": 1610612736, "state": "reconnecting", "replicas": [
                    {"target": "via:20070/a", "state": "in_sync", "link": "reconnecting", "tries": 7, "down_seconds": 12,
                    "last_error": "connection refused", "counters": {"in_flight": 1, "reads": 0, "read_bytes": 0,
                    "writes": 0, "written_bytes": 0, "flushes": 0, "errors": 0}}
                ], "counters": {"in_flight": 1, "reads": 0, "read_bytes": 0, "writes": 0, "written_bytes": 0, "flushes": 0,
                "errors": 0}}
            ]
        }"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn status_says_what_the_json_says() {
        let expected = "\
storage: started as /dev/ublkb0
  3G, striped 64K, 2 nodes, block 512, epoch 4
  frontend ublk, queues by CPUs, depth 128, I/O timeout 1m
  1 in flight; 2 reads (8K), 3 writes (1M), 1 flushes, 0 errors
  NODE   SIZE  TARGET        STATE                          IN-FLIGHT  READS  READ  WRITES  WRITTEN  ERRORS
  n-0    1.5G  kano:20070/a  connected                      0          2      8K    3       1M       0
  n-128  1.5G  via:20070/a   reconnecting (try 7, for 12s)  1          0      0     0       0        0
  n-128: connection refused
";
        assert_eq!(status(&[example()]), expected);
        let mut copies = example();
        let stale = ReplicaStatus { state: Trust::Stale, ..copies.nodes[1].replicas[0].clone() };
        let filling =
            ReplicaStatus { state: Trust::Syncing, synced: Some(1 << 29), ..copies.nodes[0].replicas[0].clone() };
        copies.nodes[0].replicas.extend([stale, filling]);
        let expected = "\
NODE   K  TARGET        DATA                   STATE
n-0    0  kano:20070/a  in sync                connected
n-0    1  via:20070/a   stale                  reconnecting (try 7, for 12s)
n-0    2  kano:20070/a  syncing, 512M of 1.5G  connected
n-128  0  via:20070/a   in sync                reconnecting (try 7, for 12s)
";
        assert_eq!(replicas(&copies), expected);
        let text = status(&[copies]);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[1], "3G, striped 64K, 2 nodes of up to 3 replicas, block 512, epoch 4");
        assert!(
            lines[6].starts_with("via:20070/a   reconnecting (try 7, for 12s)  stale                  1"),
            "{text}"
        );
        assert_eq!(lines[9], "n-0 (via:20070/a): connection refused");
        let again: ArrayStatus = serde_json::from_str(&serde_json::to_string(&example()).unwrap()).unwrap();
        assert_eq!(again, example());
    }

    #[test]
    fn a_device_that_will_soon_wait_is_warned_of() {
        let mut array = example();
        for (free, parked, warned) in
            [(Some(100), 28, false), (Some(28), 100, true), (Some(0), 128, true), (None, 9, false)]
        {
            (array.tags_free, array.nodes[1].parked) = (free, parked);
            let text = status(std::slice::from_ref(&array));
            assert_eq!(text.contains("warning:"), warned, "{free:?} {parked}: {text}");
        }
        (array.tags_free, array.nodes[1].parked) = (Some(28), 100);
        assert!(status(&[array]).contains("100 request(s) wait at suspended nodes, and only 28 more can be taken"));
    }

    #[test]
    fn a_list_names_what_is_wrong() {
        let mut corrupt = ArrayStatus { name: "bad".to_owned(), state: State::Corrupt, ..example() };
        (corrupt.spec, corrupt.device, corrupt.why) = (None, None, Some("its record is damaged".to_owned()));
        corrupt.nodes.clear();
        let text = arrays(&[example(), corrupt]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "storage  started  3G    striped 64K  2      /dev/ublkb0");
        assert_eq!(lines[2], "bad      corrupt  -     -            0      -");
        assert_eq!(lines[3], "bad: its record is damaged");
    }
}
