//! The one renderer: turns to a prompt. Both layers use it, the release's message lists and API
//! conversations; they differ in who opens an answer ([`Openers`]).
//!
//! Not here: how turns come about (`history`, `release`, the module root).

use super::EncodeError;
use super::history::Turn;
use super::prompt::Prompt;
use super::strings;
use super::thinking::ThinkingRules;
use super::tools::{push_response_format, push_tool_calls, push_tools};
use crate::conversation::{Message, Role, ToolCall};
use crate::special::{Special, Task};

/// Where answers are opened, that is, where `<｜Assistant｜>` and a think token are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Openers {
    /// As the release's encoder: after a user turn that an answer follows, and nowhere else.
    AfterUser,
    /// As the hosted API: before every assistant turn, and at the end.
    EveryAnswer {
        /// The last turn, from the assistant, is continued: nothing is opened after it.
        continue_final: bool,
        /// The continued turn is an answer without reasoning, whatever the mode.
        final_without_reasoning: bool,
    },
}

pub(super) struct Renderer<'a> {
    pub(super) turns: &'a [Turn],
    pub(super) rules: ThinkingRules,
    pub(super) openers: Openers,
}

impl Renderer<'_> {
    /// Appends the turns from `first` on.
    pub(super) fn render(&self, first: usize, prompt: &mut Prompt) -> Result<(), EncodeError> {
        if first == 0 && matches!(self.openers, Openers::EveryAnswer { .. }) {
            // Nothing comes before the first answer, so nothing else opens it.
            if self.turns.first().is_none_or(|turn| turn.role() == Role::Assistant) {
                self.push_opener(0, prompt);
            }
        }
        for index in first..self.turns.len() {
            self.push_turn(index, prompt)?;
            self.push_transition(index, prompt);
        }
        Ok(())
    }

    fn push_turn(&self, index: usize, prompt: &mut Prompt) -> Result<(), EncodeError> {
        let message = match &self.turns[index] {
            Turn::User { blocks, .. } => {
                prompt.push_control(Special::User);
                let mut text = String::new();
                for (i, block) in blocks.iter().enumerate() {
                    if i > 0 {
                        text.push_str(strings::SECTION_SEPARATOR);
                    }
                    block.write(&mut text);
                }
                prompt.push_text(&text);
                return Ok(());
            }
            Turn::Other(message) => message,
        };
        let content = message.content.to_text();
        match message.role {
            Role::System => {
                prompt.push_text(&content);
                push_attachments(prompt, message);
            }
            Role::Developer => {
                if content.is_empty() {
                    return Err(EncodeError::EmptyDeveloper { index });
                }
                prompt.push_control(Special::User);
                prompt.push_text(&content);
                push_attachments(prompt, message);
            }
            Role::LatestReminder => {
                prompt.push_control(Special::LatestReminder);
                prompt.push_text(&content);
            }
            Role::Assistant => {
                let reasoning = message.reasoning.as_deref().unwrap_or_default();
                let reasoning = self.shows_reasoning(index).then_some(reasoning);
                push_answer(prompt, reasoning, &content, &message.tool_calls);
                if !message.wo_eos && !self.continues_at(index) {
                    prompt.push_control(Special::Eos);
                    prompt.end_answer();
                }
            }
            Role::User | Role::Tool => unreachable!("merging turned these into user turns"),
        }
        Ok(())
    }

    fn shows_reasoning(&self, index: usize) -> bool {
        let after_task = index > 0 && self.turns[index - 1].task().is_some();
        self.rules.shows_reasoning(index) && !after_task && !self.is_bare_continuation(index)
    }

    /// Appends what opens the answer to the turn at `index`, if an answer comes next.
    fn push_transition(&self, index: usize, prompt: &mut Prompt) {
        let next = self.turns.get(index + 1).map(Turn::role);
        let asks = match self.openers {
            Openers::AfterUser => {
                matches!(next, None | Some(Role::Assistant | Role::LatestReminder))
            }
            Openers::EveryAnswer { .. } => match next {
                None => !self.continues_at(index),
                Some(role) => role == Role::Assistant,
            },
        };
        if !asks {
            return;
        }
        let turn = &self.turns[index];
        match (turn.task(), self.openers) {
            (Some(Task::Action), _) => {
                prompt.push_control(Special::Assistant);
                prompt.push_control(self.rules.task_opener());
                prompt.push_control(Special::Task(Task::Action));
            }
            (Some(task), _) => prompt.push_control(Special::Task(task)),
            (None, Openers::AfterUser) => {
                if matches!(turn.role(), Role::User | Role::Developer) {
                    self.push_opener(index + 1, prompt);
                }
            }
            (None, Openers::EveryAnswer { .. }) => self.push_opener(index + 1, prompt),
        }
    }

    /// Opens the answer that is, or will be, the turn at `answer`.
    fn push_opener(&self, answer: usize, prompt: &mut Prompt) {
        prompt.push_control(Special::Assistant);
        prompt.push_control(if self.is_bare_continuation(answer) {
            Special::ThinkEnd
        } else {
            self.rules.opener(answer)
        });
        prompt.begin_answer();
    }

    /// Whether the turn at `index` is the last and is continued.
    fn continues_at(&self, index: usize) -> bool {
        matches!(self.openers, Openers::EveryAnswer { continue_final: true, .. })
            && index + 1 == self.turns.len()
    }

    fn is_bare_continuation(&self, index: usize) -> bool {
        matches!(self.openers, Openers::EveryAnswer { final_without_reasoning: true, .. })
            && self.continues_at(index)
    }
}

/// Appends what an answer says, all but its end of sentence. Reasoning is `None` where the answer was
/// opened without any.
pub(crate) fn push_answer(
    prompt: &mut Prompt,
    reasoning: Option<&str>,
    content: &str,
    calls: &[ToolCall],
) {
    if let Some(reasoning) = reasoning {
        prompt.push_text(reasoning);
        prompt.push_control(Special::ThinkEnd);
    }
    prompt.push_text(content);
    if !calls.is_empty() {
        push_tool_calls(prompt, calls);
    }
}

/// Appends the tools and the answer format that a system or developer message carries.
fn push_attachments(prompt: &mut Prompt, message: &Message) {
    if !message.tools.is_empty() {
        prompt.push_text(strings::SECTION_SEPARATOR);
        push_tools(prompt, &message.tools);
    }
    if message.response_format != crate::conversation::ResponseFormat::Text {
        prompt.push_text(strings::SECTION_SEPARATOR);
        push_response_format(prompt, &message.response_format);
    }
}
