//! The Responses request: every field read, in the contract's order of checks.
//!
//! The order is that of the chat request: required fields, types, ranges, rules across fields, items,
//! tools and schemas. Not here: items (`input`), tools and formats (`tools`).

use serde_json::{Value, json};

use super::input::read_input;
use super::tools::{FORM, read_format, read_tool_choice};
use crate::dialect::Dialect;
use crate::error::{ApiError, ErrorCode};
use crate::fields::{Fields, Path, at_most_items, integer_in, invalid_type};
use crate::flat_tools::read_tools;
use crate::json::Object;
use crate::openai::message::mentions_json;
use crate::openai::sampling::RawSampling;
use crate::openai::thinking::RawThinking;
use crate::openai::{
    ChatRequest, Message, ResponseFormat, Role, Rules, UsageInStream, check_unknown,
};

/// A checked Responses request.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponsesRequest {
    /// What it asks for, in the terms of the chat surface.
    pub chat: ChatRequest,
    /// What the response repeats.
    pub echo: Echo,
    /// Whether reasoning comes with a sealed copy, for clients that send only that back.
    pub seal_reasoning: bool,
}

/// Fields of the request that its response repeats, as the client wrote them or with their defaults.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[expect(missing_docs, reason = "each field is the request's field of this name")]
pub struct Echo {
    pub instructions: Value,
    pub max_output_tokens: Value,
    pub metadata: Value,
    pub parallel_tool_calls: bool,
    pub prompt_cache_key: Value,
    pub reasoning: Value,
    pub safety_identifier: Value,
    pub temperature: Value,
    pub text: Value,
    pub tool_choice: Value,
    pub tools: Value,
    pub top_logprobs: Value,
    pub top_p: Value,
    pub user: Value,
}

/// What needs a memory of earlier requests, or tools that run here.
const REFUSED: [(&str, &str); 5] = [
    (
        "previous_response_id",
        "this server keeps no responses: send the whole conversation as `input`",
    ),
    ("conversation", "this server keeps no conversations: send the whole of it as `input`"),
    ("prompt", "this server keeps no prompts: send `instructions` and `input`"),
    ("audio", "this server answers with text only"),
    ("functions", "use `tools`"),
];

/// Fields that change nothing here: a caching hint, bookkeeping, or what this server does anyway.
const IGNORED: [&str; 6] =
    ["store", "truncation", "service_tier", "stream_options", "max_tool_calls", "client_metadata"];

impl ResponsesRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// The first failed check, with its code and field.
    pub fn read(body: &Object, rules: &Rules) -> Result<Self, ApiError> {
        let mut unknown = Vec::new();
        let mut fields = Fields::new(body, Path::Root);
        let model = fields.required_string("model")?.to_owned();
        fields.required("input")?;
        refuse_unsupported(&mut fields)?;

        // Types.
        let input_path = Path::Root.key("input");
        let input = match fields.required("input")? {
            input @ (Value::String(_) | Value::Array(_)) => input,
            other => return Err(invalid_type(&input_path, "a string or an array of items", other)),
        };
        let instructions = fields.string("instructions")?;
        let limit = fields.integer("max_output_tokens")?;
        let sampling = RawSampling::read(&mut fields)?.limited_by("max_output_tokens", limit);
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include = read_include(&mut fields)?;
        let top_logprobs = fields.integer("top_logprobs")?;
        let tools = fields.array("tools")?.unwrap_or_default();
        let tool_choice = fields.get("tool_choice");
        let parallel_tool_calls = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let format = read_text(&mut fields, &mut unknown)?;
        let thinking_fields = RawThinking::read(&mut fields, &mut unknown)?;
        let echo = Echo::new(&mut fields, parallel_tool_calls);
        for name in IGNORED {
            fields.get(name);
        }
        fields.report_unknown(&mut unknown);

        // Ranges.
        if let Value::Array(items) = input {
            if items.is_empty() {
                let text = "`input` must hold at least one item.";
                return Err(ApiError::at(ErrorCode::EmptyArray, input_path, text));
            }
            at_most_items(&input_path, items.len(), rules.max_messages)?;
        }
        // This surface has one answer; `n` is no field of it.
        let sampling = crate::openai::Sampling { n: 1, ..sampling.check(rules)? };
        let top_logprobs = top_logprobs
            .map(|k| integer_in::<u32>(&Path::Root.key("top_logprobs"), k, 0, 20))
            .transpose()?;
        at_most_items(&Path::Root.key("tools"), tools.len(), rules.max_tools)?;
        let thinking = thinking_fields.check()?;

        // Rules across fields.
        thinking_fields.agree(&thinking)?;

        let mut messages = read_input(input, rules, &mut unknown)?;
        if let Some(instructions) = instructions {
            messages.insert(0, Message::text(Role::System, instructions.to_owned()));
        }

        // Tools and schemas.
        let tools = read_tools(tools, &FORM, rules)?;
        let tool_choice = read_tool_choice(tool_choice, &tools)?;
        let response_format = read_format(format, rules)?;
        let needs_keyword =
            response_format == ResponseFormat::JsonObject && rules.require_json_keyword;
        if needs_keyword && !mentions_json(&messages) {
            let text = "`input` must contain the word json when `text.format.type` is json_object.";
            return Err(ApiError::at(ErrorCode::JsonKeywordMissing, "input", text));
        }
        check_unknown(&unknown, rules)?;

        let logprobs = include.logprobs || top_logprobs.is_some_and(|k| k > 0);
        let chat = ChatRequest {
            dialect: Dialect::Responses,
            model,
            messages,
            sampling,
            thinking,
            tools,
            tool_choice,
            parallel_tool_calls,
            response_format,
            logprobs: logprobs.then_some(top_logprobs.unwrap_or(0)),
            stream,
            usage: UsageInStream::None,
            unknown,
        };
        Ok(Self { chat, echo, seal_reasoning: include.sealed_reasoning })
    }
}

