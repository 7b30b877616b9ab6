//! Text and fill-in-the-middle completions: the request and its answers.
//!
//! The order of checks is that of [`super::chat`]. Not here: the prompt's tokens, and defaults that
//! depend on the model (the server).

use fathom_core::TokenId;
use serde::Serialize;
use serde_json::{Map, Value};

use super::chat::{UsageInStream, read_stream_options};
use super::response::{FinishReason, LogprobEntry, StopReason, Usage};
use super::sampling::{RawSampling, Sampling};
use super::structured::{Structured, read_structured};
use super::{Rules, check_unknown};
use crate::error::{ApiError, ErrorCode};
use crate::fields::{Fields, Path, at_most_items, integer, integer_in, invalid_type};
use crate::json::Object;

/// Most prompts of one request, and most texts it may ask for in all: each takes a place in the
/// queue.
const MAX_PROMPTS: usize = 256;

/// What is to be continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, which control tokens spelled out in it do not become.
    Text(String),
    /// Token ids, as they are.
    Tokens(Vec<TokenId>),
}

/// A checked completion request.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// The model as the client named it.
    pub model: String,
    /// What is to be continued: at least one. Each is answered `n` times.
    pub prompts: Vec<Prompt>,
    /// What comes after the text to be filled in; even an empty one makes this fill-in-the-middle.
    pub suffix: Option<String>,
    /// Begin the answer with the prompt.
    pub echo: bool,
    /// Sampling, stopping, and cache isolation.
    pub sampling: Sampling,
    /// What the text must be.
    pub structured: Option<Structured>,
    /// `Some(k)`: report log-probabilities, and those of the `k` most likely tokens.
    pub logprobs: Option<u32>,
    /// Answer as a stream of events.
    pub stream: bool,
    /// Where a stream says what was used.
    pub usage: UsageInStream,
    /// Places of the fields that were ignored.
    pub unknown: Vec<String>,
}

impl CompletionRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// The first failed check, with its code and field.
    pub fn read(body: &Object, rules: &Rules) -> Result<Self, ApiError> {
        let mut unknown = Vec::new();
        let mut fields = Fields::new(body, Path::Root);
        let model = fields.required_string("model")?.to_owned();
        let prompt = fields.required("prompt")?;

        // Types.
        let prompts = read_prompts(prompt)?;
        let suffix = fields.string("suffix")?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let sampling = RawSampling::read(&mut fields)?;
        let logprobs = fields.integer("logprobs")?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let stream_options = fields.object("stream_options")?;
        let usage = read_stream_options(stream_options, &mut unknown)?;
        let structured = fields.object("structured_outputs")?;
        fields.report_unknown(&mut unknown);

        // Ranges.
        let path = Path::Root.key("prompt");
        at_most_items(&path, prompts.len(), MAX_PROMPTS)?;
        let check = |prompt: RawPrompt<'_>| prompt.check(&path, rules);
        let prompts = prompts.into_iter().map(check).collect::<Result<Vec<Prompt>, _>>()?;
        let sampling = sampling.check(rules)?;
        let at = Path::Root.key("logprobs");
        let logprobs = logprobs.map(|k| integer_in(&at, k, 0, 20)).transpose()?;

        // Rules across fields.
        let conflict = |param: &str, message: &str| {
            Err(ApiError::at(ErrorCode::ConflictingParameters, param, message))
        };
        if stream_options.is_some() && !stream {
            return conflict("stream_options", "`stream_options` requires `stream: true`.");
        }
        if suffix.is_some() && echo {
            return conflict("suffix", "`suffix` cannot be combined with `echo: true`.");
        }
        if suffix.is_some() && !matches!(prompts.as_slice(), [Prompt::Text(_)]) {
            let with = if prompts.len() > 1 { "several prompts" } else { "a prompt of token ids" };
            return conflict("suffix", &format!("`suffix` cannot be combined with {with}."));
        }
        if prompts.len() * sampling.n as usize > MAX_PROMPTS {
            let (n_prompts, n) = (prompts.len(), sampling.n);
            let message = format!(
                "{n_prompts} prompts with `n` {n} are more than {MAX_PROMPTS} texts: send several requests."
            );
            return conflict("n", &message);
        }
        let structured =
            structured.map(|object| read_structured(object, rules, &mut unknown)).transpose()?;
        check_unknown(&unknown, rules)?;
        Ok(Self {
            model,
            prompts,
            suffix: suffix.map(str::to_owned),
            echo,
            sampling,
            structured,
            logprobs,
            stream,
            usage,
            unknown,
        })
    }
}

