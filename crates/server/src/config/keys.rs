//! API keys: `[[keys]]`.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An API key and what it may do.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyConfig {
    /// The secret itself; or give `sha256`.
    #[schemars(example = "sk-change-me")]
    pub key: String,
    /// Instead of the secret, its SHA-256 in 64 hexadecimal digits.
    #[schemars(
        extend("conditional" = true),
        example = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    )]
    pub sha256: Option<String>,
    /// Models the key may use; all if unset.
    #[schemars(example = ["deepseek-v4-flash"])]
    pub models: Option<Vec<String>>,
    /// Requests that may run at once; no limit if unset.
    #[schemars(example = 8)]
    pub max_concurrency: Option<usize>,
    /// Requests that may begin within a minute; no limit if unset.
    #[schemars(example = 600)]
    pub requests_per_minute: Option<u32>,
    /// Tokens, prompt and answer together, that may be used within a minute; no limit if unset.
    #[schemars(example = 1_000_000)]
    pub tokens_per_minute: Option<u64>,
    /// Tokens, prompt and answer together, that the key may use until the server restarts; no limit
    /// if unset.
    #[schemars(example = 100_000_000)]
    pub token_balance: Option<u64>,
}

impl KeyConfig {
    /// A key without limits.
    #[must_use]
    pub fn plain(key: impl Into<String>) -> Self {
        Self { key: key.into(), ..Self::default() }
    }
}

impl fmt::Debug for KeyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyConfig")
            .field("models", &self.models)
            .field("max_concurrency", &self.max_concurrency)
            .field("requests_per_minute", &self.requests_per_minute)
            .field("tokens_per_minute", &self.tokens_per_minute)
            .field("token_balance", &self.token_balance)
            .finish_non_exhaustive()
    }
}
