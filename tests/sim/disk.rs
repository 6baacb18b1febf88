//! One volume's disk: what it holds, what of it would survive a power cut, what is in flight.
//!
//! Contract: written sectors are visible at once and volatile until a sync that began later has ended, or at once durable for
//! a durable write. A power cut keeps, sector by sector, what was durable or anything written since; of what is in flight any
//! part. Operations in flight end in any order and may take effect in two steps. A sync that fails forgets part of what it
//! should have saved: the next one succeeds, and that part is never durable.

use dst::errno::Errno;
use dst::store::volume::{DiskOp, Work};
use dst::units::Extent;

use crate::rng::Rng;

/// A piece of work in flight.
pub(crate) struct Io {
    /// Numbers of places are used again; this is not.
    pub(crate) serial: u64,
    pub(crate) work: Work,
    /// The life of the server that asked.
    pub(crate) life: u32,
    /// A write's data, later a read's.
    pub(crate) values: Vec<u64>,
    pub(crate) result: Result<(), Errno>,
    /// Sectors that have taken effect.
    applied: u64,
    /// Sync: what it covers.
    mark: u64,
}

/// Something written and perhaps lost.
#[derive(Clone, Copy)]
struct Volatile {
    order: u64,
    sector: usize,
    value: u64,
}

/// See the module's description.
pub(crate) struct Disk {
    now: Vec<u64>,
    stable: Vec<u64>,
    /// Up to which write a sector is durable.
    stable_order: Vec<u64>,
    log: Vec<Volatile>,
    order: u64,
    serial: u64,
    inflight: Vec<Option<Io>>,
    free: Vec<usize>,
}

