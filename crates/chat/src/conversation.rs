//! A conversation as the chat layer understands it: what a server lowers an API request into.
//!
//! [`Conversation`] says what a request means (messages, tools, thinking, answer format);
//! [`Message`] is shared with the release's own message lists (`encode::release`), whose extra
//! fields an API request leaves at their defaults.
//!
//! Not here: JSON field names, validation with parameter paths (the server's), and rendering
//! (`encode`).

use serde_json::Value;

use crate::special::Task;

/// Everything that determines a prompt.
///
/// `Conversation::default()` is an empty thinking-mode conversation at effort high.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The messages in order. System and developer messages are collected at the front of the
    /// prompt, wherever they stand.
    pub messages: Vec<Message>,
    /// The client's `function` objects, rendered as they came.
    pub tools: Vec<Value>,
    /// What form the answer should have.
    pub response_format: ResponseFormat,
    /// Whether the answer begins with reasoning.
    pub thinking: ThinkingMode,
    /// How much reasoning to ask for; without effect in chat mode.
    pub effort: Effort,
    /// Which prompts the checkpoint was trained with.
    pub profile: EffortProfile,
    /// Whether reasoning of earlier turns is left out. Without effect when tools are given: then
    /// it is always kept, as the model was trained.
    pub drop_thinking: bool,
    /// Whether the last message, from the assistant, is continued (`prefix: true`) instead of
    /// closed. Its content is followed by generated text directly.
    pub continue_final: bool,
    /// Whether the prompt itself opens a tool-call block, which forces a call. Chat mode only.
    pub open_tool_block: bool,
}

impl Default for Conversation {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            tools: Vec::new(),
            response_format: ResponseFormat::Text,
            thinking: ThinkingMode::Thinking,
            effort: Effort::High,
            profile: EffortProfile::Preview,
            drop_thinking: true,
            continue_final: false,
            open_tool_block: false,
        }
    }
}

/// Who a message is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions; the API treats it as `System`, the release's encoder as a kind of user.
    Developer,
    /// The person asking.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
    /// A note about the present (date, place), placed before the user message it belongs to.
    LatestReminder,
}

impl Role {
    /// The value of a message's `role` field.
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::LatestReminder => "latest_reminder",
        }
    }

    /// The role with this name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            Self::System,
            Self::Developer,
            Self::User,
            Self::Assistant,
            Self::Tool,
            Self::LatestReminder,
        ]
        .into_iter()
        .find(|role| role.name() == name)
    }
}

/// One message. [`Message::new`] fills the fields that its role does not use.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who it is from.
    pub role: Role,
    /// What it says.
    pub content: Content,
    /// An assistant's reasoning. `None` and `""` differ only on a message that is continued.
    pub reasoning: Option<String>,
    /// An assistant's tool calls.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool message answers.
    pub tool_call_id: Option<String>,
    /// The side task that follows this message.
    pub task: Option<Task>,
    /// Function objects listed after this message's content (release message lists; system and
    /// developer only).
    pub tools: Vec<Value>,
    /// Answer format stated after this message's content (as `tools`).
    pub response_format: ResponseFormat,
    /// Leaves out the end-of-sentence token after an assistant message (release message lists;
    /// an API request says [`Conversation::continue_final`]).
    pub wo_eos: bool,
}

impl Message {
    /// A message with content and nothing else.
    pub fn new(role: Role, content: impl Into<Content>) -> Self {
        Self {
            role,
            content: content.into(),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            task: None,
            tools: Vec::new(),
            response_format: ResponseFormat::Text,
            wo_eos: false,
        }
    }

    /// A system message.
    pub fn system(content: impl Into<Content>) -> Self {
        Self::new(Role::System, content)
    }

    /// A user message.
    pub fn user(content: impl Into<Content>) -> Self {
        Self::new(Role::User, content)
    }

    /// An assistant message without reasoning or calls.
    pub fn assistant(content: impl Into<Content>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// The result of the call `tool_call_id`.
    pub fn tool(tool_call_id: impl Into<String>, content: impl Into<Content>) -> Self {
        Self { tool_call_id: Some(tool_call_id.into()), ..Self::new(Role::Tool, content) }
    }

    /// The message with this reasoning.
    #[must_use]
    pub fn with_reasoning(self, reasoning: impl Into<String>) -> Self {
        Self { reasoning: Some(reasoning.into()), ..self }
    }

    /// The message with these tool calls.
    #[must_use]
    pub fn with_tool_calls(self, tool_calls: Vec<ToolCall>) -> Self {
        Self { tool_calls, ..self }
    }
}

/// A message's content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Content {
    /// `null` or no field: nothing.
    #[default]
    Absent,
    /// A string.
    Text(String),
    /// An array of parts, joined by a blank line.
    Parts(Vec<Part>),
}

