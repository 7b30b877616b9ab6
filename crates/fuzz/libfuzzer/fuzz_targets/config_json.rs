//! `config.json`: any bytes give a config or an error; a config can be reported and written back.
//!
//! Seeds: the files in `models/*/config.json`.
#![no_main]

use fathom_weights::config::{config_json, parse_generation_config};
use fathom_weights::{InspectReport, parse_config};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = parse_generation_config(data, 129_280);
    let Ok(parsed) = parse_config(data) else { return };
    let _ = InspectReport::of_config(&parsed, String::new()).to_string();
    let again = parse_config(config_json(&parsed.config).to_string().as_bytes());
    assert_eq!(again.expect("what we write we read").config, parsed.config);
});
