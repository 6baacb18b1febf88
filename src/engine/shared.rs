//! All that the shards of an array share: per target the flush counters, the hold, the verdict on its flushes, and gauges.
//!
//! Flush accounting (the contract, 2.1): a target needs a flush when any shard has had a write acknowledged there after the
//! start of its last successful flush. Each shard counts its own acknowledged writes, before it completes them; a flush
//! notes every shard's count when it starts and, once it has succeeded, publishes what it had noted. Counts are compared
//! shard by shard: a sum could hide a write that no flush has covered.
//!
//! The hold (1.2): while a shard does not know whether an old write of its connection is finished or dropped, no shard sends
//! anything to that target.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::bugs::{Bug, planted};
use crate::engine::losses::Losses;
use crate::errno::Errno;
use crate::limits;
use crate::units::Time;

/// What one shard counts for one target. One writer; a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Counters {
    /// Writes, discards and zeroings acknowledged and not durable by themselves.
    acknowledged: AtomicU64,
    /// The part of `acknowledged` (of this shard) that a successful flush (of any shard) covers.
    flushed: AtomicU64,
}

/// What one shard tells about its link to one target, for people. One writer, relaxed: figures, not rules.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Gauge {
    /// Reads completed.
    pub reads: AtomicU64,
    /// Writes, discards and zeroings completed.
    pub writes: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Flushes completed.
    pub flushes: AtomicU64,
    /// Requests that ended with an error here.
    pub errors: AtomicU64,
    /// Reads that were refused here, and answered by another target of the node.
    pub rescued: AtomicU64,
    /// Data that arrived damaged, here or there, and was asked for or sent again.
    pub damaged: AtomicU64,
    /// Requests sent and not answered.
    pub in_flight: AtomicU32,
    /// Requests waiting for the link.
    pub waiting: AtomicU32,
    /// Requests that wait at the gate of its node; told with the node's first target.
    pub parked: AtomicU32,
    /// [`LinkPhase`] as a number.
    phase: AtomicU32,
    /// Tries since the link was last up.
    pub attempts: AtomicU32,
    /// Why it is not up: an error number, or 0.
    last_error: AtomicU32,
    /// How often the link was lost.
    pub losses: AtomicU32,
    /// Since when it is not up although it was tried, nanoseconds of the shard's clock; 0: it is up, or was not tried yet.
    down_since: AtomicU64,
}

/// How many requests one shard has taken and not answered. One writer; a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Load(AtomicU32);

/// How a link is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LinkPhase {
    /// Not connected; will be tried again.
    Down = 0,
    /// Connecting, or waiting for the answer to HELLO.
    Connecting = 1,
    /// Serving.
    Up = 2,
    /// Refused for ever: another owner has claimed the volume.
    Fenced = 3,
}

impl Gauge {
    /// How the link is doing.
    pub fn phase(&self) -> LinkPhase {
        match self.phase.load(Ordering::Relaxed) {
            1 => LinkPhase::Connecting,
            2 => LinkPhase::Up,
            3 => LinkPhase::Fenced,
            _ => LinkPhase::Down,
        }
    }

    /// Why the link is not up.
    pub fn last_error(&self) -> Option<Errno> {
        i32::try_from(self.last_error.load(Ordering::Relaxed)).ok().filter(|raw| *raw != 0).map(Errno::from_raw)
    }

    /// Since when the link is not up although it was tried.
    pub fn down_since(&self) -> Option<Time> {
        Some(self.down_since.load(Ordering::Relaxed)).filter(|since| *since != 0).map(Time)
    }

    pub(crate) fn note_down(&self, now: Time) {
        if self.down_since().is_none() {
            self.down_since.store(now.0.max(1), Ordering::Relaxed);
        }
    }

    pub(crate) fn note_up(&self) {
        self.down_since.store(0, Ordering::Relaxed);
    }

    pub(crate) fn set_phase(&self, phase: LinkPhase) {
        self.phase.store(phase as u32, Ordering::Relaxed);
    }

    pub(crate) fn set_error(&self, error: Option<Errno>) {
        self.last_error.store(error.map_or(0, |error| error.raw().unsigned_abs()), Ordering::Relaxed);
    }
}

