//! What is done with one node of a started array: its words on the command line, and the functions that ask.

use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use dst::control::migration::{MigrationState, MigrationStatus};
use dst::control::node::{Act, Keep, Migrate, OnExpire, Replace, Suspend, Ttl, Which};
use dst::control::status::ArrayStatus;
use dst::control::target::Target;
use dst::units::{NodeId, format_duration, format_size, parse_duration, parse_size};
use serde::Serialize;

use crate::args::name;
use crate::client::Daemon;
use crate::commands::warn;
use crate::render;

/// How often a migration is looked at while it is waited for.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// The rate is that of so many looks.
const RATE_LOOKS: usize = 10;
/// Characters of a progress bar.
const BAR: usize = 30;

/// What is to be done with a node.
#[derive(Subcommand)]
pub(crate) enum NodeVerb {
    /// Holds the requests of one node; those of the others go on
    #[command(
        after_help = "Returns when nothing is in flight on the node and what it had acknowledged is durable. What waits is neither failed nor \
        timed out until 'dst resume', or until the time has passed. Asked again, the time begins anew.\n\n\
        Example:\n  dst suspend storage n-800 --ttl 10m --on-expire resume"
    )]
    Suspend {
        #[command(flatten)]
        which: NodeArguments,
        /// For how long at most, or none
        #[arg(long, value_name = "TIME", default_value_t = Ttl::default())]
        ttl: Ttl,
        /// What happens then: resume, or fail (what waits ends with EIO, and so does what comes)
        #[arg(long, value_name = "WHAT", default_value_t = OnExpire::Resume)]
        on_expire: OnExpire,
    },
    /// Lets the requests of a suspended node go on
    Resume {
        #[command(flatten)]
        which: NodeArguments,
    },
    /// Ends what waits at a suspended node with EIO, and what comes, until 'dst resume'
    Fail {
        #[command(flatten)]
        which: NodeArguments,
    },
    /// Accepts what the machines of a node have lost, so that what is left is served
    #[command(
        after_help = "A machine has come back (a power cut, a crash) without writes that it had acknowledged and not flushed, and no other replica has \
        them: requests of the node fail, so that nobody takes older data for good. Check the filesystem afterwards, or go back to a backup. Works on \
        an array that is not started, too.\n\n\
        Example:\n  dst accept-loss storage n-800"
    )]
    AcceptLoss {
        #[command(flatten)]
        which: NodeArguments,
    },
    /// Puts another target in the place of a suspended node's replica
    #[command(
        after_help = "With siblings in sync the new target is filled from them. Of an only replica the data would be lost: it is replaced only with \
        --force, your word that you have copied it to the new target while the node was suspended.\n\n\
        Example:\n  dst suspend storage n-800 --ttl none\n  dst replace storage n-800 --to tor/spare --force\n  dst resume storage n-800"
    )]
    Replace {
        #[command(flatten)]
        which: NodeArguments,
        /// HOST:PORT/VOLUME (port 20070 if left out), or the absolute path of a file or block device
        #[arg(long, value_name = "TARGET")]
        to: Target,
        /// Which replica: K of 'dst replica list'
        #[arg(long, value_name = "K")]
        replica: Option<usize>,
        /// Your word that the new target has the data
        #[arg(long)]
        force: bool,
    },
    /// Moves a node to another target while it is in use
    #[command(
        after_help = "Copies, compares, then holds the node's requests for a moment and goes on with the new target. HOST:PORT/ alone makes a new volume \
        there. Until the last moment nothing is lost by an abort, or by the death of anything. Ctrl-C detaches: the migration goes on.\n\n\
        Examples:\n  dst migrate storage n-800 --to tor:20070/data3\n  dst migrate storage n-800 --to tor/ --rate 50M --keep-source"
    )]
    Migrate(MigrateArguments),
    /// Shows and steers migrations
    #[command(subcommand)]
    Migration(MigrationVerb),
}

