//! `--metrics ADDRESS`: the figures alone, over TCP. Nothing can be asked for there, and nothing but figures is told.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use tokio::sync::Semaphore;

use crate::control::command::Refusal;
use crate::errno::Errno;
use crate::io::http::{Service, connection, figures, json};
use crate::limits;

/// Listens on an address; beyond loopback only by the operator's word.
pub fn listen(address: SocketAddr, danger_cleartext: bool) -> Result<TcpListener, Refusal> {
    if !address.ip().is_loopback() && !danger_cleartext {
        let text = format!(
            "--metrics {address} would tell the names of arrays and servers, unencrypted, to anyone who reaches it: use a loopback address, or \
             --danger-cleartext on a network that you trust"
        );
        return Err(Refusal::new(Errno::EPERM, text));
    }
    let bound = TcpListener::bind(address).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    bound.map_err(|error| Refusal::new(Errno::from(&error), format!("--metrics {address}: cannot listen: {error}")))
}

/// Serves for ever.
pub(super) async fn accept(listener: TcpListener, service: Arc<dyn Service>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the metrics cannot be served"),
    };
    let seats = Arc::new(Semaphore::new(limits::HTTP_CONNECTIONS_MAX));
    while let Ok(seat) = Arc::clone(&seats).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the metrics' address");
                tokio::time::sleep(limits::RECONNECT_MIN).await;
                continue;
            }
        };
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let answer = respond(&request, &*service);
                async move { Ok::<_, Infallible>(answer) }
            });
            connection(stream, answer).await;
            drop(seat);
        });
    }
}

fn respond(request: &Request<Incoming>, service: &dyn Service) -> Response<Full<Bytes>> {
    let refusal = match (request.method().as_str(), request.uri().path()) {
        ("GET" | "HEAD", "/metrics") => return figures(&service.list()),
        (_, "/metrics") => Refusal::new(Errno::EOPNOTSUPP, "figures are only read"),
        _ => Refusal::new(Errno::ENOENT, "there is nothing but /metrics here"),
    };
    json(refusal.http_status(), &refusal.problem())
}
