//! A chat request and a model to what the engine and the parser need.
//!
//! [`Plan::new`] settles what the request means on this server: thinking mode, effort, sampling,
//! and refusals of what is legal but cannot be honoured. [`Plan::encode`] makes the prompt, which
//! may take long and runs off the reactor. [`Prepared::submit`] hands it to the engine.
//!
//! Not here: checks that need no model (`protocol`).

use std::sync::Arc;

use fathom_chat::grammar::{AnswerConstraint, AnswerRules, GrammarCompiler};
use fathom_chat::parse::{ParserOptions, ToolSet};
use fathom_chat::{
    Arguments, Content, Conversation, Effort, EncodedPrompt, Message, Opening, ResponseFormat,
    Role, Task, ThinkingMode, ToolCall, Turn,
};
use fathom_core::{TokenConstraint, TokenId};
use fathom_engine::TokenStream;
use fathom_protocol::openai as wire;
use fathom_protocol::openai::{ChatRequest, TrailingAssistant};
use fathom_protocol::{ApiError, Dialect, ErrorCode};
use serde_json::Value;

use super::constrain::{Constraints, forces_a_call, may_call};
use super::raise::{AnswerOptions, ChatAnswer};
use super::run::Run;
use crate::app::App;
use crate::config::{ForcedToolInThinking, ModelEffort, ServerConfig, ThinkingSampling};
use crate::error;
use crate::recall::{Listener, Scope, Walk};
use crate::registry::{ModelEntry, Resolved};

/// Context below which the highest effort does not have the room it is meant for.
const MAX_EFFORT_CONTEXT: u32 = 384 * 1024;

/// A chat request, as this server will run it.
pub(crate) struct Plan {
    model: Arc<ModelEntry>,
    conversation: Conversation,
    sampling: wire::Sampling,
    logprobs: Option<u32>,
    tools: Option<ToolSet>,
    single_call: bool,
    grammars: Arc<GrammarCompiler>,
    constraints: Constraints,
    reasoning_budget: Option<u32>,
    hide_reasoning: bool,
    /// Sampling fields that thinking mode ignores.
    ignored: Vec<&'static str>,
    /// Whether control tokens in text are control tokens.
    raw: bool,
    /// What the client calls its fields.
    dialect: Dialect,
}

impl Plan {
    /// Settles what `request` means.
    ///
    /// # Errors
    /// 400 for what the settings refuse.
    pub(crate) fn new(
        request: ChatRequest,
        resolved: &Resolved,
        config: &ServerConfig,
    ) -> Result<Self, ApiError> {
        refuse_control_tokens(&request)?;
        let model = Arc::clone(&resolved.model);
        let continues = request.is_prefix()
            || (config.compat.trailing_assistant == TrailingAssistant::Continue
                && request.messages.last().is_some_and(|m| m.role == wire::Role::Assistant));
        // A continued message without reasoning is continued in non-thinking form; earlier turns
        // keep theirs.
        let answer_only =
            continues && request.messages.last().is_some_and(|m| m.reasoning.is_none());
        let (is_thinking, effort) = thinking(&request.thinking, resolved, config);
        let forced = forces_a_call(&request.tool_choice);
        let is_thinking = is_thinking && !(forced && calls_without_thinking(is_thinking, config)?);
        let thinks = is_thinking && !answer_only;
        if thinks && config.compat.require_reasoning_roundtrip {
            check_reasoning_roundtrip(&request)?;
        }
        if thinks && effort == Effort::Max {
            let max_model_len = model.engine.limits().max_model_len;
            if max_model_len < MAX_EFFORT_CONTEXT {
                tracing::warn!(max_model_len, "effort max is meant for a context of 384K tokens");
            }
        }
        let open_tool_block = forced && !is_thinking && !continues;
        let constraints = Constraints::new(&request, open_tool_block, config);
        let ChatRequest { messages, tools, tool_choice, mut sampling, .. } = request;
        let ignored = if thinks && config.thinking.sampling == ThinkingSampling::Ignore {
            ignore_sampling(&mut sampling)
        } else {
            Vec::new()
        };
        let may_call = may_call(&tools, &tool_choice);
        let functions: Vec<Value> =
            tools.into_iter().map(|tool| Value::Object(tool.function)).collect();
        let budget = request.thinking.budget.filter(|_| thinks && config.reasoning.honor_budget);
        Ok(Self {
            logprobs: request.logprobs,
            tools: may_call.then(|| ToolSet::from_functions(&functions)),
            single_call: !request.parallel_tool_calls,
            grammars: Arc::clone(&resolved.grammars),
            constraints,
            reasoning_budget: budget.map(|(_, tokens)| tokens),
            hide_reasoning: request.thinking.hide,
            ignored,
            raw: config.encoding.allow_special_in_content,
            dialect: request.dialect,
            sampling,
            conversation: Conversation {
                messages: messages.into_iter().map(message).collect(),
                tools: functions,
                response_format: response_format(request.response_format),
                open_tool_block,
                thinking: if is_thinking { ThinkingMode::Thinking } else { ThinkingMode::Chat },
                effort,
                profile: model.effort_profile,
                continue_final: continues,
                ..Conversation::default()
            },
            model,
        })
    }

