//! The nano checkpoint opens, whole and embedded, and its tensors are those of an independent
//! reader.

use std::path::PathBuf;

use fathom_core::{ExpertFormat, LayerKind};
use fathom_weights::{Checkpoint, StoredDtype};
use safetensors::SafeTensors;

pub(crate) fn nano_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/nano")
}

#[test]
fn nano_opens_without_a_notice_and_with_every_tensor() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    assert_eq!(nano.notices(), [""; 0]);
    assert_eq!(nano.n_shards(), 3);
    assert_eq!(nano.n_bytes(), 12_351_788);
    let config = nano.config();
    use LayerKind::{Csa, Hca, Window};
    assert_eq!(config.layer_kinds, [Window, Csa, Hca, Csa, Window]);
    assert_eq!(config.expert_format, ExpertFormat::Fp4);
    assert_eq!(config.swiglu_limit, Some(2.5));
    assert_eq!(nano.generation_config().eos_token_ids, [1]);
}

#[test]
fn every_tensor_is_what_the_safetensors_crate_reads() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    let mut n_compared = 0;
    for shard in 1..=3 {
        let file = nano_dir().join(format!("model-0000{shard}-of-00003.safetensors"));
        let bytes = std::fs::read(file).unwrap();
        for (name, expected) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let view = nano.tensor(&name).unwrap();
            assert_eq!(view.data, expected.data(), "{name}");
            assert_eq!(view.shape, expected.shape(), "{name}");
            assert_eq!(view.dtype.name(), expected.dtype().to_string(), "{name}");
            n_compared += 1;
        }
    }
    assert_eq!(nano.n_tensors(), n_compared);
}

#[test]
fn typed_readings_widen_exactly_and_refuse_another_format() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    let norm = nano.tensor("norm.weight").unwrap();
    let widened = norm.bf16_vec().unwrap();
    assert_eq!(widened.len(), 256);
    let first = u16::from_le_bytes([norm.data[0], norm.data[1]]);
    assert_eq!(widened[0].to_bits(), u32::from(first) << 16);
    assert!(
        norm.f32_vec().unwrap_err().to_string().contains("`norm.weight` is BF16, expected F32")
    );
    let scale = nano.tensor("layers.0.attn.wq_a.scale").unwrap();
    assert_eq!(scale.dtype, StoredDtype::F8E8M0);
    assert_eq!(scale.scale_vec().unwrap()[0], 2.0_f32.powi(i32::from(scale.data[0]) - 127));
}

#[test]
fn the_hash_table_of_nano_has_three_experts_per_token() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    let table = nano.tid2eid("layers.1.ffn.gate.tid2eid").unwrap();
    assert_eq!(table.len(), 1024 * 3);
    assert!(table.iter().all(|id| *id < 8));
}

#[test]
fn nano_verifies_and_names_no_effort_profile() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    nano.verify().unwrap();
    assert_eq!(nano.effort_profile_hint().unwrap(), None);
    assert!(nano.tokenizer_json().unwrap().starts_with(b"{"));
    assert!(nano.tokenizer_config_json().unwrap().is_some());
}

#[test]
fn the_embedded_checkpoint_is_the_same_as_the_directory() {
    macro_rules! nano_file {
        ($name:literal) => {
            ($name, include_bytes!(concat!("../../../models/nano/", $name)) as &'static [u8])
        };
    }
    let embedded = Checkpoint::from_embedded(&[
        nano_file!("config.json"),
        nano_file!("generation_config.json"),
        nano_file!("model.safetensors.index.json"),
        nano_file!("model-00001-of-00003.safetensors"),
        nano_file!("model-00002-of-00003.safetensors"),
        nano_file!("model-00003-of-00003.safetensors"),
    ])
    .unwrap();
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    assert_eq!(embedded.config(), nano.config());
    for name in nano.names() {
        assert_eq!(embedded.tensor(name).unwrap().data, nano.tensor(name).unwrap().data, "{name}");
    }
    let missing = embedded.tokenizer_json().unwrap_err().to_string();
    assert!(missing.contains("no tokenizer.json in <embedded>"), "{missing}");
}
