//! From settings to a model that answers: checkpoint, tokenizer, ranks, cache, engine.
//!
//! Not here: HTTP (`fathom-server`), what is printed about it (`banner`).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use fathom_chat::{EffortProfile, Tokenizer};
use fathom_core::{Numerics, ParallelConfig};
use fathom_engine::rank::RankRunner;
use fathom_engine::{DraftMethod, EngineConfig, EngineHandle, StepRunner};
use fathom_model::{LoadOptions, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{ArenaSizes, CudaOps, Memory};
use fathom_ops::{BLOCK_TOKENS, Ops, RowFormats};
use fathom_server::{BuildInfo, ModelEntry};
use fathom_weights::{Checkpoint, EffortProfileHint};

use super::config::ServeConfig;
use super::memory::{self, Demand, Division};
use super::names;
use crate::gpu::loading::Loading;
use crate::gpu::plan::{self, GpuPlan, Rehearsed, StepLimits};
use crate::gpu::{self, Gpu};

/// Bytes of a weight that go into the fingerprint.
const FINGERPRINT_BYTES: usize = 64 * 1024;

/// A GPU that computes.
pub(super) struct OnGpu {
    /// Name, driver, kernels.
    pub(super) about: String,
    /// How its memory is divided.
    pub(super) plan: GpuPlan,
    /// How fast it was filled.
    pub(super) loading: Loading,
}

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
    /// What is told about the GPU, if there is one.
    pub(super) gpu: Option<OnGpu>,
    /// How long all of it took.
    pub(super) took: Duration,
}

/// A model that runs, before there is an engine around it.
struct Running {
    runner: Box<dyn StepRunner>,
    cache: Division,
    gpu: Option<OnGpu>,
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
    let running = match gpu::open(config.device)? {
        None => on_cpu(config, &checkpoint, parallel, progress)?,
        Some(gpu) => on_gpu(config, &checkpoint, parallel, gpu, progress)?,
    };
    let Running { runner, cache, gpu } = running;

    let fingerprint = fingerprint(&checkpoint, config, gpu.is_some())?;
    let engine_config = engine_config(config, &checkpoint, cache.max_model_len, &fingerprint);
    let engine = EngineHandle::start(runner, engine_config)?;
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
    let (weight_bytes, n_tensors) = (checkpoint.n_bytes(), checkpoint.n_tensors());
    Ok(Loaded { entry, weight_bytes, n_tensors, cache, n_threads, gpu, took: start.elapsed() })
}

/// The MTP block is left out unless it drafts.
fn load_options(config: &ServeConfig) -> LoadOptions {
    LoadOptions { mtp: config.speculation.method == DraftMethod::Mtp }
}

fn demand<'a, O: Ops>(
    config: &ServeConfig,
    checkpoint: &Checkpoint,
    model: &'a Transformer<O>,
) -> Demand<'a> {
    Demand {
        layers: model.cache_layers(),
        formats: config.formats,
        max_model_len: config.server.limits.max_model_len,
        model_max_len: checkpoint.config().max_position_embeddings,
        max_num_seqs: config.max_num_seqs,
        spare_rows: spare_rows(config),
        draft_width: model.draft_width(),
    }
}

/// Guesses that one step may reject.
fn spare_rows(config: &ServeConfig) -> usize {
    match config.speculation.method {
        DraftMethod::Off => 0,
        _ => config.speculation.max_drafts as usize,
    }
}

fn on_cpu(
    config: &ServeConfig,
    checkpoint: &Checkpoint,
    parallel: ParallelConfig,
    progress: &dyn Fn(f32),
) -> Result<Running> {
    let models = load_ranks(config, checkpoint, parallel, progress)?;
    let budget = config.kv_cache_memory_bytes.unwrap_or_else(|| match config.model {
        None => memory::EMBEDDED_BYTES,
        // Every rank has a cache of its own.
        Some(_) => memory::default_budget(checkpoint.n_bytes()) / parallel.world() as u64,
    });
    let demand = demand(config, checkpoint, &models[0]);
    let cache = memory::divide(&demand, budget).context("planning the KV cache")?;
    let runner = RankRunner::new(models, parallel, cache.spec.clone(), cache.max_model_len)
        .context("starting the ranks")?;
    Ok(Running { runner: Box::new(runner), cache, gpu: None })
}

/// One model per rank.
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
            let options = load_options(config);
            Transformer::load(ops, checkpoint, parallel.rank(index)?, options, &mut report)
                .with_context(|| format!("loading rank {index} of {world}"))
        })
        .collect()
}