/// A node of an array.
#[derive(Args)]
pub(crate) struct NodeArguments {
    /// The array
    #[arg(value_parser = name)]
    array: String,
    /// The node, such as n-800
    node: NodeId,
}

/// Arguments of `migrate`.
#[derive(Args)]
pub(crate) struct MigrateArguments {
    #[command(flatten)]
    which: NodeArguments,
    /// HOST:PORT/VOLUME, HOST:PORT/ for a new volume (port 20070 if left out), or an absolute path
    #[arg(long, value_name = "TARGET", value_parser = destination)]
    to: String,
    /// Which replica moves: K of 'dst replica list'; may be left out where there is one
    #[arg(long, value_name = "K")]
    replica: Option<usize>,
    /// Copy at most so much in a second; 0: no bound
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "200M")]
    rate: u64,
    /// Requests of the node wait at most this long, or the cut-over is tried again later
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "50ms")]
    max_freeze: Duration,
    /// Give the new target up when it takes longer than this for one request
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "1s")]
    target_timeout: Duration,
    /// Do not compare the two before the cut-over; nothing is certified then
    #[arg(long)]
    no_verify: bool,
    /// Write the former target, too, for this long, so that the migration can be undone
    #[arg(long, value_name = "TIME", value_parser = parse_duration, num_args = 0..=1, default_missing_value = "24h")]
    keep_source: Option<Duration>,
    /// Return as soon as it has begun
    #[arg(long)]
    detach: bool,
}

/// What is to be done with migrations.
#[derive(Subcommand)]
pub(crate) enum MigrationVerb {
    /// Lists the migrations of an array: those under way and the last ones
    List {
        /// The array
        #[arg(value_parser = name)]
        array: String,
    },
    /// Shows a node's migration: the one under way, or the last one and what it has certified
    Show(WhichArguments),
    /// Lets a migration begin nothing further
    Pause(WhichArguments),
    /// Lets a paused migration go on
    Resume(WhichArguments),
    /// Ends a migration; the node stays where it is
    Abort(WhichArguments),
    /// Moves a node back to its former target, while that is kept
    Undo(WhichArguments),
    /// Ends the keeping of the former target
    Release(WhichArguments),
}

/// A migration of a node.
#[derive(Args)]
pub(crate) struct WhichArguments {
    #[command(flatten)]
    which: NodeArguments,
    /// Its number, as in 'dst migration list'
    #[arg(long, value_name = "N")]
    id: Option<u64>,
}

fn destination(text: &str) -> Result<String, String> {
    match text.strip_suffix('/').filter(|server| !server.is_empty() && !server.contains('/')) {
        Some(server) => server.parse::<dst::control::target::ServerAddress>().map(|server| format!("{server}/")),
        None => text.parse::<Target>().map(|target| target.to_string()),
    }
}

/// Does what was typed.
pub(crate) fn run(daemon: &Daemon, verb: NodeVerb, json: bool) -> Result<(), String> {
    match verb {
        NodeVerb::Suspend { which, ttl, on_expire } => {
            let by = std::env::var("USER").ok().map(|user| format!("'dst suspend' of {user}"));
            let array = ask(daemon, &which, "suspend", &Suspend { ttl, on_expire, by })?;
            let until = match ttl {
                Ttl(None) => "until 'dst resume'".to_owned(),
                Ttl(Some(_)) => format!("for {ttl} at most"),
            };
            render::one(&array, json, |array| format!("suspended {} of {} {until}", which.node, array.name))
        }
        NodeVerb::Resume { which } => {
            let array = ask(daemon, &which, "resume", &())?;
            render::one(&array, json, |array| format!("resumed {} of {}", which.node, array.name))
        }
        NodeVerb::Fail { which } => {
            let array = ask(daemon, &which, "fail", &())?;
            render::one(&array, json, |array| {
                format!("requests of {} of {} fail until it is resumed", which.node, array.name)
            })
        }
        NodeVerb::AcceptLoss { which } => {
            let array = ask(daemon, &which, "accept-loss", &())?;
            let done = |array: &ArrayStatus| {
                format!("accepted: {} of {} serves what is left. Check what is stored on it", which.node, array.name)
            };
            render::one(&array, json, done)
        }
        NodeVerb::Replace { which, to, replica, force } => {
            let array = ask(daemon, &which, "replace", &Replace { to: to.to_string(), replica, force })?;
            render::one(&array, json, |array| {
                format!(
                    "replaced: {} of {} lives on {to}. Go on with: dst resume {} {}",
                    which.node, array.name, array.name, which.node
                )
            })
        }
        NodeVerb::Migrate(typed) => migrate(daemon, typed, json),
        NodeVerb::Migration(verb) => migration(daemon, verb, json),
    }
}

