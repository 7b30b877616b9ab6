//! The server's settings as an operator writes them, with the contract's defaults.
//!
//! One struct per table of the configuration file. A field, its documentation and its default are
//! the only definition of a setting: the file, environment variables, flags, `--help` and the
//! example file are all made from the schema of these types. A name that is not here is refused, so
//! a misspelt switch never goes unnoticed.
//!
//! Not here: reading files and flags (`cli`), and the engine's own settings.

mod http;
mod keys;
mod limits;
mod meaning;

use fathom_protocol::openai::Rules;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{auth, telemetry};

pub use http::{HttpConfig, MetricsConfig, SseConfig, TelemetryConfig};
pub use keys::KeyConfig;
pub use limits::{DefaultMaxTokens, FimConfig, LimitsConfig};
pub use meaning::{
    AnthropicConfig, CacheConfig, CompatConfig, DeveloperRole, EncodingConfig,
    ForcedToolInThinking, LoopAction, LoopConfig, MessagesThinking, ModelEffort, ModelsConfig,
    ReasoningConfig, ThinkingConfig, ThinkingSampling, ToolsConfig,
};

/// Everything the HTTP side can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the tables document themselves")]
pub struct ServerConfig {
    pub server: HttpConfig,
    pub limits: LimitsConfig,
    pub models: ModelsConfig,
    pub thinking: ThinkingConfig,
    pub reasoning: ReasoningConfig,
    pub tools: ToolsConfig,
    pub loop_detection: LoopConfig,
    pub fim: FimConfig,
    pub anthropic: AnthropicConfig,
    pub sse: SseConfig,
    pub cache: CacheConfig,
    pub encoding: EncodingConfig,
    pub metrics: MetricsConfig,
    pub telemetry: TelemetryConfig,
    pub compat: CompatConfig,
    pub keys: Vec<KeyConfig>,
}

/// Settings contradict themselves or the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ConfigError {
    #[error("`{field}` is {got}, expected {expected}")]
    Value { field: &'static str, got: String, expected: &'static str },
    #[error(
        "key number {index} of `keys` needs either `key` or `sha256` (64 hexadecimal digits), not \
         both"
    )]
    KeySecret { index: usize },
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
            ("limits.schema_compile_ms", limits.schema_compile_ms),
            ("loop_detection.max_period", self.loop_detection.max_period as u64),
            ("loop_detection.min_repeats", self.loop_detection.min_repeats as u64),
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
        let tls = (&self.server.tls_cert, &self.server.tls_key);
        if tls.0.is_some() != tls.1.is_some() {
            let field = if tls.0.is_some() { "server.tls_key" } else { "server.tls_cert" };
            let expected = "a file: certificate and key belong together";
            return Err(ConfigError::Value { field, got: "unset".into(), expected });
        }
        if let Some(url) = &self.telemetry.otlp_endpoint
            && telemetry::endpoint(url).is_none()
        {
            let (field, got) = ("telemetry.otlp_endpoint", url.clone());
            let expected =
                "a URL that begins with http://, such as http://localhost:4318/v1/traces";
            return Err(ConfigError::Value { field, got, expected });
        }
        match self.keys.iter().position(|key| !auth::has_one_secret(key)) {
            Some(index) => Err(ConfigError::KeySecret { index }),
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
            ignore_hosted_tools: compat.ignore_hosted_tools,
            extended_roles: self.encoding.extended_roles,
            reject_developer_role: compat.developer_role == DeveloperRole::Reject,
            lenient_tool_history: compat.lenient_tool_history,
            trailing_assistant: compat.trailing_assistant,
            require_json_keyword: compat.require_json_keyword,
        }
    }
}
