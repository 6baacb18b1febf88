//! What a server keeps beside the data, and those who would use a volume that is no longer theirs.
//!
//! Contract: a write of the state file takes time; a process that dies meanwhile leaves all of it or nothing, a power cut any part.
//! What the rules promise of it is checked here from outside: nobody is welcome whose claim is older than one that was
//! welcome before, or as old and another's; once a flush was answered with an error, none of that volume succeeds.

use std::cell::OnceCell;

use dst::engine::replicas::Standing;
use dst::errno::Errno;
use dst::store::region::{Layout, Log};
use dst::store::state::{self, Book, State, Write};
use dst::store::volume::Event as Told;
use dst::units::{Epoch, Extent, Id};
use dst::wire::frame::{Header, Op, message_crc};
use dst::wire::session::{HELLO_BYTES, Hello, features};

use crate::array::ARRAY;
use crate::net::{Body, Pipe};
use crate::server::{Accepted, id_of};
use crate::world::{Conn, Event, MILLI, Phase, World};

/// A volume's state file, and what the world knows of the promises made with it.
pub(crate) struct Kept {
    volume: Id,
    bytes: Vec<u8>,
    /// What they say of regions, once it was asked.
    log: OnceCell<Log>,
    layout: Option<Layout>,
    /// The writes on their way, and their numbers.
    writing: Vec<(u64, Write)>,
    serial: u64,
    /// The latest claim that was welcome.
    welcome: Option<(Epoch, Id)>,
    /// Somebody was told that a flush has failed.
    told_failed: bool,
    /// A sync has failed since the power came.
    sync_failed: bool,
    /// Which boot of the machine this is.
    boot: u8,
    /// Something was asked to be changed, some change was answered, in this boot and not made durable by an orderly stop.
    pub(crate) asked: bool,
    pub(crate) changed: bool,
    /// The least and the most losses that the next HELLO may be told.
    losses: (u64, u64),
    /// The latest point of a flush. A volume that is alone has all its targets flushed when it is.
    pub(crate) point: u64,
    /// The next sync fails: the error of the last one was seen by a process that died before it could write that down. (The
    /// kernel would forget it; a few microseconds that `docs/CONTRACT.md` owns up to.)
    pub(crate) doomed: bool,
}

impl Kept {
    pub(crate) fn new(node: usize, sectors: u64, region_sectors: u64) -> Kept {
        let volume = id_of(node);
        let layout = Layout::new(sectors, region_sectors);
        let bytes = state::fresh(volume, layout);
        let (writing, welcome) = (Vec::new(), None);
        Kept {
            volume,
            bytes,
            log: OnceCell::new(),
            layout,
            writing,
            serial: 0,
            welcome,
            told_failed: false,
            sync_failed: false,
            boot: 1,
            asked: false,
            changed: false,
            losses: (0, 0),
            point: 0,
            doomed: false,
        }
    }

    fn found(&self) -> Option<(u64, State)> {
        state::load(&self.bytes, self.volume)
    }

    /// The log as a crash now would leave it.
    fn log(&self) -> Option<&Log> {
        let layout = self.layout?;
        Some(self.log.get_or_init(|| Log::load(&self.bytes[state::SLOTS_BYTES..], layout)))
    }

    /// The first `sectors` sectors of a write land, and nothing more.
    fn land(&mut self, write: &Write, sectors: usize) {
        let at = usize::try_from(write.offset).unwrap_or(usize::MAX);
        let bytes = write.bytes.len().min(sectors * 512);
        self.bytes[at..at + bytes].copy_from_slice(&write.bytes[..bytes]);
        self.log.take();
    }

    /// What the next HELLO will be told of losses.
    pub(crate) fn losses_told(&self, write_through: bool) -> u64 {
        let lost = |state: &State| !write_through && state.has_lost(self.boot_id());
        self.found().map_or(0, |(_, state)| state.losses + u64::from(lost(&state)))
    }

    /// The id of this boot.
    pub(crate) fn boot_id(&self) -> Id {
        Id([self.boot; 16])
    }

    /// An orderly stop has made everything durable, unless a flush has failed.
    pub(crate) fn stopped(&mut self) {
        let failed = self.found().is_some_and(|(_, state)| state.flush_failed);
        (self.asked, self.changed) = (self.asked && failed, self.changed && failed);
    }

    /// It dies at its orderly end: that everything is durable may be written down already.
    fn ended_early(&mut self) {
        self.changed &= self.found().is_none_or(|(_, state)| state.dirty);
    }

    /// The power goes, and comes back.
    fn reboot(&mut self) {
        self.sync_failed = false;
        self.boot = self.boot.wrapping_add(1);
        self.losses.0 += u64::from(std::mem::take(&mut self.changed));
        self.losses.1 += u64::from(std::mem::take(&mut self.asked));
    }

    pub(crate) fn is_saving(&self) -> bool {
        !self.writing.is_empty()
    }

    /// A sync of the disk has ended.
    pub(crate) fn synced(&mut self, result: Result<(), Errno>) {
        self.sync_failed |= result.is_err();
    }
}

