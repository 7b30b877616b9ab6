//! The Messages request: every field read, in the contract's order of checks.
//!
//! The order is that of the chat request: required fields, types, ranges, messages, tools and
//! schemas. Not here: blocks of content (`message`), tools (`tools`).

use serde_json::Value;

use super::message::read_messages;
use super::tools::{FORM, read_tool_choice};
use crate::dialect::Dialect;
use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{
    Fields, Path, at_most_items, integer_in, invalid_type, invalid_value, number_in,
};
use crate::flat_tools::read_tools;
use crate::json::Object;
use crate::openai::chat::check_message_count;
use crate::openai::message::read_content;
use crate::openai::sampling::{check_cache_key, check_max_tokens, check_stop, check_top_k};
use crate::openai::tools::check_schema;
use crate::openai::{
    ChatRequest, Effort, Message, ResponseFormat, Role, Rules, Sampling, Thinking, UsageInStream,
    check_unknown,
};

/// What a body is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// An answer, which needs `max_tokens`.
    Generate,
    /// The number of its prompt tokens.
    Count,
}

/// A checked Messages request.
#[derive(Debug, Clone, PartialEq)]
pub struct MessagesRequest {
    /// What it asks for, in the terms of the chat surface.
    pub chat: ChatRequest,
    /// Show that there was reasoning, but not its text.
    pub omit_thinking: bool,
}

/// Schemas carry a name on the chat surface, and none here.
const SCHEMA_NAME: &str = "output";

impl MessagesRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// The first failed check, with its code and field.
    pub fn read(body: &Object, rules: &Rules, purpose: Purpose) -> Result<Self, ApiError> {
        let mut unknown = Vec::new();
        let mut fields = Fields::new(body, Path::Root);
        let model = fields.required_string("model")?.to_owned();
        if purpose == Purpose::Generate {
            fields.required("max_tokens")?;
        }
        fields.required("messages")?;
        if fields.get("output_format").is_some() {
            let message = "`output_format` is not supported: use `output_config.format`.";
            return Err(ApiError::at(ErrorCode::UnsupportedParameter, "output_format", message));
        }

        // Types.
        let messages = fields.array("messages")?.expect("the field was there");
        let sampling = RawSampling::read(&mut fields, &mut unknown)?;
        let system = read_content(fields.get("system"), &Path::Root.key("system"))?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let tools = fields.array("tools")?.unwrap_or_default();
        let tool_choice = fields.object("tool_choice")?;
        let thinking = RawThinking::read(&mut fields, &mut unknown)?;
        let output = RawOutput::read(&mut fields, &mut unknown)?;
        fields.report_unknown(&mut unknown);

        // Ranges.
        check_message_count(messages, rules)?;
        let sampling = sampling.check(rules, purpose)?;
        at_most_items(&Path::Root.key("tools"), tools.len(), rules.max_tools)?;
        let omit_thinking = thinking.display == Some("omitted");
        let thinking = Thinking { effort: output.check_effort()?, ..thinking.check()? };

        let mut messages = read_messages(messages, rules, &mut unknown)?;
        if let Some(system) = system {
            messages.insert(0, Message::text(Role::System, system));
        }

        // Tools and schemas.
        let tools = read_tools(tools, &FORM, rules)?;
        let (tool_choice, parallel_tool_calls) = read_tool_choice(tool_choice, &tools)?;
        let response_format = output.read_format(rules)?;
        check_unknown(&unknown, rules)?;

        let chat = ChatRequest {
            dialect: Dialect::Messages,
            model,
            messages,
            sampling,
            thinking,
            tools,
            tool_choice,
            parallel_tool_calls,
            response_format,
            logprobs: None,
            stream,
            usage: UsageInStream::None,
            unknown,
        };
        chat.check_prefix()?;
        Ok(Self { chat, omit_thinking })
    }
}

/// Sampling fields with the JSON types they must have, ranges unchecked.
struct RawSampling<'a> {
    max_tokens: Option<i128>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i128>,
    stop: Vec<&'a str>,
    user_id: Option<&'a str>,
}

impl<'a> RawSampling<'a> {
    fn read(fields: &mut Fields<'a>, unknown: &mut Vec<String>) -> Result<Self, ApiError> {
        let list = Path::Root.key("stop_sequences");
        let stop = fields.array("stop_sequences")?.unwrap_or_default();
        let stop = stop.iter().enumerate().map(|(i, one)| {
            one.as_str().ok_or_else(|| invalid_type(&list.index(i), "a string", one))
        });
        let stop = stop.collect::<Result<_, _>>()?;
        let mut user_id = None;
        if let Some(object) = fields.object("metadata")? {
            let mut metadata = Fields::new(object, Path::Root.key("metadata"));
            user_id = metadata.string("user_id")?;
            metadata.report_unknown(unknown);
        }
        Ok(Self {
            max_tokens: fields.integer("max_tokens")?,
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.integer("top_k")?,
            stop,
            user_id,
        })
    }

