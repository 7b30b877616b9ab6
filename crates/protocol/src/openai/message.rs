//! Chat messages: roles, content parts, tool history, and the order in which they may come.
//!
//! What holds for every list returned by [`read_messages`]: text parts are joined by two newlines
//! (what the hosted encoding does for every role); a `tool` message answers a call of the nearest
//! preceding `assistant` message with calls; only a last `assistant` message carries `prefix`.
//!
//! Not here: what the messages render as (`chat`), and what becomes of old reasoning.

use serde_json::Value;

use super::{Rules, TrailingAssistant};
use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value, missing};
use crate::json::Object;

/// Who speaks. `developer` is read as [`Role::System`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is its name on the wire")]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
    /// A note about the present; only where the encoding's own roles are accepted.
    LatestReminder,
}

/// The quick tasks that a message may name, where the encoding's own fields are accepted.
const TASKS: [&str; 6] = ["action", "query", "authority", "domain", "title", "read_url"];

/// One message of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text; `None` only for an assistant message with calls or reasoning.
    pub content: Option<String>,
    /// Reasoning of an assistant message, as the client sent it back.
    pub reasoning: Option<String>,
    /// Calls of an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool message answers.
    pub tool_call_id: Option<String>,
    /// Whether generation continues this message; only on a last assistant message.
    pub prefix: bool,
    /// The quick task that follows the message; one of the encoding's six.
    pub task: Option<String>,
}

impl Message {
    /// A message that is nothing but text.
    pub(crate) const fn text(role: Role, content: String) -> Self {
        Self {
            role,
            content: Some(content),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            prefix: false,
            task: None,
        }
    }
}

/// A call the assistant made earlier.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Names the call; the tool message that answers it repeats this.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments.
    pub arguments: Arguments,
}

/// A call's arguments, in either of the two forms that clients send.
#[derive(Debug, Clone, PartialEq)]
pub enum Arguments {
    /// A string, which usually but not always holds a JSON object.
    Text(String),
    /// An object that was parsed already.
    Object(Object),
}

/// Reads and checks `messages`.
///
/// # Errors
/// The first message at fault, as section 18 of the API lists them.
pub(crate) fn read_messages(
    items: &[Value],
    rules: &Rules,
    unknown: &mut Vec<String>,
) -> Result<Vec<Message>, ApiError> {
    let list = Path::Root.key("messages");
    let mut messages = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let object = item.as_object().ok_or_else(|| invalid_type(&path, "an object", item))?;
        let mut fields = Fields::new(object, path);
        messages.push(read_message(&mut fields, &path, rules, unknown)?);
        fields.report_unknown(unknown);
    }
    check_prefix(&messages, rules)?;
    if !rules.lenient_tool_history {
        check_tool_history(&messages)?;
    }
    Ok(messages)
}

fn read_message<'a>(
    fields: &mut Fields<'a>,
    path: &Path<'_>,
    rules: &Rules,
    unknown: &mut Vec<String>,
) -> Result<Message, ApiError> {
    // Accepted and ignored: a speaker's name does not reach the prompt.
    fields.get("name");
    let role = read_role(fields.required_string("role")?, &path.key("role"), rules)?;
    let content_path = path.key("content");
    let mut message = Message {
        role,
        content: read_content(fields.get("content"), &content_path)?,
        reasoning: None,
        tool_calls: Vec::new(),
        tool_call_id: None,
        prefix: fields.boolean("prefix")?.unwrap_or(false),
        task: if rules.extended_roles { read_task(fields, path)? } else { None },
    };
    if message.prefix && role != Role::Assistant {
        let at = path.key("prefix");
        return Err(invalid_value(&at, format!("`{at}` is allowed on an assistant message only.")));
    }
    match role {
        Role::Assistant => {
            let reasoning = fields.string("reasoning_content")?;
            message.reasoning = reasoning.or(fields.string("reasoning")?).map(str::to_owned);
            let calls = fields.array("tool_calls")?.unwrap_or_default();
            message.tool_calls = read_tool_calls(calls, &path.key("tool_calls"), unknown)?;
            if !message.tool_calls.is_empty() || message.reasoning.is_some() {
                return Ok(message);
            }
        }
        Role::Tool => message.tool_call_id = Some(fields.required_string("tool_call_id")?.into()),
        Role::System | Role::User | Role::LatestReminder => {}
    }
    if message.content.is_none() {
        return Err(missing(&content_path));
    }
    Ok(message)
}

fn read_task(fields: &mut Fields<'_>, path: &Path<'_>) -> Result<Option<String>, ApiError> {
    let Some(task) = fields.string("task")? else { return Ok(None) };
    if TASKS.contains(&task) {
        return Ok(Some(task.to_owned()));
    }
    let (at, task) = (path.key("task"), quoted(task));
    let accepted = TASKS.join(", ");
    Err(invalid_value(&at, format!("`{at}` is {task}, but must be one of {accepted}.")))
}

fn read_role(name: &str, path: &Path<'_>, rules: &Rules) -> Result<Role, ApiError> {
    match name {
        "system" => Ok(Role::System),
        "developer" if !rules.reject_developer_role => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" => Ok(Role::Tool),
        "latest_reminder" if rules.extended_roles => Ok(Role::LatestReminder),
        _ => {
            let developer = if rules.reject_developer_role { "" } else { ", developer" };
            let accepted = format!("system{developer}, user, assistant, tool");
            let message = format!("`{path}` is {}, but must be one of {accepted}.", quoted(name));
            Err(invalid_value(path, message))
        }
    }
}

