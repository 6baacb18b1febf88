//! Whether the array daemon makes progress, and who tells the service manager so.
//!
//! The loop of the owner feeds the watchdog itself, and only while each I/O thread has gone round since it was last asked to. A daemon
//! that hangs anywhere there is killed by the manager, and its devices are served on by the next one. Nothing that merely waits is
//! a hang: a server that does not answer, a suspended node and a full queue leave the threads going round.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::errno::Errno;
use crate::io::notify::Notifier;
use crate::io::wakeup::Postbox;
use crate::limits;
use crate::roles::array::worker::Order;
use crate::units::Time;

/// What an I/O thread sets when it goes round.
pub type Mark = Arc<AtomicBool>;

/// The questions to the I/O threads of one array that are not answered yet, by thread. At most one each.
#[derive(Default)]
pub struct Pulse {
    asked: Mutex<Vec<Option<Mark>>>,
}

impl Pulse {
    /// Whether each thread has gone round since the last call that said so, and asks them to do so again. Never waits.
    pub fn is_felt(&self, threads: &[Postbox<Order>]) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.resize(threads.len(), None);
        if !asked.iter().flatten().all(is_answered) {
            return false;
        }
        let mut all = true;
        for (asked, thread) in asked.iter_mut().zip(threads) {
            let mark = Mark::default();
            *asked = match thread.post(Order::Mark(Arc::clone(&mark))) {
                Ok(()) => Some(mark),
                // It has ended, and said so by other ways.
                Err(Errno::ENODEV) => None,
                Err(_) => {
                    all = false;
                    None
                }
            };
        }
        all
    }
}

/// A thread that has ended has dropped the question.
fn is_answered(mark: &Mark) -> bool {
    mark.load(Ordering::SeqCst) || Arc::strong_count(mark) == 1
}

/// The watchdog, from the side of the loop that feeds it.
pub struct Beat {
    notifier: Arc<Notifier>,
    every: Duration,
    next: Time,
}

impl Beat {
    /// `None`: nobody waits for it.
    pub fn new(notifier: Option<Arc<Notifier>>, now: Time) -> Option<Beat> {
        let notifier = notifier?;
        let every = notifier.watchdog()? / limits::WATCHDOG_BEATS;
        Some(Beat { notifier, every, next: now })
    }

    /// When it is to be fed.
    pub fn next(&self) -> Time {
        self.next
    }

    /// Feeds it if it is time and everything `goes`.
    pub fn feed(&mut self, now: Time, goes: impl FnOnce() -> bool) {
        if now < self.next {
            return;
        }
        self.next = now.after(self.every);
        if goes() {
            self.notifier.alive();
        } else {
            tracing::warn!("an I/O thread does not go round: the watchdog is not fed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::wakeup::mailbox;

    #[test]
    fn a_thread_that_does_not_go_round_is_noticed() {
        let (first, mut first_box) = mailbox(2).unwrap();
        let (second, mut second_box) = mailbox(2).unwrap();
        let (pulse, threads) = (Pulse::default(), [first, second]);
        let goes = |wakeup: &mut crate::io::wakeup::Wakeup<Order>| {
            while let Some(order) = wakeup.read() {
                let Order::Mark(mark) = order else { panic!("another order") };
                mark.store(true, Ordering::SeqCst);
            }
        };
        assert!(pulse.is_felt(&threads), "nobody was asked yet");
        goes(&mut first_box);
        for _ in 0..5 {
            assert!(!pulse.is_felt(&threads), "the second one has not answered, and is not asked again");
        }
        goes(&mut second_box);
        assert!(pulse.is_felt(&threads));
        goes(&mut first_box);
        drop(second_box);
        assert!(pulse.is_felt(&threads), "it has ended with a question");
        assert!(!pulse.is_felt(&threads), "the other one has not answered");
        goes(&mut first_box);
        assert!(pulse.is_felt(&threads), "who has ended is not asked");
    }
}
