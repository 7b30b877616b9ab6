//! `config.json`: every key of a DeepSeek-V4 checkpoint, checked, in all its spellings.
//!
//! [`parse_config`] accepts the release's `config.json`, the names of the release's
//! `inference/config.json` and what Hugging Face writes when it re-saves the file. Whatever a
//! kernel assumes (head width, window, ratios, block sizes) is checked here, so that a
//! [`ModelConfig`] is proof that the model can run.
//!
//! Rules: an absent key with one supported value takes that value; an absent dimension is an
//! error; two spellings of one key must agree; integers have upper bounds that no product of them
//! can leave 64 bits.
//!
//! Not here: whether the weights agree with the config (`check`).

mod error;
mod generation;
mod keys;
mod layers;
mod quantization;
mod rope;
mod write;

use fathom_core::model_config::{HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use fathom_core::{ExpertFormat, ModelConfig};
use serde_json::Value;

pub use error::ConfigError;
pub use generation::{GenerationConfig, parse_generation_config};
use keys::{Keys, show};
pub use write::config_json;

/// Longest `config.json` that is read.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Most main layers a config may ask for (the releases have 43 and 61).
pub const MAX_LAYERS: usize = 512;
/// Most routed experts per layer a config may ask for (the releases have 256 and 384).
pub const MAX_EXPERTS: usize = 4096;
/// FP8 activations and weights are quantised in runs of this many channels.
const QUANT_BLOCK: u64 = 128;

/// A `config.json` after every check.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedConfig {
    /// The model's dimensions. `expert_format` is a guess (FP4) while `expert_format_given` is
    /// false; [`Checkpoint::open`](crate::Checkpoint::open) settles it from the tensors.
    pub config: ModelConfig,
    /// Whether the config names the routed experts' format.
    pub expert_format_given: bool,
    /// Whether `dspark_*` keys mark the later official Flash, whose draft stages are ignored.
    pub dspark: bool,
    /// What was assumed, ignored or repaired: one sentence each.
    pub notices: Vec<String>,
}

