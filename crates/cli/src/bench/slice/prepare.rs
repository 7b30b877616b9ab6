//! A slice of a model on a device: how many layers fit, and their drawn weights.
//!
//! What fits is found by rehearsal, as for serving; the checkpoint is a folder of holes with real
//! headers, of which nothing but shapes is read.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use fathom_core::{ModelConfig, Rank};
use fathom_model::{LoadOptions, Transformer};
use fathom_ops::cuda::{ArenaSizes, CudaOps, Memory, MemoryInfo};
use fathom_ops::{BLOCK_TOKENS, Backend, CacheSpec, Drawing};
use fathom_weights::{Checkpoint, synthetic};

use super::floors::{head, resident_bytes, spread};
use super::shape::{Case, Group, SliceArgs, Work};
use crate::bytes::readable;
use crate::gpu::Gpu;
use crate::gpu::plan::{RESERVE_BYTES, Rehearsed, StepLimits};

/// Bytes of tensors in a file of holes: no file system minds.
const SHARD_BYTES: u64 = 4 << 30;
/// Every run draws the same weights.
const SEED: u32 = 20;
const OPTIONS: LoadOptions = LoadOptions { mtp: false };

/// A model that is ready to be measured.
pub(super) struct Prepared {
    pub(super) model: Transformer<CudaOps>,
    pub(super) is_emulator: bool,
    sizes: ArenaSizes,
}

impl Prepared {
    pub(super) fn n_layers(&self) -> usize {
        self.model.layers().len()
    }

    /// Whether results are to be independent of the batch from here on.
    pub(super) fn set_deterministic(&mut self, is_deterministic: bool) {
        let ops = self.model.ops().clone().with_determinism(is_deterministic);
        self.model.set_ops(ops);
    }

    pub(super) fn about(&self) -> String {
        format!(
            "{} layers: weights {}, cache {}, workspace {}",
            self.n_layers(),
            readable(self.sizes.weights as u64),
            readable(self.sizes.cache as u64),
            readable(self.sizes.workspace as u64),
        )
    }
}

/// A folder that is gone when its owner is.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("fathom-slice-{}-{number}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing but holes is left behind if this fails.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The first `n_layers` layers of `config`, without MTP.
pub(super) fn truncated(config: &ModelConfig, n_layers: usize, zipf: bool) -> ModelConfig {
    let mut config = config.clone();
    config.num_hidden_layers = n_layers;
    config.layer_kinds.truncate(n_layers);
    config.num_nextn_predict_layers = 0;
    // A table of expert ids is where popularity can be prescribed.
    config.num_hash_layers = if zipf { n_layers } else { config.num_hash_layers.min(n_layers) };
    config
}

/// A checkpoint of `config` that holds nothing but shapes.
pub(super) fn hollow(config: &ModelConfig) -> Result<Checkpoint> {
    let scratch = Scratch::new();
    synthetic::write_sparse(&scratch.0, config, SHARD_BYTES)
        .context("writing a checkpoint of holes into the folder for temporary files (TMPDIR)")?;
    // Its files stay mapped when their names are gone.
    Ok(Checkpoint::open(&scratch.0)?)
}

/// Positions that sequences of a case reach.
fn lengths(case: &Case) -> Vec<usize> {
    match case.work {
        Work::Decode { batch, context } => spread(context, batch),
        Work::Prefill { n_tokens, prefix } => vec![prefix + n_tokens],
    }
}

/// The cache of a case over the layers of `model`.
pub(super) fn cache_spec(model: &Transformer<CudaOps>, case: &Case) -> CacheSpec {
    let lengths = lengths(case);
    let (kv, index_keys) = CacheSpec::formats_for(model.ops().numerics());
    CacheSpec {
        layers: model.cache_layers().to_vec(),
        n_slots: lengths.len(),
        n_blocks: lengths.iter().map(|n| n.div_ceil(BLOCK_TOKENS)).sum(),
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    }
}

fn limits(group: &Group, deterministic: bool) -> StepLimits {
    let cases = || group.cases.iter();
    let n_tokens = |case: &Case| match case.work {
        Work::Decode { batch, .. } => batch,
        Work::Prefill { n_tokens, .. } => n_tokens,
    };
    let n_seqs = |case: &Case| lengths(case).len();
    StepLimits {
        max_num_batched_tokens: cases().map(n_tokens).max().unwrap_or(1),
        max_num_seqs: cases().map(n_seqs).max().unwrap_or(1),
        max_model_len: cases().flat_map(lengths).max().unwrap_or(1),
        max_drafts: 0,
        deterministic,
    }
}

