//! The server role: stores volumes and serves them over TCP.
//!
//! One thread accepts, reads the first frame of each connection and answers volume messages; after HELLO a socket moves to its
//! volume's owner thread ([`owner`]), where it stays. Whoever has not said what it wants within `limits::HANDSHAKE_TIMEOUT` is
//! disconnected, and there are at most `limits::HANDSHAKES_MAX` of those.

pub(crate) mod connection;
pub(crate) mod fail_stop;
pub(crate) mod host;
pub(crate) mod owner;
pub(crate) mod registry;
pub(crate) mod rude;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::errno::Errno;
use crate::io::boot::boot_id;
use crate::io::disk::aside::Aside;
use crate::io::notify::Notifier;
use crate::io::serve::probe;
use crate::io::serve::tune;
use crate::io::signals::Signals;
use crate::limits;
use crate::roles::server::owner::Mail;
use crate::roles::server::registry::{Registry, random_id};
use crate::store::pool::Refusal;
use crate::units::Id;
use crate::wire::frame::{HEADER_BYTES, Header, Op, message_crc};
use crate::wire::session::Hello;
use crate::wire::volume::{Explained, decode_message, encode_message};

/// How a server is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// The pool's directory; it is made if there is none.
    pub pool: PathBuf,
    /// Owner threads; 0 is one per CPU, at most four.
    pub threads: usize,
    /// Whether to listen beyond loopback although nothing is encrypted or authenticated.
    pub danger_cleartext: bool,
}

/// Why a server does not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartError {
    /// For branching.
    pub errno: Errno,
    /// What, why, and what to do next.
    pub text: String,
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StartError {}

impl From<Refusal> for StartError {
    fn from((errno, text): Refusal) -> StartError {
        StartError { errno, text }
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<SocketAddr>,
    instance: Id,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

/// Runs a server until SIGINT or SIGTERM. To be called before the process has other threads.
pub fn run(config: Config) -> Result<(), StartError> {
    let failed = |error: std::io::Error| StartError {
        errno: Errno::from(&error),
        text: format!("signals cannot be waited for: {error}"),
    };
    let signals = Signals::block().map_err(failed)?;
    raise_descriptor_limit();
    let notifier = Notifier::from_environment().map(Arc::new);
    let server = Server::start_watched(config, notifier.clone())?;
    for address in server.addresses() {
        println!("listening on {address}");
    }
    if let Some(notifier) = &notifier {
        notifier.ready("serving volumes");
    }
    let told = signals.wait().map_err(failed)?;
    info!(?told, "stopping");
    if let Some(notifier) = &notifier {
        notifier.stopping();
    }
    server.stop();
    Ok(())
}

/// Connections and volumes each take descriptors, and the usual soft limit is for programs that use select().
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

impl Server {
    /// Opens the pool, listens, and serves from threads of its own.
    pub fn start(config: Config) -> Result<Server, StartError> {
        Server::start_watched(config, None)
    }

    /// The same, and feeds the watchdog of `notifier` while all of its threads go round.
    pub fn start_watched(config: Config, notifier: Option<Arc<Notifier>>) -> Result<Server, StartError> {
        probe().map_err(|errno| StartError {
            errno,
            text: format!(
                "the server needs io_uring, and the kernel refuses it: {}; see the sysctl kernel.io_uring_disabled, and what a container may do",
                errno.text()
            ),
        })?;
        let listeners = listen(&config)?;
        let instance = random_id()?;
        // Without the kernel's word each life is taken for another boot: too many losses are told, never too few.
        let boot = boot_id().or_else(|_| random_id())?;
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(limits::SERVER_THREADS_MAX),
            given => given,
        };
        let (owners, mailboxes): (Vec<_>, Vec<_>) =
            (0..threads).map(|_| mpsc::channel(limits::SERVER_MAILBOX_MAX)).unzip();
        let registry = Arc::new(Registry::open(&config.pool, boot, owners.clone())?);
        let (stop, stopping) = watch::channel(false);
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        let mut server = Server { addresses, instance, stop, threads: Vec::new() };
        for (index, mailbox) in mailboxes.into_iter().enumerate() {
            let rude = registry.rude().clone();
            let aside = Aside::start(format!("aside-{index}")).map_err(|error| thread_failed(&error))?;
            server.spawn(format!("owner-{index}"), move || owner::run((instance, boot), mailbox, aside, rude))?;
        }
        let (volumes, _) = registry.counts();
        let accepting = Arc::clone(&registry);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| thread_failed(&error))?;
        server.spawn("accept".to_owned(), move || {
            let fed = notifier.map(|notifier| feed(notifier, owners.clone()));
            runtime.block_on(accept(listeners, accepting, stopping, fed));
            for owner in owners {
                let _ = owner.blocking_send(Mail::Stop);
            }
            runtime.shutdown_timeout(limits::STOP_TIMEOUT);
        })?;
        for address in &server.addresses {
            info!(%address, pool = %config.pool.display(), volumes, %instance, "serving");
        }
        Ok(server)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name).spawn(body).map_err(|error| thread_failed(&error))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Where it listens, with the ports that were taken for 0.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// This life of the server, as told in the answer to HELLO.
    pub fn instance(&self) -> Id {
        self.instance
    }

