//! HTTP/JSON under `/v1` on a unix socket: hyper on one thread of its own, knowing nothing but [`Service`].
//!
//! Views are answered from what the service publishes and never wait. A command's answer comes when it is done, and other
//! requests go on meanwhile. Connections, bodies and the time to send a request are bounded. The socket is 0600, a directory made
//! for it 0700, and a peer of another user than root or the daemon's own is refused.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, oneshot};

use crate::control::command::{API_VERSION, Answer, Arrays, Ask, Command, Refusal, Version, route};
use crate::control::device::{Device, Devices};
use crate::control::metrics;
use crate::control::status::ArrayStatus;
use crate::control::tree;
use crate::control::upgrade::{Upgrade, Upgraded};
use crate::control::why::Why;
use crate::errno::Errno;
use crate::limits;

pub mod scrape;

/// Called once with a command's answer, from a thread that must not wait.
pub type Reply = Box<dyn FnOnce(Result<Answer, Refusal>) + Send>;

/// What stands behind the socket.
pub trait Service: Send + Sync + 'static {
    /// All arrays as they are now. Never waits.
    fn list(&self) -> Vec<ArrayStatus>;

    /// One array as it is now. Never waits.
    fn get(&self, name: &str) -> Option<ArrayStatus>;

    /// What an array's requests wait for; `None`: there is none of that name. Waits a little for I/O threads, never for I/O.
    fn why(&self, name: &str) -> Option<Why>;

    /// The block devices of this machine that are dst's. Waits for the driver, within bounds.
    fn devices(&self) -> Result<Vec<Device>, Refusal>;

    /// Removes one that a dead daemon has left; refused while it is in use, unless `force`. Waits for the driver, within bounds.
    fn delete_device(&self, id: u32, force: bool) -> Result<Device, Refusal>;

    /// Has the daemon go on as what is installed now; refused while NBD clients are connected, unless `force`. Waits for that program's
    /// first word, within bounds.
    fn upgrade(&self, force: bool) -> Result<Upgrade, Refusal>;

    /// What the last upgrade was for each array. Never waits.
    fn upgraded(&self) -> Upgraded;

    /// Hands a command on. Never waits: when too many are waiting it is answered at once.
    fn submit(&self, command: Command, reply: Reply);
}

/// A socket that is served until this is dropped.
pub struct Server {
    path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A socket that nobody else can have any more. Who connects waits until it is served.
pub struct Bound {
    path: PathBuf,
    listener: UnixListener,
}

impl Bound {
    /// Takes the socket, in place of one that nobody serves any more.
    pub fn new(path: &Path) -> Result<Bound, Refusal> {
        Ok(Bound { path: path.to_owned(), listener: bind(path)? })
    }

    /// Serves it from a thread of its own.
    /// With `metrics` the figures are served there, too: see [`scrape`].
    pub fn serve(self, service: Arc<dyn Service>, metrics: Option<TcpListener>) -> Result<Server, Refusal> {
        let Bound { path, listener } = self;
        let (stop, stopped) = oneshot::channel();
        let failed =
            |error: io::Error| Refusal::new(Errno::from(&error), format!("cannot serve {}: {error}", path.display()));
        listener.set_nonblocking(true).map_err(failed)?;
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().thread_stack_size(limits::THREAD_STACK_BYTES).build().map_err(failed)?;
        let serve = move || {
            runtime.block_on(async move {
                let seats = Arc::new(Semaphore::new(limits::HTTP_CONNECTIONS_MAX));
                if let Some(metrics) = metrics {
                    tokio::spawn(scrape::accept(metrics, Arc::clone(&service)));
                }
                match tokio::net::UnixListener::from_std(listener) {
                    Ok(listener) => tokio::select! {
                        () = accept(listener, service, &seats) => {}
                        _ = stopped => {}
                    },
                    Err(error) => tracing::error!(%error, "the control socket cannot be served"),
                }
                // Answers that are ready still go out; who only keeps a connection open is not waited for longer.
                let all = u32::try_from(limits::HTTP_CONNECTIONS_MAX).unwrap_or(u32::MAX);
                let _ = tokio::time::timeout(limits::HTTP_GRACE, seats.acquire_many(all)).await;
            });
        };
        let thread = std::thread::Builder::new()
            .name("dst-http".to_owned())
            .stack_size(limits::THREAD_STACK_BYTES)
            .spawn(serve)
            .map_err(failed)?;
        Ok(Server { path, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody connects to a socket that answers nobody.
        let _ = fs::remove_file(&self.path);
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bind(path: &Path) -> Result<UnixListener, Refusal> {
    let failed = |what: &str, error: &io::Error| {
        let next = match error.kind() {
            io::ErrorKind::PermissionDenied => ": run dstd as root, or choose another --socket",
            _ => "",
        };
        Refusal::new(Errno::from(error), format!("cannot {what} {}: {error}{next}", path.display()))
    };
    if path.as_os_str().len() > limits::SOCKET_PATH_BYTES_MAX {
        let text = format!(
            "the path of the socket is too long: {} has {} bytes, the kernel takes {}; choose another --socket",
            path.display(),
            path.as_os_str().len(),
            limits::SOCKET_PATH_BYTES_MAX
        );
        return Err(Refusal::new(Errno::EINVAL, text));
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|error| failed("make the directory of the socket", &error))?;
    }
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(Refusal::new(Errno::EEXIST, format!("{} is there and is not a socket", path.display())));
        }
        if UnixStream::connect(path).is_ok() {
            let text = format!("another dstd serves {}: stop that one, or choose another --socket", path.display());
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        fs::remove_file(path).map_err(|error| failed("replace the dead socket", &error))?;
    }
    let listener = UnixListener::bind(path).map_err(|error| failed("bind", &error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|error| failed("protect", &error))?;
    Ok(listener)
}

async fn accept(listener: tokio::net::UnixListener, service: Arc<dyn Service>, seats: &Arc<Semaphore>) {
    loop {
        let Ok(seat) = Arc::clone(seats).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back.
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(limits::RECONNECT_MIN).await;
                continue;
            }
        };
        let service = Arc::clone(&service);
        let current = tokio::runtime::Handle::current();
        current.spawn(async move {
            serve(stream, service).await;
            drop(seat);
        });
    }
}

async fn serve(stream: tokio::net::UnixStream, service: Arc<dyn Service>) {
    let own = nix::unistd::geteuid().as_raw();
    let welcome = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own);
    let answer = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move {
            let result = if welcome { respond(request, &service).await } else { Err(stranger()) };
            Ok::<_, Infallible>(result.unwrap_or_else(|refusal| json(refusal.http_status(), &refusal.problem())))
        }
    });
    connection(stream, answer).await;
}

