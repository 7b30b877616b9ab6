//! Attention of one block: low-rank queries, one shared KV row, window plus compressed entries.
//!
//! Heads and output groups are this rank's; everything else is replicated.

use fathom_core::LayerKind;
use fathom_core::model_config::HEAD_DIM;
use fathom_ops::Ops;
use fathom_ops::layer::AttentionWeights;

use crate::block::Outcome;
use crate::load::Loader;
use crate::probe::Seen;
use crate::{ModelError, Pass, compressor, indexer, rope};

/// `Attention` of the official code, with its `Compressor` and `Indexer`.
#[derive(Debug)]
pub struct Attention<O: Ops> {
    /// Weights of this rank.
    pub weights: AttentionWeights<O>,
}

impl<O: Ops> Attention<O> {
    /// Loads the attention of the block at `prefix`.
    pub(crate) fn load(
        loader: &Loader<'_, O>,
        prefix: &str,
        kind: LayerKind,
    ) -> Result<Self, ModelError> {
        let config = loader.config();
        let attn = format!("{prefix}.attn");
        let heads = loader.rank().tensor_shard("attention heads", config.num_attention_heads)?;
        // Heads follow from groups: a group's heads share one block of wo_a.
        let groups = loader.rank().tensor_shard("output groups", config.o_groups)?;
        let channels = heads.start * HEAD_DIM..heads.end * HEAD_DIM;
        let ranks = groups.start * config.o_lora_rank..groups.end * config.o_lora_rank;

        let wq_b = loader.matrix(&format!("{attn}.wq_b.weight"))?.slice_rows(channels)?;
        let wo_a = loader.matrix(&format!("{attn}.wo_a.weight"))?.slice_rows(ranks.clone())?;
        let wo_b = loader.matrix(&format!("{attn}.wo_b.weight"))?.slice_cols(ranks)?;
        let attn_sink = loader.values(&format!("{attn}.attn_sink"))?;
        let ops = loader.ops();
        let weights = AttentionWeights {
            kind,
            n_heads: heads.len(),
            n_groups: groups.len(),
            wq_a: loader.linear(&format!("{attn}.wq_a.weight"))?,
            q_norm: loader.norm(&format!("{attn}.q_norm"))?,
            wq_b: ops.load_linear(&wq_b)?,
            wkv: loader.linear(&format!("{attn}.wkv.weight"))?,
            kv_norm: loader.norm(&format!("{attn}.kv_norm"))?,
            wo_a: ops.load_linear(&wo_a)?,
            wo_b: ops.load_linear(&wo_b)?,
            attn_sink: ops.load_vector(&attn_sink[heads])?,
            rope: ops.load_vector(&rope::frequencies(config, kind))?,
            compressor: compressor::load_for(loader, &attn, kind)?,
            indexer: indexer::load_for(loader, &attn, kind)?,
        };
        Ok(Self { weights })
    }

    /// Attention of `x [T, D]`, the normalised input, for the rows of `outcome`; writes all rows of this
    /// step into the cache of `layer`.
    ///
    /// # Errors
    /// What the operators fail with.
    pub fn forward(
        &self,
        pass: &mut Pass<'_, O>,
        layer: usize,
        x: &O::Tensor,
        outcome: Outcome,
    ) -> Result<O::Tensor, ModelError> {
        let (ops, step, weights) = (pass.ops, pass.step, &self.weights);
        let mut projected = ops.attn_project(weights, x)?;
        let (kv, queries) = match outcome {
            Outcome::All => {
                let cache = &mut *pass.cache;
                ops.beside(
                    || ops.attn_store(weights, &projected, step, cache, layer),
                    || ops.attn_queries(weights, &projected, step),
                )?
            }
            Outcome::Wanted => {
                let kv = ops.attn_store(weights, &projected, step, pass.cache, layer)?;
                projected.qr = pass.wanted(projected.qr)?;
                let weights_of_all = projected.index_weights.take();
                projected.index_weights = weights_of_all.map(|w| pass.wanted(w)).transpose()?;
                (kv, ops.attn_queries(weights, &projected, step)?)
            }
        };
        let mut selection = None;
        if weights.indexer.is_some() {
            let chosen =
                ops.index_select(weights, &queries, &projected, step, pass.cache, layer)?;
            pass.see(layer, Seen::Selection(&chosen))?;
            selection = Some(chosen);
        }
        let o = ops.attend(weights, &queries, &kv, selection.as_ref(), step, pass.cache, layer)?;
        Ok(ops.attn_output(weights, &o, pass.comm)?)
    }
}