    /// Makes the prompt and settles what depends on its length. Slow for long conversations.
    ///
    /// # Errors
    /// What has no grammar, `context_length_exceeded`, and internal errors of the tokenizer.
    pub(crate) fn encode(mut self, app: &App) -> Result<Prepared, ApiError> {
        let (EncodedPrompt { ids, n_before_answer }, opening, walk) = self.render(app)?;
        // A continued message comes back together with what it was continued with.
        let remembers = !self.conversation.continue_final
            && !self.raw
            && app.config.cache.remember_answers_mb > 0;
        let listener = remembers.then(|| walk.listen(&ids, n_before_answer));
        let budget = self.reasoning_budget;
        let must_answer = app.config.reasoning.require_answer;
        let rules = self.constraints.compile(&self.grammars, opening, budget, must_answer)?;
        let model = Arc::clone(&self.model);
        let default = app.config.limits.default_max_tokens;
        let sampling = std::mem::take(&mut self.sampling);
        let field = self.dialect.prompt();
        // A long conversation takes its time to go, too: not on the reactor.
        self.conversation = Conversation::default();
        let run = Run::new(model, ids, field, sampling, self.logprobs, default, &app.config)?;
        Ok(Prepared { rules, plan: self, run, listener })
    }

    /// The prompt's tokens, whether or not they fit the context.
    ///
    /// # Errors
    /// Internal errors of the tokenizer.
    pub(crate) fn token_ids(&self, app: &App) -> Result<Vec<TokenId>, ApiError> {
        self.render(app).map(|(encoded, ..)| encoded.ids)
    }

    /// The prompt, earlier answers in the tokens they were given in.
    fn render(&self, app: &App) -> Result<(EncodedPrompt, Opening, Walk), ApiError> {
        let prompt =
            fathom_chat::render(&self.conversation).map_err(|error| error::internal(&error))?;
        let tokenizer = &self.model.tokenizer;
        // As for the prefix cache: not even how long it takes tells one user of another's text.
        let isolates = app.config.cache.isolate_by_user;
        let user = self.sampling.user_id.as_deref().filter(|_| isolates);
        let cache_salt = self.sampling.cache_salt.as_deref();
        let fingerprint = &self.model.fingerprint;
        let mut walk = app.answers.walk(&Scope { fingerprint, cache_salt, user });
        let encoded = if self.raw {
            prompt
                .raw_token_ids(tokenizer)
                .map(|ids| EncodedPrompt { n_before_answer: ids.len(), ids })
        } else {
            let scope = app.turns.scope(&[user, cache_salt]);
            let recall = |before: &[TokenId], turn: Turn<'_>| walk.recall(before, turn);
            app.turns.token_ids_recalling(&prompt, tokenizer, scope, recall)
        };
        Ok((encoded.map_err(|error| error::internal(&error))?, prompt.opening(), walk))
    }

