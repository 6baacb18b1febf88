//! One I/O thread of an array: it joins a frontend, a shard and the shard's connections on one ring.
//!
//! A turn: wait for completions; give each to its owner; hand new requests to the shard; let the shard do what time has
//! brought; then carry out what it asks for until nothing is left. The thread ends when its frontend is down and nothing is
//! in flight; it closes its connections first.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, SyncSender};

use crate::engine::link::{LinkCommand, LinkEvent};
use crate::engine::shard::Shard;
use crate::engine::shard::why::Waiting;
use crate::engine::shared::Shared;
use crate::engine::view::View;
use crate::errno::Errno;
use crate::io::clock;
use crate::io::link::Link;
use crate::io::local::Local;
use crate::io::ring::{Completion, Frontend, Owner, unpack};
use crate::io::wakeup::{Postbox, Wake, Wakeup};
use crate::limits;
use crate::roles::array::keeper::Note;
use crate::roles::array::path::{Attachment, Connector};
use crate::roles::array::pulse::Mark;
use crate::units::Time;

/// What the owner asks of an I/O thread.
#[derive(Clone, Debug)]
pub enum Order {
    /// Take no more requests; end when those in flight are complete.
    Stop,
    /// End every request in flight with this error.
    Abort(Errno),
    /// Work from this view.
    Adopt(Arc<View>),
    /// Somebody has given back what this thread's requests wait for.
    Look,
    /// A spare target has a volume from now on.
    Attach {
        /// The spare target.
        target: usize,
        /// What is there.
        at: Arc<Attachment>,
    },
    /// Tell what waits, if there is still somebody to be told.
    Why(SyncSender<Vec<Waiting>>),
    /// Show that the thread goes round.
    Mark(Mark),
    /// Flush one target, and tell the keeper.
    Flush {
        /// The flush's number.
        ticket: u64,
        /// The target.
        target: usize,
    },
}

/// Whom an I/O thread of an array with replicas speaks to.
#[derive(Clone)]
pub struct Neighbours {
    /// The keeper of the replicas.
    pub keeper: Sender<Note>,
    /// Every I/O thread.
    pub threads: Vec<Postbox<Order>>,
}

/// The connection to one target.
pub enum Connection {
    /// A server.
    Remote(Box<Link>),
    /// A local file or device.
    Local(Box<Local>),
}

impl Connection {
    fn is_idle(&self) -> bool {
        match self {
            Connection::Remote(link) => link.is_idle(),
            Connection::Local(local) => local.is_idle(),
        }
    }
}

/// See the module's description.
pub struct Worker<'f, F: Frontend> {
    shard: Shard,
    /// `None`: a spare target.
    connections: Vec<Option<Connection>>,
    connector: Arc<Connector>,
    frontend: &'f mut F,
    wakeup: Wakeup<Order>,
    neighbours: Option<Neighbours>,
    shared: Arc<Shared>,
    shard_index: usize,
    now: Time,
}

/// Everything that one I/O thread needs besides its frontend.
pub struct Seat {
    /// The rules.
    pub shard: Shard,
    /// The shard's targets, in order; `None`: a spare one.
    pub connections: Vec<Option<Connection>>,
    /// Makes further ones.
    pub connector: Arc<Connector>,
    /// What wakes it.
    pub wakeup: Wakeup<Order>,
    /// With replicas: whom it speaks to.
    pub neighbours: Option<Neighbours>,
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// Which thread it is.
    pub index: usize,
}

