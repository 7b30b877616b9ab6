//! Relatives of the release: spellings that load, and families that are refused by name.

use fathom_core::ExpertFormat;
use fathom_weights::EffortProfileHint;
use fathom_weights::synthetic::write_synthetic;
use fathom_weights::{Checkpoint, InspectReport, StoredDtype};
use serde_json::json;

use crate::copy::{Copy, INDEX, SHARD_1, SHARD_2, SHARD_3};
use crate::synthetic::tiny;

#[test]
fn the_spellings_of_convert_py_load_under_the_names_of_the_release() {
    let copy = Copy::of_nano();
    copy.rename(|name| {
        let name = name
            .replace("attn_norm", "input_layernorm")
            .replace("ffn_norm", "post_attention_layernorm")
            .replace(".attn.", ".self_attn.")
            .replace(".ffn.", ".mlp.")
            .replace(".gate.bias", ".gate.e_score_correction_bias")
            .replace(".scale", ".weight_scale_inv")
            .replace(".w1.", ".gate_proj.")
            .replace(".w2.", ".down_proj.")
            .replace(".w3.", ".up_proj.");
        match name.as_str() {
            "embed.weight" => "model.embed_tokens.weight".to_owned(),
            "head.weight" => "lm_head.weight".to_owned(),
            _ => format!("model.{name}"),
        }
    });
    let (renamed, nano) = (copy.open().unwrap(), Copy::of_nano().open().unwrap());
    assert_eq!(renamed.n_tensors(), nano.n_tensors());
    for name in nano.names() {
        assert_eq!(renamed.tensor(name).unwrap().data, nano.tensor(name).unwrap().data, "{name}");
    }
}

#[test]
fn two_names_of_one_tensor_are_refused() {
    let copy = Copy::of_nano();
    copy.add_empty("model.embed_tokens.weight");
    assert_eq!(
        copy.refusal(),
        "`embed.weight` and `model.embed_tokens.weight` (model-00001-of-00003.safetensors) \
         are two names of the same tensor"
    );
}

#[test]
fn names_of_hugging_face_are_refused_once_with_what_to_do() {
    let copy = Copy::of_nano();
    copy.rename(|name| name.replace("attn.wq_a", "self_attn.q_a_proj"));
    let report = fathom_weights::InspectReport::of_dir(copy.dir(), false).unwrap();
    assert_eq!(report.refused.len(), 1, "{:?}", report.refused);
    assert!(
        copy.refusal().contains("a name of Hugging Face's own layout: re-download the original")
    );
}

#[test]
fn requantised_and_vision_tensors_are_refused_by_name() {
    let copy = Copy::of_nano();
    copy.rename(|name| name.replace("w1.weight", "w1.weight_packed"));
    assert!(copy.refusal().contains("re-quantised as compressed-tensors (W4A16 or NVFP4)"));
    let copy = Copy::of_nano();
    copy.add_empty("vision.blocks.0.attn.qkv.weight");
    assert!(copy.refusal().contains("vision checkpoint not supported"));
}

#[test]
fn a_checkpoint_sharded_by_convert_py_is_refused_with_the_way_back() {
    let copy = Copy::of_nano();
    for file in [INDEX, SHARD_1, SHARD_2, SHARD_3] {
        copy.remove(file);
    }
    copy.replace("model0-mp2.safetensors", b"");
    let refusal = copy.refusal();
    assert!(refusal.starts_with("model0-mp2.safetensors was written by convert.py"), "{refusal}");
    assert!(refusal.contains("start from the original checkpoint"));
}

#[test]
fn a_hash_table_of_another_width_is_told_as_such() {
    let copy = Copy::of_nano();
    copy.edit_config("num_experts_per_tok", json!(2));
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `layers.0.ffn.gate.tid2eid` lists 3 experts per token, \
         num_experts_per_tok is 2"
    );
}

#[test]
fn the_tensors_settle_the_expert_format_where_the_config_is_silent() {
    let copy = Copy::of_nano();
    copy.edit_json("config.json", |config| {
        config.remove("expert_dtype");
    });
    let checkpoint = copy.open().unwrap();
    assert_eq!(checkpoint.config().expert_format, ExpertFormat::Fp4);
    assert_eq!(checkpoint.notices(), ["expert_dtype is absent: fp4 by the tensors' format"]);
}

