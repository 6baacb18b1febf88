//! HELLO and its answer: how a connection becomes channel k of a session. Pure codecs of two fixed-size messages.
//!
//! A session is one array's attachment to one volume by one life of a daemon. It has numbered channels, one connection each.
//! The server answers HELLO for a channel only when everything that the channel's former connection had asked for is finished
//! or dropped (the contract, section 3.1), so what is sent again after the answer can never be overtaken by its older self.

use crate::limits;
use crate::units::{Id, check_name};

/// Bytes of an encoded [`Hello`].
pub const HELLO_BYTES: usize = 256;
/// Bytes of an encoded [`Welcome`].
pub const WELCOME_BYTES: usize = 128;

/// Protocol versions that this program speaks.
pub const VERSIONS: std::ops::RangeInclusive<u16> = 1..=1;

/// Feature bits of HELLO. Both sides send what they can; what both have is used.
pub mod features {
    /// Data carries CRC32C in both directions.
    pub const DATA_CRC: u64 = 1 << 0;
    /// The server keeps a log of the regions that are written, see `docs/PROTOCOL.md`. Asked for where a node has several targets.
    pub const REGION_LOG: u64 = 1 << 1;
    /// Everything this program knows.
    pub const OURS: u64 = DATA_CRC | REGION_LOG;

    /// What an array asks of the volumes of a node with so many replicas.
    pub const fn of_node(replicas: usize) -> u64 {
        if replicas > 1 { OURS } else { DATA_CRC }
    }
}

/// Opens or re-opens a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest protocol version the asker speaks.
    pub versions: (u16, u16),
    /// Feature bits the asker can.
    pub features: u64,
    /// The array that attaches.
    pub array: Id,
    /// This life of this array's daemon, the owner of its claim.
    pub session: Id,
    /// The machine of the daemon: the random id of its state directory.
    pub host: Id,
    /// Which channel of the session this connection is.
    pub channel: u16,
    /// The volume to attach.
    pub volume: String,
}

/// The answer to a HELLO that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version both speak.
    pub version: u16,
    /// The features both have.
    pub features: u64,
    /// This life of the server process.
    pub instance: Id,
    /// The volume's own id, which a rename or a new volume of the same name does not share.
    pub volume: Id,
    /// The volume's size, sectors.
    pub sectors: u64,
    /// Most requests that may be outstanding on this channel.
    pub requests_max: u32,
    /// Most bytes (data sent and answers expected) that may be outstanding on this channel.
    pub bytes_max: u32,
    /// How often writes that had been acknowledged may have been lost with the machine's memory, in all the volume's life.
    pub losses: u64,
}

/// Why a body is not what its op says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMessage(pub &'static str);

impl std::fmt::Display for BadMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for BadMessage {}

fn id_at(bytes: &[u8], at: usize) -> Id {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    Id(id)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Hello {
    /// The body to send. The volume's name must be a valid one.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..2].copy_from_slice(&self.versions.0.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.versions.1.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.channel.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.features.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.array.0);
        bytes[32..48].copy_from_slice(&self.session.0);
        bytes[48..64].copy_from_slice(&self.host.0);
        let name = self.volume.as_bytes();
        let length = name.len().min(limits::NAME_BYTES_MAX);
        bytes[64..64 + length].copy_from_slice(&name[..length]);
        bytes
    }

    /// Checks and decodes.
    pub fn decode(bytes: &[u8]) -> Result<Hello, BadMessage> {
        if bytes.len() != HELLO_BYTES {
            return Err(BadMessage("a HELLO has 256 bytes"));
        }
        let name = &bytes[64..64 + limits::NAME_BYTES_MAX];
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        let volume = std::str::from_utf8(&name[..length]).map_err(|_| BadMessage("the volume's name is not text"))?;
        check_name(volume).map_err(|_| BadMessage("the volume's name is not a valid one"))?;
        let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|byte| *byte == 0);
        if !zero(6..8) || !zero(64 + length..HELLO_BYTES) {
            return Err(BadMessage("a reserved field of the HELLO is not zero"));
        }
        let hello = Hello {
            versions: (u16_at(bytes, 0), u16_at(bytes, 2)),
            channel: u16_at(bytes, 4),
            features: u64_at(bytes, 8),
            array: id_at(bytes, 16),
            session: id_at(bytes, 32),
            host: id_at(bytes, 48),
            volume: volume.to_owned(),
        };
        let nameless = [hello.array, hello.session, hello.host].into_iter().any(Id::is_nil);
        if nameless || hello.versions.0 > hello.versions.1 {
            return Err(BadMessage("the HELLO names no array, no session, no host or no version"));
        }
        if usize::from(hello.channel) >= limits::SHARDS_MAX {
            return Err(BadMessage("the HELLO's channel number is too large"));
        }
        Ok(hello)
    }

    /// The newest version both sides speak.
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.versions.1.min(*VERSIONS.end());
        (newest >= self.versions.0 && newest >= *VERSIONS.start()).then_some(newest)
    }
}

