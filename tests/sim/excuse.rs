//! What excuses an error (the contract, 12.7): every injected fault is recorded here, and every error must find one that fits.
//!
//! Contract: an error number alone excuses nothing; the fault must lie on a device that the operation touches, in the time of
//! the operation. A time-out must in addition have waited its full time, most of it on a device that could not answer.

use crate::judge::{Record, Verdict, Violation, What};
use crate::text;

/// Linux error numbers that the judge has an opinion about.
pub(crate) mod errno {
    pub(crate) const EIO: i32 = 5;
    pub(crate) const EINVAL: i32 = 22;
    pub(crate) const EBADE: i32 = 52;
    pub(crate) const ETIMEDOUT: i32 = 110;
}

/// After an outage of length d a device needs this long until it answers again: back-off and handshake, ns.
const RECOVERY_MIN: u64 = 2_000_000_000;
/// Recovery is never longer than this, whatever the outage was, ns.
const RECOVERY_MAX: u64 = 16_000_000_000;

/// Every shard works from a view that was published this long ago, ns.
const ADOPTED: u64 = 200_000_000;

/// A time in which a device answered late or not at all, ns.
#[derive(Clone, Copy, Debug)]
struct Outage {
    from: u64,
    until: u64,
}

impl Outage {
    /// When its consequences end at the latest.
    fn over(self) -> u64 {
        let length = self.until.saturating_sub(self.from);
        self.until.saturating_add(length.saturating_mul(2).clamp(RECOVERY_MIN, RECOVERY_MAX))
    }
}

/// An error that a device has given, ns.
#[derive(Clone, Copy, Debug)]
struct Given {
    at: u64,
    device: u16,
    errno: i32,
    /// First and last array sector.
    hull: (u64, u64),
}

/// The faults of one device.
#[derive(Clone, Debug, Default)]
struct Device {
    /// How many reasons there are now not to answer.
    troubles: u32,
    outages: Vec<Outage>,
    /// When it was suspended, and until when.
    suspends: Vec<(u64, u64)>,
    /// A flush has failed there: writes and flushes may fail for ever (2.2).
    flush_failed: Option<u64>,
    /// When it had lost what was acknowledged, and until when that was not accepted.
    lost: Vec<(u64, u64)>,
    /// Another owner has claimed it.
    fenced: Option<u64>,
    /// One of its copies was touched by a fault: it may take longer, but not fail.
    blemished: bool,
    /// Every one of its copies was: it may do anything but lie.
    condemned: bool,
}

/// All faults that were injected.
#[derive(Clone, Debug)]
pub(crate) struct Excuses {
    devices: Vec<Device>,
    given: Vec<Given>,
    /// When the daemon was last told to end everything, ns.
    aborted: Option<u64>,
    /// Devices have several copies: what one of them gives excuses an error only where no other one has everything.
    replicated: bool,
}

impl Excuses {
    pub(crate) fn new(devices: usize, replicated: bool) -> Excuses {
        Excuses { devices: vec![Device::default(); devices], given: Vec::new(), aborted: None, replicated }
    }

    /// The daemon was told to end everything with EIO.
    pub(crate) fn aborted(&mut self, now: u64) {
        self.aborted = Some(now);
    }

    /// From now on the device answers late or not at all, for one more reason.
    pub(crate) fn trouble(&mut self, now: u64, device: u16) {
        let device = &mut self.devices[usize::from(device)];
        device.troubles += 1;
        if device.troubles > 1 {
            return;
        }
        // An outage while the former one is not overcome yet only makes that one longer: the pauses between tries go on growing.
        if let Some(last) = device.outages.last_mut().filter(|last| last.over() > now) {
            last.until = u64::MAX;
        } else {
            device.outages.push(Outage { from: now, until: u64::MAX });
        }
    }

    /// One reason has gone.
    pub(crate) fn relief(&mut self, now: u64, device: u16) {
        let device = &mut self.devices[usize::from(device)];
        device.troubles = device.troubles.saturating_sub(1);
        if device.troubles == 0
            && let Some(outage) = device.outages.last_mut()
            && outage.until == u64::MAX
        {
            outage.until = now;
        }
    }

