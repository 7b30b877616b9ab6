//! libFuzzer's door to `fathom_fuzz::server_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::server_config(data));
