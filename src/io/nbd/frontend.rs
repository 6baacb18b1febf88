//! The NBD frontend of one I/O thread: its ring, its clients, its tags.
//!
//! Contract: it is made and used by one thread. All clients of the thread share `depth` tags; a client whose request finds none
//! waits unread. A tag comes back when its answer has been sent, or, when its client is gone, as soon as the worker is done.
//! Sends start in [`Ring::turn`], so that one send carries everything that became ready in a turn. After
//! [`Frontend::shut_down`] no request begins; those in flight are answered; `is_up` is false once no operation is in flight.

use std::collections::VecDeque;
use std::io;

use io_uring::{opcode, squeue, types};

use crate::engine::request::{Request, Tag};
use crate::errno::Errno;
use crate::io::buffer::Buffers;
use crate::io::nbd::connection::{Connection, RECEIVE, SEND, Shared};
use crate::io::nbd::listener::Door;
use crate::io::nbd::tags::Tags;
use crate::io::ring::{BareRing, Completion, Frontend, Owner, Ring, pack, unpack};
use crate::limits;
use crate::wire::nbd::export::Export;

/// `user_data` of the thread's own operations, beside those of its connections.
const DOOR: u32 = 3;
const TICK: u32 = 4;
const CANCEL: u32 = 5;

/// See the module's description.
pub struct NbdFrontend {
    // Dropped first: what it has in flight ends before the buffers go.
    ring: BareRing,
    shared: Shared,
    depth: usize,
    connections: Box<[Option<Box<Connection>>]>,
    open: usize,
    /// Slots of connections whose next request waits for a tag, the longest waiting first.
    starving: VecDeque<usize>,
    /// Slots of connections that have something to send.
    sending: Vec<usize>,
    /// `None` after the stop.
    door: Option<Door>,
    /// Where the kernel puts the door's counter.
    counter: Box<u64>,
    watching: bool,
    ticking: bool,
    /// How long a tick is, for the kernel to read.
    span: Box<types::Timespec>,
    /// The tick of the stop.
    stopped: Option<u64>,
}

impl NbdFrontend {
    /// A frontend for the clients that come through `door`. To be called by the thread that will use it.
    pub fn new(export: Export, depth: usize, door: Door) -> io::Result<NbdFrontend> {
        let entries = u32::try_from(depth.saturating_mul(2).next_power_of_two().max(256)).unwrap_or(u32::MAX);
        let count = limits::NBD_CONNECTIONS_MAX;
        let shared = Shared {
            export,
            tags: Tags::new(depth)?,
            stages: Buffers::new(count, limits::NBD_STAGE_BYTES)?,
            ready: VecDeque::with_capacity(depth),
            tick: 0,
        };
        let mut frontend = NbdFrontend {
            ring: BareRing::new(entries)?,
            shared,
            depth,
            connections: std::iter::repeat_with(|| None).take(count).collect(),
            open: 0,
            starving: VecDeque::with_capacity(count),
            sending: Vec::with_capacity(count),
            door: Some(door),
            counter: Box::new(0),
            watching: false,
            ticking: false,
            span: Box::new(types::Timespec::new().sec(limits::NBD_TICK.as_secs())),
            stopped: None,
        };
        frontend.watch();
        Ok(frontend)
    }

    /// Waits for new clients.
    fn watch(&mut self) {
        if let Some(door) = &self.door {
            let sqe = opcode::Read::new(types::Fd(door.event()), (&raw mut *self.counter).cast(), 8).build();
            self.watching = true;
            self.ring.push(sqe.user_data(Owner::Frontend.user_data(pack(0, DOOR))));
        }
    }

    /// Makes sure that a tick comes.
    fn keep_ticking(&mut self) {
        if !self.ticking {
            self.ticking = true;
            let sqe = opcode::Timeout::new(&raw const *self.span).build();
            self.ring.push(sqe.user_data(Owner::Frontend.user_data(pack(0, TICK))));
        }
    }

    fn admit(&mut self) {
        while let Some(socket) = self.door.as_mut().and_then(Door::next) {
            let Some(slot) = self.connections.iter().position(Option::is_none) else {
                tracing::warn!(
                    limit = limits::NBD_CONNECTIONS_MAX,
                    "an NBD client was turned away: too many connections"
                );
                continue;
            };
            let connection = Connection::new(slot, socket, self.depth, self.shared.tick);
            self.connections[slot] = Some(Box::new(connection));
            self.open += 1;
            self.show_clients();
            self.advance(slot);
            self.keep_ticking();
        }
        self.watch();
    }

    fn show_clients(&self) {
        if let Some(door) = &self.door {
            door.show_clients(self.open);
        }
    }