    /// Bytes of text that make up the prompt, roughly; as good as endless if there are grammars,
    /// which are never compiled on the reactor.
    pub(crate) fn n_bytes(&self) -> usize {
        if self.constraints.have_grammars() {
            return usize::MAX;
        }
        let Conversation { messages, tools, .. } = &self.conversation;
        let of_call = |call: &ToolCall| match &call.arguments {
            Arguments::Text(text) => text.len(),
            Arguments::Object(object) => object.values().map(json_bytes).sum(),
        };
        let of_message = |message: &Message| {
            let content = match &message.content {
                Content::Text(text) => text.len(),
                Content::Absent | Content::Parts(_) => 0,
            };
            let calls: usize = message.tool_calls.iter().map(of_call).sum();
            content + message.reasoning.as_ref().map_or(0, String::len) + calls
        };
        messages.iter().map(of_message).sum::<usize>() + tools.iter().map(json_bytes).sum::<usize>()
    }
}

/// About how long a value is as text.
fn json_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 5,
        Value::String(text) => text.len() + 3,
        Value::Array(items) => items.iter().map(json_bytes).sum(),
        Value::Object(entries) => {
            entries.iter().map(|(key, value)| key.len() + 5 + json_bytes(value)).sum()
        }
    }
}

/// A request ready for the engine.
pub(crate) struct Prepared {
    plan: Plan,
    rules: AnswerRules,
    run: Run,
    /// Remembers the answers.
    listener: Option<Listener>,
}

impl Prepared {
    pub(crate) fn n_prompt(&self) -> u32 {
        self.run.n_prompt()
    }

    /// Whether the answer begins with reasoning that the client is to see.
    pub(crate) fn shows_reasoning(&self) -> bool {
        self.rules.opening == Opening::Reasoning && !self.plan.hide_reasoning
    }

    /// Names of sampling fields that had no effect.
    pub(crate) fn ignored(&self) -> &[&'static str] {
        &self.plan.ignored
    }

    /// Hands every choice to the engine. Ids of calls begin with `call_prefix`.
    ///
    /// # Errors
    /// The engine's refusal; choices accepted before it are cancelled.
    pub(crate) fn submit(
        self,
        app: &Arc<App>,
        call_prefix: &'static str,
    ) -> Result<Vec<(TokenStream, ChatAnswer)>, ApiError> {
        let Self { plan, rules, run, listener } = self;
        let options = AnswerOptions {
            parser: ParserOptions {
                opening: rules.opening,
                tools: plan.tools,
                stop: run.sampling().stop.clone(),
                copy_reasoning: false,
            },
            stop_token_ids: run.sampling().stop_token_ids.clone(),
            logprobs: plan.logprobs.is_some(),
            hide_reasoning: plan.hide_reasoning,
            single_call: plan.single_call,
            call_prefix,
        };
        let constraint = || {
            let constraint = AnswerConstraint::new(rules.clone(), &plan.model.tokenizer)?;
            Some(Box::new(constraint) as Box<dyn TokenConstraint>)
        };
        let answer =
            || ChatAnswer::new(Arc::clone(app), &plan.model, options.clone(), listener.clone());
        run.submit(app, plan.dialect.prompt(), constraint, answer)
    }
}

fn refuse_control_tokens(request: &ChatRequest) -> Result<(), ApiError> {
    if request.sampling.skip_special_tokens {
        return Ok(());
    }
    let message = "`skip_special_tokens` must be true: answers never show control tokens.";
    Err(ApiError::at(ErrorCode::UnsupportedParameter, "skip_special_tokens", message))
}

/// Whether a forced call switches thinking off.
fn calls_without_thinking(is_thinking: bool, config: &ServerConfig) -> Result<bool, ApiError> {
    match config.compat.forced_tool_in_thinking {
        ForcedToolInThinking::Reject if is_thinking => {
            let message = "Thinking mode does not support this tool_choice.";
            Err(ApiError::at(ErrorCode::ConflictingParameters, "tool_choice", message))
        }
        ForcedToolInThinking::DisableThinking => Ok(true),
        ForcedToolInThinking::Allow | ForcedToolInThinking::Reject => Ok(false),
    }
}