#[test]
fn an_expert_format_that_the_tensors_contradict_is_refused() {
    let copy = Copy::of_nano();
    copy.edit_config("expert_dtype", json!("fp8"));
    assert!(copy.refusal().contains("`layers.0.ffn.experts.0.w1.weight` is I8, expected F8_E4M3"));
}

#[test]
fn more_than_one_mtp_block_leaves_the_main_model() {
    let copy = Copy::of_nano();
    copy.edit_config("num_nextn_predict_layers", json!(3));
    copy.edit_config("compress_ratios", json!([0, 4, 128, 4, 0, 0, 0]));
    let checkpoint = copy.open().unwrap();
    assert_eq!(checkpoint.config().num_nextn_predict_layers, 0);
    assert_eq!(checkpoint.config().layer_kinds.len(), 4);
    assert!(checkpoint.notices()[0].starts_with("num_nextn_predict_layers is 3"));
    assert!(checkpoint.notices()[1].starts_with("87 mtp.* tensors"));
    assert!(checkpoint.tensor("mtp.0.norm.weight").is_err());
}

#[test]
fn draft_stages_of_the_later_flash_are_ignored_and_its_effort_prompts_assumed() {
    let copy = Copy::of_nano();
    copy.edit_config("dspark_block_size", json!(8));
    copy.edit_config("compress_ratios", json!([0, 4, 128, 4, 0, 0, 0, 0]));
    copy.add_empty("mtp.0.markov_head.weight");
    let checkpoint = copy.open().unwrap();
    assert_eq!(checkpoint.config().num_nextn_predict_layers, 0);
    assert!(checkpoint.notices()[0].starts_with("DSpark draft stages"));
    let hint = checkpoint.effort_profile_hint().unwrap();
    assert_eq!(hint, Some(EffortProfileHint::Official0731));
}

#[test]
fn draft_stages_are_recognised_by_their_tensors_too() {
    let copy = Copy::of_nano();
    copy.add_empty("mtp.0.confidence_head.weight");
    let checkpoint = copy.open().unwrap();
    assert_eq!(checkpoint.config().num_nextn_predict_layers, 0);
    assert_eq!(checkpoint.config().layer_kinds.len(), 4);
}

#[test]
fn the_bundled_encoder_tells_the_effort_profile() {
    let copy = Copy::of_nano();
    std::fs::create_dir(copy.path("encoding")).unwrap();
    let hint = |text: &str| {
        std::fs::write(copy.path("encoding/encoding_dsv4.py"), text).unwrap();
        copy.open().unwrap().effort_profile_hint().unwrap()
    };
    assert_eq!(hint("REASONING_EFFORT_MAX = 'x'"), Some(EffortProfileHint::Preview));
    let both = "REASONING_EFFORT_PROMPTS = {}\nREASONING_EFFORT_MAX = ''";
    assert_eq!(hint(both), Some(EffortProfileHint::Official0731));
    assert_eq!(hint("def encode_messages(): pass"), None);
}

#[test]
fn a_base_checkpoint_loads_with_f32_scales_and_skips_the_copies() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny();
    config.expert_format = ExpertFormat::Fp8;
    write_synthetic(dir.path(), &config, 1).unwrap();
    let base = Checkpoint::open(dir.path()).unwrap();
    let scale = base.tensor("layers.0.ffn.experts.1.w1.scale").unwrap();
    assert_eq!(scale.dtype, StoredDtype::F32);
    assert!(scale.scale_vec().unwrap().iter().all(|scale| *scale > 0.0));
    assert!(!base.contains("mtp.0.head.weight"));
    assert!(base.notices()[0].starts_with("2 mtp.* tensors"), "{:?}", base.notices());
    base.verify().unwrap();
    // The report counts what lies on disk, so the copies too.
    let report = InspectReport::of_checkpoint(&base, String::new());
    assert_eq!(report.totals.bytes, base.n_bytes());
}

#[test]
fn a_checkpoint_in_one_file_needs_no_index() {
    let dir = tempfile::tempdir().unwrap();
    write_synthetic(dir.path(), &tiny(), 1).unwrap();
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    let shard = dir.path().join("model-00001-of-00001.safetensors");
    std::fs::rename(shard, dir.path().join("model.safetensors")).unwrap();
    Checkpoint::open(dir.path()).unwrap().verify().unwrap();
}
