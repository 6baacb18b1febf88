//! What a volume must not forget when its server dies: the claim, a failed flush, losses, the label. Pure codec, and the
//! order in which changes become durable.
//!
//! The state file lies beside the data and is as large as it ever gets from the start, so a full pool never stops a claim. It
//! begins with two slots of `SLOT_BYTES`; the pages of the region log follow (`store/region.rs`). A change is written into the older one, so a write that is torn leaves the state before
//! it. A slot: magic, sequence, the volume's id, the fields, CRC32C over its head and the label, which starts at `LABEL_AT`.

use crate::limits;
use crate::store::region;
use crate::store::region::{Layout, PageWrite};
use crate::store::session::Claim;
use crate::units::{Epoch, Id, SECTOR_BYTES};

/// Bytes of a slot: the head and the longest label, whole pages.
pub const SLOT_BYTES: usize = 20 << 10;
/// Bytes of both slots.
pub const SLOTS_BYTES: usize = SLOT_BYTES * 2;

const MAGIC: [u8; 8] = *b"dstst\x00\x00\x01";
/// Where the label starts in a slot; the checksum is just before it.
const LABEL_AT: usize = 512;
const CRC_AT: usize = LABEL_AT - 4;

const HAS_CLAIM: u8 = 1 << 0;
const HAS_LABEL: u8 = 1 << 1;
const FLUSH_FAILED: u8 = 1 << 2;
const DIRTY: u8 = 1 << 3;

/// What is kept of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Who has it.
    pub claim: Option<Claim>,
    /// A sync has failed: no flush of this volume succeeds any more.
    pub flush_failed: bool,
    /// How often acknowledged writes may have been lost with the machine's memory.
    pub losses: u64,
    /// The boot of the machine in which it was last written to.
    pub boot: Id,
    /// It was written to in that boot, and no orderly stop has made that durable.
    pub dirty: bool,
    /// What its array has stored with it.
    pub label: Option<String>,
}

impl State {
    /// Nothing was ever written to the volume: before the first change its boot is written down.
    pub fn is_blank(&self) -> bool {
        self.boot.is_nil()
    }

    /// Whether what was acknowledged before may be lost, in this boot of the machine, and is not counted yet.
    pub fn has_lost(&self, boot: Id) -> bool {
        self.dirty && self.boot != boot
    }

    /// The bytes of a slot; whole sectors, at most `SLOT_BYTES`.
    pub fn encode(&self, volume: Id, sequence: u64) -> Vec<u8> {
        let label = self.label.as_deref().unwrap_or_default().as_bytes();
        debug_assert!(label.len() <= limits::LABEL_BYTES_MAX);
        let sector = usize::try_from(SECTOR_BYTES).unwrap_or(LABEL_AT);
        let mut bytes = vec![0; (LABEL_AT + label.len()).next_multiple_of(sector)];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        bytes[16..32].copy_from_slice(&volume.0);
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        bytes[32] = flag(self.claim.is_some(), HAS_CLAIM)
            | flag(self.label.is_some(), HAS_LABEL)
            | flag(self.flush_failed, FLUSH_FAILED)
            | flag(self.dirty, DIRTY);
        if let Some(claim) = &self.claim {
            bytes[40..56].copy_from_slice(&claim.array.0);
            bytes[56..72].copy_from_slice(&claim.session.0);
            bytes[72..88].copy_from_slice(&claim.host.0);
            bytes[88..96].copy_from_slice(&claim.epoch.0.to_le_bytes());
        }
        bytes[96..104].copy_from_slice(&self.losses.to_le_bytes());
        bytes[104..120].copy_from_slice(&self.boot.0);
        bytes[120..124].copy_from_slice(&u32::try_from(label.len()).unwrap_or(0).to_le_bytes());
        bytes[LABEL_AT..LABEL_AT + label.len()].copy_from_slice(label);
        let crc = checksum(&bytes, label.len());
        bytes[CRC_AT..LABEL_AT].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What a slot holds, with its sequence; `None` when it was never written, is damaged, or is another volume's.
    pub fn decode(bytes: &[u8], volume: Id) -> Option<(u64, State)> {
        if bytes.len() < LABEL_AT || bytes[0..8] != MAGIC || bytes[16..32] != volume.0 {
            return None;
        }
        let length = usize::try_from(u32_at(bytes, 120)).ok()?;
        let label = bytes.get(LABEL_AT..LABEL_AT.checked_add(length)?)?;
        if length > limits::LABEL_BYTES_MAX || checksum(bytes, length) != u32_at(bytes, CRC_AT) {
            return None;
        }
        let has = |bit: u8| bytes[32] & bit != 0;
        let claim = Claim {
            array: id_at(bytes, 40),
            session: id_at(bytes, 56),
            host: id_at(bytes, 72),
            epoch: Epoch(u64_at(bytes, 88)),
        };
        let state = State {
            claim: has(HAS_CLAIM).then_some(claim),
            flush_failed: has(FLUSH_FAILED),
            losses: u64_at(bytes, 96),
            boot: id_at(bytes, 104),
            dirty: has(DIRTY),
            label: if has(HAS_LABEL) { Some(std::str::from_utf8(label).ok()?.to_owned()) } else { None },
        };
        Some((u64_at(bytes, 8), state))
    }
}

/// Over everything before the checksum, then over the label.
fn checksum(bytes: &[u8], label: usize) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), &bytes[LABEL_AT..LABEL_AT + label])
}

