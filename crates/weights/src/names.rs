//! Tensor names: aliases to the release's names, and the marks of foreign layouts.
//!
//! Inside Fathom a tensor has one name, that of the release (`layers.0.attn.wq_a.weight`).
//! [`canonical`] maps the older spellings that the release's own `convert.py` accepts; whole other
//! layouts (Hugging Face's, re-quantised ones) are recognised by [`foreign`] and refused.

use std::borrow::Cow;

use crate::error::LoadError;

/// `(spelling, canonical)` of one dot-separated part; from `convert.py` of the official release.
const PART_ALIASES: [(&str, &str); 11] = [
    ("self_attn", "attn"),
    ("mlp", "ffn"),
    ("weight_scale_inv", "scale"),
    ("e_score_correction_bias", "bias"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("embed_tokens", "embed"),
    ("lm_head", "head"),
    ("gate_proj", "w1"),
    ("down_proj", "w2"),
    ("up_proj", "w3"),
];

/// Parts that only occur in checkpoints saved by Hugging Face's `save_pretrained`.
const HF_PARTS: [&str; 13] = [
    "gate_up_proj",
    "attn_hc",
    "ffn_hc",
    "hc_head",
    "sinks",
    "position_bias",
    "q_a_proj",
    "q_b_proj",
    "q_a_norm",
    "kv_proj",
    "o_a_proj",
    "o_b_proj",
    "q_proj",
];

/// Last parts that betray another quantisation, and what writes them.
const QUANTISED_PARTS: [(&str, &str); 8] = [
    ("weight_packed", "compressed-tensors (W4A16 or NVFP4)"),
    ("weight_scale", "compressed-tensors, ModelOpt or ModelSlim"),
    ("weight_scale_2", "ModelOpt NVFP4"),
    ("weight_global_scale", "compressed-tensors NVFP4"),
    ("weight_offset", "ModelSlim"),
    ("weight_zero_point", "Quark or compressed-tensors"),
    ("qweight", "GPTQ or AWQ"),
    ("input_scale", "ModelOpt (static activation scales)"),
];

/// The release's name for the tensor stored as `name`.
#[must_use]
pub fn canonical(name: &str) -> Cow<'_, str> {
    let bare = name.strip_prefix("model.").unwrap_or(name);
    let alias = |part: &str| PART_ALIASES.iter().find(|(from, _)| *from == part);
    if !bare.split('.').any(|part| alias(part).is_some()) {
        return Cow::Borrowed(bare);
    }
    let mut out = String::with_capacity(bare.len());
    for part in bare.split('.') {
        if !out.is_empty() {
            out.push('.');
        }
        out.push_str(alias(part).map_or(part, |(_, to)| to));
    }
    Cow::Owned(out)
}

/// The refusal for a surplus tensor `name` whose name belongs to a family we know.
#[must_use]
pub fn foreign(name: &str, file: &str) -> Option<LoadError> {
    let (name_owned, file_owned) = (name.to_owned(), file.to_owned());
    let bare = name.strip_prefix("model.").unwrap_or(name);
    let has_part = |part: &str| bare.split('.').any(|p| p == part);

    let vision = ["vision.", "aligner.", "image_"].iter().any(|prefix| bare.starts_with(prefix));
    if vision || has_part("bias_vl") {
        return Some(LoadError::Vision { name: name_owned, file: file_owned });
    }
    let quantised = QUANTISED_PARTS.iter().find(|(part, _)| has_part(part));
    if let Some((_, method)) = quantised {
        return Some(LoadError::Requantised { name: name_owned, file: file_owned, method });
    }
    // `compressor.indexer` is Hugging Face's nesting; the release nests the other way round.
    let hf = HF_PARTS.iter().any(|part| has_part(part))
        || bare.contains("compressor.indexer.")
        || bare.ends_with("experts.down_proj");
    hf.then_some(LoadError::HfSaved { name: name_owned, file: file_owned })
}

/// Whether `name` (canonical) belongs to an MTP block.
#[must_use]
pub fn is_mtp(name: &str) -> bool {
    name.starts_with("mtp.")
}

/// Whether `name` (canonical) is an MTP block's own copy of the embedding or the output head,
/// which `convert.py` skips.
#[must_use]
pub fn is_mtp_duplicate(name: &str) -> bool {
    let mut parts = name.splitn(3, '.');
    let (first, _, rest) = (parts.next(), parts.next(), parts.next());
    first == Some("mtp")
        && matches!(rest, Some("emb.tok_emb.weight" | "embed.weight" | "head.weight"))
}

/// Whether `name` (canonical) belongs to a DSpark draft stage, which Fathom does not run.
#[must_use]
pub fn is_dspark(name: &str) -> bool {
    is_mtp(name) && (name.contains("markov_head") || name.contains("confidence_head"))
}

/// Whether `file` is named as `convert.py` names a rank's file: `model{rank}-mp{n}.safetensors`.
#[must_use]
pub fn is_converted_shard(file: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    file.strip_prefix("model")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-mp"))
        .is_some_and(|(rank, n)| digits(rank) && digits(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spellings_of_convert_py_all_become_the_names_of_the_release() {
        for (spelling, name) in [
            ("model.embed_tokens.weight", "embed.weight"),
            ("lm_head.weight", "head.weight"),
            ("model.layers.3.self_attn.wq_a.weight_scale_inv", "layers.3.attn.wq_a.scale"),
            ("layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
            ("layers.3.mlp.experts.7.down_proj.weight", "layers.3.ffn.experts.7.w2.weight"),
            ("layers.3.input_layernorm.weight", "layers.3.attn_norm.weight"),
            ("layers.3.post_attention_layernorm.weight", "layers.3.ffn_norm.weight"),
            ("layers.3.ffn.shared_experts.up_proj.scale", "layers.3.ffn.shared_experts.w3.scale"),
            ("layers.3.attn.wkv.weight", "layers.3.attn.wkv.weight"),
        ] {
            assert_eq!(canonical(spelling), name);
        }
    }

    #[test]
    fn each_foreign_layout_gets_its_own_refusal() {
        let of = |name: &str| foreign(name, "f").map(|error| error.to_string());
        assert!(of("model.layers.0.mlp.experts.gate_up_proj").unwrap().contains("Hugging Face"));
        assert!(of("layers.0.ffn.experts.0.w1.weight_packed").unwrap().contains("W4A16"));
        assert!(of("layers.0.ffn.gate.bias_vl").unwrap().contains("vision"));
        assert!(of("layers.0.ffn.experts.0.w9.weight").is_none());
    }

    #[test]
    fn only_rank_files_of_convert_py_look_converted() {
        assert!(is_converted_shard("model0-mp8.safetensors"));
        assert!(!is_converted_shard("model-00001-of-00046.safetensors"));
        assert!(!is_converted_shard("model.safetensors"));
    }
}
