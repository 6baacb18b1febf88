//! fio as the client: one job on one connection.

use crate::farm::run;
use crate::load::{Outcome, Work};

/// Runs one kind of work for so long.
pub(crate) fn fio(uri: &str, work: Work, seconds: f64, more: &[&str]) -> Outcome {
    let op = if work.write { "write" } else { "read" };
    let rw = format!("--rw=rand{op}");
    let (bytes, depth) = (format!("--bs={}", work.bytes), format!("--iodepth={}", work.depth));
    let (uri, time) = (format!("--uri={uri}"), format!("--runtime={}ms", (seconds * 1e3) as u64));
    let fixed = [
        "--name=bench",
        "--ioengine=nbd",
        "--output-format=json",
        "--time_based",
        "--norandommap",
        "--randrepeat=0",
        // Filled once: making data is no work of a server's client.
        "--refill_buffers=0",
        "--scramble_buffers=0",
    ];
    let mut words: Vec<&str> = fixed.to_vec();
    words.extend([rw.as_str(), &bytes, &depth, &uri, &time]);
    words.extend(more);
    parse(&run("fio", &words), op)
}

/// What fio says in JSON of its one job, or of one of several.
pub(crate) fn parse(text: &str, op: &str) -> Outcome {
    // Notes may come first.
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let mut sum = Outcome::default();
    for job in json["jobs"].as_array().unwrap() {
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
        let part = &job[op];
        let seconds = number(&part["runtime"]) / 1e3;
        let share = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
        let percentile = |name: &str| number(&part["clat_ns"]["percentile"][name]) / 1e3;
        sum.requests += part["total_ios"].as_u64().unwrap();
        sum.seconds = sum.seconds.max(seconds);
        sum.cpu_seconds += share * number(&job["job_runtime"]) / 1e3;
        sum.p50_us = sum.p50_us.max(percentile("50.000000"));
        sum.p99_us = sum.p99_us.max(percentile("99.000000"));
    }
    sum
}
