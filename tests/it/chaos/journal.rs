//! What was asked of a device, what of it was acknowledged, what was flushed: and so what each sector may show after processes died,
//! or after the power failed.
//!
//! Every sector that is written says which block and sector it is and which version. A block has one change in flight at a time, so
//! versions of a block are ordered.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use super::client::{Client, FUA, code};
use super::dice::Dice;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
const SECTOR: usize = 512;
/// Requests of one connection in flight.
const DEPTH: usize = 24;
/// Blocks of the longest change.
const LONGEST: usize = 12;

/// What may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Floor {
    /// Nothing that was acknowledged: only processes have died.
    Acknowledged,
    /// What was not flushed: a disk has lost its cache.
    Flushed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Zeros,
}

#[derive(Clone, Debug)]
struct Block {
    /// What it was changed to and may still show, oldest first: by version.
    changes: Vec<(u64, Kind)>,
    acknowledged: u64,
    flushed: u64,
    busy: bool,
}

/// A change or a flush in flight.
struct Asked {
    blocks: std::ops::Range<usize>,
    version: u64,
    durable: bool,
    /// Of a flush: what had been acknowledged when it was sent.
    covers: Option<Vec<u64>>,
}

/// See the module's description.
pub(crate) struct Journal {
    blocks: Vec<Block>,
    version: u64,
    /// Changes and flushes that were acknowledged.
    pub(crate) acknowledged: u64,
    pub(crate) flushes: u64,
}

/// What a block's sector looks like in a version.
fn sector(block: usize, index: usize, version: u64) -> [u8; SECTOR] {
    let mut dice = Dice::new(version << 24 ^ (block as u64) << 4 ^ index as u64);
    let mut bytes = [0; SECTOR];
    for part in bytes.chunks_mut(8) {
        part.copy_from_slice(&dice.next().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes[8..16].copy_from_slice(&(block as u64).to_le_bytes());
    bytes[16..24].copy_from_slice(&(index as u64).to_le_bytes());
    bytes
}

fn content(blocks: std::ops::Range<usize>, version: u64) -> Vec<u8> {
    let sectors = BLOCK.div_ceil(SECTOR as u64);
    blocks
        .flat_map(|block| (0..sectors).flat_map(move |at| sector(block, usize::try_from(at).unwrap(), version)))
        .collect()
}

impl Journal {
    /// Of a device that is all zeros.
    pub(crate) fn new(bytes: u64) -> Journal {
        let block = Block { changes: vec![(0, Kind::Zeros)], acknowledged: 0, flushed: 0, busy: false };
        let blocks = vec![block; usize::try_from(bytes / BLOCK).unwrap()];
        Journal { blocks, version: 0, acknowledged: 0, flushes: 0 }
    }

    fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// A range of blocks that nobody changes now.
    fn free(&self, dice: &mut Dice) -> Option<std::ops::Range<usize>> {
        // A third of the changes meet in a small part, so that blocks are written again and again.
        let within = if dice.one_in(3) { self.blocks.len() / 64 } else { self.blocks.len() };
        let from = dice.index(within);
        let to = self.blocks.len().min(from + 1 + if dice.one_in(2) { 0 } else { dice.index(LONGEST) });
        (!self.blocks[from..to].iter().any(|block| block.busy)).then_some(from..to)
    }

    fn begin_change(&mut self, blocks: std::ops::Range<usize>, kind: Kind, durable: bool) -> Asked {
        self.version += 1;
        for block in &mut self.blocks[blocks.clone()] {
            block.changes.push((self.version, kind));
            block.busy = true;
        }
        Asked { blocks, version: self.version, durable, covers: None }
    }

    fn begin_flush(&mut self) -> Asked {
        let covers = self.blocks.iter().map(|block| block.acknowledged).collect();
        Asked { blocks: 0..0, version: 0, durable: true, covers: Some(covers) }
    }

    fn done(&mut self, asked: Asked) {
        self.acknowledged += 1;
        for block in &mut self.blocks[asked.blocks] {
            block.busy = false;
            block.acknowledged = asked.version;
            if asked.durable {
                block.flushed = asked.version;
            }
        }
        if let Some(covers) = asked.covers {
            self.flushes += 1;
            for (block, covered) in self.blocks.iter_mut().zip(covers) {
                block.flushed = block.flushed.max(covered);
            }
        }
        // Nothing asks for what is older than what was flushed.
        for block in &mut self.blocks {
            let floor = block.flushed;
            if block.changes[0].0 < floor {
                block.changes.retain(|(version, _)| *version >= floor);
            }
        }
    }

    /// Who asked is gone: what was in flight may have happened or not.
    fn abandon(&mut self) {
        self.blocks.iter_mut().for_each(|block| block.busy = false);
    }

    /// Whether these bytes may be what the block shows.
    fn check(&self, at: usize, bytes: &[u8], floor: Floor) -> Result<(), String> {
        let block = &self.blocks[at];
        let floor = match floor {
            Floor::Acknowledged => block.acknowledged,
            Floor::Flushed => block.flushed,
        };
        for (index, found) in bytes.chunks(SECTOR).enumerate() {
            let shows = |(version, kind): &(u64, Kind)| match kind {
                Kind::Zeros => found.iter().all(|byte| *byte == 0),
                Kind::Data => found[..8] == version.to_le_bytes() && *found == sector(at, index, *version),
            };
            let mut allowed = block.changes.iter().filter(|(version, _)| *version >= floor);
            if !allowed.any(shows) {
                let word = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().unwrap());
                return Err(format!(
                    "block {at}, sector {index} shows version {} of block {}, sector {}; it was acknowledged with version {}, \
                     flushed with {}, and changed: {:?}",
                    word(0),
                    word(8),
                    word(16),
                    block.acknowledged,
                    block.flushed,
                    block.changes
                ));
            }
        }
        Ok(())
    }

    /// Reads the whole device, twice: what it shows is allowed, and it stays so. Nothing may be in flight.
    pub(crate) fn verify(&mut self, path: &Path, floor: Floor) -> Result<(), String> {
        self.abandon();
        let first = self.read_all(path).map_err(|error| format!("cannot read: {error}"))?;
        for at in 0..self.blocks.len() {
            self.check(at, block_of(&first, at), floor)?;
        }
        let second = self.read_all(path).map_err(|error| format!("cannot read again: {error}"))?;
        if let Some(at) = (0..self.blocks.len()).find(|at| block_of(&first, *at) != block_of(&second, *at)) {
            return Err(format!("block {at} changes though nobody writes: a dead process's write has landed"));
        }
        if floor == Floor::Flushed {
            // What was lost is lost: only what was flushed is certain from here on.
            self.blocks.iter_mut().for_each(|block| block.acknowledged = block.flushed);
        }
        Ok(())
    }

    /// How many blocks no longer show what was acknowledged last, though nobody changed them since.
    pub(crate) fn count_lost(&self, path: &Path) -> usize {
        let all = self.read_all(path).unwrap();
        let is_lost = |at: &usize| self.check(*at, block_of(&all, *at), Floor::Acknowledged).is_err();
        (0..self.blocks.len()).filter(is_lost).count()
    }

    fn read_all(&self, path: &Path) -> io::Result<Vec<u8>> {
        const PIECE: u32 = 1 << 20;
        let mut client = Client::connect(path)?;
        let mut all = Vec::new();
        for offset in (0..self.bytes()).step_by(PIECE as usize) {
            let bytes = u64::from(PIECE).min(self.bytes() - offset);
            all.extend(client.read(offset, u32::try_from(bytes).unwrap())?);
        }
        Ok(all)
    }
}

fn block_of(bytes: &[u8], at: usize) -> &[u8] {
    let size = usize::try_from(BLOCK).unwrap();
    &bytes[at * size..(at + 1) * size]
}

/// How often a connection asks for durability: once in so many requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// A flush.
    pub(crate) flush: u32,
    /// A change that is to be durable when it is answered.
    pub(crate) durable: u32,
}

