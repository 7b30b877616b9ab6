//! What an engine is started with.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use fathom_core::TokenId;
use fathom_scheduler::{ConfigError, Limits, SchedulerConfig};

use crate::runner::RunnerCapacity;
use crate::speculate::SpeculationConfig;
use crate::tier::TierConfig;

/// How an engine serves what its runner has room for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens that end an answer; the model's own.
    pub eos_token_ids: Vec<TokenId>,
    /// Tokens one step may run through the model. Default 8192.
    pub max_num_batched_tokens: u32,
    /// Steps with prefill are kept to about this time by running fewer prefill tokens: cancelling
    /// and running answers wait for a step to end. `None`: steps take what they take, and chunks do
    /// not depend on timing. Default 500 ms.
    pub max_step_time: Option<Duration>,
    /// Sequences that may run at once; cut to the runner's slots. Default 256.
    pub max_num_seqs: u32,
    /// Prompt and answer together; cut to what the runner and its KV cache can hold.
    pub max_model_len: u32,
    /// Requests that may wait to be started. Default 1024.
    pub queue_len: usize,
    /// Longest wait in the queue. Default 600 s.
    pub queue_timeout: Duration,
    /// Whether prefixes are shared between requests. Default true.
    pub prefix_cache: bool,
    /// Whether requests of different users never share prefixes. Default true.
    pub isolate_users: bool,
    /// Tokens between state snapshots of a long prefill, a multiple of 256. Default 4096.
    pub snapshot_interval: u32,
    /// What else cached prefixes depend on: model, numeric profile, row format.
    pub cache_namespace: String,
    /// Secret that keeps clients from forging prefix keys. Default: random. A cache directory has
    /// its own, which wins.
    pub cache_seed: u64,
    /// Where cached prefixes may go beside the runner's memory. Default: nowhere.
    pub tiers: TierConfig,
    /// Whether and how tokens are guessed ahead. Never changes a token. Default: not.
    pub speculation: SpeculationConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            eos_token_ids: Vec::new(),
            max_num_batched_tokens: 8192,
            max_step_time: Some(Duration::from_millis(500)),
            max_num_seqs: 256,
            max_model_len: u32::MAX,
            queue_len: 1024,
            queue_timeout: Duration::from_secs(600),
            prefix_cache: true,
            isolate_users: true,
            snapshot_interval: 4096,
            cache_namespace: String::new(),
            // The standard library seeds its hash maps from the system's randomness.
            cache_seed: RandomState::new().build_hasher().finish(),
            tiers: TierConfig::default(),
            speculation: SpeculationConfig::default(),
        }
    }
}

impl EngineConfig {
    /// The scheduler's limits on a runner of this capacity.
    pub(crate) fn limits(
        &self,
        capacity: RunnerCapacity,
        lower_tiers: bool,
    ) -> Result<Limits, ConfigError> {
        let kv_tokens = capacity.n_blocks.saturating_mul(fathom_scheduler::BLOCK_TOKENS);
        let max_num_seqs = self.max_num_seqs.min(capacity.n_slots);
        Limits::try_from(SchedulerConfig {
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_num_seqs,
            max_model_len: self.max_model_len.min(capacity.max_model_len).min(kv_tokens),
            n_blocks: capacity.n_blocks,
            n_snapshots: capacity.n_snapshots,
            snapshot_interval: self.snapshot_interval,
            prefix_cache: self.prefix_cache,
            isolate_users: self.isolate_users,
            lower_tiers,
            cache_namespace: self.cache_namespace.clone(),
            cache_seed: self.cache_seed,
            queue_len: self.queue_len,
            queue_timeout: self.queue_timeout,
        })
    }
}