/// What `n_layers` layers and the largest case of `group` take, in each way that they are to be run.
fn sizes(
    checkpoint: &Checkpoint,
    gpu: &Gpu,
    group: &Group,
    args: &SliceArgs,
) -> Result<ArenaSizes> {
    let mut sizes = ArenaSizes::default();
    for deterministic in [false, true].into_iter().take(1 + usize::from(args.deterministic)) {
        let limits = limits(group, deterministic);
        let rehearsed = Rehearsed::new(checkpoint, gpu.kernels(), OPTIONS, limits)?;
        for case in &group.cases {
            let bytes = rehearsed.cache_bytes(&cache_spec(rehearsed.model(), case))?;
            sizes.cache = sizes.cache.max(bytes);
        }
        sizes.weights = sizes.weights.max(rehearsed.weight_bytes);
        sizes.workspace = sizes.workspace.max(rehearsed.workspace_bytes);
    }
    Ok(sizes)
}

fn needed(sizes: &ArenaSizes) -> u64 {
    (sizes.weights + sizes.cache + sizes.workspace) as u64 + RESERVE_BYTES
}

/// How many layers are worth a rehearsal: no more than have room by the size of their weights.
fn upper_bound(config: &ModelConfig, group: &Group, memory: MemoryInfo) -> usize {
    let most = group.max_layers.unwrap_or(usize::MAX).min(config.num_hidden_layers);
    let fits = |&n: &usize| resident_bytes(config, n) <= memory.free as f64;
    (1..=most).rev().find(fits).unwrap_or(1)
}

/// Finds what fits and draws it.
///
/// # Errors
/// If `--layers` do not fit, or not even one does, with the numbers and what would fit; what the
/// device fails with.
pub(super) fn prepare(
    config: &ModelConfig,
    gpu: &Gpu,
    args: &SliceArgs,
    group: &Group,
) -> Result<Prepared> {
    let memory = gpu.device.memory().context("the device does not say how much memory it has")?;
    let all = config.num_hidden_layers;
    if let Some(n) = args.layers.filter(|&n| n == 0 || n > all) {
        bail!("--layers {n}: {} has 1 to {all}", args.model);
    }
    let mut n_layers = args.layers.unwrap_or_else(|| upper_bound(config, group, memory));
    let (checkpoint, sizes) = loop {
        let checkpoint = hollow(&truncated(config, n_layers, group.zipf))?;
        let sizes = sizes(&checkpoint, gpu, group, args)?;
        let (needed, free) = (needed(&sizes), memory.free);
        if needed <= free {
            break (checkpoint, sizes);
        }
        // Every layer takes about the same, beside embedding and head.
        let fixed = (sizes.workspace as u64 + RESERVE_BYTES) as f64 + 2.0 * head(config, 0).weights;
        let per_layer = (needed as f64 - fixed) / n_layers as f64;
        let fitting = ((free as f64 - fixed) / per_layer).max(0.0) as usize;
        let text = format!(
            "{n_layers} layers need {} of GPU memory (weights {}, cache {}, workspace {}, driver {}) \
             and {} are free",
            readable(needed),
            readable(sizes.weights as u64),
            readable(sizes.cache as u64),
            readable(sizes.workspace as u64),
            readable(RESERVE_BYTES),
            readable(free),
        );
        if args.layers.is_some() && fitting > 0 {
            bail!("{text}; --layers {} would fit", fitting.min(n_layers - 1));
        }
        if n_layers <= 1 {
            bail!("{text}; smaller --batch, --context or --prefill would need less");
        }
        n_layers = fitting.clamp(1, n_layers - 1);
    };
    let arenas = Memory::planned(Arc::clone(&gpu.device), sizes)
        .with_context(|| format!("allocating {}", readable(needed(&sizes))))?;
    let drawing = Drawing { seed: SEED, zipf: group.zipf };
    let ops = CudaOps::over(arenas.drawing(drawing), gpu.activations);
    let model = Transformer::load(ops, &checkpoint, Rank::solo(), OPTIONS, &mut |_| {})
        .context("drawing weights")?;
    Ok(Prepared { model, is_emulator: gpu.is_emulator, sizes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_the_first_layers_without_what_comes_after() {
        let flash = super::super::shape::model("flash").unwrap();
        let slice = truncated(&flash, 12, false);
        assert_eq!((slice.n_blocks(), slice.num_hash_layers), (12, 3));
        assert_eq!(slice.layer_kinds, flash.layer_kinds[..12]);
        assert_eq!(truncated(&flash, 2, false).num_hash_layers, 2);
        assert_eq!(truncated(&flash, 12, true).num_hash_layers, 12);
        let checkpoint = hollow(&truncated(&flash, 2, false)).unwrap();
        assert_eq!(checkpoint.config().num_hidden_layers, 2);
    }

    #[test]
    fn no_more_layers_are_rehearsed_than_have_room() {
        let flash = super::super::shape::model("flash").unwrap();
        let group = |max_layers| Group { cases: Vec::new(), zipf: false, max_layers };
        let memory = |gib: u64| MemoryInfo { free: gib << 30, total: gib << 30 };
        assert_eq!(upper_bound(&flash, &group(None), memory(139)), 41);
        assert_eq!(upper_bound(&flash, &group(Some(12)), memory(139)), 12);
        assert_eq!(upper_bound(&flash, &group(None), memory(180)), 43);
        assert_eq!(upper_bound(&flash, &group(None), memory(1)), 1);
    }
}
