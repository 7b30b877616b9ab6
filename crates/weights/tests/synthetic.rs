//! Synthetic checkpoints load, verify, and have sane values.

use fathom_core::{LayerKind, ModelConfig};
use fathom_weights::config::config_json;
use fathom_weights::synthetic::{write_sharded, write_sparse, write_synthetic};
use fathom_weights::{Checkpoint, parse_config};

/// The smallest model with every kind of layer.
pub(crate) fn tiny() -> ModelConfig {
    let json = include_bytes!("../../../models/nano/config.json");
    let mut config = parse_config(json).expect("nano").config;
    config.vocab_size = 64;
    config.hidden_size = 128;
    config.num_attention_heads = 1;
    config.o_groups = 1;
    config.n_routed_experts = 4;
    config.num_experts_per_tok = 4;
    config.index_n_heads = 2;
    config.num_hidden_layers = 3;
    config.num_hash_layers = 1;
    use LayerKind::{Csa, Hca, Window};
    config.layer_kinds = vec![Window, Csa, Hca, Window];
    config
}

#[test]
fn a_synthetic_checkpoint_opens_verifies_and_keeps_its_config() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = write_synthetic(dir.path(), &tiny(), 7).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.notices(), [""; 0]);
    assert_eq!(*checkpoint.config(), tiny());
    assert_eq!(checkpoint.n_bytes(), bytes);
    checkpoint.verify().unwrap();
    // 64 tokens hold no tokenizer of 1,024 entries.
    assert!(checkpoint.tokenizer_json().is_err());
}

#[test]
fn the_seed_alone_decides_the_values_not_the_shards() {
    let (one, many, other) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_synthetic(one.path(), &tiny(), 7).unwrap();
    write_sharded(many.path(), &tiny(), 7, 200_000).unwrap();
    write_synthetic(other.path(), &tiny(), 8).unwrap();
    let open = |dir: &tempfile::TempDir| Checkpoint::open(dir.path()).unwrap();
    let (one, many, other) = (open(&one), open(&many), open(&other));
    assert_eq!(one.n_shards(), 1);
    assert!(many.n_shards() > 3);
    for name in one.names() {
        assert_eq!(one.tensor(name).unwrap().data, many.tensor(name).unwrap().data, "{name}");
    }
    let name = "layers.1.attn.wq_a.weight";
    assert_ne!(one.tensor(name).unwrap().data, other.tensor(name).unwrap().data);
}

#[test]
fn rows_of_synthetic_weights_keep_the_size_of_their_input() {
    let dir = tempfile::tempdir().unwrap();
    write_synthetic(dir.path(), &tiny(), 7).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let rms =
        |values: &[f32]| (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
    // wq_b is [512, 128]: one column of scales. 128 inputs ask for about 1/sqrt(128) = 0.088.
    let codes = checkpoint.tensor("layers.0.attn.wq_b.weight").unwrap();
    let scales = checkpoint.tensor("layers.0.attn.wq_b.scale").unwrap().scale_vec().unwrap();
    let values: Vec<f32> = codes
        .data
        .iter()
        .enumerate()
        .map(|(i, code)| fathom_core::num::e4m3_to_f32(*code) * scales[i / (128 * 128)])
        .collect();
    assert!((0.04..0.14).contains(&rms(&values)), "{}", rms(&values));
    let packed = checkpoint.tensor("layers.0.ffn.experts.0.w1.weight").unwrap();
    let scales = checkpoint.tensor("layers.0.ffn.experts.0.w1.scale").unwrap().scale_vec().unwrap();
    let values: Vec<f32> = packed
        .data
        .iter()
        .enumerate()
        .map(|(i, pair)| fathom_core::num::e2m1_to_f32(pair & 15) * scales[i / 16])
        .collect();
    assert!((0.04..0.14).contains(&rms(&values)), "{}", rms(&values));
    let head = checkpoint.tensor("head.weight").unwrap().bf16_vec().unwrap();
    assert!((0.07..0.11).contains(&rms(&head)), "{}", rms(&head));
}

#[test]
fn a_written_config_reads_back_as_it_was() {
    for json in [
        &include_bytes!("../../../models/nano/config.json")[..],
        include_bytes!("../../../models/flash/config.json"),
        include_bytes!("../../../models/pro/config.json"),
    ] {
        let parsed = parse_config(json).unwrap();
        assert_eq!(parsed.notices, [""; 0]);
        let text = config_json(&parsed.config).to_string();
        assert_eq!(parse_config(text.as_bytes()).unwrap().config, parsed.config);
    }
}

#[test]
fn a_sparse_checkpoint_of_the_size_of_flash_opens_in_a_few_megabytes_of_disk() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let flash = crate::released::flash();
    let bytes = write_sparse(dir.path(), &flash, 3_500_000_000).unwrap();
    assert_eq!(bytes, 159_609_485_896);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!((checkpoint.n_tensors(), checkpoint.n_shards()), (69_187, 46));
    assert_eq!(checkpoint.notices(), [""; 0]);
    let on_disk: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum();
    assert!(on_disk < 64 << 20, "{on_disk}");
}
