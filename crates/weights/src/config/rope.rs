//! Rotary bases and YaRN parameters, in the three spellings they come in.
//!
//! `rope_scaling` (the release), `rope_parameters: {main, compress}` (Hugging Face) and flat
//! `rope_factor`, `original_seq_len` (inference/config.json).

use fathom_core::YarnConfig;
use fathom_core::model_config::{HEAD_DIM, ROPE_DIM};

use super::ConfigError;
use super::keys::{Keys, show};

/// Bounds of a rotary base and of a YaRN factor: far beyond any model, finite in f32.
const MAX_BASE: f64 = 1e12;

/// The rotary part of a config.
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) compress_theta: f64,
    pub(super) yarn: YarnConfig,
}

pub(super) fn rope(keys: Keys<'_>) -> Result<Rope, ConfigError> {
    let why = "kernels rotate the last 64 of a head's 512 channels";
    keys.fixed_int(&["qk_rope_head_dim", "rope_head_dim"], ROPE_DIM, why)?;
    partial_rotary_factor(keys)?;

    let parameters = keys.opt_object("rope_parameters", "rope_parameters.")?;
    let (main, compress) = match parameters {
        Some(p) => (
            p.opt_object("main", "rope_parameters.main.")?,
            p.opt_object("compress", "rope_parameters.compress.")?,
        ),
        None => (None, None),
    };
    for part in [main, compress].into_iter().flatten() {
        partial_rotary_factor(part)?;
    }
    let theta = base(keys, "rope_theta", main)?;
    let compress_theta = base(keys, "compress_rope_theta", compress)?;

    let scaling = keys.opt_object("rope_scaling", "rope_scaling.")?.or(compress);
    let yarn = match scaling {
        Some(scaling) => {
            let why = "layers with compression use YaRN";
            scaling.fixed_str(&["rope_type", "type"], "yarn", why)?;
            yarn(scaling, &["factor"], &["original_max_position_embeddings"])?
        }
        None => {
            yarn(keys, &["rope_factor"], &["original_seq_len"]).map_err(|error| match error {
                ConfigError::Missing { .. } => ConfigError::Missing {
                    key: "rope_scaling".to_owned(),
                    expected:
                        "an object with type yarn, factor, original_max_position_embeddings, \
                           beta_fast and beta_slow"
                            .to_owned(),
                },
                other => other,
            })?
        }
    };
    Ok(Rope { theta, compress_theta, yarn })
}

fn base(keys: Keys<'_>, key: &'static str, nested: Option<Keys<'_>>) -> Result<f64, ConfigError> {
    let nested = match nested {
        Some(nested) => nested.opt_number(&["rope_theta"], 1.0, MAX_BASE)?,
        None => None,
    };
    match nested {
        Some(theta) => Ok(theta),
        None => keys.number(&[key], 1.0, MAX_BASE),
    }
}

fn yarn(
    keys: Keys<'_>,
    factor: &[&'static str],
    original: &[&'static str],
) -> Result<YarnConfig, ConfigError> {
    let original = keys.int(original, 1, 1 << 30)?;
    Ok(YarnConfig {
        factor: keys.number(factor, 1.0, 1e6)?,
        original_max_position_embeddings: u32::try_from(original).expect("at most 2^30"),
        beta_fast: keys.number(&["beta_fast"], 1e-3, 1e6)?,
        beta_slow: keys.number(&["beta_slow"], 1e-3, 1e6)?,
    })
}

fn partial_rotary_factor(keys: Keys<'_>) -> Result<(), ConfigError> {
    const EXPECTED: f64 = ROPE_DIM as f64 / HEAD_DIM as f64;
    let Some(value) = keys.value("partial_rotary_factor") else { return Ok(()) };
    if value.as_f64() == Some(EXPECTED) {
        return Ok(());
    }
    Err(ConfigError::Unsupported {
        key: keys.name("partial_rotary_factor"),
        found: show(value),
        expected: EXPECTED.to_string(),
        why: "kernels rotate the last 64 of a head's 512 channels",
    })
}