/// Several of them at once ([`write()`]), each with dice of its own.
pub(crate) fn writers<'scope>(
    scope: &'scope Scope<'scope, '_>,
    connections: u64,
    seed: u64,
    habits: Habits,
    (path, journal, stop): (&'scope Path, &'scope Mutex<Journal>, &'scope AtomicBool),
) -> Vec<ScopedJoinHandle<'scope, io::Result<()>>> {
    let start = |number: u64| {
        let dice = Dice::new(seed ^ number << 40);
        scope.spawn(move || write(path, journal, habits, dice, stop))
    };
    (0..connections).map(start).collect()
}

/// Changes blocks over one connection until it is told to stop, or the connection ends. Any error of a request is a failure.
pub(crate) fn write(
    path: &Path,
    journal: &Mutex<Journal>,
    habits: Habits,
    mut dice: Dice,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut client = Client::connect(path)?;
    let mut flying = HashMap::new();
    for cookie in 0.. {
        let stopping = stop.load(Ordering::Relaxed);
        if stopping && flying.is_empty() {
            break;
        }
        if !stopping && flying.len() < DEPTH {
            let asked = ask(&mut client, journal, habits, &mut dice, cookie)?;
            asked.map(|asked| flying.insert(cookie, asked));
        }
        if stopping || flying.len() >= DEPTH {
            let (cookie, error) = client.answer()?;
            if error != 0 {
                return Err(io::Error::other(format!("a request failed with error {error}")));
            }
            journal.lock().unwrap().done(flying.remove(&cookie).expect("an answer to something asked"));
        }
    }
    Ok(())
}

fn ask(
    client: &mut Client,
    journal: &Mutex<Journal>,
    habits: Habits,
    dice: &mut Dice,
    cookie: u64,
) -> io::Result<Option<Asked>> {
    let mut locked = journal.lock().unwrap();
    if dice.one_in(habits.flush) {
        let asked = locked.begin_flush();
        drop(locked);
        client.ask(code::FLUSH, 0, cookie, (0, 0), &[])?;
        return Ok(Some(asked));
    }
    let Some(blocks) = locked.free(dice) else { return Ok(None) };
    let (durable, zeros) = (dice.one_in(habits.durable), dice.one_in(8));
    let kind = if zeros { Kind::Zeros } else { Kind::Data };
    let code = [code::TRIM, code::WRITE_ZEROES][dice.index(2)];
    let asked = locked.begin_change(blocks.clone(), kind, durable);
    drop(locked);
    let bytes = u32::try_from(blocks.len() as u64 * BLOCK).unwrap();
    let range = (blocks.start as u64 * BLOCK, bytes);
    let flags = if durable { FUA } else { 0 };
    match kind {
        Kind::Zeros => client.ask(code, flags, cookie, range, &[])?,
        Kind::Data => client.ask(code::WRITE, flags, cookie, range, &content(blocks, asked.version))?,
    }
    Ok(Some(asked))
}