/// Reads and checks the text of a `config.json`.
///
/// # Errors
/// One [`ConfigError`] naming the first offending key, its value and what was expected; relatives
/// of DeepSeek-V4 (vision, V4.1, re-quantised, pruned) each have their own.
pub fn parse_config(json: &[u8]) -> Result<ParsedConfig, ConfigError> {
    let value: Value = serde_json::from_slice(json).map_err(ConfigError::Json)?;
    let Value::Object(object) = &value else {
        return Err(ConfigError::NotAnObject { found: show(&value) });
    };
    let keys = Keys::new(object, "");
    let mut notices = Vec::new();
    let inference_names = keys.value("dim").is_some() && keys.value("model_type").is_none();
    identity(keys, inference_names)?;
    if inference_names {
        notices.push(
            "config.json has the key names of inference/config.json; architecture and \
             quantisation are taken as the release's"
                .to_owned(),
        );
    }
    fixed_values(keys)?;

    let expert_format = quantization::expert_format(keys)?;
    quantization::check(keys, inference_names, &mut notices)?;
    if expert_format.is_none() {
        notices.push("expert_dtype is absent: fp4 is assumed until the tensors tell".to_owned());
    }

    let n_layers = to_usize(keys.int(&["num_hidden_layers", "n_layers"], 1, MAX_LAYERS as u64)?);
    let dspark = keys.keys().any(|key| key.starts_with("dspark_"));
    let n_listed_mtp =
        keys.opt_int(&["num_nextn_predict_layers", "n_mtp_layers"], 0, 16)?.map_or(0, to_usize);
    let n_mtp = loaded_mtp_blocks(n_listed_mtp, dspark, &mut notices);
    let layer_kinds =
        layers::layer_kinds(keys, n_layers, n_listed_mtp, n_mtp, dspark, &mut notices)?;
    let rope = rope::rope(keys)?;
    let n_routed_experts = keys.int(&["n_routed_experts"], 1, MAX_EXPERTS as u64)?;
    let vocab_size = keys.int(&["vocab_size"], 1, 1 << 24)?;

    let config = ModelConfig {
        vocab_size: to_usize(vocab_size),
        hidden_size: blocks(keys, &["hidden_size", "dim"], 1 << 17)?,
        num_hidden_layers: n_layers,
        num_nextn_predict_layers: n_mtp,
        num_attention_heads: to_usize(keys.int(&["num_attention_heads", "n_heads"], 1, 4096)?),
        q_lora_rank: blocks(keys, &["q_lora_rank"], 1 << 17)?,
        o_groups: to_usize(keys.int(&["o_groups"], 1, 4096)?),
        o_lora_rank: blocks(keys, &["o_lora_rank"], 1 << 17)?,
        layer_kinds,
        rope_theta: rope.theta,
        compress_rope_theta: rope.compress_theta,
        yarn: rope.yarn,
        index_n_heads: to_usize(keys.int(&["index_n_heads"], 1, 4096)?),
        index_topk: to_usize(keys.int(&["index_topk"], 1, 1 << 20)?),
        n_routed_experts: to_usize(n_routed_experts),
        num_experts_per_tok: to_usize(keys.int(
            &["num_experts_per_tok", "n_activated_experts"],
            1,
            n_routed_experts,
        )?),
        moe_intermediate_size: blocks(keys, &["moe_intermediate_size", "moe_inter_dim"], 1 << 17)?,
        num_hash_layers: layers::num_hash_layers(keys, n_layers)?,
        routed_scaling_factor: keys.number(&["routed_scaling_factor", "route_scale"], 1e-6, 1e6)?
            as f32,
        swiglu_limit: keys
            .opt_number(&["swiglu_limit"], 0.0, 1e6)?
            .map(|limit| limit as f32)
            .filter(|limit| *limit > 0.0),
        hc_sinkhorn_iters: keys.opt_int(&["hc_sinkhorn_iters"], 1, 1000)?.unwrap_or(20) as u32,
        hc_eps: keys.opt_number(&["hc_eps"], 1e-12, 1e-1)?.unwrap_or(1e-6) as f32,
        rms_norm_eps: keys.opt_number(&["rms_norm_eps", "norm_eps"], 1e-12, 1e-1)?.unwrap_or(1e-6)
            as f32,
        expert_format: expert_format.unwrap_or(ExpertFormat::Fp4),
        max_position_embeddings: to_usize(
            keys.opt_int(&["max_position_embeddings"], 1, 1 << 30)?.unwrap_or(1 << 20),
        ),
        bos_token_id: token_id(keys, "bos_token_id", vocab_size, 0)?,
        eos_token_id: token_id(keys, "eos_token_id", vocab_size, 1)?,
    };
    if !config.num_attention_heads.is_multiple_of(config.o_groups) {
        return Err(ConfigError::OutOfRange {
            key: "o_groups".to_owned(),
            found: config.o_groups.to_string(),
            expected: format!("a divisor of the {} attention heads", config.num_attention_heads),
        });
    }
    Ok(ParsedConfig { config, expert_format_given: expert_format.is_some(), dspark, notices })
}

/// The published model that has these dimensions, by its name on the hub.
#[must_use]
pub fn release_name(config: &ModelConfig) -> Option<&'static str> {
    let dimensions = (
        config.num_hidden_layers,
        config.hidden_size,
        config.n_routed_experts,
        config.moe_intermediate_size,
        config.expert_format,
    );
    match dimensions {
        (43, 4096, 256, 2048, ExpertFormat::Fp4) => Some("DeepSeek-V4-Flash"),
        (43, 4096, 256, 2048, ExpertFormat::Fp8) => Some("DeepSeek-V4-Flash-Base"),
        (61, 7168, 384, 3072, ExpertFormat::Fp4) => Some("DeepSeek-V4-Pro"),
        (61, 7168, 384, 3072, ExpertFormat::Fp8) => Some("DeepSeek-V4-Pro-Base"),
        _ => None,
    }
}

