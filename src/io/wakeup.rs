//! What wakes an I/O thread besides I/O: one timer, and a mailbox that other threads post to.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use io_uring::{opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::errno::Errno;
use crate::io::ring::{Owner, Ring};
use crate::units::Time;

const TIMER: u64 = 1;
const MAILBOX: u64 = 2;
const OTHER: u64 = 3;

/// What woke the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The timer has expired.
    Timer,
    /// There is mail.
    Mailbox,
    /// The end of something that was replaced or cancelled.
    Nothing,
}

/// The posting end of a mailbox. Never blocks.
pub struct Postbox<T> {
    sender: SyncSender<T>,
    event: Arc<EventFd>,
}

impl<T> Clone for Postbox<T> {
    fn clone(&self) -> Postbox<T> {
        Postbox { sender: self.sender.clone(), event: Arc::clone(&self.event) }
    }
}

impl<T> Postbox<T> {
    /// Posts; `Err` when the box is full or its thread has ended.
    pub fn post(&self, message: T) -> Result<(), Errno> {
        self.sender.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => Errno::EBUSY,
            TrySendError::Disconnected(_) => Errno::ENODEV,
        })?;
        // A counter that is already at its end wakes the thread just as well.
        let _ = self.event.write(1);
        Ok(())
    }
}

/// The reading end of a mailbox, and the timer of the same thread.
pub struct Wakeup<T> {
    receiver: Receiver<T>,
    event: Arc<EventFd>,
    /// Where the kernel puts the event's counter. The address must not move while a read is in flight.
    counter: Box<u64>,
    reading: bool,
    /// When the armed timer expires.
    armed: Option<Time>,
    /// The times of the timer and of its update, for the kernel to copy.
    spans: Box<[types::Timespec; 2]>,
}

/// A mailbox of `capacity` messages.
pub fn mailbox<T>(capacity: usize) -> io::Result<(Postbox<T>, Wakeup<T>)> {
    let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(io::Error::from)?);
    let (sender, receiver) = sync_channel(capacity);
    let wakeup = Wakeup {
        receiver,
        event: Arc::clone(&event),
        counter: Box::new(0),
        reading: false,
        armed: None,
        spans: Box::new([types::Timespec::new(); 2]),
    };
    Ok((Postbox { sender, event }, wakeup))
}

impl<T> Wakeup<T> {
    /// The next message.
    pub fn read(&mut self) -> Option<T> {
        self.receiver.try_recv().ok()
    }

    /// Watches the mailbox. Call once at the start and after each [`Wake::Mailbox`].
    pub fn watch<R: Ring>(&mut self, ring: &mut R) {
        if !self.reading {
            self.reading = true;
            let fd = types::Fd(self.event.as_raw_fd());
            let sqe = opcode::Read::new(fd, (&raw mut *self.counter).cast(), 8).build();
            ring.push(sqe.user_data(Owner::Worker.user_data(MAILBOX)));
        }
    }

    /// Makes sure that the thread wakes at `when` or earlier. A timer that is armed for an earlier moment is left alone: a
    /// needless wakeup now and then is cheaper than moving it for every request.
    pub fn arm<R: Ring>(&mut self, when: Time, ring: &mut R) {
        if when == Time::NEVER || self.armed.is_some_and(|armed| armed <= when) {
            return;
        }
        let span = types::Timespec::new().sec(when.0 / 1_000_000_000).nsec((when.0 % 1_000_000_000) as u32);
        let timer = Owner::Worker.user_data(TIMER);
        let sqe = if self.armed.is_none() {
            self.spans[0] = span;
            opcode::Timeout::new(&raw const self.spans[0]).flags(types::TimeoutFlags::ABS).build().user_data(timer)
        } else {
            self.spans[1] = span;
            let update = opcode::TimeoutUpdate::new(timer, &raw const self.spans[1]).flags(types::TimeoutFlags::ABS);
            update.build().user_data(Owner::Worker.user_data(OTHER))
        };
        self.armed = Some(when);
        ring.push(sqe);
    }

    /// Takes a completion owned by [`Owner::Worker`].
    pub fn handle(&mut self, value: u64) -> Wake {
        match value {
            TIMER => {
                self.armed = None;
                Wake::Timer
            }
            MAILBOX => {
                self.reading = false;
                Wake::Mailbox
            }
            _ => Wake::Nothing,
        }
    }

    /// Cancels what is in flight; to be called until it returns true, with completions handled in between.
    pub fn cancel<R: Ring>(&mut self, ring: &mut R) -> bool {
        for (in_flight, value) in [(self.armed.is_some(), TIMER), (self.reading, MAILBOX)] {
            if in_flight {
                let sqe = opcode::AsyncCancel::new(Owner::Worker.user_data(value)).build();
                ring.push(sqe.user_data(Owner::Worker.user_data(OTHER)));
            }
        }
        self.armed.is_none() && !self.reading
    }
}
