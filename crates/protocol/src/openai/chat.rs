//! The chat request: every field read, in the contract's order of checks.
//!
//! The order is: required fields, types, ranges, rules across fields, messages, tools and schemas.
//! The first failure is the one reported, so that a request with two mistakes gets the same answer
//! from every implementation of the contract.
//!
//! Not here: `model` ([`super::model_name`]), which is resolved before any of this, and everything
//! that depends on the served model beyond [`Rules`].

use serde_json::Value;

use super::message::{Message, mentions_json, read_messages};
use super::sampling::{RawSampling, Sampling};
use super::structured::read_structured;
use super::thinking::{RawThinking, Thinking};
use super::tools::{
    ResponseFormat, Tool, ToolChoice, check_format_type, check_tool_count, read_format,
    read_tool_choice, read_tools,
};
use super::{Rules, check_unknown};
use crate::dialect::Dialect;
use crate::error::{ApiError, ErrorCode};
use crate::fields::{Fields, Path, at_most_items, integer_in};
use crate::json::Object;

/// A checked chat request.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// What its fields were called.
    pub dialect: Dialect,
    /// The model as the client named it.
    pub model: String,
    /// At least one message.
    pub messages: Vec<Message>,
    /// Sampling, stopping, and cache isolation.
    pub sampling: Sampling,
    /// Thinking mode, effort and budget.
    pub thinking: Thinking,
    /// Functions the model may call.
    pub tools: Vec<Tool>,
    /// Which of them it may or must call.
    pub tool_choice: ToolChoice,
    /// Whether one message may hold several calls.
    pub parallel_tool_calls: bool,
    /// What form the answer must have.
    pub response_format: ResponseFormat,
    /// `Some(k)`: report log-probabilities, and those of the `k` most likely tokens.
    pub logprobs: Option<u32>,
    /// Answer as a stream of events.
    pub stream: bool,
    /// Where a stream says what was used.
    pub usage: UsageInStream,
    /// Places of the fields that were ignored.
    pub unknown: Vec<String>,
}

/// Where a stream says what was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UsageInStream {
    /// Nowhere.
    #[default]
    None,
    /// In a chunk of its own after the last.
    AtEnd,
    /// In every chunk, what was used so far, and at the end.
    Always,
}

/// OpenAI fields that would change the meaning of the answer, and what to use instead.
const REFUSED: [(&str, &str); 4] = [
    ("functions", "use `tools`"),
    ("function_call", "use `tool_choice`"),
    ("audio", "this server answers with text only"),
    ("web_search_options", "this server does not search the web"),
];

