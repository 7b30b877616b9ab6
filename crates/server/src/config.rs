//! The server's settings as an operator writes them, with the contract's defaults.
//!
//! One struct per table of the configuration file; the command line overlays the same fields. A
//! name that is not here is refused, so a misspelt switch never goes unnoticed.
//!
//! Not here: reading files and flags (`cli`), and the engine's own settings.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use fathom_protocol::openai::{Effort, Rules, TrailingAssistant};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

/// Everything the HTTP side can be told.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address, shutdown, health.
    pub server: HttpConfig,
    /// What a request may ask for.
    pub limits: LimitsConfig,
    /// Names that lead to a model.
    pub models: ModelsConfig,
    /// Thinking mode.
    pub thinking: ThinkingConfig,
    /// Reasoning effort and budget.
    pub reasoning: ReasoningConfig,
    /// Fill-in-the-middle completions.
    pub fim: FimConfig,
    /// The Messages surface.
    pub anthropic: AnthropicConfig,
    /// Event streams.
    pub sse: SseConfig,
    /// Prefix cache.
    pub cache: CacheConfig,
    /// Deviations from the contract that some clients or operators want.
    pub compat: CompatConfig,
    /// API keys; without any, authentication is off.
    pub keys: Vec<KeyConfig>,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Address to listen on. Default `127.0.0.1`.
    pub host: String,
    /// Port to listen on; 0 lets the system choose. Default 8000.
    pub port: u16,
    /// How long running requests may go on after a shutdown was asked for. Default 30.
    pub drain_s: u64,
    /// With work pending and no step finished for this long, `/health` fails. Default 120.
    pub watchdog_s: u64,
    /// Whether `/metrics` needs a key. Default false.
    pub protect_metrics: bool,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            drain_s: 30,
            watchdog_s: 120,
            protect_metrics: false,
        }
    }
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Context window; unset leaves it to the model and its memory. Handed to the engine.
    pub max_model_len: Option<u32>,
    /// Cap on `max_tokens`. Default 393,216.
    pub max_output_tokens: u32,
    /// `max_tokens` of a request that gives none: `"model_max"` (the default) or a number.
    pub default_max_tokens: DefaultMaxTokens,
    /// Cut `max_tokens` to what fits instead of refusing the request. Default false.
    pub clip_max_tokens: bool,
    /// Cap on `n`. Default 16.
    pub max_n: u32,
    /// Cap on the number of stop strings. Default 16.
    pub max_stop: usize,
    /// Cap on the length of one stop string, in bytes. Default 1,024.
    pub max_stop_bytes: usize,
    /// Cap on the number of tools. Default 128.
    pub max_tools: usize,
    /// Cap on the size of one schema, in bytes of JSON. Default 262,144.
    pub max_schema_bytes: usize,
    /// Cap on the nesting of one schema. Default 32.
    pub max_schema_depth: usize,
    /// Cap on the number of messages. Default 65,536.
    pub max_messages: usize,
    /// Cap on the size of a request body. Default 33,554,432.
    pub max_body_bytes: usize,
    /// Longest wait for a whole request head, in seconds. Default 10.
    pub head_s: u64,
    /// Longest wait for the next byte of a body, in seconds. Default 30.
    pub body_idle_s: u64,
    /// Longest wait for a whole body, in seconds. Default 300.
    pub body_total_s: u64,
    /// Requests that may wait to be started. Default 1,024. Handed to the engine.
    pub queue_len: usize,
    /// Longest wait to be started, in seconds. Default 600. Handed to the engine.
    pub queue_timeout_s: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let rules = Rules::default();
        Self {
            max_model_len: None,
            max_output_tokens: rules.max_output_tokens,
            default_max_tokens: DefaultMaxTokens::ModelMax,
            clip_max_tokens: false,
            max_n: rules.max_n,
            max_stop: rules.max_stop,
            max_stop_bytes: rules.max_stop_bytes,
            max_tools: rules.max_tools,
            max_schema_bytes: rules.max_schema_bytes,
            max_schema_depth: rules.max_schema_depth,
            max_messages: rules.max_messages,
            max_body_bytes: 32 * 1024 * 1024,
            head_s: 10,
            body_idle_s: 30,
            body_total_s: 300,
            queue_len: 1024,
            queue_timeout_s: 600,
        }
    }
}

/// The token limit of a request that gives none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultMaxTokens {
    /// As much as the context holds.
    ModelMax,
    /// This many.
    Tokens(u32),
}