impl Welcome {
    /// The body to send.
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        bytes[0..2].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.features.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.instance.0);
        bytes[32..48].copy_from_slice(&self.volume.0);
        bytes[48..56].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.requests_max.to_le_bytes());
        bytes[60..64].copy_from_slice(&self.bytes_max.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.losses.to_le_bytes());
        bytes
    }

    /// Checks and decodes.
    pub fn decode(bytes: &[u8]) -> Result<Welcome, BadMessage> {
        if bytes.len() != WELCOME_BYTES {
            return Err(BadMessage("the answer to a HELLO has 128 bytes"));
        }
        let welcome = Welcome {
            version: u16_at(bytes, 0),
            features: u64_at(bytes, 8),
            instance: id_at(bytes, 16),
            volume: id_at(bytes, 32),
            sectors: u64_at(bytes, 48),
            requests_max: u32_at(bytes, 56),
            bytes_max: u32_at(bytes, 60),
            losses: u64_at(bytes, 64),
        };
        if !VERSIONS.contains(&welcome.version) {
            return Err(BadMessage("the server chose a version that was not offered"));
        }
        if welcome.features & !features::OURS != 0 {
            return Err(BadMessage("the server chose a feature that was not offered"));
        }
        if welcome.sectors > limits::ARRAY_SECTORS_MAX || welcome.requests_max == 0 {
            return Err(BadMessage("the server's answer to HELLO is out of bounds"));
        }
        if u64::from(welcome.bytes_max) < u64::from(limits::PAYLOAD_BYTES_MAX) {
            return Err(BadMessage("the server's budget is smaller than one request"));
        }
        Ok(welcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            versions: (1, 3),
            features: features::OURS,
            array: Id([1; 16]),
            session: Id([2; 16]),
            host: Id([5; 16]),
            channel: 3,
            volume: "x".repeat(limits::NAME_BYTES_MAX),
        }
    }

    #[test]
    fn both_round_trip() {
        assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
        let welcome = Welcome {
            version: 1,
            features: 1,
            instance: Id([3; 16]),
            volume: Id([4; 16]),
            sectors: 1 << 40,
            requests_max: 9,
            bytes_max: 1 << 20,
            losses: 1 << 33,
        };
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }

    #[test]
    fn versions_are_negotiated() {
        assert_eq!(hello().common_version(), Some(1));
        assert_eq!(Hello { versions: (2, 9), ..hello() }.common_version(), None);
        assert_eq!(Hello { versions: (0, 0), ..hello() }.common_version(), None);
    }

    #[test]
    fn bad_fields_are_refused() {
        let bad = |change: &dyn Fn(&mut [u8; HELLO_BYTES])| {
            let mut bytes = hello().encode();
            change(&mut bytes);
            assert!(Hello::decode(&bytes).is_err());
        };
        bad(&|bytes| bytes[4..6].copy_from_slice(&17u16.to_le_bytes()));
        bad(&|bytes| bytes[6] = 1);
        bad(&|bytes| bytes[16..32].fill(0));
        bad(&|bytes| bytes[32..48].fill(0));
        bad(&|bytes| bytes[48..64].fill(0));
        bad(&|bytes| bytes[64] = b'/');
        bad(&|bytes| bytes[66] = 0);
        bad(&|bytes| bytes[255] = 1);
        bad(&|bytes| bytes[0..2].copy_from_slice(&9u16.to_le_bytes()));
        assert!(Hello::decode(&hello().encode()[..255]).is_err());
        assert!(Hello::decode(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::decode(&bytes);
            let _ = Welcome::decode(&bytes);
        }
    }
}
