//! Fuzzes HELLO and its answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dst_fuzz::session(bytes));
