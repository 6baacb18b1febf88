//! Words of the whole program: sectors, extents, identifiers, time. Plain values, no behaviour beyond arithmetic.
//!
//! A sector is always 512 bytes, whatever the logical block of a device is. Every name says its unit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes in one sector, the unit of every address in dst.
pub const SECTOR_BYTES: u64 = 512;

/// An address in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lba(pub u64);

impl Lba {
    /// The address in bytes. Addresses are bounded by `limits::ARRAY_SECTORS_MAX`, so this cannot overflow for a checked one.
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A run of sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First sector.
    pub start: Lba,
    /// Length in sectors.
    pub sectors: u64,
}

impl Extent {
    /// `sectors` sectors from `start`.
    pub const fn new(start: u64, sectors: u64) -> Extent {
        Extent { start: Lba(start), sectors }
    }

    /// The first sector after the extent. Meaningful for extents that passed `within`.
    pub const fn end(self) -> Lba {
        Lba(self.start.0 + self.sectors)
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// Whether the extent lies inside a device of `sectors` sectors; safe against overflow.
    pub const fn within(self, sectors: u64) -> bool {
        match self.start.0.checked_add(self.sectors) {
            Some(end) => end <= sectors,
            None => false,
        }
    }

    /// Whether the two have a sector in common.
    pub const fn overlaps(self, other: Extent) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }
}

/// A node's name: its lowest array sector when it was added. Shown as `n-<start>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub Lba);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n-{}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<NodeId, String> {
        let start = text.strip_prefix("n-").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        start.and_then(|digits| digits.parse().ok()).map(|start| NodeId(Lba(start))).ok_or_else(|| {
            format!(
                "'{}' is not a node: nodes are named by their first sector, such as n-0 or n-800",
                text.escape_default()
            )
        })
    }
}

/// The claim number of a volume: it only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// 128 random bits that name something for ever.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// The id that names nothing.
    pub const NIL: Id = Id([0; 16]);

    /// Whether this names nothing.
    pub fn is_nil(self) -> bool {
        self == Id::NIL
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id {
    type Err = String;

    fn from_str(text: &str) -> Result<Id, String> {
        let bad = || format!("'{text}' is not an id: 32 hexadecimal digits are expected");
        if text.len() != 32 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Id(bytes))
    }
}

impl Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Id, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A moment of a monotonic clock, in nanoseconds from an arbitrary start. Rules take it as an argument, they never read a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// A moment that never comes.
    pub const NEVER: Time = Time(u64::MAX);

    /// This moment plus `duration`, or `NEVER` where that cannot be told.
    pub fn after(self, duration: Duration) -> Time {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Time(self.0.saturating_add(nanos))
    }

    /// How long after `earlier` this is; zero when it is not.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A size as people type it: `10G`, `64K`, `512`. K, M, G, T are powers of 1024. Bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad =
        || format!("'{text}' is not a size: use bytes, or a number with K, M, G or T (powers of 1024), such as 10G");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// A size as people read it: exact in the largest unit that divides it, else with one decimal.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    for (unit, shift) in UNITS {
        let one = 1u64 << shift;
        if bytes >= one {
            let whole = bytes / one;
            let tenths = (bytes % one) * 10 / one;
            return if bytes.is_multiple_of(one) {
                format!("{whole}{unit}")
            } else {
                format!("{whole}.{tenths}{unit}")
            };
        }
    }
    format!("{bytes}")
}

/// A time as people type it: `60s`, `500ms`, `2m`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is not a time: use a number with us, ms, s, m or h, such as 60s");
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let micros = match unit {
        "us" => Some(number),
        "ms" => number.checked_mul(1000),
        "" | "s" => number.checked_mul(1_000_000),
        "m" => number.checked_mul(60_000_000),
        "h" => number.checked_mul(3_600_000_000),
        _ => None,
    };
    micros.map(Duration::from_micros).ok_or_else(bad)
}

/// A time as `parse_duration` reads it: the largest unit that divides it.
pub fn format_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        0 => "0s".to_owned(),
        m if m % 3_600_000 == 0 => format!("{}h", m / 3_600_000),
        m if m % 60_000 == 0 => format!("{}m", m / 60_000),
        m if m % 1000 == 0 => format!("{}s", m / 1000),
        m => format!("{m}ms"),
    }
}

/// Names of arrays and volumes: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`. Says what is wrong with one that is not.
pub fn check_name(text: &str) -> Result<(), String> {
    let mut bytes = text.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if first && rest && text.len() <= crate::limits::NAME_BYTES_MAX {
        return Ok(());
    }
    Err(format!(
        "'{}' is not a name: it starts with a letter or digit, goes on with letters, digits, '.', '_' or '-', and has at most {} characters",
        text.escape_default(),
        crate::limits::NAME_BYTES_MAX
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_round_trip() {
        for (text, bytes) in [("512", 512), ("64K", 65536), ("10G", 10 << 30), ("1T", 1 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(format_size(bytes), text);
        }
        for bad in ["", "K", "-1", "1.5G", "1KB", "99999999999999999999", "18446744073709551615T", "G1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        for text in ["60ms", "5s", "2m", "3h"] {
            assert_eq!(format_duration(parse_duration(text).unwrap()), text);
        }
        assert_eq!(parse_duration("50us"), Ok(Duration::from_micros(50)));
        assert!(parse_duration("5 s").is_err());
        assert!(parse_duration("s").is_err());
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "storage", "A-1.b_c", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "-a", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn extents_do_not_overflow() {
        assert!(!Extent::new(u64::MAX, 2).within(u64::MAX));
        assert!(Extent::new(8, 8).within(16));
        assert!(!Extent::new(9, 8).within(16));
        assert!(Extent::new(0, 2).overlaps(Extent::new(1, 1)));
        assert!(!Extent::new(0, 2).overlaps(Extent::new(2, 1)));
    }

    #[test]
    fn nodes_round_trip() {
        assert_eq!("n-800".parse(), Ok(NodeId(Lba(800))));
        for bad in ["", "n-", "800", "n-+1", "n--1", "n-99999999999999999999", "N-1"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_round_trip() {
        let id: Id = "00112233445566778899aabbccddeeff".parse().unwrap();
        assert_eq!(id.to_string(), "00112233445566778899aabbccddeeff");
        assert!("0011".parse::<Id>().is_err());
        assert!("zz112233445566778899aabbccddeeff".parse::<Id>().is_err());
    }
}