/// Serves one connection to its end, within bounds.
async fn connection<S, A>(stream: S, answer: A)
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: hyper::service::Service<Request<Incoming>, Response = Response<Full<Bytes>>, Error = Infallible>,
{
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HTTP_IDLE_MAX)
        .max_buf_size(limits::HTTP_HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection ended");
    }
}

fn stranger() -> Refusal {
    Refusal::new(Errno::EACCES, "only root and the user that dstd runs as may use this socket: run dst as one of them")
}

async fn respond(request: Request<Incoming>, shared: &Arc<dyn Service>) -> Result<Response<Full<Bytes>>, Refusal> {
    let service = &**shared;
    let (head, body) = request.into_parts();
    let body = Limited::new(body, limits::HTTP_BODY_BYTES_MAX).collect();
    let body = match tokio::time::timeout(limits::HTTP_IDLE_MAX, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return Err(Refusal::new(Errno::EOVERFLOW, format!("the request cannot be read: {error}"))),
        Err(_) => return Err(Refusal::new(Errno::ETIMEDOUT, "the request was not sent in time")),
    };
    match route(head.method.as_str(), head.uri.path(), head.uri.query().unwrap_or(""), &body)? {
        Ask::Version => {
            let version = env!("CARGO_PKG_VERSION").to_owned();
            Ok(json(200, &Version { version, api: API_VERSION, pid: std::process::id() }))
        }
        Ask::List => Ok(json(200, &Arrays { arrays: service.list() })),
        Ask::Get(name) => match service.get(&name) {
            Some(array) => Ok(json(200, &array)),
            None => Err(Refusal::no_such_array(&name)),
        },
        Ask::Why(name) => {
            let asked = name.clone();
            let why = aside(shared, move |service| service.why(&asked)).await?;
            Ok(json(200, &why.ok_or_else(|| Refusal::no_such_array(&name))?))
        }
        Ask::Devices => Ok(json(200, &Devices { devices: aside(shared, |service| service.devices()).await?? })),
        Ask::DeleteDevice(id, force) => {
            Ok(json(200, &aside(shared, move |service| service.delete_device(id, force)).await??))
        }
        Ask::Upgrade(force) => Ok(json(200, &aside(shared, move |service| service.upgrade(force)).await??)),
        Ask::Upgraded => Ok(json(200, &service.upgraded())),
        Ask::Metrics => Ok(figures(&service.list())),
        Ask::Tree(path) => Ok(json(200, &tree::entries(&about(service, &path), &path)?)),
        Ask::Store(path, value) => perform(tree::store(&about(service, &path), &path, &value)?, service).await,
        Ask::Do(command) => perform(command, service).await,
    }
}

