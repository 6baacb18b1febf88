//! The judge: decides from the history alone whether an array has kept its promises (the contract, section 12).
//!
//! Contract: it hears of operations as they are invoked and as they end, of deaths and of injected faults, in order; it knows
//! nothing of the engine, of time only what is needed to judge time-outs. It checks as events come in; what it keeps per sector
//! is bounded by the writes since the last flush.
//!
//! Every sector is a register. A write gives each of its sectors a value that no other write ever gives to any sector, so a
//! read says whose data it has seen. Per sector the judge keeps the writes that may still matter, as [`Entry`]s:
//!
//! - *Live*: the register may hold it now. A write that was acknowledged ends the life of everything that surely took effect
//!   before it was invoked (rule 1); a read that shows a settled value ends the life of the other settled ones ("then stable").
//! - *Losable*: a device that dies may come back with it (rule 5): every entry that no acknowledged write, itself covered by a
//!   flush (rule 4) or durable by itself, has surely overwritten.
//!
//! "Surely took effect before" needs the last moment at which a write could take effect: its acknowledgement; for one that
//! failed, the first success on that sector of an operation invoked after the error (rule 2); for one that is outstanding, the
//! first read that showed it, unless a restart lets it take effect again (rule 3).

use std::collections::BTreeMap;

use crate::excuse::Excuses;
use crate::judge::hosts::Bound;
use crate::text;

mod hosts;

/// The value of a sector that nobody has written, or that was discarded.
pub(crate) const ZERO: u64 = 0;
/// A value has this many bits for the sector's place in its write.
const PLACE_BITS: u32 = 12;
/// Operations that are remembered for explanations.
const RECORDS: usize = 1 << 12;
/// Old excuses are forgotten once in so many operations.
const FORGET_EVERY: u64 = 256;
/// What takes longer than this needs an excuse, ns.
const PATIENCE: u64 = 500_000_000;
/// A moment that has not come.
const NEVER: u64 = u64::MAX;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Reads.
    Read,
    /// Writes values of its own.
    Write {
        /// Durable when acknowledged.
        fua: bool,
    },
    /// Discards or writes zeros.
    Zero {
        /// Durable when acknowledged.
        fua: bool,
    },
    /// Makes durable what was acknowledged before.
    Flush,
}

/// An operation, as the judge names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpId {
    slot: usize,
    serial: u64,
}

impl OpId {
    /// The value that a write gives to its sector number `place`.
    pub(crate) fn value(self, place: u64) -> u64 {
        self.serial << PLACE_BITS | place
    }

    /// The number of the operation, for people.
    pub(crate) fn serial(self) -> u64 {
        self.serial
    }
}

/// What the judge has to know beforehand.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// Which device holds each sector.
    pub(crate) device_of: Vec<u16>,
    /// How many devices there are.
    pub(crate) devices: usize,
    /// Nodes have several targets: what was shown across a restart stays (rule 3).
    pub(crate) replicated: bool,
    /// They may have, now and then.
    pub(crate) plural: bool,
    /// Devices may die and lose what was not flushed.
    pub(crate) mortal: bool,
    /// No operation may take longer than this, ns.
    pub(crate) io_timeout: u64,
    /// How much later than `io_timeout` an operation may end, ns.
    pub(crate) slack: u64,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Which rule of section 12, or another name.
    pub(crate) rule: &'static str,
    /// What was seen, and what would have been right.
    pub(crate) text: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rule {}: {}", self.rule, self.text)
    }
}

/// A verdict about one event.
pub(crate) type Verdict = Result<(), Violation>;

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Invoked, not ended.
    Pending,
    /// Acknowledged.
    Acked,
    /// Ended with an error.
    Failed,
}

/// An operation, for explanations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) serial: u64,
    pub(crate) what: What,
    pub(crate) start: u64,
    pub(crate) sectors: u64,
    pub(crate) invoked_at: u64,
    pub(crate) ended_at: u64,
    pub(crate) state: State,
}