impl<'de> Deserialize<'de> for DefaultMaxTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = DefaultMaxTokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"model_max\" or a number of tokens, at least 1")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                match text {
                    "model_max" => Ok(DefaultMaxTokens::ModelMax),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_i64<E: de::Error>(self, tokens: i64) -> Result<Self::Value, E> {
                match u32::try_from(tokens) {
                    Ok(tokens) if tokens > 0 => Ok(DefaultMaxTokens::Tokens(tokens)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(tokens), &self)),
                }
            }

            fn visit_u64<E: de::Error>(self, tokens: u64) -> Result<Self::Value, E> {
                self.visit_i64(i64::try_from(tokens).unwrap_or(i64::MAX))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// `[models]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// More names: alias to the id of a loaded model.
    pub aliases: BTreeMap<String, String>,
    /// Whether `deepseek-chat` and `deepseek-reasoner` lead to a model. Default true.
    pub legacy_aliases: bool,
    /// Whether the model list shows aliases too. Default false.
    pub list_aliases: bool,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self { aliases: BTreeMap::new(), legacy_aliases: true, list_aliases: false }
    }
}

/// `[thinking]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ThinkingConfig {
    /// Whether requests that say nothing think. Default true.
    pub default: bool,
    /// What sampling parameters do in thinking mode.
    pub sampling: ThinkingSampling,
}

impl Default for ThinkingConfig {
    fn default() -> Self {
        Self { default: true, sampling: ThinkingSampling::Ignore }
    }
}

/// What sampling parameters do in thinking mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThinkingSampling {
    /// Nothing, as in the hosted API; the release's recommendation is used.
    #[default]
    Ignore,
    /// What they say.
    Honor,
}

/// `[reasoning]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReasoningConfig {
    /// Overrides of the table from requested efforts to the model's three.
    pub effort_map: BTreeMap<Effort, ModelEffort>,
    /// Whether reasoning budgets are enforced. Default true.
    pub honor_budget: bool,
}

impl Default for ReasoningConfig {
    fn default() -> Self {
        Self { effort_map: BTreeMap::new(), honor_budget: true }
    }
}

/// The efforts a model knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "each variant is its name")]
pub enum ModelEffort {
    Low,
    High,
    Max,
}

/// `[fim]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FimConfig {
    /// Cap on `max_tokens` of a request with `suffix`, and its default. Default 4,096.
    pub max_tokens: u32,
}

impl Default for FimConfig {
    fn default() -> Self {
        Self { max_tokens: 4096 }
    }
}

/// `[anthropic]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnthropicConfig {
    /// `"model"` (the default) or `"off"`.
    pub default_thinking: MessagesThinking,
    /// Names that no model has: pattern to the id of a model. A pattern may end in `*`; the longest
    /// that matches counts. If its model is not loaded, another of the map or the only one serves.
    /// Default: `claude-opus*` is Pro, every other `claude*` Flash.
    pub model_map: BTreeMap<String, String>,
}

impl Default for AnthropicConfig {
    fn default() -> Self {
        let map = [("claude-opus*", "deepseek-v4-pro"), ("claude*", "deepseek-v4-flash")];
        Self {
            default_thinking: MessagesThinking::Model,
            model_map: map.map(|(from, to)| (from.to_owned(), to.to_owned())).into(),
        }
    }
}

/// Whether Messages requests that say nothing think.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessagesThinking {
    /// As on every other surface.
    #[default]
    Model,
    /// They do not, as at Anthropic.
    Off,
}

/// `[sse]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SseConfig {
    /// Seconds of silence after which a comment is sent. Default 10.
    pub keepalive_s: u64,
    /// Bytes that may wait for a slow reader, per stream. Default 1,048,576.
    pub buffer_bytes: usize,
    /// Seconds after which a reader that takes nothing is given up. Default 60.
    pub write_timeout_s: u64,
}

impl Default for SseConfig {
    fn default() -> Self {
        Self { keepalive_s: 10, buffer_bytes: 1024 * 1024, write_timeout_s: 60 }
    }
}

impl SseConfig {
    /// Longest time a reader may take nothing.
    #[must_use]
    pub const fn write_timeout(&self) -> Duration {
        Duration::from_secs(self.write_timeout_s)
    }
}

/// `[cache]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Whether requests with different `user_id` share no cache entries. Default true. Handed to
    /// the engine.
    pub isolate_by_user: bool,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { isolate_by_user: true }
    }
}

/// `[compat]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches of the contract")]
pub struct CompatConfig {
    /// Refuse unknown fields. Default false.
    pub reject_unknown: bool,
    /// Status for unknown models: 404 (the default) or 400.
    pub unknown_model_status: u16,
    /// Status for values of a wrong type or range: 400 (the default) or 422.
    pub invalid_parameter_status: u16,
    /// `"system"` (the default) or `"reject"`.
    pub developer_role: DeveloperRole,
    /// Accept tool calls and results in any order. Default false.
    pub lenient_tool_history: bool,
    /// `"new_turn"` (the default), `"continue"` or `"reject"`.
    pub trailing_assistant: TrailingAssistant,
    /// Refuse tool history without its reasoning in thinking mode. Default false.
    pub require_reasoning_roundtrip: bool,
    /// Require the word "json" for `json_object`. Default true.
    pub require_json_keyword: bool,
    /// Accept `prefix` and `strict` under `/beta` only. Default false.
    pub require_beta_path: bool,
    /// Send reasoning as `reasoning` too. Default false.
    pub reasoning_alias: bool,
    /// Put usage on the last finish chunk of every stream. Default false.
    pub usage_on_final_chunk: bool,
    /// End cut generations with DeepSeek's own finish reason instead of an error. Default false.
    pub insufficient_resource: bool,
}

