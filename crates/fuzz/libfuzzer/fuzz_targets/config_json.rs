//! libFuzzer's door to `fathom_fuzz::config_json`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::config_json(data));
