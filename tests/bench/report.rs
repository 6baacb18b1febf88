//! What was measured: kept sample by sample, shown as medians, and as ratios of one server to another within the same round.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

/// One server, one kind of work, one round.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) table: &'static str,
    pub(crate) work: String,
    pub(crate) who: String,
    pub(crate) round: usize,
    /// Requests a second; of copies, MiB a second.
    pub(crate) rate: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU time of the server and of the client for one request, µs.
    pub(crate) server_us: f64,
    pub(crate) client_us: f64,
    /// Context switches for one request, where they are counted instead of the client's time: then `server_us` is of all.
    pub(crate) switches: f64,
}

/// Which figure of a sample.
pub(crate) type Figure = fn(&Sample) -> f64;

/// A ratio that is looked for.
pub(crate) struct Goal {
    pub(crate) table: &'static str,
    pub(crate) work: &'static str,
    pub(crate) who: &'static str,
    /// The best of these in each round.
    pub(crate) against: &'static [&'static str],
    pub(crate) what: &'static str,
    pub(crate) figure: Figure,
    /// At least so much of theirs, or with `most` at most.
    pub(crate) bound: f64,
    pub(crate) most: bool,
}

/// Everything of one run.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) samples: Vec<Sample>,
    /// Lines of other kinds: name, value, unit.
    pub(crate) facts: Vec<(String, f64, &'static str)>,
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// The values in order of their first appearance, each once.
fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for value in values {
        if !seen.iter().any(|other| other == value) {
            seen.push(value.to_owned());
        }
    }
    seen
}

