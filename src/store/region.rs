//! The region log of one volume: which regions may differ from those of its siblings. Pure rules, and the codec of its pages.
//!
//! Contract (CONTRACT 7): a region is marked, durably, before a change of it reaches the disk. A mark is taken away only when the
//! client has said that everything up to a point is flushed on every target, and nothing of the region was under way or has
//! landed since the sync of that point began. What cannot be read is marked. Marks are cleaned lazily, many at a time, and never
//! on the path of an answer.
//!
//! In the state file the pages follow the slots: sectors with a checksum of their own, one bit for each region.

use std::collections::{BTreeMap, BTreeSet};

use crate::bugs::{Bug, planted};
use crate::limits;
use crate::units::Extent;
use crate::wire::volume::RegionPage;

/// Bytes of a page: one sector, so that it is never torn.
pub const PAGE_BYTES: usize = 512;
/// Where the bits start: after the checksum, the magic and the page's number.
const BITS_AT: usize = 16;
/// Regions of one page.
pub const PAGE_REGIONS: u64 = ((PAGE_BYTES - BITS_AT) * 8) as u64;
const MAGIC: [u8; 4] = *b"dsr\x01";

const BITS_BYTES: usize = PAGE_BYTES - BITS_AT;

/// How a volume is cut into regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Size of a region, sectors.
    pub region_sectors: u64,
    /// How many there are.
    pub regions: u64,
}

impl Layout {
    /// The regions of a volume; `None` when it has too many for a log.
    pub fn new(sectors: u64, region_sectors: u64) -> Option<Layout> {
        let regions = sectors.div_ceil(region_sectors);
        (regions <= limits::REGIONS_MAX).then_some(Layout { region_sectors, regions })
    }

    /// Pages of the log.
    pub fn pages(self) -> u64 {
        self.regions.div_ceil(PAGE_REGIONS)
    }

    /// The regions that an extent touches.
    fn of(self, extent: Extent) -> std::ops::Range<u64> {
        extent.start.0 / self.region_sectors..extent.end().0.div_ceil(self.region_sectors)
    }
}

/// Pages without a mark, for a new log or one that grows.
pub fn fresh(pages: std::ops::Range<u64>) -> Vec<u8> {
    pages.flat_map(|page| encode(page, &Bits::default())).collect()
}