impl Echo {
    fn new(fields: &mut Fields<'_>, parallel_tool_calls: bool) -> Self {
        let mut sent = |name| fields.get(name).cloned();
        let mut or_null = |name| sent(name).unwrap_or(Value::Null);
        Self {
            instructions: or_null("instructions"),
            max_output_tokens: or_null("max_output_tokens"),
            parallel_tool_calls,
            prompt_cache_key: or_null("prompt_cache_key"),
            safety_identifier: or_null("safety_identifier"),
            user: or_null("user"),
            temperature: sent_or(&mut sent, "temperature", || json!(1.0)),
            top_p: sent_or(&mut sent, "top_p", || json!(1.0)),
            top_logprobs: sent_or(&mut sent, "top_logprobs", || json!(0)),
            metadata: sent_or(&mut sent, "metadata", || json!({})),
            reasoning: sent_or(&mut sent, "reasoning", || json!({"effort": null, "summary": null})),
            text: sent_or(&mut sent, "text", || json!({"format": {"type": "text"}})),
            tool_choice: sent_or(&mut sent, "tool_choice", || json!("auto")),
            tools: sent_or(&mut sent, "tools", || json!([])),
        }
    }
}

fn sent_or(
    sent: &mut impl FnMut(&'static str) -> Option<Value>,
    name: &'static str,
    default: impl FnOnce() -> Value,
) -> Value {
    sent(name).unwrap_or_else(default)
}

fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    for (name, instead) in REFUSED {
        if fields.get(name).is_some() {
            let message = format!("`{name}` is not supported: {instead}.");
            return Err(ApiError::at(ErrorCode::UnsupportedParameter, name, message));
        }
    }
    if fields.boolean("background")?.unwrap_or(false) {
        let message = "`background` must be false: this server keeps no responses.";
        return Err(ApiError::at(ErrorCode::UnsupportedParameter, "background", message));
    }
    Ok(())
}

/// What a response may hold besides its text.
struct Include {
    sealed_reasoning: bool,
    logprobs: bool,
}

fn read_include(fields: &mut Fields<'_>) -> Result<Include, ApiError> {
    let list = Path::Root.key("include");
    let mut include = Include { sealed_reasoning: false, logprobs: false };
    for (i, item) in fields.array("include")?.unwrap_or_default().iter().enumerate() {
        let name = item.as_str().ok_or_else(|| invalid_type(&list.index(i), "a string", item))?;
        // The others are about tools that run on the hosted API's servers.
        include.sealed_reasoning |= name == "reasoning.encrypted_content";
        include.logprobs |= name == "message.output_text.logprobs";
    }
    Ok(include)
}

/// `text.format`, its contents unread.
fn read_text<'a>(
    fields: &mut Fields<'a>,
    unknown: &mut Vec<String>,
) -> Result<Option<&'a Object>, ApiError> {
    let Some(object) = fields.object("text")? else { return Ok(None) };
    let mut text = Fields::new(object, Path::Root.key("text"));
    // A wish for short or long answers, which this model was not trained on.
    text.get("verbosity");
    let format = text.object("format")?;
    text.report_unknown(unknown);
    Ok(format)
}