    /// Requests of the device wait from now on, or go on.
    pub(crate) fn suspended(&mut self, now: u64, device: u16, begins: bool) {
        let suspends = &mut self.devices[usize::from(device)].suspends;
        match suspends.last_mut().filter(|(_, until)| *until == u64::MAX) {
            Some(last) if !begins => last.1 = now,
            None if begins => suspends.push((now, u64::MAX)),
            _ => {}
        }
    }

    /// Until when the suspend of one of these devices has held up what has ended now.
    pub(crate) fn held_until(&self, now: u64, devices: &[u16]) -> u64 {
        let suspends = devices.iter().flat_map(|device| &self.devices[usize::from(*device)].suspends);
        suspends.map(|(_, until)| (*until).min(now)).max().unwrap_or(0)
    }

    /// What the device had acknowledged is lost from now on, or that is accepted.
    pub(crate) fn lost(&mut self, now: u64, device: u16, begins: bool) {
        let lost = &mut self.devices[usize::from(device)].lost;
        match lost.last_mut().filter(|(_, until)| *until == u64::MAX) {
            Some(last) if !begins => last.1 = now,
            None if begins => lost.push((now, u64::MAX)),
            _ => {}
        }
    }

    /// A copy of the device was touched by a fault.
    pub(crate) fn blemished(&mut self, device: u16) {
        self.devices[usize::from(device)].blemished = true;
    }

    /// No copy of the device is left that no fault has touched.
    pub(crate) fn condemned(&mut self, device: u16) {
        self.devices[usize::from(device)].condemned = true;
    }

    /// The device has answered something with `errno`, on the array sectors between `first` and `last`.
    pub(crate) fn gave(&mut self, now: u64, device: u16, errno: i32, hull: (u64, u64)) {
        self.given.push(Given { at: now, device, errno, hull });
    }

    /// A flush of the device has failed.
    pub(crate) fn flush_failed(&mut self, now: u64, device: u16) {
        self.devices[usize::from(device)].flush_failed.get_or_insert(now);
    }

    /// Another owner has claimed the device.
    pub(crate) fn fenced(&mut self, now: u64, device: u16) {
        self.devices[usize::from(device)].fenced.get_or_insert(now);
    }

    /// Whether the error that `record` has just ended with was to be expected.
    pub(crate) fn check(
        &self,
        now: u64,
        record: &Record,
        devices: &[u16],
        errno: i32,
        io_timeout: u64,
        sectors: usize,
    ) -> Verdict {
        let touched = |device: &u16| &self.devices[usize::from(*device)];
        let since = |moment: Option<u64>| moment.is_some_and(|moment| moment <= now);
        let (first, last) = (record.start, record.start + record.sectors.max(1) - 1);
        let changes = record.what != What::Read;
        if matches!(errno, errno::EIO | errno::ETIMEDOUT) && devices.iter().map(touched).any(|device| device.condemned)
        {
            return Ok(());
        }
        let bare = |device: &u16| !self.replicated || touched(device).condemned;
        let excused = match errno {
            errno::ETIMEDOUT => return self.check_timeout(now, record, devices, io_timeout),
            errno::EINVAL => record.what != What::Flush && (record.sectors == 0 || last >= sectors as u64),
            errno::EBADE => devices.iter().map(touched).any(|device| since(device.fenced)),
            errno::EIO
                if devices
                    .iter()
                    .flat_map(|device| &touched(device).lost)
                    .any(|(_, until)| *until >= record.invoked_at) =>
            {
                true
            }
            errno::EIO if self.aborted.is_some_and(|aborted| aborted >= record.invoked_at) => true,
            errno::EIO
                if changes && devices.iter().any(|device| bare(device) && since(touched(device).flush_failed)) =>
            {
                true
            }
            _ => self.given.iter().any(|given| {
                let overlaps = record.what == What::Flush || (given.hull.0 <= last && first <= given.hull.1);
                given.errno == errno
                    && given.at >= record.invoked_at
                    && devices.contains(&given.device)
                    && bare(&given.device)
                    && overlaps
                    // A flush is excused by a failed flush alone, which is above.
                    && record.what != What::Flush
            }),
        };
        if excused {
            return Ok(());
        }
        let text = format!("{} failed with error {errno}, which no fault explains", text::record(record));
        Err(Violation { rule: "12.7", text })
    }