impl<'f, F: Frontend> Worker<'f, F> {
    /// Puts a frontend on a seat.
    pub fn new(seat: Seat, frontend: &'f mut F) -> Worker<'f, F> {
        Worker {
            shard: seat.shard,
            connections: seat.connections,
            connector: seat.connector,
            wakeup: seat.wakeup,
            neighbours: seat.neighbours,
            shared: seat.shared,
            shard_index: seat.index,
            frontend,
            now: clock::now(),
        }
    }

    /// Runs until the frontend is down and everything is complete. An error means that the ring has failed.
    pub fn run(self) -> io::Result<()> {
        self.run_to_sequence().0
    }

    /// The same, and the sequence up to which the shard has used its tags.
    pub fn run_to_sequence(mut self) -> (io::Result<()>, u32) {
        let result = self.serve();
        if !self.shard.is_settled() {
            self.shared.note_unsettled();
        }
        let sequence = self.shard.sequence();
        if result.is_err() {
            // The kernel may still use what their operations point at: it is never given back.
            std::mem::forget(std::mem::take(&mut self.connections));
            std::mem::forget(self.wakeup);
        }
        (result, sequence)
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut completions = Vec::with_capacity(4096);
        self.wakeup.watch(self.frontend);
        self.shard.handle_timeout(self.now);
        loop {
            self.settle();
            if !self.frontend.is_up() && self.shard.active() == 0 {
                break;
            }
            let next = self.shard.next_timeout().min(self.frontend.next_timeout());
            self.wakeup.arm(next, self.frontend);
            self.turn(&mut completions)?;
        }
        self.close(&mut completions)
    }

    /// Waits, and gives every completion to its owner.
    fn turn(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        completions.clear();
        self.frontend.turn(true, completions)?;
        self.now = clock::now();
        for completion in completions.iter() {
            self.dispatch(completion);
        }
        if self.shard.next_timeout() <= self.now {
            self.shard.handle_timeout(self.now);
        }
        Ok(())
    }

    fn dispatch(&mut self, completion: &Completion) {
        let Some((owner, value)) = Owner::of(completion.user_data) else { return };
        let (target, rest) = unpack(value);
        match owner {
            Owner::Frontend => self.frontend.handle(value, completion.result),
            Owner::Worker => {
                if self.wakeup.handle(value) == Wake::Mailbox {
                    self.read_mail();
                }
            }
            Owner::Link | Owner::Disk => match &mut self.connections[target] {
                Some(Connection::Remote(link)) => {
                    link.handle(self.now, rest, completion.result, &mut self.shard, self.frontend);
                }
                Some(Connection::Local(local)) => {
                    local.handle(self.now, rest, completion.result, &mut self.shard, self.frontend);
                }
                None => {}
            },
        }
    }

    fn read_mail(&mut self) {
        while let Some(order) = self.wakeup.read() {
            match order {
                Order::Stop => self.frontend.shut_down(),
                Order::Abort(error) => self.shard.abort(error),
                Order::Adopt(view) => self.shard.adopt(self.now, view),
                Order::Look => self.shard.look(self.now),
                Order::Why(asker) => drop(asker.try_send(self.shard.why(self.now, limits::WHY_AGE))),
                Order::Mark(mark) => mark.store(true, Ordering::SeqCst),
                Order::Attach { target, at } => self.attach(target, &at),
                Order::Flush { ticket, target } => self.shard.flush_target(self.now, ticket, target),
            }
        }
        self.wakeup.watch(self.frontend);
    }

    /// The former volume's connection is closed: the keeper frees no slot before.
    fn attach(&mut self, target: usize, at: &Attachment) {
        debug_assert!(self.connections[target].as_ref().is_none_or(Connection::is_idle), "a slot in use");
        let parts = self.shard.parts();
        self.connections[target] = Some(self.connector.connection(self.shard_index, parts, target, at, at.logged));
        // From now on the node's servers write down what is changed, before the new target is written: else nobody would know
        // afterwards what one of them has missed.
        for other in self.shard.siblings(target).into_iter().filter(|_| at.logged) {
            if let Some(Connection::Remote(link)) = &mut self.connections[other]
                && link.log_changes()
            {
                self.shard.reconnect(other);
            }
        }
    }

    /// Moves requests, commands, frames and results on until nothing moves.
    fn settle(&mut self) {
        loop {
            while let Some((tag, request)) = self.frontend.next_request() {
                self.shard.handle_request(self.now, tag, request);
            }
            while let Some(tag) = self.frontend.next_abandoned() {
                self.shard.abandon(tag, Errno::ECANCELED);
            }
            while let Some(command) = self.shard.poll_link() {
                self.obey(command);
            }
            for connection in self.connections.iter_mut().flatten() {
                match connection {
                    Connection::Remote(link) => link.pump(&mut self.shard, self.frontend),
                    Connection::Local(local) => local.pump(self.now, &mut self.shard, self.frontend),
                }
            }
            let mut moved = false;
            while let Some((tag, result)) = self.shard.poll_complete() {
                self.frontend.complete(tag, result);
                moved = true;
            }
            if !moved {
                break;
            }
        }
        self.shard.show_load();
        self.tell_neighbours();
    }

    /// Passes on what the keeper and other threads must know. What the keeper is told is bounded: once for each view.
    fn tell_neighbours(&mut self) {
        let Some(Neighbours { keeper, threads }) = &self.neighbours else { return };
        // Without a keeper the array is ending.
        while let Some(report) = self.shard.poll_report() {
            let _ = keeper.send(Note::Report(report));
        }
        while let Some((node, version)) = self.shard.poll_ack() {
            let _ = keeper.send(Note::Adopted { shard: self.shard_index, node, version });
        }
        while let Some((ticket, durable)) = self.shard.poll_flushed() {
            let _ = keeper.send(Note::Flushed { ticket, durable });
        }
        while let Some(other) = self.shard.poll_wake() {
            if let Some(thread) = threads.get(other) {
                // A full box has something in it that wakes the thread, and a tick makes it look.
                let _ = thread.post(Order::Look);
            }
        }
    }

    fn obey(&mut self, command: LinkCommand) {
        let (LinkCommand::Connect(target) | LinkCommand::Close(target)) = command;
        let connect = matches!(command, LinkCommand::Connect(_));
        match &mut self.connections[target] {
            Some(Connection::Remote(link)) if connect => link.connect(self.now, &mut self.shard, self.frontend),
            Some(Connection::Remote(link)) => link.close(self.now, &mut self.shard, self.frontend),
            Some(Connection::Local(local)) if connect => local.connect(self.now, &mut self.shard),
            Some(Connection::Local(local)) => local.close(self.now, &mut self.shard),
            None => self.shard.handle_link(self.now, target, LinkEvent::Down(Errno::ENOENT)),
        }
    }

    /// Closes every connection and reaps whatever the ring still has, so that no completion outlives its buffer.
    fn close(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        for connection in self.connections.iter_mut().flatten() {
            match connection {
                Connection::Remote(link) => link.close(self.now, &mut self.shard, self.frontend),
                Connection::Local(local) => local.close(self.now, &mut self.shard),
            }
        }
        while !(self.connections.iter().flatten().all(Connection::is_idle) && self.wakeup.cancel(self.frontend)) {
            completions.clear();
            self.frontend.turn(true, completions)?;
            for completion in completions.iter() {
                self.dispatch_closing(completion);
            }
        }
        Ok(())
    }

    fn dispatch_closing(&mut self, completion: &Completion) {
        match Owner::of(completion.user_data) {
            // No new watch is set up any more.
            Some((Owner::Worker, value)) => {
                self.wakeup.handle(value);
            }
            _ => self.dispatch(completion),
        }
    }
}
