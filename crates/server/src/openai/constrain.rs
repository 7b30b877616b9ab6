//! What a request promises about its answer, as grammars.
//!
//! [`Constraints`] are settled before anything is computed; [`Constraints::compile`] makes their
//! grammars, which may take long and runs off the reactor, and maps what has none to the field at
//! fault. Not here: the grammars themselves (`fathom_chat::grammar`).

use std::sync::Arc;
use std::time::Duration;

use fathom_chat::Opening;
use fathom_chat::grammar::{
    AnswerRules, CallRules, Calls, Enforcement, Fault, Format, Grammar, GrammarCompiler,
    GrammarError, GrammarSpec, Part, Start, ToolRule,
};
use fathom_protocol::openai::{ChatRequest, ResponseFormat, Structured, Tool, ToolChoice};
use fathom_protocol::{ApiError, Dialect, ErrorCode};
use serde_json::Value;

use crate::config::ServerConfig;

/// What an answer must keep to, not yet compiled.
#[derive(Debug, Clone)]
pub(crate) struct Constraints {
    /// What the answer must be after its reasoning.
    answer: Option<GrammarSpec>,
    calls: CallPolicy,
    /// Names of all tools in the request's order, for errors.
    tools: Vec<String>,
    /// The field that says what the text must be.
    format_field: &'static str,
    /// What the client calls the others.
    dialect: Dialect,
    /// Most time that one grammar may take to compile.
    budget: Duration,
}

/// What an answer whose text is free may call.
#[derive(Debug, Clone)]
enum CallPolicy {
    Free,
    Forbidden,
    Constrained(GrammarSpec),
}

/// Whether a request demands a call.
pub(crate) fn forces_a_call(choice: &ToolChoice) -> bool {
    matches!(
        choice,
        ToolChoice::Required | ToolChoice::Named(_) | ToolChoice::Allowed { required: true, .. }
    )
}

/// Whether a request's tools may be called at all.
pub(crate) fn may_call(tools: &[Tool], choice: &ToolChoice) -> bool {
    let allowed = match choice {
        ToolChoice::None => false,
        ToolChoice::Allowed { names, .. } => !names.is_empty(),
        ToolChoice::Auto | ToolChoice::Required | ToolChoice::Named(_) => true,
    };
    allowed && !tools.is_empty()
}

impl Constraints {
    /// What `request` promises. `opened`: the prompt opens the block of a forced call.
    pub(crate) fn new(request: &ChatRequest, opened: bool, config: &ServerConfig) -> Self {
        let (format, format_field) = format(&request.response_format, request.dialect);
        let forced = forces_a_call(&request.tool_choice);
        let calls = may_call(&request.tools, &request.tool_choice)
            .then(|| call_rules(request, forced, config.tools.constrain_auto));
        let forbidden =
            if request.tools.is_empty() { CallPolicy::Free } else { CallPolicy::Forbidden };
        let (answer, calls) = match (calls, format) {
            (Some(calls), _) if forced => {
                let start = if opened { Start::ToolBlock } else { Start::Answer };
                (Some(GrammarSpec { format: None, calls: Some(calls), start }), forbidden)
            }
            (Some(calls), None) => {
                let spec = GrammarSpec { format: None, calls: Some(calls), start: Start::Marker };
                (None, CallPolicy::Constrained(spec))
            }
            (calls, Some(format)) => {
                let spec = GrammarSpec { format: Some(format), calls, start: Start::Answer };
                (Some(spec), forbidden)
            }
            (None, None) => (None, forbidden),
        };
        Self {
            answer,
            calls,
            tools: request.tools.iter().map(|tool| tool.name.clone()).collect(),
            format_field,
            dialect: request.dialect,
            budget: Duration::from_millis(config.limits.schema_compile_ms),
        }
    }

    /// What a text completion promises.
    pub(crate) fn of_text(structured: Option<&Structured>, config: &ServerConfig) -> Self {
        let spec = |format| GrammarSpec { format: Some(format), calls: None, start: Start::Answer };
        Self {
            answer: structured.map(|structured| spec(structured_format(structured))),
            calls: CallPolicy::Free,
            tools: Vec::new(),
            format_field: structured.map_or("structured_outputs", Structured::field),
            dialect: Dialect::Chat,
            budget: Duration::from_millis(config.limits.schema_compile_ms),
        }
    }

    /// Whether there is a grammar to compile, or at least to look up.
    pub(crate) const fn have_grammars(&self) -> bool {
        self.answer.is_some() || matches!(self.calls, CallPolicy::Constrained(_))
    }

