//! The metadata record of a volume, as it lies beside the data. Pure codec.
//!
//! Two parts: a line `dst volume VERSION CRC32C`, the checksum in eight hexadecimal digits over everything after the line; then
//! JSON. A record that does not decode is never overwritten: the volume is named with the reason and not served.

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::units::{Id, SECTOR_BYTES, check_name, format_size};
use crate::wire::volume::Member;

/// The newest version of the record that this program reads. It is written where it is needed alone: version 1 knows no write-through.
pub const VERSION: u32 = 2;

/// What a volume knows of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its own id, for ever.
    pub id: Id,
    /// Size, bytes.
    pub size: u64,
    /// Space is taken as it is written.
    pub sparse: bool,
    /// Every change is durable before it is answered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_through: bool,
    /// The array it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array: Option<Member>,
}

impl Record {
    /// The bytes to store.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let body = serde_json::to_vec_pretty(self).map_err(|error| format!("the record cannot be written: {error}"))?;
        let mut bytes = format!("dst volume {} {:08x}\n", self.version(), crc32c::crc32c(&body)).into_bytes();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// A server that does not know of it must not serve a volume that is to be written through.
    fn version(&self) -> u32 {
        1 + u32::from(self.write_through)
    }

    /// Checks and decodes; the error says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Record, String> {
        let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it does not start with a dst volume line")?;
        let (line, body) = (&bytes[..end], &bytes[end + 1..]);
        let line = std::str::from_utf8(line).map_err(|_| "it does not start with a dst volume line")?;
        let (version, crc) = line
            .strip_prefix("dst volume ")
            .and_then(|rest| rest.split_once(' '))
            .ok_or("it does not start with a dst volume line")?;
        if !(1..=VERSION).any(|known| version == known.to_string()) {
            return Err(format!("it has version {version}, and this program reads up to version {VERSION}"));
        }
        if crc != format!("{:08x}", crc32c::crc32c(body)) {
            return Err("its checksum does not match".to_owned());
        }
        let record: Record = serde_json::from_slice(body).map_err(|error| format!("its content is wrong: {error}"))?;
        check_size(record.size)?;
        if version != record.version().to_string() {
            return Err(format!("its content is not that of version {version}"));
        }
        Ok(record)
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR_BYTES
    }
}

/// Whether a volume may have this name: metadata files end in `.dst`.
pub fn check_volume_name(name: &str) -> Result<(), String> {
    check_name(name)?;
    if name.ends_with(".dst") {
        return Err(format!("'{name}' cannot be a volume's name: '.dst' at the end is for metadata files"));
    }
    Ok(())
}

/// Whether a volume may have this size.
pub fn check_size(bytes: u64) -> Result<(), String> {
    let max = limits::ARRAY_SECTORS_MAX * SECTOR_BYTES - limits::VOLUME_BYTES_MULTIPLE;
    if bytes == 0 || !bytes.is_multiple_of(limits::VOLUME_BYTES_MULTIPLE) {
        return Err(format!(
            "a volume's size is a multiple of {} bytes; {bytes} is not",
            limits::VOLUME_BYTES_MULTIPLE
        ));
    }
    if bytes > max {
        return Err(format!("a volume has at most {} bytes; {} were asked for", max, format_size(bytes)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> Record {
        let array = Member { id: Id([7; 16]), name: "storage".to_owned(), node: "n-800".to_owned() };
        Record { id: Id([3; 16]), size: 1 << 20, sparse: true, write_through: false, array: Some(array) }
    }

    #[test]
    fn it_round_trips() {
        for record in [record(), Record { array: None, ..record() }, Record { write_through: true, ..record() }] {
            let bytes = record.encode().unwrap();
            let version = if record.write_through { 2 } else { 1 };
            assert!(
                bytes.starts_with(format!("dst volume {version} ").as_bytes()),
                "older servers refuse what they would not do"
            );
            assert_eq!(Record::decode(&bytes), Ok(record));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = record().encode().unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(Record::decode(&bad).is_err(), "byte {at}");
            assert!(Record::decode(&good[..at]).is_err(), "cut at {at}");
        }
        for other in 2..4 {
            let newer = String::from_utf8(good.clone()).unwrap().replacen("volume 1", &format!("volume {other}"), 1);
            assert!(Record::decode(newer.as_bytes()).unwrap_err().contains(&format!("version {other}")));
        }
        let odd = Record { size: 4095, ..record() }.encode().unwrap();
        assert!(Record::decode(&odd).unwrap_err().contains("4096"));
    }

    #[test]
    fn names_and_sizes_are_checked() {
        assert!(check_volume_name("a").is_ok());
        assert!(check_volume_name("a.dst").is_err());
        assert!(check_volume_name(".a").is_err());
        assert!(check_size(4096).is_ok());
        for bad in [0, 1, 4097, u64::MAX, u64::MAX - 4095, 1 << 63] {
            assert!(check_size(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(&bytes);
            let mut line = b"dst volume 1 ".to_vec();
            line.extend_from_slice(&bytes);
            let _ = Record::decode(&line);
        }
    }
}
