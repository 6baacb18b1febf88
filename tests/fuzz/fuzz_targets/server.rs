//! Fuzzes the rules of a volume on a server.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| dst_fuzz::server::run(script));
