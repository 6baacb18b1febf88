//! What a process costs, from the kernel's own books.

use std::collections::BTreeMap;
use std::path::Path;

use nix::sys::resource::{UsageWho, getrusage};

/// CPU time of the calling thread, seconds.
pub(crate) fn own_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// CPU time of processes with all their threads, those that have ended included, seconds. In steps of 10 ms.
pub(crate) fn cpu_of(processes: &[u32]) -> f64 {
    processes.iter().map(|id| ticks(&std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap())).sum::<f64>() / 100.0
}

/// User and system time in a line of `/proc/PID/stat`: the words 14 and 15, of which the second may have blanks in it.
fn ticks(stat: &str) -> f64 {
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let words: Vec<&str> = rest.split(' ').collect();
    words[11].parse::<f64>().unwrap() + words[12].parse::<f64>().unwrap()
}

/// A line `Name: 123 kB` of a file of that form.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn status(of: &Path) -> String {
    std::fs::read_to_string(of.join("status")).unwrap_or_default()
}

/// Memory that a process has, MiB: all of it, and what is its own (not files of programs and libraries).
pub(crate) fn resident_mib(process: u32) -> (f64, f64) {
    let text = status(Path::new(&format!("/proc/{process}")));
    let mib = |name| field(&text, name) as f64 / 1024.0;
    (mib("VmRSS"), mib("RssAnon") + mib("RssShmem"))
}

/// Open files of a process.
pub(crate) fn open_files(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).map_or(0, Iterator::count)
}

/// How often each thread of a process has been woken: it had gone to sleep by itself before.
pub(crate) fn wakeups(process: u32) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let one = |task: std::fs::DirEntry| {
        let text = status(&task.path());
        let name = text.lines().next().unwrap_or("").trim_start_matches("Name:").trim().to_owned();
        let id = task.file_name().into_string().unwrap();
        (format!("{name} {id}"), field(&text, "voluntary_ctxt_switches"))
    };
    tasks.flatten().map(one).collect()
}
