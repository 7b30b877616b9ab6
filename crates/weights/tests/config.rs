//! config.json: spellings that are accepted, values that are refused, and the words used.

use fathom_core::{ExpertFormat, LayerKind, ModelConfig};
use fathom_weights::config::parse_generation_config;
use fathom_weights::{ConfigError, ParsedConfig, parse_config};
use serde_json::{Map, Value, json};

use crate::released::{flash, pro};

/// Flash's config after `edit`.
fn edited(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<ParsedConfig, ConfigError> {
    let mut config: Map<String, Value> =
        serde_json::from_slice(include_bytes!("../../../models/flash/config.json"))
            .expect("an object");
    edit(&mut config);
    parse_config(Value::Object(config).to_string().as_bytes())
}

fn with(key: &str, value: Value) -> Result<ParsedConfig, ConfigError> {
    edited(|config| {
        config.insert(key.to_owned(), value);
    })
}

fn refusal(key: &str, value: Value) -> String {
    with(key, value).expect_err("refused").to_string()
}

fn without(keys: &[&str]) -> Result<ParsedConfig, ConfigError> {
    edited(|config| config.retain(|key, _| !keys.contains(&key.as_str())))
}

#[test]
fn the_published_configs_mean_the_published_dimensions() {
    let flash = flash();
    assert_eq!((flash.num_hidden_layers, flash.layer_kinds.len()), (43, 44));
    assert_eq!(
        flash.layer_kinds[..4],
        [LayerKind::Window, LayerKind::Window, LayerKind::Csa, LayerKind::Hca]
    );
    assert_eq!((flash.swiglu_limit, flash.routed_scaling_factor), (Some(10.0), 1.5));
    assert_eq!((flash.yarn.factor, flash.yarn.original_max_position_embeddings), (16.0, 65_536));
    let pro = pro();
    assert_eq!((pro.num_hidden_layers, pro.layer_kinds.len()), (61, 62));
    assert_eq!(pro.layer_kinds[0], LayerKind::Hca);
    assert_eq!((pro.index_topk, pro.routed_scaling_factor), (1024, 2.5));
}

#[test]
fn every_dimension_is_required_and_named_when_missing() {
    for key in [
        "architectures",
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "o_groups",
        "o_lora_rank",
        "compress_ratios",
        "rope_theta",
        "compress_rope_theta",
        "rope_scaling",
        "index_n_heads",
        "index_topk",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "num_hash_layers",
        "routed_scaling_factor",
        "quantization_config",
        "vocab_size",
    ] {
        let error = without(&[key]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{key}` is missing, expected ")), "{error}");
    }
}

#[test]
fn values_the_kernels_assume_are_the_only_ones_accepted() {
    for (key, value) in [
        ("head_dim", json!(256)),
        ("qk_rope_head_dim", json!(128)),
        ("index_head_dim", json!(64)),
        ("sliding_window", json!(4096)),
        ("hc_mult", json!(2)),
        ("num_key_value_heads", json!(8)),
        ("n_shared_experts", json!(2)),
        ("scoring_func", json!("sigmoid")),
        ("topk_method", json!("greedy")),
        ("norm_topk_prob", json!(false)),
        ("tie_word_embeddings", json!(true)),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("partial_rotary_factor", json!(0.25)),
    ] {
        let error = refusal(key, value.clone());
        let begin = format!("`{key}` is {value}, but only ");
        assert!(error.starts_with(&begin), "{error}");
    }
}

#[test]
fn a_number_out_of_range_is_told_with_its_range() {
    for (key, value, expected) in [
        (
            "hidden_size",
            json!(4000),
            "`hidden_size` is 4000, expected a multiple of 128, the width of a quantisation block",
        ),
        (
            "hidden_size",
            json!(1_u64 << 60),
            "`hidden_size` is 1152921504606846976, expected an integer from 128 to 131072",
        ),
        (
            "num_hidden_layers",
            json!(0),
            "`num_hidden_layers` is 0, expected an integer from 1 to 512",
        ),
        (
            "num_hidden_layers",
            json!(-1),
            "`num_hidden_layers` is -1, expected an integer from 1 to 512",
        ),
        (
            "num_hidden_layers",
            json!(43.5),
            "`num_hidden_layers` is 43.5, expected an integer from 1 to 512",
        ),
        (
            "num_hidden_layers",
            json!("43"),
            "`num_hidden_layers` is \"43\", expected an integer from 1 to 512",
        ),
        (
            "num_experts_per_tok",
            json!(257),
            "`num_experts_per_tok` is 257, expected an integer from 1 to 256",
        ),
        (
            "n_routed_experts",
            json!(1_u64 << 40),
            "`n_routed_experts` is 1099511627776, expected an integer from 1 to 4096",
        ),
        ("o_groups", json!(7), "`o_groups` is 7, expected a divisor of the 64 attention heads"),
        ("rope_theta", json!(0), "`rope_theta` is 0, expected a number from 1 to 1000000000000"),
        (
            "eos_token_id",
            json!(129_280),
            "`eos_token_id` is 129280, expected a token id below 129280",
        ),
        ("expert_dtype", json!("int4"), "`expert_dtype` is \"int4\", expected \"fp4\" or \"fp8\""),
        ("num_hash_layers", json!(44), "`num_hash_layers` is 44, expected an integer from 0 to 43"),
        ("rope_scaling", json!(7), "`rope_scaling` is 7, expected an object"),
    ] {
        assert_eq!(refusal(key, value), expected);
    }
    let huge = r#"{"model_type":"deepseek_v4","architectures":["DeepseekV4ForCausalLM"],"vision_n_layers":0,"head_dim":1e999999}"#;
    assert!(
        parse_config(huge.as_bytes())
            .unwrap_err()
            .to_string()
            .starts_with("`head_dim` is 1e+999999")
    );
}

#[test]
fn compress_ratios_are_one_per_layer_and_of_three_values() {
    assert_eq!(
        refusal("compress_ratios", json!(vec![0; 42])),
        "`compress_ratios` has 42 entries, expected 44 (num_hidden_layers + num_nextn_predict_layers)"
    );
    assert!(refusal("compress_ratios", json!(vec![0; 45])).contains("has 45 entries, expected 44"));
    let mut ratios = vec![0; 44];
    ratios[5] = 8;
    assert_eq!(
        refusal("compress_ratios", json!(ratios)),
        "`compress_ratios[5]` is 8, expected 0, 4 or 128"
    );
    let mut ratios = vec![0; 44];
    ratios[43] = 4;
    assert!(refusal("compress_ratios", json!(ratios)).contains("4 for the MTP block"));
}

#[test]
fn relatives_of_v4_have_their_own_refusals() {
    for (key, value, expected) in [
        ("model_type", json!("deepseek_v41"), "DeepSeek-V4.1 is not supported"),
        (
            "model_type",
            json!("deepseek_v3"),
            "`model_type` is \"deepseek_v3\", expected deepseek_v4",
        ),
        (
            "architectures",
            json!(["DeepseekV4ForConditionalGeneration"]),
            "vision checkpoint not supported",
        ),
        ("architectures", json!(["LlamaForCausalLM"]), "expected DeepseekV4ForCausalLM"),
        ("vision_n_layers", json!(24), "vision checkpoint not supported (`vision_n_layers` is 24)"),
        ("n_routed_experts_score", json!(256), "expert-pruned checkpoint not supported"),
    ] {
        let error = refusal(key, value);
        assert!(error.contains(expected), "{error}");
    }
    for (key, value, expected) in [
        (
            "quant_method",
            json!("compressed-tensors"),
            "(`quantization_config.quant_method` is \"compressed-tensors\")",
        ),
        ("moe_quant_algo", json!("NVFP4"), "(`quantization_config.moe_quant_algo` is \"NVFP4\")"),
        (
            "scale_fmt",
            json!("float"),
            "`quantization_config.scale_fmt` is \"float\", but only \"ue8m0\"",
        ),
        ("weight_block_size", json!([64, 64]), "only [128,128] is supported"),
        ("fmt", json!("e5m2"), "`quantization_config.fmt` is \"e5m2\""),
        ("activation_scheme", json!("static"), "only \"dynamic\" is supported"),
    ] {
        let edit = |config: &mut Map<String, Value>| config["quantization_config"][key] = value;
        let error = edited(edit).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_hugging_face_writes_when_it_saves_means_the_same_model() {
    let parsed = edited(|config| {
        let types: Vec<&str> = flash().layer_kinds[..43]
            .iter()
            .map(|kind| match kind {
                LayerKind::Window => "sliding_attention",
                LayerKind::Csa => "compressed_sparse_attention",
                LayerKind::Hca => "heavily_compressed_attention",
            })
            .collect();
        let mlp: Vec<&str> = (0..43).map(|l| if l < 3 { "hash_moe" } else { "moe" }).collect();
        for key in [
            "compress_ratios",
            "num_hash_layers",
            "rope_scaling",
            "qk_rope_head_dim",
            "rope_theta",
            "compress_rope_theta",
            "expert_dtype",
        ] {
            config.remove(key);
        }
        config.insert("layer_types".into(), json!(types));
        let rates = json!({"compressed_sparse_attention": 4, "heavily_compressed_attention": 128});
        config.insert("compress_rates".into(), rates);
        config.insert("mlp_layer_types".into(), json!(mlp));
        config.insert("partial_rotary_factor".into(), json!(0.125));
        let rope = json!({
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
            "compress": {
                "rope_type": "yarn", "rope_theta": 160000.0, "factor": 16.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "original_max_position_embeddings": 65536
            },
        });
        config.insert("rope_parameters".into(), rope);
        config["quantization_config"]["expert_dtype"] = json!("fp4");
    })
    .unwrap();
    assert_eq!(parsed.config, flash());
    assert!(parsed.expert_format_given);
    assert_eq!(parsed.notices.len(), 1, "{:?}", parsed.notices);
    assert!(parsed.notices[0].ends_with("the MTP block is taken as ratio 0"));
}

#[test]
fn the_key_names_of_the_inference_config_mean_the_same_model() {
    let ratios: Vec<usize> = flash().layer_kinds.iter().map(|kind| kind.ratio()).collect();
    let config = json!({
        "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43,
        "n_hash_layers": 3, "n_mtp_layers": 1, "n_heads": 64, "n_routed_experts": 256,
        "n_shared_experts": 1, "n_activated_experts": 6, "score_func": "sqrtsoftplus",
        "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512,
        "rope_head_dim": 64, "o_groups": 8, "o_lora_rank": 1024, "window_size": 128,
        "original_seq_len": 65536, "rope_theta": 10000, "rope_factor": 16, "beta_fast": 32,
        "beta_slow": 1, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "dtype": "fp8", "scale_fmt": "ue8m0",
        "expert_dtype": "fp4", "compress_rope_theta": 160000, "compress_ratios": ratios,
    });
    let parsed = parse_config(config.to_string().as_bytes()).unwrap();
    assert_eq!(parsed.config, flash());
    assert!(parsed.notices[0].contains("inference/config.json"));
}

#[test]
fn two_spellings_of_a_key_must_agree() {
    with("dim", json!(4096)).unwrap();
    assert_eq!(
        refusal("dim", json!(8192)),
        "`hidden_size` is 4096, but `dim` is 8192: remove the wrong one"
    );
    let types = json!(vec!["sliding_attention"; 43]);
    assert!(refusal("layer_types", types).contains("but `layer_types` is an array of 43 entries"));
    let mlp = json!(vec!["moe"; 43]);
    assert!(refusal("mlp_layer_types", mlp).contains("`num_hash_layers` is 3"));
}

#[test]
fn optional_keys_fall_back_and_say_so_where_it_matters() {
    let parsed = without(&["expert_dtype"]).unwrap();
    assert_eq!(parsed.config.expert_format, ExpertFormat::Fp4);
    assert!(!parsed.expert_format_given);
    assert!(parsed.notices[0].starts_with("expert_dtype is absent: fp4 is assumed"));

    let parsed = edited(|config| {
        config["quantization_config"].as_object_mut().unwrap().remove("scale_fmt");
    })
    .unwrap();
    assert!(parsed.notices[0].contains("ue8m0 is assumed"));

    let silent = without(&[
        "hc_eps",
        "hc_sinkhorn_iters",
        "rms_norm_eps",
        "head_dim",
        "sliding_window",
        "hc_mult",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "index_head_dim",
    ])
    .unwrap();
    assert_eq!(silent.config, flash());
    assert_eq!(silent.notices, [""; 0]);

    let no_clamp = ModelConfig { swiglu_limit: None, ..flash() };
    assert_eq!(without(&["swiglu_limit"]).unwrap().config, no_clamp);
    assert_eq!(with("swiglu_limit", json!(0)).unwrap().config, no_clamp);
}

#[test]
fn a_config_without_mtp_has_no_mtp_block() {
    let parsed = edited(|config| {
        config.remove("num_nextn_predict_layers");
        config["compress_ratios"].as_array_mut().unwrap().pop();
    })
    .unwrap();
    assert_eq!(parsed.config.num_nextn_predict_layers, 0);
    assert_eq!(parsed.config.layer_kinds.len(), 43);
}

#[test]
fn the_json_itself_must_be_an_object() {
    assert_eq!(parse_config(b"{").unwrap_err().to_string(), "not valid JSON");
    assert_eq!(
        parse_config(b"[1]").unwrap_err().to_string(),
        "the top level is [1], expected an object"
    );
}

#[test]
fn generation_config_is_read_and_checked() {
    let parse = |json: &str| parse_generation_config(json.as_bytes(), 1000);
    let parsed =
        parse(r#"{"temperature": 0.6, "top_p": 0.95, "top_k": 0, "eos_token_id": [1, 7]}"#)
            .unwrap();
    assert_eq!((parsed.temperature, parsed.top_p, parsed.top_k), (0.6, 0.95, None));
    assert_eq!(parsed.eos_token_ids, [1, 7]);
    assert!(parsed.do_sample);
    assert_eq!(
        parse(r#"{"temperature": -1}"#).unwrap_err().to_string(),
        "`temperature` is -1, expected a number from 0 to 100"
    );
    assert_eq!(
        parse(r#"{"eos_token_id": 1000}"#).unwrap_err().to_string(),
        "`eos_token_id` is 1000, expected token ids below 1000"
    );
}
