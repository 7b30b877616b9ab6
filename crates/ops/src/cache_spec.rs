//! Geometry of the cache: what is stored per sequence slot, what per block of 256 tokens.
//!
//! | store | place | rows |
//! |---|---|---|
//! | window KV | slot, every layer | ring of `128 + spare_rows`, position `p` in row `p % ring` |
//! | compressor state | slot, layers with compression | raw `u`, `s` rows in a ring, by position |
//! | compressed KV | block | 64 rows (ratio 4) or 2 rows (ratio 128) |
//! | indexer keys | block, ratio-4 layers | 64 rows |
//! | copies | slot, if an MTP block drafts | the model's last `8 + spare_rows` output rows, a ring |
//!
//! Everything is addressed by position, nothing by a mutable flag: a slot needs no reset between
//! requests, and a rejected draft is undone by overwriting it.

use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use fathom_core::{LayerKind, Numerics};

use crate::row_formats::{IndexKeyFormat, KvFormat, RowFormats};

/// Tokens of one block.
pub const BLOCK_TOKENS: usize = 256;

/// Everything a backend must know to allocate a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSpec {
    /// Kind of every layer: main layers, then MTP blocks.
    pub layers: Vec<LayerKind>,
    /// Sequences that can hold state at once.
    pub n_slots: usize,
    /// Blocks of 256 tokens, shared by all sequences.
    pub n_blocks: usize,
    /// Snapshots of a slot that can be kept; see [`CacheSpec::snapshot_bytes`].
    pub n_snapshots: usize,
    /// Ring rows beyond what attention can see: as many as draft tokens may be rejected.
    pub spare_rows: usize,
    /// Width of the copies that the MTP block reads (`4 * D`), which is then the last of `layers`; 0
    /// if none drafts.
    pub draft_width: usize,
    /// Format of window and compressed KV rows.
    pub kv: KvFormat,
    /// Format of indexer keys.
    pub index_keys: IndexKeyFormat,
}

impl CacheSpec {
    /// The smallest formats that hold what `numerics` computes without loss.
    #[must_use]
    pub const fn formats_for(numerics: Numerics) -> (KvFormat, IndexKeyFormat) {
        let formats = RowFormats::smallest(numerics);
        (formats.kv(), formats.index_keys())
    }

    /// Rows of a window ring.
    #[must_use]
    pub const fn window_rows(&self) -> usize {
        WINDOW + self.spare_rows
    }

    /// Rows of a compressor's state ring: the previous and the current group, or the current one.
    #[must_use]
    pub const fn state_rows(&self, kind: LayerKind) -> usize {
        match kind {
            LayerKind::Window => 0,
            LayerKind::Csa => 8 + self.spare_rows,
            LayerKind::Hca => 128 + self.spare_rows,
        }
    }

    /// Rows of the ring of copies: those the MTP block has yet to run, and those that may be rejected.
    #[must_use]
    pub const fn copies_rows(&self) -> usize {
        if self.draft_width == 0 { 0 } else { 8 + self.spare_rows }
    }

    /// Bytes of one row of copies: bf16 where the values are, else f32.
    #[must_use]
    pub const fn copies_row_bytes(&self) -> usize {
        self.draft_width * if self.has_f32_copies() { 4 } else { 2 }
    }

    pub(crate) const fn has_f32_copies(&self) -> bool {
        matches!(self.kv, KvFormat::F32)
    }

    /// Window rows of layer `layer` in a snapshot at `n`: the last 128, of a drafting MTP block
    /// without the last one, which depends on token `n`.
    pub(crate) const fn snapshot_rows(&self, layer: usize) -> usize {
        if self.draft_width > 0 && layer + 1 == self.layers.len() { WINDOW - 1 } else { WINDOW }
    }