impl Report {
    fn of<'a>(&'a self, table: &'a str, work: &'a str, who: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.table == table && sample.work == work && sample.who == who)
    }

    pub(crate) fn median(&self, table: &str, work: &str, who: &str, figure: Figure) -> f64 {
        median(self.of(table, work, who).map(figure).collect())
    }

    pub(crate) fn tables(&self) -> Vec<String> {
        distinct(self.samples.iter().map(|sample| sample.table))
    }

    pub(crate) fn works(&self, table: &str) -> Vec<String> {
        distinct(self.samples.iter().filter(|sample| sample.table == table).map(|sample| sample.work.as_str()))
    }

    pub(crate) fn whos(&self, table: &str) -> Vec<String> {
        distinct(self.samples.iter().filter(|sample| sample.table == table).map(|sample| sample.who.as_str()))
    }

    /// The median of the ratios of each round; against several, to the best of them in that round.
    pub(crate) fn ratio(&self, goal: &Goal) -> f64 {
        let ratio = |own: &Sample| {
            let theirs = goal.against.iter().flat_map(|who| self.of(goal.table, goal.work, who));
            let theirs = theirs.filter(|sample| sample.round == own.round).map(goal.figure);
            let best = if goal.most { theirs.fold(f64::INFINITY, f64::min) } else { theirs.fold(0.0, f64::max) };
            (goal.figure)(own) / best
        };
        median(self.of(goal.table, goal.work, goal.who).map(ratio).collect())
    }

    /// The tables, as Markdown that also reads well on a terminal.
    pub(crate) fn text(&self, goals: &[Goal]) -> String {
        let mut out = String::new();
        for table in self.tables() {
            let _ = writeln!(out, "\n{table}\n");
            let counted = self.samples.iter().any(|sample| sample.table == table && !sample.switches.is_nan());
            let (cpu, last) = if counted { ("CPU µs/IO", "switches/IO") } else { ("server µs/IO", "client µs/IO") };
            let head = ["work", "server", "rate /s", "p50 µs", "p99 µs", cpu, last];
            let mut rows = vec![head.map(str::to_owned).to_vec()];
            for work in self.works(&table) {
                for who in self.whos(&table) {
                    if self.of(&table, &work, &who).next().is_none() {
                        continue;
                    }
                    let value = |figure: Figure, digits: usize| {
                        format!("{:.digits$}", self.median(&table, &work, &who, figure))
                    };
                    rows.push(vec![
                        work.clone(),
                        who.clone(),
                        value(|sample| sample.rate, 0),
                        value(|sample| sample.p50_us, 0),
                        value(|sample| sample.p99_us, 0),
                        value(|sample| sample.server_us, 1),
                        value(if counted { |sample| sample.switches } else { |sample| sample.client_us }, 1),
                    ]);
                }
            }
            out.push_str(&aligned(&rows));
        }
        if !self.facts.is_empty() {
            let _ = writeln!(out, "\nOther figures\n");
            let mut rows = vec![vec!["what".to_owned(), "value".to_owned(), "unit".to_owned()]];
            rows.extend(
                self.facts
                    .iter()
                    .map(|(name, value, unit)| vec![name.clone(), format!("{value:.1}"), (*unit).to_owned()]),
            );
            out.push_str(&aligned(&rows));
        }
        if !goals.is_empty() {
            let _ = writeln!(out, "\nRatios (medians of those within each round)\n");
            let mut rows = vec![["what", "wanted", "reached", ""].map(str::to_owned).to_vec()];
            for goal in goals {
                let ratio = self.ratio(goal);
                let met = if goal.most { ratio <= goal.bound } else { ratio >= goal.bound };
                rows.push(vec![
                    format!(
                        "{}: {} of {}, {}, to {}",
                        goal.table,
                        goal.what,
                        goal.who,
                        goal.work,
                        goal.against.join(", ")
                    ),
                    format!("{} {:.2}", if goal.most { "<=" } else { ">=" }, goal.bound),
                    format!("{ratio:.2}"),
                    if met { "yes" } else { "no" }.to_owned(),
                ]);
            }
            out.push_str(&aligned(&rows));
        }
        out
    }

    pub(crate) fn json(&self, about: &Value) -> Value {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|sample| {
                json!({
                    "table": sample.table, "work": sample.work, "server": sample.who, "round": sample.round,
                    "rate": sample.rate, "p50_us": sample.p50_us, "p99_us": sample.p99_us,
                    "server_us": sample.server_us, "client_us": sample.client_us,
                    "switches": sample.switches,
                })
            })
            .collect();
        let facts: Vec<Value> = self
            .facts
            .iter()
            .map(|(name, value, unit)| json!({ "what": name, "value": value, "unit": unit }))
            .collect();
        json!({ "about": about, "samples": samples, "facts": facts })
    }

    /// Puts NAME.txt, NAME.json and NAME.svg into a directory.
    pub(crate) fn store(&self, dir: &Path, name: &str, about: &Value, goals: &[Goal]) {
        std::fs::create_dir_all(dir).unwrap();
        let put = |ending: &str, text: &str| std::fs::write(dir.join(format!("{name}.{ending}")), text).unwrap();
        put("txt", &self.text(goals));
        put("json", &format!("{:#}\n", self.json(about)));
        if !self.samples.is_empty() {
            put("svg", &crate::chart::draw(self));
        }
    }
}

/// Rows of a Markdown table; the first is its head.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows[0].len();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let number = cell.chars().next().is_some_and(|first| first.is_ascii_digit()) && column >= 1;
            let _ = if number { write!(out, "| {pad}{cell} ") } else { write!(out, "| {cell}{pad} ") };
        }
        out.push_str("|\n");
        if number == 0 {
            for width in &widths {
                let _ = write!(out, "|{}", "-".repeat(width + 2));
            }
            out.push_str("|\n");
        }
    }
    out
}

/// What was measured on what, and when.
pub(crate) fn about(command: &str) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo");
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let tool = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().next().unwrap_or("").to_owned()
    };
    json!({
        "command": command,
        "date": tool("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        "commit": tool("git", &["describe", "--always", "--dirty", "--abbrev=12"]),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": model,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").trim(),
        "nbdkit": tool("nbdkit", &["--version"]),
        "qemu-nbd": tool("qemu-nbd", &["--version"]),
        "fio": tool("fio", &["--version"]),
    })
}
