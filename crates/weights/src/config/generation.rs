//! `generation_config.json`: the sampling values a checkpoint recommends.

use serde_json::Value;

use super::ConfigError;
use super::keys::{Keys, show};

/// Sampling defaults of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Whether to sample at all; false means greedy.
    pub do_sample: bool,
    /// Softmax temperature, 0 to 100.
    pub temperature: f64,
    /// Nucleus mass, 0 to 1.
    pub top_p: f64,
    /// Candidates kept, where the checkpoint limits them.
    pub top_k: Option<u32>,
    /// Tokens that end an answer; empty where the file names none.
    pub eos_token_ids: Vec<u32>,
}

impl Default for GenerationConfig {
    /// The values of both releases.
    fn default() -> Self {
        Self {
            do_sample: true,
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            eos_token_ids: Vec::new(),
        }
    }
}

/// Reads and checks the text of a `generation_config.json` for a vocabulary of `vocab_size`.
///
/// # Errors
/// [`ConfigError`] naming the key, its value and what was expected.
pub fn parse_generation_config(
    json: &[u8],
    vocab_size: usize,
) -> Result<GenerationConfig, ConfigError> {
    let value: Value = serde_json::from_slice(json).map_err(ConfigError::Json)?;
    let Value::Object(object) = &value else {
        return Err(ConfigError::NotAnObject { found: show(&value) });
    };
    let keys = Keys::new(object, "");
    let default = GenerationConfig::default();
    let do_sample = match keys.value("do_sample") {
        None => default.do_sample,
        Some(value) => value
            .as_bool()
            .ok_or_else(|| keys.wrong_type("do_sample", value, "true or false".to_owned()))?,
    };
    let eos_token_ids = match keys.value("eos_token_id") {
        None => Vec::new(),
        Some(Value::Array(list)) => list.iter().collect(),
        Some(one) => vec![one],
    };
    let token = |value: &Value| {
        value
            .as_u64()
            .filter(|id| *id < vocab_size as u64)
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| {
                let expected = format!("token ids below {vocab_size}");
                keys.out_of_range("eos_token_id", value, expected)
            })
    };
    Ok(GenerationConfig {
        do_sample,
        temperature: keys.opt_number(&["temperature"], 0.0, 100.0)?.unwrap_or(default.temperature),
        top_p: keys.opt_number(&["top_p"], 0.0, 1.0)?.unwrap_or(default.top_p),
        // 0 is Hugging Face's way to write "no limit".
        top_k: keys
            .opt_int(&["top_k"], 0, u64::from(u32::MAX))?
            .filter(|k| *k > 0)
            .and_then(|k| u32::try_from(k).ok()),
        eos_token_ids: eos_token_ids.into_iter().map(token).collect::<Result<_, _>>()?,
    })
}