fn ask(daemon: &Daemon, which: &NodeArguments, verb: &str, body: &impl Serialize) -> Result<ArrayStatus, String> {
    let path = format!("/v1/arrays/{}/nodes/{}/{verb}", which.array, which.node);
    let array: ArrayStatus = daemon.ask("POST", &path, body)?;
    warn(&array.warnings);
    Ok(array)
}

fn migrate(daemon: &Daemon, typed: MigrateArguments, json: bool) -> Result<(), String> {
    let MigrateArguments { which, to, replica, rate, max_freeze, target_timeout, no_verify, keep_source, detach } =
        typed;
    let keep_source = keep_source.map(Keep);
    let begun = ask(
        daemon,
        &which,
        "migrate",
        &Migrate { to, replica, rate, max_freeze, target_timeout, verify: !no_verify, keep_source },
    )?;
    let migration = last(&begun, which.node, None)?;
    if detach {
        return render::one(&migration, json, |migration| {
            format!("{} of {} is moving to {} (migration {})", which.node, which.array, migration.to, migration.number)
        });
    }
    let ended = watch(daemon, &which, migration.number)?;
    render::one(&ended, json, show)?;
    match ended.state {
        MigrationState::Failed | MigrationState::Aborted => {
            Err(format!("{} of {} stays where it was", which.node, which.array))
        }
        _ => Ok(()),
    }
}

