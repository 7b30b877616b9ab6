//! Input items, turned into the messages of the chat surface.
//!
//! What holds for every list returned by [`read_input`]: consecutive items of the assistant
//! (`reasoning`, its messages, `function_call`) are one message; a `function_call_output` is a tool
//! message that answers a call of the preceding assistant message; text parts are joined by two
//! newlines.
//!
//! Reasoning travels in two forms. Its text is there for all to read; clients that send back only
//! `encrypted_content` get the same text there in a form that they pass on untouched ([`seal`]). It
//! hides nothing: the client has seen the text.
//!
//! Not here: `instructions` (`request`), and what the messages render as (`chat`).

use serde_json::Value;

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value, missing};
use crate::openai::{Arguments, Message, Role, Rules, ToolCall, TrailingAssistant};

/// What sealed reasoning begins with; others' is not readable here.
const SEAL: &str = "fathom1-";

/// Items that only mean something to the server that made them, or to tools that run there.
const HOSTED: [&str; 4] = ["item_reference", "compaction", "compaction_summary", "ghost_snapshot"];

/// Reads and checks `input`.
///
/// # Errors
/// The first item at fault.
pub(super) fn read_input(
    input: &Value,
    rules: &Rules,
    unknown: &mut Vec<String>,
) -> Result<Vec<Message>, ApiError> {
    let list = Path::Root.key("input");
    let mut history = History { rules, messages: Vec::new(), waiting: Vec::new() };
    let items = match input {
        Value::String(text) => return Ok(vec![Message::text(Role::User, text.clone())]),
        Value::Array(items) => items,
        other => return Err(invalid_type(&list, "a string or an array of items", other)),
    };
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let object = item.as_object().ok_or_else(|| invalid_type(&path, "an object", item))?;
        let mut fields = Fields::new(object, path);
        history.item(&mut fields, &path)?;
        fields.report_unknown(unknown);
    }
    history.finish(items.len())
}

/// The conversation so far.
struct History<'r> {
    rules: &'r Rules,
    messages: Vec<Message>,
    /// Calls of the last assistant message that wait for their output, and where they were made.
    waiting: Vec<(String, String)>,
}

impl History<'_> {
    fn item(&mut self, fields: &mut Fields<'_>, path: &Path<'_>) -> Result<(), ApiError> {
        // What servers add to the items they send, and clients send back.
        for name in ["id", "status"] {
            fields.get(name);
        }
        match fields.string("type")? {
            None | Some("message") => self.message(fields, path),
            Some("reasoning") => self.reasoning(fields, path),
            Some("function_call") => self.call(fields, path),
            Some("function_call_output") => self.output(fields, path),
            Some(other) => {
                let at = path.key("type");
                let kind = quoted(other);
                let hosted = HOSTED.contains(&other)
                    || other.ends_with("_call")
                    || other.ends_with("_call_output")
                    || other.starts_with("mcp_");
                let (code, accepted) = if hosted {
                    let why = "which belongs to tools or memory that this server does not have";
                    (ErrorCode::UnsupportedParameter, why)
                } else {
                    let accepted = "but must be one of message, reasoning, function_call, \
                                    function_call_output";
                    (ErrorCode::InvalidValue, accepted)
                };
                Err(ApiError::at(code, at, format!("`{at}` is {kind}, {accepted}.")))
            }
        }
    }

    fn message(&mut self, fields: &mut Fields<'_>, path: &Path<'_>) -> Result<(), ApiError> {
        // Which part of an answer it was; all parts are said.
        fields.get("phase");
        let role_path = path.key("role");
        let role = match fields.required_string("role")? {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "system" => Role::System,
            "developer" if !self.rules.reject_developer_role => Role::System,
            other => {
                let other = quoted(other);
                let developer = if self.rules.reject_developer_role { "" } else { ", developer" };
                let message = format!(
                    "`{role_path}` is {other}, but must be one of user, assistant, system{developer}."
                );
                return Err(invalid_value(&role_path, message));
            }
        };
        let at = path.key("content");
        let text = read_content(fields.get("content"), &at)?.ok_or_else(|| missing(&at))?;
        match role {
            Role::Assistant => append(&mut self.turn()?.content, &text),
            Role::User => {
                self.all_answered()?;
                self.messages.push(Message::text(role, text));
            }
            Role::System | Role::Tool | Role::LatestReminder => {
                self.messages.push(Message::text(role, text))
            }
        }
        Ok(())
    }

    fn reasoning(&mut self, fields: &mut Fields<'_>, path: &Path<'_>) -> Result<(), ApiError> {
        // A summary is not what the model thought.
        fields.get("summary");
        let sealed = fields.string("encrypted_content")?.and_then(unseal);
        let text = read_content(fields.get("content"), &path.key("content"))?.or(sealed);
        if let Some(text) = text {
            append(&mut self.turn()?.reasoning, &text);
        }
        Ok(())
    }

    fn call(&mut self, fields: &mut Fields<'_>, path: &Path<'_>) -> Result<(), ApiError> {
        let id = fields.required_string("call_id")?.to_owned();
        let name = fields.required_string("name")?.to_owned();
        let arguments = match fields.required("arguments")? {
            Value::String(text) => Arguments::Text(text.clone()),
            Value::Object(object) => Arguments::Object(object.clone()),
            other => return Err(invalid_type(&path.key("arguments"), "a string", other)),
        };
        // Without its output in between, a call belongs to the message of the calls before it.
        self.turn()?.tool_calls.push(ToolCall { id: id.clone(), name, arguments });
        self.waiting.push((id, path.to_string()));
        Ok(())
    }

    fn output(&mut self, fields: &mut Fields<'_>, path: &Path<'_>) -> Result<(), ApiError> {
        let id = fields.required_string("call_id")?;
        let content = read_content(Some(fields.required("output")?), &path.key("output"))?;
        match self.waiting.iter().position(|(call, _)| call == id) {
            Some(found) => {
                self.waiting.remove(found);
            }
            None if self.rules.lenient_tool_history => {}
            None => {
                let id = quoted(id);
                let why = "no `function_call` before it waits for an output under this id";
                let message = format!("`{path}` answers the call {id}, but {why}.");
                return Err(ApiError::at(ErrorCode::InvalidMessageSequence, path, message));
            }
        }
        self.messages.push(Message {
            tool_call_id: Some(id.to_owned()),
            ..Message::text(Role::Tool, content.unwrap_or_default())
        });
        Ok(())
    }

    /// The assistant's message that is being said, begun if someone else spoke last.
    fn turn(&mut self) -> Result<&mut Message, ApiError> {
        let goes_on = self.messages.last().is_some_and(|last| last.role == Role::Assistant);
        if !goes_on {
            self.all_answered()?;
            let empty = Message::text(Role::Assistant, String::new());
            self.messages.push(Message { content: None, ..empty });
        }
        Ok(self.messages.last_mut().expect("a message was pushed if there was none"))
    }

    fn all_answered(&self) -> Result<(), ApiError> {
        match self.waiting.first() {
            Some((id, at)) if !self.rules.lenient_tool_history => {
                let id = quoted(id);
                let message =
                    format!("`{at}` is the call {id}, but no `function_call_output` answers it.");
                Err(ApiError::at(ErrorCode::InvalidMessageSequence, at, message))
            }
            _ => Ok(()),
        }
    }

    fn finish(self, n_items: usize) -> Result<Vec<Message>, ApiError> {
        self.all_answered()?;
        let trailing = self.messages.last().is_some_and(|last| last.role == Role::Assistant);
        if trailing && self.rules.trailing_assistant == TrailingAssistant::Reject {
            let list = Path::Root.key("input");
            let at = list.index(n_items.saturating_sub(1));
            let message = format!("`{at}` must not be an item of the assistant, as the last one.");
            return Err(ApiError::at(ErrorCode::InvalidMessageSequence, at, message));
        }
        if self.messages.is_empty() {
            let message = "`input` holds nothing to answer.";
            return Err(ApiError::at(ErrorCode::EmptyArray, "input", message));
        }
        Ok(self.messages)
    }
}

