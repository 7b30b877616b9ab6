//! The release's own interface: message lists as its bundled encoder takes them.
//!
//! Used for the goldens, for training data, and wherever a prompt must be the encoder's byte for
//! byte: system messages stay where they stand, a trailing assistant message opens nothing, and
//! developer is a role of its own.
//!
//! Not here: what the hosted API makes of a request (the module root).

use serde_json::Value;

use super::EncodeError;
use super::history::{CallOrder, Turn, merge};
use super::prompt::Prompt;
use super::render::{Openers, Renderer};
use super::thinking::{ThinkingRules, drop_finished, last_asked};
use crate::conversation::{
    Arguments, Content, Effort, EffortProfile, Message, Part, ResponseFormat, Role, ThinkingMode,
    ToolCall,
};
use crate::special::{Special, Task};

/// The keyword arguments of the release's `encode_messages`, with its defaults.
#[derive(Debug, Clone)]
pub struct ReleaseOptions {
    /// Chat or thinking.
    pub mode: ThinkingMode,
    /// Messages whose encoding came earlier: only the new ones are rendered, without a beginning
    /// of sentence.
    pub context: Vec<Message>,
    /// Whether reasoning of finished turns is dropped (never when a message has tools).
    pub drop_thinking: bool,
    /// Whether the prompt begins with the beginning of sentence.
    pub add_bos: bool,
    /// How much reasoning to ask for; `None` is the profile's default.
    pub effort: Option<Effort>,
    /// Which encoder of the release.
    pub profile: EffortProfile,
}

impl ReleaseOptions {
    /// The defaults for a mode.
    pub fn new(mode: ThinkingMode) -> Self {
        Self {
            mode,
            context: Vec::new(),
            drop_thinking: true,
            add_bos: true,
            effort: None,
            profile: EffortProfile::Preview,
        }
    }
}

/// Renders `messages` as the release's `encode_messages` does.
///
/// # Errors
/// [`EncodeError`] where the release's encoder raises.
pub fn encode_messages(
    messages: &[Message],
    options: &ReleaseOptions,
) -> Result<Prompt, EncodeError> {
    let effort_prompt = effort_prompt(options)?;
    // The new messages are merged on their own, but their tool results follow the order of calls
    // that may lie in the context.
    let mut turns = merge(messages);
    let mut order = CallOrder::default();
    for message in options.context.iter().filter(|message| message.role == Role::Assistant) {
        order.observe(&message.tool_calls);
    }
    order.sort(&mut turns);
    let mut context = merge(&options.context);
    CallOrder::default().sort(&mut context);

    let mut prompt = Prompt::default();
    if options.add_bos && context.is_empty() {
        prompt.push_control(Special::Bos);
    }
    let has_tools = context.iter().chain(&turns).any(Turn::has_tools);
    let drop = options.drop_thinking && !has_tools;
    let mut first = context.len();
    let mut all: Vec<Turn> = context.iter().cloned().chain(turns).collect();
    if drop && options.mode == ThinkingMode::Thinking {
        all = drop_finished(all);
        first = drop_finished(context).len();
    }
    if first == 0 && !all.is_empty() {
        prompt.push_text(effort_prompt);
    }
    let rules = ThinkingRules::new(options.mode, drop, last_asked(&all));
    Renderer { turns: &all, rules, openers: Openers::AfterUser }.render(first, &mut prompt)?;
    Ok(prompt)
}

fn effort_prompt(options: &ReleaseOptions) -> Result<&'static str, EncodeError> {
    let effort = match (options.profile, options.effort) {
        (EffortProfile::Preview, Some(Effort::Low)) => {
            return Err(EncodeError::EffortNotInProfile { effort: Effort::Low });
        }
        (EffortProfile::Preview, None) => Effort::High,
        (EffortProfile::Official0731, None) => Effort::Low,
        (_, Some(effort)) => effort,
    };
    Ok(match options.mode {
        ThinkingMode::Chat => "",
        ThinkingMode::Thinking => options.profile.prompt(effort),
    })
}

/// Reads one message of the release's JSON form.
///
/// Tool-call arguments may be JSON text or an object. Fields that the encoder does not read are
/// ignored.
///
/// # Errors
/// [`EncodeError`] for an unknown role or task and for fields of the wrong type.
pub fn message_from_json(json: &Value) -> Result<Message, EncodeError> {
    let wrong = |field: &'static str| EncodeError::MalformedMessage { field };
    let role = json.get("role").and_then(Value::as_str).ok_or(wrong("role"))?;
    let role =
        Role::from_name(role).ok_or_else(|| EncodeError::UnknownRole { role: role.to_owned() })?;
    let mut message = Message::new(role, content_from_json(json.get("content"))?);
    message.reasoning = json.get("reasoning_content").and_then(Value::as_str).map(str::to_owned);
    message.tool_call_id = json.get("tool_call_id").and_then(Value::as_str).map(str::to_owned);
    message.wo_eos = json.get("wo_eos").and_then(Value::as_bool).unwrap_or(false);
    if let Some(task) = json.get("task").filter(|task| !task.is_null()) {
        let name = task.as_str().ok_or(wrong("task"))?;
        let unknown = || EncodeError::UnknownTask { task: name.to_owned() };
        message.task = Some(Task::from_name(name).ok_or_else(unknown)?);
    }
    for tool in list(json, "tools")? {
        message.tools.push(tool.get("function").ok_or(wrong("tools[].function"))?.clone());
    }
    for call in list(json, "tool_calls")? {
        message.tool_calls.push(call_from_json(call).ok_or(wrong("tool_calls[].function"))?);
    }
    message.response_format = match json.get("response_format") {
        Some(schema) if is_true(schema) => ResponseFormat::JsonSchema(schema.clone()),
        _ => ResponseFormat::Text,
    };
    Ok(message)
}

/// Whether Python takes a value for true: what it does not is not rendered.
fn is_true(json: &Value) -> bool {
    match json {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
    }
}

fn list<'a>(json: &'a Value, field: &'static str) -> Result<&'a [Value], EncodeError> {
    match json.get(field) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(EncodeError::MalformedMessage { field }),
    }
}

fn content_from_json(json: Option<&Value>) -> Result<Content, EncodeError> {
    match json {
        None | Some(Value::Null) => Ok(Content::Absent),
        Some(Value::String(text)) => Ok(Content::Text(text.clone())),
        Some(Value::Array(parts)) => {
            let part = |part: &Value| match part.get("type").and_then(Value::as_str) {
                Some("text") => {
                    let text = part.get("text").and_then(Value::as_str).unwrap_or_default();
                    Part::Text(text.to_owned())
                }
                // Python prints an absent type as its None.
                kind => Part::Unsupported(kind.unwrap_or("None").to_owned()),
            };
            Ok(Content::Parts(parts.iter().map(part).collect()))
        }
        Some(_) => Err(EncodeError::MalformedMessage { field: "content" }),
    }
}

fn call_from_json(json: &Value) -> Option<ToolCall> {
    let function = json.get("function")?;
    let id = [json.get("id"), function.get("id")]
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .find(|id| !id.is_empty());
    let arguments = match function.get("arguments")? {
        Value::String(text) => Arguments::Text(text.clone()),
        Value::Object(object) => Arguments::Object(object.clone()),
        _ => return None,
    };
    Some(ToolCall {
        id: id.unwrap_or_default().to_owned(),
        name: function.get("name")?.as_str()?.to_owned(),
        arguments,
    })
}
