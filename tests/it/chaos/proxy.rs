//! A bad network between the array daemon and one server: it knows where frames end, so it can count messages, and does to them what
//! its dice say. It never changes a byte, but in the fault `flip`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dst::limits;
use dst::wire::frame::HEADER_BYTES;

use super::dice::Dice;
use crate::farm::free_address;

/// How often a pump that waits looks whether its connection has come to its end.
const LOOK: Duration = Duration::from_millis(20);

/// What happens to messages: each once in so many, 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Both sides of the connection are closed after some byte of the message.
    pub(crate) cut: u32,
    /// The message waits, and what is behind it.
    pub(crate) delay: u32,
    /// From some byte of the message on the connection is silent, one way or both ways, though both sides see it open; then it is cut.
    pub(crate) mute: u32,
    /// One bit of the message changes.
    pub(crate) flip: u32,
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    Connections,
    Messages,
    Cuts,
    Delays,
    Mutes,
    Flips,
}

struct Shared {
    upstream: String,
    seed: u64,
    faults: Mutex<Faults>,
    counts: [AtomicU64; 6],
    ended: AtomicBool,
    pairs: Mutex<Vec<Weak<Pair>>>,
}

impl Shared {
    fn add(&self, what: Count) {
        self.counts[what as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Both halves of a connection: [0] to the array, [1] to the server.
struct Pair {
    sides: [TcpStream; 2],
    over: AtomicBool,
    /// Bit n: what comes from side n is swallowed.
    muted: AtomicU8,
    /// When a muted connection is cut.
    until: Mutex<Option<Instant>>,
}

impl Pair {
    fn cut(&self, hard: bool) {
        if self.over.swap(true, Ordering::SeqCst) {
            return;
        }
        for side in &self.sides {
            if hard {
                // Reset: what is still in the socket's buffer is lost.
                let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = nix::sys::socket::setsockopt(side, nix::sys::socket::sockopt::Linger, &linger);
            } else {
                let _ = side.shutdown(Shutdown::Both);
            }
        }
    }

    fn mute(&self, ways: u8, time: Option<Duration>) {
        *self.until.lock().unwrap() = time.map(|time| Instant::now() + time);
        self.muted.store(ways, Ordering::SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        if self.until.lock().unwrap().is_some_and(|until| until <= Instant::now()) {
            self.cut(false);
        }
        if self.over.load(Ordering::SeqCst) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    /// Fills the buffer from one side.
    fn take(&self, side: usize, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            self.check()?;
            match (&self.sides[side]).read(&mut buffer[done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends the bytes that came from side `from` to the other one, or swallows them.
    fn give(&self, from: usize, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.check()?;
            if self.muted.load(Ordering::SeqCst) & 1 << from != 0 {
                return Ok(());
            }
            match (&self.sides[1 - from]).write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// See the module's description. Ends with its drop.
pub(crate) struct Proxy {
    /// What the array is to connect to.
    pub(crate) address: String,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// In front of the server at `upstream`; does no harm yet.
    pub(crate) fn new(upstream: &str, seed: u64) -> Proxy {
        let address = free_address();
        let listener = TcpListener::bind(&address).unwrap();
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            seed,
            faults: Mutex::default(),
            counts: Default::default(),
            ended: AtomicBool::new(false),
            pairs: Mutex::default(),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Proxy { address, shared, acceptor: Some(acceptor) }
    }

    /// From now on.
    pub(crate) fn set(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap() = faults;
    }

    pub(crate) fn count(&self, what: Count) -> u64 {
        self.shared.counts[what as usize].load(Ordering::Relaxed)
    }

    /// Swallows everything on the connections that there are, both ways, until somebody gives them up. How many these were.
    pub(crate) fn mute_all(&self) -> usize {
        let pairs: Vec<_> = self.shared.pairs.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
        pairs.iter().for_each(|pair| pair.mute(0b11, None));
        pairs.len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for pair in self.shared.pairs.lock().unwrap().drain(..).filter_map(|pair| pair.upgrade()) {
            pair.cut(false);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for number in 0.. {
        let Ok((near, _)) = listener.accept() else { return };
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        // A server that is not there: the asker sees its connection closed before a word was said.
        let Ok(far) = TcpStream::connect(&shared.upstream) else { continue };
        for side in [&near, &far] {
            side.set_nodelay(true).unwrap();
            side.set_read_timeout(Some(LOOK)).unwrap();
            side.set_write_timeout(Some(LOOK)).unwrap();
        }
        shared.add(Count::Connections);
        let pair = Arc::new(Pair {
            sides: [near, far],
            over: AtomicBool::new(false),
            muted: AtomicU8::new(0),
            until: Mutex::default(),
        });
        let mut pairs = shared.pairs.lock().unwrap();
        pairs.retain(|pair| pair.strong_count() > 0);
        pairs.push(Arc::downgrade(&pair));
        drop(pairs);
        for from in 0..2usize {
            let (shared, pair) = (Arc::clone(shared), Arc::clone(&pair));
            let dice = Dice::new(shared.seed ^ number << 1 ^ from as u64);
            std::thread::spawn(move || {
                // However it ends, the other half ends too.
                let _ = pump(&shared, &pair, from, dice);
                pair.cut(false);
            });
        }
    }
}

/// Carries frames from one side to the other.
fn pump(shared: &Shared, pair: &Pair, from: usize, mut dice: Dice) -> io::Result<()> {
    let mut frame = vec![0; HEADER_BYTES];
    loop {
        frame.resize(HEADER_BYTES, 0);
        pair.take(from, &mut frame)?;
        let body = u32::from_le_bytes(frame[28..32].try_into().unwrap());
        // What is no frame would be a fault of ours or of the daemons.
        assert!(frame[..4] == *b"dst\x01" && body <= limits::PAYLOAD_BYTES_MAX, "{frame:x?}");
        frame.resize(HEADER_BYTES + body as usize, 0);
        pair.take(from, &mut frame[HEADER_BYTES..])?;
        shared.add(Count::Messages);
        carry(shared, pair, from, &mut frame, &mut dice)?;
    }
}

/// One frame, and what becomes of it.
fn carry(shared: &Shared, pair: &Pair, from: usize, frame: &mut [u8], dice: &mut Dice) -> io::Result<()> {
    let faults = *shared.faults.lock().unwrap();
    let muted = pair.muted.load(Ordering::SeqCst) != 0;
    if dice.one_in(faults.flip) {
        let at = dice.index(frame.len());
        frame[at] ^= 1 << dice.below(8);
        shared.add(Count::Flips);
    }
    if dice.one_in(faults.delay) {
        shared.add(Count::Delays);
        std::thread::sleep(dice.millis(1, 80));
    }
    if dice.one_in(faults.cut) && !muted {
        pair.give(from, &frame[..dice.index(frame.len() + 1)])?;
        shared.add(Count::Cuts);
        pair.cut(dice.one_in(2));
    } else if dice.one_in(faults.mute) && !muted {
        pair.give(from, &frame[..dice.index(frame.len() + 1)])?;
        shared.add(Count::Mutes);
        let ways = [1 << from, 0b11][dice.index(2)];
        pair.mute(ways, Some(dice.millis(100, 1500)));
        return Ok(());
    }
    if !dice.one_in(8) {
        return pair.give(from, frame);
    }
    // In pieces, so that whoever reads sees borders everywhere.
    let mut rest = &*frame;
    while !rest.is_empty() {
        let longest = 64 << dice.below(8);
        let (piece, more) = rest.split_at(rest.len().min(1 + dice.index(longest)));
        pair.give(from, piece)?;
        rest = more;
    }
    Ok(())
}