impl Disk {
    /// A disk full of zeros.
    pub(crate) fn new(sectors: usize) -> Disk {
        Disk {
            now: vec![0; sectors],
            stable: vec![0; sectors],
            stable_order: vec![0; sectors],
            log: Vec::new(),
            order: 0,
            serial: 0,
            inflight: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Somebody else's data is on it, durably.
    pub(crate) fn fill(&mut self, value: u64) {
        self.now.fill(value);
        self.stable.fill(value);
    }

    /// A sector holds something else from now on, and nobody knows. Nothing is in flight there.
    pub(crate) fn flip(&mut self, sector: usize, value: u64) {
        (self.now[sector], self.stable[sector]) = (value, value);
    }

    /// What a reader would see.
    pub(crate) fn content(&self) -> &[u64] {
        &self.now
    }

    /// What a power cut would leave if nothing was lucky.
    pub(crate) fn stable(&self) -> &[u64] {
        &self.stable
    }

    /// Takes a piece of work; its place and its serial.
    pub(crate) fn start(&mut self, work: Work, life: u32, values: Vec<u64>, result: Result<(), Errno>) -> (usize, u64) {
        self.serial += 1;
        let io = Io { serial: self.serial, work, life, values, result, applied: 0, mark: self.order };
        let index = self.free.pop().unwrap_or_else(|| {
            self.inflight.push(None);
            self.inflight.len() - 1
        });
        self.inflight[index] = Some(io);
        (index, self.serial)
    }

    /// Whether a server of another life than `life` has something in flight.
    pub(crate) fn is_haunted(&self, life: u32) -> bool {
        self.inflight.iter().flatten().any(|io| io.life != life)
    }

    /// Whether nothing that changes the extent is in flight.
    pub(crate) fn is_still(&self, extent: Extent) -> bool {
        let flying = |io: &Io| io.work.op.changes() && io.work.extent.overlaps(extent);
        !self.inflight.iter().flatten().any(flying)
    }

    /// Whether everything written in the extent is durable, and nothing of it is in flight; but for what changes nothing (a copy of what
    /// is there).
    pub(crate) fn is_settled(&self, extent: Extent) -> bool {
        let inside = |sector: usize| extent.overlaps(Extent::new(sector as u64, 1));
        let flying = |io: &Io| {
            let at = io.work.extent;
            let value = |sector: u64| usize::try_from(sector).ok().and_then(|sector| io.values.get(sector)).copied();
            let differs = |sector: u64| {
                let place = usize::try_from(at.start.0 + sector).unwrap_or(usize::MAX);
                inside(place) && self.stable.get(place).copied() != Some(value(sector).unwrap_or(0))
            };
            io.work.op.changes() && (0..at.sectors).any(differs)
        };
        let loose = |volatile: &Volatile| {
            let newer = volatile.order > self.stable_order[volatile.sector];
            newer && inside(volatile.sector) && volatile.value != self.stable[volatile.sector]
        };
        !self.inflight.iter().flatten().any(flying) && !self.log.iter().any(loose)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.inflight.iter().all(Option::is_none)
    }

    /// What is in flight there, if it is still the same.
    pub(crate) fn at(&self, index: usize, serial: u64) -> Option<&Io> {
        self.inflight.get(index)?.as_ref().filter(|io| io.serial == serial)
    }

    /// The first `sectors` sectors of a write in flight take effect.
    pub(crate) fn apply(&mut self, index: usize, sectors: u64) {
        let Some(mut io) = self.inflight[index].take() else { return };
        self.apply_to(&mut io, sectors);
        self.inflight[index] = Some(io);
    }

    fn apply_to(&mut self, io: &mut Io, sectors: u64) {
        let until = sectors.max(io.applied);
        let from = std::mem::replace(&mut io.applied, until);
        for place in from..io.applied {
            let sector = usize::try_from(io.work.extent.start.0 + place).unwrap_or(usize::MAX);
            let value = match io.work.op {
                DiskOp::Write { .. } => io.values[usize::try_from(place).unwrap_or(usize::MAX)],
                DiskOp::Zero | DiskOp::Punch => 0,
                DiskOp::Read | DiskOp::Digest | DiskOp::Sync => return,
            };
            self.order += 1;
            self.now[sector] = value;
            self.log.push(Volatile { order: self.order, sector, value });
            if io.work.op == (DiskOp::Write { durable: true }) && io.result.is_ok() {
                self.stable[sector] = value;
                self.stable_order[sector] = self.order;
            }
        }
    }

    /// A piece of work ends; `None` when a power cut has ended it before.
    pub(crate) fn end(&mut self, index: usize, rng: &mut Rng) -> Option<Io> {
        let mut io = self.inflight[index].take()?;
        self.free.push(index);
        let sectors = io.work.extent.sectors;
        match io.work.op {
            DiskOp::Sync => self.sync(&io, rng),
            DiskOp::Read | DiskOp::Digest if io.result.is_ok() => {
                let start = usize::try_from(io.work.extent.start.0).unwrap_or(usize::MAX);
                let sectors = usize::try_from(sectors).unwrap_or(usize::MAX);
                io.values.clear();
                io.values.extend_from_slice(&self.now[start..start + sectors]);
            }
            _ if io.result.is_ok() => self.apply_to(&mut io, sectors),
            DiskOp::Read | DiskOp::Digest => {}
            // A write that fails may have done part of its work.
            _ => {
                let part = rng.below(sectors + 1);
                self.apply_to(&mut io, part);
            }
        }
        Some(io)
    }

    fn sync(&mut self, io: &Io, rng: &mut Rng) {
        let covered = self.log.partition_point(|volatile| volatile.order <= io.mark);
        for volatile in self.log.drain(..covered) {
            let kept = io.result.is_ok() || rng.percent(50);
            if kept && volatile.order > self.stable_order[volatile.sector] {
                self.stable[volatile.sector] = volatile.value;
                self.stable_order[volatile.sector] = volatile.order;
            }
        }
    }

    /// The power goes, and comes back.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        for index in 0..self.inflight.len() {
            let Some(mut io) = self.inflight[index].take() else { continue };
            self.free.push(index);
            // Its sectors take effect in any number; which of them stay is decided below.
            io.result = Err(Errno::EIO);
            let part = rng.range(io.applied, io.work.extent.sectors);
            self.apply_to(&mut io, part);
        }
        let keep = rng.pick(&[0, 20, 50, 80, 100]);
        for volatile in self.log.drain(..) {
            if volatile.order > self.stable_order[volatile.sector] && rng.percent(keep) {
                self.stable[volatile.sector] = volatile.value;
                self.stable_order[volatile.sector] = volatile.order;
            }
        }
        self.now.copy_from_slice(&self.stable);
    }
}
