//! What a model takes of a GPU's memory, before anything is loaded.
//!
//! The figures come from a rehearsal: the model is loaded and steps run on a device that only counts
//! ([`fathom_ops::cuda::rehearsal`]), so plan and use cannot disagree.
//!
//! Not here: how the cache's share is divided (`serve::memory`).

use std::fmt;

use anyhow::{Context, Result};
use fathom_core::Rank;
use fathom_core::model_config::WINDOW;
use fathom_model::{LoadOptions, NoProbe, Transformer};
use fathom_ops::cuda::rehearsal::Rehearsal;
use fathom_ops::cuda::{CudaOps, DeviceCache, DeviceTensor, Memory, MemoryInfo, Place};
use fathom_ops::{Activations, BLOCK_TOKENS, Backend, Batch, CacheSpec, HeadOps, Solo};
use fathom_weights::Checkpoint;

use crate::bytes::readable;

/// Memory left alone: what the driver takes for recorded steps and code, and its own growth.
pub(crate) const RESERVE_BYTES: u64 = 768 << 20;

/// How large steps may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepLimits {
    /// Tokens of one step.
    pub(crate) max_num_batched_tokens: usize,
    /// Sequences of one step.
    pub(crate) max_num_seqs: usize,
    /// Positions of one sequence.
    pub(crate) max_model_len: usize,
    /// Guesses that one sequence may have verified in a step.
    pub(crate) max_drafts: usize,
    /// Whether results do not depend on the batch, which takes other launches.
    pub(crate) deterministic: bool,
}

/// A model that was loaded in a rehearsal.
pub(crate) struct Rehearsed {
    model: Transformer<CudaOps>,
    limits: StepLimits,
    /// Bytes of the weights.
    pub(crate) weight_bytes: usize,
    /// Bytes that the largest step takes.
    pub(crate) workspace_bytes: usize,
}

