//! The sampling fields that chat and text completions share: types first, then ranges.
//!
//! Not here: defaults and the narrowing to the engine's parameters, which depend on the model and
//! on the thinking mode (the server's `lower`).

use fathom_core::TokenId;

use super::{Rules, check_token_ids};
use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{
    Fields, Path, at_most_bytes, at_most_items, integer, integer_in, invalid_type, invalid_value,
    number, number_in,
};
use crate::json::Object;

/// Sampling fields with the JSON types they must have, ranges unchecked.
pub(crate) struct RawSampling<'a> {
    max_tokens: Option<(&'static str, i128)>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    top_k: Option<i128>,
    min_tokens: Option<i128>,
    n: Option<i128>,
    seed: Option<i128>,
    priority: Option<i128>,
    ignore_eos: Option<bool>,
    skip_special_tokens: Option<bool>,
    stop: Vec<&'a str>,
    stop_token_ids: Vec<i128>,
    logit_bias: Vec<(&'a str, f64)>,
    user_id: Option<&'a str>,
    cache_salt: Option<&'a str>,
}

/// What the client asked of the sampler; absent fields are `None` or empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampling {
    /// Most tokens of one choice, and the name of the field that said so.
    pub max_tokens: Option<(&'static str, u32)>,
    /// In `[0, 2]`.
    pub temperature: Option<f64>,
    /// In `[0, 1]`.
    pub top_p: Option<f64>,
    /// In `[0, 1]`.
    pub min_p: Option<f64>,
    /// In `[-2, 2]`.
    pub frequency_penalty: Option<f64>,
    /// In `[-2, 2]`.
    pub presence_penalty: Option<f64>,
    /// In `(0, 2]`.
    pub repetition_penalty: Option<f64>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// At most `max_tokens`.
    pub min_tokens: Option<u32>,
    /// Number of choices.
    pub n: u32,
    /// Key of the random generator.
    pub seed: Option<i64>,
    /// Lower runs earlier, as in vLLM.
    pub priority: i32,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text; the default.
    pub skip_special_tokens: bool,
    /// Non-empty strings that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the request.
    pub stop_token_ids: Vec<TokenId>,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Isolates the prefix cache.
    pub user_id: Option<String>,
    /// Isolates the prefix cache.
    pub cache_salt: Option<String>,
}

impl<'a> RawSampling<'a> {
    pub(crate) fn read(fields: &mut Fields<'a>) -> Result<Self, ApiError> {
        let max_tokens = fields.integer("max_tokens")?.map(|value| ("max_tokens", value));
        let max_completion_tokens = fields.integer("max_completion_tokens")?;
        Ok(Self {
            max_tokens: max_completion_tokens
                .map(|value| ("max_completion_tokens", value))
                .or(max_tokens),
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            presence_penalty: fields.number("presence_penalty")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            top_k: fields.integer("top_k")?,
            min_tokens: fields.integer("min_tokens")?,
            n: fields.integer("n")?,
            seed: fields.integer("seed")?,
            priority: fields.integer("priority")?,
            ignore_eos: fields.boolean("ignore_eos")?,
            skip_special_tokens: fields.boolean("skip_special_tokens")?,
            stop: read_stop(fields)?,
            stop_token_ids: read_stop_token_ids(fields)?,
            logit_bias: read_logit_bias(fields)?,
            user_id: fields.string("user_id")?,
            cache_salt: fields.string("cache_salt")?,
        })
    }

    /// The same with the token limit that came in `field`, if it came.
    pub(crate) fn limited_by(self, field: &'static str, limit: Option<i128>) -> Self {
        let max_tokens = limit.map(|value| (field, value)).or(self.max_tokens);
        Self { max_tokens, ..self }
    }

    pub(crate) fn check(self, rules: &Rules) -> Result<Sampling, ApiError> {
        let number_of = |name, value: Option<f64>, min, max| {
            value.map(|value| number_in(&Path::Root.key(name), value, min, max)).transpose()
        };
        let max_tokens = self.check_max_tokens(rules)?;
        let most = max_tokens.map_or(rules.max_output_tokens, |(_, value)| value);
        Ok(Sampling {
            max_tokens,
            temperature: number_of("temperature", self.temperature, 0.0, 2.0)?,
            top_p: number_of("top_p", self.top_p, 0.0, 1.0)?,
            min_p: number_of("min_p", self.min_p, 0.0, 1.0)?,
            frequency_penalty: number_of("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?,
            presence_penalty: number_of("presence_penalty", self.presence_penalty, -2.0, 2.0)?,
            repetition_penalty: self.check_repetition_penalty()?,
            top_k: self.check_top_k()?,
            min_tokens: narrow("min_tokens", self.min_tokens, 0, i128::from(most))?,
            n: narrow("n", self.n, 1, i128::from(rules.max_n))?.unwrap_or(1),
            seed: narrow("seed", self.seed, i64::MIN.into(), i64::MAX.into())?,
            priority: narrow("priority", self.priority, i32::MIN.into(), i32::MAX.into())?
                .unwrap_or(0),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            stop: check_stop(&Path::Root.key("stop"), &self.stop, rules)?,
            stop_token_ids: check_token_ids(
                &Path::Root.key("stop_token_ids"),
                &self.stop_token_ids,
                rules.vocab_size,
            )?,
            logit_bias: check_logit_bias(&self.logit_bias, rules)?,
            user_id: check_cache_key(&Path::Root.key("user_id"), self.user_id)?,
            cache_salt: check_cache_key(&Path::Root.key("cache_salt"), self.cache_salt)?,
        })
    }

    fn check_max_tokens(&self, rules: &Rules) -> Result<Option<(&'static str, u32)>, ApiError> {
        let Some((name, value)) = self.max_tokens else { return Ok(None) };
        check_max_tokens(name, value, rules).map(|value| Some((name, value)))
    }

    fn check_repetition_penalty(&self) -> Result<Option<f64>, ApiError> {
        let path = Path::Root.key("repetition_penalty");
        match self.repetition_penalty {
            Some(value) if value <= 0.0 => {
                let message = "`repetition_penalty` must be in the range (0, 2].";
                Err(ApiError::at(ErrorCode::DecimalBelowMin, path, message))
            }
            Some(value) => number_in(&path, value, 0.0, 2.0).map(Some),
            None => Ok(None),
        }
    }

    fn check_top_k(&self) -> Result<Option<u32>, ApiError> {
        self.top_k.map(check_top_k).transpose()
    }
}

/// Checks a token limit that came in the field `name`.
pub(crate) fn check_max_tokens(name: &str, value: i128, rules: &Rules) -> Result<u32, ApiError> {
    let most = i128::from(rules.max_output_tokens);
    let value = if rules.clip_max_tokens { value.min(most) } else { value };
    integer_in(&Path::Root.key(name), value, 1, most)
}

/// 0 and -1 both switch the filter off; what exceeds the vocabulary filters nothing either.
pub(crate) fn check_top_k(value: i128) -> Result<u32, ApiError> {
    let top_k: i128 = integer_in(&Path::Root.key("top_k"), value, -1, i128::MAX)?;
    Ok(u32::try_from(top_k.max(0)).unwrap_or(0))
}

fn narrow<T: TryFrom<i128>>(
    name: &str,
    value: Option<i128>,
    min: i128,
    max: i128,
) -> Result<Option<T>, ApiError> {
    value.map(|value| integer_in(&Path::Root.key(name), value, min, max)).transpose()
}

fn read_stop<'a>(fields: &mut Fields<'a>) -> Result<Vec<&'a str>, ApiError> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let path = Path::Root.key("stop");
    if let Some(one) = value.as_str() {
        return Ok(vec![one]);
    }
    let expected = "a string or an array of strings";
    let items = value.as_array().ok_or_else(|| invalid_type(&path, expected, value))?;
    items
        .iter()
        .map(|item| item.as_str().ok_or_else(|| invalid_type(&path, expected, value)))
        .collect()
}