/// The text of a `content`: a string, or text parts joined by two newlines.
pub(crate) fn read_content(
    content: Option<&Value>,
    path: &Path<'_>,
) -> Result<Option<String>, ApiError> {
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

/// The text of a part, which must not be anything but text.
pub(crate) fn read_part<'a>(part: &mut Fields<'a>, at: &Path<'_>) -> Result<&'a str, ApiError> {
    let refuse = |code, what: &str| {
        let message = format!("`{at}` is {what}, but this model reads text only.");
        Err(ApiError::at(code, at, message))
    };
    match part.required_string("type")? {
        "text" => part.required_string("text"),
        "image_url" | "input_image" | "image" => {
            refuse(ErrorCode::ImageInputNotSupported, "an image")
        }
        "file" | "input_file" | "document" => refuse(ErrorCode::FileInputNotSupported, "a file"),
        "input_audio" => refuse(ErrorCode::AudioInputNotSupported, "audio"),
        other => {
            let at = at.key("type");
            Err(invalid_value(&at, format!("`{at}` is {}, but must be text.", quoted(other))))
        }
    }
}

fn read_tool_calls(
    calls: &[Value],
    list: &Path<'_>,
    unknown: &mut Vec<String>,
) -> Result<Vec<ToolCall>, ApiError> {
    let mut read = Vec::with_capacity(calls.len());
    for (j, call) in calls.iter().enumerate() {
        let path = list.index(j);
        let object = call.as_object().ok_or_else(|| invalid_type(&path, "an object", call))?;
        let mut fields = Fields::new(object, path);
        // The position in a stream, which SDKs keep when they collect a message.
        fields.get("index");
        let id = fields.required_string("id")?.to_owned();
        if fields.string("type")?.is_some_and(|kind| kind != "function") {
            let at = path.key("type");
            return Err(invalid_value(&at, format!("`{at}` must be function.")));
        }
        fields.required("function")?;
        let object = fields.object("function")?.expect("the field was there");
        let function_path = path.key("function");
        let mut function = Fields::new(object, function_path);
        let name = function.required_string("name")?.to_owned();
        let arguments = match function.required("arguments")? {
            Value::String(text) => Arguments::Text(text.clone()),
            Value::Object(object) => Arguments::Object(object.clone()),
            other => {
                let at = function_path.key("arguments");
                return Err(invalid_type(&at, "a string", other));
            }
        };
        function.report_unknown(unknown);
        fields.report_unknown(unknown);
        read.push(ToolCall { id, name, arguments });
    }
    Ok(read)
}

fn check_prefix(messages: &[Message], rules: &Rules) -> Result<(), ApiError> {
    let list = Path::Root.key("messages");
    let last = messages.len().saturating_sub(1);
    for (i, message) in messages.iter().enumerate() {
        let item = list.index(i);
        if message.prefix && i != last {
            let at = item.key("prefix");
            return Err(invalid_value(&at, format!("`{at}` is allowed on the last message only.")));
        }
        let trailing = i == last && message.role == Role::Assistant && !message.prefix;
        if trailing && rules.trailing_assistant == TrailingAssistant::Reject {
            let message = "The last message must not be an assistant message without `prefix`.";
            return Err(ApiError::at(ErrorCode::InvalidMessageSequence, item, message));
        }
    }
    Ok(())
}

/// Every call is answered once, by tool messages that directly follow the calls.
fn check_tool_history(messages: &[Message]) -> Result<(), ApiError> {
    let list = Path::Root.key("messages");
    let broken = |i: usize, message: String| {
        Err(ApiError::at(ErrorCode::InvalidMessageSequence, list.index(i), message))
    };
    // Where the calls were made, and which of them still wait for their result.
    let mut open: Option<(usize, Vec<&str>)> = None;
    for (i, message) in messages.iter().enumerate() {
        if message.role == Role::Tool {
            let id = message.tool_call_id.as_deref().unwrap_or_default();
            let waiting = open.as_mut().map(|(_, waiting)| waiting);
            let answered = waiting.and_then(|waiting| {
                let found = waiting.iter().position(|call| *call == id)?;
                Some(waiting.remove(found))
            });
            if answered.is_none() {
                let id = quoted(id);
                return broken(
                    i,
                    format!(
                        "`messages[{i}]` answers the call {id}, but the preceding assistant message has no such unanswered call."
                    ),
                );
            }
            continue;
        }
        if matches!(message.role, Role::User | Role::Assistant) {
            if let Some((calls, id)) = first_waiting(open.as_ref()) {
                return broken(calls, unanswered(calls, id));
            }
            open = None;
        }
        if !message.tool_calls.is_empty() {
            open = Some((i, message.tool_calls.iter().map(|call| call.id.as_str()).collect()));
        }
    }
    match first_waiting(open.as_ref()) {
        Some((calls, id)) => broken(calls, unanswered(calls, id)),
        None => Ok(()),
    }
}

fn first_waiting<'a>(open: Option<&(usize, Vec<&'a str>)>) -> Option<(usize, &'a str)> {
    open.and_then(|(i, waiting)| waiting.first().map(|id| (*i, *id)))
}

fn unanswered(i: usize, id: &str) -> String {
    let id = quoted(id);
    format!("`messages[{i}]` makes the call {id}, but no tool message answers it.")
}

/// Whether "json", in any case, occurs where JSON mode requires it.
pub(crate) fn mentions_json(messages: &[Message]) -> bool {
    messages
        .iter()
        .filter(|message| matches!(message.role, Role::System | Role::User))
        .filter_map(|message| message.content.as_deref())
        .any(|text| text.as_bytes().windows(4).any(|word| word.eq_ignore_ascii_case(b"json")))
}
