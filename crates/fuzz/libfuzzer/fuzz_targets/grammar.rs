//! libFuzzer's door to `fathom_fuzz::grammar`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::grammar(data));
