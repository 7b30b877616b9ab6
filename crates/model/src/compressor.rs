//! The compressor's weights; the pooling itself is part of `attn_store`.

use fathom_core::LayerKind;
use fathom_ops::Ops;
use fathom_ops::layer::CompressorWeights;

use crate::ModelError;
use crate::load::Loader;

/// Loads the compressor at `prefix`, whose entries are `width` wide. Replicated on every rank:
/// all heads share one KV row.
pub(crate) fn load<O: Ops>(
    loader: &Loader<'_, O>,
    prefix: &str,
    width: usize,
) -> Result<CompressorWeights<O>, ModelError> {
    Ok(CompressorWeights {
        width,
        wkv: loader.linear(&format!("{prefix}.wkv.weight"))?,
        wgate: loader.linear(&format!("{prefix}.wgate.weight"))?,
        ape: loader.vector(&format!("{prefix}.ape"))?,
        norm: loader.norm(&format!("{prefix}.norm"))?,
    })
}

/// Loads the attention compressor of a block, if its kind has one.
pub(crate) fn load_for<O: Ops>(
    loader: &Loader<'_, O>,
    attn: &str,
    kind: LayerKind,
) -> Result<Option<CompressorWeights<O>>, ModelError> {
    match kind {
        LayerKind::Window => Ok(None),
        LayerKind::Csa | LayerKind::Hca => {
            let width = fathom_core::model_config::HEAD_DIM;
            load(loader, &format!("{attn}.compressor"), width).map(Some)
        }
    }
}
