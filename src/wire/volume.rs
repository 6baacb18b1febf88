//! The volume messages: what `dst volume` and an array's owner ask of a server. Bodies are JSON of these types.
//!
//! One request, one answer, on a connection that has not said HELLO. An answer with an error status carries an [`Explained`]
//! body, so that the server's own words reach the person who asked.

use std::io::{Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::errno::Errno;
use crate::limits;
use crate::units::{Epoch, Extent, Id};
use crate::wire::frame::{HEADER_BYTES, Header, Op, message_crc};

/// A volume as its server describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name on the server.
    pub name: String,
    /// Its own id, for ever.
    pub id: Id,
    /// Size, bytes.
    pub size: u64,
    /// Space is taken as it is written, not in advance.
    pub sparse: bool,
    /// Every change is durable before it is answered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
    /// Space taken on the disk now, bytes.
    pub allocated: u64,
    /// Nothing was ever written to it: it reads as zeros.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blank: bool,
    /// The array it belongs to.
    pub array: Option<Member>,
    /// Connections attached to it now.
    pub connections: u32,
    /// How often its machine has come back without what was not flushed, as the next HELLO is told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub losses: u64,
    /// Who holds it; nobody until an array has attached it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// What its array has stored with it. VOLUME_STAT alone tells it: a page of VOLUME_LIST has no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Why it is not served; then only the name is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Who holds a volume: the latest claim that a HELLO of its array made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The number of the claim; a greater one takes the volume.
    pub epoch: Epoch,
    /// The life of the daemon that made it: the session of its HELLO.
    pub owner: Id,
    /// That daemon's machine.
    pub host: Id,
}

/// Which array a volume belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The array's id.
    pub id: Id,
    /// The array's name when it was assigned, for people.
    pub name: String,
    /// The node it stores, such as `n-800`.
    pub node: String,
}

/// Body of VOLUME_CREATE; the answer is a [`Volume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Name of the new volume.
    pub name: String,
    /// Size, bytes; a multiple of 4096.
    pub size: u64,
    /// Take space as it is written.
    #[serde(default)]
    pub sparse: bool,
    /// Make every change durable before it is answered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
}

/// Body of VOLUME_STAT, VOLUME_FREE and VOLUME_REMOVE; the answer is the [`Volume`] (as it last was).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Name of the volume.
    pub name: String,
    /// VOLUME_FREE: only if it belongs to this array.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array: Option<Id>,
    /// VOLUME_FREE and VOLUME_REMOVE: even when it belongs to another array (never while connections are attached).
    #[serde(default)]
    pub force: bool,
}

/// Body of VOLUME_RESIZE; the answer is the [`Volume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// Name of the volume.
    pub name: String,
    /// New size, bytes; a multiple of 4096.
    pub size: u64,
    /// Even when it shrinks, or shrinks below what an array uses.
    #[serde(default)]
    pub force: bool,
}

/// Body of VOLUME_ASSIGN; the answer is the [`Volume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assign {
    /// Name of the volume.
    pub name: String,
    /// The array that takes it. Assigning to the array that has it already succeeds.
    pub array: Member,
}

/// Body of VOLUME_LIST; the answer is a [`Page`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Only names after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// Part of a list, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Whether there are more after the last of these.
    pub more: bool,
}

/// Body of LABEL_PUT; the answer is the [`Volume`]. Refused with EBADE unless the sender holds the present claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelPut {
    /// Name of the volume.
    pub name: String,
    /// The array it belongs to.
    pub array: Id,
    /// The epoch of the sender's claim.
    pub epoch: Epoch,
    /// The owner of the sender's claim.
    pub owner: Id,
    /// At most `limits::LABEL_BYTES_MAX` bytes of text, without control characters but line feeds; replaces the former one.
    pub label: String,
}

/// Body of REGIONS; the answer is a [`RegionPage`]. Refused with EBADE unless the sender holds the present claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regions {
    /// Name of the volume.
    pub name: String,
    /// The array it belongs to.
    pub array: Id,
    /// The epoch of the sender's claim.
    pub epoch: Epoch,
    /// The owner of the sender's claim.
    pub owner: Id,
    /// Only regions after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
}

/// Part of the marked regions of a volume, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPage {
    /// Runs of marked regions: the first region's number, and how many.
    pub marked: Vec<(u64, u64)>,
    /// Whether there are more after the last of these.
    pub more: bool,
    /// Size of a region, bytes; the volume's last one may be shorter.
    pub region_bytes: u64,
}

/// Body of an answer that refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// What, why, and what to do next.
    pub error: String,
}