impl ChatRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// The first failed check, with its code and field as section 18 of the API lists them.
    pub fn read(body: &Object, rules: &Rules) -> Result<Self, ApiError> {
        let mut unknown = Vec::new();
        let mut fields = Fields::new(body, Path::Root);
        let model = fields.required_string("model")?.to_owned();
        fields.required("messages")?;
        refuse_unsupported(&mut fields)?;

        // Types.
        let messages = fields.array("messages")?.expect("the field was there");
        let sampling = RawSampling::read(&mut fields)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let stream_options = fields.object("stream_options")?;
        let usage = read_stream_options(stream_options, &mut unknown)?;
        let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
        let top_logprobs = fields.integer("top_logprobs")?;
        let tools = fields.array("tools")?.unwrap_or_default();
        let tool_choice = fields.get("tool_choice");
        let parallel_tool_calls = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let format = fields.object("response_format")?;
        let structured = fields.object("structured_outputs")?;
        let thinking_fields = RawThinking::read(&mut fields, &mut unknown)?;
        fields.report_unknown(&mut unknown);

        // Ranges.
        check_message_count(messages, rules)?;
        let sampling = sampling.check(rules)?;
        let top_logprobs = top_logprobs
            .map(|k| integer_in::<u32>(&Path::Root.key("top_logprobs"), k, 0, 20))
            .transpose()?
            .unwrap_or(0);
        check_tool_count(tools, rules)?;
        check_format_type(format)?;
        let thinking = thinking_fields.check()?;

        // Rules across fields.
        if top_logprobs > 0 && !logprobs {
            return Err(conflict("top_logprobs", "`top_logprobs` requires `logprobs: true`."));
        }
        if stream_options.is_some() && !stream {
            return Err(conflict("stream_options", "`stream_options` requires `stream: true`."));
        }
        thinking_fields.agree(&thinking)?;
        let has_format = format.and_then(|format| format.get("type")).is_some_and(|k| k != "text");
        if structured.is_some() && has_format {
            let text = "`structured_outputs` cannot be combined with `response_format`.";
            return Err(conflict("structured_outputs", text));
        }

        let messages = read_messages(messages, rules, &mut unknown)?;

        // Tools and schemas.
        let tools = read_tools(tools, rules)?;
        let tool_choice = read_tool_choice(tool_choice, &tools)?;
        let response_format = match structured {
            Some(object) => {
                ResponseFormat::Structured(read_structured(object, rules, &mut unknown)?)
            }
            None => read_format(format, rules)?,
        };
        let needs_keyword =
            response_format == ResponseFormat::JsonObject && rules.require_json_keyword;
        if needs_keyword && !mentions_json(&messages) {
            let text =
                "`messages` must contain the word json when `response_format.type` is json_object.";
            return Err(ApiError::at(ErrorCode::JsonKeywordMissing, "messages", text));
        }
        check_unknown(&unknown, rules)?;

        let request = Self {
            dialect: Dialect::Chat,
            model,
            messages,
            sampling,
            thinking,
            tools,
            tool_choice,
            parallel_tool_calls,
            response_format,
            logprobs: logprobs.then_some(top_logprobs),
            stream,
            usage,
            unknown,
        };
        request.check_structured()?;
        request.check_prefix()?;
        Ok(request)
    }

    /// Whether generation continues the last message.
    #[must_use]
    pub fn is_prefix(&self) -> bool {
        self.messages.last().is_some_and(|message| message.prefix)
    }

    /// The field that says what the answer must be, if it is not to be any text.
    fn format_field(&self) -> Option<&'static str> {
        match self.response_format {
            ResponseFormat::Text => None,
            ResponseFormat::Structured(_) => Some("structured_outputs"),
            ResponseFormat::JsonObject | ResponseFormat::JsonSchema { .. } => {
                Some(self.dialect.format())
            }
        }
    }

    /// Whether the answer must be a call.
    fn forces_a_call(&self) -> bool {
        matches!(
            self.tool_choice,
            ToolChoice::Required
                | ToolChoice::Named(_)
                | ToolChoice::Allowed { required: true, .. }
        )
    }

    /// Checks that what the answer must be and what it may be agree.
    fn check_structured(&self) -> Result<(), ApiError> {
        if self.forces_a_call() && matches!(self.response_format, ResponseFormat::Structured(_)) {
            let text = "`structured_outputs` cannot be combined with a forced `tool_choice`.";
            return Err(conflict("structured_outputs", text));
        }
        Ok(())
    }

    pub(crate) fn check_prefix(&self) -> Result<(), ApiError> {
        if !self.is_prefix() {
            return Ok(());
        }
        let prefix = self.dialect.prefix();
        if let Some(field) = self.format_field() {
            let text = format!("`{field}` cannot be combined with {prefix}.");
            return Err(conflict(field, &text));
        }
        if self.forces_a_call() {
            let text = format!("A forced `tool_choice` cannot be combined with {prefix}.");
            return Err(conflict("tool_choice", &text));
        }
        Ok(())
    }
}

fn conflict(param: &str, message: &str) -> ApiError {
    ApiError::at(ErrorCode::ConflictingParameters, param, message)
}

pub(crate) fn check_message_count(messages: &[Value], rules: &Rules) -> Result<(), ApiError> {
    let path = Path::Root.key("messages");
    if messages.is_empty() {
        let text = "`messages` must hold at least one message.";
        return Err(ApiError::at(ErrorCode::EmptyArray, path, text));
    }
    at_most_items(&path, messages.len(), rules.max_messages)
}

fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    for (name, instead) in REFUSED {
        if fields.get(name).is_some() {
            let message = format!("`{name}` is not supported: {instead}.");
            return Err(ApiError::at(ErrorCode::UnsupportedParameter, name, message));
        }
    }
    let modalities = fields.array("modalities")?.unwrap_or_default();
    if modalities.iter().any(|one| one != "text") {
        let message = "`modalities` may hold only text: this server answers with text only.";
        return Err(ApiError::at(ErrorCode::UnsupportedParameter, "modalities", message));
    }
    Ok(())
}

/// Reads what a stream is to say about its usage.
pub(crate) fn read_stream_options(
    object: Option<&Object>,
    unknown: &mut Vec<String>,
) -> Result<UsageInStream, ApiError> {
    let Some(object) = object else { return Ok(UsageInStream::None) };
    let mut options = Fields::new(object, Path::Root.key("stream_options"));
    let at_end = options.boolean("include_usage")?.unwrap_or(false);
    let always = options.boolean("continuous_usage_stats")?.unwrap_or(false);
    options.report_unknown(unknown);
    Ok(match (at_end, always) {
        (false, _) => UsageInStream::None,
        (true, false) => UsageInStream::AtEnd,
        (true, true) => UsageInStream::Always,
    })
}
