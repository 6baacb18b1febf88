//! Who is attached to one volume: the claim, the connections of its session, and when a new one may be welcomed.
//!
//! Contract (CONTRACT 3.1 and 4.1): a connection is welcomed only when nothing is in flight on the disk for its channel's former
//! connection nor for any former session. A connection that was superseded never gets a job or a reply again. An epoch
//! only grows, except for an array that was newly assigned. A claim is taken here only after it was made durable.

use crate::bugs::{Bug, planted};
use crate::units::{Epoch, Id};

/// A connection, as the world numbers it. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conn(pub u64);

/// Who may use the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The array.
    pub array: Id,
    /// Its claim number.
    pub epoch: Epoch,
    /// The life of its daemon.
    pub session: Id,
    /// That daemon's machine; tells nothing to the rules.
    pub host: Id,
}

impl Claim {
    /// Whether the two are one claim.
    pub fn is_same(&self, other: &Claim) -> bool {
        (self.array, self.epoch, self.session) == (other.array, other.epoch, other.session)
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its HELLO waits for what its predecessors have on the disk.
    Waiting,
    /// Welcomed.
    Live,
    /// It was told to close, or has gone.
    Closing,
}

/// A connection in the table.
#[derive(Clone, Copy, Debug)]
pub struct Attached {
    /// Its number.
    pub conn: Conn,
    /// Which channel of the session.
    pub channel: u16,
    /// Features both sides have.
    pub features: u64,
    /// Protocol version both sides speak.
    pub version: u16,
    /// Where it stands.
    pub stage: Stage,
    /// Which claim it came with: counts claims.
    term: u64,
    /// Jobs on the disk.
    in_flight: u32,
    /// The world has forgotten it.
    gone: bool,
}

/// What happens to the former connections when a new one is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ousted {
    /// Same session, same channel: it is closed.
    Replaced,
    /// A newer claim: it is closed.
    Superseded,
    /// A newer claim came while its HELLO still waited: it is refused.
    Refused,
}

/// How the claim of a HELLO stands to the one that has the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is the same.
    Holds,
    /// It may have the volume, once that is durable.
    Takes,
    /// The other one keeps it.
    Fenced(Claim),
}

/// The table.
#[derive(Debug, Default)]
pub struct Sessions {
    claim: Option<Claim>,
    term: u64,
    conns: Vec<Attached>,
    waiting: usize,
}

impl Sessions {
    /// Nobody is attached; the volume is whose it was in the server's former life.
    pub fn new(claim: Option<Claim>) -> Sessions {
        Sessions { claim: claim.filter(|_| !planted(Bug::ClaimForgotten)), ..Sessions::default() }
    }

    /// The present claim.
    pub fn claim(&self) -> Option<Claim> {
        self.claim
    }

    /// What the claim of a HELLO means.
    pub fn stand(&self, claim: &Claim) -> Standing {
        let Some(held) = self.claim else { return Standing::Takes };
        let newer = claim.epoch > held.epoch || (claim.epoch == held.epoch && planted(Bug::EqualEpochTaken));
        if held.is_same(claim) {
            Standing::Holds
        } else if held.array != claim.array || newer {
            Standing::Takes
        } else {
            Standing::Fenced(held)
        }
    }

    /// A claim has the volume from now on: nothing more is taken from those before it, which are given to `oust`.
    pub fn take(&mut self, claim: Option<Claim>, oust: impl FnMut(Conn, Ousted)) {
        self.claim = claim;
        self.term += 1;
        if !planted(Bug::FormerStillServed) {
            self.oust(None, oust);
        }
    }

    /// A connection of the present claim. The former connection of its channel is given to `oust`.
    pub fn attach(
        &mut self,
        conn: Conn,
        (channel, version, features): (u16, u16, u64),
        oust: impl FnMut(Conn, Ousted),
    ) {
        if !planted(Bug::PredecessorServed) {
            self.oust(Some(channel), oust);
        }
        let stage = Stage::Waiting;
        let attached = Attached { conn, channel, features, version, stage, term: self.term, in_flight: 0, gone: false };
        self.conns.push(attached);
        self.waiting += 1;
    }

