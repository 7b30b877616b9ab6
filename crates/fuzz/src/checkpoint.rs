//! Files of a checkpoint: any bytes give a value or an error.

use fathom_weights::config::{config_json as written, parse_generation_config};
use fathom_weights::shard::parse_shard;
use fathom_weights::{InspectReport, parse_config};

/// `config.json`: a config can be reported and written back.
///
/// # Panics
/// If what was written is not what was read.
pub fn config_json(data: &[u8]) {
    let _ = parse_generation_config(data, 129_280);
    let Ok(parsed) = parse_config(data) else { return };
    let _ = InspectReport::of_config(&parsed, String::new()).to_string();
    let again = parse_config(written(&parsed.config).to_string().as_bytes());
    assert_eq!(again.expect("what we write we read").config, parsed.config);
}

/// A safetensors shard: tensors cover the payload exactly.
///
/// # Panics
/// If there is a gap, an overlap, or something after the last tensor.
pub fn safetensors_header(data: &[u8]) {
    let Ok(tensors) = parse_shard(data, "fuzz") else { return };
    let mut position = 0;
    for tensor in &tensors {
        assert_eq!(tensor.begin, position, "no gap, no overlap");
        position = tensor.end;
    }
    let header = u64::from_le_bytes(data[..8].try_into().expect("parsed"));
    assert_eq!(8 + header + position, data.len() as u64, "the file ends with the last tensor");
}
