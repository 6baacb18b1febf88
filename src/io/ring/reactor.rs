//! Tasks of one thread, and the ring they wait for: what a server's owner threads run on.
//!
//! A round: poll every task that is ready; hand what they have queued to the kernel with the same system call that waits; give each
//! completion to its task. One thread, no locks: only a waker that is used from another thread takes the long way, a list and an
//! eventfd.
//!
//! Contract: what an operation was given lives until its completion, also when nobody waits for it any more: the reactor keeps it.
//! What is still in flight when [`run`] ends is never given back.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use slab::Slab;

use crate::errno::Errno;
use crate::io::ring::busy::BusyPoll;
use crate::io::ring::{build, is_transient};
use crate::limits;

/// The task that [`run`] was given.
const MAIN: usize = usize::MAX;
/// `user_data` of the poll of the eventfd; all others are indices of operations.
const KNOCKED: u64 = u64::MAX;

thread_local! {
    static HERE: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

/// An operation between its submission and its future.
enum State {
    InFlight,
    Waiting(Waker),
    Done(i32),
    /// Nobody waits; what it was given is kept.
    Abandoned {
        _kept: Box<dyn Any>,
    },
}

struct Task {
    /// `None`: it is being polled.
    future: RefCell<Option<Pin<Box<dyn Future<Output = ()>>>>>,
    knock: Arc<Knock>,
    waker: Waker,
}

/// What a task's waker does.
struct Knock {
    task: usize,
    /// It is in a list already.
    queued: AtomicBool,
    elsewhere: Arc<Elsewhere>,
}

/// Where other threads leave what they have woken.
struct Elsewhere {
    /// Whose: no two of a process are the same.
    reactor: u64,
    woken: Mutex<Vec<usize>>,
    event: EventFd,
}

struct Reactor {
    ring: RefCell<IoUring>,
    busy: RefCell<BusyPoll>,
    operations: RefCell<Slab<State>>,
    tasks: RefCell<Slab<Rc<Task>>>,
    ready: RefCell<VecDeque<usize>>,
    /// Those who let the ring have its turn first.
    later: RefCell<Vec<Waker>>,
    elsewhere: Arc<Elsewhere>,
    /// The eventfd is being polled.
    listening: Cell<bool>,
}

impl Wake for Knock {
    fn wake(self: Arc<Knock>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Knock>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let here = HERE.try_with(|here| match here.borrow().as_ref() {
            Some(reactor) if reactor.elsewhere.reactor == self.elsewhere.reactor => {
                reactor.ready.borrow_mut().push_back(self.task);
                true
            }
            _ => false,
        });
        if here != Ok(true) {
            self.elsewhere.woken.lock().unwrap_or_else(PoisonError::into_inner).push(self.task);
            // A counter that is already at its end wakes the thread just as well.
            let _ = self.elsewhere.event.write(1);
        }
    }
}

impl Reactor {
    fn new(entries: u32) -> io::Result<Reactor> {
        static REACTORS: AtomicU64 = AtomicU64::new(0);
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(io::Error::from)?;
        let reactor = REACTORS.fetch_add(1, Ordering::Relaxed);
        Ok(Reactor {
            ring: RefCell::new(build(entries)?),
            busy: RefCell::default(),
            operations: RefCell::new(Slab::with_capacity(64)),
            tasks: RefCell::default(),
            ready: RefCell::default(),
            later: RefCell::default(),
            elsewhere: Arc::new(Elsewhere { reactor, woken: Mutex::default(), event }),
            listening: Cell::new(false),
        })
    }

    /// A task's way to be polled again; it is ready from the start.
    fn knock(&self, task: usize) -> Arc<Knock> {
        self.ready.borrow_mut().push_back(task);
        Arc::new(Knock { task, queued: AtomicBool::new(true), elsewhere: Arc::clone(&self.elsewhere) })
    }

    fn push(&self, entry: &squeue::Entry) {
        loop {
            // SAFETY: by `submit`'s contract the buffers of the entry live until its completion; other entries have none.
            if unsafe { self.ring.borrow_mut().submission().push(entry) }.is_ok() {
                return;
            }
            // Full. What the kernel does not take because its completions are not read finds room after they are.
            if self.ring.borrow().submit().is_err() {
                self.reap();
            }
        }
    }

    /// Hands over what is queued, waits for a completion if there is nothing else to do, and tells whoever waits.
    fn turn(&self, wait: bool) -> io::Result<()> {
        if !self.listening.replace(true) {
            let event = types::Fd(self.elsewhere.event.as_fd().as_raw_fd());
            let flags = u32::from(libc::POLLIN.unsigned_abs());
            self.push(&opcode::PollAdd::new(event, flags).build().user_data(KNOCKED));
        }
        let submitted = {
            let ring = &mut *self.ring.borrow_mut();
            if wait {
                self.busy.borrow_mut().look(ring);
            }
            let want = usize::from(wait && ring.completion().is_empty());
            ring.submit_and_wait(want)
        };
        match submitted {
            Ok(_) => {}
            Err(error) if is_transient(Errno::from(&error)) => {}
            Err(error) => return Err(error),
        }
        self.reap();
        self.later.borrow_mut().drain(..).for_each(Waker::wake);
        Ok(())
    }

    fn reap(&self) {
        for completion in self.ring.borrow_mut().completion() {
            if completion.user_data() == KNOCKED {
                self.listening.set(false);
                self.answer();
                continue;
            }
            let Ok(index) = usize::try_from(completion.user_data()) else { continue };
            let mut operations = self.operations.borrow_mut();
            let Some(state) = operations.get_mut(index) else { continue };
            match std::mem::replace(state, State::Done(completion.result())) {
                State::Waiting(waker) => waker.wake(),
                State::Abandoned { .. } => drop(operations.remove(index)),
                State::InFlight | State::Done(_) => {}
            }
        }
    }

    /// Takes what other threads have woken.
    fn answer(&self) {
        let _ = self.elsewhere.event.read();
        let woken = std::mem::take(&mut *self.elsewhere.woken.lock().unwrap_or_else(PoisonError::into_inner));
        self.ready.borrow_mut().extend(woken);
    }

    fn poll(&self, index: usize) {
        let Some(task) = self.tasks.borrow().get(index).map(Rc::clone) else { return };
        task.knock.queued.store(false, Ordering::Release);
        let Some(mut future) = task.future.borrow_mut().take() else { return };
        match future.as_mut().poll(&mut Context::from_waker(&task.waker)) {
            Poll::Pending => *task.future.borrow_mut() = Some(future),
            Poll::Ready(()) => {
                self.tasks.borrow_mut().remove(index);
            }
        }
    }
}

/// Runs a task, and those that it and they [`spawn`], until it ends; the others are dropped then. An error is the ring's.
pub fn run<F: Future>(entries: u32, main: F) -> io::Result<F::Output> {
    let reactor = Rc::new(Reactor::new(entries)?);
    let former = HERE.replace(Some(Rc::clone(&reactor)));
    debug_assert!(former.is_none(), "one reactor for a thread");
    let result = serve(&reactor, main);
    // A task may wake another while it is dropped, and what it has in flight moves to `operations`.
    for task in std::mem::take(&mut *reactor.tasks.borrow_mut()) {
        drop(task);
    }
    std::mem::forget(std::mem::take(&mut *reactor.operations.borrow_mut()));
    HERE.set(None);
    result
}

fn serve<F: Future>(reactor: &Reactor, main: F) -> io::Result<F::Output> {
    let mut main = pin!(main);
    let knock = reactor.knock(MAIN);
    let waker = Waker::from(Arc::clone(&knock));
    loop {
        for _ in 0..limits::REACTOR_POLLS_MAX {
            let next = reactor.ready.borrow_mut().pop_front();
            match next {
                None => break,
                Some(MAIN) => {
                    knock.queued.store(false, Ordering::Release);
                    if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return Ok(output);
                    }
                }
                Some(task) => reactor.poll(task),
            }
        }
        let wait = reactor.ready.borrow().is_empty() && reactor.later.borrow().is_empty();
        reactor.turn(wait)?;
    }
}

