//! libFuzzer's door to `fathom_fuzz::stream_disconnects`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::stream_disconnects(data));
