//! The reactor on a real ring.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::*;

fn run<F: Future>(main: F) -> F::Output {
    super::run(8, main).unwrap()
}

/// Receives a byte.
async fn receive(stream: &Rc<UnixStream>) -> (Result<usize, Errno>, u8) {
    let mut byte = Box::new(0_u8);
    let entry = opcode::Recv::new(types::Fd(stream.as_raw_fd()), &raw mut *byte, 1).build();
    // SAFETY: the byte is boxed, the descriptor is the stream's, and both are the operation's.
    let (result, (byte, _)) = unsafe { submit((byte, Rc::clone(stream)), entry) }.await;
    (result, *byte)
}

fn pair() -> (Rc<UnixStream>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Rc::new(ours), theirs)
}

#[test]
fn operations_end_with_their_result() {
    run(async {
        let (ours, mut theirs) = pair();
        theirs.write_all(b"x").unwrap();
        assert_eq!(receive(&ours).await, (Ok(1), b'x'));
        drop(theirs);
        assert_eq!(receive(&ours).await, (Ok(0), 0));
        // SAFETY: there is no buffer.
        let (result, ()) = unsafe { submit((), opcode::Fsync::new(types::Fd(-1)).build()) }.await;
        assert_eq!(result, Err(Errno::from_raw(libc::EBADF)));
    });
}

#[test]
fn more_operations_than_the_ring_has_entries() {
    run(async {
        let (done, mut all) = tokio::sync::mpsc::unbounded_channel();
        let mut ends = Vec::new();
        for number in 0..100_u8 {
            let (ours, theirs) = pair();
            ends.push(theirs);
            let done = done.clone();
            spawn(async move { done.send((number, receive(&ours).await)).unwrap() });
        }
        drop(done);
        // They are all under way before the first ends.
        give_way().await;
        for (number, end) in ends.iter_mut().enumerate() {
            end.write_all(&[u8::try_from(number).unwrap()]).unwrap();
        }
        let mut seen = 0;
        while let Some((number, result)) = all.recv().await {
            assert_eq!(result, (Ok(1), number));
            seen += 1;
        }
        assert_eq!(seen, 100);
    });
}

#[test]
fn what_another_thread_wakes_is_polled() {
    let (send, receive) = tokio::sync::oneshot::channel();
    let other = std::thread::spawn(move || {
        // The reactor sleeps by now, or is about to.
        std::thread::sleep(Duration::from_millis(20));
        send.send(7).unwrap();
    });
    assert_eq!(run(receive), Ok(7));
    other.join().unwrap();
}

#[test]
fn two_threads_speak_to_each_other_for_long() {
    const ROUNDS: u32 = 2000;
    let (there, mut arrived) = tokio::sync::mpsc::channel(1);
    let (back, mut returned) = tokio::sync::mpsc::channel(1);
    let other = std::thread::spawn(move || {
        run(async {
            while let Some(number) = arrived.recv().await {
                back.send(number).await.unwrap();
            }
        });
    });
    run(async move {
        for number in 0..ROUNDS {
            there.send(number).await.unwrap();
            assert_eq!(returned.recv().await, Some(number));
        }
    });
    other.join().unwrap();
}

#[test]
fn what_nobody_waits_for_any_more_keeps_its_memory() {
    /// Tells when it is dropped.
    struct Kept(Rc<Cell<bool>>, Box<u8>, Rc<UnixStream>);
    impl Drop for Kept {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    let dropped = Rc::new(Cell::new(false));
    run(async {
        let (ours, mut theirs) = pair();
        let mut kept = Kept(Rc::clone(&dropped), Box::new(0), Rc::clone(&ours));
        let entry = opcode::Recv::new(types::Fd(kept.2.as_raw_fd()), &raw mut *kept.1, 1).build();
        // SAFETY: the byte is boxed, the descriptor is the stream's, and both are the operation's.
        let mut operation = unsafe { submit(kept, entry) };
        let pending = poll_fn(|context| Poll::Ready(Pin::new(&mut operation).poll(context).is_pending()));
        assert!(pending.await);
        drop(operation);
        give_way().await;
        assert!(!dropped.get(), "the kernel may still write there");
        theirs.write_all(b"x").unwrap();
        while !dropped.get() {
            give_way().await;
        }
    });
}

#[test]
fn what_is_in_flight_at_the_end_is_never_given_back() {
    let weak = run(async {
        let (ours, theirs) = pair();
        let weak = Rc::downgrade(&ours);
        spawn(async move {
            receive(&ours).await.0.unwrap();
        });
        give_way().await;
        std::mem::forget(theirs);
        weak
    });
    assert!(weak.upgrade().is_some());
}

#[test]
fn giving_way_lets_completions_in() {
    run(async {
        let (ours, mut theirs) = pair();
        let received = Rc::new(Cell::new(false));
        let told = Rc::clone(&received);
        spawn(async move { told.set(receive(&ours).await == (Ok(1), b'x')) });
        theirs.write_all(b"x").unwrap();
        // Somebody who is always ready does not keep the ring from its turn.
        let mut rounds = 0;
        while !received.get() {
            give_way().await;
            rounds += 1;
            assert!(rounds < 10);
        }
    });
}

#[test]
fn those_who_are_always_ready_do_not_keep_others_from_the_ring() {
    run(async {
        spawn(poll_fn(|context| {
            context.waker().wake_by_ref();
            Poll::Pending
        }));
        let (ours, mut theirs) = pair();
        theirs.write_all(b"x").unwrap();
        assert_eq!(receive(&ours).await, (Ok(1), b'x'));
    });
}

#[test]
fn sleeping_takes_its_time() {
    let start = std::time::Instant::now();
    run(sleep(Duration::from_millis(15)));
    assert!(start.elapsed() >= Duration::from_millis(15));
}
