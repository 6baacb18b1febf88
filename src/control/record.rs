//! The frame around everything that is persisted as text: a first line with kind, version and CRC32C, then JSON.
//!
//! `dst array 1 89abcdef` says: an array's record, version 1, CRC32C of everything after this line. A record that decodes is
//! whole and of a version that this program knows, field by field. Pure: bytes in, a value out.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not the record that was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// The first line is not that of a record of this kind.
    NotARecord,
    /// Written by a newer program.
    Newer {
        /// Version found.
        found: u32,
        /// Newest version that this program reads.
        known: u32,
    },
    /// The content is not what was written.
    Checksum,
    /// The content is whole, but is not such a record.
    Content(String),
}

impl std::fmt::Display for BadRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadRecord::NotARecord => f.write_str("damaged: its first line is not that of a record"),
            BadRecord::Newer { found, known } => {
                write!(
                    f,
                    "of version {found}, written by a newer dst; this one reads up to version {known}: upgrade it"
                )
            }
            BadRecord::Checksum => f.write_str("damaged: its checksum does not match"),
            BadRecord::Content(why) => write!(f, "not understood: {why}"),
        }
    }
}

impl std::error::Error for BadRecord {}

/// The bytes to store. `kind` is one word.
pub fn encode<T: Serialize>(kind: &str, version: u32, value: &T) -> Result<Vec<u8>, BadRecord> {
    frame(kind, version, serde_json::to_vec_pretty(value))
}

/// The same with the value in one line, where room is scarce.
pub fn encode_line<T: Serialize>(kind: &str, version: u32, value: &T) -> Result<Vec<u8>, BadRecord> {
    frame(kind, version, serde_json::to_vec(value))
}

fn frame(kind: &str, version: u32, body: serde_json::Result<Vec<u8>>) -> Result<Vec<u8>, BadRecord> {
    let mut body = body.map_err(|error| BadRecord::Content(error.to_string()))?;
    body.push(b'\n');
    let mut bytes = format!("dst {kind} {version} {:08x}\n", crc32c::crc32c(&body)).into_bytes();
    bytes.append(&mut body);
    Ok(bytes)
}

/// The version that a record says it has, and nothing more of it.
pub fn version(kind: &str, bytes: &[u8]) -> Option<u32> {
    let line = bytes.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let ours = words.next() == Some("dst") && words.next() == Some(kind);
    words.next().filter(|_| ours)?.parse().ok()
}

/// Checks and decodes a record of exactly `version`; the types of the content refuse fields they do not know.
pub fn decode<T: DeserializeOwned>(kind: &str, version: u32, bytes: &[u8]) -> Result<T, BadRecord> {
    let line_end = bytes.iter().position(|byte| *byte == b'\n').ok_or(BadRecord::NotARecord)?;
    let (line, body) = (&bytes[..line_end], &bytes[line_end + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| BadRecord::NotARecord)?;
    let mut words = line.split(' ');
    if words.next() != Some("dst") || words.next() != Some(kind) {
        return Err(BadRecord::NotARecord);
    }
    let found: u32 = words.next().and_then(|word| word.parse().ok()).ok_or(BadRecord::NotARecord)?;
    if found > version {
        return Err(BadRecord::Newer { found, known: version });
    }
    let crc = words.next().and_then(|word| u32::from_str_radix(word, 16).ok()).ok_or(BadRecord::NotARecord)?;
    if words.next().is_some() || found != version {
        return Err(BadRecord::NotARecord);
    }
    if crc32c::crc32c(body) != crc {
        return Err(BadRecord::Checksum);
    }
    serde_json::from_slice(body).map_err(|error| BadRecord::Content(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let good = encode("array", 1, &vec!["a", "b"]).unwrap();
        assert_eq!(decode::<Vec<String>>("array", 1, &good).unwrap(), ["a", "b"]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode::<Vec<String>>("array", 1, &bad).is_err(), "byte {at}");
            assert!(decode::<Vec<String>>("array", 1, &good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn kind_and_version_are_checked() {
        let newer = encode("array", 2, &1).unwrap();
        assert_eq!(
            (version("array", &newer), version("label", &newer), version("array", b"dst")),
            (Some(2), None, None)
        );
        assert_eq!(decode::<u32>("array", 1, &newer), Err(BadRecord::Newer { found: 2, known: 1 }));
        assert_eq!(decode::<u32>("label", 2, &newer), Err(BadRecord::NotARecord));
        assert_eq!(decode::<u32>("array", 3, &newer), Err(BadRecord::NotARecord));
        let other = encode("array", 1, &"text").unwrap();
        assert!(matches!(decode::<u32>("array", 1, &other), Err(BadRecord::Content(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode::<u32>("array", 1, &bytes).is_err());
        }
    }
}
