//! The sync engine: copies the regions of one node that are still to be copied from one target to another, under live writes; or
//! compares all regions of the two, or of several ([`Task`]).
//!
//! Sans-io: it asks a shard of its own, with connections of its own, for reads, writes and digests of single targets
//! ([`crate::engine::request::Request::target`]), a few regions at a time. Per region (the contract, 5.2):
//!
//! ```text
//! Draining --no write of it is in flight--> Reading --read--> Writing --written--> copied
//! Draining --no write of it is in flight--> Asking(source) --> Asking(target) --alike--> compared
//! Draining --no write of it is in flight--> Comparing(each) --alike, or nothing to be done about it--> compared   ([`scrub`])
//!   Comparing --it is known who is right--> Fetching(that one) --> Mending(the others) --> Comparing(each), once more
//! ```
//!
//! A window is open, so that writes to the region wait, from before `Draining` until the fate of the copy is known. It is given up
//! when it fails: what was not copied stays to be copied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::bugs::{Bug, planted};
use crate::engine::overlap::{Hold, Overlap, Shards};
use crate::engine::region::{RegionState, SyncMap};
use crate::engine::request::{Request, RequestOp, Tag};
use crate::engine::scrub::Scrub;
use crate::engine::view::View;
use crate::errno::Errno;
use crate::units::{Extent, Lba, SECTOR_BYTES, Time};
use crate::wire::digest::Hasher;
use crate::wire::frame::DIGEST_BYTES;

mod scrub;

/// How often a window that waits for writes in flight looks again.
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// What is done with a node's regions.
#[derive(Clone, Debug)]
pub enum Task {
    /// Those that are still to be copied are copied, then the target is flushed.
    Copy {
        /// The target reads as zeros wherever nothing was written to it: zeros need not be.
        fresh: bool,
    },
    /// All are compared by their digests; it ends at the first that differs.
    Verify,
    /// Those that are still to be compared are compared on all of several targets, which are all in sync; what differs is noted, and
    /// perhaps put right.
    Scrub(Scrub),
}

impl Task {
    /// The targets that are used, and whether what is written there is to be in their region logs: what a repair writes is on the others
    /// already, and a region that was marked for it could be copied from the one that is wrong after a crash.
    pub fn targets(&self, view: &View, source: usize, target: usize) -> (Vec<usize>, bool) {
        match self {
            Task::Copy { .. } | Task::Verify => (vec![source, target], view.logs_copies(target)),
            Task::Scrub(scrub) => (scrub.members.iter().map(|(target, _)| *target).collect(), false),
        }
    }
}

/// What is known once it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Regions that were copied.
    pub regions: u64,
    /// After a comparison: BLAKE3 over the digests of all regions, in order.
    pub root: Option<[u8; 32]>,
}

/// What a read, or a digest, found in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing was read, or nobody has looked.
    Unknown,
    /// Zeros alone.
    Zeros,
    /// Its digest.
    Digest([u8; 32]),
}

/// What is copied.
#[derive(Clone, Debug)]
pub struct CopyConfig {
    /// What is to be done.
    pub task: Task,
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
    /// How often the target is flushed on the way, so that what it has need not be copied again ([`SyncMap::kept`]).
    pub checkpoint: Duration,
}

/// What is asked about the content of a request's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing.
    Not,
    /// Whether it is all zeros.
    ForZeros,
    /// The digest that was asked for.
    ForDigest,
}

/// Why copying has ended before everything was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// The source could not be read here.
    Source(Lba, Errno),
    /// The target could not be written, or flushed.
    Target(Errno),
    /// The two differ in the region that begins here.
    Different(Lba),
    /// What was to be put right on this target could not be written, or not be made durable.
    Repair(usize, Errno),
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
    /// The same with zeros.
    Zeroing(usize),
    /// Asked for the source's digest, then the target's.
    AskingSource(usize),
    AskingTarget(usize, [u8; 32]),
    /// Asked for the digest of this one of those that are scrubbed.
    Comparing(usize, usize),
    /// Read from the one that is right.
    Fetching(usize),
    /// Written to one that is not, or zeroed there.
    Mending(usize, usize),
    /// A flush of the source, once: what is read there its machine cannot lose any more without a mark. Then it is flushed on the way, or at
    /// the end.
    Grounding(Option<usize>),
    /// A flush on the way: everything below this region is copied.
    Keeping(usize),
    Flushing,
    /// A flush of one that was written to.
    Sealing(usize),
}