impl Rehearsed {
    /// Loads `checkpoint` and runs the largest steps, all for show, with the kernels of `arch`.
    ///
    /// # Errors
    /// What the model is refused for.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        (arch, activations): (&'static str, Activations),
        options: LoadOptions,
        limits: StepLimits,
    ) -> Result<Self> {
        let ops = CudaOps::over(Rehearsal::memory(arch), activations)
            .with_determinism(limits.deterministic);
        let model = Transformer::load(ops, checkpoint, Rank::solo(), options, &mut |_| {})
            .context("planning the weights")?;
        let weight_bytes = memory(&model).reach(Place::Weights);
        let mut rehearsed = Self { model, limits, weight_bytes, workspace_bytes: 0 };
        rehearsed.run_steps().context("planning the workspace")?;
        let reach = memory(&rehearsed.model).reach(Place::Workspace);
        // Gaps may lie otherwise in a step that was not rehearsed.
        rehearsed.workspace_bytes = (reach + reach / 16).next_multiple_of(2 << 20);
        Ok(rehearsed)
    }

    /// The model, to ask about its layers.
    pub(crate) fn model(&self) -> &Transformer<CudaOps> {
        &self.model
    }

    /// Bytes that stores of `spec` take on the device.
    ///
    /// # Errors
    /// What the cache is refused for.
    pub(crate) fn cache_bytes(&self, spec: &CacheSpec) -> Result<usize> {
        let memory = Rehearsal::memory(memory(&self.model).device().arch());
        let ops = CudaOps::over(memory.clone(), self.model.ops().activations());
        let _cache = ops.new_cache(spec)?;
        Ok(memory.reach(Place::Cache))
    }

    fn run_steps(&mut self) -> Result<()> {
        let StepLimits { max_num_batched_tokens, max_num_seqs, max_model_len, max_drafts, .. } =
            self.limits;
        let (kv, index_keys) = CacheSpec::formats_for(self.model.ops().numerics());
        let n_blocks = max_model_len.div_ceil(BLOCK_TOKENS).max(1);
        let spec = CacheSpec {
            layers: self.model.cache_layers().to_vec(),
            n_slots: max_num_seqs,
            n_blocks,
            n_snapshots: 0,
            spare_rows: max_drafts,
            draft_width: self.model.draft_width(),
            kv,
            index_keys,
        };
        // The ids do not matter: every sequence may have the same blocks.
        let blocks: Vec<u32> = (0..n_blocks as u32).collect();
        let mut batches = Vec::new();
        let most = max_num_batched_tokens.min(max_model_len);
        let mut n = 1;
        while n < 2 * most {
            // One prompt, alone and beside answers, at the end of the context.
            for n_decodes in [0, (max_num_seqs - 1).min(max_num_batched_tokens - n.min(most))] {
                let mut batch = Batch::default();
                for slot in 0..n_decodes {
                    batch.push(slot as u32, max_model_len as u32 - 1, &[0], &blocks, true);
                }
                let prompt = n.min(most);
                let position = (max_model_len - prompt) as u32;
                let slot = n_decodes as u32;
                batch.push(slot, position, &vec![0; prompt], &blocks, true);
                batches.push(batch);
            }
            n *= 2;
        }
        // Answers alone: these are rounded up.
        let mut n_seqs = 1;
        while n_seqs < 2 * max_num_seqs {
            let mut batch = Batch::default();
            for slot in 0..n_seqs.min(max_num_seqs) {
                batch.push(slot as u32, max_model_len as u32 - 1, &[0], &blocks, true);
            }
            batches.push(batch);
            n_seqs *= 2;
        }
        // Guesses: every row of every sequence has logits.
        if max_drafts > 0 {
            let rows = (1 + max_drafts).min(max_model_len);
            let mut batch = Batch::default();
            for slot in 0..max_num_seqs.min(max_num_batched_tokens / rows) {
                let position = (max_model_len - rows) as u32;
                batch.push(slot as u32, position, &vec![0; rows], &blocks, true);
            }
            batch.logit_rows = (0..batch.n_tokens() as u32).collect();
            batches.push(batch);
        }
        let mut cache = self.model.new_cache(&spec)?;
        let drafts = spec.draft_width > 0;
        for batch in &batches {
            let output = self.model.forward(batch, &mut cache, &Solo, drafts, &mut NoProbe)?;
            if let Some(logits) = &output.logits {
                self.model.ops().rehearse_choices(logits)?;
            }
            drop(output.logits);
            if let Some(x) = output.copies {
                self.follow(batch, &x, &mut cache)?;
            }
        }
        if drafts {
            self.draft(max_num_seqs, &mut cache)?;
        }
        Ok(())
    }

    /// The rows of the MTP block that run beside the copies `x` of `batch`: of each sequence as many
    /// as its window and the ring of copies can ask for.
    fn follow(&self, batch: &Batch, x: &DeviceTensor, cache: &mut DeviceCache) -> Result<()> {
        let n_kept = cache.spec().copies_rows();
        let mut rows = Batch::default();
        for of in &batch.sequences {
            let end = of.positions().end;
            let n = (n_kept + of.n_tokens as usize).min(WINDOW).min(end - 1);
            if n > 0 {
                rows.push(of.slot, (end - 1 - n) as u32, &vec![0; n], &[], false);
            }
        }
        let ops = self.model.ops();
        if rows.n_tokens() > 0 {
            let kept = ops.kept_copies(&rows, Some((batch, x)), cache)?;
            let next = rows.tokens.clone();
            self.model.draft(&rows, &next, kept, cache, &Solo, false, &mut NoProbe)?;
        }
        Ok(ops.keep_copies(batch, x, cache)?)
    }

    /// The first pass of a draft for `n_seqs` sequences, with all rows that may wait, then a further
    /// one on its own copies.
    fn draft(&self, n_seqs: usize, cache: &mut DeviceCache) -> Result<()> {
        let (ops, n_kept) = (self.model.ops(), cache.spec().copies_rows());
        let (mut first, mut second) = (Batch::default(), Batch::default());
        for slot in 0..n_seqs as u32 {
            first.push(slot, 0, &vec![0; n_kept], &[], true);
            second.push(slot, n_kept as u32, &[0], &[], true);
        }
        let last = first.logit_rows.clone();
        let x = ops.kept_copies(&first, None, cache)?;
        let next = first.tokens.clone();
        let output = self.model.draft(&first, &next, x, cache, &Solo, true, &mut NoProbe)?;
        if let Some(logits) = &output.logits {
            ops.rehearse_choices(logits)?;
        }
        drop(output.logits);
        let copies = output.copies.context("the MTP block leaves no copies")?;
        let x = ops.select_rows(&copies, &last)?;
        let next = second.tokens.clone();
        let output = self.model.draft(&second, &next, x, cache, &Solo, true, &mut NoProbe)?;
        if let Some(logits) = &output.logits {
            ops.rehearse_choices(logits)?;
        }
        Ok(())
    }
}

fn memory(model: &Transformer<CudaOps>) -> &Memory {
    model.ops().memory()
}

/// How a GPU's memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuPlan {
    pub(crate) weight_bytes: u64,
    pub(crate) cache_bytes: u64,
    pub(crate) workspace_bytes: u64,
    pub(crate) memory: MemoryInfo,
}