fn here() -> Rc<Reactor> {
    let Some(reactor) = HERE.with_borrow(Clone::clone) else { unreachable!("a thread without a reactor") };
    reactor
}

/// Starts a task on the calling thread's reactor.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    let reactor = here();
    let tasks = &mut *reactor.tasks.borrow_mut();
    let entry = tasks.vacant_entry();
    let knock = reactor.knock(entry.key());
    let waker = Waker::from(Arc::clone(&knock));
    entry.insert(Rc::new(Task { future: RefCell::new(Some(Box::pin(task))), knock, waker }));
}

/// Lets what is queued go to the kernel, and those whose operations have ended have their turn.
pub async fn give_way() {
    let mut waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        here().later.borrow_mut().push(context.waker().clone());
        Poll::Pending
    })
    .await;
}

/// Waits.
pub async fn sleep(time: Duration) {
    let span = Box::new(types::Timespec::from(time));
    let entry = opcode::Timeout::new(&raw const *span).build();
    // SAFETY: the timespec is boxed, and the box is the operation's.
    let _ = unsafe { submit(span, entry) }.await;
}

/// An operation of the ring: ends with its result, and what it was given.
pub struct Operation<D: Unpin + 'static> {
    reactor: Rc<Reactor>,
    index: usize,
    /// `None`: it has ended.
    data: Option<D>,
}

/// Queues an operation on the calling thread's ring.
///
/// # Safety
///
/// Whatever the entry points to belongs to `data`, and stays where it is while `data` is moved.
pub unsafe fn submit<D: Unpin + 'static>(data: D, entry: squeue::Entry) -> Operation<D> {
    let reactor = here();
    let index = reactor.operations.borrow_mut().insert(State::InFlight);
    reactor.push(&entry.user_data(index as u64));
    Operation { reactor, index, data: Some(data) }
}

impl<D: Unpin + 'static> Future for Operation<D> {
    type Output = (Result<usize, Errno>, D);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let operations = &mut *self.reactor.operations.borrow_mut();
            match &mut operations[self.index] {
                State::Done(result) => *result,
                State::Waiting(waker) if waker.will_wake(context.waker()) => return Poll::Pending,
                state => {
                    *state = State::Waiting(context.waker().clone());
                    return Poll::Pending;
                }
            }
        };
        let Some(data) = self.data.take() else { unreachable!("polled after its end") };
        self.reactor.operations.borrow_mut().remove(self.index);
        Poll::Ready((usize::try_from(result).map_err(|_| Errno::from_raw(result.saturating_neg())), data))
    }
}

impl<D: Unpin + 'static> Drop for Operation<D> {
    fn drop(&mut self) {
        let Some(data) = self.data.take() else { return };
        let operations = &mut *self.reactor.operations.borrow_mut();
        match operations.get_mut(self.index) {
            Some(State::Done(_)) => drop(operations.remove(self.index)),
            Some(state) => *state = State::Abandoned { _kept: Box::new(data) },
            // The reactor has ended: in flight for ever.
            None => std::mem::forget(data),
        }
    }
}

#[cfg(test)]
mod tests;