    /// Compressed rows of one block in one layer.
    #[must_use]
    pub const fn rows_per_block(kind: LayerKind) -> usize {
        kind.n_entries(BLOCK_TOKENS)
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        let layer = |kind: &LayerKind| {
            let keys = if kind.has_indexer() { self.index_keys.row_bytes() } else { 0 };
            Self::rows_per_block(*kind) * (self.kv.row_bytes() + keys)
        };
        self.layers.iter().map(layer).sum()
    }

    /// Bytes of one snapshot over all layers: what a slot needs, beside its blocks, to go on at a
    /// multiple of 128. At such a position no ratio-128 group is open, and of the ratio-4 groups
    /// only the previous one's "a" half is read again. With a drafting MTP block, the copies of the
    /// last row are in it instead of that row of the block.
    #[must_use]
    pub fn snapshot_bytes(&self) -> usize {
        let layer = |(layer, kind): (usize, &LayerKind)| {
            self.snapshot_rows(layer) * self.kv.row_bytes() + Self::overlap_floats(*kind) * 4
        };
        let layers: usize = self.layers.iter().enumerate().map(layer).sum();
        layers + self.copies_row_bytes()
    }

    /// f32 values of a layer's compressor state in a snapshot: 4 positions of `u` and `s`.
    pub(crate) const fn overlap_floats(kind: LayerKind) -> usize {
        if kind.has_indexer() { 4 * 2 * (HEAD_DIM + INDEX_HEAD_DIM) } else { 0 }
    }

    /// Bytes of one slot over all layers: window rings, compressor state (f32 `u` and `s`), copies.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        let layer = |kind: &LayerKind| {
            let index = if kind.has_indexer() { INDEX_HEAD_DIM } else { 0 };
            let state_width = kind.compressor_width() * (HEAD_DIM + index);
            self.window_rows() * self.kv.row_bytes() + self.state_rows(*kind) * state_width * 8
        };
        let layers: usize = self.layers.iter().map(layer).sum();
        layers + self.copies_rows() * self.copies_row_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash_layers() -> Vec<LayerKind> {
        let mut layers = vec![LayerKind::Window; 2];
        for _ in 0..20 {
            layers.extend([LayerKind::Csa, LayerKind::Hca]);
        }
        layers.push(LayerKind::Csa);
        layers
    }

    #[test]
    fn flash_block_and_window_sizes_are_those_of_the_cache_specification() {
        let spec = CacheSpec {
            layers: flash_layers(),
            n_slots: 1,
            n_blocks: 1,
            n_snapshots: 1,
            spare_rows: 0,
            draft_width: 0,
            kv: KvFormat::Fp8,
            index_keys: IndexKeyFormat::Mxfp4,
        };
        // 3,514.25 bytes per token in the 584 + 68 layout, 3,850.25 with keys of 132 bytes.
        assert_eq!(spec.block_bytes(), 899_648);
        let with_fp8_keys = CacheSpec { index_keys: IndexKeyFormat::Fp8, ..spec.clone() };
        assert_eq!(with_fp8_keys.block_bytes() as f64 / 256.0, 3_850.25);
        let window = 43 * 128 * 584;
        let state = 21 * (8 * 8192 + 8 * 2048) + 20 * 128 * 4096;
        assert_eq!(window, 3_214_336);
        assert_eq!(state, 12_206_080);
        assert_eq!(spec.slot_bytes(), window + state);
        assert_eq!(spec.snapshot_bytes(), window + 430_080);

        // A drafting MTP block adds its window but for the last row, and 32 KiB of copies.
        let mut layers = flash_layers();
        layers.push(LayerKind::Window);
        let drafting = CacheSpec { layers, spare_rows: 3, draft_width: 4 * 4096, ..spec };
        assert_eq!(drafting.block_bytes(), 899_648);
        assert_eq!(drafting.snapshot_bytes(), window + 430_080 + 127 * 584 + 32_768);
        let spare = 3 * (44 * 584 + 21 * (8192 + 2048) + 20 * 4096);
        assert_eq!(drafting.slot_bytes(), window + 74_752 + state + spare + 11 * 32_768);
    }
}
