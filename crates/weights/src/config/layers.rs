//! The kind of every layer, from `compress_ratios` or from Hugging Face's `layer_types`.
//!
//! Invariant of the result: one kind per main layer, then one per MTP block that is loaded.

use fathom_core::LayerKind;
use serde_json::Value;

use super::keys::{Keys, show};
use super::{ConfigError, MAX_LAYERS};

/// More MTP blocks than any release has; bounds the length of the arrays.
const MAX_MTP: usize = 16;

/// Reads the kinds of `n_layers` main layers and `n_mtp` MTP blocks.
///
/// `n_listed_mtp` is `num_nextn_predict_layers` as written: entries the array may hold beyond the
/// main layers. `may_be_longer` admits more (checkpoints whose draft stages are ignored).
pub(super) fn layer_kinds(
    keys: Keys<'_>,
    n_layers: usize,
    n_listed_mtp: usize,
    n_mtp: usize,
    may_be_longer: bool,
    notices: &mut Vec<String>,
) -> Result<Vec<LayerKind>, ConfigError> {
    let from_ratios = ratios(keys)?;
    let from_types = layer_types(keys)?;
    let mut kinds = match (from_ratios, from_types) {
        (Some(ratios), None) => ratios,
        (None, Some(types)) => types,
        (Some(ratios), Some(types)) => {
            if !types.iter().zip(&ratios).take(n_layers).all(|(a, b)| a == b) {
                return Err(conflict(keys));
            }
            ratios
        }
        (None, None) => {
            return Err(ConfigError::Missing {
                key: "compress_ratios".to_owned(),
                expected: "one of 0, 4, 128 per layer (re-saved checkpoints lose this key)"
                    .to_owned(),
            });
        }
    };
    let expected = n_layers + n_listed_mtp;
    if kinds.len() < n_layers || (kinds.len() > expected && !may_be_longer) {
        return Err(ConfigError::RatioCount { found: kinds.len(), expected });
    }
    if kinds.len() < n_layers + n_mtp {
        notices.push(format!(
            "compress_ratios has {} entries for {n_layers} layers and {n_mtp} MTP block: \
             the MTP block is taken as ratio 0",
            kinds.len()
        ));
        kinds.resize(n_layers + n_mtp, LayerKind::Window);
    }
    kinds.truncate(n_layers + n_mtp);
    if let Some(mtp) = kinds[n_layers..].iter().find(|kind| **kind != LayerKind::Window) {
        return Err(ConfigError::Unsupported {
            key: "compress_ratios".to_owned(),
            found: format!("{} for the MTP block", mtp.ratio()),
            expected: "0".to_owned(),
            why: "no release compresses its MTP block",
        });
    }
    Ok(kinds)
}

fn conflict(keys: Keys<'_>) -> ConfigError {
    let text = |key| keys.value(key).map(show).unwrap_or_default();
    ConfigError::Conflict {
        key: "compress_ratios".to_owned(),
        found: text("compress_ratios"),
        other_key: "layer_types".to_owned(),
        other: text("layer_types"),
    }
}

fn ratios(keys: Keys<'_>) -> Result<Option<Vec<LayerKind>>, ConfigError> {
    let Some(items) = keys.opt_array("compress_ratios", MAX_LAYERS + MAX_MTP)? else {
        return Ok(None);
    };
    let kind = |(i, value): (usize, &Value)| {
        value.as_u64().and_then(LayerKind::from_ratio).ok_or_else(|| {
            keys.out_of_range(&entry("compress_ratios", i), value, "0, 4 or 128".into())
        })
    };
    items.iter().enumerate().map(kind).collect::<Result<_, _>>().map(Some)
}

fn layer_types(keys: Keys<'_>) -> Result<Option<Vec<LayerKind>>, ConfigError> {
    let Some(items) = keys.opt_array("layer_types", MAX_LAYERS + MAX_MTP)? else {
        return Ok(None);
    };
    if let Some(rates) = keys.opt_object("compress_rates", "compress_rates.")? {
        let why = "kernels compress 4 or 128 tokens into one entry";
        rates.fixed_int(&["compressed_sparse_attention"], LayerKind::Csa.ratio(), why)?;
        rates.fixed_int(&["heavily_compressed_attention"], LayerKind::Hca.ratio(), why)?;
    }
    let kind = |(i, value): (usize, &Value)| match value.as_str() {
        Some("sliding_attention") => Ok(LayerKind::Window),
        Some("compressed_sparse_attention") => Ok(LayerKind::Csa),
        Some("heavily_compressed_attention") => Ok(LayerKind::Hca),
        _ => Err(keys.out_of_range(
            &entry("layer_types", i),
            value,
            "sliding_attention, compressed_sparse_attention or heavily_compressed_attention".into(),
        )),
    };
    items.iter().enumerate().map(kind).collect::<Result<_, _>>().map(Some)
}

/// Leading layers that route by token id, from `num_hash_layers` or `mlp_layer_types`.
pub(super) fn num_hash_layers(keys: Keys<'_>, n_layers: usize) -> Result<usize, ConfigError> {
    let direct = keys.opt_int(&["num_hash_layers", "n_hash_layers"], 0, n_layers as u64)?;
    let Some(items) = keys.opt_array("mlp_layer_types", MAX_LAYERS + MAX_MTP)? else {
        return direct.map(super::to_usize).ok_or_else(|| ConfigError::Missing {
            key: "num_hash_layers".to_owned(),
            expected: format!("an integer from 0 to {n_layers}"),
        });
    };
    let mut n_hash = 0;
    for (i, value) in items.iter().enumerate() {
        match value.as_str() {
            Some("hash_moe") if i == n_hash => n_hash += 1,
            Some("moe") => {}
            _ => {
                let expected = "hash_moe for the first layers, then moe".to_owned();
                return Err(keys.out_of_range(&entry("mlp_layer_types", i), value, expected));
            }
        }
    }
    if items.len() < n_layers || n_hash > n_layers {
        return Err(ConfigError::OutOfRange {
            key: "mlp_layer_types".to_owned(),
            found: format!("{} entries, {n_hash} of them hash_moe", items.len()),
            expected: format!("one entry for each of the {n_layers} layers"),
        });
    }
    match direct {
        Some(direct) if super::to_usize(direct) != n_hash => Err(ConfigError::Conflict {
            key: "num_hash_layers".to_owned(),
            found: direct.to_string(),
            other_key: "mlp_layer_types".to_owned(),
            other: format!("{n_hash} times hash_moe"),
        }),
        _ => Ok(n_hash),
    }
}

fn entry(key: &str, i: usize) -> String {
    format!("{key}[{i}]")
}
