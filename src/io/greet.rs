//! One HELLO before an array starts: says whether a server answers, has the volume, and lets this daemon attach it.
//!
//! It blocks, up to `limits::CONNECT_TIMEOUT`; call it from a thread that may wait. What it learns goes into the message that a
//! person reads, so every way to fail has its own words.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::errno::Errno;
use crate::limits;
use crate::units::{Epoch, Extent};
use crate::wire::frame::{HEADER_BYTES, Header, Op, message_crc};
use crate::wire::session::{Hello, Welcome};
use crate::wire::volume::{Explained, decode_message};

/// Why a server cannot be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For branching.
    pub errno: Errno,
    /// For people: what and why.
    pub text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}

/// Connects, says HELLO, and hangs up.
pub fn greet(address: SocketAddr, hello: &Hello, epoch: Epoch) -> Result<Welcome, Refusal> {
    let failed = |what: &str, error: std::io::Error| {
        let errno = match error.kind() {
            std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => Errno::ETIMEDOUT,
            std::io::ErrorKind::UnexpectedEof => Errno::ECONNRESET,
            _ => Errno::from(&error),
        };
        Refusal { errno, text: format!("{what} the server at {address}: {}", errno.text()) }
    };
    let mut stream =
        TcpStream::connect_timeout(&address, limits::CONNECT_TIMEOUT).map_err(|error| failed("cannot reach", error))?;
    let timeouts = stream
        .set_read_timeout(Some(limits::CONNECT_TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(limits::CONNECT_TIMEOUT)));
    timeouts.map_err(|error| failed("cannot talk to", error))?;
    let body = hello.encode();
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let header = Header::request(Op::Hello, 0, 0, epoch, Extent::default()).with_body(length, message_crc(&body));
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(&body);
    stream.write_all(&frame).map_err(|error| failed("cannot talk to", error))?;
    let (reply, body) = answer(&mut stream).map_err(|error| failed("no answer from", error))?;
    let strange = |why: &str| Refusal {
        errno: Errno::EPROTO,
        text: format!("{address} does not speak the dst protocol as this program does: {why}"),
    };
    if reply.op != Op::Hello || !reply.is_reply() {
        return Err(strange("it answers something else"));
    }
    if let Err(errno) = reply.result() {
        let text = decode_message::<Explained>(&reply, &body).map_or_else(|_| errno.to_string(), |body| body.error);
        return Err(Refusal { errno, text });
    }
    if message_crc(&body) != reply.body_crc {
        return Err(strange("its answer arrived damaged"));
    }
    Welcome::decode(&body).map_err(|error| strange(error.0))
}

fn answer(stream: &mut TcpStream) -> std::io::Result<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head)?;
    let reply = Header::decode(&head).map_err(|_| std::io::Error::from_raw_os_error(Errno::EPROTO.raw()))?;
    // Bounded by decode: at most MESSAGE_BYTES_MAX for a message, PAYLOAD_BYTES_MAX for anything.
    let mut body = vec![0; reply.body_bytes as usize];
    stream.read_exact(&mut body)?;
    Ok((reply, body))
}