/// What the prompt says about the answer's form.
fn response_format(format: wire::ResponseFormat) -> ResponseFormat {
    match format {
        wire::ResponseFormat::Text | wire::ResponseFormat::Structured(_) => ResponseFormat::Text,
        wire::ResponseFormat::JsonObject => ResponseFormat::JsonObject,
        wire::ResponseFormat::JsonSchema { schema, .. } => {
            ResponseFormat::JsonSchema(Value::Object(schema))
        }
    }
}

/// Whether the answer thinks, and how hard.
fn thinking(asked: &wire::Thinking, resolved: &Resolved, config: &ServerConfig) -> (bool, Effort) {
    let by_effort = asked.effort.map(|effort| effort != wire::Effort::None);
    let thinks = asked.toggle.or(by_effort).or(resolved.thinks).unwrap_or(config.thinking.default);
    let effort = asked.effort.filter(|effort| *effort != wire::Effort::None);
    (thinks, effort.map_or(Effort::High, |effort| model_effort(effort, config)))
}

fn model_effort(effort: wire::Effort, config: &ServerConfig) -> Effort {
    match config.reasoning.effort_map.get(&effort) {
        Some(ModelEffort::Low) => Effort::Low,
        Some(ModelEffort::High) => Effort::High,
        Some(ModelEffort::Max) => Effort::Max,
        None => match effort {
            wire::Effort::Minimal | wire::Effort::Low => Effort::Low,
            wire::Effort::None
            | wire::Effort::Medium
            | wire::Effort::High
            | wire::Effort::Xhigh => Effort::High,
            wire::Effort::Max | wire::Effort::Ultra => Effort::Max,
        },
    }
}

/// Resets what shapes the distribution to the release's recommendation; returns what was set.
fn ignore_sampling(sampling: &mut wire::Sampling) -> Vec<&'static str> {
    let wire::Sampling {
        temperature,
        top_p,
        presence_penalty,
        frequency_penalty,
        top_k,
        min_p,
        repetition_penalty,
        ..
    } = sampling;
    let given = [
        ("temperature", temperature.take().is_some()),
        ("top_p", top_p.take().is_some()),
        ("presence_penalty", presence_penalty.take().is_some()),
        ("frequency_penalty", frequency_penalty.take().is_some()),
        ("top_k", top_k.take().is_some()),
        ("min_p", min_p.take().is_some()),
        ("repetition_penalty", repetition_penalty.take().is_some()),
    ];
    given.into_iter().filter(|&(_, given)| given).map(|(name, _)| name).collect()
}

/// The hosted API wants the reasoning of every turn that made calls back.
fn check_reasoning_roundtrip(request: &ChatRequest) -> Result<(), ApiError> {
    let incomplete = request
        .messages
        .iter()
        .position(|message| !message.tool_calls.is_empty() && message.reasoning.is_none());
    let Some(i) = incomplete else { return Ok(()) };
    let (param, what) = request.dialect.reasoning(i);
    let message = format!("`{param}` must hold {what} where tools were called in thinking mode.");
    Err(ApiError::at(ErrorCode::MissingRequiredParameter, param, message))
}

fn message(message: wire::Message) -> Message {
    let wire::Message { role, content, reasoning, tool_calls, tool_call_id, task, .. } = message;
    let role = match role {
        wire::Role::System => Role::System,
        wire::Role::User => Role::User,
        wire::Role::Assistant => Role::Assistant,
        wire::Role::Tool => Role::Tool,
        wire::Role::LatestReminder => Role::LatestReminder,
    };
    let call = |call: wire::ToolCall| ToolCall {
        id: call.id,
        name: call.name,
        arguments: match call.arguments {
            wire::Arguments::Text(text) => Arguments::Text(text),
            wire::Arguments::Object(object) => Arguments::Object(object),
        },
    };
    Message {
        reasoning,
        tool_calls: tool_calls.into_iter().map(call).collect(),
        tool_call_id,
        task: task.as_deref().and_then(Task::from_name),
        ..Message::new(role, content.map_or(Content::Absent, Content::Text))
    }
}
