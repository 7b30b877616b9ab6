//! The published models: what their configs imply is what their indexes list.

use std::collections::BTreeMap;

use fathom_core::{ExpertFormat, ModelConfig};
use fathom_weights::dtype::byte_len;
use fathom_weights::expected::expected_count;
use fathom_weights::{StoredDtype, Variant, expected_tensors, parse_config};

pub(crate) fn flash() -> ModelConfig {
    parse_config(include_bytes!("../../../models/flash/config.json")).expect("published").config
}

pub(crate) fn pro() -> ModelConfig {
    parse_config(include_bytes!("../../../models/pro/config.json")).expect("published").config
}

/// Tensors, bytes and tensors per format.
fn census(config: &ModelConfig, variant: Variant) -> (usize, u64, BTreeMap<StoredDtype, usize>) {
    let tensors = expected_tensors(config, variant);
    assert_eq!(tensors.len() as u64, expected_count(config, variant));
    let mut per_dtype = BTreeMap::new();
    let mut bytes = 0;
    for tensor in &tensors {
        *per_dtype.entry(tensor.dtype).or_default() += 1;
        bytes += byte_len(tensor.dtype, &tensor.shape).expect("fits 64 bits");
    }
    (tensors.len(), bytes, per_dtype)
}

#[test]
fn flash_has_the_tensors_of_its_published_index() {
    let (tensors, bytes, per_dtype) = census(&flash(), Variant::Release);
    assert_eq!((tensors, bytes), (69_187, 159_609_485_896));
    let expected = [
        (StoredDtype::BF16, 433),
        (StoredDtype::F32, 417),
        (StoredDtype::F8E4M3, 375),
        (StoredDtype::F8E8M0, 34_167),
        (StoredDtype::I64, 3),
        (StoredDtype::I8, 33_792),
    ];
    assert_eq!(per_dtype, BTreeMap::from(expected));
}

#[test]
fn pro_has_the_tensors_of_its_published_index() {
    let (tensors, bytes, _) = census(&pro(), Variant::Release);
    assert_eq!((tensors, bytes), (145_116, 864_704_792_696));
}

#[test]
fn base_checkpoints_have_two_tensors_more_and_fp8_experts() {
    let base = |config: ModelConfig| ModelConfig { expert_format: ExpertFormat::Fp8, ..config };
    let (tensors, bytes, _) = census(&base(flash()), Variant::Base);
    assert_eq!(tensors, 69_189);
    assert_eq!(bytes / 10_000_000, 29_467, "294.67 GB");
    let (tensors, bytes, _) = census(&base(pro()), Variant::Base);
    assert_eq!(tensors, 145_118);
    assert_eq!(bytes / 100_000_000, 16_060, "1606.0 GB");
}
