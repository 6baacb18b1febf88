//! Looking for completions for a moment before a thread sleeps for them: where the next one is near, waking costs more than waiting.
//!
//! A look that was in vain makes the next ones rarer, so a thread whose completions are far apart sleeps at once. Between two
//! glances the processor is offered to whoever else wants it; that somebody had it until the moment was over counts as a look in vain.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io_uring::IoUring;

use crate::limits;

/// For rings that are made from now on, nanoseconds.
static WINDOW: AtomicU64 = AtomicU64::new(nanos(limits::BUSY_POLL_DEFAULT));

#[allow(clippy::cast_possible_truncation)] // A few hundred years.
const fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// How long threads of this process look for completions before they sleep; zero: not at all.
pub fn set_window(window: Duration) {
    WINDOW.store(nanos(window), Ordering::Relaxed);
}

/// When to look.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pace {
    /// Waits that go by without a look.
    skip: u32,
    /// How many that were, the last time.
    skipped: u32,
}

impl Pace {
    fn is_due(&mut self) -> bool {
        let due = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        due
    }

    fn note(&mut self, in_vain: bool) {
        self.skipped = if in_vain { (2 * self.skipped + 1).min(limits::BUSY_POLL_SKIPS_MAX) } else { 0 };
        self.skip = self.skipped;
    }
}

/// One thread's.
#[derive(Debug)]
pub struct BusyPoll {
    window: Duration,
    pace: Pace,
}

impl Default for BusyPoll {
    fn default() -> BusyPoll {
        BusyPoll { window: Duration::from_nanos(WINDOW.load(Ordering::Relaxed)), pace: Pace::default() }
    }
}

impl BusyPoll {
    /// Looks, if it is worth it. To be called before `ring` waits; what is queued there is submitted.
    pub fn look(&mut self, ring: &mut IoUring) {
        if self.window.is_zero() || !self.pace.is_due() {
            return;
        }
        // What fails here fails again when the thread waits.
        if !ring.submission().is_empty() && ring.submit().is_err() {
            return;
        }
        let start = Instant::now();
        let mut found = is_ready(ring);
        while !found && start.elapsed() < self.window {
            std::thread::yield_now();
            found = is_ready(ring);
        }
        self.pace.note(!found || start.elapsed() >= self.window);
    }
}

/// Whether there is a completion, or something that becomes one as soon as the ring is entered.
fn is_ready(ring: &mut IoUring) -> bool {
    !ring.completion().is_empty() || ring.submission().taskrun()
}

#[cfg(test)]
mod tests {
    use io_uring::{opcode, types};

    use super::*;

    fn ring() -> IoUring {
        let builder = &mut IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(8).unwrap()
    }

    fn push(ring: &mut IoUring, entry: &io_uring::squeue::Entry) {
        // SAFETY: entries of these tests name no memory, or some that is never freed.
        unsafe { ring.submission().push(entry) }.unwrap();
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_is_not_brings_them_back() {
        let mut pace = Pace::default();
        let mut looks = 0;
        for _ in 0..100_000 {
            if pace.is_due() {
                looks += 1;
                pace.note(true);
            }
        }
        assert!((300..500).contains(&looks), "{looks}");
        while !pace.is_due() {}
        pace.note(false);
        assert_eq!(pace, Pace::default());
        assert!(pace.is_due() && pace.is_due());
    }

    #[test]
    fn what_comes_soon_is_found_and_what_does_not_is_not_waited_for() {
        let mut ring = ring();
        let mut poll = BusyPoll { window: Duration::from_secs(5), pace: Pace::default() };
        push(&mut ring, &opcode::Nop::new().build());
        let start = Instant::now();
        poll.look(&mut ring);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(ring.submit_and_wait(1).unwrap(), 0, "it was submitted");
        assert_eq!(ring.completion().count(), 1);
        assert_eq!(poll.pace, Pace::default());

        // A timer's completion is work of the thread's own, so it only shows in the flag.
        let span = Box::leak(Box::new(types::Timespec::from(Duration::from_millis(5))));
        push(&mut ring, &opcode::Timeout::new(&raw const *span).build());
        poll.look(&mut ring);
        assert!(is_ready(&mut ring));
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().count(), 1);

        poll.window = Duration::from_millis(2);
        let start = Instant::now();
        poll.look(&mut ring);
        assert!(start.elapsed() >= poll.window);
        assert_eq!(poll.pace, Pace { skip: 1, skipped: 1 });
        poll.window = Duration::from_secs(600);
        poll.look(&mut ring);
    }

    #[test]
    fn no_window_means_no_look() {
        let mut ring = ring();
        let mut poll = BusyPoll { window: Duration::ZERO, pace: Pace::default() };
        push(&mut ring, &opcode::Nop::new().build());
        poll.look(&mut ring);
        assert_eq!(ring.submission().len(), 1);
    }
}
