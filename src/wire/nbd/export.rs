//! What an NBD client is told about an array, and the words both phases of the protocol share.
//!
//! The protocol is the public one: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. All its numbers are
//! big-endian.

use crate::limits;
use crate::units::SECTOR_BYTES;

/// An array as an NBD export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The array's name. The empty name means the same export: it is the only one.
    pub name: String,
    /// For people.
    pub description: String,
    /// Size, sectors.
    pub sectors: u64,
    /// Logical block, bytes: the alignment of every request. A power of two.
    pub block_bytes: u32,
    /// Requests of this size and alignment are served best, bytes; a power of two between the block and 1 MiB.
    pub preferred_bytes: u32,
}

impl Export {
    /// Size, bytes.
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// The largest READ or WRITE, bytes.
    pub const fn payload_bytes_max(&self) -> u32 {
        limits::PAYLOAD_BYTES_MAX
    }
}

/// Transmission flags: what the export can.
pub mod flags {
    /// The field has a meaning; always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The "don't fragment" flag is understood; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// What was agreed before the first request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Answers to READ are structured.
    pub structured: bool,
    /// BLOCK_STATUS answers the context "base:allocation". Implies `structured`.
    pub allocation: bool,
}

impl Terms {
    /// The transmission flags of an export under these terms.
    pub const fn flags(self) -> u16 {
        let always = flags::HAS_FLAGS
            | flags::SEND_FLUSH
            | flags::SEND_FUA
            | flags::SEND_TRIM
            | flags::SEND_WRITE_ZEROES
            | flags::CAN_MULTI_CONN
            | flags::SEND_CACHE;
        if self.structured { always | flags::SEND_DF } else { always }
    }
}

/// Why a client's bytes end its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadClient(pub &'static str);

impl std::fmt::Display for BadClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for BadClient {}

/// The id under which BLOCK_STATUS answers "base:allocation".
pub const ALLOCATION_CONTEXT: u32 = 1;

/// Reads big-endian numbers off the front of bytes; `None` when they end too early.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
