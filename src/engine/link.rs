//! One shard's link to one target, as a state: when to connect, when to give up, what may be sent. No sockets.
//!
//! ```text
//! Down{retry_at} --time--> Connecting{until} --Up--> Up --Close--> Closing --Down--> Down{retry_at}
//!                              |  (deadline: Close)                                    ^
//!                              +----------------- Down -------------------------------+
//! Down(EBADE) from anywhere --> Fenced, for ever
//! ```

use std::collections::VecDeque;

use crate::bugs::{Bug, planted};
use crate::errno::Errno;
use crate::limits;
use crate::units::{Id, Time};

/// What the other side offers once the link is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the volume, sectors.
    pub sectors: u64,
    /// The volume's own id.
    pub volume: Id,
    /// How often the volume's machine has come back without what was not flushed.
    pub losses: u64,
    /// Most requests outstanding.
    pub requests_max: usize,
    /// Most bytes outstanding.
    pub bytes_max: u64,
}

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// HELLO was accepted: everything sent on former connections of this channel is finished or dropped.
    Up(Terms),
    /// There is no connection (any more), and no operation of it touches a buffer any more.
    Down(Errno),
}

/// What the shard wants of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkCommand {
    /// Connect and say HELLO; answer with `Up` or `Down`.
    Connect(usize),
    /// Close, reap every operation that touches a buffer, answer with `Down`.
    Close(usize),
}

/// See the diagram at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkState {
    Down { retry_at: Time },
    Connecting { until: Time },
    Up(Terms),
    Closing,
    Fenced,
}

/// Whether the other side still answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alive {
    /// Something came at this moment.
    Heard(Time),
    /// It is time to ask; the question waits for its turn to be sent.
    Ask(Time),
    /// Asked at this moment, nothing came since.
    Asked(Time),
}

#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) state: LinkState,
    /// Parts that wait to be sent, oldest first. Its capacity is the number of parts: it never grows.
    pub(crate) queue: VecDeque<u16>,
    pub(crate) requests: usize,
    pub(crate) bytes: u64,
    /// This shard holds the target: the fate of something sent on a former connection is not known.
    pub(crate) holds: bool,
    attempts: u32,
    /// The next connection is to be made at once.
    hurries: bool,
    alive: Alive,
}

impl Link {
    pub(crate) fn new(parts: usize) -> Link {
        Link {
            state: LinkState::Down { retry_at: Time(0) },
            queue: VecDeque::with_capacity(parts),
            requests: 0,
            bytes: 0,
            holds: false,
            attempts: 0,
            hurries: false,
            alive: Alive::Heard(Time(0)),
        }
    }

    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// When the present connection ends, the next one is made at once.
    pub(crate) fn hurry(&mut self) {
        self.hurries = matches!(self.state, LinkState::Up(_) | LinkState::Connecting { .. });
    }

    /// Another volume is to be connected to: what was learnt of the former one is forgotten.
    pub(crate) fn renew(&mut self) {
        self.attempts = 0;
        if matches!(self.state, LinkState::Down { .. } | LinkState::Fenced) {
            self.state = LinkState::Down { retry_at: Time(0) };
        }
    }

    pub(crate) fn heard(&mut self, now: Time) {
        self.alive = Alive::Heard(now);
    }

    pub(crate) fn connect(&mut self, now: Time) {
        self.attempts = self.attempts.saturating_add(1);
        self.state = LinkState::Connecting { until: now.after(limits::CONNECT_TIMEOUT) };
    }

    pub(crate) fn up(&mut self, now: Time, terms: Terms) {
        self.attempts = 0;
        self.state = LinkState::Up(terms);
        self.heard(now);
    }

    pub(crate) fn down(&mut self, now: Time, error: Errno) {
        self.requests = 0;
        self.bytes = 0;
        let doublings = self.attempts.saturating_sub(1).min(16);
        let pause = limits::RECONNECT_MIN.saturating_mul(1 << doublings).min(limits::RECONNECT_MAX);
        let wait = if std::mem::take(&mut self.hurries) { std::time::Duration::ZERO } else { pause };
        // Only the server's own word ends the link for ever.
        let fenced = error == Errno::EBADE;
        self.state = if fenced { LinkState::Fenced } else { LinkState::Down { retry_at: now.after(wait) } };
    }

