//! Fuzzes the volume messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dst_fuzz::volume(bytes));
