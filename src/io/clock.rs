//! The one monotonic clock of the I/O threads: the kernel's CLOCK_MONOTONIC, so that a ring's absolute timeouts speak it too.

use nix::time::{ClockId, clock_gettime};

use crate::units::Time;

/// Now.
pub fn now() -> Time {
    // CLOCK_MONOTONIC exists on every kernel; a moment that never comes would only delay deadlines.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return Time(0) };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec()).unwrap_or(0);
    Time(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}