    /// Connections in the table, those included that are still closing.
    pub fn count(&self) -> usize {
        self.conns.len()
    }

    /// Closes the connections of one channel, or all.
    fn oust(&mut self, channel: Option<u16>, mut oust: impl FnMut(Conn, Ousted)) {
        for former in &mut self.conns {
            let stays = channel.is_some_and(|channel| channel != former.channel);
            if stays || former.stage == Stage::Closing {
                continue;
            }
            let why = match (channel, former.stage) {
                (Some(_), _) => Ousted::Replaced,
                (None, Stage::Waiting) => Ousted::Refused,
                (None, _) => Ousted::Superseded,
            };
            self.waiting -= usize::from(former.stage == Stage::Waiting);
            former.stage = Stage::Closing;
            oust(former.conn, why);
        }
    }

    /// The next connection whose predecessors are done. It is live from now on.
    pub fn next_welcome(&mut self) -> Option<Attached> {
        if self.waiting == 0 {
            return None;
        }
        let ready = |new: &Attached| {
            let former = |old: &Attached| old.term != new.term && !planted(Bug::FormerNotDrained);
            let before = |old: &Attached| old.conn != new.conn && (former(old) || old.channel == new.channel);
            let busy = || self.conns.iter().any(|old| before(old) && old.in_flight > 0);
            new.stage == Stage::Waiting && (planted(Bug::WelcomeEarly) || !busy())
        };
        let at = self.conns.iter().position(ready)?;
        self.conns[at].stage = Stage::Live;
        self.waiting -= 1;
        Some(self.conns[at])
    }

    /// The connection, if it may ask for something.
    pub fn live(&self, conn: Conn) -> Option<&Attached> {
        self.conns.iter().find(|attached| attached.conn == conn && attached.stage == Stage::Live)
    }

    /// A job for the connection goes to the disk.
    pub fn started(&mut self, conn: Conn) {
        if let Some(attached) = self.conns.iter_mut().find(|attached| attached.conn == conn) {
            attached.in_flight += 1;
        }
    }

    /// A job for the connection has come back. Says whether the connection still wants to hear of it.
    pub fn ended(&mut self, conn: Conn) -> bool {
        let Some(at) = self.conns.iter().position(|attached| attached.conn == conn) else { return false };
        let attached = &mut self.conns[at];
        attached.in_flight = attached.in_flight.saturating_sub(1);
        let live = attached.stage == Stage::Live;
        if attached.gone && attached.in_flight == 0 {
            self.conns.swap_remove(at);
        }
        live
    }

    /// Nothing more is taken from the connection. Says whether it was not closing already.
    pub fn close(&mut self, conn: Conn) -> bool {
        let Some(attached) = self.conns.iter_mut().find(|attached| attached.conn == conn) else { return false };
        let open = attached.stage != Stage::Closing;
        self.waiting -= usize::from(attached.stage == Stage::Waiting);
        attached.stage = Stage::Closing;
        open
    }

