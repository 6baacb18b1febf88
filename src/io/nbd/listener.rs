//! Where NBD clients come in: one socket, one thread that accepts, and a seat at one of the array's I/O threads for each client,
//! in turn.
//!
//! Contract: nothing here waits for an I/O thread. A client for whom no thread has room is closed at once. A unix socket is
//! reachable by its owner alone, replaces only a socket that nobody answers on, and is gone after the stop.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};

use crate::errno::Errno;
use crate::limits;
use crate::wire::nbd::address::NbdAddress;

/// The giving end of an I/O thread's queue of new clients.
pub struct Seat {
    sender: SyncSender<OwnedFd>,
    event: Arc<EventFd>,
    clients: Arc<AtomicUsize>,
}

/// The taking end; belongs to the thread's frontend.
pub struct Door {
    receiver: Receiver<OwnedFd>,
    event: Arc<EventFd>,
    clients: Arc<AtomicUsize>,
}

/// A queue of new clients for one I/O thread.
pub fn seat() -> io::Result<(Seat, Door)> {
    let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
    let (sender, receiver) = sync_channel(limits::NBD_SEATS_MAX);
    let clients = Arc::new(AtomicUsize::new(0));
    let seat = Seat { sender, event: Arc::clone(&event), clients: Arc::clone(&clients) };
    Ok((seat, Door { receiver, event, clients }))
}

impl Seat {
    /// Gives the client to the thread, or back when its queue is full or it has ended.
    fn offer(&self, client: OwnedFd) -> Result<(), OwnedFd> {
        use std::sync::mpsc::TrySendError::{Disconnected, Full};
        self.sender.try_send(client).map_err(|error| match error {
            Full(client) | Disconnected(client) => client,
        })?;
        // A counter at its end wakes the thread just as well.
        let _ = self.event.write(1);
        Ok(())
    }
}

impl Door {
    /// The next client.
    pub(crate) fn next(&mut self) -> Option<OwnedFd> {
        self.receiver.try_recv().ok()
    }

    /// Tells how many clients the thread has.
    pub(crate) fn show_clients(&self, count: usize) {
        self.clients.store(count, Ordering::Relaxed);
    }

    /// What becomes readable when there are clients: eight bytes.
    pub(crate) fn event(&self) -> i32 {
        self.event.as_raw_fd()
    }
}

enum Socket {
    Unix(UnixListener, #[expect(dead_code, reason = "removes the file when it is dropped")] SocketFile),
    Tcp(TcpListener),
}

/// Why nobody can listen at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenError {
    /// For branching.
    pub errno: Errno,
    /// What, why, and what to do next.
    pub text: String,
}

impl ListenError {
    fn new(address: &NbdAddress, error: &io::Error) -> ListenError {
        let (errno, advice) = match error.kind() {
            io::ErrorKind::AddrInUse => (Errno::EADDRINUSE, "; choose another address, or stop who listens there"),
            io::ErrorKind::AlreadyExists => (Errno::EEXIST, "; choose another path, or remove the file"),
            io::ErrorKind::PermissionDenied => (Errno::EACCES, "; run as root, or choose a place you may write to"),
            io::ErrorKind::NotFound => (Errno::ENOENT, "; create its directory first"),
            io::ErrorKind::AddrNotAvailable => (Errno::from(error), "; use an address of this machine"),
            _ => (Errno::from(error), ""),
        };
        ListenError { errno, text: format!("cannot listen on {address}: {error}{advice}") }
    }
}

impl std::fmt::Display for ListenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for ListenError {}

/// A bound socket on which nobody is accepted yet.
pub struct Bound {
    socket: Socket,
    address: NbdAddress,
}

/// Accepts until it is dropped.
pub struct Listener {
    address: NbdAddress,
    clients: Vec<Arc<AtomicUsize>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Bound {
    /// Binds. The error says what is in the way.
    pub fn new(address: &NbdAddress) -> Result<Bound, ListenError> {
        let explain = |error: io::Error| ListenError::new(address, &error);
        let (socket, address) = match address {
            NbdAddress::Unix(path) => {
                let (listener, file) = bind_unix(path).map_err(explain)?;
                (Socket::Unix(listener, file), address.clone())
            }
            NbdAddress::Tcp { host, port } => {
                let listener = bind_tcp(host, *port).map_err(explain)?;
                let port = listener.local_addr().map_err(explain)?.port();
                (Socket::Tcp(listener), NbdAddress::Tcp { host: host.clone(), port })
            }
        };
        Ok(Bound { socket, address })
    }

    /// Where clients find it; the port is the real one.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// Starts to accept, for the I/O threads behind `seats`.
    pub fn start(self, seats: Vec<Seat>) -> io::Result<Listener> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let socket = self.socket;
        let clients = seats.iter().map(|seat| Arc::clone(&seat.clients)).collect();
        let thread = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .stack_size(limits::THREAD_STACK_BYTES)
            .spawn(move || accept_until(&socket, &seats, &stopped))?;
        Ok(Listener { address: self.address, clients, stop, thread: Some(thread) })
    }
}

impl Listener {
    /// Where clients find it.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// Clients that are connected now.
    pub fn clients(&self) -> usize {
        self.clients.iter().map(|clients| clients.load(Ordering::Relaxed)).sum()
    }