    /// Closes every connection, waits for what is on the disk, and ends.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("a thread of the server had failed");
            }
        }
    }
}

fn thread_failed(error: &std::io::Error) -> StartError {
    StartError { errno: Errno::from(error), text: format!("a thread of the server cannot be started: {error}") }
}

fn listen(config: &Config) -> Result<Vec<TcpListener>, StartError> {
    if config.listen.is_empty() {
        let text = "no address to listen on; use --listen ADDRESS:PORT".to_owned();
        return Err(StartError { errno: Errno::EINVAL, text });
    }
    config.listen.iter().map(|address| listen_on(*address, config.danger_cleartext)).collect()
}

fn listen_on(address: SocketAddr, cleartext: bool) -> Result<TcpListener, StartError> {
    if !address.ip().is_loopback() && !cleartext {
        let text = format!(
            "listening on {address} would offer every volume, unencrypted, to anyone who reaches it; use a loopback address, or --danger-cleartext on a network that you trust"
        );
        return Err(StartError { errno: Errno::EPERM, text });
    }
    let listening = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listening.map_err(|error| {
        let errno = Errno::from(&error);
        let next = match errno {
            Errno::EADDRINUSE => "; another server has the port: stop it, or choose another",
            Errno::EACCES => "; ports below 1024 need privileges",
            _ => "; is it an address of this machine?",
        };
        StartError { errno, text: format!("cannot listen on {address}: {}{next}", errno.text()) }
    })
}

/// Accepts until told to stop.
async fn accept(
    listeners: Vec<TcpListener>,
    registry: Arc<Registry>,
    mut stopping: watch::Receiver<bool>,
    fed: Option<impl Future<Output = ()> + Send + 'static>,
) {
    if let Some(fed) = fed {
        tokio::spawn(fed);
    }
    let room = Arc::new(Semaphore::new(limits::HANDSHAKES_MAX));
    for listener in listeners {
        let (registry, room) = (Arc::clone(&registry), Arc::clone(&room));
        tokio::spawn(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => accept_from(&listener, &registry, &room).await,
                Err(error) => warn!(%error, "a listener cannot be used"),
            }
        });
    }
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Feeds the service manager's watchdog while this thread goes round, and each owner has since the last time.
async fn feed(notifier: Arc<Notifier>, owners: Vec<mpsc::Sender<Mail>>) {
    let Some(watchdog) = notifier.watchdog() else { return };
    loop {
        for owner in &owners {
            let (asked, answer) = oneshot::channel();
            if owner.send(Mail::Mark(asked)).await.is_err() || answer.await.is_err() {
                // It has ended: so does the server.
                return;
            }
        }
        notifier.alive();
        tokio::time::sleep(watchdog / limits::WATCHDOG_BEATS).await;
    }
}

