//! Messages of content blocks, turned into the messages of the chat surface.
//!
//! What holds for every list returned by [`read_messages`]: consecutive messages of one role are
//! one message; text blocks are joined by two newlines; a `tool_result` is a tool message that
//! answers a call of the preceding assistant message; a last assistant message is a `prefix`.
//!
//! Not here: `system` beside the messages (`request`), and what the messages render as (`chat`).

use serde_json::Value;

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value, missing};
use crate::json::Object;
use crate::openai::message::{read_content, read_part};
use crate::openai::{Arguments, Message, Role, Rules, ToolCall};

/// Reads and checks `messages`.
///
/// # Errors
/// The first message or block at fault.
pub(super) fn read_messages(
    items: &[Value],
    rules: &Rules,
    unknown: &mut Vec<String>,
) -> Result<Vec<Message>, ApiError> {
    let list = Path::Root.key("messages");
    let mut history = History::new(rules);
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let object = item.as_object().ok_or_else(|| invalid_type(&path, "an object", item))?;
        let mut fields = Fields::new(object, path);
        let role = read_role(fields.required_string("role")?, &path.key("role"))?;
        let content = fields.required("content")?;
        fields.report_unknown(unknown);
        let at = path.key("content");
        match content {
            Value::String(text) => history.text(role, text)?,
            // What an answer without a word looks like, and comes back as.
            Value::Array(blocks) if blocks.is_empty() && role == Role::Assistant => {
                history.turn(role)?;
            }
            Value::Array(blocks) if blocks.is_empty() => return Err(missing(&at)),
            Value::Array(blocks) => {
                for (j, block) in blocks.iter().enumerate() {
                    history.block(role, block, &at.index(j))?;
                }
            }
            other => return Err(invalid_type(&at, "a string or an array of blocks", other)),
        }
    }
    history.finish()
}

fn read_role(name: &str, path: &Path<'_>) -> Result<Role, ApiError> {
    match name {
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "system" => Ok(Role::System),
        _ => {
            let name = quoted(name);
            let message =
                format!("`{path}` is {name}, but must be one of user, assistant, system.");
            Err(invalid_value(path, message))
        }
    }
}

/// The conversation so far.
struct History<'r> {
    rules: &'r Rules,
    messages: Vec<Message>,
    /// Calls of the last assistant message that wait for their result, and where they were made.
    waiting: Vec<(String, String)>,
}

impl<'r> History<'r> {
    fn new(rules: &'r Rules) -> Self {
        Self { rules, messages: Vec::new(), waiting: Vec::new() }
    }

    fn text(&mut self, role: Role, text: &str) -> Result<(), ApiError> {
        if role == Role::User {
            self.all_answered()?;
        }
        append(&mut self.turn(role)?.content, text);
        Ok(())
    }

    fn block(&mut self, role: Role, block: &Value, at: &Path<'_>) -> Result<(), ApiError> {
        let object = block.as_object().ok_or_else(|| invalid_type(at, "an object", block))?;
        let mut fields = Fields::new(object, *at);
        match (role, fields.required_string("type")?) {
            (Role::Assistant, "thinking") => {
                let text = fields.required_string("thinking")?;
                append(&mut self.turn(role)?.reasoning, text);
            }
            // Its text is unreadable to everyone but the model that wrote it.
            (Role::Assistant, "redacted_thinking") => {
                self.turn(role)?;
            }
            (Role::Assistant, "tool_use") => self.tool_use(&mut fields, at)?,
            (Role::User, "tool_result") => self.tool_result(&mut fields, at)?,
            (_, known @ ("thinking" | "redacted_thinking" | "tool_use" | "tool_result")) => {
                let at = at.key("type");
                let message =
                    format!("`{at}` is `{known}`, which a message of this role cannot hold.");
                return Err(invalid_value(&at, message));
            }
            _ => self.text(role, read_part(&mut fields, at)?)?,
        }
        Ok(())
    }

    fn tool_use(&mut self, fields: &mut Fields<'_>, at: &Path<'_>) -> Result<(), ApiError> {
        let id = fields.required_string("id")?.to_owned();
        let name = fields.required_string("name")?.to_owned();
        fields.required("input")?;
        let input: &Object = fields.object("input")?.expect("the field was there");
        let arguments = Arguments::Object(input.clone());
        self.turn(Role::Assistant)?.tool_calls.push(ToolCall { id: id.clone(), name, arguments });
        self.waiting.push((id, at.to_string()));
        Ok(())
    }

    fn tool_result(&mut self, fields: &mut Fields<'_>, at: &Path<'_>) -> Result<(), ApiError> {
        let id = fields.required_string("tool_use_id")?;
        // A result is shown to the model as it is, whether or not the tool failed.
        fields.boolean("is_error")?;
        let content = read_content(fields.get("content"), &at.key("content"))?;
        match self.waiting.iter().position(|(call, _)| call == id) {
            Some(found) => {
                self.waiting.remove(found);
            }
            None if self.rules.lenient_tool_history => {}
            None => {
                let (at, id) = (at.key("tool_use_id"), quoted(id));
                let why = "the preceding assistant message has no such unanswered call";
                let message = format!("`{at}` is {id}, but {why}.");
                return Err(ApiError::at(ErrorCode::InvalidMessageSequence, at, message));
            }
        }
        self.messages.push(Message {
            tool_call_id: Some(id.to_owned()),
            ..Message::text(Role::Tool, content.unwrap_or_default())
        });
        Ok(())
    }

    /// The message of `role` that is being said, begun if someone else spoke last.
    fn turn(&mut self, role: Role) -> Result<&mut Message, ApiError> {
        let goes_on = self.messages.last().is_some_and(|last| last.role == role);
        if !goes_on {
            if role == Role::Assistant {
                self.all_answered()?;
            }
            self.messages.push(Message { content: None, ..Message::text(role, String::new()) });
        }
        Ok(self.messages.last_mut().expect("a message was pushed if there was none"))
    }

    fn all_answered(&self) -> Result<(), ApiError> {
        match self.waiting.first() {
            Some((id, at)) if !self.rules.lenient_tool_history => {
                let id = quoted(id);
                let message = format!(
                    "`{at}` is the call {id}, but no `tool_result` right after it answers."
                );
                Err(ApiError::at(ErrorCode::InvalidMessageSequence, at, message))
            }
            _ => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Vec<Message>, ApiError> {
        self.all_answered()?;
        for message in &mut self.messages {
            if message.reasoning.is_none() && message.tool_calls.is_empty() {
                message.content.get_or_insert_default();
            }
        }
        if let Some(last) = self.messages.last_mut() {
            last.prefix = last.role == Role::Assistant && last.tool_calls.is_empty();
        }
        Ok(self.messages)
    }
}

/// Adds a block's text to what was said before it.
fn append(said: &mut Option<String>, text: &str) {
    match said {
        Some(said) => {
            said.push_str("\n\n");
            said.push_str(text);
        }
        None => *said = Some(text.to_owned()),
    }
}
