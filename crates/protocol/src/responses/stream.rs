//! Events of a Responses stream, one by one.
//!
//! The order is: `response.created`, `response.in_progress`; for each item `output_item.added`, its
//! part, deltas and their ends, `output_item.done`; at last `response.completed`,
//! `response.incomplete` or `response.failed`. Every event carries its number in the stream.
//!
//! Not here: who keeps that order (the server's `responses`).

use serde::Serialize;

use super::response::{Item, Part, Response};
use crate::openai::response::LogprobEntry;
use crate::sse;

/// Declares [`Event`] from the rows `variant name {fields}`.
macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident $name:literal { $($field:ident: $kind:ty),* })*) => {
        /// One event.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(untagged)]
        #[expect(missing_docs, reason = "item_id, output_index and content_index say where; the rest is what is new")]
        pub enum Event<'a> {
            $($(#[$doc])* $variant { $($field: $kind),* },)*
        }

        impl Event<'_> {
            /// The event's name, which its JSON repeats as `type`.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self { $(Self::$variant { .. } => $name,)* }
            }
        }
    };
}

events! {
    /// The request was accepted.
    Created "response.created" { response: Response<'a> }
    /// The model works on it.
    InProgress "response.in_progress" { response: Response<'a> }
    /// An item begins.
    ItemAdded "response.output_item.added" { output_index: u32, item: &'a Item }
    /// A part of an item begins.
    PartAdded "response.content_part.added"
        { item_id: &'a str, output_index: u32, content_index: u32, part: &'a Part }
    /// More reasoning.
    ReasoningDelta "response.reasoning_text.delta"
        { item_id: &'a str, output_index: u32, content_index: u32, delta: &'a str }
    /// The reasoning is complete.
    ReasoningDone "response.reasoning_text.done"
        { item_id: &'a str, output_index: u32, content_index: u32, text: &'a str }
    /// More of the answer.
    TextDelta "response.output_text.delta"
        { item_id: &'a str, output_index: u32, content_index: u32, delta: &'a str, logprobs: &'a [LogprobEntry] }
    /// The answer is complete.
    TextDone "response.output_text.done"
        { item_id: &'a str, output_index: u32, content_index: u32, text: &'a str, logprobs: &'a [LogprobEntry] }
    /// More of a call's arguments.
    ArgumentsDelta "response.function_call_arguments.delta"
        { item_id: &'a str, output_index: u32, delta: &'a str }
    /// The arguments are complete.
    ArgumentsDone "response.function_call_arguments.done"
        { item_id: &'a str, output_index: u32, name: &'a str, arguments: &'a str }
    /// A part is complete.
    PartDone "response.content_part.done"
        { item_id: &'a str, output_index: u32, content_index: u32, part: &'a Part }
    /// An item is complete.
    ItemDone "response.output_item.done" { output_index: u32, item: &'a Item }
    /// The response is complete.
    Completed "response.completed" { response: Response<'a> }
    /// The response ends before the model was done.
    Incomplete "response.incomplete" { response: Response<'a> }
    /// The response failed.
    Failed "response.failed" { response: Response<'a> }
}

#[derive(Serialize)]
struct Numbered<'a> {
    #[serde(rename = "type")]
    name: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

impl Event<'_> {
    /// The event as it is sent.
    #[must_use]
    pub fn to_frame(&self, sequence_number: u64) -> Vec<u8> {
        let name = self.name();
        sse::named_event(name, &Numbered { name, sequence_number, event: self })
    }
}
