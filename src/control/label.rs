//! What a local target knows of itself: its id and the array it belongs to, as volumes on servers do.
//!
//! For a file it lies beside it, in `<file>.dst`; for a block device in two slots within its last 8 MiB, so that a torn write
//! leaves one. Pure: places and bytes.

use serde::{Deserialize, Serialize};

use crate::control::record;
use crate::control::record::BadRecord;
use crate::units::Id;
use crate::wire::volume::Member;

/// The version of [`Label`] that is written. Version 1 is the first.
pub const VERSION: u32 = 1;
/// The kind of a label's record.
const KIND: &str = "label";
/// The end of a block device that no array uses, bytes: room for labels and later for logs.
pub const RESERVED_BYTES: u64 = 8 << 20;
/// Bytes of one slot: what a disk of any block writes whole.
pub const SLOT_BYTES: usize = 4096;

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// The target's own id.
    pub id: Id,
    /// The array it belongs to.
    pub array: Option<Member>,
}

impl Label {
    /// The bytes to store in a file.
    pub fn encode(&self) -> Result<Vec<u8>, BadRecord> {
        record::encode(KIND, VERSION, self)
    }

    /// The bytes to store in a slot.
    pub fn encode_slot(&self) -> Result<Vec<u8>, BadRecord> {
        let mut bytes = self.encode()?;
        if bytes.len() > SLOT_BYTES {
            return Err(BadRecord::Content("it does not fit its slot".to_owned()));
        }
        bytes.resize(SLOT_BYTES, 0);
        Ok(bytes)
    }

    /// Checks and decodes a file or a slot.
    pub fn decode(bytes: &[u8]) -> Result<Label, BadRecord> {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        record::decode(KIND, VERSION, &bytes[..end])
    }
}

/// Where the label of a file lies.
pub fn beside(path: &str) -> String {
    format!("{path}.dst")
}

/// Where the slots of a block device lie, bytes; `None` when it is too small for any.
pub fn slots(device_bytes: u64) -> Option<[u64; 2]> {
    let whole = device_bytes - device_bytes % SLOT_BYTES as u64;
    let first = whole.checked_sub(RESERVED_BYTES)?;
    Some([first, first + RESERVED_BYTES / 2])
}

/// The bytes of a block device that an array may use.
pub fn usable(device_bytes: u64) -> u64 {
    slots(device_bytes).map_or(0, |[first, _]| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_round_trip() {
        let array = Some(Member { id: Id([1; 16]), name: "a".repeat(64), node: "n-800".to_owned() });
        for label in [Label { id: Id([2; 16]), array }, Label { id: Id([2; 16]), array: None }] {
            assert_eq!(Label::decode(&label.encode().unwrap()), Ok(label.clone()));
            assert_eq!(Label::decode(&label.encode_slot().unwrap()), Ok(label));
        }
        assert_eq!(Label::decode(&[0; SLOT_BYTES]), Err(BadRecord::NotARecord));
    }

    #[test]
    fn slots_are_aligned_and_inside() {
        assert_eq!(slots(RESERVED_BYTES - 1), None);
        assert_eq!(usable(RESERVED_BYTES + 5000), 4096);
        let [first, second] = slots(1_000_000_512).unwrap();
        assert!(first.is_multiple_of(4096) && second.is_multiple_of(4096) && second + 4096 < 1_000_000_512);
    }
}