/// The text of a content: a string, or text parts joined by two newlines.
fn read_content(content: Option<&Value>, path: &Path<'_>) -> Result<Option<String>, ApiError> {
    let parts = match content {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text.clone())),
        Some(Value::Array(parts)) if parts.is_empty() => return Ok(None),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(invalid_type(path, "a string or an array of parts", other)),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (j, part) in parts.iter().enumerate() {
        let at = path.index(j);
        let object = part.as_object().ok_or_else(|| invalid_type(&at, "an object", part))?;
        texts.push(read_part(&mut Fields::new(object, at), &at)?);
    }
    Ok(Some(texts.join("\n\n")))
}

fn read_part<'a>(part: &mut Fields<'a>, at: &Path<'_>) -> Result<&'a str, ApiError> {
    let refuse = |code, what: &str| {
        let message = format!("`{at}` is {what}, but this model reads text only.");
        Err(ApiError::at(code, at, message))
    };
    match part.required_string("type")? {
        "input_text" | "output_text" | "text" | "reasoning_text" => part.required_string("text"),
        "refusal" => part.required_string("refusal"),
        "input_image" => refuse(ErrorCode::ImageInputNotSupported, "an image"),
        "input_file" => refuse(ErrorCode::FileInputNotSupported, "a file"),
        "input_audio" => refuse(ErrorCode::AudioInputNotSupported, "audio"),
        other => {
            let at = at.key("type");
            let message =
                format!("`{at}` is {}, but must be input_text or output_text.", quoted(other));
            Err(invalid_value(&at, message))
        }
    }
}

/// Reasoning in a form that clients pass on without reading it.
#[must_use]
pub fn seal(reasoning: &str) -> String {
    let mut sealed = String::with_capacity(SEAL.len() + 2 * reasoning.len());
    sealed.push_str(SEAL);
    for byte in reasoning.bytes() {
        for digit in [byte >> 4, byte & 15] {
            sealed.push(char::from_digit(digit.into(), 16).expect("four bits are a digit"));
        }
    }
    sealed
}

fn unseal(sealed: &str) -> Option<String> {
    let digits = sealed.strip_prefix(SEAL)?.as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    let value = |digit: u8| char::from(digit).to_digit(16);
    let byte = |pair: &[u8; 2]| u8::try_from(value(pair[0])? * 16 + value(pair[1])?).ok();
    let bytes = rest.is_empty().then(|| pairs.iter().map(byte).collect::<Option<Vec<u8>>>())??;
    String::from_utf8(bytes).ok()
}

/// Adds a text to what was said before it.
fn append(said: &mut Option<String>, text: &str) {
    match said {
        Some(said) => {
            said.push_str("\n\n");
            said.push_str(text);
        }
        None => *said = Some(text.to_owned()),
    }
}
