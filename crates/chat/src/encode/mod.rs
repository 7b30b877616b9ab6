//! Prompts: what a conversation looks like to the model.
//!
//! Two layers share one renderer. [`render`] does what the hosted API does with a request;
//! [`release::encode_messages`] does what the release's bundled encoder does with a message list.
//! Where the release defines the bytes the two agree; the API layer decides what the release
//! leaves open:
//!
//! - system and developer messages are collected at the front, joined by a blank line;
//! - every assistant turn has its own opener, and the prompt ends with one, unless the last
//!   message is continued;
//! - tools and the answer format follow the system text, which is empty if there is none.
//!
//! Not here: tokenisation (`prompt`, `tokenizer`), reading answers (`parse`).

mod history;
pub mod json;
pub mod prompt;
pub mod release;
pub(crate) mod render;
pub mod strings;
mod thinking;
mod tools;
pub mod turn_cache;

use crate::conversation::{Conversation, Effort, Message, ResponseFormat, Role, ThinkingMode};
use crate::special::Special;
use history::{CallOrder, merge};
use prompt::Prompt;
use render::{Openers, Renderer};
use thinking::ThinkingRules;

/// A conversation has no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum EncodeError {
    #[error("a message has the unknown role `{role}`")]
    UnknownRole { role: String },
    #[error(
        "a message has the unknown task `{task}`, expected one of action, query, authority, \
         domain, title, read_url"
    )]
    UnknownTask { task: String },
    #[error("a message's `{field}` is missing or has the wrong type")]
    MalformedMessage { field: &'static str },
    #[error("message {index} is a developer message without content; give it some or leave it out")]
    EmptyDeveloper { index: usize },
    #[error("reasoning effort {effort:?} does not exist in this release, expected High or Max")]
    EffortNotInProfile { effort: Effort },
    #[error("the last message is not from the assistant, so there is nothing to continue")]
    NothingToContinue,
    #[error("a forced tool call needs tools")]
    ForcedCallWithoutTools,
    #[error("thinking mode does not support a forced tool call in the prompt; use chat mode")]
    ForcedCallWhileThinking,
    #[error("a message cannot be continued and be a forced tool call at once")]
    ForcedCallInContinuation,
}

/// Renders a conversation as the hosted API does.
///
/// # Errors
/// [`EncodeError`] if options contradict the messages or each other.
pub fn render(conversation: &Conversation) -> Result<Prompt, EncodeError> {
    check_options(conversation)?;
    let mut prompt = Prompt::default();
    prompt.push_control(Special::Bos);
    if conversation.thinking == ThinkingMode::Thinking {
        prompt.push_text(conversation.profile.prompt(conversation.effort));
    }

    let mut turns = merge(&ordered(conversation));
    CallOrder::default().sort(&mut turns);
    // Without tools only the coming answer reasons, or the one that is continued: its pivot is
    // the turn before it.
    let n_done = if conversation.continue_final { 1 } else { 0 };
    let pivot = turns.len().cast_signed() - 1 - n_done;
    let drop = conversation.drop_thinking && conversation.tools.is_empty();
    let final_without_reasoning =
        conversation.messages.last().is_some_and(|message| message.reasoning.is_none());
    Renderer {
        turns: &turns,
        rules: ThinkingRules::new(conversation.thinking, drop, pivot),
        openers: Openers::EveryAnswer {
            continue_final: conversation.continue_final,
            final_without_reasoning,
        },
    }
    .render(0, &mut prompt)?;
    if conversation.open_tool_block {
        prompt.open_tool_block();
    }
    Ok(prompt)
}

fn check_options(conversation: &Conversation) -> Result<(), EncodeError> {
    let last = conversation.messages.last();
    if conversation.continue_final && last.is_none_or(|last| last.role != Role::Assistant) {
        return Err(EncodeError::NothingToContinue);
    }
    if conversation.open_tool_block {
        if conversation.tools.is_empty() {
            return Err(EncodeError::ForcedCallWithoutTools);
        }
        if conversation.thinking == ThinkingMode::Thinking {
            return Err(EncodeError::ForcedCallWhileThinking);
        }
        if conversation.continue_final {
            return Err(EncodeError::ForcedCallInContinuation);
        }
    }
    Ok(())
}

/// The messages in rendering order: one system message with everything that belongs there, then
/// the others, with each reminder before the user turn it stands in.
fn ordered(conversation: &Conversation) -> Vec<Message> {
    let is_system = |message: &Message| matches!(message.role, Role::System | Role::Developer);
    let texts: Vec<String> = conversation
        .messages
        .iter()
        .filter(|message| is_system(message) && !message.content.is_empty())
        .map(|message| message.content.to_text().into_owned())
        .collect();
    let mut system = Message::system(texts.join(strings::SECTION_SEPARATOR));
    system.tools.clone_from(&conversation.tools);
    system.response_format = conversation.response_format.clone();

    let mut messages = Vec::with_capacity(conversation.messages.len() + 1);
    if !system.content.is_empty()
        || !system.tools.is_empty()
        || system.response_format != ResponseFormat::Text
    {
        messages.push(system);
    }
    for message in conversation.messages.iter().filter(|message| !is_system(message)) {
        let at = if message.role == Role::LatestReminder {
            let is_asking = |message: &Message| matches!(message.role, Role::User | Role::Tool);
            messages.iter().rposition(|message| !is_asking(message)).map_or(0, |last| last + 1)
        } else {
            messages.len()
        };
        let mut message = message.clone();
        // Fields of release message lists: here the conversation says these things.
        message.tools.clear();
        message.response_format = ResponseFormat::Text;
        message.wo_eos = false;
        messages.insert(at, message);
    }
    messages
}
