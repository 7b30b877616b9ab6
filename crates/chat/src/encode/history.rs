//! What happens to a message list before it is rendered: tool results join user turns.
//!
//! The model knows no tool messages: their contents are blocks of a user turn. Consecutive user
//! and tool messages become one turn, and the results in it follow the order of the calls.
//!
//! Not here: which reasoning is kept (`thinking`).

use std::collections::HashMap;

use super::strings;
use crate::conversation::{Message, Role, ToolCall};
use crate::special::Task;

/// One rendered turn.
#[derive(Debug, Clone)]
pub(super) enum Turn {
    /// One or more user and tool messages.
    User { blocks: Vec<Block>, task: Option<Task> },
    /// Any other message. Never a tool or user message.
    Other(Message),
}

/// One block of a user turn.
#[derive(Debug, Clone)]
pub(super) enum Block {
    Text(String),
    ToolResult { tool_call_id: String, text: String },
}

impl Turn {
    pub(super) fn role(&self) -> Role {
        match self {
            Self::User { .. } => Role::User,
            Self::Other(message) => message.role,
        }
    }

    pub(super) fn task(&self) -> Option<Task> {
        match self {
            Self::User { task, .. } => *task,
            Self::Other(message) => message.task,
        }
    }

    pub(super) fn has_tools(&self) -> bool {
        matches!(self, Self::Other(message) if !message.tools.is_empty())
    }
}

impl Block {
    pub(super) fn write(&self, out: &mut String) {
        match self {
            Self::Text(text) => out.push_str(text),
            Self::ToolResult { text, .. } => {
                out.push_str(strings::TOOL_RESULT_OPEN);
                out.push_str(text);
                out.push_str(strings::TOOL_RESULT_CLOSE);
            }
        }
    }
}

/// Merges user and tool messages into turns. A task closes its turn for further user messages,
/// but not for tool results; the task of a message that joins an earlier turn is lost. Tools and
/// answer formats on user messages are dropped.
pub(super) fn merge(messages: &[Message]) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    for message in messages {
        let text = || message.content.to_text().into_owned();
        match (message.role, turns.last_mut()) {
            (Role::Tool, last) => {
                let block = Block::ToolResult {
                    tool_call_id: message.tool_call_id.clone().unwrap_or_default(),
                    text: text(),
                };
                if let Some(Turn::User { blocks, .. }) = last {
                    blocks.push(block);
                } else {
                    turns.push(Turn::User { blocks: vec![block], task: None });
                }
            }
            (Role::User, Some(Turn::User { blocks, task: None })) => {
                blocks.push(Block::Text(text()));
            }
            (Role::User, _) => {
                turns.push(Turn::User { blocks: vec![Block::Text(text())], task: message.task });
            }
            _ => turns.push(Turn::Other(message.clone())),
        }
    }
    turns
}

/// The order of the calls that tool results answer, carried along a message list.
#[derive(Debug, Default)]
pub(super) struct CallOrder {
    position: HashMap<String, usize>,
}

impl CallOrder {
    /// Notes the calls of a message.
    pub(super) fn observe(&mut self, calls: &[ToolCall]) {
        if calls.is_empty() {
            return;
        }
        self.position = calls
            .iter()
            .enumerate()
            .filter(|(_, call)| !call.id.is_empty())
            .map(|(i, call)| (call.id.clone(), i))
            .collect();
    }

    /// Puts the tool results of each turn into the order of the last calls before it. Text blocks
    /// keep their places, and results of unknown calls count as the first.
    pub(super) fn sort(&mut self, turns: &mut [Turn]) {
        for turn in turns {
            match turn {
                Turn::Other(message) if message.role == Role::Assistant => {
                    self.observe(&message.tool_calls);
                }
                Turn::User { blocks, .. } => self.sort_results(blocks),
                Turn::Other(_) => {}
            }
        }
    }

    fn sort_results(&self, blocks: &mut [Block]) {
        let is_result = |block: &Block| matches!(block, Block::ToolResult { .. });
        let mut results: Vec<Block> = blocks.iter().filter(|b| is_result(b)).cloned().collect();
        if results.len() < 2 || self.position.is_empty() {
            return;
        }
        results.sort_by_key(|block| match block {
            Block::ToolResult { tool_call_id, .. } => {
                self.position.get(tool_call_id).copied().unwrap_or(0)
            }
            Block::Text(_) => 0,
        });
        let places = blocks.iter_mut().filter(|block| is_result(block));
        for (place, result) in places.zip(results) {
            *place = result;
        }
    }
}
