//! The indexer's weights; scoring and choosing are the operator `index_select`.
//!
//! Replicated on every rank: sharding its heads would cost an all-reduce of scores per layer.

use fathom_core::LayerKind;
use fathom_core::model_config::INDEX_HEAD_DIM;
use fathom_ops::Ops;
use fathom_ops::layer::IndexerWeights;

use crate::load::Loader;
use crate::{ModelError, compressor};

/// Loads the indexer of a block, if its kind has one.
pub(crate) fn load_for<O: Ops>(
    loader: &Loader<'_, O>,
    attn: &str,
    kind: LayerKind,
) -> Result<Option<IndexerWeights<O>>, ModelError> {
    if !kind.has_indexer() {
        return Ok(None);
    }
    let prefix = format!("{attn}.indexer");
    let config = loader.config();
    Ok(Some(IndexerWeights {
        n_heads: config.index_n_heads,
        top_k: config.index_topk,
        wq_b: loader.linear(&format!("{prefix}.wq_b.weight"))?,
        weights_proj: loader.linear(&format!("{prefix}.weights_proj.weight"))?,
        compressor: compressor::load(loader, &format!("{prefix}.compressor"), INDEX_HEAD_DIM)?,
    }))
}