impl Default for CompatConfig {
    fn default() -> Self {
        Self {
            reject_unknown: false,
            unknown_model_status: 404,
            invalid_parameter_status: 400,
            developer_role: DeveloperRole::System,
            lenient_tool_history: false,
            trailing_assistant: TrailingAssistant::NewTurn,
            require_reasoning_roundtrip: false,
            require_json_keyword: true,
            require_beta_path: false,
            reasoning_alias: false,
            usage_on_final_chunk: false,
            insufficient_resource: false,
        }
    }
}

/// What the role `developer` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeveloperRole {
    /// Another name for `system`.
    #[default]
    System,
    /// An error.
    Reject,
}

/// `[[keys]]`
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// The secret itself.
    pub key: String,
    /// Models the key may use; unset means all.
    #[serde(default)]
    pub models: Option<Vec<String>>,
    /// Requests that may run at once.
    #[serde(default)]
    pub max_concurrency: Option<usize>,
    /// Requests that may begin within a minute.
    #[serde(default)]
    pub requests_per_minute: Option<u32>,
}

impl fmt::Debug for KeyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyConfig")
            .field("models", &self.models)
            .field("max_concurrency", &self.max_concurrency)
            .field("requests_per_minute", &self.requests_per_minute)
            .finish_non_exhaustive()
    }
}

/// Settings contradict themselves or the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ConfigError {
    #[error("`{field}` is {got}, expected {expected}")]
    Value { field: &'static str, got: String, expected: &'static str },
    #[error("key number {index} of `keys` is empty: give it a secret or remove it")]
    EmptyKey { index: usize },
}

impl ServerConfig {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field, its value and what it accepts.
    pub fn check(&self) -> Result<(), ConfigError> {
        let one_of = |field, got: u16, allowed: [u16; 2], expected| {
            let error = ConfigError::Value { field, got: got.to_string(), expected };
            allowed.contains(&got).then_some(()).ok_or(error)
        };
        let compat = &self.compat;
        let field = "compat.unknown_model_status";
        one_of(field, compat.unknown_model_status, [404, 400], "404 or 400")?;
        let field = "compat.invalid_parameter_status";
        one_of(field, compat.invalid_parameter_status, [400, 422], "400 or 422")?;
        let limits = &self.limits;
        for (field, got) in [
            ("limits.max_output_tokens", u64::from(limits.max_output_tokens)),
            ("limits.max_n", limits.max_n.into()),
            ("fim.max_tokens", self.fim.max_tokens.into()),
            ("limits.max_messages", limits.max_messages as u64),
            ("limits.max_body_bytes", limits.max_body_bytes as u64),
            ("limits.head_s", limits.head_s),
            ("limits.body_idle_s", limits.body_idle_s),
            ("limits.body_total_s", limits.body_total_s),
            ("sse.keepalive_s", self.sse.keepalive_s),
            ("sse.write_timeout_s", self.sse.write_timeout_s),
            ("sse.buffer_bytes", self.sse.buffer_bytes as u64),
            ("server.watchdog_s", self.server.watchdog_s),
        ] {
            if got == 0 {
                return Err(ConfigError::Value { field, got: "0".into(), expected: "at least 1" });
            }
        }
        match self.keys.iter().position(|key| key.key.is_empty()) {
            Some(index) => Err(ConfigError::EmptyKey { index }),
            None => Ok(()),
        }
    }

    /// The rules that requests for a model with this vocabulary are checked against.
    pub(crate) fn rules(&self, vocab_size: u32) -> Rules {
        let (limits, compat) = (&self.limits, &self.compat);
        Rules {
            max_output_tokens: limits.max_output_tokens,
            clip_max_tokens: limits.clip_max_tokens,
            max_n: limits.max_n,
            max_stop: limits.max_stop,
            max_stop_bytes: limits.max_stop_bytes,
            max_tools: limits.max_tools,
            max_schema_bytes: limits.max_schema_bytes,
            max_schema_depth: limits.max_schema_depth,
            max_messages: limits.max_messages,
            vocab_size,
            reject_unknown: compat.reject_unknown,
            reject_developer_role: compat.developer_role == DeveloperRole::Reject,
            lenient_tool_history: compat.lenient_tool_history,
            trailing_assistant: compat.trailing_assistant,
            require_json_keyword: compat.require_json_keyword,
        }
    }
}