    /// The rules of an answer that follows `opening`.
    ///
    /// # Errors
    /// `unsupported_schema`, `schema_too_complex`, or `invalid_value` for an expression or a
    /// grammar that is none.
    pub(crate) fn compile(
        &self,
        grammars: &GrammarCompiler,
        opening: Opening,
        reasoning_budget: Option<u32>,
        must_answer: bool,
    ) -> Result<AnswerRules, ApiError> {
        let compile = |spec: &GrammarSpec| -> Result<Arc<Grammar>, ApiError> {
            let grammar =
                grammars.compile(spec, self.budget).map_err(|error| self.refusal(&error))?;
            if !grammar.ignored().is_empty() {
                tracing::debug!(ignored = ?grammar.ignored(), "a schema is enforced in part");
            }
            Ok(grammar)
        };
        Ok(AnswerRules {
            opening,
            reasoning_budget,
            must_answer,
            calls: match &self.calls {
                CallPolicy::Free => Calls::Free,
                CallPolicy::Forbidden => Calls::Forbidden,
                CallPolicy::Constrained(spec) => Calls::Constrained(compile(spec)?),
            },
            grammar: self.answer.as_ref().map(compile).transpose()?,
        })
    }

    fn refusal(&self, error: &GrammarError) -> ApiError {
        let has_format = self.answer.as_ref().is_some_and(|spec| spec.format.is_some());
        let param = match &error.part {
            Part::Tool(name) => {
                let index = self.tools.iter().position(|known| known == name);
                self.dialect.tool_schema(index.unwrap_or(0))
            }
            Part::Whole if !has_format => "tools".to_owned(),
            Part::Format | Part::Whole => self.format_field.to_owned(),
        };
        let (code, what) = match error.fault {
            Fault::Busy => {
                let message = "The server is busy compiling schemas: try again later.";
                return ApiError::new(ErrorCode::QueueFull, message);
            }
            Fault::Malformed => (ErrorCode::InvalidValue, "is not well formed"),
            Fault::Unsupported => (ErrorCode::UnsupportedSchema, "cannot be enforced"),
            Fault::TooComplex => (ErrorCode::SchemaTooComplex, "is too complex"),
        };
        ApiError::at(code, &param, format!("`{param}` {what}: {}.", error.reason))
    }
}

/// What the text must be, and the field that says so.
fn format(format: &ResponseFormat, dialect: Dialect) -> (Option<Format>, &'static str) {
    match format {
        ResponseFormat::Text => (None, dialect.format()),
        ResponseFormat::JsonObject => (Some(Format::JsonObject), dialect.format()),
        ResponseFormat::JsonSchema { schema, strict, .. } => {
            let schema = Value::Object(schema.clone());
            (Some(Format::JsonSchema { schema, strict: *strict }), dialect.format_schema())
        }
        ResponseFormat::Structured(structured) => {
            (Some(structured_format(structured)), structured.field())
        }
    }
}

fn structured_format(structured: &Structured) -> Format {
    match structured {
        Structured::Json(schema) => {
            Format::JsonSchema { schema: Value::Object(schema.clone()), strict: false }
        }
        Structured::JsonObject => Format::JsonObject,
        Structured::Regex(regex) => Format::Regex(regex.clone()),
        Structured::Choice(texts) => Format::Choice(texts.clone()),
        Structured::Grammar(grammar) => Format::Grammar(grammar.clone()),
    }
}

/// What may be called, and how much of the schemas holds.
fn call_rules(request: &ChatRequest, forced: bool, constrain_auto: bool) -> CallRules {
    let (one, several) = match &request.tool_choice {
        ToolChoice::Named(name) => (Some(name), None),
        ToolChoice::Allowed { names, .. } => (None, Some(names)),
        ToolChoice::None | ToolChoice::Auto | ToolChoice::Required => (None, None),
    };
    let is_callable = |tool: &&Tool| {
        one.is_none_or(|name| *name == tool.name)
            && several.is_none_or(|names| names.contains(&tool.name))
    };
    let rule = |tool: &Tool| ToolRule {
        name: tool.name.clone(),
        parameters: tool.parameters().cloned().map(Value::Object),
        enforcement: match (tool.strict, forced, constrain_auto) {
            (true, _, _) => Enforcement::Strict,
            (false, true, _) => Enforcement::Lenient,
            (false, false, true) => Enforcement::BestEffort,
            (false, false, false) => Enforcement::Off,
        },
    };
    CallRules {
        tools: request.tools.iter().filter(is_callable).map(rule).collect(),
        single: one.is_some() || !request.parallel_tool_calls,
    }
}
