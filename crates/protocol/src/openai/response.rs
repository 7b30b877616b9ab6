//! The answer to a chat request that does not stream, and the parts it shares with streams.
//!
//! Key order is that of the API's example. Not here: how the parts come about (the server's
//! `raise`).

use serde::{Serialize, Serializer};

/// A whole chat completion.
#[derive(Debug, Clone, Serialize)]
pub struct ChatCompletion<'a> {
    /// `chatcmpl-` and 32 hexadecimal digits.
    pub id: &'a str,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model as the client named it.
    pub model: &'a str,
    /// Sorted by index; as many as `n`.
    pub choices: Vec<Choice>,
    /// Tokens of all choices together.
    pub usage: Usage,
    /// Identifies weights and configuration.
    pub system_fingerprint: &'a str,
}

/// One of the `n` answers.
#[derive(Debug, Clone, Serialize)]
pub struct Choice {
    /// From 0.
    pub index: u32,
    /// The answer.
    pub message: AssistantMessage,
    /// Present only if asked for.
    pub logprobs: Option<Logprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string or token that matched.
    pub stop_reason: Option<StopReason>,
    /// What was odd about the ending; absent if nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_details: Option<FinishDetails>,
}

/// What the assistant said.
#[derive(Debug, Clone, Serialize)]
pub struct AssistantMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// The answer's text; `None` only beside tool calls.
    pub content: Option<String>,
    /// The reasoning; absent in non-thinking mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The same text under its other name, if the server is told to send it twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Complete calls; the field is absent if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<FunctionCall>,
}

/// A call the assistant makes.
#[derive(Debug, Clone, Serialize)]
pub struct FunctionCall {
    /// `call_` and letters and digits.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What is called.
    pub function: FunctionBody,
}

/// The function and its arguments.
#[derive(Debug, Clone, Serialize)]
pub struct FunctionBody {
    /// The tool's name.
    pub name: String,
    /// A JSON object, as a string.
    pub arguments: String,
}

/// Why a choice ended, in the words of the OpenAI surface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of sequence, a stop string or a stop token.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// At least one complete call, and the model stopped.
    ToolCalls,
    /// The server cut the generation.
    InsufficientSystemResource,
}

impl FinishReason {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::InsufficientSystemResource => "insufficient_system_resource",
        }
    }
}

/// What is odd about an ending that its reason does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct FinishDetails {
    /// The model reasoned, then stopped: neither text nor a call followed.
    pub thought_only: bool,
    /// The answer said the same over and over.
    pub token_loop: Option<TokenLoop>,
    /// A last call was begun and left out, because it was not complete.
    pub cut_call: bool,
}

impl FinishDetails {
    /// The details, if there is anything to tell.
    #[must_use]
    pub fn unless_plain(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }
}

/// A run of tokens that follows itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TokenLoop {
    /// Tokens of one run.
    pub period: u32,
    /// How often it came in a row.
    pub repeats: u32,
}

/// What ended a choice with [`FinishReason::Stop`], other than the end of sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// One of the request's stop strings.
    Text(String),
    /// One of the request's stop tokens.
    Token(u32),
}

impl Serialize for StopReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Token(id) => serializer.serialize_u32(*id),
        }
    }
}

/// Token counts. Every field is always present, and the identities between them hold by
/// construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
    pub(crate) completion_tokens_details: CompletionTokensDetails,
    pub(crate) prompt_cache_hit_tokens: u64,
    pub(crate) prompt_cache_miss_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct CompletionTokensDetails {
    pub(crate) reasoning_tokens: u64,
}

impl Usage {
    /// Counts of one request: `cached` of the `prompt` tokens came from the cache, and `reasoning`
    /// of the `completion` tokens came before `</think>`. Parts are cut to their whole.
    #[must_use]
    pub fn new(prompt: u64, cached: u64, completion: u64, reasoning: u64) -> Self {
        let (cached, reasoning) = (cached.min(prompt), reasoning.min(completion));
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens: reasoning },
            prompt_cache_hit_tokens: cached,
            prompt_cache_miss_tokens: prompt - cached,
        }
    }
}

/// Log-probabilities of a choice, or of the part of it that a chunk releases.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Logprobs {
    /// The answer's tokens.
    pub content: Vec<LogprobEntry>,
    /// The reasoning's tokens; `None` in non-thinking mode.
    pub reasoning_content: Option<Vec<LogprobEntry>>,
    /// Always `null`.
    pub refusal: (),
}

/// One sampled token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogprobEntry {
    /// The token and its log-probability.
    #[serde(rename = "token")]
    pub token: String,
    /// Natural logarithm; at most 0.
    #[serde(serialize_with = "finite")]
    pub logprob: f32,
    /// The token's own bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens, descending.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One of the most likely tokens at a position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TopLogprob {
    /// Its text, with U+FFFD for partial characters.
    pub token: String,
    /// Natural logarithm; at most 0.
    #[serde(serialize_with = "finite")]
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// JSON has no infinity, so an impossible token gets OpenAI's -9999.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn finite<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f32(if value.is_finite() { *value } else { -9999.0 })
}
