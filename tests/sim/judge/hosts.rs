//! What the judge holds against two hosts with one array: there is one history, whoever was asked.
//!
//! From the moment on when another host begins to claim volumes a daemon's requests may fail, because of that alone. From the moment
//! on when that host serves, having claimed everything, nothing that was asked of the former takes effect any more: what was outstanding has
//! by then, or never will, and an answer that comes late tells of the time before. Whatever is asked of the former later fails.

use super::{Judge, NEVER, Op, State, Verdict, Violation, What, at};
use crate::excuse::errno;
use crate::text;

/// The moment when another host has begun to serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) stamp: u64,
    /// The last operation before it.
    pub(super) serial: u64,
}

impl Judge {
    /// Another host begins to claim what this daemon serves.
    pub(crate) fn taken(&mut self, now: u64, life: u32) {
        self.taken.entry(life).or_insert(now);
    }

    pub(crate) fn is_taken(&self, life: u32) -> bool {
        self.taken.contains_key(&life)
    }

    /// What waits at a gate of this daemon waits there for ever.
    pub(crate) fn parks(&mut self, life: u32) {
        self.parked.insert(life);
    }

    /// A host that has claimed everything serves instead of these.
    pub(crate) fn replaced(&mut self, now: u64, lives: &[u32]) {
        let bound = Bound { stamp: self.stamp(), serial: self.serials };
        for life in lives.iter().copied() {
            self.taken(now, life);
            self.replaced.entry(life).or_insert(bound);
        }
        for op in self.ops.iter_mut().flatten().filter(|op| op.bound.is_none()) {
            op.bound = Some(bound);
        }
        for entry in self.sectors.iter_mut().flatten() {
            match entry.state {
                State::Pending => entry.bound = entry.bound.min(bound.stamp),
                State::Failed if entry.resolved == NEVER => entry.resolved = bound.stamp,
                _ => {}
            }
        }
    }

    /// One that begins although others have taken its place already.
    pub(crate) fn replaced_before(&mut self, now: u64, life: u32) {
        let bound = self.replaced.values().max_by_key(|bound| bound.stamp).copied();
        self.taken(now, life);
        self.replaced.extend(bound.map(|bound| (life, bound)));
    }

    /// What was asked of a daemon after another one had taken everything must fail; a flush may have nothing to do.
    pub(super) fn check_served(&self, op: &Op) -> Verdict {
        if op.record.what == What::Flush || op.bound.is_none_or(|bound| op.record.serial <= bound.serial) {
            return Ok(());
        }
        let text =
            format!("{} succeeded, and another host had everything before it was asked", text::record(&op.record));
        Err(Violation { rule: "4.3", text })
    }

    /// A write is acknowledged of which it was over already whether it had taken effect. Whether that says nothing of what a sector holds.
    pub(super) fn acked_late(&mut self, op: &Op, sector: u64) -> Result<bool, Violation> {
        if op.bound.is_none() {
            return Ok(false);
        }
        let died = self.died[usize::from(self.rules.device_of[at(sector)])];
        let stamp = self.clock;
        let Some(entry) = self.sectors[at(sector)].iter_mut().find(|entry| entry.serial == op.record.serial) else {
            return Ok(true);
        };
        if died > entry.bound {
            // It may have been lost since.
            (entry.state, entry.end, entry.resolved) = (State::Failed, stamp, entry.bound);
            return Ok(true);
        }
        if entry.denied < op.invoke {
            let text = format!(
                "{} was acknowledged, and a read on the host that has taken the array had shown that sector {sector} lacks it",
                text::record(&op.record)
            );
            return Err(Violation { rule: "4.3", text });
        }
        Ok(false)
    }

    /// Whether an error needs no other excuse than that another host claims the volumes.
    pub(super) fn is_excused_by_host(&self, now: u64, op: &Op, error: i32) -> bool {
        let waited = now - op.record.invoked_at >= self.rules.io_timeout;
        self.is_taken(op.by) && (matches!(error, errno::EBADE | errno::EIO) || (error == errno::ETIMEDOUT && waited))
    }
}
