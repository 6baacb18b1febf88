//! The region log at work: marks before changes, points with flushes, and what the client is told.

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::store::pool::Refusal;
use crate::store::region::Layout;
use crate::store::session::Conn;
use crate::store::volume::{Effect, Slot, Volume};
use crate::units::{Epoch, Id};
use crate::wire::frame::{Header, Op};
use crate::wire::session::features;
use crate::wire::volume::{RegionPage, Regions};

/// Bits of a point that count; those above name the life of the server, so that no other takes it for its own.
const POINT_BITS: u32 = 40;

impl Volume {
    /// What of the log's features this volume has.
    pub(super) fn served(&self) -> u64 {
        if self.log.is_some() { features::OURS } else { features::OURS & !features::REGION_LOG }
    }

    /// A change of a session with a log begins.
    pub(super) fn touch(&mut self, header: &Header) {
        if let Some(log) = &mut self.log {
            log.touch(header.extent());
        }
        self.write_pages();
    }

    /// It has ended.
    pub(super) fn end_touch(&mut self, header: &Header, landed: Option<(u64, bool)>) {
        if let Some(log) = &mut self.log {
            log.ended(header.extent(), landed);
        }
    }

    /// Whether all of it is marked.
    pub(super) fn is_marked(&self, header: &Header) -> bool {
        self.log.as_ref().is_none_or(|log| log.is_durable(header.extent()))
    }

    fn write_pages(&mut self) {
        for write in self.log.as_mut().map(|log| log.start()).unwrap_or_default() {
            self.effects.push_back(Effect::Save(write.into()));
        }
    }

    /// The write of a page has ended.
    pub(super) fn page_saved(&mut self, result: Result<(), Errno>) {
        let Some(saved) = self.log.as_mut().and_then(|log| log.written(result.is_ok())) else { return };
        self.unpark(!saved, false);
        self.write_pages();
    }

    /// A flush has succeeded: it is told what it covers.
    pub(super) fn flushed(&mut self, conn: Conn, slot: Slot, header: &Header, moment: u64) {
        let mut reply = header.reply(Ok(()));
        if header.op == Op::Flush {
            reply = reply.with_point(self.salt() << POINT_BITS | moment);
        }
        self.effects.push_back(Effect::Reply { conn, slot, header: reply });
    }

    /// A flush says what is flushed everywhere.
    pub(super) fn hear(&mut self, header: &Header) {
        let (salt, moment) = (header.point() >> POINT_BITS, header.point() & ((1 << POINT_BITS) - 1));
        // A point of another life, or one that was never given, says nothing.
        if moment == 0 || salt != self.salt() || moment > self.flushes.ticks() {
            return;
        }
        if let Some(log) = &mut self.log {
            log.hear(moment);
        }
        self.write_pages();
    }

    fn salt(&self) -> u64 {
        let id = self.config.instance.0;
        u64::from_le_bytes([id[0], id[1], id[2], 0, 0, 0, 0, 0])
    }

    pub(super) fn resize(&mut self, sectors: u64, layout: Option<Layout>) {
        self.sectors = sectors;
        // What was too large for a log has none until the server starts again.
        if let (Some(log), Some(layout)) = (&mut self.log, layout) {
            log.resize(layout);
        }
    }

    /// Whether these are the words of whoever has claimed the volume.
    pub(super) fn check_owner(&self, what: &str, (array, epoch, owner): (Id, Epoch, Id)) -> Result<(), Refusal> {
        let held = self.sessions.claim().map(|held| (held.array, held.epoch, held.session));
        if held == Some((array, epoch, owner)) {
            return Ok(());
        }
        let text = format!(
            "{what} of volume '{}' is for whoever has claimed it, and epoch {} of array {array} has not or no longer; is the array started on another host?",
            self.config.name, epoch.0
        );
        Err((Errno::EBADE, text))
    }

    pub(super) fn regions(&self, ask: &Regions) -> Result<RegionPage, Refusal> {
        self.check_owner("the region log", (ask.array, ask.epoch, ask.owner))?;
        let Some(log) = &self.log else {
            let text = format!("volume '{}' is too large for a region log: take all of it as marked", self.config.name);
            return Err((Errno::EOPNOTSUPP, text));
        };
        Ok(log.page(ask.after))
    }

    /// Whether a change may go to the disk as far as its mark is concerned.
    pub(super) fn waits_for_mark(&self, header: &Header, logged: bool) -> bool {
        logged && !self.is_marked(header) && !planted(Bug::MarkAfterWrite)
    }
}