    /// The world has dropped the connection. Its jobs still count until they come back.
    pub fn gone(&mut self, conn: Conn) {
        self.close(conn);
        let Some(at) = self.conns.iter().position(|attached| attached.conn == conn) else { return };
        self.conns[at].gone = true;
        if self.conns[at].in_flight == 0 {
            self.conns.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(session: u8, epoch: u64) -> Claim {
        Claim { array: Id([1; 16]), epoch: Epoch(epoch), session: Id([session; 16]), host: Id([5; 16]) }
    }

    fn attach(sessions: &mut Sessions, conn: u64, claim: Claim, channel: u16) -> Result<Vec<(u64, Ousted)>, Claim> {
        let mut ousted = Vec::new();
        match sessions.stand(&claim) {
            Standing::Fenced(held) => return Err(held),
            Standing::Takes => sessions.take(Some(claim), |conn, why| ousted.push((conn.0, why))),
            Standing::Holds => {}
        }
        sessions.attach(Conn(conn), (channel, 1, 0), |conn, why| ousted.push((conn.0, why)));
        Ok(ousted)
    }

    fn welcomed(sessions: &mut Sessions) -> Vec<u64> {
        std::iter::from_fn(|| sessions.next_welcome()).map(|attached| attached.conn.0).collect()
    }

    #[test]
    fn a_channel_waits_for_its_former_connection_only() {
        let mut sessions = Sessions::default();
        for conn in 0..2 {
            attach(&mut sessions, conn, claim(1, 1), u16::try_from(conn).unwrap()).unwrap();
        }
        assert_eq!(welcomed(&mut sessions), [0, 1]);
        sessions.started(Conn(0));
        sessions.started(Conn(1));
        assert_eq!(attach(&mut sessions, 2, claim(1, 1), 1), Ok(vec![(1, Ousted::Replaced)]));
        assert!(welcomed(&mut sessions).is_empty());
        sessions.gone(Conn(1));
        assert!(welcomed(&mut sessions).is_empty(), "gone is not drained");
        assert!(!sessions.ended(Conn(1)));
        assert_eq!(welcomed(&mut sessions), [2]);
        assert!(sessions.live(Conn(0)).is_some());
        assert!(sessions.live(Conn(1)).is_none());
    }

    #[test]
    fn a_newer_claim_waits_for_all_and_fences_the_old() {
        let mut sessions = Sessions::default();
        attach(&mut sessions, 0, claim(1, 5), 0).unwrap();
        welcomed(&mut sessions);
        sessions.started(Conn(0));
        attach(&mut sessions, 1, claim(1, 5), 0).unwrap();
        assert_eq!(attach(&mut sessions, 2, claim(2, 6), 3), Ok(vec![(1, Ousted::Refused)]));
        assert_eq!(attach(&mut sessions, 3, claim(1, 5), 1), Err(claim(2, 6)));
        assert_eq!(attach(&mut sessions, 4, claim(3, 6), 1), Err(claim(2, 6)));
        assert_eq!(attach(&mut sessions, 5, claim(2, 6), 4), Ok(vec![]));
        assert!(welcomed(&mut sessions).is_empty());
        sessions.ended(Conn(0));
        assert_eq!(welcomed(&mut sessions), [2, 5]);
        let other = Claim { array: Id([9; 16]), ..claim(7, 1) };
        assert!(attach(&mut sessions, 6, other, 0).is_ok(), "another array was assigned: its epochs are its own");
    }

    #[test]
    fn the_claim_of_a_former_life_holds() {
        let mut sessions = Sessions::new(Some(claim(2, 6)));
        for (session, epoch) in [(1, 5), (2, 5), (1, 6), (9, 0)] {
            assert_eq!(attach(&mut sessions, 0, claim(session, epoch), 0), Err(claim(2, 6)));
        }
        let moved = Claim { host: Id([6; 16]), ..claim(2, 6) };
        assert_eq!(sessions.stand(&moved), Standing::Holds, "the host decides nothing");
        assert_eq!(attach(&mut sessions, 0, claim(2, 6), 0), Ok(vec![]));
        assert_eq!(
            attach(&mut sessions, 1, claim(2, 7), 0),
            Ok(vec![(0, Ousted::Refused)]),
            "an epoch may grow within a life"
        );
        sessions.take(None, |_, _| {});
        assert_eq!(sessions.stand(&claim(1, 1)), Standing::Takes, "a freed volume has no owner");
    }

    #[test]
    fn those_who_have_gone_leave_nothing() {
        let mut sessions = Sessions::default();
        (0..9).for_each(|conn| drop(attach(&mut sessions, conn, claim(1, 1), 0)));
        assert_eq!(sessions.count(), 9);
        (0..9).for_each(|conn| sessions.gone(Conn(conn)));
        assert_eq!((sessions.count(), sessions.waiting), (0, 0));
    }
}
