//! What must be durable before somebody is answered: claims, failed flushes, labels.
//!
//! Contract: whoever waits is answered by the first write of the state file that was started after the change; when that write
//! fails, with the failure. No write is repeated by itself.

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::limits;
use crate::store::pool::Refusal;
use crate::store::session::{Claim, Conn};
use crate::store::state::State;
use crate::store::volume::{Effect, Slot, Volume};
use crate::wire::frame::Header;
use crate::wire::volume::{LabelPut, RegionPage, Regions};

/// What somebody asks about the volume as a whole.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    /// It belongs to no array any more: the claim is forgotten.
    Free,
    /// Stores a label.
    Label(&'a LabelPut),
    /// Tells the marked regions.
    Regions(&'a Regions),
}

/// What an [`Ask`] is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is done, durably.
    Done,
    /// Part of the marked regions.
    Regions(RegionPage),
}

/// Who waits for a write of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The first HELLO, and with it all others.
    Claim(Claim),
    /// Flushes that have failed.
    Failed,
    /// All HELLOs: the machine had lost its memory.
    Lost,
    /// Parked changes.
    Dirty,
    /// Whoever stops the server.
    Stopped,
    /// Whoever asked under this number.
    Free(u64),
    Label(u64),
}

/// A flush that has failed, and cannot say so yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failing {
    pub(super) conn: Conn,
    slot: Slot,
    header: Header,
    errno: Errno,
}

impl Volume {
    /// Changes what is kept, and says what follows when that is durable.
    pub(super) fn keep(&mut self, change: impl FnOnce(&mut State), then: Then) {
        let change = self.book.change(change);
        self.saves.push((change, then));
        self.save();
    }

    fn save(&mut self) {
        if let Some(write) = self.book.start() {
            self.effects.push_back(Effect::Save(write));
        }
    }

    /// The write of the state has ended.
    pub(super) fn saved(&mut self, result: Result<(), Errno>) {
        let until = self.book.ended(result.is_ok());
        let later = self.saves.iter().position(|(change, _)| *change > until).unwrap_or(self.saves.len());
        let done: Vec<_> = self.saves.drain(..later).collect();
        for (_, then) in done {
            match then {
                Then::Claim(claim) => self.claimed(claim, result),
                Then::Failed => self.tell_failed(),
                Then::Lost => self.counted(result),
                Then::Dirty => self.unpark(false, result.is_err()),
                Then::Stopped => self.effects.push_back(Effect::Stopped),
                Then::Free(number) => self.answer_ask(number, result),
                Then::Label(number) => {
                    if result.is_err() {
                        self.book.revert(|state, durable| state.label.clone_from(&durable.label));
                    }
                    self.answer_ask(number, result);
                }
            }
        }
        self.save();
    }

    /// A flush has failed: it is answered when that cannot be forgotten any more.
    pub(super) fn fail_flush(&mut self, conn: Conn, slot: Slot, header: Header, errno: Errno) {
        self.failing.push(Failing { conn, slot, header, errno });
        if self.book.durable().flush_failed {
            self.tell_failed();
        } else {
            self.record_failure();
        }
    }

    /// That a flush has failed is not forgotten by the next life.
    pub(super) fn record_failure(&mut self) {
        if !self.book.durable().flush_failed && !self.saves.iter().any(|(_, then)| *then == Then::Failed) {
            self.keep(|state| state.flush_failed = true, Then::Failed);
        }
    }

    fn tell_failed(&mut self) {
        for Failing { conn, slot, header, errno } in std::mem::take(&mut self.failing) {
            self.reply(conn, slot, &header, Err(errno));
        }
    }

    pub(super) fn ask(&mut self, number: u64, ask: Ask<'_>) {
        match ask {
            Ask::Free => {
                let mut gone = Vec::new();
                self.sessions.take(None, |conn, _| gone.push(conn));
                for conn in gone {
                    self.forget(conn);
                    self.effects.push_back(Effect::Close { conn, why: "its volume was freed" });
                }
                // The label stays until the next claim: it may say where the data has gone.
                self.keep(|state| state.claim = None, Then::Free(number));
            }
            Ask::Label(put) => match self.check_label(put) {
                Ok(()) => self.keep(|state| state.label = Some(put.label.clone()), Then::Label(number)),
                Err(refusal) => self.effects.push_back(Effect::Answer { number, result: Err(refusal) }),
            },
            Ask::Regions(ask) => {
                let result = self.regions(ask).map(Told::Regions);
                self.effects.push_back(Effect::Answer { number, result });
            }
        }
    }

    fn check_label(&self, put: &LabelPut) -> Result<(), Refusal> {
        let name = &self.config.name;
        if !planted(Bug::LabelFromAnyone) {
            self.check_owner("the label", (put.array, put.epoch, put.owner))?;
        }
        if put.label.len() > limits::LABEL_BYTES_MAX || put.label.chars().any(|one| one.is_control() && one != '\n') {
            let text = format!(
                "a label is text of at most {} bytes without control characters; the one for volume '{name}' is not",
                limits::LABEL_BYTES_MAX
            );
            return Err((Errno::EINVAL, text));
        }
        Ok(())
    }

    fn answer_ask(&mut self, number: u64, result: Result<(), Errno>) {
        let name = &self.config.name;
        let failed = |errno| {
            (
                Errno::EIO,
                format!(
                    "the state of volume '{name}' cannot be written ({errno}); look at the server's pool and the kernel's log"
                ),
            )
        };
        self.effects.push_back(Effect::Answer { number, result: result.map(|()| Told::Done).map_err(failed) });
    }
}
