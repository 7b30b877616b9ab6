//! From settings to a model that answers: checkpoint, tokenizer, ranks, cache, engine.
//!
//! Not here: HTTP (`fathom-server`), what is printed about it (`banner`).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fathom_chat::{EffortProfile, Tokenizer};
use fathom_core::ParallelConfig;
use fathom_engine::rank::RankRunner;
use fathom_engine::{DraftMethod, EngineConfig, EngineHandle};
use fathom_model::{LoadOptions, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_server::{BuildInfo, ModelEntry};
use fathom_weights::{Checkpoint, EffortProfileHint};

use super::config::ServeConfig;
use super::memory::{self, Demand, Division};
use super::names;

/// Bytes of a weight that go into the fingerprint.
const FINGERPRINT_BYTES: usize = 64 * 1024;

/// A loaded model, and what there is to tell about it.
pub(super) struct Loaded {
    /// What the server serves.
    pub(super) entry: ModelEntry,
    /// Bytes of the checkpoint's tensors.
    pub(super) weight_bytes: u64,
    /// The checkpoint's tensors.
    pub(super) n_tensors: usize,
    /// The cache.
    pub(super) cache: Division,
    /// Threads that compute.
    pub(super) n_threads: usize,
    /// How long all of it took.
    pub(super) took: Duration,
}

/// Loads the model that `config` names; `progress` hears from 0 to 1 how far it is.
pub(super) fn load(config: &ServeConfig, progress: &dyn Fn(f32)) -> Result<Loaded> {
    let start = Instant::now();
    let n_threads = crate::threads::use_for_compute(config.threads)?;
    let checkpoint = crate::open_checkpoint(config.model.as_deref())?;
    for notice in checkpoint.notices() {
        tracing::info!("{notice}");
    }
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?)?;
    let parallel = ParallelConfig { tensor: config.tensor_parallel_size, expert: 1 };
    let models = load_ranks(config, &checkpoint, parallel, progress)?;

    let demand = Demand {
        layers: models[0].cache_layers(),
        formats: config.formats,
        max_model_len: config.server.limits.max_model_len,
        model_max_len: checkpoint.config().max_position_embeddings,
        max_num_seqs: config.max_num_seqs,
        spare_rows: match config.speculation.method {
            DraftMethod::Off => 0,
            _ => config.speculation.max_drafts as usize,
        },
        draft_width: models[0].draft_width(),
    };
    let weight_bytes = checkpoint.n_bytes();
    let budget = config.kv_cache_memory_bytes.unwrap_or_else(|| match config.model {
        None => memory::EMBEDDED_BYTES,
        // Every rank has a cache of its own.
        Some(_) => memory::default_budget(weight_bytes) / parallel.world() as u64,
    });
    let cache = memory::divide(&demand, budget).context("planning the KV cache")?;

    let fingerprint = fingerprint(&checkpoint, config)?;
    let engine_config = engine_config(config, &checkpoint, cache.max_model_len, &fingerprint);
    let runner = RankRunner::new(models, parallel, cache.spec.clone(), cache.max_model_len)
        .context("starting the ranks")?;
    let engine = EngineHandle::start(Box::new(runner), engine_config)?;
    let ids = names::served_names(
        &config.served_model_names,
        config.model.as_deref(),
        checkpoint.config(),
    );
    let entry = ModelEntry {
        build: BuildInfo {
            weights: ids[0].clone(),
            dtype: config.numerics.name().to_owned(),
            parallel: format!("tp{}ep{}", parallel.tensor, parallel.expert),
        },
        ids,
        tokenizer,
        engine,
        effort_profile: effort_profile(&checkpoint)?,
        fingerprint,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
    };
    let n_tensors = checkpoint.n_tensors();
    Ok(Loaded { entry, weight_bytes, n_tensors, cache, n_threads, took: start.elapsed() })
}

/// One model per rank. The MTP block is left out unless it drafts.
fn load_ranks(
    config: &ServeConfig,
    checkpoint: &Checkpoint,
    parallel: ParallelConfig,
    progress: &dyn Fn(f32),
) -> Result<Vec<Transformer<CpuOps>>> {
    let world = parallel.world();
    (0..world)
        .map(|index| {
            let mut report = |done: fathom_model::LoadProgress| {
                let part = done.loaded as f32 / done.total as f32;
                progress((index as f32 + part) / world as f32);
            };
            let ops = CpuOps::new(config.numerics);
            let options = LoadOptions { mtp: config.speculation.method == DraftMethod::Mtp };
            Transformer::load(ops, checkpoint, parallel.rank(index)?, options, &mut report)
                .with_context(|| format!("loading rank {index} of {world}"))
        })
        .collect()
}

fn engine_config(
    config: &ServeConfig,
    checkpoint: &Checkpoint,
    max_model_len: u32,
    fingerprint: &str,
) -> EngineConfig {
    let mut eos_token_ids = checkpoint.generation_config().eos_token_ids.clone();
    let eos = checkpoint.config().eos_token_id;
    if !eos_token_ids.contains(&eos) {
        eos_token_ids.push(eos);
    }
    EngineConfig {
        eos_token_ids,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_num_seqs: config.max_num_seqs,
        max_model_len,
        queue_len: config.server.limits.queue_len,
        queue_timeout: Duration::from_secs(config.server.limits.queue_timeout_s),
        isolate_users: config.server.cache.isolate_by_user,
        cache_namespace: fingerprint.to_owned(),
        tiers: config.tiers.clone(),
        speculation: config.speculation.clone(),
        ..EngineConfig::default()
    }
}

fn effort_profile(checkpoint: &Checkpoint) -> Result<EffortProfile> {
    Ok(match checkpoint.effort_profile_hint()? {
        Some(EffortProfileHint::Official0731) => EffortProfile::Official0731,
        Some(EffortProfileHint::Preview) | None => EffortProfile::Preview,
    })
}

/// `fp_` and 16 hexadecimal digits over version, weights, numeric mode and ranks.
///
/// Of the weights the dimensions and parts of three tensors count: any training changes those, and
/// hashing all of Flash would take minutes.
fn fingerprint(checkpoint: &Checkpoint, config: &ServeConfig) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    format!("{:?}", checkpoint.config()).hash(&mut hasher);
    for name in ["norm.weight", "head.weight", "layers.0.attn.wkv.weight"] {
        let view = checkpoint.tensor(name)?;
        view.data[..view.data.len().min(FINGERPRINT_BYTES)].hash(&mut hasher);
    }
    (config.numerics, config.tensor_parallel_size).hash(&mut hasher);
    Ok(format!("fp_{:016x}", hasher.finish()))
}
