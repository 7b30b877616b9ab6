//! A [`ModelConfig`] written back as a `config.json` in the release's spelling.

use fathom_core::model_config::{HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, WINDOW};
use fathom_core::{ExpertFormat, ModelConfig};
use serde_json::{Value, json};

/// The `config.json` that [`parse_config`](super::parse_config) reads back as `config`.
#[must_use]
pub fn config_json(config: &ModelConfig) -> Value {
    let ratios: Vec<usize> = config.layer_kinds.iter().map(|kind| kind.ratio()).collect();
    let expert_dtype = match config.expert_format {
        ExpertFormat::Fp4 => "fp4",
        ExpertFormat::Fp8 => "fp8",
    };
    let mut out = constants();
    let dimensions = json!({
        "bos_token_id": config.bos_token_id,
        "compress_ratios": ratios,
        "compress_rope_theta": config.compress_rope_theta,
        "eos_token_id": config.eos_token_id,
        "expert_dtype": expert_dtype,
        "hc_eps": shortest(config.hc_eps),
        "hc_sinkhorn_iters": config.hc_sinkhorn_iters,
        "hidden_size": config.hidden_size,
        "index_n_heads": config.index_n_heads,
        "index_topk": config.index_topk,
        "max_position_embeddings": config.max_position_embeddings,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hash_layers": config.num_hash_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "o_groups": config.o_groups,
        "o_lora_rank": config.o_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "rope_scaling": {
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "type": "yarn",
        },
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": shortest(config.routed_scaling_factor),
        "swiglu_limit": shortest(config.swiglu_limit.unwrap_or(0.0)),
        "vocab_size": config.vocab_size,
    });
    if let (Value::Object(out), Value::Object(dimensions)) = (&mut out, dimensions) {
        out.extend(dimensions);
        out.sort_keys();
    }
    out
}

/// The keys that have the same value in every DeepSeek-V4 model.
fn constants() -> Value {
    json!({
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": false,
        "hc_mult": HC_MULT,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "index_head_dim": INDEX_HEAD_DIM,
        "model_type": "deepseek_v4",
        "n_shared_experts": 1,
        "norm_topk_prob": true,
        "num_key_value_heads": 1,
        "qk_rope_head_dim": ROPE_DIM,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "scoring_func": "sqrtsoftplus",
        "sliding_window": WINDOW,
        "tie_word_embeddings": false,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    })
}

/// The f64 that prints as shortly as `x` does: 1e-6, not 9.999999974752427e-7.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("an f32 prints as a number")
}
