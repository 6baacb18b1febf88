//! What happened: always as a hash, which must be the same for the same seed; as text when somebody reads along.

use crate::text;

/// The record of one run.
pub(crate) struct Trace {
    hash: u64,
    /// Whether lines are printed.
    pub(crate) loud: bool,
}

impl Trace {
    pub(crate) fn new(loud: bool) -> Trace {
        Trace { hash: 0xcbf2_9ce4_8422_2325, loud }
    }

    /// Mixes an event into the hash.
    pub(crate) fn note(&mut self, now: u64, code: u64, detail: u64) {
        for word in [now, code, detail] {
            self.hash = (self.hash ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25).rotate_left(29);
        }
    }

    /// Prints a line, if somebody reads along.
    pub(crate) fn say(&self, now: u64, line: impl FnOnce() -> String) {
        if self.loud {
            println!("{:>14}  {}", text::time(now), line());
        }
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}