/// Adds to a gauge that only this shard writes.
pub(crate) fn add(gauge: &AtomicU64, more: u64) {
    gauge.store(gauge.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// One target as all shards see it.
#[derive(Debug)]
pub struct TargetShared {
    counters: Vec<Counters>,
    gauges: Vec<Gauge>,
    /// Shards that serve a frontend.
    shards: usize,
    /// Shards that do not know the fate of something they had sent.
    holds: AtomicU32,
    /// One more than the losses that its server told of first, or last; 0: it has not been asked.
    losses: AtomicU64,
    /// Its machine has come back without something that was acknowledged and not flushed.
    lost: AtomicBool,
    /// A flush failed: nothing written before can be called durable any more (2.2).
    flush_failed: AtomicBool,
}

/// What a flush found when it started: each shard's count.
pub type FlushMark = [u64; limits::SHARDS_MAX];

impl TargetShared {
    fn new(shards: usize, syncers: usize) -> TargetShared {
        let counters: Vec<Counters> = (0..shards + syncers).map(|_| Counters::default()).collect();
        // A new daemon does not know what its predecessor left unflushed: everything counts as written.
        for counters in &counters {
            counters.acknowledged.store(u64::from(!planted(Bug::NewDaemonClean)), Ordering::Relaxed);
        }
        let gauges = (0..shards + syncers).map(|_| Gauge::default()).collect();
        TargetShared {
            counters,
            gauges,
            shards,
            holds: AtomicU32::new(0),
            losses: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            flush_failed: AtomicBool::new(false),
        }
    }

    /// Shard `shard` is about to complete a write that is not durable by itself.
    pub(crate) fn acknowledge(&self, shard: usize) {
        self.counters[shard].acknowledged.fetch_add(1, Ordering::SeqCst);
    }

    /// What a flush that starts now has to cover; `None` when everything is covered already.
    pub(crate) fn flush_mark(&self) -> Option<FlushMark> {
        let mut mark = [0; limits::SHARDS_MAX];
        let mut needed = false;
        let looked_at = if planted(Bug::FlushFirstShardOnly) { 1 } else { self.counters.len() };
        for (mark, counters) in mark.iter_mut().zip(&self.counters[..looked_at]) {
            *mark = counters.acknowledged.load(Ordering::SeqCst);
            needed |= *mark > counters.flushed.load(Ordering::SeqCst);
        }
        needed.then_some(mark)
    }

    /// What was acknowledged so far, shard by shard.
    pub(crate) fn acknowledged(&self) -> FlushMark {
        let mut mark = [0; limits::SHARDS_MAX];
        for (mark, counters) in mark.iter_mut().zip(&self.counters) {
            *mark = counters.acknowledged.load(Ordering::SeqCst);
        }
        mark
    }

    /// Whether successful flushes cover that.
    pub(crate) fn has_flushed(&self, mark: &FlushMark) -> bool {
        let covered = |(mark, counters): (&u64, &Counters)| counters.flushed.load(Ordering::SeqCst) >= *mark;
        mark.iter().zip(&self.counters).all(covered)
    }

    /// Whether everything that was acknowledged there is durable.
    pub fn is_flushed(&self) -> bool {
        self.flush_mark().is_none()
    }

    /// The flush that had noted `mark` has succeeded.
    pub(crate) fn flushed(&self, mark: &FlushMark) {
        for (mark, counters) in mark.iter().zip(&self.counters) {
            counters.flushed.fetch_max(*mark, Ordering::SeqCst);
        }
    }

    /// A flush has failed. There is no way back.
    pub(crate) fn fail_flush(&self) {
        self.flush_failed.store(true, Ordering::SeqCst);
    }

    /// Whether a flush has ever failed.
    pub fn has_failed_flush(&self) -> bool {
        self.flush_failed.load(Ordering::SeqCst)
    }

    /// What a server tells of losses with each HELLO. A new one counts if anything was acknowledged there and not flushed.
    pub(crate) fn told_losses(&self, losses: u64) {
        let (before, now) = (self.losses.load(Ordering::SeqCst), losses.saturating_add(1));
        // In this order: whoever writes down the new count knows what went with it.
        if before != 0 && before != now && self.flush_mark().is_some() && !planted(Bug::LossIgnored) {
            self.lost.store(true, Ordering::SeqCst);
        }
        self.losses.store(now, Ordering::SeqCst);
    }

    /// What was known of it when the array was last shown. Before any shard begins.
    pub fn begin(&self, known: Losses) {
        self.lost.store(known.lost, Ordering::SeqCst);
        self.losses.store(known.told.saturating_add(1), Ordering::SeqCst);
    }

    /// What its server has told last, and whether something is missed; `None`: it has told nothing yet.
    pub fn losses(&self) -> Option<Losses> {
        let told = self.losses.load(Ordering::SeqCst).checked_sub(1)?;
        Some(Losses { told, lost: self.has_lost() })
    }

    /// Whether it lacks something that was acknowledged. A node that has no other copy serves nothing any more.
    pub fn has_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Another volume is attached here: nothing is known of it. No shard uses the former one any more.
    pub fn renew(&self) {
        for counters in &self.counters {
            counters.acknowledged.fetch_add(1, Ordering::SeqCst);
        }
        self.losses.store(0, Ordering::SeqCst);
        self.lost.store(false, Ordering::SeqCst);
        self.flush_failed.store(false, Ordering::SeqCst);
    }

    /// Everything is going to be copied to it, or what it has was accepted.
    pub fn forget_loss(&self) {
        self.lost.store(false, Ordering::SeqCst);
    }

    pub(crate) fn hold(&self) {
        self.holds.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.holds.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether some shard waits to learn the fate of something it had sent.
    pub fn is_held(&self) -> bool {
        self.holds.load(Ordering::SeqCst) != 0
    }

    /// What shard `shard` tells about its link.
    pub fn gauge(&self, shard: usize) -> &Gauge {
        &self.gauges[shard]
    }

    /// The gauge of every shard that serves a frontend.
    pub fn gauges(&self) -> &[Gauge] {
        &self.gauges[..self.shards]
    }
}

/// All that the shards of an array share.
#[derive(Debug)]
pub struct Shared {
    targets: Vec<TargetShared>,
    loads: Vec<Load>,
    unsettled: AtomicBool,
}

impl Shared {
    /// For `targets` targets and `shards` shards.
    pub fn new(targets: usize, shards: usize) -> Shared {
        Shared::with_sync(targets, shards, 0)
    }

    /// The same, and `syncers` shards of sync engines, which have the numbers after the others.
    pub fn with_sync(targets: usize, shards: usize, syncers: usize) -> Shared {
        debug_assert!(shards + syncers <= limits::SHARDS_MAX);
        let target = |_| TargetShared::new(shards, syncers);
        let loads = (0..shards).map(|_| Load::default()).collect();
        Shared { targets: (0..targets).map(target).collect(), loads, unsettled: AtomicBool::new(false) }
    }

    /// Shard `shard` has so many requests.
    pub(crate) fn show_load(&self, shard: usize, requests: usize) {
        // A sync engine's shard has no frontend.
        if let Some(load) = self.loads.get(shard) {
            load.0.store(u32::try_from(requests).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
    }

    /// The requests of each shard that serves a frontend.
    pub fn loads(&self) -> impl ExactSizeIterator<Item = u64> {
        self.loads.iter().map(|load| u64::from(load.0.load(Ordering::Relaxed)))
    }

    /// A shard has ended with a write that may be on some targets and not on others.
    pub fn note_unsettled(&self) {
        self.unsettled.store(true, Ordering::SeqCst);
    }

    /// Whether any shard has.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::SeqCst)
    }

    /// One target.
    pub fn target(&self, target: usize) -> &TargetShared {
        &self.targets[target]
    }

    /// All targets.
    pub fn targets(&self) -> &[TargetShared] {
        &self.targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_daemon_counts_every_target_as_written() {
        let shared = Shared::new(2, 2);
        let mark = shared.target(0).flush_mark().unwrap();
        shared.target(0).flushed(&mark);
        assert!(shared.target(0).flush_mark().is_none());
        assert!(shared.target(1).flush_mark().is_some());
    }

    #[test]
    fn a_flush_in_flight_covers_nothing_yet() {
        let shared = Shared::new(1, 2);
        let target = shared.target(0);
        let mark = target.flush_mark().unwrap();
        assert!(target.flush_mark().is_some());
        target.acknowledge(1);
        target.flushed(&mark);
        let later = target.flush_mark().unwrap();
        target.flushed(&later);
        assert!(target.flush_mark().is_none());
    }

    #[test]
    fn nothing_of_a_former_volume_is_believed_of_the_next() {
        let shared = Shared::new(1, 1);
        let target = shared.target(0);
        target.flushed(&target.flush_mark().unwrap());
        target.told_losses(3);
        target.acknowledge(0);
        target.told_losses(4);
        target.fail_flush();
        assert!(target.has_lost() && target.has_failed_flush());
        target.renew();
        assert!(!target.has_lost() && !target.has_failed_flush() && !target.is_flushed());
        assert_eq!(target.losses(), None);
        // The next volume's machine has lost something before it came here: that is none of this array's.
        target.told_losses(7);
        assert!(!target.has_lost());
    }

    #[test]
    fn a_loss_while_no_daemon_ran_is_noticed() {
        let shared = Shared::new(2, 1);
        for (target, told) in [(0, 4), (1, 3)] {
            let target = shared.target(target);
            target.begin(Losses { told: 3, lost: false });
            target.told_losses(told);
            assert_eq!(target.losses(), Some(Losses { told, lost: told == 4 }));
        }
        shared.target(0).forget_loss();
        assert_eq!(shared.target(0).losses(), Some(Losses { told: 4, lost: false }));
    }

    #[test]
    fn marks_with_equal_sums_do_not_cover_each_other() {
        let shared = Shared::new(1, 2);
        let target = shared.target(0);
        // Two flushes that noted (2, 1) and (1, 2): after the first alone, the second shard's write is not covered.
        let mut first = [0; limits::SHARDS_MAX];
        (first[0], first[1]) = (2, 1);
        target.acknowledge(0);
        target.acknowledge(1);
        target.flushed(&first);
        assert!(target.flush_mark().is_some());
    }
}
