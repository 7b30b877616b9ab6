//! Chunks of a streamed chat completion.
//!
//! A [`Delta`] is one of the few things a chunk may carry, so that no chunk can hold reasoning and
//! content at once. Not here: the framing ([`crate::sse`]) and the order of chunks (the server).

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::response::{FinishDetails, FinishReason, Logprobs, StopReason, Usage};
use crate::sse;

/// One event of a stream.
#[derive(Debug, Clone, Serialize)]
pub struct ChatChunk<'a> {
    /// The same in all chunks of a stream.
    pub id: &'a str,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    /// The same in all chunks of a stream.
    pub created: u64,
    /// The model as the client named it.
    pub model: &'a str,
    /// Identifies weights and configuration.
    pub system_fingerprint: &'a str,
    /// One choice, or none in the usage chunk.
    pub choices: Vec<ChunkChoice<'a>>,
    /// Absent without `include_usage`; with it `null` in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// A piece of one choice.
#[derive(Debug, Clone)]
pub struct ChunkChoice<'a> {
    /// Which of the `n` choices.
    pub index: u32,
    /// What is new.
    pub delta: Delta<'a>,
    /// Of the tokens whose text this chunk releases.
    pub logprobs: Option<Logprobs>,
}

impl Serialize for ChunkChoice<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("index", &self.index)?;
        map.serialize_entry("delta", &self.delta)?;
        map.serialize_entry("logprobs", &self.logprobs)?;
        match &self.delta {
            Delta::End { finish_reason, stop_reason, finish_details } => {
                map.serialize_entry("finish_reason", finish_reason)?;
                map.serialize_entry("stop_reason", stop_reason)?;
                if let Some(details) = finish_details {
                    map.serialize_entry("finish_details", details)?;
                }
            }
            _ => map.serialize_entry("finish_reason", &())?,
        }
        map.end()
    }
}

/// Writes one delta after the other as events of one stream.
///
/// What all chunks of a stream share is serialised once. The bytes are those of [`sse::event`] for
/// a [`ChatChunk`] with one [`ChunkChoice`] without logprobs.
#[derive(Debug, Clone)]
pub struct DeltaWriter {
    /// Up to the choice.
    head: Vec<u8>,
    /// From behind the choice on.
    tail: Vec<u8>,
}

impl DeltaWriter {
    /// A writer for the stream that `chunk`, which has no choices, belongs to.
    #[must_use]
    pub fn new(chunk: &ChatChunk<'_>) -> Self {
        const CHOICES: &[u8] = br#""choices":["#;
        let mut head = sse::event(chunk);
        // Quotes inside of strings are escaped, so this is the field itself.
        let at = head.windows(CHOICES.len()).position(|bytes| bytes == CHOICES);
        let tail = head.split_off(at.map_or(head.len(), |at| at + CHOICES.len()));
        Self { head, tail }
    }

    /// Appends the event that carries `delta`; anything but [`Delta::End`], whose chunk says more.
    pub fn append(&self, index: u32, delta: &Delta<'_>, out: &mut Vec<u8>) {
        const SERIALISES: &str = "deltas hold strings and numbers, which always serialise";
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        serde_json::to_writer(&mut *out, &index).expect(SERIALISES);
        out.extend_from_slice(b",\"delta\":");
        serde_json::to_writer(&mut *out, delta).expect(SERIALISES);
        out.extend_from_slice(b",\"logprobs\":null,\"finish_reason\":null}");
        out.extend_from_slice(&self.tail);
    }
}

/// What a chunk adds to its choice.
#[derive(Debug, Clone, PartialEq)]
pub enum Delta<'a> {
    /// The first chunk of a choice.
    Role {
        /// Whether reasoning comes first.
        thinking: bool,
    },
    /// More reasoning.
    Reasoning {
        /// The new text.
        text: &'a str,
        /// Whether to send it under its second name too.
        alias: bool,
    },
    /// More of the answer.
    Content(&'a str),
    /// A call begins.
    Call {
        /// From 0 within the message.
        index: u32,
        /// The call's id.
        id: &'a str,
        /// The function's name.
        name: &'a str,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call.
        index: u32,
        /// The new piece of the JSON text.
        text: &'a str,
    },
    /// The last chunk of a choice.
    End {
        /// Why it ended.
        finish_reason: FinishReason,
        /// The stop string or token that matched.
        stop_reason: Option<StopReason>,
        /// What was odd about the ending.
        finish_details: Option<FinishDetails>,
    },
}

impl Serialize for Delta<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match self {
            Self::Role { thinking: true } => {
                map.serialize_entry("role", "assistant")?;
                map.serialize_entry("content", &())?;
                map.serialize_entry("reasoning_content", "")?;
            }
            Self::Role { thinking: false } => {
                map.serialize_entry("role", "assistant")?;
                map.serialize_entry("content", "")?;
            }
            Self::Reasoning { text, alias } => {
                map.serialize_entry("reasoning_content", text)?;
                if *alias {
                    map.serialize_entry("reasoning", text)?;
                }
            }
            Self::Content(text) => map.serialize_entry("content", text)?,
            Self::Call { index, id, name } => map.serialize_entry(
                "tool_calls",
                &[CallDelta {
                    index: *index,
                    id: Some(id),
                    kind: Some("function"),
                    function: FunctionDelta { name: Some(name), arguments: "" },
                }],
            )?,
            Self::Arguments { index, text } => map.serialize_entry(
                "tool_calls",
                &[CallDelta {
                    index: *index,
                    id: None,
                    kind: None,
                    function: FunctionDelta { name: None, arguments: text },
                }],
            )?,
            Self::End { .. } => {}
        }
        map.end()
    }
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}
