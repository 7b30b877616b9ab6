//! Limits of the scheduler: as the user wrote them, then as checked.
//!
//! Not here: where the numbers come from (command line, device memory).

use std::num::NonZeroU32;
use std::time::Duration;

use crate::BLOCK_TOKENS;

/// What the scheduler may use, as written; see [`Limits`] for the checked form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens one step may run through the model, prefill and decode together. Default 8192.
    pub max_num_batched_tokens: u32,
    /// Sequences that may run at once; each holds one state slot. Default 256.
    pub max_num_seqs: u32,
    /// Prompt and generated tokens of one sequence together.
    pub max_model_len: u32,
    /// KV blocks of `BLOCK_TOKENS` tokens.
    pub n_blocks: u32,
    /// State snapshots; without any, no prefix can be reused.
    pub n_snapshots: u32,
    /// Tokens between snapshots of a long prefill, a multiple of `BLOCK_TOKENS`. Default 4096.
    pub snapshot_interval: u32,
    /// Whether prefixes are shared between requests. Default true.
    pub prefix_cache: bool,
    /// Whether requests of different users never share prefixes. Default true.
    pub isolate_users: bool,
    /// Whether the prefix cache has lower tiers, which want copies. Default false.
    pub lower_tiers: bool,
    /// What else the cache's content depends on: model, numeric profile, row format.
    pub cache_namespace: String,
    /// Secret of this process (or cache directory): keeps clients from forging prefix keys.
    pub cache_seed: u64,
    /// Sequences that may wait to be started. Default 1024.
    pub queue_len: usize,
    /// Longest wait of a sequence that was never started. Default 600 s.
    pub queue_timeout: Duration,
}

impl SchedulerConfig {
    /// Defaults, for a cache of `n_blocks` blocks and `n_snapshots` snapshots.
    #[must_use]
    pub const fn new(max_model_len: u32, n_blocks: u32, n_snapshots: u32) -> Self {
        Self {
            max_num_batched_tokens: 8192,
            max_num_seqs: 256,
            max_model_len,
            n_blocks,
            n_snapshots,
            snapshot_interval: 4096,
            prefix_cache: true,
            isolate_users: true,
            lower_tiers: false,
            cache_namespace: String::new(),
            cache_seed: 0,
            queue_len: 1024,
            queue_timeout: Duration::from_secs(600),
        }
    }
}

/// A [`SchedulerConfig`] that can be obeyed: having one is the proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits(SchedulerConfig);

/// A [`SchedulerConfig`] contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{field} is 0: it must be at least 1")]
    Zero { field: &'static str },
    #[error(
        "max_num_batched_tokens is {tokens}, below max_num_seqs ({seqs}): not every running \
         sequence could decode in a step; raise the first or lower the second"
    )]
    StarvedDecode { tokens: u32, seqs: u32 },
    #[error(
        "max_model_len is {max_model_len} tokens, but the KV cache holds {kv_tokens}: lower \
         max_model_len or give the cache more memory"
    )]
    CacheTooSmall { max_model_len: u32, kv_tokens: u64 },
    #[error("snapshot_interval is {got}: it must be a positive multiple of {BLOCK_TOKENS}")]
    SnapshotInterval { got: u32 },
}

impl TryFrom<SchedulerConfig> for Limits {
    type Error = ConfigError;

    fn try_from(raw: SchedulerConfig) -> Result<Self, ConfigError> {
        let positive = |field, n| NonZeroU32::new(n).ok_or(ConfigError::Zero { field });
        positive("max_num_batched_tokens", raw.max_num_batched_tokens)?;
        positive("max_num_seqs", raw.max_num_seqs)?;
        positive("max_model_len", raw.max_model_len)?;
        positive("n_blocks", raw.n_blocks)?;
        let (tokens, seqs) = (raw.max_num_batched_tokens, raw.max_num_seqs);
        if tokens < seqs {
            return Err(ConfigError::StarvedDecode { tokens, seqs });
        }
        // Any sequence alone must fit, or preempting all others would not help it.
        let max_model_len = raw.max_model_len;
        let kv_tokens = u64::from(raw.n_blocks) * u64::from(BLOCK_TOKENS);
        if kv_tokens < u64::from(max_model_len) {
            return Err(ConfigError::CacheTooSmall { max_model_len, kv_tokens });
        }
        let got = raw.snapshot_interval;
        if got == 0 || !got.is_multiple_of(BLOCK_TOKENS) {
            return Err(ConfigError::SnapshotInterval { got });
        }
        Ok(Self(raw))
    }
}

impl Limits {
    /// Tokens one step may run.
    #[must_use]
    pub const fn max_num_batched_tokens(&self) -> u32 {
        self.0.max_num_batched_tokens
    }

    /// Sequences that may run at once.
    #[must_use]
    pub const fn max_num_seqs(&self) -> u32 {
        self.0.max_num_seqs
    }

    /// Prompt and generated tokens of one sequence together.
    #[must_use]
    pub const fn max_model_len(&self) -> u32 {
        self.0.max_model_len
    }

    /// KV blocks there are.
    #[must_use]
    pub const fn n_blocks(&self) -> u32 {
        self.0.n_blocks
    }

    /// State snapshots there are.
    #[must_use]
    pub const fn n_snapshots(&self) -> u32 {
        self.0.n_snapshots
    }

    /// Sequences that may wait to be started.
    #[must_use]
    pub const fn queue_len(&self) -> usize {
        self.0.queue_len
    }

    pub(crate) const fn queue_timeout(&self) -> Duration {
        self.0.queue_timeout
    }

    pub(crate) const fn snapshot_interval(&self) -> u32 {
        self.0.snapshot_interval
    }

    pub(crate) const fn prefix_cache(&self) -> bool {
        // Without snapshots nothing could ever be hit: do not pay for hashing.
        self.0.prefix_cache && self.0.n_snapshots > 0
    }

    pub(crate) const fn isolate_users(&self) -> bool {
        self.0.isolate_users
    }

    pub(crate) const fn lower_tiers(&self) -> bool {
        self.0.lower_tiers
    }

    pub(crate) fn cache_namespace(&self) -> &str {
        &self.0.cache_namespace
    }

    pub(crate) const fn cache_seed(&self) -> u64 {
        self.0.cache_seed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut SchedulerConfig)) -> String {
        let mut config = SchedulerConfig::new(1024, 4, 1);
        change(&mut config);
        Limits::try_from(config).unwrap_err().to_string()
    }

    #[test]
    fn limits_that_cannot_be_obeyed_are_refused_with_both_numbers() {
        assert!(Limits::try_from(SchedulerConfig::new(1024, 4, 0)).is_ok());
        assert_eq!(refused(|c| c.max_num_seqs = 0), "max_num_seqs is 0: it must be at least 1");
        let starved = refused(|c| c.max_num_batched_tokens = 255);
        assert!(starved.contains("255, below max_num_seqs (256)"), "{starved}");
        let small = refused(|c| c.n_blocks = 3);
        assert!(small.contains("1024 tokens, but the KV cache holds 768"), "{small}");
        let interval = refused(|c| c.snapshot_interval = 300);
        assert!(interval.contains("300: it must be a positive multiple of 256"), "{interval}");
    }
}