impl Slot {
    /// Whether something is asked of the source, or of those that are compared.
    fn is_read(&self) -> bool {
        matches!(self, Slot::Reading(_) | Slot::AskingSource(_) | Slot::Comparing(..) | Slot::Fetching(_))
    }

    /// The region that is under way.
    fn region(&self) -> Option<usize> {
        match self {
            Slot::Draining(region) | Slot::Reading(region) | Slot::Writing(region) | Slot::Zeroing(region) => {
                Some(*region)
            }
            Slot::AskingSource(region) | Slot::AskingTarget(region, _) => Some(*region),
            Slot::Comparing(region, _) | Slot::Fetching(region) | Slot::Mending(region, _) => Some(*region),
            Slot::Idle | Slot::Grounding(_) | Slot::Keeping(_) | Slot::Flushing | Slot::Sealing(_) => None,
        }
    }
}

/// See the module's description.
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
    failed: Option<CopyError>,
    /// It was asked to end: reads whose results nobody wants any more, to be given up.
    abandoned: Vec<usize>,
    stopped: bool,
    /// Regions that were copied.
    copied: u64,
    /// When the target is flushed next on the way, and whether there is anything new.
    keep_at: Time,
    new: bool,
    /// The source has been flushed since every shard writes the target: what it had before, of which there may be no mark, it keeps.
    grounded: bool,
    /// Digests of regions that are alike, until all before them are known, too; and how many are in `root`.
    alike: BTreeMap<usize, [u8; 32]>,
    folded: usize,
    root: Hasher,
    /// Of a scrub, by slot: what is known of the region.
    cases: Vec<scrub::Case>,
    /// Of a scrub: those that were written to and not flushed since.
    unsealed: Vec<usize>,
    done: bool,
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
            failed: None,
            abandoned: Vec::new(),
            stopped: false,
            copied: 0,
            keep_at: Time(0),
            new: false,
            grounded: planted(Bug::SourceNotGrounded),
            alike: BTreeMap::new(),
            folded: 0,
            root: Hasher::default(),
            cases: vec![scrub::Case::default(); config.windows.max(1)],
            unsealed: Vec::new(),
            done: false,
            config,
            map,
            overlap,
        }
    }

    /// Ends as soon as nothing is in flight. What is being read is not waited for: its source may be one that does not answer any more. Nor is
    /// a flush of it, or of what a scrub has put right: it has the longest patience of all, and who holds what must be left until this has ended.
    pub fn stop(&mut self) {
        self.failed.get_or_insert(CopyError::Stopped);
        if std::mem::replace(&mut self.stopped, true) {
            return;
        }
        let (handed, unasked): (Vec<usize>, Vec<usize>) = (0..self.slots.len())
            .filter(|slot| {
                let slot = *slot;
                self.slots[slot].is_read() || self.is_sealing(slot) || matches!(self.slots[slot], Slot::Grounding(_))
            })
            .partition(|slot| !self.ready.contains(slot));
        self.abandoned = handed;
        self.ready.retain(|slot| !unasked.contains(slot));
        for slot in unasked {
            let was = std::mem::replace(&mut self.slots[slot], Slot::Idle);
            let unproven = matches!(was, Slot::Comparing(..)) && self.note_unproven(slot);
            if let Some(region) = was.region() {
                self.close(region, if unproven { RegionState::Done } else { self.untouched() });
            }
        }
    }

    /// The next request that the shard is to give up.
    pub fn poll_abandoned(&mut self) -> Option<Tag> {
        let slot = self.abandoned.pop()?;
        Some(Tag(u16::try_from(slot).unwrap_or(u16::MAX)))
    }

    /// It was asked to end, and nothing that it copies from now on comes from its source: it has read the last of it.
    pub fn has_left_source(&self) -> bool {
        self.stopped && !self.slots.iter().any(Slot::is_read)
    }

    /// How it has ended; `None` while something is under way.
    pub fn outcome(&self) -> Option<Result<Copied, CopyError>> {
        if self.slots.iter().any(|slot| *slot != Slot::Idle) {
            return None;
        }
        match self.failed {
            Some(error) => Some(Err(error)),
            None => self.done.then(|| Ok(self.copied())),
        }
    }

    fn copied(&self) -> Copied {
        let root = matches!(self.config.task, Task::Verify).then(|| self.root.finish(0).hash);
        Copied { regions: self.copied, root }
    }

    /// Whether a request's completion is to say what was found ([`Content`]): a digest, or at least whether there are zeros alone.
    pub fn looks_at(&self, tag: Tag) -> Look {
        match self.slots[usize::from(tag.0)] {
            Slot::Reading(_) | Slot::Fetching(_) => Look::ForZeros,
            Slot::AskingSource(_) | Slot::AskingTarget(..) | Slot::Comparing(..) => Look::ForDigest,
            _ => Look::Not,
        }
    }

    /// How many bytes of a request's buffer it has filled.
    pub fn bytes(&self, tag: Tag) -> usize {
        match self.slots[usize::from(tag.0)] {
            Slot::Reading(region) | Slot::Fetching(region) => {
                usize::try_from(self.map.extent(region).bytes()).unwrap_or(0)
            }
            Slot::AskingSource(_) | Slot::AskingTarget(..) | Slot::Comparing(..) => DIGEST_BYTES as usize,
            _ => 0,
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
        let CopyConfig { source, target, .. } = self.config;
        let (op, region, target) = match self.slots[slot] {
            Slot::Reading(region) => (RequestOp::Read, Some(region), source),
            Slot::Writing(region) => (RequestOp::Write { fua: false }, Some(region), target),
            Slot::Zeroing(region) => (RequestOp::Discard, Some(region), target),
            Slot::AskingSource(region) => (RequestOp::Digest, Some(region), source),
            Slot::AskingTarget(region, _) => (RequestOp::Digest, Some(region), target),
            Slot::Comparing(..) | Slot::Fetching(_) | Slot::Mending(..) | Slot::Sealing(_) => self.scrub_request(slot),
            Slot::Grounding(_) => (RequestOp::Flush, None, source),
            _ => (RequestOp::Flush, None, target),
        };
        let extent = region.map_or(Extent::default(), |region| self.map.extent(region));
        Some((Tag(u16::try_from(slot).unwrap_or(0)), Request { op, extent, target: Some(target) }))
    }

    /// Takes the regions whose window is open, as soon as no write of them is in flight.
    fn drain(&mut self, now: Time) {
        for slot in 0..self.slots.len() {
            let Slot::Draining(region) = self.slots[slot] else { continue };
            if self.failed.is_some() {
                self.map.set(region, self.untouched());
                // Nothing was taken, but somebody may wait for the window.
                self.wakes |= self.overlap.waiting();
                self.slots[slot] = Slot::Idle;
            } else if self.take(region) {
                self.slots[slot] = match self.config.task {
                    Task::Copy { .. } => Slot::Reading(region),
                    Task::Verify => Slot::AskingSource(region),
                    Task::Scrub(_) => self.first_question(slot, region),
                };
                self.ready.push(slot);
            } else {
                self.look_at = now.after(DRAIN_POLL);
            }
        }
    }

    /// What a region is whose turn has not come.
    fn untouched(&self) -> RegionState {
        match self.config.task {
            Task::Copy { .. } | Task::Scrub(_) => RegionState::Todo,
            Task::Verify => RegionState::Done,
        }
    }

    /// Opens windows on the next regions.
    fn begin(&mut self, now: Time) {
        while self.failed.is_none() && !self.done {
            let Some(slot) = self.slots.iter().position(|slot| *slot == Slot::Idle) else { return };
            if self.keep(slot, now) {
                return;
            }
            if self.begin_at > now {
                self.look_at = self.look_at.min(self.begin_at);
                return;
            }
            let end = self.map.regions() - usize::from(planted(Bug::ResyncSkipsLast) || self.skips_last());
            let next = (self.cursor..end).find(|region| self.map.state(*region) == self.untouched());
            let Some(region) = next else { return self.end(slot) };
            self.cursor = region + 1;
            self.map.set(region, RegionState::Window);
            self.slots[slot] = Slot::Draining(region);
            self.pay(region, now);
            self.drain(now);
        }
    }

    /// Now and then the target is flushed on the way.
    fn keep(&mut self, slot: usize, now: Time) -> bool {
        if !self.new || self.keep_at > now || !matches!(self.config.task, Task::Copy { .. }) {
            return false;
        }
        let under_way = self.slots.iter().filter_map(Slot::region).min();
        let below = under_way.unwrap_or(self.cursor) + usize::from(planted(Bug::CursorOffByOne));
        (self.keep_at, self.new) = (now.after(self.config.checkpoint), false);
        if planted(Bug::CursorBeforeFlush) {
            self.map.keep(below);
        }
        self.go_on(slot, if self.grounded { Slot::Keeping(below) } else { Slot::Grounding(Some(below)) });
        true
    }

    /// When everything is written the target is flushed, once; a comparison has nothing to flush, but what it has put right.
    fn end(&mut self, slot: usize) {
        if self.slots.iter().any(|slot| *slot != Slot::Idle) {
            return;
        }
        match self.config.task {
            Task::Verify => self.done = true,
            Task::Copy { .. } if self.grounded => self.go_on(slot, Slot::Flushing),
            Task::Copy { .. } => self.go_on(slot, Slot::Grounding(None)),
            Task::Scrub(_) => self.seal(slot),
        }
    }

    fn pay(&mut self, region: usize, now: Time) {
        let bytes = self.map.extent(region).sectors * SECTOR_BYTES;
        if let Some(nanos) = bytes.saturating_mul(1_000_000_000).checked_div(self.config.rate) {
            self.begin_at = Time(self.begin_at.0.max(now.0)).after(Duration::from_nanos(nanos));
        }
    }

    /// What the shard made of a request, and what is there as far as [`Copy::looks_at`] asks for it.
    pub fn complete(&mut self, tag: Tag, result: Result<(), Errno>, content: Content) {
        let slot = usize::from(tag.0);
        let was = std::mem::replace(&mut self.slots[slot], Slot::Idle);
        match (was, result) {
            (Slot::Reading(region), Ok(())) if self.failed.is_none() => self.read(slot, region, content),
            (Slot::AskingSource(region), Ok(())) if self.failed.is_none() => match content {
                Content::Digest(digest) => self.go_on(slot, Slot::AskingTarget(region, digest)),
                _ => self.fail(region, RegionState::Done, CopyError::Source(self.start(region), Errno::EPROTO)),
            },
            (Slot::AskingTarget(region, digest), Ok(())) => self.compare(region, digest, content),
            (Slot::Reading(region), result) => {
                let error =
                    result.err().map_or(CopyError::Stopped, |errno| CopyError::Source(self.start(region), errno));
                self.fail(region, RegionState::Todo, error);
            }
            (Slot::AskingSource(region), result) => {
                let error =
                    result.err().map_or(CopyError::Stopped, |errno| CopyError::Source(self.start(region), errno));
                self.fail(region, RegionState::Done, error);
            }
            (Slot::AskingTarget(region, _), Err(error)) => {
                self.fail(region, RegionState::Done, CopyError::Target(error));
            }
            (Slot::Writing(region) | Slot::Zeroing(region), Ok(())) => {
                self.copied += 1;
                self.new = true;
                if !planted(Bug::WindowClosedEarly) {
                    self.close(region, RegionState::Done);
                }
            }
            (Slot::Writing(_) | Slot::Zeroing(_), Err(error)) if planted(Bug::WindowClosedEarly) => {
                self.failed.get_or_insert(CopyError::Target(error));
            }
            (Slot::Writing(region) | Slot::Zeroing(region), Err(error)) => {
                self.fail(region, RegionState::Todo, CopyError::Target(error));
            }
            (Slot::Grounding(after), result) => {
                self.grounded |= result.is_ok();
                match after {
                    _ if self.failed.is_some() => {}
                    Some(below) if self.grounded => self.go_on(slot, Slot::Keeping(below)),
                    // Nothing is noted, then; it goes on.
                    Some(_) => {}
                    None => self.go_on(slot, Slot::Flushing),
                }
            }
            (Slot::Keeping(below), Ok(())) => self.map.keep(below),
            (Slot::Flushing, Ok(())) => {
                if self.grounded {
                    self.map.keep(self.map.regions());
                }
                self.done = true;
            }
            (Slot::Keeping(_) | Slot::Flushing, Err(error)) => {
                self.failed.get_or_insert(CopyError::Target(error));
            }
            (Slot::Comparing(..) | Slot::Fetching(_) | Slot::Mending(..) | Slot::Sealing(_), result) => {
                self.scrubbed(slot, was, result, content);
            }
            (Slot::Idle | Slot::Draining(_), _) => debug_assert!(false, "an answer to nothing"),
        }
    }

    fn start(&self, region: usize) -> Lba {
        self.map.extent(region).start
    }

    fn go_on(&mut self, slot: usize, next: Slot) {
        self.slots[slot] = next;
        self.ready.push(slot);
    }

    fn fail(&mut self, region: usize, state: RegionState, error: CopyError) {
        self.failed.get_or_insert(error);
        self.close(region, state);
    }

    /// A region was read: it is written, or zeroed, or is right as it is.
    fn read(&mut self, slot: usize, region: usize, content: Content) {
        let fresh = matches!(self.config.task, Task::Copy { fresh: true }) || planted(Bug::FreshNotFresh);
        match content {
            Content::Zeros if fresh => {
                self.copied += 1;
                return self.close(region, RegionState::Done);
            }
            Content::Zeros => self.go_on(slot, Slot::Zeroing(region)),
            _ => self.go_on(slot, Slot::Writing(region)),
        }
        if planted(Bug::WindowClosedEarly) {
            self.close(region, RegionState::Done);
        }
    }

    fn compare(&mut self, region: usize, digest: [u8; 32], content: Content) {
        if content != Content::Digest(digest) {
            return self.fail(region, RegionState::Done, CopyError::Different(self.start(region)));
        }
        self.close(region, RegionState::Done);
        self.alike.insert(region, digest);
        while let Some(digest) = self.alike.remove(&self.folded) {
            self.root.update(&digest);
            self.folded += 1;
        }
        self.map.set_verified(self.folded as u64);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_believed_after_an_interruption_was_flushed() {
        let map = Arc::new(SyncMap::new(80, 8));
        let task = Task::Copy { fresh: false };
        let checkpoint = Duration::ZERO;
        let config = CopyConfig { task, source: 0, target: 1, shard: 0, windows: 3, rate: 0, checkpoint };
        let mut copy = Copy::new(config, Arc::clone(&map), Arc::default());
        let mut flushes = 0;
        while copy.outcome().is_none() {
            let (tag, request) = copy.next_request(Time(1)).expect("it goes on");
            let kept = map.kept();
            copy.complete(tag, Ok(()), Content::Unknown);
            let flush = request.op == RequestOp::Flush;
            flushes += usize::from(flush);
            assert!(map.kept() == kept || flush, "{request:?}");
            let whole = usize::try_from(map.kept() / 8).unwrap();
            assert!((0..whole).all(|region| map.state(region) == RegionState::Done), "below {whole}");
        }
        assert!(flushes > 3 && map.kept() > 0, "{flushes} flushes, {} kept", map.kept());
    }

    #[test]
    fn a_copy_that_is_stopped_leaves_its_source_at_once() {
        let map = Arc::new(SyncMap::new(80, 8));
        let task = Task::Copy { fresh: false };
        let config =
            CopyConfig { task, source: 0, target: 1, shard: 0, windows: 3, rate: 0, checkpoint: Duration::MAX };
        let mut copy = Copy::new(config, Arc::clone(&map), Arc::default());
        let (writing, _) = copy.next_request(Time(1)).unwrap();
        copy.complete(writing, Ok(()), Content::Unknown);
        let (tag, request) = copy.next_request(Time(1)).unwrap();
        assert_eq!((tag, request.target), (writing, Some(1)));
        let (reading, request) = copy.next_request(Time(1)).unwrap();
        assert_eq!(request.target, Some(0));
        copy.stop();
        assert_eq!(copy.poll_abandoned(), Some(reading), "the read that was handed out");
        assert_eq!(copy.poll_abandoned(), None, "not the write, nor what was not handed out");
        assert!(!copy.has_left_source() && copy.next_request(Time(1)).is_none());
        copy.complete(reading, Err(Errno::ECANCELED), Content::Unknown);
        assert!(copy.has_left_source() && copy.outcome().is_none());
        copy.complete(writing, Ok(()), Content::Unknown);
        assert_eq!(copy.outcome(), Some(Err(CopyError::Stopped)));
        assert!((0..10).all(|region| map.state(region) != RegionState::Window), "no window stays open");
    }
}
