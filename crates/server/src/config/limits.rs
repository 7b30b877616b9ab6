//! What a request may ask for: `[limits]`, `[fim]`.

use std::borrow::Cow;
use std::fmt;

use fathom_protocol::openai::Rules;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// What a request may ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Longest context in tokens, prompt and answer together; unset leaves it to model and memory.
    #[schemars(extend("value_name" = "TOKENS"), example = 65_536)]
    pub max_model_len: Option<u32>,
    /// Cap on `max_tokens`.
    pub max_output_tokens: u32,
    /// `max_tokens` of a request that gives none: a number, or `model_max` for what fits.
    pub default_max_tokens: DefaultMaxTokens,
    /// Cut `max_tokens` to what fits instead of refusing the request.
    pub clip_max_tokens: bool,
    /// Cap on `n`.
    pub max_n: u32,
    /// Cap on the number of stop strings.
    pub max_stop: usize,
    /// Cap on the length of one stop string, in bytes.
    pub max_stop_bytes: usize,
    /// Cap on the number of tools.
    pub max_tools: usize,
    /// Cap on the size of one schema, in bytes of JSON.
    pub max_schema_bytes: usize,
    /// Cap on the nesting of one schema.
    pub max_schema_depth: usize,
    /// Longest time that one schema, or one set of tools, may take to compile, in milliseconds.
    pub schema_compile_ms: u64,
    /// Cap on the number of messages.
    pub max_messages: usize,
    /// Cap on the size of a request body in bytes, after decompression.
    pub max_body_bytes: usize,
    /// Longest wait for a whole request head, in seconds.
    pub head_s: u64,
    /// Longest wait for the next byte of a body, in seconds.
    pub body_idle_s: u64,
    /// Longest wait for a whole body, in seconds.
    pub body_total_s: u64,
    /// Requests that may wait to be started.
    pub queue_len: usize,
    /// Longest wait to be started, in seconds.
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
            schema_compile_ms: 2000,
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

impl Serialize for DefaultMaxTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::ModelMax => serializer.serialize_str("model_max"),
            Self::Tokens(tokens) => serializer.serialize_u32(*tokens),
        }
    }
}

impl JsonSchema for DefaultMaxTokens {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "DefaultMaxTokens".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "enum": ["model_max"]}
        ]})
    }
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

/// Fill-in-the-middle completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FimConfig {
    /// Cap on `max_tokens` of a request with `suffix`, and its default.
    pub max_tokens: u32,
}

impl Default for FimConfig {
    fn default() -> Self {
        Self { max_tokens: 4096 }
    }
}