/// Asks something for which must be waited, in a thread that may.
async fn aside<A: Send + 'static>(
    service: &Arc<dyn Service>,
    ask: impl FnOnce(&dyn Service) -> A + Send + 'static,
) -> Result<A, Refusal> {
    let service = Arc::clone(service);
    let answer = tokio::task::spawn_blocking(move || ask(&*service)).await;
    answer.map_err(|_| Refusal::new(Errno::EIO, "a defect of dstd: see its log"))
}

/// The arrays that a path of the control tree is about.
fn about(service: &dyn Service, path: &str) -> Vec<ArrayStatus> {
    match tree::array_of(path) {
        Some(name) => service.get(name).into_iter().collect(),
        None => service.list(),
    }
}

async fn perform(command: Command, service: &dyn Service) -> Result<Response<Full<Bytes>>, Refusal> {
    let (reply, answer) = oneshot::channel();
    // The asker may have gone; what was done stays done.
    service.submit(command, Box::new(move |result| drop(reply.send(result))));
    let ended = || Refusal::new(Errno::ESHUTDOWN, "dstd ended before this was done: see its log");
    let answer = answer.await.map_err(|_| ended())??;
    Ok(json(200, &answer))
}

fn json<T: Serialize>(status: u16, body: &T) -> Response<Full<Bytes>> {
    answer(status, "application/json", serde_json::to_vec(body).unwrap_or_default())
}

fn figures(arrays: &[ArrayStatus]) -> Response<Full<Bytes>> {
    answer(200, metrics::CONTENT_TYPE, metrics::text(arrays).into_bytes())
}

fn answer(status: u16, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    struct Fake;

    impl Service for Fake {
        fn list(&self) -> Vec<ArrayStatus> {
            Vec::new()
        }

        fn get(&self, _: &str) -> Option<ArrayStatus> {
            None
        }

        fn why(&self, _: &str) -> Option<Why> {
            None
        }

        fn devices(&self) -> Result<Vec<Device>, Refusal> {
            Ok(Vec::new())
        }

        fn delete_device(&self, _: u32, _: bool) -> Result<Device, Refusal> {
            Err(Refusal::new(Errno::EBUSY, "busy"))
        }

        fn upgrade(&self, force: bool) -> Result<Upgrade, Refusal> {
            Err(Refusal::new(Errno::EBUSY, format!("force is {force}")))
        }

        fn upgraded(&self) -> Upgraded {
            Upgraded::default()
        }

        fn submit(&self, command: Command, reply: Reply) {
            match command {
                Command::Stop { .. } => drop(reply),
                Command::Start { .. } => reply(Err(Refusal::new(Errno::EBUSY, "busy"))),
                _ => reply(Err(Refusal::new(Errno::EAGAIN, "full"))),
            }
        }
    }

    fn ask(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn requests_are_answered_and_bounded() {
        let path = std::env::temp_dir().join(format!("dst-http-{}/dstd.sock", std::process::id()));
        let server = Bound::new(&path).unwrap().serve(Arc::new(Fake), None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        let send = |line: &str, body: &str| {
            let length = body.len();
            ask(
                &path,
                &format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"),
            )
        };
        for (line, status, words) in [
            ("GET /v1", "200", "\"api\":1"),
            ("GET /v1/arrays", "200", "{\"arrays\":[]}"),
            ("GET /v1/arrays/a", "404", "there is no array 'a'"),
            ("POST /v1/arrays/a/start", "409", "\"errno\":\"EBUSY\""),
            ("POST /v1/arrays/a/stop", "503", "dstd ended"),
            ("DELETE /v1/arrays/a", "503", "full"),
            ("GET /v1/arrays/a/why", "404", "there is no array 'a'"),
            ("GET /v1/devices", "200", "{\"devices\":[]}"),
            ("DELETE /v1/devices/3?force=true", "409", "busy"),
            ("DELETE /v1/devices/x", "400", "no device's number"),
            ("GET /v1/upgrade", "200", "\"upgrades\":0"),
            ("POST /v1/upgrade", "409", "force is false"),
            ("DELETE /v1/upgrade", "405", "does not know"),
            ("GET /v1/tree", "200", "{\"tree\":[]}"),
            ("GET /v1/tree/devices/a/alg", "404", "there is no 'a' in devices/"),
            ("PUT /v1/tree/devices/a/alg", "400", "not understood"),
            ("GET /", "404", "nothing at"),
        ] {
            let answer = send(line, "");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(words), "{line}: {answer}");
        }
        let answer = send("POST /v1/arrays", &"x".repeat(limits::HTTP_BODY_BYTES_MAX + 1));
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        assert!(ask(&path, "rubbish\r\n\r\n").starts_with("HTTP/1.1 400"));
        let error = Bound::new(&path).err().unwrap();
        assert!(error.text.contains("another dstd serves"), "{error}");
        drop(server);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        drop(Bound::new(&path).unwrap().serve(Arc::new(Fake), None).unwrap());
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
