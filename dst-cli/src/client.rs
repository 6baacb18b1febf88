//! The two ways out: HTTP/JSON to the daemon that owns arrays, over its unix socket, and the dst protocol to servers.

use std::future::Future;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;

use dst::control::command::Problem;
use dst::control::target::ServerAddress;
use dst::limits;
use dst::wire::frame::Op;
use dst::wire::volume::{CallError, call};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The daemon that owns arrays.
pub(crate) struct Daemon<'a> {
    pub(crate) socket: &'a Path,
}

impl Daemon<'_> {
    /// One request. The answer is waited for as long as it takes: the daemon bounds what it does.
    pub(crate) fn ask<A: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, String> {
        let body = serde_json::to_vec(body).map_err(|error| error.to_string())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
        let (status, answer) = runtime.block_on(self.exchange(method, path, body))?;
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(|error| {
                format!("dstd's answer is not understood: {error}: are dst and dstd of the same version?")
            });
        }
        match serde_json::from_slice::<Problem>(&answer) {
            Ok(problem) => Err(problem.error),
            Err(_) => Err(format!("dstd answered {status}: are dst and dstd of the same version?")),
        }
    }

    async fn exchange(&self, method: &str, path: &str, body: Vec<u8>) -> Result<(hyper::StatusCode, Bytes), String> {
        let stream = tokio::net::UnixStream::connect(self.socket).await.map_err(|error| self.no_daemon(&error))?;
        let broken = |error: &dyn std::fmt::Display| {
            format!("the connection to dstd at {} broke: {error}: see its log", self.socket.display())
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "dstd")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| broken(&error))?;
        let exchange = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = answer.into_body().collect().await?.to_bytes();
            Ok::<_, hyper::Error>((status, body))
        };
        let mut exchange = std::pin::pin!(exchange);
        let mut connection = std::pin::pin!(connection);
        // The connection may end before the exchange has seen its last bytes.
        let mut open = true;
        std::future::poll_fn(|context| {
            if open && connection.as_mut().poll(context).is_ready() {
                open = false;
            }
            exchange.as_mut().poll(context)
        })
        .await
        .map_err(|error| broken(&error))
    }

    fn no_daemon(&self, error: &std::io::Error) -> String {
        let socket = self.socket.display();
        match error.kind() {
            std::io::ErrorKind::NotFound => format!(
                "there is no dstd at {socket}: start one ('dstd array', or 'dstd up --dir DIR'), or name its socket with --socket or $DST_SOCKET"
            ),
            std::io::ErrorKind::ConnectionRefused => {
                format!("dstd does not run any more: {socket} answers nobody. Start it again ('dstd array')")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("no permission to use {socket}: run dst as root, or as the user that dstd runs as")
            }
            _ => format!("cannot reach dstd at {socket}: {error}"),
        }
    }
}

/// One volume request to a server.
pub(crate) fn ask_server<Q: Serialize, A: DeserializeOwned>(
    server: &ServerAddress,
    op: Op,
    question: &Q,
) -> Result<A, String> {
    let mut stream = connect(server)?;
    call(&mut stream, op, question).map_err(|error| match error {
        CallError::Transport(error) => silent(server, &error),
        CallError::Refused { text, .. } => format!("{server}: {text}"),
    })
}

fn connect(server: &ServerAddress) -> Result<TcpStream, String> {
    let addresses = (server.host.as_str(), server.port)
        .to_socket_addrs()
        .map_err(|_| format!("the host name '{}' is not known: check its spelling, or use an address", server.host))?;
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, limits::CONNECT_TIMEOUT) {
            Ok(stream) => {
                // Making a volume takes its space, which may take a while.
                let bounded = stream
                    .set_read_timeout(Some(limits::VOLUME_CALL_TIMEOUT))
                    .and_then(|()| stream.set_write_timeout(Some(limits::CONNECT_TIMEOUT)));
                bounded.map_err(|error| silent(server, &error))?;
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| format!("'{}' has no address", server.host), |error| silent(server, &error)))
}

fn silent(server: &ServerAddress, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => format!(
            "the server {server} does not answer: connection refused: is 'dstd server' running on {}?",
            server.host
        ),
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => format!(
            "the server {server} does not answer: timed out: is {} up, and does its firewall let port {} pass?",
            server.host, server.port
        ),
        _ => format!("the server {server} does not answer: {error}"),
    }
}
