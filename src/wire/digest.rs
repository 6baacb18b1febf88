//! The answer to DIGEST: what a range of a volume holds, in 40 bytes. Pure codec, and the hash.
//!
//! A digest depends on the bytes of the range alone, so those of two volumes can be compared, whoever asks.

use crate::wire::frame::DIGEST_BYTES;

/// Bytes of an encoded [`Digest`].
const BYTES: usize = DIGEST_BYTES as usize;
const HASH_BYTES: usize = 32;

/// What a server says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// BLAKE3 of the range's bytes.
    pub hash: [u8; HASH_BYTES],
    /// How many bytes of the range are allocated on the disk; where that is not known, all of them. The others read as zeros.
    pub allocated: u64,
}

impl Digest {
    /// The body to send.
    pub fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..HASH_BYTES].copy_from_slice(&self.hash);
        bytes[HASH_BYTES..].copy_from_slice(&self.allocated.to_le_bytes());
        bytes
    }

    /// The digest in a body; `None` when it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Digest> {
        let (hash, rest) = bytes.split_first_chunk()?;
        let allocated = u64::from_le_bytes(rest.try_into().ok()?);
        Some(Digest { hash: *hash, allocated })
    }
}

/// Makes the hash of a range piece by piece.
#[derive(Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// The next bytes of the range.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything so far.
    pub fn finish(&self, allocated: u64) -> Digest {
        Digest { hash: *self.0.finalize().as_bytes(), allocated }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_round_trips() {
        let mut hasher = Hasher::default();
        hasher.update(b"ab");
        hasher.update(b"c");
        let digest = hasher.finish(0x0102_0304_0506);
        let hex: String = digest.hash.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
            "the published value for abc"
        );
        assert_eq!(Digest::decode(&digest.encode()), Some(digest));
        assert_eq!(Digest::decode(&digest.encode()[..39]), None);
        assert_eq!(Digest::decode(&[0; 41]), None);
    }
}
