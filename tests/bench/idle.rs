//! What arrays cost that nobody uses: memory, wakeups, open files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::farm::Farm;
use crate::fio::fio;
use crate::load::Work;
use crate::meter::{open_files, resident_mib, wakeups};
use crate::peers::Ground;
use crate::report::Report;
use crate::{MEMORY, is_quick};

/// Nodes of the arrays that are looked at.
const NODES: [usize; 3] = [1, 4, 32];
/// The array's and the server's threads are watched for this long: keepalives come every 10 s.
const WATCHED: Duration = Duration::from_secs(21);

/// Fills in the report's facts.
pub(crate) fn measure(report: &mut Report) {
    let watched = if is_quick() { Duration::from_secs(5) } else { WATCHED };
    let ground = Ground::new(Path::new(MEMORY));
    // One after the other starts, all are watched together.
    let farms: Vec<(usize, Farm)> = NODES.iter().map(|nodes| (*nodes, started(&ground, *nodes))).collect();
    // Give back what a start takes.
    std::thread::sleep(Duration::from_secs(2));
    let look = |farm: &Farm| [farm.array_id(), farm.servers[0].process_id()].map(wakeups);
    let before: Vec<_> = farms.iter().map(|(_, farm)| look(farm)).collect();
    std::thread::sleep(watched);
    let mut facts = Vec::new();
    for ((nodes, farm), before) in farms.iter().zip(before) {
        let after = look(farm);
        let processes = [("dstd array", farm.array_id()), ("dstd server", farm.servers[0].process_id())];
        for ((name, process), (before, after)) in processes.into_iter().zip(before.iter().zip(&after)) {
            let sum: u64 = after.iter().map(|(thread, count)| count - before.get(thread).unwrap_or(&0)).sum();
            let what = |figure: &str| format!("{name}, {nodes} node(s), 2 queues, depth 128: {figure}");
            let (all, own) = resident_mib(process);
            facts.push((what("resident"), all, "MiB"));
            facts.push((what("of that its own"), own, "MiB"));
            facts.push((what("open files"), open_files(process) as f64, "files"));
            facts.push((what("wakeups when idle"), sum as f64 / watched.as_secs_f64(), "a second"));
            if std::env::var_os("THREADS").is_some() {
                for (thread, count) in after {
                    let count = count - before.get(thread).unwrap_or(&0);
                    eprintln!("{} {thread}: {:.2} a second", what("thread"), count as f64 / watched.as_secs_f64());
                }
            }
        }
    }
    report.facts.extend(facts);
    eprintln!("idle: done");
}

/// An array of so many nodes, on one server, that has been used with all its tags.
fn started(ground: &Ground, nodes: usize) -> Farm {
    let pool: PathBuf = ground.dir.join(format!("pool-{nodes}"));
    let farm = Farm::with_pools(&[pool]);
    let volumes: Vec<String> = (0..nodes).map(|index| farm.volume(0, &format!("n{index}"), "8M")).collect();
    farm.dst(&format!("create idle --alg striped {}", volumes.join(" ")));
    let uri = farm.start_nbd("idle", "--queues 2 --depth 128");
    let work = Work { write: true, bytes: 128 << 10, depth: 128 };
    fio(&uri, work, 1.0, &["--numjobs=2", "--group_reporting", "--thread"]);
    farm
}