    /// Lets a connection move on, and notes what it needs now.
    fn advance(&mut self, slot: usize) {
        let Some(connection) = &mut self.connections[slot] else { return };
        connection.pump(&mut self.shared, &mut self.ring);
        if connection.can_send() && !connection.listed {
            connection.listed = true;
            self.sending.push(slot);
        }
        if connection.starving && !connection.queued {
            connection.queued = true;
            self.starving.push_back(slot);
            self.keep_ticking();
        }
        if self.connections[slot].as_ref().is_some_and(|connection| connection.is_gone()) {
            self.connections[slot] = None;
            self.open -= 1;
            self.show_clients();
            self.starving.retain(|other| *other != slot);
            self.sending.retain(|other| *other != slot);
            self.finish_stop();
        }
    }

    /// Gives free tags to those that wait for one.
    fn feed(&mut self) {
        while self.shared.tags.any_free() {
            let Some(slot) = self.starving.pop_front() else { return };
            if let Some(connection) = &mut self.connections[slot] {
                connection.queued = false;
                self.advance(slot);
            }
        }
    }

    /// Looks for clients that are late.
    fn tick(&mut self) {
        self.ticking = false;
        self.shared.tick += 1;
        let tick = self.shared.tick;
        let others_wait = !self.starving.is_empty();
        let out_of_time = self.stopped.is_some_and(|stopped| tick - stopped >= limits::NBD_STOP_TICKS);
        for slot in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[slot] else { continue };
            if out_of_time || connection.is_late(tick, others_wait) {
                tracing::info!("an NBD client is disconnected: it did not go on in time");
                connection.die();
                self.advance(slot);
            }
        }
        let shaking = self.connections.iter().flatten().any(|connection| connection.is_shaking_hands());
        if shaking || !self.starving.is_empty() || (self.stopped.is_some() && self.open > 0) {
            self.keep_ticking();
        }
    }

    /// After the stop and the last client: nothing is waited for any more.
    fn finish_stop(&mut self) {
        if self.stopped.is_some() && self.open == 0 {
            for (in_flight, kind) in [(self.watching, DOOR), (self.ticking, TICK)] {
                if in_flight {
                    let sqe = opcode::AsyncCancel::new(Owner::Frontend.user_data(pack(0, kind))).build();
                    self.ring.push(sqe.user_data(Owner::Frontend.user_data(pack(0, CANCEL))));
                }
            }
        }
    }
}

impl Ring for NbdFrontend {
    fn push(&mut self, sqe: squeue::Entry) {
        self.ring.push(sqe);
    }

    fn turn(&mut self, wait: bool, completions: &mut Vec<Completion>) -> io::Result<()> {
        while let Some(slot) = self.sending.pop() {
            if let Some(connection) = &mut self.connections[slot] {
                connection.listed = false;
                connection.send(&self.shared, &mut self.ring);
            }
        }
        self.ring.turn(wait, completions)
    }
}

impl Frontend for NbdFrontend {
    fn handle(&mut self, value: u64, result: i32) {
        let (slot, kind) = unpack(value);
        match kind {
            RECEIVE | SEND => {
                let Some(connection) = &mut self.connections[slot] else { return };
                if kind == RECEIVE {
                    connection.received(result, self.shared.tick);
                } else {
                    connection.sent(result, &mut self.shared, &mut self.ring);
                    // The tags that this may have released are first for those that waited longer.
                    self.feed();
                }
                self.advance(slot);
                self.feed();
            }
            DOOR => {
                self.watching = false;
                self.admit();
            }
            TICK => {
                self.tick();
                self.feed();
            }
            _ => {}
        }
    }

    fn next_request(&mut self) -> Option<(Tag, Request)> {
        let (tag, request) = self.shared.ready.pop_front()?;
        Some(self.shared.tags.lend(tag, request))
    }

    fn buffer(&self, tag: Tag) -> *mut u8 {
        self.shared.tags.data().start(usize::from(tag.0))
    }

    fn buffer_bytes(&self) -> usize {
        self.shared.tags.data().bytes_each()
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        let slot = self.shared.tags.give_back(tag);
        if let Some(connection) = &mut self.connections[slot] {
            connection.complete(tag, result, &mut self.shared);
            self.advance(slot);
            self.feed();
        }
    }

    fn is_up(&self) -> bool {
        self.stopped.is_none() || self.open > 0 || self.watching || self.ticking
    }

    fn shut_down(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        self.stopped = Some(self.shared.tick);
        // Clients that were seated but not admitted are closed with it.
        self.door = None;
        for slot in 0..self.connections.len() {
            if let Some(connection) = &mut self.connections[slot] {
                connection.drain();
                self.advance(slot);
            }
        }
        if self.open > 0 {
            self.keep_ticking();
        }
        self.finish_stop();
    }
}
