//! The answer to a Messages request that does not stream, and the parts it shares with streams.
//!
//! Not here: how the parts come about (the server's `raise`).

use serde::Serialize;

use crate::json::Object;
use crate::openai::response as openai;

/// A whole answer, or the empty one that a stream begins with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message<'a> {
    /// `msg_` and 32 hexadecimal digits.
    pub id: &'a str,
    /// Always `message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Always `assistant`.
    pub role: &'static str,
    /// The model as the client named it.
    pub model: &'a str,
    /// What the assistant said, in the order it came.
    pub content: Vec<Block>,
    /// Why it ended; `None` while it goes on.
    pub stop_reason: Option<StopReason>,
    /// The stop sequence that matched.
    pub stop_sequence: Option<String>,
    /// What was odd about the ending; absent if nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_details: Option<openai::FinishDetails>,
    /// Token counts.
    pub usage: Usage,
}

impl<'a> Message<'a> {
    /// An answer of which nothing was said yet.
    #[must_use]
    pub const fn begun(id: &'a str, model: &'a str, usage: Usage) -> Self {
        Self {
            id,
            kind: "message",
            role: "assistant",
            model,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            finish_details: None,
            usage,
        }
    }
}

/// One block of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Block {
    /// Reasoning.
    Thinking {
        /// Its text; empty if the client asked for that.
        thinking: String,
        /// Opaque; empty only where a stream begins the block.
        signature: String,
    },
    /// Text of the answer.
    Text {
        /// The text.
        text: String,
    },
    /// A call.
    ToolUse {
        /// `toolu_` and 32 hexadecimal digits.
        id: String,
        /// The tool.
        name: String,
        /// Its arguments.
        input: Object,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model was done.
    EndTurn,
    /// `max_tokens` were said.
    MaxTokens,
    /// One of `stop_sequences` matched.
    StopSequence,
    /// The model waits for the results of its calls.
    ToolUse,
    /// The context is full, which cut `max_tokens` short.
    ModelContextWindowExceeded,
}

/// Token counts in the terms of the Messages surface: the three input counts add up to the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
    output_tokens_details: OutputTokensDetails,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct OutputTokensDetails {
    thinking_tokens: u64,
}

impl From<openai::Usage> for Usage {
    fn from(usage: openai::Usage) -> Self {
        Self {
            input_tokens: usage.prompt_cache_miss_tokens,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.prompt_cache_hit_tokens,
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails {
                thinking_tokens: usage.completion_tokens_details.reasoning_tokens,
            },
        }
    }
}

/// How many tokens a request's prompt has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TokenCount {
    /// The sum of the input counts that the same request is answered with.
    pub input_tokens: usize,
}