fn id_at(bytes: &[u8], at: usize) -> Id {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    Id(id)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// The content of a new volume's state file.
pub fn fresh(volume: Id, layout: Option<Layout>) -> Vec<u8> {
    let mut bytes = State::default().encode(volume, 0);
    bytes.resize(SLOTS_BYTES, 0);
    bytes.extend(region::fresh(0..layout.map_or(0, Layout::pages)));
    bytes
}

/// What the file of a volume that grows has more, and where; `None` when nothing.
pub fn growth(from: Option<Layout>, to: Option<Layout>) -> Option<(u64, Vec<u8>)> {
    let pages = from.map_or(0, Layout::pages)..to.map_or(0, Layout::pages);
    let offset = SLOTS_BYTES as u64 + pages.start * region::PAGE_BYTES as u64;
    (!pages.is_empty()).then(|| (offset, region::fresh(pages)))
}

/// What a state file says, `None` when neither slot can be used: a crash never leaves that.
pub fn load(bytes: &[u8], volume: Id) -> Option<(u64, State)> {
    let slots = [bytes.get(..SLOT_BYTES), bytes.get(SLOT_BYTES..SLOTS_BYTES)];
    slots.into_iter().flatten().filter_map(|slot| State::decode(slot, volume)).max_by_key(|(sequence, _)| *sequence)
}

/// Which part of the state file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A slot.
    State,
    /// A page of the region log.
    Page(u64),
}

/// Bytes for the state file: durable there before the world says that they are saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which part; one write of each at a time.
    pub part: Part,
    /// Where in the file, bytes; a whole number of sectors.
    pub offset: u64,
    /// Whole sectors.
    pub bytes: Vec<u8>,
}

impl From<PageWrite> for Write {
    fn from(write: PageWrite) -> Write {
        let offset = (SLOTS_BYTES + usize::try_from(write.page).unwrap_or(0) * region::PAGE_BYTES) as u64;
        Write { part: Part::Page(write.page), offset, bytes: write.bytes.to_vec() }
    }
}

/// The state as it is on the disk and as it is to be. One write at a time; what changes meanwhile shares the next.
#[derive(Debug)]
pub struct Book {
    volume: Id,
    /// Of the durable state; the next one goes to the other slot, as often as it takes.
    sequence: u64,
    durable: State,
    wanted: State,
    /// Changes so far, and up to which of them a write was started.
    changes: u64,
    tried: u64,
    running: Option<State>,
}

impl Book {
    /// The state of a volume, as found with [`load`].
    pub fn new(volume: Id, (sequence, state): (u64, State)) -> Book {
        Book { volume, sequence, durable: state.clone(), wanted: state, changes: 0, tried: 0, running: None }
    }

    /// What a crash leaves.
    pub fn durable(&self) -> &State {
        &self.durable
    }

    /// Changes what is to be kept. The number is that of the change, for [`Book::ended`].
    pub fn change(&mut self, change: impl FnOnce(&mut State)) -> u64 {
        change(&mut self.wanted);
        self.changes += 1;
        self.changes
    }

    /// Takes back what was changed but could not be saved.
    pub fn revert(&mut self, change: impl FnOnce(&mut State, &State)) {
        change(&mut self.wanted, &self.durable);
    }

    /// The next write, if there is something to save and nothing on its way.
    pub fn start(&mut self) -> Option<Write> {
        if self.running.is_some() || self.tried == self.changes {
            return None;
        }
        self.tried = self.changes;
        self.running = Some(self.wanted.clone());
        let sequence = self.sequence + 1;
        let offset = if sequence.is_multiple_of(2) { 0 } else { SLOT_BYTES as u64 };
        Some(Write { part: Part::State, offset, bytes: self.wanted.encode(self.volume, sequence) })
    }