/// Checks the number and the lengths of stop strings.
pub(crate) fn check_stop(
    path: &Path<'_>,
    stop: &[&str],
    rules: &Rules,
) -> Result<Vec<String>, ApiError> {
    at_most_items(path, stop.len(), rules.max_stop)?;
    for one in stop {
        if one.is_empty() {
            return Err(invalid_value(path, format!("`{path}` must hold non-empty strings.")));
        }
        at_most_bytes(path, one, rules.max_stop_bytes)?;
    }
    Ok(stop.iter().map(ToString::to_string).collect())
}

fn read_stop_token_ids(fields: &mut Fields<'_>) -> Result<Vec<i128>, ApiError> {
    let path = Path::Root.key("stop_token_ids");
    let items = fields.array("stop_token_ids")?.unwrap_or_default();
    items
        .iter()
        .map(|item| integer(item).ok_or_else(|| invalid_type(&path, "an array of integers", item)))
        .collect()
}

fn read_logit_bias<'a>(fields: &mut Fields<'a>) -> Result<Vec<(&'a str, f64)>, ApiError> {
    let path = Path::Root.key("logit_bias");
    let object: Option<&'a Object> = fields.object("logit_bias")?;
    object
        .into_iter()
        .flatten()
        .map(|(id, bias)| {
            let expected = "an object of numbers";
            let bias = number(bias).ok_or_else(|| invalid_type(&path, expected, bias))?;
            Ok((id.as_str(), bias))
        })
        .collect()
}

fn check_logit_bias(
    biases: &[(&str, f64)],
    rules: &Rules,
) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let path = Path::Root.key("logit_bias");
    let check = |&(id, bias): &(&str, f64)| {
        let in_vocabulary = id.parse::<TokenId>().ok().filter(|&id| id < rules.vocab_size);
        let token = in_vocabulary.ok_or_else(|| {
            let (id, last) = (quoted(id), rules.vocab_size - 1);
            let message =
                format!("`logit_bias` has the key {id}, but keys are ids in [0, {last}].");
            invalid_value(&path, message)
        })?;
        #[expect(clippy::cast_possible_truncation, reason = "the engine adds biases in f32")]
        let bias = number_in(&path, bias, -100.0, 100.0)? as f32;
        Ok((token, bias))
    };
    biases.iter().map(check).collect()
}

/// Checks a string that isolates the prefix cache.
pub(crate) fn check_cache_key(
    path: &Path<'_>,
    value: Option<&str>,
) -> Result<Option<String>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    at_most_bytes(path, value, 512)?;
    Ok(Some(value.to_owned()))
}
