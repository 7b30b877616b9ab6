//! libFuzzer's door to `fathom_fuzz::request_body`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::request_body(data));