/// A prompt with the JSON type it must have, ids unchecked.
enum RawPrompt<'a> {
    Text(&'a str),
    Tokens(Vec<i128>),
}

/// The prompts of a string, an array of strings, an array of token ids, or an array of those.
fn read_prompts(value: &Value) -> Result<Vec<RawPrompt<'_>>, ApiError> {
    let path = Path::Root.key("prompt");
    let expected = "a string, an array of strings, of token ids or of arrays of token ids";
    let wrong = |value| invalid_type(&path, expected, value);
    match value {
        Value::String(text) => Ok(vec![RawPrompt::Text(text)]),
        Value::Array(items) => match items.as_slice() {
            [Value::String(_) | Value::Array(_), ..] => {
                let read = |(i, item)| {
                    read_prompt(item).ok_or_else(|| invalid_type(&path.index(i), expected, item))
                };
                items.iter().enumerate().map(read).collect()
            }
            _ => read_prompt(value).map(|ids| vec![ids]).ok_or_else(|| wrong(value)),
        },
        other => Err(wrong(other)),
    }
}

/// One of several prompts, or an array of token ids by itself.
fn read_prompt(value: &Value) -> Option<RawPrompt<'_>> {
    match value {
        Value::String(text) => Some(RawPrompt::Text(text)),
        Value::Array(ids) => ids.iter().map(integer).collect::<Option<_>>().map(RawPrompt::Tokens),
        _ => None,
    }
}

impl RawPrompt<'_> {
    fn check(self, path: &Path<'_>, rules: &Rules) -> Result<Prompt, ApiError> {
        match self {
            Self::Text(text) => Ok(Prompt::Text(text.to_owned())),
            Self::Tokens(ids) if ids.is_empty() => {
                let message = "`prompt` must hold at least one token id.";
                Err(ApiError::at(ErrorCode::EmptyArray, path, message))
            }
            Self::Tokens(ids) => {
                super::check_token_ids(path, &ids, rules.vocab_size).map(Prompt::Tokens)
            }
        }
    }
}

/// A completion, or one event of a streamed one: both have the same form.
#[derive(Debug, Clone, Serialize)]
pub struct TextCompletion<'a> {
    /// `cmpl-` and 32 hexadecimal digits.
    pub id: &'a str,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model as the client named it.
    pub model: &'a str,
    /// Identifies weights and configuration.
    pub system_fingerprint: &'a str,
    /// Sorted by index; a chunk has one, or none beside the usage.
    pub choices: Vec<TextChoice>,
    /// Present in whole answers; in chunks absent, or `null` until the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One of the `n` texts, or a piece of it.
#[derive(Debug, Clone, Serialize)]
pub struct TextChoice {
    /// From 0.
    pub index: u32,
    /// The text; what is new in a chunk.
    pub text: String,
    /// Present only if asked for.
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended; `null` in all chunks but a choice's last.
    pub finish_reason: Option<FinishReason>,
    /// The stop string or token that matched.
    pub stop_reason: Option<StopReason>,
}

/// Log-probabilities as parallel lists.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Adds tokens; the text of the first begins at character `offset` of the answer.
    pub fn extend(&mut self, entries: &[LogprobEntry], mut offset: usize) {
        for entry in entries {
            self.tokens.push(entry.token.clone());
            self.token_logprobs.push(finite(entry.logprob));
            let top = entry.top_logprobs.iter();
            self.top_logprobs.push(top.map(|t| (t.token.clone(), finite(t.logprob))).collect());
            self.text_offset.push(offset);
            offset += entry.token.chars().count();
        }
    }
}

fn finite(logprob: f32) -> Value {
    Value::from(if logprob.is_finite() { logprob } else { -9999.0 })
}