    /// Whether a part of `bytes` bytes may be sent now.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        let LinkState::Up(terms) = self.state else { return false };
        let requests_max = terms.requests_max.min(limits::LINK_REQUESTS_MAX);
        let bytes_max = terms.bytes_max.min(limits::LINK_BYTES_MAX);
        self.requests < requests_max && (self.requests == 0 || self.bytes + bytes <= bytes_max)
    }

    /// What time has brought: a command for the connection, if any.
    pub(crate) fn tick(&mut self, now: Time) -> Option<Due> {
        match self.state {
            LinkState::Down { .. } if planted(Bug::ReconnectGivesUp) && self.attempts > 3 => None,
            LinkState::Down { retry_at } if retry_at <= now => Some(Due::Connect),
            LinkState::Connecting { until } if until <= now && !planted(Bug::ConnectForever) => Some(Due::GiveUp),
            LinkState::Up(_) if planted(Bug::SilenceIgnored) => None,
            LinkState::Up(_) => match self.alive {
                Alive::Heard(at) if at.after(limits::KEEPALIVE_INTERVAL) <= now => {
                    self.alive = Alive::Ask(now);
                    None
                }
                Alive::Ask(at) | Alive::Asked(at) if at.after(limits::KEEPALIVE_TIMEOUT) <= now => Some(Due::GiveUp),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether a keepalive is to be sent now; it then counts as sent.
    pub(crate) fn take_keepalive(&mut self) -> bool {
        let LinkState::Up(_) = self.state else { return false };
        let Alive::Ask(at) = self.alive else { return false };
        self.alive = Alive::Asked(at);
        true
    }

    /// Whether an answer to a keepalive is due.
    pub(crate) fn expects_keepalive(&self) -> bool {
        matches!(self.state, LinkState::Up(_))
    }

    /// When `tick` has something to do, if nothing else happens.
    pub(crate) fn next_tick(&self) -> Time {
        // All links of a ring ask in one turn: the moment is rounded up to a common grid, so that idle links share a wakeup.
        let grid = |time: Time| Time(time.0.div_ceil(KEEPALIVE_GRID_NANOS).saturating_mul(KEEPALIVE_GRID_NANOS));
        match self.state {
            LinkState::Down { .. } if planted(Bug::ReconnectGivesUp) && self.attempts > 3 => Time::NEVER,
            LinkState::Down { retry_at } => retry_at,
            LinkState::Connecting { .. } if planted(Bug::ConnectForever) => Time::NEVER,
            LinkState::Up(_) if planted(Bug::SilenceIgnored) => Time::NEVER,
            LinkState::Connecting { until } => until,
            LinkState::Up(_) => match self.alive {
                Alive::Heard(at) => grid(at.after(limits::KEEPALIVE_INTERVAL)),
                Alive::Ask(at) | Alive::Asked(at) => grid(at.after(limits::KEEPALIVE_TIMEOUT)),
            },
            LinkState::Closing | LinkState::Fenced => Time::NEVER,
        }
    }
}

/// Keepalives of all links of a ring happen at whole seconds.
const KEEPALIVE_GRID_NANOS: u64 = 1_000_000_000;

/// What a tick asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Connect,
    GiveUp,
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { sectors: 8, volume: Id::NIL, losses: 0, requests_max: 2, bytes_max: 1 << 20 };

    fn seconds(seconds: u64) -> Time {
        Time(seconds * 1_000_000_000)
    }

    #[test]
    fn the_wait_between_tries_doubles_up_to_its_bound() {
        let mut link = Link::new(4);
        let mut waits = Vec::new();
        for _ in 0..8 {
            link.connect(Time(0));
            link.down(Time(0), Errno::ECONNREFUSED);
            let LinkState::Down { retry_at } = link.state else { panic!("{:?}", link.state) };
            waits.push(retry_at.since(Time(0)).as_millis());
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        link.up(Time(0), TERMS);
        link.down(Time(0), Errno::ECONNRESET);
        assert_eq!(link.state, LinkState::Down { retry_at: Time(100_000_000) });
    }

    #[test]
    fn silence_is_noticed_and_an_answer_is_heard() {
        let mut link = Link::new(4);
        link.up(seconds(0), TERMS);
        assert_eq!((link.tick(seconds(9)), link.take_keepalive()), (None, false));
        assert_eq!((link.tick(seconds(10)), link.take_keepalive(), link.take_keepalive()), (None, true, false));
        assert_eq!(link.tick(seconds(19)), None);
        link.heard(seconds(19));
        assert_eq!(link.tick(seconds(28)), None);
        assert_eq!((link.tick(seconds(29)), link.take_keepalive()), (None, true));
        assert_eq!(link.tick(seconds(39)), Some(Due::GiveUp));
    }

    #[test]
    fn a_question_that_cannot_be_sent_is_not_an_answer() {
        let mut link = Link::new(4);
        link.up(seconds(0), TERMS);
        link.tick(seconds(10));
        assert_eq!(link.tick(seconds(20)), Some(Due::GiveUp));
    }

    #[test]
    fn a_fence_is_for_ever() {
        let mut link = Link::new(4);
        link.connect(seconds(0));
        link.down(seconds(0), Errno::EBADE);
        assert_eq!((link.tick(seconds(1000)), link.next_tick()), (None, Time::NEVER));
    }

    #[test]
    fn budgets_bind_but_one_request_always_fits() {
        let mut link = Link::new(4);
        assert!(!link.has_room(0));
        link.up(seconds(0), Terms { bytes_max: 1000, ..TERMS });
        assert!(link.has_room(5000));
        (link.requests, link.bytes) = (1, 600);
        assert!(link.has_room(400) && !link.has_room(401));
        link.requests = 2;
        assert!(!link.has_room(0));
    }
}
