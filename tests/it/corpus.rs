//! Replays the committed corpus of every fuzz target, and mangled copies of it, through the entries that the fuzzer uses.

use std::path::Path;

// A library when the fuzzer builds it.
#[allow(unreachable_pub)]
#[path = "../fuzz/entries.rs"]
mod entries;

#[test]
fn every_decoder_survives_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/corpus");
    for (name, entry) in entries::TARGETS {
        let files: Vec<_> = std::fs::read_dir(corpus.join(name)).unwrap().map(|file| file.unwrap().path()).collect();
        assert!(files.len() >= 3, "{name} has hardly a corpus");
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            entry(&bytes);
            mangle(&bytes, entry);
        }
    }
}

/// Cuts the bytes everywhere, and sets each byte to its extremes.
fn mangle(bytes: &[u8], entry: fn(&[u8])) {
    let bytes = &bytes[..bytes.len().min(1024)];
    for at in 0..bytes.len() {
        entry(&bytes[..at]);
        for value in [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 1] {
            let mut copy = bytes.to_vec();
            copy[at] = value;
            entry(&copy);
        }
    }
}
