//! Targets before and after an array runs on them: looked at, assigned, freed, on servers and on this machine. Blocks.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::command::Refusal;
use crate::control::target::{ServerAddress, Target};
use crate::engine::array::Found;
use crate::errno::Errno;
use crate::io::label;
use crate::limits;
use crate::units::{Id, SECTOR_BYTES};
use crate::wire::frame::Op;
use crate::wire::volume::{Assign, CallError, Member, Named, Volume, call};

/// What a target is.
pub fn look(target: &Target) -> Result<Found, Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let volume = stat(server, volume)?;
            let identity = format!("volume {}", volume.id);
            Ok(Found { sectors: volume.size / SECTOR_BYTES, identity, member: volume.array })
        }
        Target::Local(path) => {
            let found = label::look(path)?;
            let member = found.label.and_then(|label| label.array);
            Ok(Found { sectors: found.sectors, identity: found.identity, member })
        }
    }
}

/// Writes the array's name into a target and returns the target's own id.
pub fn assign(target: &Target, member: &Member) -> Result<Id, Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let ask = Assign { name: volume.clone(), array: member.clone() };
            let volume: Volume = ask_server(server, Op::VolumeAssign, &ask)?;
            Ok(volume.id)
        }
        Target::Local(path) => label::assign(path, member, random_id()?),
    }
}

/// Takes the array's name out of a target. One that is gone, or another array's, is fine.
pub fn free(target: &Target, array: Id) -> Result<(), Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let found = match stat(server, volume) {
                Err(why) if why.errno == Errno::ENOENT => return Ok(()),
                found => found?,
            };
            if found.array.is_none_or(|member| member.id != array) {
                return Ok(());
            }
            let ask = Named { name: volume.clone(), array: Some(array), force: false };
            ask_server::<_, Volume>(server, Op::VolumeFree, &ask).map(drop)
        }
        Target::Local(path) => label::free(path, array),
    }
}

/// The address of a server whose name may have to be looked up.
pub fn resolve(server: &ServerAddress) -> Result<Vec<SocketAddr>, Refusal> {
    let looked_up = (server.host.as_str(), server.port).to_socket_addrs();
    let addresses: Vec<SocketAddr> = looked_up.map(Iterator::collect).unwrap_or_default();
    if addresses.is_empty() {
        let text = format!("the host name '{}' is not known: check its spelling, or use an address", server.host);
        return Err(Refusal::new(Errno::EHOSTUNREACH, text));
    }
    Ok(addresses)
}

/// 128 random bits.
pub fn random_id() -> Result<Id, Refusal> {
    let mut id = Id::NIL;
    let failed = |error| Refusal::new(Errno::EIO, format!("the kernel gives no random numbers: {error}"));
    getrandom::fill(&mut id.0).map_err(failed)?;
    Ok(id)
}

fn stat(server: &ServerAddress, volume: &str) -> Result<Volume, Refusal> {
    ask_server(server, Op::VolumeStat, &Named { name: volume.to_owned(), array: None, force: false })
}

fn ask_server<Q: Serialize, A: DeserializeOwned>(server: &ServerAddress, op: Op, ask: &Q) -> Result<A, Refusal> {
    let silent = |error: &std::io::Error| {
        let errno = match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => Errno::ETIMEDOUT,
            std::io::ErrorKind::UnexpectedEof => Errno::ECONNRESET,
            _ => Errno::from(error),
        };
        let why = if errno == Errno::EIO { error.to_string() } else { errno.text().to_owned() };
        let next = match errno {
            Errno::ECONNREFUSED => format!(": is 'dstd server' running on {}?", server.host),
            Errno::ETIMEDOUT | Errno::EHOSTUNREACH | Errno::ENETUNREACH => {
                format!(": is {} up, and does its firewall let port {} pass?", server.host, server.port)
            }
            _ => String::new(),
        };
        Refusal::new(errno, format!("the server {server} does not answer: {why}{next}"))
    };
    let mut stream = connect(&resolve(server)?).map_err(|error| silent(&error))?;
    call(&mut stream, op, ask).map_err(|error| match error {
        CallError::Transport(error) => silent(&error),
        CallError::Refused { errno, text } => Refusal::new(errno, text),
    })
}

fn connect(addresses: &[SocketAddr]) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from_raw_os_error(Errno::EHOSTUNREACH.raw());
    for address in addresses {
        match TcpStream::connect_timeout(address, limits::CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(limits::CONNECT_TIMEOUT))?;
                stream.set_write_timeout(Some(limits::CONNECT_TIMEOUT))?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