impl fmt::Display for GpuPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.weight_bytes + self.cache_bytes + self.workspace_bytes;
        write!(
            f,
            "weights {} + cache {} + workspace {} = {} of {} free ({} in all)",
            readable(self.weight_bytes),
            readable(self.cache_bytes),
            readable(self.workspace_bytes),
            readable(used),
            readable(self.memory.free),
            readable(self.memory.total),
        )
    }
}

/// A model and its smallest cache do not fit the GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TooLarge {
    pub(crate) weight_bytes: u64,
    pub(crate) workspace_bytes: u64,
    /// The smallest cache that is of use.
    pub(crate) cache_bytes: u64,
    pub(crate) memory: MemoryInfo,
}

impl std::error::Error for TooLarge {}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryInfo { free, total } = self.memory;
        let fixed = self.weight_bytes + self.workspace_bytes + RESERVE_BYTES;
        let needed = fixed + self.cache_bytes;
        write!(
            f,
            "the model needs {} of GPU memory (weights {}, workspace {}, driver {}, cache at least {}), \
             {} of {} are free: {} are missing; ",
            readable(needed),
            readable(self.weight_bytes),
            readable(self.workspace_bytes),
            readable(RESERVE_BYTES),
            readable(self.cache_bytes),
            readable(free),
            readable(total),
            readable(needed.saturating_sub(free)),
        )?;
        if self.weight_bytes + RESERVE_BYTES >= total {
            let n = (self.weight_bytes + RESERVE_BYTES) / total.max(1) + 1;
            write!(
                f,
                "the weights alone take {n} such GPUs, and one server uses one GPU so far: take one \
                 with more memory, or --device cpu"
            )
        } else if needed <= total {
            write!(f, "it would fit if other programs left the GPU")
        } else {
            write!(
                f,
                "lower --max-num-batched-tokens (workspace), --max-num-seqs or --max-model-len \
                 (cache), or take a GPU with more memory"
            )
        }
    }
}

