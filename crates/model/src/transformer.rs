//! The whole model on one rank: embedding, blocks, head, and the MTP block beside them.
//!
//! Invariants:
//! - a row's result depends on its sequence alone, never on the batch it came in or the chunk it
//!   was part of;
//! - all ranks run the same batches in the same order.

use fathom_core::model_config::HC_MULT;
use fathom_core::{LayerKind, ModelConfig, Rank, TokenId};
use fathom_ops::{Backend, Batch, CacheSpec, Communicator, OpError, Ops, PassOutput};
use fathom_weights::Checkpoint;

use crate::block::{Block, Outcome, run_blocks};
use crate::head::Head;
use crate::load::Loader;
use crate::{LoadOptions, LoadProgress, ModelError, MtpBlock, NoProbe, Pass, Probe};

/// `Transformer` of the official code, on one rank.
#[derive(Debug)]
pub struct Transformer<O: Ops> {
    ops: O,
    config: ModelConfig,
    rank: Rank,
    embed: O::Linear,
    layers: Vec<Block<O>>,
    norm_head: Head<O>,
    head: O::Linear,
    mtp: Option<MtpBlock<O>>,
}

/// What one pass leaves behind: logits of [`Batch::logit_rows`], and the copies if asked for.
pub type StepOutput<O> = PassOutput<<O as Backend>::Tensor>;

/// Passes that leave something else behind are others to a device that repeats them.
const fn pass_name(wants_copies: bool) -> &'static str {
    if wants_copies { "model with copies" } else { "model" }
}

