//! The sync engine: copies the regions of one node that are still to be copied from one target to another, under live writes.
//!
//! Sans-io: it asks a shard of its own, with connections of its own, for reads and writes of single targets
//! ([`crate::engine::request::Request::target`]), a few regions at a time. Per region (the contract, 5.2):
//!
//! ```text
//! Draining --no write of it is in flight--> Reading --read--> Writing --written--> copied
//! ```
//!
//! A window is open, so that writes to the region wait, from before `Draining` until the fate of the copy is known. It is given up
//! when it fails: what was not copied stays to be copied.

use std::sync::Arc;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::engine::overlap::{Hold, Overlap, Shards};
use crate::engine::region::{RegionState, SyncMap};
use crate::engine::request::{Request, RequestOp, Tag};
use crate::errno::Errno;
use crate::units::{Extent, Lba, SECTOR_BYTES, Time};

/// How often a window that waits for writes in flight looks again.
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// What is copied.
#[derive(Clone, Debug)]
pub struct CopyConfig {
    /// Read from this target.
    pub source: usize,
    /// Written to that one.
    pub target: usize,
    /// The shard that does it.
    pub shard: usize,
    /// Regions under way at a time: as many as the shard has tags, less one.
    pub windows: usize,
    /// Bytes a second at most; 0: as many as there can be.
    pub rate: u64,
}

/// Why copying has ended before everything was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// The source could not be read here.
    Source(Lba, Errno),
    /// The target could not be written, or flushed.
    Target(Errno),
    /// It was asked to end.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Idle,
    /// The window is open; writes of the region are still in flight.
    Draining(usize),
    /// Asked for, handed to the shard.
    Reading(usize),
    Writing(usize),
    Flushing,
}

/// See the module's description.
#[derive(Debug)]
pub struct Copy {
    config: CopyConfig,
    map: Arc<SyncMap>,
    overlap: Arc<Overlap>,
    slots: Vec<Slot>,
    /// Requests that are to be handed out, by slot.
    ready: Vec<usize>,
    /// Where the next region is looked for.
    cursor: usize,
    wakes: Shards,
    /// When the next region may be begun, by the rate.
    begin_at: Time,
    look_at: Time,
    paused: bool,
    failed: Option<CopyError>,
    flushed: bool,
}

impl Copy {
    /// Copies what is to be copied of a map.
    pub fn new(config: CopyConfig, map: Arc<SyncMap>, overlap: Arc<Overlap>) -> Copy {
        Copy {
            slots: vec![Slot::Idle; config.windows.max(1)],
            ready: Vec::new(),
            cursor: 0,
            wakes: 0,
            begin_at: Time(0),
            look_at: Time::NEVER,
            paused: false,
            failed: None,
            flushed: false,
            config,
            map,
            overlap,
        }
    }

    /// Bytes a second from now on; 0: no bound.
    pub fn set_rate(&mut self, rate: u64) {
        self.config.rate = rate;
    }

    /// Begins no further region until it may again.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Ends as soon as nothing is in flight.
    pub fn stop(&mut self) {
        self.failed.get_or_insert(CopyError::Stopped);
    }

    /// How it has ended; `None` while something is under way.
    pub fn outcome(&self) -> Option<Result<(), CopyError>> {
        if self.slots.iter().any(|slot| *slot != Slot::Idle) {
            return None;
        }
        match self.failed {
            Some(error) => Some(Err(error)),
            None => self.flushed.then_some(Ok(())),
        }
    }

    /// Shards whose writes have waited for a window that is closed now.
    pub fn poll_wake(&mut self) -> Shards {
        std::mem::take(&mut self.wakes)
    }

    /// When [`Copy::next_request`] is to be asked again, if nothing else happens.
    pub fn next_timeout(&self) -> Time {
        self.look_at
    }

    /// The next request for the shard. Its tag is that of a slot, whose buffer has room for a region.
    pub fn next_request(&mut self, now: Time) -> Option<(Tag, Request)> {
        self.look_at = Time::NEVER;
        if self.ready.is_empty() {
            self.drain(now);
            self.begin(now);
        }
        let slot = self.ready.pop()?;
        let (op, region, target) = match self.slots[slot] {
            Slot::Reading(region) => (RequestOp::Read, Some(region), self.config.source),
            Slot::Writing(region) => (RequestOp::Write { fua: false }, Some(region), self.config.target),
            _ => (RequestOp::Flush, None, self.config.target),
        };
        let extent = region.map_or(Extent::default(), |region| self.map.extent(region));
        Some((Tag(u16::try_from(slot).unwrap_or(0)), Request { op, extent, target: Some(target) }))
    }