/// Bytes left for the cache beside weights, workspace and reserve.
///
/// # Errors
/// [`TooLarge`] if that is less than `smallest`, the least that is of use.
pub(crate) fn cache_budget(
    rehearsed: &Rehearsed,
    smallest: u64,
    memory: MemoryInfo,
) -> Result<u64, TooLarge> {
    let (weight_bytes, workspace_bytes) =
        (rehearsed.weight_bytes as u64, rehearsed.workspace_bytes as u64);
    let left = memory.free.checked_sub(weight_bytes + workspace_bytes + RESERVE_BYTES);
    let too_large = TooLarge { weight_bytes, workspace_bytes, cache_bytes: smallest, memory };
    left.filter(|&left| left >= smallest).ok_or(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1_u64 << 30) as f64;

    /// A checkpoint of these dimensions whose tensors are holes.
    fn checkpoint(config: &str) -> (tempfile::TempDir, Checkpoint) {
        let directory = tempfile::tempdir().unwrap();
        let parsed = fathom_weights::parse_config(config.as_bytes()).unwrap();
        let (path, shard_bytes) = (directory.path(), 64 << 30);
        fathom_weights::synthetic::write_sparse(path, &parsed.config, shard_bytes).unwrap();
        let checkpoint = Checkpoint::open(path).unwrap();
        (directory, checkpoint)
    }

    fn rehearse(checkpoint: &Checkpoint, limits: StepLimits) -> Rehearsed {
        rehearse_for("sm_80", checkpoint, limits)
    }

    fn rehearse_for(arch: &'static str, checkpoint: &Checkpoint, limits: StepLimits) -> Rehearsed {
        let options = LoadOptions { mtp: false };
        Rehearsed::new(checkpoint, (arch, Activations::Fp8Grid), options, limits).unwrap()
    }

    const LIMITS: StepLimits = StepLimits {
        max_num_batched_tokens: 1024,
        max_num_seqs: 64,
        max_model_len: 1 << 20,
        max_drafts: 0,
        deterministic: false,
    };

    #[test]
    fn flash_takes_as_many_bytes_as_its_parameters_and_a_bounded_workspace() {
        let (_directory, checkpoint) =
            checkpoint(include_str!("../../../../models/flash/config.json"));
        let rehearsed = rehearse(&checkpoint, LIMITS);
        // 145.3 GiB without the MTP block; block scales become f32 and buffers begin at 256s.
        let gib = rehearsed.weight_bytes as f64 / GIB;
        assert!((145.2..146.0).contains(&gib), "{gib} GiB of weights");
        let gib = rehearsed.workspace_bytes as f64 / GIB;
        assert!((0.3..2.0).contains(&gib), "{gib} GiB of workspace");
        let short = rehearse(&checkpoint, StepLimits { max_num_batched_tokens: 64, ..LIMITS });
        assert!(short.workspace_bytes < rehearsed.workspace_bytes);
        assert_eq!(short.weight_bytes, rehearsed.weight_bytes);
        // In tiles, with what is packed beside what is read while loading.
        let hopper = rehearse_for("sm_90a", &checkpoint, LIMITS);
        let gib = hopper.weight_bytes as f64 / GIB;
        assert!((145.2..150.0).contains(&gib), "{gib} GiB of weights in tiles");
    }

    /// Attention is divided by the context then, however many tokens a step has.
    #[test]
    fn results_that_depend_on_nothing_else_have_a_workspace_of_their_own() {
        let (_directory, checkpoint) =
            checkpoint(include_str!("../../../../models/flash/config.json"));
        let limits = StepLimits { max_model_len: 32 << 10, ..LIMITS };
        let any = rehearse_for("sm_90a", &checkpoint, limits);
        let limits = StepLimits { deterministic: true, ..limits };
        let own = rehearse_for("sm_90a", &checkpoint, limits);
        assert_eq!(own.weight_bytes, any.weight_bytes);
        // Three parts of each token's attention, of 64 heads with 512 + 2 values.
        let parts = 3 * 1024 * 64 * 514 * 4;
        let more = own.workspace_bytes.saturating_sub(any.workspace_bytes);
        assert!(more > parts / 4, "{} and {}", own.workspace_bytes, any.workspace_bytes);
    }

    #[test]
    fn pro_takes_as_many_bytes_as_its_parameters() {
        let (_directory, checkpoint) =
            checkpoint(include_str!("../../../../models/pro/config.json"));
        let rehearsed = rehearse(&checkpoint, LIMITS);
        let gib = rehearsed.weight_bytes as f64 / GIB;
        assert!((792.0..796.0).contains(&gib), "{gib} GiB of weights");
    }

    #[test]
    fn the_cache_takes_what_its_geometry_says() {
        let checkpoint = crate::embedded::checkpoint().unwrap();
        let limits = StepLimits { max_model_len: 2048, max_num_seqs: 2, ..LIMITS };
        let rehearsed = rehearse(&checkpoint, limits);
        let (kv, index_keys) = CacheSpec::formats_for(fathom_core::Numerics::Bf16);
        let spec = CacheSpec {
            layers: rehearsed.model().cache_layers().to_vec(),
            n_slots: 3,
            n_blocks: 20,
            n_snapshots: 4,
            spare_rows: 0,
            draft_width: 0,
            kv,
            index_keys,
        };
        let exact = 3 * spec.slot_bytes() + 20 * spec.block_bytes() + 4 * spec.snapshot_bytes();
        let planned = rehearsed.cache_bytes(&spec).unwrap();
        // Every store begins at a multiple of 256; a store without rows takes one of these.
        assert!((exact..exact + 256 * 8 * spec.layers.len()).contains(&planned), "{planned}");
    }

    #[test]
    fn a_gpu_that_is_too_small_is_told_with_numbers_and_what_would_fit() {
        let gib = |n: u64| n << 30;
        let too_large = |free, total| TooLarge {
            weight_bytes: gib(145),
            workspace_bytes: gib(1),
            cache_bytes: gib(2),
            memory: MemoryInfo { free, total },
        };
        let text = too_large(gib(79), gib(80)).to_string();
        assert!(text.contains("148.8 GiB") && text.contains("take 2 such GPUs"), "{text}");
        let text = too_large(gib(100), gib(180)).to_string();
        assert!(text.contains("48.8 GiB are missing") && text.contains("other programs"), "{text}");
        let text = too_large(gib(146), gib(147)).to_string();
        assert!(text.contains("lower --max-num-batched-tokens"), "{text}");
    }

    #[test]
    fn the_cache_gets_what_weights_workspace_and_reserve_leave() {
        let checkpoint = crate::embedded::checkpoint().unwrap();
        let limits = StepLimits { max_model_len: 2048, max_num_seqs: 2, ..LIMITS };
        let rehearsed = rehearse(&checkpoint, limits);
        let fixed = (rehearsed.weight_bytes + rehearsed.workspace_bytes) as u64 + RESERVE_BYTES;
        let memory = |free| MemoryInfo { free, total: 80 << 30 };
        assert_eq!(cache_budget(&rehearsed, 10, memory(fixed + 10)), Ok(10));
        assert!(cache_budget(&rehearsed, 11, memory(fixed + 10)).is_err());
        assert!(cache_budget(&rehearsed, 0, memory(fixed - 1)).is_err());
    }
}
