//! libFuzzer's door to `fathom_fuzz::safetensors_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::safetensors_header(data));
