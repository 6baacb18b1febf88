//! A request from its arrival to its work on the disk.
//!
//! Contract: what is wrong never reaches the disk. A change that comes again is answered from memory. A change reaches the disk only
//! when everything that must be written down before it is durable; until then it is parked, and dropped with its connection.

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::store::session::{Attached, Conn};
use crate::store::volume::keep::Then;
use crate::store::volume::{DiskOp, Effect, Running, Slot, Volume, Work};
use crate::units::Id;
use crate::wire::frame::{Header, Op};
use crate::wire::session::features;

/// A change that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    pub(super) conn: Conn,
    slot: Slot,
    header: Header,
    /// It counts as under way in the region log.
    logged: bool,
}

impl Volume {
    pub(super) fn request(&mut self, conn: Conn, slot: Slot, header: &Header, intact: bool) {
        // Not live: superseded, and its requests are dropped.
        let Some(attached) = self.sessions.live(conn).copied() else { return };
        if header.is_reply() || header.op.has_message() {
            return self.close(conn, "it sent a frame that has no place after HELLO");
        }
        if let Err(errno) = self.check(&attached, header, intact) {
            return self.reply(conn, slot, header, Err(errno));
        }
        let Some(op) = self.disk_op(header) else {
            return match header.op {
                Op::Flush => {
                    if attached.features & features::REGION_LOG != 0 {
                        self.hear(header);
                    }
                    self.flush(conn, slot, header)
                }
                _ => self.reply(conn, slot, header, Ok(())),
            };
        };
        if let Some(result) = self.kept.find(attached.channel, header) {
            // It was carried out for the channel's former connection.
            return self.answer(conn, slot, header, op, result);
        }
        let logged = op.changes() && attached.features & features::REGION_LOG != 0;
        if logged {
            self.touch(header);
        }
        let dated = !op.changes() || self.may_change();
        if !dated || self.waits_for_mark(header, logged) {
            return self.parked.push(Parked { conn, slot, header: *header, logged });
        }
        self.carry_out(&attached, slot, header, op, logged);
    }

    /// What a request is for the disk; `None` when it is nothing.
    fn disk_op(&self, header: &Header) -> Option<DiskOp> {
        match header.op {
            Op::Read => Some(DiskOp::Read),
            Op::Write => {
                let through = self.config.write_through && !planted(Bug::WriteThroughIgnored);
                Some(DiskOp::Write { durable: through || (header.is_fua() && !planted(Bug::ServerIgnoresFua)) })
            }
            Op::Discard if self.config.sparse => Some(DiskOp::Punch),
            Op::Discard | Op::WriteZeroes => Some(DiskOp::Zero),
            Op::Digest => Some(DiskOp::Digest),
            _ => None,
        }
    }

    /// Whether a well-formed request may be carried out.
    fn check(&self, attached: &Attached, header: &Header, intact: bool) -> Result<(), Errno> {
        if header.op == Op::Keepalive {
            return Ok(());
        }
        if Some(header.epoch) != self.sessions.claim().map(|claim| claim.epoch) {
            return Err(Errno::EBADE);
        }
        let must_be_sealed = header.op == Op::Write && attached.features & features::DATA_CRC != 0;
        if (!intact && !planted(Bug::ServerTakesDamaged)) || (must_be_sealed && !header.is_sealed()) {
            return Err(Errno::EILSEQ);
        }
        if header.op.has_range() && !header.extent().within(self.sectors) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    fn carry_out(&mut self, attached: &Attached, slot: Slot, header: &Header, op: DiskOp, logged: bool) {
        let (conn, channel) = (attached.conn, attached.channel);
        self.sessions.started(conn);
        let session = self.sessions.claim().map_or(Id::NIL, |claim| claim.session);
        let job = self.start(Running::Data { conn, slot, op, header: *header, channel, session, logged });
        self.effects.push_back(Effect::Disk(Work { job, op, extent: header.extent(), place: Some((conn, slot)) }));
        if planted(Bug::ServerAcksEarly) && op == (DiskOp::Write { durable: false }) {
            self.reply(conn, slot, header, Ok(()));
        }
    }

    fn is_dated(&self) -> bool {
        let kept = self.book.durable();
        kept.dirty && kept.boot == self.config.boot
    }

    /// Whether it is durable that there are writes of this boot to lose. If not, it is on its way when this returns.
    fn may_change(&mut self) -> bool {
        if self.is_dated() {
            return true;
        }
        let boot = self.config.boot;
        if !self.saves.iter().any(|(_, then)| *then == Then::Dirty) {
            self.keep(|state| (state.dirty, state.boot) = (true, boot), Then::Dirty);
        }
        planted(Bug::LossCountedAtWrite)
    }

    /// What parked changes waited for is durable, or cannot be written. Those that can go on do, those that cannot have failed.
    pub(super) fn unpark(&mut self, unmarked: bool, undated: bool) {
        for parked in std::mem::take(&mut self.parked) {
            let Parked { conn, slot, header, logged } = parked;
            let waits_for_mark = self.waits_for_mark(&header, logged);
            // Those of connections that were closed are not here any more.
            let (Some(attached), Some(op)) = (self.sessions.live(conn).copied(), self.disk_op(&header)) else {
                continue;
            };
            if undated || (unmarked && waits_for_mark) {
                if logged {
                    self.end_touch(&header, None);
                }
                self.reply(conn, slot, &header, Err(Errno::EIO));
            } else if waits_for_mark || !self.is_dated() {
                self.parked.push(parked);
            } else {
                self.carry_out(&attached, slot, &header, op, logged);
            }
        }
    }

    /// A connection's parked changes are dropped.
    pub(super) fn drop_parked(&mut self, conn: Conn) {
        for parked in std::mem::take(&mut self.parked) {
            match parked.conn == conn {
                true if parked.logged => self.end_touch(&parked.header, None),
                true => {}
                false => self.parked.push(parked),
            }
        }
    }
}