    fn check(self, rules: &Rules, purpose: Purpose) -> Result<Sampling, ApiError> {
        let number_of = |name, value: Option<f64>, max| {
            value.map(|value| number_in(&Path::Root.key(name), value, 0.0, max)).transpose()
        };
        // A count is about the prompt alone.
        let asked = self.max_tokens.filter(|_| purpose == Purpose::Generate);
        let max_tokens =
            asked.map(|value| check_max_tokens("max_tokens", value, rules)).transpose()?;
        let metadata = Path::Root.key("metadata");
        Ok(Sampling {
            max_tokens: max_tokens.map(|value| ("max_tokens", value)),
            temperature: number_of("temperature", self.temperature, 2.0)?,
            top_p: number_of("top_p", self.top_p, 1.0)?,
            top_k: self.top_k.map(check_top_k).transpose()?,
            n: 1,
            skip_special_tokens: true,
            stop: check_stop(&Path::Root.key("stop_sequences"), &self.stop, rules)?,
            user_id: check_cache_key(&metadata.key("user_id"), self.user_id)?,
            ..Sampling::default()
        })
    }
}

/// `thinking`, values unchecked.
#[derive(Default)]
struct RawThinking<'a> {
    kind: Option<&'a str>,
    budget: Option<i128>,
    display: Option<&'a str>,
}

impl<'a> RawThinking<'a> {
    fn read(fields: &mut Fields<'a>, unknown: &mut Vec<String>) -> Result<Self, ApiError> {
        let Some(object) = fields.object("thinking")? else { return Ok(Self::default()) };
        let mut thinking = Fields::new(object, Path::Root.key("thinking"));
        let read = Self {
            kind: Some(thinking.required_string("type")?),
            budget: thinking.integer("budget_tokens")?,
            display: thinking.string("display")?,
        };
        thinking.report_unknown(unknown);
        Ok(read)
    }

    fn check(&self) -> Result<Thinking, ApiError> {
        let thinking = Path::Root.key("thinking");
        let toggle = match self.kind {
            Some("enabled" | "adaptive") => Some(true),
            Some("disabled") => Some(false),
            Some(other) => {
                let at = thinking.key("type");
                let accepted = "enabled, disabled, adaptive";
                let message =
                    format!("`{at}` is {}, but must be one of {accepted}.", quoted(other));
                return Err(invalid_value(&at, message));
            }
            None => None,
        };
        let budget = self.budget.map(|value| {
            // More than any output is no bound, and no error.
            let value = value.min(u32::MAX.into());
            integer_in(&thinking.key("budget_tokens"), value, 1, u32::MAX.into())
        });
        let budget = budget.transpose()?.map(|value| ("thinking.budget_tokens", value));
        Ok(Thinking { toggle, effort: None, budget, hide: false })
    }
}

/// `output_config`, values unchecked.
#[derive(Default)]
struct RawOutput<'a> {
    effort: Option<&'a str>,
    format: Option<&'a Object>,
}

impl<'a> RawOutput<'a> {
    fn read(fields: &mut Fields<'a>, unknown: &mut Vec<String>) -> Result<Self, ApiError> {
        let Some(object) = fields.object("output_config")? else { return Ok(Self::default()) };
        let mut output = Fields::new(object, Path::Root.key("output_config"));
        let read = Self { effort: output.string("effort")?, format: output.object("format")? };
        output.report_unknown(unknown);
        Ok(read)
    }

    fn check_effort(&self) -> Result<Option<Effort>, ApiError> {
        let path = Path::Root.key("output_config");
        self.effort.map(|effort| Effort::parse(&path.key("effort"), effort)).transpose()
    }

    fn read_format(&self, rules: &Rules) -> Result<ResponseFormat, ApiError> {
        let Some(object) = self.format else { return Ok(ResponseFormat::Text) };
        let output = Path::Root.key("output_config");
        let path = output.key("format");
        let mut format = Fields::new(object, path);
        let kind = format.required_string("type")?;
        if kind != "json_schema" {
            let at = path.key("type");
            let message = format!("`{at}` is {}, but must be json_schema.", quoted(kind));
            return Err(invalid_value(&at, message));
        }
        let value = format.required("schema")?;
        let at = path.key("schema");
        let Value::Object(schema) = value else {
            return Err(invalid_type(&at, "an object", value));
        };
        check_schema(value, true, &at, ErrorCode::InvalidJsonSchema, rules)?;
        Ok(ResponseFormat::JsonSchema {
            name: SCHEMA_NAME.to_owned(),
            schema: schema.clone(),
            strict: true,
        })
    }
}
