//! Targets before and after an array runs on them: looked at, assigned, claimed, labelled, freed, on servers and on this machine.
//! Blocks.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::command::Refusal;
use crate::control::label::Label;
use crate::control::target::{ServerAddress, Target};
use crate::engine::array::{Enlisted, Found};
use crate::errno::Errno;
use crate::io::greet;
use crate::io::label;
use crate::io::label::LocalTarget;
use crate::limits;
use crate::units::{Id, SECTOR_BYTES};
use crate::wire::frame::Op;
use crate::wire::session::{Hello, VERSIONS};
use crate::wire::volume::{
    Assign, CallError, Claim, Create, LabelPut, Member, Named, RegionPage, Regions, Volume, call,
};

/// What a target is.
pub fn look(target: &Target) -> Result<Found, Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let found = stat(server, volume)?;
            Ok(Found {
                sectors: found.size / SECTOR_BYTES,
                identity: format!("volume {}", found.id),
                volume: found.id,
                member: found.array,
                claim: found.claim,
                label: found.label,
                losses: found.losses,
            })
        }
        Target::Local(path) => {
            let LocalTarget { sectors, identity, label } = label::look(path)?;
            let label = label.unwrap_or_else(|| Label::free(Id::NIL));
            Ok(Found {
                sectors,
                identity,
                volume: label.id,
                member: label.array,
                claim: label.claim,
                label: label.text,
                // It has no memory that this machine could outlive.
                losses: 0,
            })
        }
    }
}

/// Claims a target for an array, durably: nobody else's requests are served there from then on, but those of a greater claim.
pub fn claim(target: &Target, array: Id, claim: &Claim, features: u64) -> Result<(), Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let hello = Hello {
                versions: (*VERSIONS.start(), *VERSIONS.end()),
                features,
                array,
                session: claim.owner,
                host: claim.host,
                channel: 0,
                volume: volume.clone(),
            };
            let greeted = greet::greet(resolve(server)?[0], &hello, claim.epoch);
            greeted.map(drop).map_err(|refusal| Refusal::new(refusal.errno, refusal.text))
        }
        Target::Local(path) => label::claim(path, array, claim),
    }
}

/// Stores a text with a target that this claim holds.
pub fn put_label(target: &Target, array: Id, claim: &Claim, label: &str) -> Result<(), Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let (name, label) = (volume.clone(), label.to_owned());
            let ask = LabelPut { name, array, epoch: claim.epoch, owner: claim.owner, label };
            ask_server::<_, Volume>(server, Op::LabelPut, &ask).map(drop)
        }
        Target::Local(path) => label::put(path, array, claim, label),
    }
}

/// Writes the array's name into a target, and tells what that is.
pub fn assign(target: &Target, member: &Member) -> Result<Enlisted, Refusal> {
    match target {
        Target::Remote { server, volume } => {
            let ask = Assign { name: volume.clone(), array: member.clone() };
            let volume: Volume = ask_server(server, Op::VolumeAssign, &ask)?;
            Ok(Enlisted { volume: volume.id, blank: volume.blank })
        }
        // Whoever made the file may have written to it.
        Target::Local(path) => Ok(Enlisted { volume: label::assign(path, member, random_id()?)?, blank: false }),
    }
}

/// Takes the array's name out of a target. One that is gone, or another array's, is fine; one that another host than `host` has
/// claimed is that host's to free.
pub fn free(target: &Target, array: Id, host: Id) -> Result<(), Refusal> {
    let found = match look(target) {
        Err(why) if why.errno == Errno::ENOENT => return Ok(()),
        found => found?,
    };
    let nobodys = found.member.is_none();
    if found.member.is_some_and(|member| member.id != array) {
        return Ok(());
    }
    if let Some(claim) = found.claim.filter(|claim| !nobodys && claim.host != host) {
        let text = format!("another host has claimed it ({}, epoch {})", claim.host, claim.epoch.0);
        return Err(Refusal::new(Errno::EBUSY, text));
    }
    match target {
        Target::Remote { server, volume } => {
            let ask = Named { name: volume.clone(), array: Some(array), force: false };
            // Also when it looks like nobody's: the server does one change of a volume after the other, so this comes after what
            // a dead daemon may still have there; the look did not.
            let Err(why) = ask_server::<_, Volume>(server, Op::VolumeFree, &ask) else { return Ok(()) };
            match stat(server, volume) {
                Err(missing) if missing.errno == Errno::ENOENT => Ok(()),
                Ok(found) if found.array.as_ref().is_none_or(|member| member.id != array) => Ok(()),
                _ => Err(why),
            }
        }
        Target::Local(_) if nobodys => Ok(()),
        Target::Local(path) => label::free(path, array),
    }
}

/// Makes a volume; its space is taken at once.
pub fn make(target: &Target, bytes: u64) -> Result<(), Refusal> {
    let Target::Remote { server, volume } = target else {
        return Err(Refusal::new(Errno::EINVAL, "it is not a volume of a server: make the file or device first"));
    };
    let ask = Create { name: volume.clone(), size: bytes, sparse: false, write_through: false };
    let mut stream =
        connect_within(&resolve(server)?, limits::VOLUME_CALL_TIMEOUT).map_err(|error| silent(server, &error))?;
    let made: Result<Volume, CallError> = call(&mut stream, Op::VolumeCreate, &ask);
    made.map(drop).map_err(|error| refused(server, error))
}

/// As [`free`]; then the volume is removed, if that is asked for.
pub fn discard(target: &Target, array: Id, host: Id, remove: bool) -> Result<(), Refusal> {
    free(target, array, host)?;
    let Target::Remote { server, volume } = target else { return Ok(()) };
    if !remove {
        return Ok(());
    }
    let ask = Named { name: volume.clone(), array: None, force: false };
    match ask_server::<_, Volume>(server, Op::VolumeRemove, &ask) {
        Err(why) if why.errno != Errno::ENOENT => Err(why),
        _ => Ok(()),
    }
}

/// A page of the region log of a volume.
pub fn regions(address: SocketAddr, ask: &Regions) -> Result<RegionPage, Refusal> {
    let mut stream = connect_within(&[address], limits::CONNECT_TIMEOUT)
        .map_err(|error| Refusal::new(Errno::from(&error), error.to_string()))?;
    call(&mut stream, Op::Regions, ask).map_err(|error| Refusal::new(error.errno(), error.to_string()))
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
    let stream = connect_within(&resolve(server)?, limits::CONNECT_TIMEOUT);
    call(&mut stream.map_err(|error| silent(server, &error))?, op, ask).map_err(|error| refused(server, error))
}

fn refused(server: &ServerAddress, error: CallError) -> Refusal {
    match error {
        CallError::Transport(error) => silent(server, &error),
        CallError::Refused { errno, text } => Refusal::new(errno, text),
    }
}

fn silent(server: &ServerAddress, error: &std::io::Error) -> Refusal {
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
}

/// A connection on which an answer is waited for this long.
fn connect_within(addresses: &[SocketAddr], limit: Duration) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from_raw_os_error(Errno::EHOSTUNREACH.raw());
    for address in addresses {
        match TcpStream::connect_timeout(address, limits::CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limits::CONNECT_TIMEOUT))?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