impl World {
    /// What a server that begins to serve finds.
    pub(crate) fn found_state(&mut self, node: usize) -> (Book, Option<Log>) {
        let kept = &mut self.nodes[node].kept;
        let volume = kept.volume;
        let found = kept.found();
        kept.log();
        let log = kept.log.take();
        kept.doomed = kept.sync_failed && found.as_ref().is_none_or(|(_, state)| !state.flush_failed);
        if found.is_none() {
            self.fail("4.1", format!("neither slot of the state of v{node} can be used"));
        }
        // Cleaned more often than in production, where it takes longer than a run.
        let every = u32::try_from(self.plan.region / 8).unwrap_or(1);
        (Book::new(volume, found.unwrap_or_default()), log.map(|log| log.cleaned_every(every)))
    }

    /// The rules want their state saved.
    pub(crate) fn save(&mut self, node: usize, write: Write) {
        let takes = self.disk_time(node);
        let kept = &mut self.nodes[node].kept;
        if kept.writing.iter().any(|(_, other)| other.part == write.part) {
            self.fail("4.1", format!("two writes of {:?} of v{node} at a time", write.part));
        }
        let kept = &mut self.nodes[node].kept;
        kept.serial += 1;
        let serial = kept.serial;
        kept.writing.push((serial, write));
        self.queue.push(self.now + takes, Event::Saved { node, serial });
        if self.plan.zombies && self.phase == Phase::Work && self.rng.one_in(8) {
            let server = self.nodes[node].server;
            let life = self.servers[server].life;
            let soon = self.rng.below(takes);
            self.queue.push(self.now + soon, Event::ServerDies { server, life });
        }
    }

    pub(crate) fn saved(&mut self, node: usize, serial: u64) {
        let (kept, server) = (&self.nodes[node].kept, self.nodes[node].server);
        let Some(at) = kept.writing.iter().position(|(number, _)| *number == serial) else { return };
        if self.nodes[node].stalled > 0 || self.servers[server].paused > 0 {
            self.queue.push(self.now + MILLI, Event::Saved { node, serial });
            return;
        }
        let (_, write) = self.nodes[node].kept.writing.remove(at);
        let kept = &mut self.nodes[node].kept;
        kept.log();
        let before = kept.log.take();
        kept.land(&write, usize::MAX / 512);
        if let Some(before) = before {
            self.check_cleaned(node, &before);
        }
        self.trace.note(self.now, 150, node as u64);
        self.trace.say(self.now, || format!("  state v{node}: {:?} is saved", write.part));
        self.tell_rules(node, Told::Saved { part: write.part, result: Ok(()) });
    }

    /// The server dies; with `power` its machine.
    pub(crate) fn state_cut(&mut self, node: usize, power: bool, told_stop: bool) {
        for (_, write) in std::mem::take(&mut self.nodes[node].kept.writing) {
            let whole = write.bytes.len() / 512;
            let landed = match power {
                true => usize::try_from(self.rng.below(whole as u64 + 1)).unwrap_or(0),
                false => whole * usize::from(self.rng.percent(50)),
            };
            self.nodes[node].kept.land(&write, landed);
        }
        if told_stop {
            self.nodes[node].kept.ended_early();
        }
        if power {
            let kept = &mut self.nodes[node].kept;
            if self.plan.write_through {
                (kept.asked, kept.changed) = (false, false);
            }
            kept.reboot();
        }
    }

    /// What reaches the disk of a session with a log is marked.
    pub(crate) fn check_marked(&mut self, node: usize, extent: Extent) {
        let marked = self.nodes[node].kept.log().is_some_and(|log| log.is_durable(extent));
        if !marked {
            self.fail("7.1", format!("{extent:?} of v{node} is changed and not marked"));
        }
    }

    /// What loses its mark is on the disk, and nothing of it is under way.
    fn check_cleaned(&mut self, node: usize, before: &Log) {
        let kept = &self.nodes[node].kept;
        let (Some(after), Some(layout)) = (kept.log(), kept.layout) else { return };
        let extent = |region: u64| Extent::new(region * layout.region_sectors, layout.region_sectors);
        let cleaned = |region: &u64| before.is_durable(extent(*region)) && !after.is_durable(extent(*region));
        let cleaned: Vec<u64> = (0..layout.regions).filter(cleaned).collect();
        for region in cleaned {
            let extent = extent(region);
            // What is being copied to it meanwhile is marked where it comes from; of a repair nothing is lost but the repair.
            let lies = self.flipped(self.plan.node_of(node)).range(extent.start.0..extent.end().0).next().is_some();
            if !lies && !self.nodes[node].is_settled(extent) && !self.is_marked_elsewhere(node, extent) {
                self.fail("7.2", format!("region {region} of v{node} is cleaned and could still be lost"));
            }
            self.check_alike(node, region, extent);
        }
    }

