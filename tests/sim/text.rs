//! How operations and moments are written for people: in violations, traces and the expected texts of `tests/data`.

use crate::judge::{Record, State, What};

/// Nanoseconds as milliseconds with as many decimals as are needed.
pub(crate) fn time(nanos: u64) -> String {
    let (millis, rest) = (nanos / 1_000_000, nanos % 1_000_000);
    if rest == 0 { format!("{millis}ms") } else { format!("{millis}.{rest:06}ms") }
}

/// What an operation does, in one word.
pub(crate) fn what(what: What) -> &'static str {
    match what {
        What::Read => "read",
        What::Write { fua: false } => "write",
        What::Write { fua: true } => "write-fua",
        What::Zero { fua: false } => "zero",
        What::Zero { fua: true } => "zero-fua",
        What::Flush => "flush",
    }
}

/// An operation: its number, what and where, from when to when.
pub(crate) fn record(record: &Record) -> String {
    let Record { serial, start, sectors, invoked_at, ended_at, .. } = *record;
    let place = if record.what == What::Flush { String::new() } else { format!(" {start}+{sectors}") };
    let end = match record.state {
        State::Pending => "pending".to_owned(),
        State::Acked => format!("done {}", time(ended_at)),
        State::Failed => format!("failed {}", time(ended_at)),
    };
    format!("#{serial} {}{place} (from {}, {end})", what(record.what), time(invoked_at))
}
