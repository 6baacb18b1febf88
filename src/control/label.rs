//! What a local target knows of itself: its id and the array it belongs to, as volumes on servers do.
//!
//! For a file it lies beside it, in `<file>.dst`; for a block device in two slots within its last 8 MiB, so that a torn write
//! leaves one. Pure: places and bytes.

use serde::{Deserialize, Serialize};

use crate::control::record;
use crate::control::record::BadRecord;
use crate::units::Id;
use crate::wire::volume::{Claim, Member};

/// The version of [`Label`] that is written. Version 1 had neither claim nor text; it is still read.
pub const VERSION: u32 = 2;
/// The kind of a label's record.
const KIND: &str = "label";
/// The end of a block device that no array uses, bytes: room for labels and later for logs.
pub const RESERVED_BYTES: u64 = 8 << 20;
/// What slots are aligned to: what a disk of any block writes whole.
const BLOCK_BYTES: u64 = 4096;
/// Bytes of one slot: twice what a text may have, because some of its characters are escaped.
pub const SLOT_BYTES: usize = 64 << 10;

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// The target's own id.
    pub id: Id,
    /// The array it belongs to.
    pub array: Option<Member>,
    /// Who used it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// What its array has stored with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Label {
    /// The label of a target that no array uses.
    pub fn free(id: Id) -> Label {
        Label { id, array: None, claim: None, text: None }
    }

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
        let bytes = &bytes[..end];
        // What version 1 did not have is not there.
        record::decode(KIND, record::version(KIND, bytes).filter(|found| *found < VERSION).unwrap_or(VERSION), bytes)
    }
}

/// Where the label of a file lies.
pub fn beside(path: &str) -> String {
    format!("{path}.dst")
}

/// Where the slots of a block device lie, bytes; `None` when it is too small for any.
pub fn slots(device_bytes: u64) -> Option<[u64; 2]> {
    let whole = device_bytes - device_bytes % BLOCK_BYTES;
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
    use crate::limits;
    use crate::units::Epoch;

    #[test]
    fn labels_round_trip() {
        let array = Some(Member { id: Id([1; 16]), name: "a".repeat(64), node: "n-800".to_owned() });
        let claim = Some(Claim { epoch: Epoch(7), owner: Id([3; 16]), host: Id([4; 16]) });
        let text = Some("\"\n".repeat(limits::LABEL_BYTES_MAX / 2));
        let old = record::encode(KIND, 1, &serde_json::json!({"id": Id([2; 16]), "array": array})).unwrap();
        assert_eq!(Label::decode(&old), Ok(Label { array: array.clone(), ..Label::free(Id([2; 16])) }));
        for label in [Label { id: Id([2; 16]), array, claim, text }, Label::free(Id([2; 16]))] {
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
        assert!(
            first.is_multiple_of(4096) && second.is_multiple_of(4096) && second + SLOT_BYTES as u64 <= 1_000_000_512
        );
    }
}