/// An operation that has not ended.
#[derive(Clone, Copy, Debug)]
struct Op {
    record: Record,
    invoke: u64,
    /// The daemon that was asked.
    by: u32,
    /// From when on nothing of it takes effect any more.
    bound: Option<Bound>,
}

/// One write in the life of one sector. Moments are stamps: the number of the event.
#[derive(Clone, Copy, Debug)]
struct Entry {
    serial: u64,
    value: u64,
    end: u64,
    state: State,
    /// Failed: when it could take effect for the last time.
    resolved: u64,
    /// Pending: when a read had shown it.
    shown: u64,
    /// When it ceased to be live.
    killed: u64,
    /// When the first write that surely overwrote it was acknowledged; `GONE` when that write is durable.
    superseded: u64,
    /// It was pending across a restart: it may take effect again.
    again: bool,
    /// It is on stable storage if it is the value at all.
    hard: bool,
    /// It takes effect before this or never: another host serves since then.
    bound: u64,
    /// A read has shown something else that had taken effect by this moment.
    denied: u64,
}

/// Superseded by something durable. Before the stamp of every flush.
const GONE: u64 = 0;
const FIRST_STAMP: u64 = 2;

impl Entry {
    /// What every sector holds at the start.
    const BLANK: Entry = Entry {
        serial: 0,
        value: ZERO,
        end: 0,
        state: State::Acked,
        resolved: NEVER,
        shown: NEVER,
        killed: NEVER,
        superseded: NEVER,
        again: false,
        hard: true,
        bound: NEVER,
        denied: NEVER,
    };

    /// The last moment at which it can have taken effect, as far as is known.
    fn latest(&self) -> u64 {
        let latest = match self.state {
            State::Acked => self.end,
            State::Failed => self.resolved,
            State::Pending if self.again => NEVER,
            State::Pending => self.shown,
        };
        latest.min(self.bound)
    }

    /// Whether nothing is open about when it takes effect but whether it has.
    fn is_over(&self) -> bool {
        self.state != State::Pending || self.bound != NEVER
    }

    /// A successful operation invoked at `invoke` has ended at `now`: an older failure is over (rule 2).
    fn resolve(&mut self, invoke: u64, now: u64) {
        if self.state == State::Failed && self.resolved == NEVER && self.end < invoke {
            self.resolved = now;
        }
    }