    fn is_marked_elsewhere(&self, node: usize, extent: Extent) -> bool {
        let marked = |other: usize| self.nodes[other].kept.log().is_some_and(|log| log.is_durable(extent));
        self.targets_of(self.plan.node_of(node)).any(|other| other != node && marked(other))
    }

    /// What is marked neither here nor on a sibling is the same on both, whatever happens next.
    fn check_alike(&mut self, node: usize, region: u64, extent: Extent) {
        let filled = |target: usize| !matches!(self.record.standings[target], Standing::Filling { .. });
        if !self.matters(node) || !filled(node) {
            return;
        }
        for other in self.in_sync(self.plan.node_of(node)).into_iter().filter(|other| *other != node) {
            if self.nodes[other].kept.log().is_none_or(|log| log.is_durable(extent)) {
                continue;
            }
            let (one, two) = (&self.nodes[node], &self.nodes[other]);
            // What is behind the array's part of a volume is nobody's.
            let used = self.plan.used[self.plan.node_of(node)];
            let at = |sector: u64| usize::try_from(sector.min(used)).unwrap_or(0);
            let range = at(extent.start.0)..at(extent.end().0);
            let flipped = self.flipped(self.plan.node_of(node));
            let counts = |sector: &usize| !flipped.contains(&(*sector as u64));
            let cut = |content: &[u64]| -> Vec<u64> { range.clone().filter(counts).map(|at| content[at]).collect() };
            let same = cut(one.content()) == cut(two.content()) && cut(one.stable()) == cut(two.stable());
            // What a scrub puts right is on its way to what lies alone, and not marked.
            let lies = flipped.range(extent.start.0..extent.end().0).next().is_some();
            if !same || !(lies || two.is_settled(extent)) {
                self.fail(
                    "7.2",
                    format!("region {region} is cleaned on v{node} and unmarked on v{other}: they differ"),
                );
            }
        }
    }

    /// A HELLO is answered: it must not be one that was left behind.
    pub(crate) fn check_welcome(&mut self, node: usize, conn: usize, losses: u64) {
        let claim = self.conns[conn].accepted.as_ref().and_then(|accepted| accepted.claim);
        let Some((epoch, session)) = claim else { return };
        let kept = &mut self.nodes[node].kept;
        let former = kept.welcome.replace((epoch, session));
        let (least, most) = std::mem::replace(&mut kept.losses, (losses, losses));
        if !(least..=most).contains(&losses) {
            self.fail("8.3", format!("v{node} tells of {losses} losses, but there were {least} to {most}"));
        }
        if let Some((latest, owner)) = former
            && (epoch < latest || (epoch == latest && session != owner))
        {
            let text = format!("v{node} welcomes epoch {} of {session} after epoch {} of {owner}", epoch.0, latest.0);
            self.fail("4.1", text);
        }
    }

    /// A flush is answered.
    pub(crate) fn check_flush(&mut self, node: usize, result: Result<(), Errno>, point: u64) {
        let kept = &mut self.nodes[node].kept;
        match result {
            Ok(()) if kept.told_failed => self.fail("2.2", format!("a flush of v{node} succeeds after one has failed")),
            Ok(()) => kept.point = point,
            Err(Errno::EIO) => kept.told_failed = true,
            _ => {}
        }
    }

    /// Those whose claim has passed knock at a volume for a while.
    pub(crate) fn haunt(&mut self, node: usize) {
        if self.plan.zombies && self.phase == Phase::Work {
            for _ in 0..self.rng.below(4) {
                let later = self.rng.pick(&[1, 5, 50]) * MILLI;
                let at = self.now + self.rng.below(later);
                self.queue.push(at, Event::Zombie { node });
            }
        }
    }

    /// One of them says HELLO: with an epoch that was welcome, or an older one, and never as its owner.
    pub(crate) fn zombie(&mut self, node: usize) {
        let server = &self.servers[self.nodes[node].server];
        let Some((latest, _)) = self.nodes[node].kept.welcome else { return };
        if !server.up || server.is_ending() || server.deaf > 0 {
            return;
        }
        let back = self.rng.below(3);
        let epoch = Epoch(latest.0.saturating_sub(back));
        let hello = Hello {
            versions: (1, 1),
            features: features::DATA_CRC,
            array: ARRAY,
            session: Id([0xdd; 16]),
            host: Id([0x66; 16]),
            channel: 0,
            volume: format!("v{node}"),
        };
        let conn = self.conns.len();
        self.trace.say(self.now, || format!("!! a zombie knocks at v{node} as c{conn}, epoch {}", epoch.0));
        let (up, down) = (Pipe::default(), Pipe::default());
        let (accepted, shard, life) = (Some(Accepted::new()), usize::MAX, u32::MAX);
        self.conns.push(Conn { node, shard, life, up, down, accepted, silent: false, logged: false });
        let body = hello.encode();
        let header = Header::request(Op::Hello, 0, 0, epoch, Extent::default());
        let header = header.with_body(u32::try_from(HELLO_BYTES).unwrap_or(0), message_crc(&body));
        self.send_up(conn, &header, Body::Message(body.to_vec()));
    }
}
