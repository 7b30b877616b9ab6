//! Events of a Messages stream, one by one.
//!
//! The order is: `message_start`; for each block `content_block_start`, its deltas and
//! `content_block_stop`; `message_delta`; `message_stop`. Not here: who keeps that order (the
//! server's `raise`).

use serde::Serialize;

use super::response::{Block, Message, StopReason, Usage};
use crate::openai::response::FinishDetails;
use crate::sse;

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event<'a> {
    /// The answer begins.
    MessageStart {
        /// Without content, and with the usage of the prompt.
        message: Message<'a>,
    },
    /// Nothing new, but the stream lives.
    Ping,
    /// A block begins.
    ContentBlockStart {
        /// From 0 within the message.
        index: u32,
        /// The block without its text.
        content_block: Block,
    },
    /// More of a block.
    ContentBlockDelta {
        /// Which block.
        index: u32,
        /// What is new.
        delta: Delta,
    },
    /// A block is complete.
    ContentBlockStop {
        /// Which block.
        index: u32,
    },
    /// The answer is complete.
    MessageDelta {
        /// Why.
        delta: End,
        /// Of the whole request.
        usage: Usage,
    },
    /// Nothing follows.
    MessageStop,
}

/// What is new in a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Delta {
    /// More reasoning.
    ThinkingDelta {
        /// The new text.
        thinking: String,
    },
    /// The end of the reasoning.
    SignatureDelta {
        /// Opaque.
        signature: String,
    },
    /// More text.
    TextDelta {
        /// The new text.
        text: String,
    },
    /// More of a call's arguments.
    InputJsonDelta {
        /// The new piece of the JSON text.
        partial_json: String,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct End {
    /// In a word.
    pub stop_reason: StopReason,
    /// The stop sequence that matched.
    pub stop_sequence: Option<String>,
    /// What was odd about the ending; absent if nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_details: Option<FinishDetails>,
}

impl Event<'_> {
    /// The event's name, which its JSON repeats as `type`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }

    /// The event as it is sent.
    #[must_use]
    pub fn to_frame(&self) -> Vec<u8> {
        sse::named_event(self.name(), self)
    }
}
