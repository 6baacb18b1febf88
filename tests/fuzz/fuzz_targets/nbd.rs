//! Fuzzes what an NBD client says, from its first byte.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dst_fuzz::nbd(bytes));