    /// Takes the regions whose window is open, as soon as no write of them is in flight.
    fn drain(&mut self, now: Time) {
        for slot in 0..self.slots.len() {
            let Slot::Draining(region) = self.slots[slot] else { continue };
            if self.failed.is_some() {
                self.map.set(region, RegionState::Todo);
                // Nothing was taken, but somebody may wait for the window.
                self.wakes |= self.overlap.waiting();
                self.slots[slot] = Slot::Idle;
            } else if self.take(region) {
                self.slots[slot] = Slot::Reading(region);
                self.ready.push(slot);
            } else {
                self.look_at = now.after(DRAIN_POLL);
            }
        }
    }

    /// Opens windows on the next regions.
    fn begin(&mut self, now: Time) {
        while self.failed.is_none() && !self.paused && !self.flushed {
            let Some(slot) = self.slots.iter().position(|slot| *slot == Slot::Idle) else { return };
            if self.begin_at > now {
                self.look_at = self.look_at.min(self.begin_at);
                return;
            }
            let end = self.map.regions() - usize::from(planted(Bug::ResyncSkipsLast));
            let next = (self.cursor..end).find(|region| self.map.state(*region) == RegionState::Todo);
            let Some(region) = next else { return self.flush(slot) };
            self.cursor = region + 1;
            self.map.set(region, RegionState::Window);
            self.slots[slot] = Slot::Draining(region);
            self.pay(region, now);
            self.drain(now);
        }
    }

    /// When everything is written the target is flushed, once.
    fn flush(&mut self, slot: usize) {
        if self.slots.iter().all(|slot| *slot == Slot::Idle) {
            self.slots[slot] = Slot::Flushing;
            self.ready.push(slot);
        }
    }

    fn pay(&mut self, region: usize, now: Time) {
        let bytes = self.map.extent(region).sectors * SECTOR_BYTES;
        if let Some(nanos) = bytes.saturating_mul(1_000_000_000).checked_div(self.config.rate) {
            self.begin_at = Time(self.begin_at.0.max(now.0)).after(Duration::from_nanos(nanos));
        }
    }

    /// What the shard made of a request.
    pub fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        let slot = usize::from(tag.0);
        match (self.slots[slot], result) {
            (Slot::Reading(region), Ok(())) if self.failed.is_none() => {
                self.slots[slot] = Slot::Writing(region);
                self.ready.push(slot);
                if planted(Bug::WindowClosedEarly) {
                    self.close(region, RegionState::Done);
                }
            }
            (Slot::Reading(region), result) => {
                let at = self.map.extent(region).start;
                if let Err(error) = result {
                    self.failed.get_or_insert(CopyError::Source(at, error));
                }
                self.slots[slot] = Slot::Idle;
                self.close(region, RegionState::Todo);
            }
            (Slot::Writing(region), result) => {
                if let Err(error) = result {
                    self.failed.get_or_insert(CopyError::Target(error));
                }
                self.slots[slot] = Slot::Idle;
                if !planted(Bug::WindowClosedEarly) {
                    self.close(region, if result.is_ok() { RegionState::Done } else { RegionState::Todo });
                }
            }
            (Slot::Flushing, result) => {
                self.flushed = result.is_ok();
                if let Err(error) = result {
                    self.failed.get_or_insert(CopyError::Target(error));
                }
                self.slots[slot] = Slot::Idle;
            }
            (Slot::Idle | Slot::Draining(_), _) => debug_assert!(false, "an answer to nothing"),
        }
    }

    /// Whether no write of the region is in flight any more. Then none begins until it is closed.
    fn take(&self, region: usize) -> bool {
        planted(Bug::WindowIgnored) || self.overlap.take(self.config.shard, self.map.extent(region), Hold::Shared)
    }

    fn close(&mut self, region: usize, state: RegionState) {
        self.map.set(region, state);
        self.wakes |= match planted(Bug::WindowIgnored) {
            true => self.overlap.waiting(),
            false => self.overlap.release(self.map.extent(region), Hold::Shared),
        };
    }
}
