//! A whole answer, collected from its deltas: the form without streaming.
//!
//! Not here: the wire format (the server's).

use super::Delta;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ParsedMessage {
    /// All reasoning.
    pub reasoning: String,
    /// All answer text.
    pub content: String,
    /// The complete calls, in order.
    pub tool_calls: Vec<ParsedCall>,
    /// The call under way.
    open: Option<ParsedCall>,
}

/// A complete call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ParsedCall {
    /// The function's name.
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

impl ParsedMessage {
    /// Adds what a delta says. A call becomes part of the message when it ends.
    pub fn push(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning += &text,
            Delta::Content(text) => self.content += &text,
            Delta::ToolCallStart { name, .. } => {
                self.open = Some(ParsedCall { name, arguments: String::new() });
            }
            Delta::ToolCallArguments { fragment, .. } => {
                if let Some(call) = &mut self.open {
                    call.arguments += &fragment;
                }
            }
            Delta::ToolCallEnd { .. } => self.tool_calls.extend(self.open.take()),
        }
    }
}

impl Extend<Delta> for ParsedMessage {
    fn extend<I: IntoIterator<Item = Delta>>(&mut self, deltas: I) {
        deltas.into_iter().for_each(|delta| self.push(delta));
    }
}
