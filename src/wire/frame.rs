//! The fixed header that opens every frame of the dst protocol. Pure: bytes in, a checked [`Header`] out, and back.
//!
//! `docs/PROTOCOL.md` has the byte diagram. All numbers are little-endian. A header that decodes is well formed by itself:
//! known op, nothing in reserved fields, lengths within the caps of its op. Whether it fits the session is for others to say.

use crate::bugs::{Bug, planted};
use crate::errno::{self, Errno};
use crate::limits;
use crate::units::{Epoch, Extent, Lba, SECTOR_BYTES};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"dst\x01";
/// Bytes of the answer to DIGEST: 32 of BLAKE3, then how many bytes of the range are allocated, 64 bits.
pub const DIGEST_BYTES: u32 = 40;
/// The version of the frame layout.
pub const VERSION: u8 = 1;

/// What a frame asks for, or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Opens or re-opens a channel of a session; the body is a [`crate::wire::session::Hello`].
    Hello = 1,
    /// "Are you there?"; answered at once.
    Keepalive = 2,
    /// Reads a range; the answer carries it.
    Read = 3,
    /// Writes the body.
    Write = 4,
    /// Makes everything answered before it durable.
    Flush = 5,
    /// The range reads as zeros afterwards and its space may be given back.
    Discard = 6,
    /// The range reads as zeros afterwards and keeps its space.
    WriteZeroes = 7,
    /// Makes a volume. Bodies of the volume ops are JSON, see [`crate::wire::volume`].
    VolumeCreate = 16,
    /// Lists volumes.
    VolumeList = 17,
    /// Describes one volume.
    VolumeStat = 18,
    /// Changes a volume's size.
    VolumeResize = 19,
    /// Removes a volume and its data.
    VolumeRemove = 20,
    /// Writes the name of an array into a volume, so that no other takes it.
    VolumeAssign = 21,
    /// Takes the name of the array out again; the data stays.
    VolumeFree = 22,
    /// Stores a text with the volume, for whoever holds its claim.
    LabelPut = 33,
    /// Lists the regions in which replicas of the volume could differ.
    Regions = 34,
    /// Computes the digest of a range where the data is.
    Digest = 36,
}

impl Op {
    /// Every op, for tables and tests.
    pub const ALL: [Op; 17] = [
        Op::Hello,
        Op::Keepalive,
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::VolumeCreate,
        Op::VolumeList,
        Op::VolumeStat,
        Op::VolumeResize,
        Op::VolumeRemove,
        Op::VolumeAssign,
        Op::VolumeFree,
        Op::LabelPut,
        Op::Regions,
        Op::Digest,
    ];

    fn from_code(code: u8) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u8 == code)
    }

    /// Whether the op works on a range of sectors.
    pub const fn has_range(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::Discard | Op::WriteZeroes | Op::Digest)
    }

    /// Whether the op works on data, in a session.
    pub const fn is_io(self) -> bool {
        self.has_range() || matches!(self, Op::Flush)
    }

    /// Whether the body is a message (HELLO, what is asked of a volume as a whole) rather than data.
    pub const fn has_message(self) -> bool {
        !self.is_io() && !matches!(self, Op::Keepalive)
    }
}

/// Bits of the flags field.
pub mod flags {
    /// The frame answers a request.
    pub const REPLY: u16 = 1 << 0;
    /// WRITE, DISCARD, WRITE_ZEROES: durable before the answer.
    pub const FUA: u16 = 1 << 1;
    /// The body's checksum is in the header.
    pub const BODY_CRC: u16 = 1 << 2;
    /// Every bit that has a meaning.
    pub const KNOWN: u16 = REPLY | FUA | BODY_CRC;
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked or answered.
    pub op: Op,
    /// See [`flags`].
    pub flags: u16,
    /// The asker's name for the request; comes back in the answer.
    pub tag: u32,
    /// Tells uses of the same tag apart; comes back in the answer.
    pub sequence: u32,
    /// First sector of the range on the volume. FLUSH has a point there instead, see [`Header::point`].
    pub lba: Lba,
    /// Length of the range, bytes.
    pub length: u32,
    /// Bytes of body after the header.
    pub body_bytes: u32,
    /// CRC32C of the body when `BODY_CRC` is set, else 0. For data see [`data_crc`], for messages the plain one.
    pub body_crc: u32,
    /// The epoch of the session's claim.
    pub epoch: Epoch,
    /// In answers: 0 or an error number of [`errno::WIRE`].
    pub status: u32,
}

