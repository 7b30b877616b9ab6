//! A safetensors shard: any bytes give tensors or an error; tensors cover the payload exactly.
//!
//! Seeds: the first bytes of `models/nano/*.safetensors`.
#![no_main]

use fathom_weights::shard::parse_shard;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(tensors) = parse_shard(data, "fuzz") else { return };
    let mut position = 0;
    for tensor in &tensors {
        assert_eq!(tensor.begin, position, "no gap, no overlap");
        position = tensor.end;
    }
    let header = u64::from_le_bytes(data[..8].try_into().expect("parsed"));
    assert_eq!(8 + header + position, data.len() as u64, "the file ends with the last tensor");
});