/// Plans the GPU's memory, says how, then takes and fills it.
fn on_gpu(
    config: &ServeConfig,
    checkpoint: &Checkpoint,
    parallel: ParallelConfig,
    gpu: Gpu,
    progress: &dyn Fn(f32),
) -> Result<Running> {
    ensure!(
        config.numerics == Numerics::Bf16,
        "a GPU computes in bf16 (the official semantics); {} needs --device cpu",
        config.numerics
    );
    ensure!(
        config.formats == RowFormats::smallest(Numerics::Bf16),
        "a GPU stores cache rows in {} and indexer keys in {} so far; other formats need --device cpu",
        RowFormats::smallest(Numerics::Bf16).kv(),
        RowFormats::smallest(Numerics::Bf16).index_keys(),
    );
    ensure!(
        parallel.world() == 1,
        "one server uses one GPU so far; --tensor-parallel-size {} needs --device cpu",
        parallel.tensor
    );
    let model_len = checkpoint.config().max_position_embeddings;
    let limits = StepLimits {
        max_num_batched_tokens: config.max_num_batched_tokens as usize,
        max_num_seqs: config.max_num_seqs as usize,
        max_model_len: config.server.limits.max_model_len.map_or(model_len, |len| len as usize),
        max_drafts: spare_rows(config),
        deterministic: config.deterministic,
    };
    let options = load_options(config);
    // Before free memory is asked for: it takes some and gives it back. Only told, so it may fail.
    let host_rate = gpu.device.host_rate().unwrap_or_else(|error| {
        tracing::debug!("how fast the GPU takes copies is not known: {error}");
        None
    });
    let rehearsed = Rehearsed::new(checkpoint, gpu.kernels(), options, limits)?;
    let demand = demand(config, checkpoint, rehearsed.model());
    let wanted_len = config.server.limits.max_model_len.unwrap_or(BLOCK_TOKENS as u32);
    let smallest = memory::smallest_budget(&demand, wanted_len)?;
    let free = gpu.device.memory().context("the GPU does not say how much memory it has")?;
    let left = plan::cache_budget(&rehearsed, smallest, free)?;
    let budget = config.kv_cache_memory_bytes.unwrap_or_else(|| match config.model {
        None => memory::EMBEDDED_BYTES.min(left),
        Some(_) => left,
    });
    let cache = memory::divide(&demand, budget).context("planning the KV cache")?;
    let sizes = ArenaSizes {
        weights: rehearsed.weight_bytes,
        cache: rehearsed.cache_bytes(&cache.spec)?,
        workspace: rehearsed.workspace_bytes,
    };
    let plan = GpuPlan {
        weight_bytes: sizes.weights as u64,
        cache_bytes: sizes.cache as u64,
        workspace_bytes: sizes.workspace as u64,
        memory: free,
    };
    tracing::info!("{}", gpu.about);
    tracing::info!("GPU memory: {plan}");
    let memory = Memory::planned(Arc::clone(&gpu.device), sizes)
        .with_context(|| format!("taking GPU memory: {plan}"))?;
    let ops = CudaOps::over(memory, gpu.activations).with_determinism(config.deterministic);
    let mut report = |done: fathom_model::LoadProgress| {
        progress(done.loaded as f32 / done.total as f32);
    };
    let bytes = sizes.weights as u64;
    let (model, loading) = Loading::of(&*gpu.device, bytes, host_rate, || {
        Transformer::load(ops, checkpoint, parallel.rank(0)?, options, &mut report)
            .context("loading the model onto the GPU")
    })?;
    tracing::info!("GPU weights: {loading}");
    let runner = RankRunner::new(vec![model], parallel, cache.spec.clone(), cache.max_model_len)
        .context("starting the GPU")?;
    let gpu = OnGpu { about: gpu.about, plan, loading };
    Ok(Running { runner: Box::new(runner), cache, gpu: Some(gpu) })
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

/// `fp_` and 16 hexadecimal digits over version, weights, numeric mode, ranks and device.
///
/// Of the weights the dimensions and parts of three tensors count: any training changes those, and
/// hashing all of Flash would take minutes.
fn fingerprint(checkpoint: &Checkpoint, config: &ServeConfig, is_gpu: bool) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    format!("{:?}", checkpoint.config()).hash(&mut hasher);
    for name in ["norm.weight", "head.weight", "layers.0.attn.wkv.weight"] {
        let view = checkpoint.tensor(name)?;
        view.data[..view.data.len().min(FINGERPRINT_BYTES)].hash(&mut hasher);
    }
    // The last bits of a result depend on what computed it.
    (config.numerics, config.tensor_parallel_size, is_gpu).hash(&mut hasher);
    Ok(format!("fp_{:016x}", hasher.finish()))
}