impl<O: Ops> Transformer<O> {
    /// Loads this rank's part of `checkpoint`. `progress` is called after each block.
    ///
    /// # Errors
    /// [`ModelError::Checkpoint`] for a damaged tensor, [`ModelError::Parallel`] if the model
    /// cannot be split so, [`ModelError::Op`] if the device refuses a weight: each names it.
    pub fn load(
        ops: O,
        checkpoint: &Checkpoint,
        rank: Rank,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let loader = Loader::new(&ops, checkpoint, rank);
        let has_mtp = options.mtp && config.num_nextn_predict_layers > 0;
        let total = 1 + config.num_hidden_layers + usize::from(has_mtp);

        let vocabulary = rank.tensor_shard("vocabulary rows", config.vocab_size)?;
        let embed = loader.linear("embed.weight")?;
        let norm_head = Head::load(&loader, "")?;
        let head = ops.load_linear(&loader.matrix("head.weight")?.slice_rows(vocabulary)?)?;
        progress(LoadProgress { loaded: 1, total });
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let (kind, router) = (config.layer_kind(layer), config.router_kind(layer));
            layers.push(Block::load(&loader, &format!("layers.{layer}"), kind, router)?);
            progress(LoadProgress { loaded: 1 + layers.len(), total });
        }
        let mut mtp = None;
        if has_mtp {
            mtp = Some(MtpBlock::load(&loader, 0)?);
            progress(LoadProgress { loaded: total, total });
        }
        Ok(Self { ops, config, rank, embed, layers, norm_head, head, mtp })
    }

    /// The device.
    #[must_use]
    pub const fn ops(&self) -> &O {
        &self.ops
    }

    /// The same model, computed by `ops`, which take weights as the operators that loaded them do: for
    /// benches that compare two settings of one backend.
    pub fn set_ops(&mut self, ops: O) {
        self.ops = ops;
    }

    /// The model's dimensions.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// This rank's place.
    #[must_use]
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// The main blocks.
    #[must_use]
    pub fn layers(&self) -> &[Block<O>] {
        &self.layers
    }

    /// The MTP block, if it was loaded.
    #[must_use]
    pub const fn mtp(&self) -> Option<&MtpBlock<O>> {
        self.mtp.as_ref()
    }

    /// Kinds of the layers that need a cache: main layers, then the MTP block if it was loaded.
    #[must_use]
    pub fn cache_layers(&self) -> &[LayerKind] {
        &self.config.layer_kinds[..self.layers.len() + usize::from(self.mtp.is_some())]
    }

    /// Width of the copies that the cache must keep for the MTP block to draft
    /// ([`CacheSpec::draft_width`]); 0 if it was not loaded.
    #[must_use]
    pub fn draft_width(&self) -> usize {
        if self.mtp.is_some() { HC_MULT * self.config.hidden_size } else { 0 }
    }

    /// Allocates the cache stores of this rank.
    ///
    /// # Errors
    /// [`OpError`] if the device cannot hold them.
    pub fn new_cache(&self, spec: &CacheSpec) -> Result<O::Cache, OpError> {
        self.ops.new_cache(spec)
    }

    /// Runs one batch through the main layers and writes it into `cache`.
    ///
    /// `batch` must satisfy [`Batch::validate`] for the cache. `wants_copies` keeps the four
    /// copies, which [`draft`](Self::draft) reads.
    ///
    /// # Errors
    /// [`ModelError::Op`] if an operator fails; the cache rows of this step are then undefined,
    /// earlier ones are intact.
    pub fn forward(
        &self,
        batch: &Batch,
        cache: &mut O::Cache,
        comm: &dyn Communicator,
        wants_copies: bool,
        probe: &mut dyn Probe<O>,
    ) -> Result<StepOutput<O>, ModelError> {
        let ops = &self.ops;
        // Who looks inside must have something to look at, row by row.
        let watches = probe.watches();
        let step = &if watches { ops.prepare_exact_step(batch)? } else { ops.prepare_step(batch)? };
        let wants_logits = !batch.logit_rows.is_empty();
        let needs_all = watches || wants_copies || batch.wants_all_rows();
        let outcome =
            if needs_all || !ops.takes_wanted_rows() { Outcome::All } else { Outcome::Wanted };
        let mut run = |cache: &mut O::Cache| {
            let x = ops.embed(&self.embed, step)?;
            let pass = &mut Pass { ops, step, cache, comm, probe };
            let x = run_blocks(self.layers.iter().enumerate(), pass, x, outcome)?;
            let logits = wants_logits
                .then(|| self.norm_head.logits(ops, &self.head, &x, outcome, step, comm))
                .transpose()?;
            Ok(PassOutput { logits, copies: wants_copies.then_some(x) })
        };
        if watches { run(cache) } else { ops.run_pass(pass_name(wants_copies), step, cache, run) }
    }

    /// Embeds the rows of `step` and runs the main layers `layers` over them, in that order, without a
    /// head: for measuring single layers. A layer that does not exist is left out.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn run_layers(
        &self,
        layers: &[usize],
        step: &O::Step,
        cache: &mut O::Cache,
        comm: &dyn Communicator,
    ) -> Result<O::Tensor, ModelError> {
        let ops = &self.ops;
        let x = ops.embed(&self.embed, step)?;
        let pass = &mut Pass { ops, step, cache, comm, probe: &mut NoProbe };
        let chosen = layers.iter().filter_map(|&layer| Some((layer, self.layers.get(layer)?)));
        run_blocks(chosen, pass, x, Outcome::All)
    }

    /// Runs the MTP block over the rows of `batch`, whose tokens are ignored: row `t` reads
    /// `next_tokens[t]` and the copies `x[t]`, `x [T, 4 * D]`. The copies returned are the block's
    /// own, which a further draft reads.
    ///
    /// # Errors
    /// [`ModelError::NoMtp`] if there is no such block; [`ModelError::Op`] if an operator fails.
    #[expect(clippy::too_many_arguments, reason = "as `forward`, with what the block reads beside")]
    pub fn draft(
        &self,
        batch: &Batch,
        next_tokens: &[TokenId],
        x: O::Tensor,
        cache: &mut O::Cache,
        comm: &dyn Communicator,
        wants_copies: bool,
        probe: &mut dyn Probe<O>,
    ) -> Result<StepOutput<O>, ModelError> {
        let mtp = self.mtp.as_ref().ok_or(ModelError::NoMtp)?;
        let (got, expected) = (next_tokens.len(), batch.n_tokens());
        if got != expected {
            return Err(OpError::Shape { op: "mtp", arg: "next_tokens", got, expected }.into());
        }
        let batch = &Batch { tokens: next_tokens.to_vec(), ..batch.clone() };
        let (ops, watches) = (&self.ops, probe.watches());
        let (step, x) = if watches {
            (ops.prepare_exact_step(batch)?, x)
        } else {
            ops.prepare_step_over(batch, x, cache)?
        };
        let (step, wants_logits) = (&step, !batch.logit_rows.is_empty());
        let mut run = |cache: &mut O::Cache| {
            let pass = &mut Pass { ops, step, cache, comm, probe };
            let x = mtp.forward(pass, &self.embed, &x)?;
            let logits = wants_logits
                .then(|| mtp.head.logits(ops, &self.head, &x, Outcome::All, step, comm))
                .transpose()?;
            Ok(PassOutput { logits, copies: wants_copies.then_some(x) })
        };
        let name = if wants_copies { "mtp with copies" } else { "mtp" };
        if watches { run(cache) } else { ops.run_pass(name, step, cache, run) }
    }
}