    fn is_live(&self) -> bool {
        self.killed == NEVER
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Judge {
    rules: Rules,
    pub(crate) excuses: Excuses,
    clock: u64,
    serials: u64,
    /// When the last successful flush was invoked.
    flushed: u64,
    /// When each device died last.
    died: Vec<u64>,
    /// Empty: nobody has ever written there.
    sectors: Vec<Vec<Entry>>,
    ops: Vec<Option<Op>>,
    free: Vec<usize>,
    /// Invoke stamps of reads that have not ended, in order.
    reads: Vec<u64>,
    /// The last `RECORDS` operations, by serial.
    records: Vec<Record>,
    /// When the daemon last came out of a pause, ns.
    resumed_at: u64,
    /// Sectors of which nobody can say what a read shows.
    ignored: std::collections::BTreeSet<u64>,
    /// The daemon that is asked, and that answers, now.
    pub(crate) by: u32,
    /// Daemons whose volumes another host has begun to claim, and when, ns.
    taken: BTreeMap<u32, u64>,
    /// Those that another host serves instead of, since when.
    replaced: BTreeMap<u32, Bound>,
    /// Those of them with requests that wait without a deadline.
    parked: std::collections::BTreeSet<u32>,
}

impl Judge {
    /// A judge of an array that reads as zeros.
    pub(crate) fn new(rules: Rules) -> Judge {
        Judge {
            excuses: Excuses::new(rules.devices, rules.replicated),
            clock: FIRST_STAMP,
            serials: 0,
            flushed: 1,
            died: vec![0; rules.devices],
            sectors: vec![Vec::new(); rules.device_of.len()],
            ops: Vec::new(),
            free: Vec::new(),
            reads: Vec::new(),
            records: Vec::new(),
            resumed_at: 0,
            ignored: std::collections::BTreeSet::new(),
            by: 0,
            taken: BTreeMap::new(),
            replaced: BTreeMap::new(),
            parked: std::collections::BTreeSet::new(),
            rules,
        }
    }

    /// A disk has changed this sector silently: what is read there means nothing from now on.
    pub(crate) fn ignore(&mut self, sector: u64) {
        self.ignored.insert(sector);
    }

    fn stamp(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Operations that have not ended.
    pub(crate) fn pending(&self) -> usize {
        self.ops.len() - self.free.len()
    }

    /// An operation begins at `now`.
    pub(crate) fn invoke(&mut self, now: u64, what: What, start: u64, sectors: u64) -> OpId {
        let stamp = self.stamp();
        self.serials += 1;
        let serial = self.serials;
        if serial.is_multiple_of(FORGET_EVERY) {
            let oldest = self.ops.iter().flatten().map(|op| op.record.invoked_at).min();
            self.excuses.forget(oldest.unwrap_or(now));
        }
        let record = Record { serial, what, start, sectors, invoked_at: now, ended_at: NEVER, state: State::Pending };
        self.remember(record);
        let bound = self.replaced.get(&self.by).copied();
        let op = Op { record, invoke: stamp, by: self.by, bound };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.ops.push(None);
            self.ops.len() - 1
        });
        self.ops[slot] = Some(op);
        let id = OpId { slot, serial };
        match what {
            What::Read => self.reads.push(stamp),
            What::Write { .. } | What::Zero { .. } => {
                for place in 0..sectors {
                    let value = if matches!(what, What::Zero { .. }) { ZERO } else { id.value(place) };
                    let Some(list) = self.sectors.get_mut(at(start + place)) else { break };
                    if list.is_empty() {
                        list.push(Entry::BLANK);
                    }
                    let state = State::Pending;
                    // Of one that another host has replaced nothing takes effect.
                    let (bound, killed) = bound.map_or((NEVER, NEVER), |bound| (bound.stamp, 0));
                    list.push(Entry { serial, value, end: NEVER, state, hard: false, bound, killed, ..Entry::BLANK });
                }
            }
            What::Flush => {}
        }
        id
    }

    /// An operation other than a read was acknowledged.
    pub(crate) fn acked(&mut self, now: u64, id: OpId) -> Verdict {
        let op = self.end(now, id, State::Acked)?;
        self.check_extent(&op)?;
        self.check_served(&op)?;
        match op.record.what {
            // What another host has acknowledged since is none of its business.
            What::Flush => {
                let until = op.bound.map_or(NEVER, |bound| bound.stamp);
                self.flushed = self.flushed.max(op.invoke.min(until));
            }
            What::Write { fua } | What::Zero { fua } => self.acked_write(&op, fua)?,
            What::Read => return Err(self.nonsense(id, "a read was acknowledged without data")),
        }
        Ok(())
    }

    fn acked_write(&mut self, op: &Op, fua: bool) -> Verdict {
        let stamp = self.clock;
        for sector in op.record.start..op.record.start + op.record.sectors {
            if self.acked_late(op, sector)? {
                continue;
            }
            for entry in &mut self.sectors[at(sector)] {
                if entry.serial == op.record.serial {
                    (entry.state, entry.end) = (State::Acked, stamp);
                    entry.hard |= fua;
                    continue;
                }
                entry.resolve(op.invoke, stamp);
                if entry.latest() < op.invoke {
                    entry.killed = entry.killed.min(stamp);
                    entry.superseded = if fua { GONE } else { entry.superseded.min(stamp) };
                }
            }
            self.sweep(sector);
        }
        Ok(())
    }

    /// A read has returned one value per sector.
    pub(crate) fn read(&mut self, now: u64, id: OpId, values: &[u64]) -> Verdict {
        let op = self.end(now, id, State::Acked)?;
        self.end_read(op.invoke);
        self.check_extent(&op)?;
        self.check_served(&op)?;
        for (sector, value) in (op.record.start..).zip(values.iter().copied()) {
            self.read_sector(&op, sector, value)?;
        }
        Ok(())
    }

    fn read_sector(&mut self, op: &Op, sector: u64, value: u64) -> Verdict {
        if self.ignored.contains(&sector) {
            return Ok(());
        }
        let stamp = self.clock;
        let list = &mut self.sectors[at(sector)];
        if list.is_empty() {
            return if value == ZERO { Ok(()) } else { Err(self.impossible(op, sector, value)) };
        }
        // One that was answered before another host has served shows nothing that was asked of that one.
        let newest = op.bound.map_or(u64::MAX, |bound| bound.serial);
        let shown = |entry: &Entry| {
            entry.value == value && entry.serial <= newest && (entry.is_live() || entry.killed > op.invoke)
        };
        let mut matches = 0;
        // Over all that match: settled before the read, durable, acknowledged by when, in effect by when.
        let (mut settled, mut hard, mut acked, mut in_effect) = (true, true, 0, 0);
        let mut across_restart = false;
        for entry in list.iter_mut() {
            entry.resolve(op.invoke, stamp);
            if shown(entry) {
                matches += 1;
                settled &= (entry.state != State::Pending && entry.end < op.invoke) || entry.bound < op.invoke;
                hard &= entry.hard;
                acked = acked.max(if entry.state == State::Acked { entry.end } else { NEVER });
                in_effect = in_effect.max(entry.latest().min(stamp));
                across_restart |= entry.state == State::Pending && entry.again;
            }
        }
        if matches == 0 {
            return Err(self.impossible(op, sector, value));
        }
        let died = self.died[usize::from(self.rules.device_of[at(sector)])];
        let pins = settled || (self.rules.replicated && matches == 1 && across_restart);
        for entry in list.iter_mut() {
            if shown(entry) {
                if matches == 1 && entry.state == State::Pending && !entry.again {
                    entry.shown = entry.shown.min(stamp);
                }
            } else if pins && died < op.invoke && entry.is_over() && entry.latest() < op.invoke {
                entry.denied = entry.denied.min(in_effect);
                // It is dead since the later of both took effect, or since the device came back with the other one.
                let since = entry.latest().max(in_effect).max(died);
                entry.killed = entry.killed.min(since);
                entry.superseded = if hard { GONE } else { entry.superseded.min(acked) };
            }
        }
        self.sweep(sector);
        Ok(())
    }

    /// An operation has ended with the error number `errno`.
    pub(crate) fn failed(&mut self, now: u64, id: OpId, errno: i32) -> Verdict {
        let op = self.end(now, id, State::Failed)?;
        self.fail(&op);
        if self.is_excused_by_host(now, &op, errno) {
            return Ok(());
        }
        let devices = self.devices_of(&op.record);
        self.excuses.check(now, &op.record, &devices, errno, self.rules.io_timeout, self.rules.device_of.len())
    }

    fn fail(&mut self, op: &Op) {
        let stamp = self.clock;
        match op.record.what {
            What::Read => self.end_read(op.invoke),
            What::Flush => {}
            What::Write { .. } | What::Zero { .. } => {
                let end = (op.record.start + op.record.sectors).min(self.sectors.len() as u64);
                for sector in op.record.start..end {
                    for entry in &mut self.sectors[at(sector)] {
                        if entry.serial == op.record.serial {
                            (entry.state, entry.end) = (State::Failed, stamp);
                            if entry.bound != NEVER {
                                entry.resolved = entry.bound;
                            }
                            // Known to have taken effect, and it does so once.
                            if entry.shown != NEVER && !entry.again && !entry.is_live() {
                                entry.resolved = entry.shown;
                            }
                        }
                    }
                }
            }
        }
    }

    /// A daemon died: everything that it was asked and has not answered has failed, and that is the excuse.
    pub(crate) fn daemon_died(&mut self, now: u64, life: u32) {
        self.stamp();
        for slot in 0..self.ops.len() {
            if let Some(op) = self.ops[slot].take_if(|op| op.by == life) {
                self.free.push(slot);
                self.fail(&op);
                self.settle_record(&op, now, State::Failed);
            }
        }
    }

    /// The daemon or the server of a device was restarted: what is outstanding there may take effect again (rule 3).
    pub(crate) fn restarted(&mut self, device: u16) {
        for (list, of) in self.sectors.iter_mut().zip(&self.rules.device_of) {
            if *of == device {
                list.iter_mut().filter(|entry| !entry.is_over()).for_each(revive);
            }
        }
    }

    /// A device has lost its volatile cache (rule 5): what it has now is on stable storage.
    pub(crate) fn device_died(&mut self, device: u16) {
        self.forgets(device, true);
    }

    /// A device has lost its volatile cache at some time in the past, and from now on nobody minds. What was written since is not on stable
    /// storage by that.
    pub(crate) fn device_had_died(&mut self, device: u16) {
        self.forgets(device, false);
    }

    fn forgets(&mut self, device: u16, just_now: bool) {
        debug_assert!(self.rules.mortal);
        let stamp = self.stamp();
        self.died[usize::from(device)] = stamp;
        for (list, of) in self.sectors.iter_mut().zip(&self.rules.device_of) {
            if *of != device {
                continue;
            }
            for entry in list.iter_mut() {
                if !entry.is_over() {
                    revive(entry);
                } else if entry.superseded >= self.flushed {
                    entry.killed = NEVER;
                    entry.superseded = NEVER;
                    // Of several copies another one may have it still, and lose it later.
                    entry.hard = just_now && entry.latest() != NEVER && !self.rules.plural;
                } else {
                    entry.killed = entry.killed.min(stamp);
                    entry.superseded = GONE;
                }
            }
        }
    }

    /// The daemon came out of a pause: what it could not end in time is not its fault.
    pub(crate) fn resumed(&mut self, now: u64) {
        self.resumed_at = now;
    }

    /// Everything must have ended.
    pub(crate) fn finish(&self) -> Verdict {
        self.finished(|_| true)
    }

    /// Everything that one daemon was asked must have ended.
    pub(crate) fn finish_of(&self, life: u32) -> Verdict {
        self.finished(|op| op.by == life)
    }

    fn finished(&self, of: impl Fn(&Op) -> bool) -> Verdict {
        let Some(op) = self.ops.iter().flatten().find(|op| of(op)) else { return Ok(()) };
        Err(Violation { rule: "liveness", text: format!("{} has never ended", text::record(&op.record)) })
    }

    /// What an operation is, as long as it is remembered.
    pub(crate) fn record(&self, serial: u64) -> Option<&Record> {
        let at = usize::try_from(serial).ok()? % RECORDS;
        self.records.get(at).filter(|record| record.serial == serial)
    }

    /// The sector for which a value was written.
    pub(crate) fn place_of(&self, value: u64) -> Option<u64> {
        let record = self.record(value >> PLACE_BITS)?;
        Some(record.start + (value & ((1 << PLACE_BITS) - 1)))
    }

    fn remember(&mut self, record: Record) {
        let at = usize::try_from(record.serial).unwrap_or(0) % RECORDS;
        if at >= self.records.len() {
            self.records.resize(at + 1, record);
        }
        self.records[at] = record;
    }

    fn settle_record(&mut self, op: &Op, now: u64, state: State) {
        let mut record = op.record;
        (record.state, record.ended_at) = (state, now);
        self.remember(record);
    }

    /// Takes an operation out of those that are outstanding: each ends once, and in time.
    fn end(&mut self, now: u64, id: OpId, state: State) -> Result<Op, Violation> {
        self.stamp();
        let slot = self.ops.get_mut(id.slot).filter(|op| op.is_some_and(|op| op.record.serial == id.serial));
        let Some(op) = slot.and_then(Option::take) else {
            return Err(self.nonsense(id, "has ended a second time"));
        };
        self.free.push(id.slot);
        self.settle_record(&op, now, state);
        let held = self.excuses.held_until(now, &self.devices_of(&op.record));
        let since = op.record.invoked_at.max(self.resumed_at).max(held);
        if !self.parked.contains(&op.by) && now.saturating_sub(since) > self.rules.io_timeout + self.rules.slack {
            let text = format!("{} ended at {}, past its deadline", text::record(&op.record), text::time(now));
            return Err(Violation { rule: "1.2", text });
        }
        if state == State::Acked && !self.taken.contains_key(&op.by) && now - op.record.invoked_at > self.patience() {
            self.excuses.check_delay(now, &op.record, &self.devices_of(&op.record))?;
        }
        Ok(op)
    }

    /// Where overlapping requests wait for each other, each may wait for many.
    fn patience(&self) -> u64 {
        if self.rules.plural { 4 * PATIENCE } else { PATIENCE }
    }

    fn end_read(&mut self, invoke: u64) {
        self.reads.retain(|read| *read != invoke);
    }

    fn devices_of(&self, record: &Record) -> Vec<u16> {
        let all = record.what == What::Flush;
        let end = (record.start + record.sectors).min(self.sectors.len() as u64);
        let range = if all { 0..self.sectors.len() } else { at(record.start.min(end))..at(end) };
        let mut devices = self.rules.device_of[range].to_vec();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// Forgets what can no longer matter: neither live, nor seen by an outstanding read, nor losable, nor pending.
    fn sweep(&mut self, sector: u64) {
        let oldest_read = self.reads.first().copied().unwrap_or(NEVER);
        let (flushed, mortal) = (self.flushed, self.rules.mortal);
        self.sectors[at(sector)].retain(|entry| {
            entry.is_live()
                || entry.state == State::Pending
                || entry.killed > oldest_read
                || (mortal && entry.superseded >= flushed)
        });
    }

    fn check_extent(&self, op: &Op) -> Verdict {
        let fits = op.record.start + op.record.sectors <= self.sectors.len() as u64;
        if fits || op.record.what == What::Flush {
            return Ok(());
        }
        let text = format!("{} succeeded, outside of the device", text::record(&op.record));
        Err(Violation { rule: "12.7", text })
    }

    fn nonsense(&self, id: OpId, what: &str) -> Violation {
        let name = self.record(id.serial).map_or_else(|| format!("#{}", id.serial), text::record);
        Violation { rule: "3.2", text: format!("{name} {what}") }
    }

    fn impossible(&self, op: &Op, sector: u64, value: u64) -> Violation {
        let mut text = format!("sector {sector}, read by {}: ", text::record(&op.record));
        let (serial, place) = (value >> PLACE_BITS, value & ((1 << PLACE_BITS) - 1));
        let rule = match self.record(serial) {
            _ if value == ZERO => {
                text.push_str("zeros, though something was written there");
                "12.1"
            }
            Some(record) if record.start + place != sector || place >= record.sectors => {
                text.push_str(&format!("data of sector {}, from {}", record.start + place, text::record(record)));
                "12.8"
            }
            Some(record) => {
                text.push_str(&format!("the data of {} (stale, lost or undone)", text::record(record)));
                "12.1"
            }
            None => {
                text.push_str(&format!("{value:#x}, which nobody wrote"));
                "12.8"
            }
        };
        text.push_str("\n  right would have been:");
        let list = &self.sectors[at(sector)];
        let blank = [Entry::BLANK];
        for entry in if list.is_empty() { &blank[..] } else { list } {
            if entry.is_live() || entry.killed > op.invoke {
                let name = self.record(entry.serial).map_or_else(|| "zeros, as at the start".to_owned(), text::record);
                text.push_str(&format!("\n    {name}"));
            }
        }
        Violation { rule, text }
    }
}

fn revive(entry: &mut Entry) {
    entry.again = true;
    entry.killed = NEVER;
    entry.superseded = NEVER;
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}