/// Why bytes are not a header. All of them end the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadFrame {
    /// The first bytes are not ours.
    Magic,
    /// Another version of the frame layout.
    Version(u8),
    /// The header's checksum does not match.
    HeaderCrc,
    /// An op this version does not know.
    Op(u8),
    /// A bit or field that must be zero is not.
    Reserved,
    /// A length that this op cannot have.
    Length,
    /// The body's checksum does not match.
    BodyCrc,
}

impl std::fmt::Display for BadFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadFrame::Magic => f.write_str("not the dst protocol"),
            BadFrame::Version(version) => write!(f, "frame version {version}, this program speaks {VERSION}"),
            BadFrame::HeaderCrc => f.write_str("header checksum mismatch"),
            BadFrame::Op(op) => write!(f, "unknown operation {op}"),
            BadFrame::Reserved => f.write_str("a reserved field is not zero"),
            BadFrame::Length => f.write_str("a length is out of bounds"),
            BadFrame::BodyCrc => f.write_str("payload checksum mismatch"),
        }
    }
}

impl std::error::Error for BadFrame {}

impl BadFrame {
    /// The error number under which this is reported.
    pub fn errno(self) -> Errno {
        match self {
            BadFrame::Version(_) => Errno::EPROTONOSUPPORT,
            BadFrame::HeaderCrc | BadFrame::BodyCrc => Errno::EILSEQ,
            _ => Errno::EPROTO,
        }
    }
}

impl Header {
    /// A request without body. `extent` is the range on the volume, empty for ops without one; its length must fit the op's cap.
    pub fn request(op: Op, tag: u32, sequence: u32, epoch: Epoch, extent: Extent) -> Header {
        let length = u32::try_from(extent.bytes()).unwrap_or(u32::MAX);
        Header { op, flags: 0, tag, sequence, lba: extent.start, length, body_bytes: 0, body_crc: 0, epoch, status: 0 }
    }

    /// The answer to `self`, without body.
    pub fn reply(&self, result: Result<(), Errno>) -> Header {
        // What a flush asks is not what its answer says there.
        let lba = if self.op == Op::Flush { Lba(0) } else { self.lba };
        Header { flags: flags::REPLY, lba, body_bytes: 0, body_crc: 0, status: errno::to_wire(result), ..*self }
    }

    /// The same frame with a body of `bytes` bytes whose checksum is `crc`.
    pub fn with_body(self, bytes: u32, crc: u32) -> Header {
        Header { body_bytes: bytes, body_crc: crc, flags: self.flags | flags::BODY_CRC, ..self }
    }

    /// The same frame with a body of `bytes` bytes without a checksum.
    pub fn with_bare_body(self, bytes: u32) -> Header {
        Header { body_bytes: bytes, ..self }
    }

    /// Whether the body has a checksum.
    pub fn is_sealed(&self) -> bool {
        self.flags & flags::BODY_CRC != 0
    }

    /// Whether the frame is an answer.
    pub fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// Whether the request wants to be durable before it is answered.
    pub fn is_fua(&self) -> bool {
        self.flags & flags::FUA != 0
    }

    /// The range on the volume; empty for ops without one.
    pub fn extent(&self) -> Extent {
        if !self.op.has_range() {
            return Extent::default();
        }
        Extent { start: self.lba, sectors: u64::from(self.length) / SECTOR_BYTES }
    }

    /// What a FLUSH carries in the place of an address, 0 for nothing. In the request: everything that this server had flushed
    /// up to this point of its own is flushed on every target. In the answer: the server's point of this flush.
    pub fn point(&self) -> u64 {
        if self.op == Op::Flush { self.lba.0 } else { 0 }
    }

    /// A FLUSH, or its answer, with this point.
    pub fn with_point(self, point: u64) -> Header {
        debug_assert!(self.op == Op::Flush);
        Header { lba: Lba(point), ..self }
    }