fn encode(page: u64, bits: &Bits) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    bytes[4..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&page.to_le_bytes());
    bytes[BITS_AT..].copy_from_slice(&bits.0);
    let crc = crc32c::crc32c(&bytes[4..]);
    bytes[0..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The bits of a page; `None` when it cannot be used.
fn decode(page: u64, bytes: &[u8]) -> Option<Bits> {
    let sealed = bytes.len() == PAGE_BYTES && bytes[0..4] == crc32c::crc32c(&bytes[4..]).to_le_bytes();
    let ours = sealed && bytes[4..8] == MAGIC && bytes[8..16] == page.to_le_bytes();
    if ours { bytes[BITS_AT..].try_into().ok().map(Bits) } else { None }
}

/// A write of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// Which page.
    pub page: u64,
    /// Its bytes.
    pub bytes: [u8; PAGE_BYTES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// What is told, and written with the next write of the page.
    marked: Bits,
    /// What is surely on the disk.
    durable: Bits,
    count: u32,
}

/// One bit for each region of a page.
#[derive(Clone, Copy, Debug)]
struct Bits([u8; BITS_BYTES]);

impl Default for Bits {
    fn default() -> Bits {
        Bits([0; BITS_BYTES])
    }
}

impl Bits {
    fn has(&self, bit: u64) -> bool {
        let (byte, mask) = place(bit);
        self.0[byte] & mask != 0
    }

    /// Says whether it was another before.
    fn set(&mut self, bit: u64, on: bool) -> bool {
        let (byte, mask) = place(bit);
        let before = self.0[byte];
        self.0[byte] = if on { before | mask } else { before & !mask };
        self.0[byte] != before
    }

    fn count(&self) -> u32 {
        let (words, rest) = self.0.as_chunks();
        let rest: u32 = rest.iter().map(|byte| byte.count_ones()).sum();
        words.iter().map(|word| u64::from_le_bytes(*word).count_ones()).sum::<u32>() + rest
    }

    fn clear_from(&mut self, bit: u64) {
        let (byte, mask) = place(bit.min(PAGE_REGIONS));
        if let Some((first, rest)) = self.0.get_mut(byte..).and_then(<[u8]>::split_first_mut) {
            *first &= mask - 1;
            rest.fill(0);
        }
    }
}

fn place(bit: u64) -> (usize, u8) {
    (usize::try_from(bit / 8).unwrap_or(usize::MAX), 1 << (bit % 8))
}

/// What has happened to a region in this life of the server.
#[derive(Clone, Copy, Debug, Default)]
struct Touch {
    /// Changes between their mark and their end.
    flying: u32,
    /// Syncs that had been started when the last one ended.
    stamp: u64,
    /// One has failed: only a new claim, which has looked at the region, may clean it.
    pinned: bool,
}

/// Pages that are being written.
#[derive(Debug)]
struct Batch {
    left: usize,
    failed: bool,
    pages: Vec<(u64, Bits)>,
    cleaned: Vec<u64>,
}

/// The log.
#[derive(Debug)]
pub struct Log {
    layout: Layout,
    pages: Vec<Page>,
    touches: BTreeMap<u64, Touch>,
    /// Pages with marks to be written.
    wanted: BTreeSet<u64>,
    batch: Option<Batch>,
    /// Regions that are to be cleaned with the next batch, if nothing touches them before.
    cleaning: bool,
    /// What the client has said last, what it had said at the last cleaning, and how often since.
    said: u64,
    bound: u64,
    heard: u32,
    /// It is cleaned once in so many words.
    every: u32,
}

impl Log {
    /// The log as its pages say.
    pub fn load(bytes: &[u8], layout: Layout) -> Log {
        let mut log = Log {
            layout: Layout { regions: 0, ..layout },
            pages: Vec::new(),
            touches: BTreeMap::new(),
            wanted: BTreeSet::new(),
            batch: None,
            cleaning: false,
            said: 0,
            bound: 0,
            heard: 0,
            every: limits::REGION_CLEAN_FLUSHES,
        };
        log.resize(layout);
        let mut chunks = bytes.chunks(PAGE_BYTES);
        for (at, page) in (0u64..).zip(&mut log.pages) {
            let bits = chunks.next().and_then(|bytes| decode(at, bytes));
            let mut bits = bits.unwrap_or(Bits([0xff; BITS_BYTES]));
            bits.clear_from(layout.regions.saturating_sub(at * PAGE_REGIONS));
            page.count = bits.count();
            (page.marked, page.durable) = (bits, bits);
        }
        log
    }

    /// It is cleaned once in so many flushes that allow it.
    pub fn cleaned_every(self, flushes: u32) -> Log {
        Log { every: flushes, ..self }
    }

    /// The volume has another size; what is new is not marked.
    pub fn resize(&mut self, layout: Layout) {
        self.layout = layout;
        let pages = usize::try_from(layout.pages()).unwrap_or(usize::MAX);
        self.pages.resize_with(pages.max(self.pages.len()), Page::default);
    }

    /// A change of this extent begins. It may go to the disk when [`Log::is_durable`].
    pub fn touch(&mut self, extent: Extent) {
        for region in self.layout.of(extent) {
            self.touches.entry(region).or_default().flying += 1;
            let (number, bit) = (region / PAGE_REGIONS, region % PAGE_REGIONS);
            let Some(page) = self.pages.get_mut(usize::try_from(number).unwrap_or(usize::MAX)) else { continue };
            page.count += u32::from(page.marked.set(bit, true));
            if !page.durable.has(bit) {
                self.wanted.insert(number);
            }
        }
    }

    /// Whether every region of the extent is marked on the disk.
    pub fn is_durable(&self, extent: Extent) -> bool {
        let durable = |region: u64| {
            let page = self.pages.get(usize::try_from(region / PAGE_REGIONS).unwrap_or(usize::MAX));
            page.is_some_and(|page| page.durable.has(region % PAGE_REGIONS))
        };
        self.layout.of(extent).all(durable)
    }

    /// A change that was begun has ended, when so many syncs had been started. `None`: it never reached the disk.
    pub fn ended(&mut self, extent: Extent, landed: Option<(u64, bool)>) {
        for region in self.layout.of(extent) {
            let Some(touch) = self.touches.get_mut(&region) else { continue };
            touch.flying = touch.flying.saturating_sub(1);
            if let Some((started, failed)) = landed {
                touch.stamp = touch.stamp.max(started);
                touch.pinned |= failed;
            }
        }
    }

    /// Another claim has the volume, when so many syncs had been started: whatever failed before is now its own concern.
    pub fn claimed(&mut self, started: u64) {
        for touch in self.touches.values_mut().filter(|touch| touch.pinned) {
            (touch.pinned, touch.stamp) = (false, started);
        }
        // Who has just come has said nothing yet.
        (self.said, self.bound, self.heard) = (0, 0, 0);
    }

    /// The client says that everything up to this point is flushed on every target.
    pub fn hear(&mut self, point: u64) {
        self.said = self.said.max(point);
        self.heard += 1;
        if self.heard >= self.every {
            self.heard = 0;
            self.cleaning = true;
        }
    }

    /// The next writes of pages: those that somebody waits for, or else those that clean. All of them end before the next.
    pub fn start(&mut self) -> Vec<PageWrite> {
        if self.batch.is_some() {
            return Vec::new();
        }
        let mut cleaned = Vec::new();
        if self.wanted.is_empty() && std::mem::take(&mut self.cleaning) {
            cleaned = self.clean();
        }
        let numbers = std::mem::take(&mut self.wanted);
        if numbers.is_empty() {
            return Vec::new();
        }
        let at = |number: u64| self.pages[usize::try_from(number).unwrap_or(usize::MAX)].marked;
        let pages: Vec<_> = numbers.into_iter().map(|number| (number, at(number))).collect();
        let writes = pages.iter().map(|(page, bits)| PageWrite { page: *page, bytes: encode(*page, bits) }).collect();
        self.batch = Some(Batch { left: pages.len(), failed: false, pages, cleaned });
        writes
    }

    /// Takes the marks away that were not needed for a while: those that the client's word of the last time covers.
    fn clean(&mut self) -> Vec<u64> {
        let bound = std::mem::replace(&mut self.bound, self.said);
        let mut cleaned = Vec::new();
        for (number, page) in (0u64..).zip(&mut self.pages).filter(|(_, page)| page.count > 0) {
            for bit in (0..PAGE_REGIONS).filter(|bit| page.marked.has(*bit)).collect::<Vec<_>>() {
                let region = number * PAGE_REGIONS + bit;
                let touch = self.touches.get(&region).copied().unwrap_or_default();
                let early = planted(Bug::RegionCleanedEarly) && bound > 0;
                let flying = touch.flying > 0 && !planted(Bug::RegionCleanedUnderWay);
                if flying || touch.pinned || (touch.stamp >= bound && !early) {
                    continue;
                }
                page.count -= u32::from(page.marked.set(bit, false));
                // From here on a change has to mark it anew.
                page.durable.set(bit, false);
                if touch.flying == 0 {
                    self.touches.remove(&region);
                }
                self.wanted.insert(number);
                cleaned.push(region);
            }
        }
        cleaned
    }

    /// The write of a page has ended. `Some` when the whole batch has: whether it is durable.
    pub fn written(&mut self, saved: bool) -> Option<bool> {
        let batch = self.batch.as_mut()?;
        batch.left = batch.left.saturating_sub(1);
        batch.failed |= !saved;
        if batch.left > 0 {
            return None;
        }
        let Batch { failed, pages, cleaned, .. } = self.batch.take()?;
        if failed {
            // Nobody knows what is on the disk: what was taken away is there again, and marked anew before it is changed.
            for region in cleaned {
                let page = &mut self.pages[usize::try_from(region / PAGE_REGIONS).unwrap_or(usize::MAX)];
                page.count += u32::from(page.marked.set(region % PAGE_REGIONS, true));
            }
        } else {
            for (number, bits) in pages {
                self.pages[usize::try_from(number).unwrap_or(usize::MAX)].durable = bits;
            }
        }
        Some(!failed)
    }

    /// The marked regions after one, in runs, as many as fit a message.
    pub fn page(&self, after: Option<u64>) -> RegionPage {
        let mut marked: Vec<(u64, u64)> = Vec::new();
        let first = after.map_or(0, |after| after.saturating_add(1));
        let mut more = false;
        'pages: for (number, page) in (0u64..).zip(&self.pages).filter(|(_, page)| page.count > 0) {
            let from = number * PAGE_REGIONS;
            if from + PAGE_REGIONS <= first {
                continue;
            }
            for region in (from.max(first)..self.layout.regions.min(from + PAGE_REGIONS))
                .filter(|region| page.marked.has(region % PAGE_REGIONS))
            {
                let full = marked.len() == limits::REGION_RUNS_MAX;
                match marked.last_mut() {
                    Some((start, count)) if *start + *count == region => *count += 1,
                    _ if full => {
                        more = true;
                        break 'pages;
                    }
                    _ => marked.push((region, 1)),
                }
            }
        }
        RegionPage { marked, more, region_bytes: self.layout.region_sectors * crate::units::SECTOR_BYTES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(regions: u64) -> Layout {
        Layout { region_sectors: 8, regions }
    }

    fn runs(log: &Log) -> Vec<(u64, u64)> {
        log.page(None).marked
    }

    /// Writes what is to be written into the pages.
    fn write(log: &mut Log, bytes: &mut [u8]) {
        let writes = log.start();
        for write in &writes {
            let at = usize::try_from(write.page).unwrap() * PAGE_BYTES;
            bytes[at..at + PAGE_BYTES].copy_from_slice(&write.bytes);
        }
        for _ in writes {
            log.written(true);
        }
    }

    #[test]
    fn marks_come_back_and_damage_marks_everything() {
        let layout = layout(PAGE_REGIONS + 10);
        let mut bytes = fresh(0..layout.pages());
        let mut log = Log::load(&bytes, layout);
        assert_eq!(runs(&log), []);
        log.touch(Extent::new(7, 2));
        log.touch(Extent::new(PAGE_REGIONS * 8 - 8, 16));
        assert!(!log.is_durable(Extent::new(0, 8)));
        write(&mut log, &mut bytes);
        assert!(log.is_durable(Extent::new(0, 16)) && !log.is_durable(Extent::new(0, 17)));
        let expected = [(0, 2), (PAGE_REGIONS - 1, 2)];
        assert_eq!(runs(&log), expected);
        assert_eq!(runs(&Log::load(&bytes, layout)), expected);
        for at in [0, 5, 9, BITS_AT, PAGE_BYTES - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            let log = Log::load(&bad, layout);
            assert_eq!(runs(&log), [(0, PAGE_REGIONS + 1)], "byte {at} of the first page");
            assert!(log.is_durable(Extent::new(800, 8)));
        }
        assert_eq!(runs(&Log::load(&bytes[..PAGE_BYTES], layout)), [(0, 2), (PAGE_REGIONS - 1, 11)], "cut off");
        let mut moved = bytes.clone();
        moved.copy_within(0..PAGE_BYTES, PAGE_BYTES);
        assert_eq!(runs(&Log::load(&moved, layout))[1..], [(PAGE_REGIONS - 1, 11)], "at a wrong place");
    }

    #[test]
    fn a_volume_may_change_its_size() {
        assert_eq!(Layout::new(0, 8).map(Layout::pages), Some(0));
        assert_eq!(Layout::new(limits::REGIONS_MAX * 8 + 1, 8), None);
        let mut bytes = fresh(0..3);
        let mut log = Log::load(&bytes, layout(5));
        log.touch(Extent::new(32, 8));
        write(&mut log, &mut bytes);
        log.resize(layout(PAGE_REGIONS * 2 + 1));
        log.touch(Extent::new(PAGE_REGIONS * 16, 8));
        write(&mut log, &mut bytes);
        assert_eq!(runs(&log), [(4, 1), (PAGE_REGIONS * 2, 1)]);
        log.resize(layout(4));
        assert_eq!(runs(&log), []);
    }

    #[test]
    fn long_lists_come_in_pages() {
        let regions = 4 * limits::REGION_RUNS_MAX as u64;
        let mut log = Log::load(&fresh(0..layout(regions).pages()), layout(regions));
        (0..regions).step_by(2).for_each(|region| log.touch(Extent::new(region * 8, 1)));
        let first = log.page(None);
        assert!(first.more && first.marked.len() == limits::REGION_RUNS_MAX);
        let last = first.marked.last().map(|(start, count)| start + count - 1);
        let second = log.page(last);
        assert!(!second.more && second.marked.len() == limits::REGION_RUNS_MAX);
        assert_eq!(second.marked.last(), Some(&(regions - 2, 1)));
        assert!(serde_json::to_vec(&first).unwrap().len() < limits::MESSAGE_BYTES_MAX as usize);
    }

    #[test]
    fn what_has_failed_is_cleaned_by_a_new_claim_alone() {
        let mut bytes = fresh(0..1);
        let mut log = Log::load(&bytes, layout(9));
        let hear = |log: &mut Log, bytes: &mut [u8], point: u64| {
            for _ in 0..limits::REGION_CLEAN_FLUSHES * 2 {
                log.hear(point);
                write(log, bytes);
            }
        };
        log.touch(Extent::new(0, 8));
        log.touch(Extent::new(8, 8));
        write(&mut log, &mut bytes);
        log.ended(Extent::new(0, 8), Some((1, true)));
        log.ended(Extent::new(8, 8), Some((1, false)));
        hear(&mut log, &mut bytes, 1);
        assert_eq!(runs(&log), [(0, 2)], "touched after that point");
        hear(&mut log, &mut bytes, 2);
        assert_eq!(runs(&log), [(0, 1)]);
        log.claimed(4);
        hear(&mut log, &mut bytes, 4);
        assert_eq!(runs(&log), [(0, 1)]);
        hear(&mut log, &mut bytes, 5);
        assert_eq!(runs(&Log::load(&bytes, layout(9))), []);
    }

    #[test]
    fn a_cleaning_that_fails_leaves_the_mark() {
        let mut bytes = fresh(0..1);
        let mut log = Log::load(&bytes, layout(9));
        let extent = Extent::new(0, 8);
        log.touch(extent);
        write(&mut log, &mut bytes);
        log.ended(extent, Some((1, false)));
        for _ in 0..limits::REGION_CLEAN_FLUSHES * 2 {
            log.hear(2);
        }
        log.start();
        log.written(true);
        (0..limits::REGION_CLEAN_FLUSHES).for_each(|_| log.hear(2));
        assert_eq!(log.start().len(), 1);
        // A change that comes now waits for a mark of its own.
        log.touch(extent);
        assert!(!log.is_durable(extent));
        assert_eq!(log.start(), [], "one batch at a time");
        assert_eq!(log.written(false), Some(false));
        assert!(!log.is_durable(extent));
        assert_eq!(runs(&log), [(0, 1)]);
        write(&mut log, &mut bytes);
        assert!(log.is_durable(extent));
    }

    proptest! {
        #[test]
        fn any_bytes_load_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..1200), regions in 0u64..9000) {
            let log = Log::load(&bytes, layout(regions));
            prop_assert!(log.page(None).marked.iter().all(|(first, count)| first + count <= regions));
        }
    }
}