async fn accept_from(listener: &tokio::net::TcpListener, registry: &Arc<Registry>, room: &Arc<Semaphore>) {
    loop {
        let Ok(place) = Arc::clone(room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let registry = Arc::clone(registry);
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(rude) = greet(stream, peer, &registry).await {
                        registry.rude().tell(peer, "", &rude);
                    }
                });
            }
            Err(error) => {
                // No descriptors left, most likely: others must end first.
                warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Reads one whole message; `None` when the peer has ended.
async fn read_message(stream: &mut TcpStream) -> Result<Option<(Header, Vec<u8>)>, String> {
    let mut head = [0; HEADER_BYTES];
    if stream.read_exact(&mut head).await.is_err() {
        return Ok(None);
    }
    let header = Header::decode(&head).map_err(|error| error.to_string())?;
    if header.is_reply() || !header.op.has_message() {
        return Err("it did not start with HELLO or a volume message".to_owned());
    }
    // Bounded by decode: at most MESSAGE_BYTES_MAX.
    let mut body = vec![0; header.body_bytes as usize];
    let whole = stream.read_exact(&mut body).await.is_ok();
    Ok(whole.then_some((header, body)))
}

/// Answers volume messages until the peer says HELLO or goes. The error says what is wrong with what the peer does.
async fn greet(mut stream: TcpStream, peer: SocketAddr, registry: &Arc<Registry>) -> Result<(), String> {
    loop {
        let Ok(read) = tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, read_message(&mut stream)).await else {
            debug!(%peer, "closed: it said nothing for too long");
            return Ok(());
        };
        let Some((header, body)) = read? else { return Ok(()) };
        if header.op == Op::Hello {
            return hello(stream, peer, registry, header, &body).await;
        }
        let reply = answer(registry, &header, &body).await;
        let sent = tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, stream.write_all(&reply)).await;
        if !matches!(sent, Ok(Ok(()))) {
            return Ok(());
        }
    }
}

/// Hands a connection over to its volume, or says why not.
async fn hello(
    stream: TcpStream,
    peer: SocketAddr,
    registry: &Arc<Registry>,
    header: Header,
    body: &[u8],
) -> Result<(), String> {
    if message_crc(body) != header.body_crc {
        return Err("its HELLO arrived damaged".to_owned());
    }
    let hello = Hello::decode(body).map_err(|error| error.to_string())?;
    let volume = hello.volume.clone();
    let mut stream = Some(stream);
    let into_std = || {
        let stream = stream.take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))?;
        let stream = stream.into_std()?;
        tune(&stream)?;
        Ok(stream)
    };
    let attached =
        tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, registry.attach(into_std, peer, hello, header)).await;
    let (errno, text) = match attached {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(refusal)) => refusal,
        Err(_) => (
            Errno::ETIMEDOUT,
            format!("volume '{volume}' is not ready: the disk still works for a former server; try again"),
        ),
    };
    warn!(volume, %peer, ?errno, "HELLO refused: {text}");
    let Some(mut stream) = stream else { return Ok(()) };
    let frame = explained(&header, errno, text);
    let _ = tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, stream.write_all(&frame)).await;
    Ok(())
}

fn explained(header: &Header, errno: Errno, text: String) -> Vec<u8> {
    let reply = header.reply(Err(errno));
    encode_message(reply, &Explained { error: text }).unwrap_or_else(|_| reply.encode().to_vec())
}

/// The answer to a volume message.
async fn answer(registry: &Arc<Registry>, header: &Header, body: &[u8]) -> Vec<u8> {
    match header.op {
        Op::VolumeCreate => reply(header, body, |ask| registry.create(ask)).await,
        Op::VolumeList => reply(header, body, |ask| registry.list(ask)).await,
        Op::VolumeStat => reply(header, body, |ask| registry.stat(ask)).await,
        Op::VolumeResize => reply(header, body, |ask| registry.resize(ask)).await,
        Op::VolumeRemove => reply(header, body, |ask| registry.remove(ask)).await,
        Op::VolumeAssign => reply(header, body, |ask| registry.assign(ask)).await,
        Op::VolumeFree => reply(header, body, |ask| registry.free(ask)).await,
        Op::LabelPut => reply(header, body, |ask| registry.put_label(ask)).await,
        Op::Regions => reply(header, body, |ask| registry.regions(ask)).await,
        _ => explained(header, Errno::EOPNOTSUPP, "this is not a volume message".to_owned()),
    }
}

async fn reply<Q: DeserializeOwned, A: Serialize, F: Future<Output = Result<A, Refusal>>>(
    header: &Header,
    body: &[u8],
    act: impl FnOnce(Q) -> F,
) -> Vec<u8> {
    let result = match decode_message(header, body) {
        Ok(ask) => act(ask).await,
        Err(errno) => Err((errno, format!("the message cannot be understood: {}", errno.text()))),
    };
    let whole = result.and_then(|answer| {
        encode_message(header.reply(Ok(())), &answer)
            .map_err(|errno| (errno, "the answer does not fit a message".to_owned()))
    });
    whole.unwrap_or_else(|(errno, text)| explained(header, errno, text))
}