    /// What an answer says.
    pub fn result(&self) -> Result<(), Errno> {
        errno::from_wire(self.status).map_or(Ok(()), Err)
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.op as u8;
        bytes[6..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.tag.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.lba.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.status.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks and decodes. No byte pattern panics; whatever decodes obeys the caps of its op.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, BadFrame> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if bytes[0..4] != MAGIC {
            return Err(BadFrame::Magic);
        }
        if bytes[4] != VERSION {
            return Err(BadFrame::Version(bytes[4]));
        }
        if crc32c::crc32c(&bytes[..60]) != u32_at(60) {
            return Err(BadFrame::HeaderCrc);
        }
        let header = Header {
            op: Op::from_code(bytes[5]).ok_or(BadFrame::Op(bytes[5]))?,
            flags: u16_at(6),
            tag: u32_at(8),
            sequence: u32_at(12),
            lba: Lba(u64_at(16)),
            length: u32_at(24),
            body_bytes: u32_at(28),
            epoch: Epoch(u64_at(32)),
            status: u32_at(40),
            body_crc: u32_at(44),
        };
        if u64_at(48) != 0 || u32_at(56) != 0 {
            return Err(BadFrame::Reserved);
        }
        header.check()?;
        Ok(header)
    }

    /// The relations between fields that hold for every frame.
    fn check(&self) -> Result<(), BadFrame> {
        let crc = self.is_sealed();
        let mutates = matches!(self.op, Op::Write | Op::Discard | Op::WriteZeroes);
        if self.flags & !flags::KNOWN != 0
            || (self.is_fua() && (self.is_reply() || !mutates))
            || (!self.is_reply() && self.status != 0)
            || (!crc && self.body_crc != 0)
            || (crc && self.body_bytes == 0)
            || (!self.op.has_range() && (self.length != 0 || (self.lba.0 != 0 && self.op != Op::Flush)))
        {
            return Err(BadFrame::Reserved);
        }
        let range_max = match self.op {
            Op::Read | Op::Write => limits::PAYLOAD_BYTES_MAX,
            Op::Digest => limits::DIGEST_RANGE_BYTES_MAX,
            _ => limits::ZERO_BYTES_MAX,
        };
        if self.op.has_range() {
            let aligned = u64::from(self.length).is_multiple_of(SECTOR_BYTES);
            let placed = self.extent().within(limits::ARRAY_SECTORS_MAX);
            if self.length == 0 || self.length > range_max || !aligned || !placed {
                return Err(BadFrame::Length);
            }
        }
        let body_fits = match (self.op, self.is_reply()) {
            (Op::Write, false) => self.body_bytes == self.length,
            (Op::Read, true) if self.status == 0 => self.body_bytes == self.length,
            (Op::Digest, true) if self.status == 0 => self.body_bytes == DIGEST_BYTES,
            (op, _) if op.has_message() => self.body_bytes <= limits::MESSAGE_BYTES_MAX,
            _ => self.body_bytes == 0,
        };
        if body_fits { Ok(()) } else { Err(BadFrame::Length) }
    }
}

/// The checksum of data: over the bytes, then over the volume address they belong to, so that data at a wrong place is noticed.
pub fn data_crc(data: &[u8], lba: Lba) -> u32 {
    bind_crc(crc32c::crc32c(data), lba)
}

/// [`data_crc`] from the plain CRC32C of the data.
pub fn bind_crc(crc: u32, lba: Lba) -> u32 {
    if planted(Bug::UnboundChecksum) {
        return crc;
    }
    crc32c::crc32c_append(crc, &lba.0.to_le_bytes())
}

/// The checksum of a message.
pub fn message_crc(message: &[u8]) -> u32 {
    crc32c::crc32c(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn write() -> Header {
        Header::request(Op::Write, 7, 9, Epoch(3), Extent::new(16, 8)).with_body(4096, 0xdead_beef)
    }

    #[test]
    fn a_write_round_trips() {
        let header = write();
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let reply = header.reply(Err(Errno::ENOSPC));
        assert_eq!(Header::decode(&reply.encode()), Ok(reply));
        assert_eq!(reply.result(), Err(Errno::ENOSPC));
    }

    #[test]
    fn each_field_at_its_bounds() {
        let good = write().encode();
        let set = |at: usize, value: &[u8]| {
            let mut bytes = good;
            bytes[at..at + value.len()].copy_from_slice(value);
            Header::decode(&sealed(bytes))
        };
        assert_eq!(set(0, b"DST\x01"), Err(BadFrame::Magic));
        assert_eq!(set(4, &[0]), Err(BadFrame::Version(0)));
        assert_eq!(set(4, &[2]), Err(BadFrame::Version(2)));
        for op in [0, 8, 15, 23, 32, 35, 37, 255] {
            assert_eq!(set(5, &[op]), Err(BadFrame::Op(op)));
        }
        assert_eq!(set(6, &0xffffu16.to_le_bytes()), Err(BadFrame::Reserved));
        assert!(set(8, &u32::MAX.to_le_bytes()).is_ok());
        assert!(set(12, &u32::MAX.to_le_bytes()).is_ok());
        assert_eq!(set(16, &u64::MAX.to_le_bytes()), Err(BadFrame::Length));
        assert_eq!(set(16, &(limits::ARRAY_SECTORS_MAX - 7).to_le_bytes()), Err(BadFrame::Length));
        assert!(set(16, &(limits::ARRAY_SECTORS_MAX - 8).to_le_bytes()).is_ok());
        for length in [0u32, 1, 511, 513, limits::PAYLOAD_BYTES_MAX + 512, u32::MAX] {
            assert_eq!(set(24, &length.to_le_bytes()), Err(BadFrame::Length), "{length}");
        }
        for body in [0u32, 4095, 4097, u32::MAX] {
            assert!(set(28, &body.to_le_bytes()).is_err(), "{body}");
        }
        assert!(set(32, &u64::MAX.to_le_bytes()).is_ok());
        assert_eq!(set(40, &1u32.to_le_bytes()), Err(BadFrame::Reserved));
        assert_eq!(set(48, &[1]), Err(BadFrame::Reserved));
        assert_eq!(set(59, &[1]), Err(BadFrame::Reserved));
        let mut bytes = good;
        bytes[20] ^= 1;
        assert_eq!(Header::decode(&bytes), Err(BadFrame::HeaderCrc));
    }

    #[test]
    fn caps_follow_the_op() {
        let range = |op, bytes: u64| {
            let header = Header::request(op, 0, 0, Epoch(0), Extent::new(0, bytes / 512));
            Header::decode(&header.encode())
        };
        assert!(range(Op::Read, u64::from(limits::PAYLOAD_BYTES_MAX)).is_ok());
        assert!(range(Op::Read, u64::from(limits::PAYLOAD_BYTES_MAX) + 512).is_err());
        assert!(range(Op::Discard, u64::from(limits::ZERO_BYTES_MAX)).is_ok());
        assert!(range(Op::Discard, u64::from(limits::ZERO_BYTES_MAX) + 512).is_err());
        assert!(range(Op::Flush, 0).is_ok());
        assert!(range(Op::Flush, 512).is_err());
        assert!(range(Op::Digest, u64::from(limits::DIGEST_RANGE_BYTES_MAX)).is_ok());
        assert!(range(Op::Digest, u64::from(limits::DIGEST_RANGE_BYTES_MAX) + 512).is_err());
        let digest = Header::request(Op::Digest, 0, 0, Epoch(0), Extent::new(0, 1)).reply(Ok(()));
        for (bytes, fits) in [(0, false), (DIGEST_BYTES - 1, false), (DIGEST_BYTES, true), (DIGEST_BYTES + 1, false)] {
            assert_eq!(Header::decode(&digest.with_body(bytes, 1).encode()).is_ok(), fits, "{bytes}");
        }
        let hello = |bytes| {
            Header::decode(&Header::request(Op::Hello, 0, 0, Epoch(0), Extent::default()).with_body(bytes, 1).encode())
        };
        assert!(hello(limits::MESSAGE_BYTES_MAX).is_ok());
        assert!(hello(limits::MESSAGE_BYTES_MAX + 1).is_err());
    }

    #[test]
    fn a_flush_carries_points() {
        let flush = Header::request(Op::Flush, 7, 9, Epoch(3), Extent::default()).with_point(u64::MAX);
        assert_eq!(Header::decode(&flush.encode()), Ok(flush));
        assert_eq!((flush.point(), flush.extent()), (u64::MAX, Extent::default()));
        let reply = flush.reply(Ok(()));
        assert_eq!(reply.point(), 0, "what was asked is not an answer");
        assert_eq!(Header::decode(&reply.with_point(5).encode()).unwrap().point(), 5);
        assert_eq!(write().point(), 0);
        let strange = Header { lba: Lba(1), ..Header::request(Op::Keepalive, 0, 0, Epoch(0), Extent::default()) };
        assert_eq!(Header::decode(&strange.encode()), Err(BadFrame::Reserved));
    }

    #[test]
    fn data_at_another_place_has_another_checksum() {
        assert_ne!(data_crc(b"data", Lba(0)), data_crc(b"data", Lba(8)));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform32(any::<u8>()), valid: bool, op: u8) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            if valid {
                all[0..4].copy_from_slice(&MAGIC);
                all[4] = VERSION;
                all[5] = op % 40;
                all[48..60].fill(0);
                all = sealed(all);
            }
            if let Ok(header) = Header::decode(&all) {
                prop_assert_eq!(header.encode(), all);
                prop_assert!(header.body_bytes <= limits::PAYLOAD_BYTES_MAX);
            }
        }

        #[test]
        fn requests_round_trip(op in 0usize..17, tag: u32, sequence: u32, epoch: u64, lba in 0u64..1 << 50, sectors in 1u64..2048, status in 0usize..17) {
            let op = Op::ALL[op];
            let extent = if op.has_range() { Extent::new(lba, sectors) } else { Extent::default() };
            let mut header = Header::request(op, tag, sequence, Epoch(epoch), extent);
            if op == Op::Write {
                header = header.with_body(header.length, 5);
            }
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
            let reply = header.reply(Err(errno::WIRE[status]));
            prop_assert_eq!(Header::decode(&reply.encode()), Ok(reply));
        }
    }
}
