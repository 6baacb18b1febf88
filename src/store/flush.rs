//! Flush accounting of one volume: which acknowledged writes a sync covers, who waits for it, and what a failed one means.
//!
//! Contract: a flush is answered with success only after a sync that *started* when everything acknowledged before the flush
//! had been counted here. A failed sync is never retried into success: from then on every flush of the volume fails with EIO.

use crate::bugs::{Bug, planted};
use crate::errno::Errno;

/// What a flush has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Nothing was written since the last successful sync: it is done.
    Clean,
    /// A sync of this volume has failed before.
    Failed,
    /// It waits until a sync covers this point.
    Wait(Point),
}

/// A moment between two acknowledged writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point(u64);

/// The account.
#[derive(Debug)]
pub struct Flushes {
    /// Writes acknowledged, or about to be. Starts at one: what was written before this server started is unknown.
    written: u64,
    /// What the last successful sync covers.
    clean: u64,
    /// What the sync in flight covers.
    running: Option<u64>,
    /// Points given: one for each sync that was started, one for each flush that found nothing to do.
    points: u64,
    /// That of the sync in flight.
    point: u64,
    failed: bool,
}

impl Flushes {
    /// The account of a server that begins to serve; whether a sync has failed in a former life.
    pub fn new(failed: bool) -> Flushes {
        let failed = failed && !planted(Bug::FlushFailureForgotten);
        Flushes {
            written: u64::from(!planted(Bug::ServerStartsClean)),
            clean: 0,
            running: None,
            points: 0,
            point: 0,
            failed,
        }
    }

    /// Counts a write, discard or zero. To be called before it is acknowledged.
    pub fn wrote(&mut self) {
        self.written += 1;
    }

    /// A flush has arrived.
    pub fn ask(&self) -> Ask {
        match (self.failed, self.clean == self.written) {
            (true, _) => Ask::Failed,
            (false, true) => Ask::Clean,
            (false, false) => Ask::Wait(Point(self.written)),
        }
    }

    /// Whether a sync is to be started now for somebody who waits for `needs`. If so it counts as started.
    pub fn start(&mut self, needs: Point) -> bool {
        let wanted = self.running.is_none() && !self.failed && needs.0 > self.clean;
        if wanted {
            self.running = Some(self.written);
            self.point = self.tick();
        }
        wanted
    }

    /// A moment: what has ended before it has a smaller number, and is covered by what is told with it.
    pub fn tick(&mut self) -> u64 {
        self.points += 1;
        self.points
    }

    /// How many such moments there were.
    pub fn ticks(&self) -> u64 {
        self.points
    }

    /// The moment at which the sync that has just ended was started.
    pub fn synced(&self) -> u64 {
        self.point
    }

    /// The sync in flight has ended.
    pub fn ended(&mut self, result: Result<(), Errno>) {
        let Some(covers) = self.running.take() else { return };
        match result {
            Ok(()) if planted(Bug::ServerSyncCoversAll) => self.clean = self.written,
            Ok(()) => self.clean = covers,
            Err(_) => self.failed = !planted(Bug::RetryFailedFlush),
        }
    }

    /// Whether everything up to `needs` is durable.
    pub fn covers(&self, needs: Point) -> bool {
        needs.0 <= self.clean || planted(Bug::ServerJoinsSync)
    }

    /// Whether a sync has failed.
    pub fn is_failed(&self) -> bool {
        self.failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(ask: Ask) -> Point {
        match ask {
            Ask::Wait(point) => point,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_flush_of_a_server_syncs() {
        let mut flushes = Flushes::new(false);
        let needs = point(flushes.ask());
        assert!(flushes.start(needs));
        flushes.ended(Ok(()));
        assert!(flushes.covers(needs));
        assert_eq!(flushes.ask(), Ask::Clean);
    }

    #[test]
    fn a_sync_covers_what_was_acknowledged_before_its_start() {
        let mut flushes = Flushes::new(false);
        let first = point(flushes.ask());
        assert!(flushes.start(first));
        let sharing = point(flushes.ask());
        flushes.wrote();
        let later = point(flushes.ask());
        assert!(!flushes.start(later), "one at a time");
        flushes.ended(Ok(()));
        assert!(flushes.covers(first) && flushes.covers(sharing) && !flushes.covers(later));
        assert!(flushes.start(later));
        flushes.ended(Ok(()));
        assert!(flushes.covers(later));
    }

    #[test]
    fn a_failed_sync_stays_failed() {
        let mut flushes = Flushes::new(false);
        let needs = point(flushes.ask());
        assert!(flushes.start(needs));
        flushes.ended(Err(Errno::EIO));
        assert!(!flushes.covers(needs));
        flushes.wrote();
        assert_eq!(flushes.ask(), Ask::Failed);
        assert!(!flushes.start(needs));
        assert_eq!(Flushes::new(true).ask(), Ask::Failed, "in the server's next life too");
    }
}