    /// The write has ended: what became of the changes up to the one returned.
    pub fn ended(&mut self, saved: bool) -> u64 {
        if let Some(state) = self.running.take().filter(|_| saved) {
            self.durable = state;
            self.sequence += 1;
        }
        self.tried
    }
}

const _: () = assert!(LABEL_AT + limits::LABEL_BYTES_MAX <= SLOT_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: Id = Id([9; 16]);

    fn state(label: Option<String>) -> State {
        let claim = Claim { array: Id([1; 16]), epoch: Epoch(7), session: Id([2; 16]), host: Id([3; 16]) };
        State { claim: Some(claim), flush_failed: true, losses: 3, boot: Id([4; 16]), dirty: true, label }
    }

    #[test]
    fn it_round_trips() {
        let longest = "x".repeat(limits::LABEL_BYTES_MAX);
        for state in [State::default(), state(None), state(Some(String::new())), state(Some(longest))] {
            let bytes = state.encode(VOLUME, 5);
            assert!(bytes.len() <= SLOT_BYTES && bytes.len().is_multiple_of(512));
            assert_eq!(State::decode(&bytes, VOLUME), Some((5, state)));
            assert_eq!(State::decode(&bytes, Id([8; 16])), None, "another volume's");
        }
    }

    #[test]
    fn what_is_damaged_is_not_used() {
        let bytes = state(Some("a label".to_owned())).encode(VOLUME, 5);
        for at in (0..124).chain(CRC_AT..LABEL_AT + 7) {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(State::decode(&bad, VOLUME), None, "byte {at}");
        }
        assert_eq!(State::decode(&bytes[..LABEL_AT], VOLUME), None);
        assert_eq!(load(&[], VOLUME), None);
        assert_eq!(load(&[0; SLOTS_BYTES], VOLUME), None);
        assert_eq!(load(&fresh(VOLUME, None), VOLUME), Some((0, State::default())));
    }

    /// A file, and what a book writes into it.
    fn put(file: &mut [u8], write: &Write, sectors: usize) {
        let at = usize::try_from(write.offset).unwrap();
        let bytes = write.bytes.len().min(sectors * 512);
        file[at..at + bytes].copy_from_slice(&write.bytes[..bytes]);
    }

    #[test]
    fn a_torn_write_leaves_the_state_before_it() {
        let mut file = fresh(VOLUME, None);
        let mut before = State::default();
        for round in 0..6u64 {
            let mut book = Book::new(VOLUME, load(&file, VOLUME).unwrap());
            assert_eq!(*book.durable(), before);
            let label = "y".repeat(usize::try_from(round).unwrap() * 1500);
            book.change(|state| (state.losses, state.label) = (round + 1, Some(label)));
            let write = book.start().unwrap();
            let whole = write.bytes.len() / 512;
            for sectors in 0..whole {
                let mut torn = file.clone();
                put(&mut torn, &write, sectors);
                let (_, found) = load(&torn, VOLUME).unwrap();
                assert_eq!(found, before, "{sectors} of {whole} sectors");
            }
            put(&mut file, &write, whole);
            book.ended(true);
            before = book.durable().clone();
            assert_eq!(before.losses, round + 1);
        }
    }

    #[test]
    fn changes_share_the_next_write() {
        let mut book = Book::new(VOLUME, (0, State::default()));
        assert_eq!(book.start(), None);
        let first = book.change(|state| state.losses = 1);
        let one = book.start().unwrap();
        let second = book.change(|state| state.dirty = true);
        let third = book.change(|state| state.flush_failed = true);
        assert_eq!(book.start(), None, "one at a time");
        assert_eq!(book.ended(true), first);
        assert_eq!((book.durable().losses, book.durable().dirty), (1, false));
        let two = book.start().unwrap();
        assert_ne!(one.offset, two.offset);
        assert!(second < third);
        assert_eq!(book.ended(false), third);
        assert!(!book.durable().dirty);
        assert_eq!(book.start(), None, "a failed write is not repeated by itself");
        book.change(|_| ());
        assert_eq!(book.start().unwrap(), two, "and never over the slot that is good");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), valid: bool) {
            if valid && bytes.len() >= 32 {
                bytes[0..8].copy_from_slice(&MAGIC);
                bytes[16..32].copy_from_slice(&VOLUME.0);
            }
            let _ = State::decode(&bytes, VOLUME);
        }
    }
}