/// Refuses everything that is not the text model DeepSeek-V4.
fn identity(keys: Keys<'_>, inference_names: bool) -> Result<(), ConfigError> {
    let model_type = keys.value("model_type");
    if let Some(found) =
        model_type.and_then(Value::as_str).filter(|t| t.starts_with("deepseek_v41"))
    {
        return Err(ConfigError::V41 { found: found.to_owned() });
    }
    let architectures = keys.value("architectures");
    let is_architecture = |name: &str| {
        architectures.and_then(Value::as_array).is_some_and(|a| a.iter().any(|v| v == name))
    };
    if is_architecture("DeepseekV4ForConditionalGeneration") {
        let found = architectures.map(show).unwrap_or_default();
        return Err(ConfigError::Vision { key: "architectures".to_owned(), found });
    }
    if let Some(layers) = keys.value("vision_n_layers").filter(|n| n.as_f64() != Some(0.0)) {
        return Err(ConfigError::Vision { key: "vision_n_layers".into(), found: show(layers) });
    }
    if keys.value("n_routed_experts_score").is_some() {
        return Err(ConfigError::Pruned { key: "n_routed_experts_score".to_owned() });
    }
    if inference_names {
        return Ok(());
    }
    match model_type {
        Some(value) if value == "deepseek_v4" => {}
        Some(value) => return Err(ConfigError::OtherModel { found: show(value) }),
        None => {
            let (key, expected) = ("model_type".to_owned(), "\"deepseek_v4\"".to_owned());
            return Err(ConfigError::Missing { key, expected });
        }
    }
    match architectures {
        _ if is_architecture("DeepseekV4ForCausalLM") => Ok(()),
        Some(value) => Err(ConfigError::OtherArchitecture { found: show(value) }),
        None => Err(ConfigError::Missing {
            key: "architectures".to_owned(),
            expected: "[\"DeepseekV4ForCausalLM\"]".to_owned(),
        }),
    }
}

/// Keys whose value the kernels or the forward pass are written for.
fn fixed_values(keys: Keys<'_>) -> Result<(), ConfigError> {
    let kernels = "kernels are written for this width";
    let model = "the forward pass is written for this";
    keys.fixed_int(&["head_dim"], HEAD_DIM, kernels)?;
    keys.fixed_int(&["index_head_dim"], INDEX_HEAD_DIM, kernels)?;
    keys.fixed_int(&["sliding_window", "window_size"], WINDOW, kernels)?;
    keys.fixed_int(&["hc_mult"], HC_MULT, kernels)?;
    keys.fixed_int(&["num_key_value_heads"], 1, model)?;
    keys.fixed_int(&["n_shared_experts"], 1, model)?;
    keys.fixed_str(&["scoring_func", "score_func"], "sqrtsoftplus", model)?;
    keys.fixed_str(&["topk_method"], "noaux_tc", model)?;
    keys.fixed_str(&["hidden_act"], "silu", model)?;
    keys.fixed_bool("norm_topk_prob", true, model)?;
    keys.fixed_bool("tie_word_embeddings", false, model)?;
    keys.fixed_bool("attention_bias", false, model)
}

/// MTP blocks to load: one, or none where the checkpoint's draft stages are of another kind.
fn loaded_mtp_blocks(n_listed: usize, dspark: bool, notices: &mut Vec<String>) -> usize {
    if dspark {
        notices.push(
            "DSpark draft stages (dspark_* keys) are not supported: mtp.* tensors are ignored, \
             the main model is complete"
                .to_owned(),
        );
        return 0;
    }
    if n_listed > 1 {
        notices.push(format!(
            "num_nextn_predict_layers is {n_listed}; only one MTP block is supported: \
             mtp.* tensors are ignored, the main model is complete"
        ));
        return 0;
    }
    n_listed
}

/// A width made of whole quantisation blocks.
fn blocks(keys: Keys<'_>, spellings: &[&'static str], max: u64) -> Result<usize, ConfigError> {
    let width = keys.int(spellings, QUANT_BLOCK, max)?;
    if !width.is_multiple_of(QUANT_BLOCK) {
        return Err(ConfigError::OutOfRange {
            key: keys.name(spellings[0]),
            found: width.to_string(),
            expected: format!("a multiple of {QUANT_BLOCK}, the width of a quantisation block"),
        });
    }
    Ok(to_usize(width))
}

/// A token id below `vocab_size`; a list (several end tokens) stands for its first entry.
fn token_id(
    keys: Keys<'_>,
    key: &'static str,
    vocab_size: u64,
    default: u32,
) -> Result<u32, ConfigError> {
    let Some(value) = keys.value(key) else {
        return if u64::from(default) < vocab_size {
            Ok(default)
        } else {
            let expected = format!("a token id below {vocab_size}");
            Err(ConfigError::Missing { key: key.to_owned(), expected })
        };
    };
    let first = value.as_array().map_or(Some(value), |list| list.first());
    first
        .and_then(Value::as_u64)
        .filter(|id| *id < vocab_size)
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| keys.out_of_range(key, value, format!("a token id below {vocab_size}")))
}

/// Widens a bounded integer; every bound in this module is below 2^32.
fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("bounded well below 2^32")
}
