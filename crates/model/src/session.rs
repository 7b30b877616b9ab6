//! One sequence at a time through the model, with a cache of its own.
//!
//! For tools and tests: `fathom logits`, goldens, perplexity. Serving goes through the engine.

use fathom_core::TokenId;
use fathom_ops::{BLOCK_TOKENS, Batch, CacheSpec, Communicator, Ops};

use crate::{ModelError, Probe, StepOutput, Transformer};

/// Which rows of a step should give logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// None.
    None,
    /// The last one.
    Last,
    /// Every one.
    All,
}

/// A sequence that grows.
#[derive(Debug)]
pub struct Session<'m, O: Ops> {
    model: &'m Transformer<O>,
    comm: &'m dyn Communicator,
    cache: O::Cache,
    blocks: Vec<u32>,
    position: usize,
}

impl<'m, O: Ops> Session<'m, O> {
    /// Room for one sequence of `max_tokens`, of which `spare_rows` may be taken back at a time.
    ///
    /// # Errors
    /// [`ModelError::Op`] if the device cannot hold it.
    pub fn new(
        model: &'m Transformer<O>,
        comm: &'m dyn Communicator,
        max_tokens: usize,
        spare_rows: usize,
    ) -> Result<Self, ModelError> {
        let (kv, index_keys) = CacheSpec::formats_for(model.ops().numerics());
        let n_blocks = max_tokens.div_ceil(BLOCK_TOKENS).max(1);
        let layers = model.cache_layers().to_vec();
        let spec = CacheSpec {
            layers,
            n_slots: 1,
            n_blocks,
            n_snapshots: 0,
            spare_rows,
            // Whoever drafts with a session keeps the copies.
            draft_width: 0,
            kv,
            index_keys,
        };
        let cache = model.new_cache(&spec)?;
        Ok(Self { model, comm, cache, blocks: (0..n_blocks as u32).collect(), position: 0 })
    }

    /// The model it runs through.
    #[must_use]
    pub const fn model(&self) -> &'m Transformer<O> {
        self.model
    }

    /// Tokens processed so far.
    #[must_use]
    pub const fn position(&self) -> usize {
        self.position
    }

    /// Takes back all tokens from `position` on, at most as many as there are spare rows; or, with
    /// 0, all of them: then a new sequence begins.
    ///
    /// # Panics
    /// If the sequence is shorter than `position`.
    pub fn rewind(&mut self, position: usize) {
        assert!(position <= self.position, "rewinding {} to {position}", self.position);
        self.position = position;
    }

    /// Runs `tokens` in one step.
    ///
    /// # Errors
    /// [`ModelError::SessionFull`] if the cache cannot hold them; otherwise what
    /// [`Transformer::forward`] fails with.
    pub fn run(
        &mut self,
        tokens: &[TokenId],
        rows: Rows,
        wants_copies: bool,
        probe: &mut dyn Probe<O>,
    ) -> Result<StepOutput<O>, ModelError> {
        let batch = self.batch(self.position, tokens, rows)?;
        let output = self.model.forward(&batch, &mut self.cache, self.comm, wants_copies, probe)?;
        self.position += tokens.len();
        Ok(output)
    }

    /// Runs the MTP block over the rows at `position..`, see [`Transformer::draft`].
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`ModelError::NoMtp`].
    pub fn draft(
        &mut self,
        position: usize,
        next_tokens: &[TokenId],
        x: &O::Tensor,
        rows: Rows,
        probe: &mut dyn Probe<O>,
    ) -> Result<StepOutput<O>, ModelError> {
        let batch = self.batch(position, next_tokens, rows)?;
        self.model.draft(&batch, next_tokens, x.clone(), &mut self.cache, self.comm, true, probe)
    }

    /// Compressed entry `entry` of `layer`, see [`Backend::read_entry`](fathom_ops::Backend).
    ///
    /// # Errors
    /// [`ModelError::Op`] if there is no such entry.
    pub fn entry(
        &self,
        layer: usize,
        entry: usize,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), ModelError> {
        Ok(self.model.ops().read_entry(&self.cache, layer, &self.blocks, entry)?)
    }

    /// The cache, for running single modules over it.
    pub fn cache_mut(&mut self) -> &mut O::Cache {
        &mut self.cache
    }

    /// The batch that runs `tokens` from `position` on.
    ///
    /// # Errors
    /// [`ModelError::SessionFull`] if the cache cannot hold them.
    pub fn batch(
        &self,
        position: usize,
        tokens: &[TokenId],
        rows: Rows,
    ) -> Result<Batch, ModelError> {
        let end = position + tokens.len();
        let limit = self.blocks.len() * BLOCK_TOKENS;
        if end > limit {
            return Err(ModelError::SessionFull { n_tokens: end, limit });
        }
        let blocks = &self.blocks[..end.div_ceil(BLOCK_TOKENS)];
        let mut batch = Batch::default();
        batch.push(0, position as u32, tokens, blocks, rows == Rows::Last);
        if rows == Rows::All {
            batch.logit_rows = (0..tokens.len() as u32).collect();
        }
        Ok(batch)
    }
}