    /// What succeeds late is excused by any outage of a device that it touches: other devices' troubles are not its own.
    pub(crate) fn check_delay(&self, now: u64, record: &Record, devices: &[u16]) -> Verdict {
        let from = record.invoked_at;
        let excused = devices.iter().any(|device| {
            self.devices[usize::from(*device)].suspends.iter().any(|(_, until)| *until > from)
                || self.devices[usize::from(*device)].blemished
                || self.devices[usize::from(*device)]
                    .outages
                    .iter()
                    .any(|outage| outage.from < now && outage.over() > from)
        });
        if excused {
            return Ok(());
        }
        let text =
            format!("{} ended only at {}, though its devices could answer", text::record(record), text::time(now));
        Err(Violation { rule: "liveness", text })
    }

    /// A time-out is excused by devices of its own that could not answer for most of the time.
    fn check_timeout(&self, now: u64, record: &Record, devices: &[u16], io_timeout: u64) -> Verdict {
        // What waits at a gate has its whole time again afterwards; what was on its way when the gate was shut had not stopped. Of what came
        // while the shards adopted that, and of what has parts elsewhere, both can be true.
        let of = |device: &u16| self.devices[usize::from(*device)].suspends.iter();
        let suspends = devices.iter().flat_map(of).map(|(from, until)| (*from, (*until).min(now)));
        let held = suspends.filter(|(_, until)| until.saturating_sub(record.invoked_at) > ADOPTED);
        let before = |(from, _): (u64, u64)| from.saturating_add(ADOPTED) <= record.invoked_at;
        let surely = devices.len() == 1 && held.clone().any(before);
        let at_once = (!surely).then_some(record.invoked_at);
        let mut verdict = Ok(());
        for from in at_once.into_iter().chain(held.map(|(_, until)| until)) {
            verdict = self.waited(from, now, record, devices, io_timeout);
            if verdict.is_ok() {
                break;
            }
        }
        verdict
    }

    /// Whether it has waited for its whole time since `from`, most of it on devices that could not answer.
    fn waited(&self, from: u64, now: u64, record: &Record, devices: &[u16], io_timeout: u64) -> Verdict {
        if now - from < io_timeout {
            let text = format!("{} timed out after only {}", text::record(record), text::time(now - from));
            return Err(Violation { rule: "1.2", text });
        }
        // Its parts may wait for one device after the other: what counts is the time in which any of its own could not answer.
        let of = |device: &u16| self.devices[usize::from(*device)].outages.iter();
        let mut outages: Vec<(u64, u64)> =
            devices.iter().flat_map(of).map(|outage| (outage.from, outage.over().min(now))).collect();
        outages.sort_unstable();
        let (mut covered, mut at) = (0, from);
        for (start, end) in outages {
            let start = start.max(at);
            if start < end {
                covered += end - start;
                at = end;
            }
        }
        let excused = covered >= (now - from) / 4 * 3;
        if excused {
            return Ok(());
        }
        let text =
            format!("{} timed out at {}, though its devices could answer", text::record(record), text::time(now));
        Err(Violation { rule: "12.7", text })
    }

    /// Forgets what was over before `oldest`, the moment since which all outstanding operations run.
    pub(crate) fn forget(&mut self, oldest: u64) {
        self.given.retain(|given| given.at >= oldest);
        for device in &mut self.devices {
            device.outages.retain(|outage| outage.over() >= oldest);
            device.suspends.retain(|(_, until)| *until >= oldest);
            device.lost.retain(|(_, until)| *until >= oldest);
        }
    }
}