    /// The same as it will be, by I/O thread.
    pub fn counters(&self) -> Vec<Arc<AtomicUsize>> {
        self.clients.clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The counter cannot be full: this is its one write.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // It ended by panic: there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

/// The accepting thread.
fn accept_until(socket: &Socket, seats: &[Seat], stop: &EventFd) {
    let mut turn = 0;
    // After an error (out of descriptors, most likely) wait a little instead of spinning.
    let mut pause = false;
    loop {
        let mut ready = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(socket.fd(), PollFlags::POLLIN)];
        let (watched, timeout) =
            if pause { (&mut ready[..1], 100u16.into()) } else { (&mut ready[..], PollTimeout::NONE) };
        let polled = poll(watched, timeout);
        if ready[0].any().unwrap_or(true) {
            return;
        }
        if polled.is_err() || !ready[1].any().unwrap_or(false) {
            pause = false;
            continue;
        }
        match socket.accept() {
            Ok(client) => place(client, seats, &mut turn),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD client");
                pause = true;
            }
        }
    }
}

/// Gives a client to the next thread that has room.
fn place(mut client: OwnedFd, seats: &[Seat], turn: &mut usize) {
    for _ in 0..seats.len() {
        let seat = &seats[*turn % seats.len()];
        *turn = turn.wrapping_add(1);
        match seat.offer(client) {
            Ok(()) => return,
            Err(back) => client = back,
        }
    }
    tracing::warn!("an NBD client was turned away: no I/O thread has room");
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(listener, _) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }

    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Socket::Unix(listener, _) => listener.accept().map(|(client, _)| {
                widen(&client);
                client.into()
            }),
            Socket::Tcp(listener) => listener.accept().and_then(|(client, _)| tune(&client).map(|()| client.into())),
        }
    }
}

/// Room for large answers. Beyond the system's limit it takes a privilege; without it there is less room.
fn widen(client: &UnixStream) {
    let bytes = limits::NBD_SEND_BYTES;
    let _ = socket::setsockopt(client, sockopt::SndBufForce, &bytes)
        .or_else(|_| socket::setsockopt(client, sockopt::SndBuf, &bytes));
}

/// No delay; and a client that has vanished is noticed.
fn tune(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let interval = u32::try_from(limits::KEEPALIVE_INTERVAL.as_secs()).unwrap_or(u32::MAX);
    socket::setsockopt(client, sockopt::KeepAlive, &true)?;
    socket::setsockopt(client, sockopt::TcpKeepIdle, &interval)?;
    socket::setsockopt(client, sockopt::TcpKeepInterval, &interval)?;
    socket::setsockopt(client, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

fn bind_tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    let listener = TcpListener::bind(&addresses[..])?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The name of a listening unix socket; taken away with it.
struct SocketFile {
    path: PathBuf,
    /// Device and inode: only our own socket is removed.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Someone else removed it first.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path)? };
    // Nobody can connect before `listen`, so there is no moment with other permissions.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    socket::listen(&socket, socket::Backlog::new(64)?)?;
    Ok((UnixListener::from(socket), file))
}

/// Removes a socket that nobody listens on; anything else in the way is left alone.
fn remove_stale(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        // Connected, or too busy to say: someone is there.
        _ => Err(io::Error::from(io::ErrorKind::AddrInUse)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::{Duration, Instant};

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("dst-nbd-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    /// What arrives at the door within a few seconds.
    fn wait(door: &mut Door) -> OwnedFd {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(client) = door.next() {
                return client;
            }
            assert!(Instant::now() < until, "no client came");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn clients_are_seated_in_turn_and_turned_away_when_full() {
        let path = scratch("turn");
        let bound = Bound::new(&NbdAddress::Unix(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let ((first, mut door1), (second, door2)) = (seat().unwrap(), seat().unwrap());
        let listener = bound.start(vec![first, second]).unwrap();
        // One thread is gone: the other gets everyone.
        drop(door2);
        let _clients: Vec<_> = (0..limits::NBD_SEATS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut late = UnixStream::connect(&path).unwrap();
        late.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(late.read(&mut [0]).unwrap(), 0, "closed");
        (0..limits::NBD_SEATS_MAX).for_each(|_| drop(wait(&mut door1)));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
        let path = scratch("stale");
        let address = NbdAddress::Unix(path.clone());
        let first = Bound::new(&address).unwrap();
        let error = Bound::new(&address).err().unwrap();
        assert_eq!(error.errno, Errno::EADDRINUSE, "{error}");
        drop(first);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind");
        drop(Bound::new(&address).unwrap());
        fs::write(&path, "data").unwrap();
        assert_eq!(Bound::new(&address).err().unwrap().errno, Errno::EEXIST);
        assert_eq!(fs::read(&path).unwrap(), b"data");
        fs::remove_file(&path).unwrap();
        let missing = NbdAddress::Unix(path.join("no/such/place"));
        assert_eq!(Bound::new(&missing).err().unwrap().errno, Errno::ENOENT);
    }

    #[test]
    fn tcp_tells_the_port_it_got() {
        let bound = Bound::new(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let NbdAddress::Tcp { host, port } = bound.address().clone() else { panic!() };
        assert!(port > 0);
        let error = Bound::new(&bound.address().clone()).err().unwrap();
        assert!(error.to_string().contains("choose another address"), "{error}");
        let (seat, mut door) = seat().unwrap();
        let listener = bound.start(vec![seat]).unwrap();
        let client = TcpStream::connect((host.as_str(), port)).unwrap();
        drop(wait(&mut door));
        drop((client, listener));
    }
}