/// A volume request that failed.
#[derive(Debug)]
pub enum CallError {
    /// The connection failed, or the other side does not speak the protocol.
    Transport(std::io::Error),
    /// The server refused.
    Refused {
        /// Why, for branching.
        errno: Errno,
        /// Why, for people.
        text: String,
    },
}

impl CallError {
    /// The error number, for branching.
    pub fn errno(&self) -> Errno {
        match self {
            CallError::Transport(error) => Errno::from(error),
            CallError::Refused { errno, .. } => *errno,
        }
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CallError::Transport(error) => write!(f, "{error}"),
            CallError::Refused { text, .. } => f.write_str(text),
        }
    }
}

impl std::error::Error for CallError {}

/// A whole frame: header and JSON body. `Err` when the body is larger than a message may be.
pub fn encode_message<T: Serialize>(header: Header, body: &T) -> Result<Vec<u8>, Errno> {
    let body = serde_json::to_vec(body).map_err(|_| Errno::EINVAL)?;
    let length = u32::try_from(body.len()).map_err(|_| Errno::EOVERFLOW)?;
    if length > limits::MESSAGE_BYTES_MAX {
        return Err(Errno::EOVERFLOW);
    }
    let header = header.with_body(length, message_crc(&body));
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The message in a body whose header has been read.
pub fn decode_message<T: DeserializeOwned>(header: &Header, body: &[u8]) -> Result<T, Errno> {
    if !header.is_sealed() || message_crc(body) != header.body_crc {
        return Err(Errno::EILSEQ);
    }
    serde_json::from_slice(body).map_err(|_| Errno::EPROTO)
}

/// Asks `op` over a byte stream and waits for the answer. Time limits are the stream's.
pub fn call<S: Read + Write, Q: Serialize, A: DeserializeOwned>(
    stream: &mut S,
    op: Op,
    question: &Q,
) -> Result<A, CallError> {
    let broken = |error: &dyn std::fmt::Display| {
        CallError::Transport(std::io::Error::other(format!("the answer is not of the dst protocol: {error}")))
    };
    let request = Header::request(op, 0, 0, Epoch(0), Extent::default());
    let frame = encode_message(request, question)
        .map_err(|errno| CallError::Refused { errno, text: "the request is too large".to_owned() })?;
    stream.write_all(&frame).map_err(CallError::Transport)?;
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).map_err(CallError::Transport)?;
    let reply = Header::decode(&head).map_err(|error| broken(&error))?;
    if !reply.is_reply() || reply.op != op {
        return Err(broken(&"it answers something else"));
    }
    // Bounded by decode: at most MESSAGE_BYTES_MAX.
    let mut body = vec![0; reply.body_bytes as usize];
    stream.read_exact(&mut body).map_err(CallError::Transport)?;
    match reply.result() {
        Ok(()) => decode_message(&reply, &body).map_err(|error| broken(&error)),
        Err(errno) => {
            let text = decode_message::<Explained>(&reply, &body).map_or_else(|_| errno.to_string(), |body| body.error);
            Err(CallError::Refused { errno, text })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that answers what it was given.
    struct Script {
        answer: std::io::Cursor<Vec<u8>>,
        asked: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.answer.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.asked.extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn ask(answer: Vec<u8>) -> Result<Page, CallError> {
        let mut stream = Script { answer: std::io::Cursor::new(answer), asked: Vec::new() };
        call(&mut stream, Op::VolumeList, &List::default())
    }

    #[test]
    fn answers_refusals_and_rubbish() {
        let request = Header::request(Op::VolumeList, 0, 0, Epoch(0), Extent::default());
        let good = encode_message(request.reply(Ok(())), &Page::default()).unwrap();
        assert_eq!(ask(good.clone()).unwrap(), Page::default());
        let refusal = Explained { error: "no: because".to_owned() };
        let bad = encode_message(request.reply(Err(Errno::EBUSY)), &refusal).unwrap();
        let error = ask(bad).unwrap_err();
        assert_eq!((error.errno(), error.to_string().as_str()), (Errno::EBUSY, "no: because"));
        assert!(matches!(ask(good[..good.len() - 1].to_vec()), Err(CallError::Transport(_))));
        let mut flipped = good;
        *flipped.last_mut().unwrap() ^= 1;
        assert!(matches!(ask(flipped), Err(CallError::Transport(_))));
        assert!(matches!(ask(vec![0; 64]), Err(CallError::Transport(_))));
        let other = Header::request(Op::VolumeStat, 0, 0, Epoch(0), Extent::default());
        assert!(matches!(
            ask(encode_message(other.reply(Ok(())), &Page::default()).unwrap()),
            Err(CallError::Transport(_))
        ));
    }
}
