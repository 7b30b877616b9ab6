//! The answer to a Responses request, and the items it shares with streams.
//!
//! Not here: how the items come about (the server's `responses`).

use serde::Serialize;

use super::request::Echo;
use crate::openai::response::{FinishDetails, LogprobEntry, Usage as ChatUsage};

/// A whole answer, or what there is of it when a stream begins or fails.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Response<'a> {
    /// `resp_` and 32 hexadecimal digits.
    pub id: &'a str,
    /// Always `response`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created_at: u64,
    /// How far it is.
    pub status: Status,
    /// Always false: nothing runs without a client.
    pub background: bool,
    /// Why it failed.
    pub error: Option<Failure<'a>>,
    /// Why it is incomplete.
    pub incomplete_details: Option<IncompleteDetails>,
    /// What was odd about the ending; absent if nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_details: Option<FinishDetails>,
    /// The model as the client named it.
    pub model: &'a str,
    /// What the model produced, in the order it came.
    pub output: &'a [Item],
    /// Always `null`: responses are not kept.
    pub previous_response_id: (),
    /// Always false: responses are not kept.
    pub store: bool,
    /// Always `disabled`: input that does not fit is refused.
    pub truncation: &'static str,
    /// Token counts; `None` while it goes on.
    pub usage: Option<Usage>,
    /// What the client asked for.
    #[serde(flatten)]
    pub echo: &'a Echo,
}

/// How far a response is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each variant is its name on the wire")]
pub enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

/// Why a response failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure<'a> {
    /// Always `server_error`: what a client does wrong is refused before a response begins.
    pub code: &'static str,
    /// One sentence.
    pub message: &'a str,
}

/// Why a response is incomplete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct IncompleteDetails {
    /// Always `max_output_tokens`.
    pub reason: &'static str,
}

/// One thing that the model produced.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(missing_docs, reason = "fields common to all variants are documented on the first")]
pub enum Item {
    /// What it thought.
    Reasoning {
        /// `rs_` and 32 hexadecimal digits.
        id: String,
        /// Always empty: the reasoning itself is in `content`.
        summary: [(); 0],
        /// One part, or none where a stream begins the item.
        content: Vec<Part>,
        /// The same text for clients that send back nothing else; see [`super::seal`].
        encrypted_content: Option<String>,
        /// How far it is.
        status: Status,
    },
    /// What it said.
    Message {
        /// `msg_` and 32 hexadecimal digits.
        id: String,
        status: Status,
        /// Always `assistant`.
        role: &'static str,
        content: Vec<Part>,
    },
    /// What it wants to be called.
    FunctionCall {
        /// `fc_` and 32 hexadecimal digits.
        id: String,
        /// `call_` and 32 hexadecimal digits: what the output refers to.
        call_id: String,
        /// The tool.
        name: String,
        /// A JSON object, as a string.
        arguments: String,
        status: Status,
    },
}

impl Item {
    /// The item's own id.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. }
            | Self::Message { id, .. }
            | Self::FunctionCall { id, .. } => id,
        }
    }
}

/// Text of an item.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Of reasoning.
    ReasoningText {
        /// The text.
        text: String,
    },
    /// Of a message.
    OutputText {
        /// The text.
        text: String,
        /// Always empty: there is nothing to cite.
        annotations: [(); 0],
        /// Of the text's tokens; empty unless asked for.
        logprobs: Vec<LogprobEntry>,
    },
}

/// Token counts in the terms of the Responses surface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    input_tokens: u64,
    input_tokens_details: InputTokensDetails,
    output_tokens: u64,
    output_tokens_details: OutputTokensDetails,
    total_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct InputTokensDetails {
    cached_tokens: u64,
    /// Writing to the cache costs nothing here, so nothing is counted as such.
    cache_write_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct OutputTokensDetails {
    reasoning_tokens: u64,
}

impl From<ChatUsage> for Usage {
    fn from(usage: ChatUsage) -> Self {
        let cached_tokens = usage.prompt_cache_hit_tokens;
        let input_tokens = cached_tokens + usage.prompt_cache_miss_tokens;
        Self {
            input_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails {
                reasoning_tokens: usage.completion_tokens_details.reasoning_tokens,
            },
            total_tokens: input_tokens + usage.completion_tokens,
        }
    }
}
