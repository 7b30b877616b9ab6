//! libFuzzer's door to `fathom_fuzz::output_parser`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fathom_fuzz::output_parser(data));