impl Content {
    /// The content as one text.
    pub fn to_text(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::Absent => "".into(),
            Self::Text(text) => text.as_str().into(),
            Self::Parts(parts) => {
                let texts: Vec<String> = parts.iter().map(Part::to_text).collect();
                texts.join(crate::encode::strings::SECTION_SEPARATOR).into()
            }
        }
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.to_text().is_empty()
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// One part of a content array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// Anything else, by its `type`; rendered as a note that it is not supported.
    Unsupported(String),
}

impl Part {
    fn to_text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Unsupported(kind) => {
                crate::encode::strings::UNSUPPORTED_BLOCK.replace("{type}", kind)
            }
        }
    }
}

/// A call the model made in an earlier turn.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Which tool messages answer it; empty if unknown.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Its arguments.
    pub arguments: Arguments,
}

impl ToolCall {
    /// A call whose arguments are JSON text.
    pub fn new(
        id: impl Into<String>,
        name: impl Into<String>,
        arguments: impl Into<String>,
    ) -> Self {
        Self { id: id.into(), name: name.into(), arguments: Arguments::Text(arguments.into()) }
    }
}

/// The arguments of a call, in either form clients send.
#[derive(Debug, Clone, PartialEq)]
pub enum Arguments {
    /// JSON text, as the API says. Text that is no JSON object becomes one parameter `arguments`.
    Text(String),
    /// An object that the client had parsed already.
    Object(serde_json::Map<String, Value>),
}

/// What form the answer should have.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ResponseFormat {
    /// Free text; nothing is said about it.
    #[default]
    Text,
    /// Some JSON object.
    JsonObject,
    /// JSON that follows this schema. (In release message lists: whatever `response_format` held.)
    JsonSchema(Value),
}

/// Whether the model reasons before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThinkingMode {
    /// The answer comes at once.
    Chat,
    /// Reasoning comes first.
    Thinking,
}

impl ThinkingMode {
    /// The mode with the encoder's name for it: `chat` or `thinking`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "chat" => Some(Self::Chat),
            "thinking" => Some(Self::Thinking),
            _ => None,
        }
    }
}

/// How much reasoning to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effort {
    /// Little.
    Low,
    /// The usual.
    High,
    /// As much as possible.
    Max,
}

impl Effort {
    /// The effort that an API value stands for, by the hosted API's present table. `none` is not
    /// an effort but a mode, and not in the table.
    pub fn from_api(value: &str) -> Option<Self> {
        match value {
            "minimal" | "low" => Some(Self::Low),
            "medium" | "high" | "xhigh" => Some(Self::High),
            "max" | "ultra" => Some(Self::Max),
            _ => None,
        }
    }
}

/// Which effort prompts a checkpoint was trained with. The architecture is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EffortProfile {
    /// The first V4 release: only `max` says something.
    Preview,
    /// Flash-0731 and later: `high` says what the preview said for `max`, and `max` more.
    Official0731,
}

impl EffortProfile {
    /// Reads the profile off the text of a checkpoint's bundled encoder, by the name of the table
    /// it defines. `None` if it defines neither.
    pub fn detect(encoder_source: &str) -> Option<Self> {
        if encoder_source.contains("REASONING_EFFORT_PROMPTS") {
            Some(Self::Official0731)
        } else if encoder_source.contains("REASONING_EFFORT_MAX") {
            Some(Self::Preview)
        } else {
            None
        }
    }

    /// The profile with this configuration name: `preview` or `official_0731`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "preview" => Some(Self::Preview),
            "official_0731" => Some(Self::Official0731),
            _ => None,
        }
    }

    /// The text put before everything else in thinking mode; empty if there is none.
    pub const fn prompt(self, effort: Effort) -> &'static str {
        use crate::encode::strings::{EFFORT_ABSOLUTE_MAXIMUM, EFFORT_BEYOND_MAXIMUM};
        match (self, effort) {
            (Self::Preview, Effort::Low | Effort::High) | (Self::Official0731, Effort::Low) => "",
            (Self::Preview, Effort::Max) | (Self::Official0731, Effort::High) => {
                EFFORT_ABSOLUTE_MAXIMUM
            }
            (Self::Official0731, Effort::Max) => EFFORT_BEYOND_MAXIMUM,
        }
    }
}