/// Shows how far it is until the node is on its new target, or stays where it was.
fn watch(daemon: &Daemon, which: &NodeArguments, number: u64) -> Result<MigrationStatus, String> {
    let terminal = std::io::stderr().is_terminal();
    let mut pace = Pace::default();
    let mut told = None;
    loop {
        let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{}", which.array), &())?;
        let migration = last(&array, which.node, Some(number))?;
        let over = migration.state.is_over() || migration.state == MigrationState::Committed;
        let line = progress(&migration, pace.at(Instant::now(), migration.copied));
        if terminal {
            eprint!("\r\x1b[K{line}{}", if over { "\n" } else { "" });
            let _ = std::io::stderr().flush();
        } else if told != Some(migration.state) {
            eprintln!("{line}");
        }
        told = Some(migration.state);
        if over {
            return Ok(migration);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// How fast something goes, by the last looks at it.
#[derive(Default)]
pub(crate) struct Pace(Vec<(Instant, u64)>);

impl Pace {
    /// So much is done now. Bytes a second, once that is known.
    pub(crate) fn at(&mut self, now: Instant, done: u64) -> Option<u64> {
        self.0.push((now, done));
        if self.0.len() > RATE_LOOKS {
            self.0.remove(0);
        }
        let (began, first) = *self.0.first()?;
        let nanos = now.duration_since(began).as_nanos();
        if done <= first || nanos == 0 {
            return None;
        }
        Some(u64::try_from(u128::from(done - first) * 1_000_000_000 / nanos).unwrap_or(u64::MAX).max(1))
    }
}

/// A bar, and what it means in numbers.
pub(crate) fn bar(done: u64, size: u64) -> String {
    let share = |of: u64| usize::try_from(u128::from(done) * u128::from(of) / u128::from(size.max(1))).unwrap_or(0);
    let filled = share(BAR as u64);
    let bar = format!("[{}{}]", "=".repeat(filled), " ".repeat(BAR.saturating_sub(filled)));
    format!("{bar} {:>3}% of {}", share(100), format_size(size))
}

/// One line: bar, rate, time that is left, phase.
fn progress(migration: &MigrationStatus, rate: Option<u64>) -> String {
    let done = if migration.state >= MigrationState::Mirroring
        && !matches!(migration.state, MigrationState::Failed | MigrationState::Aborted)
    {
        migration.size
    } else {
        migration.copied.min(migration.size)
    };
    let mut line = format!("{}, {}", bar(done, migration.size), migration.state.word());
    if migration.paused {
        line += ", paused";
    }
    if let Some(rate) = rate.filter(|_| migration.state == MigrationState::Copying) {
        let left = Duration::from_secs((migration.size - done) / rate);
        line += &format!(", {}/s, {} left", format_size(rate), format_duration(left));
    }
    if let Some(why) = &migration.why {
        line += &format!(": {why}");
    }
    line
}

fn migration(daemon: &Daemon, verb: MigrationVerb, json: bool) -> Result<(), String> {
    let (act, typed) = match verb {
        MigrationVerb::List { array } => {
            let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{array}"), &())?;
            let all: Vec<&MigrationStatus> = all(&array).collect();
            return render::one(&all, json, |all| render::migrations(all));
        }
        MigrationVerb::Show(WhichArguments { which, id }) => {
            let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{}", which.array), &())?;
            return render::one(&last(&array, which.node, id)?, json, show);
        }
        MigrationVerb::Pause(typed) => (Act::Pause, typed),
        MigrationVerb::Resume(typed) => (Act::Resume, typed),
        MigrationVerb::Abort(typed) => (Act::Abort, typed),
        MigrationVerb::Undo(typed) => (Act::Undo, typed),
        MigrationVerb::Release(typed) => (Act::Release, typed),
    };
    let WhichArguments { which, id } = typed;
    let array = ask(daemon, &which, &format!("migration/{}", act.word()), &Which { number: id })?;
    render::one(&array, json, |array| match act {
        Act::Pause => format!("the migration of {} of {} is paused", which.node, array.name),
        Act::Resume => format!("the migration of {} of {} goes on", which.node, array.name),
        Act::Abort => format!("the migration of {} of {} has ended; it is where it was", which.node, array.name),
        Act::Undo => format!("{} of {} is moving back", which.node, array.name),
        Act::Release => format!("the former target of {} of {} is kept no longer", which.node, array.name),
    })
}

/// All migrations that are known, the oldest first.
fn all(array: &ArrayStatus) -> impl Iterator<Item = &MigrationStatus> {
    array.migrations.iter().chain(array.nodes.iter().filter_map(|node| node.migration.as_ref()))
}

/// A node's newest migration, or the one with this number.
fn last(array: &ArrayStatus, node: NodeId, number: Option<u64>) -> Result<MigrationStatus, String> {
    let fits =
        |migration: &&MigrationStatus| migration.node == node && number.is_none_or(|number| number == migration.number);
    all(array).filter(fits).max_by_key(|migration| migration.number).cloned().ok_or_else(|| match number {
        Some(number) => format!(
            "{node} of {} has no migration {number} that is still known: 'dst migration list {}'",
            array.name, array.name
        ),
        None => format!("{node} of {} has not been migrated", array.name),
    })
}

/// Everything that is known of a migration.
fn show(migration: &MigrationStatus) -> String {
    let mut text = format!(
        "migration {} of {}: {}{}\n  from {} to {}, {}\n",
        migration.number,
        migration.node,
        migration.state.word(),
        if migration.paused { ", paused" } else { "" },
        migration.from,
        migration.to,
        format_size(migration.size)
    );
    if let Some(resumed) = migration.resumed {
        text += &format!("  was interrupted, and has gone on at {}\n", format_size(resumed));
    }
    let moved = matches!(migration.state, MigrationState::Done | MigrationState::Committed);
    if let Some(nanos) = migration.freeze_nanos {
        let rolled_back = match migration.rolled_back {
            0 => String::new(),
            times => format!(
                ", after {times} cut-over(s) that would have taken longer than {}",
                format_duration(migration.max_freeze)
            ),
        };
        text += &format!("  requests waited for {}.{:03} ms{rolled_back}\n", nanos / 1_000_000, nanos / 1000 % 1000);
    }
    if moved {
        match &migration.root {
            Some(root) => text += &format!("  verified: {} regions, digest {root}\n", migration.regions),
            None => text += "  NOT VERIFIED\n",
        }
    } else if !migration.verify {
        text += "  will be NOT VERIFIED\n";
    }
    if let Some(ended) = migration.ended {
        text += &format!("  took {}\n", format_duration(Duration::from_secs(ended.saturating_sub(migration.begun))));
    }
    if let Some(why) = &migration.why {
        text += &format!("  {why}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use dst::limits;
    use dst::units::{Epoch, Id, Lba};

    fn example() -> MigrationStatus {
        MigrationStatus {
            number: 3,
            id: Id([3; 16]),
            node: NodeId(Lba(800)),
            from: "kano:20070/a".parse().unwrap(),
            to: "tor:20070/b".parse().unwrap(),
            state: MigrationState::Copying,
            paused: false,
            rate: limits::SYNC_RATE,
            max_freeze: limits::MAX_FREEZE_DEFAULT,
            target_timeout: limits::TARGET_TIMEOUT,
            verify: true,
            keep_until: None,
            epoch: Epoch(4),
            begun: 1000,
            ended: None,
            size: 1 << 30,
            copied: 1 << 28,
            resumed: None,
            regions: 0,
            root: None,
            freeze_nanos: None,
            rolled_back: 0,
            why: None,
        }
    }

    #[test]
    fn progress_has_rate_time_and_phase() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.at(now, 1 << 27), None);
        let rate = pace.at(now + Duration::from_secs(2), 1 << 28);
        let line = progress(&example(), rate);
        assert_eq!(line, "[=======                       ]  25% of 1G, copying, 64M/s, 12s left");
        let line = progress(&MigrationStatus { state: MigrationState::Verifying, ..example() }, rate);
        assert_eq!(line, "[==============================] 100% of 1G, verifying");
    }

    #[test]
    fn a_certificate_says_whether_it_was_verified() {
        let done = MigrationStatus {
            state: MigrationState::Done,
            freeze_nanos: Some(1_234_567),
            root: Some("ab".repeat(32)),
            regions: 1024,
            ended: Some(1061),
            rolled_back: 1,
            ..example()
        };
        let text = show(&done);
        assert!(
            text.contains("requests waited for 1.234 ms, after 1 cut-over(s) that would have taken longer than 50ms"),
            "{text}"
        );
        assert!(text.contains("verified: 1024 regions, digest abab") && text.contains("took 61s"), "{text}");
        assert!(!text.contains("interrupted"), "{text}");
        let text = show(&MigrationStatus { root: None, verify: false, resumed: Some(1 << 20), ..done });
        assert!(text.contains("NOT VERIFIED") && text.contains("was interrupted, and has gone on at 1M"), "{text}");
    }

    #[test]
    fn destinations_are_targets_or_servers() {
        assert_eq!(destination("tor/").unwrap(), "tor:20070/");
        assert_eq!(destination("tor/x").unwrap(), "tor:20070/x");
        assert_eq!(destination("/dev/sdb").unwrap(), "/dev/sdb");
        for bad in ["", "/", "tor", "a/b/"] {
            assert!(destination(bad).is_err(), "{bad}");
        }
    }
}
