//! The OpenAI surface, with DeepSeek's fields: what clients send and what they get back.
//!
//! Requests ([`chat`], [`completions`], [`tokenize`] and their parts) are read by hand from JSON, in
//! the order of checks of the HTTP contract; responses ([`response`], [`stream`], [`models`]) are
//! plain serde types.

pub mod chat;
pub mod completions;
pub mod message;
pub mod models;
pub mod response;
pub mod sampling;
pub mod stream;
pub mod structured;
pub mod thinking;
pub mod tokenize;
pub mod tools;

use fathom_core::TokenId;

use crate::error::{ApiError, ErrorCode};
use crate::fields::{Path, invalid_type, invalid_value, missing};
use crate::json::Object;

pub use chat::{ChatRequest, UsageInStream};
pub use completions::CompletionRequest;
pub use message::{Arguments, Message, Role, ToolCall};
pub use sampling::Sampling;
pub use structured::Structured;
pub use thinking::{Effort, Thinking};
pub use tokenize::TokenizeRequest;
pub use tools::{ResponseFormat, Tool, ToolChoice};

/// What a trailing `assistant` message without `prefix` means.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum TrailingAssistant {
    /// It is closed, and a new assistant turn begins, as the hosted API does.
    #[default]
    NewTurn,
    /// It is continued, as if it carried `prefix: true`.
    Continue,
    /// The request is refused.
    Reject,
}

/// What a server accepts: the limits and switches a request is checked against.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Cap on `max_tokens`.
    pub max_output_tokens: u32,
    /// Whether `max_tokens` above the cap is cut to it instead of refused.
    pub clip_max_tokens: bool,
    /// Cap on `n`.
    pub max_n: u32,
    /// Cap on the number of stop strings.
    pub max_stop: usize,
    /// Cap on the length of one stop string, in bytes.
    pub max_stop_bytes: usize,
    /// Cap on the number of tools.
    pub max_tools: usize,
    /// Cap on the length of one schema, in bytes of compact JSON.
    pub max_schema_bytes: usize,
    /// Cap on the nesting of subschemas.
    pub max_schema_depth: usize,
    /// Cap on the number of messages.
    pub max_messages: usize,
    /// Token ids in `logit_bias` and `stop_token_ids` are below this.
    pub vocab_size: u32,
    /// Refuse fields that are not in the contract instead of ignoring them.
    pub reject_unknown: bool,
    /// Leave out tools that run on the hosted APIs' servers instead of refusing them.
    pub ignore_hosted_tools: bool,
    /// Accept the encoding's own role `latest_reminder` and the message field `task`.
    pub extended_roles: bool,
    /// Refuse the role `developer` instead of treating it as `system`.
    pub reject_developer_role: bool,
    /// Accept tool calls and results in any order.
    pub lenient_tool_history: bool,
    /// What a trailing assistant message means.
    pub trailing_assistant: TrailingAssistant,
    /// Require the word "json" in the prompt of a `json_object` request.
    pub require_json_keyword: bool,
}

impl Default for Rules {
    /// The contract's defaults, for the published vocabulary.
    fn default() -> Self {
        Self {
            max_output_tokens: 384 * 1024,
            clip_max_tokens: false,
            max_n: 16,
            max_stop: 16,
            max_stop_bytes: 1024,
            max_tools: 128,
            max_schema_bytes: 256 * 1024,
            max_schema_depth: 32,
            max_messages: 65_536,
            vocab_size: 129_280,
            reject_unknown: false,
            ignore_hosted_tools: false,
            extended_roles: false,
            reject_developer_role: false,
            lenient_tool_history: false,
            trailing_assistant: TrailingAssistant::NewTurn,
            require_json_keyword: true,
        }
    }
}

/// The request's `model`, which is checked before everything else in the body.
///
/// # Errors
/// `missing_required_parameter` or `invalid_type`, param `model`.
pub fn model_name(body: &Object) -> Result<&str, ApiError> {
    let path = Path::Root.key("model");
    match body.get("model") {
        None | Some(serde_json::Value::Null) => Err(missing(&path)),
        Some(serde_json::Value::String(name)) => Ok(name),
        Some(other) => Err(invalid_type(&path, "a string", other)),
    }
}

/// Refuses fields nobody knows, if the rules say so.
pub(crate) fn check_unknown(unknown: &[String], rules: &Rules) -> Result<(), ApiError> {
    match unknown.first() {
        Some(field) if rules.reject_unknown => {
            let message = format!("{} is not a known field.", crate::error::quoted(field));
            Err(ApiError::at(ErrorCode::UnknownParameter, field, message))
        }
        _ => Ok(()),
    }
}

/// Narrows token ids, all of which must be in the vocabulary.
fn check_token_ids(
    path: &Path<'_>,
    ids: &[i128],
    vocab_size: u32,
) -> Result<Vec<TokenId>, ApiError> {
    let narrow = |id: &i128| TokenId::try_from(*id).ok().filter(|&id| id < vocab_size);
    ids.iter().map(narrow).collect::<Option<Vec<_>>>().ok_or_else(|| {
        let last = vocab_size.saturating_sub(1);
        invalid_value(path, format!("`{path}` must hold token ids in the range [0, {last}]."))
    })
}
