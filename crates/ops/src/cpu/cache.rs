//! The cache of one rank in host memory: window rings, compressor state, blocks.
//!
//! Rows lie in the formats of the cache specification, byte for byte, so that a snapshot or a disk
//! tier can copy them and a device backend can be compared with them. One difference: an FP8 row
//! is 584 consecutive bytes here; a device page keeps its data part and its scale part apart.
//!
//! Invariant: everything is addressed by position or by block id; nothing needs a reset.

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, NOPE_DIM};
use fathom_core::num::{
    Ue8m0, e2m1_from_f32, e2m1_to_f32, e4m3_from_f32, fp4_block_scale, fp8_block_scale,
};
use half::bf16;

use crate::cache_spec::{BLOCK_TOKENS, CacheSpec};
use crate::cpu::quant::{INDEX_BLOCK, KV_BLOCK, quantise_index, quantise_kv};
use crate::cpu::simd::simd_fn;
use crate::row_formats::{IndexKeyFormat, KvFormat};

/// A layer's stores.
#[derive(Debug)]
pub(crate) struct LayerCache {
    pub(crate) kind: LayerKind,
    /// `[n_slots][window_rows]` KV rows.
    pub(crate) window: Vec<u8>,
    /// This step's KV rows as they will enter the window.
    pub(crate) pending: Vec<u8>,
    /// `[n_blocks][rows_per_block]` KV rows.
    pub(crate) entries: Vec<u8>,
    /// `[n_blocks][rows_per_block]` indexer keys.
    pub(crate) keys: Vec<u8>,
    /// Compressor state of attention and of the indexer.
    pub(crate) state: StateRing,
    pub(crate) key_state: StateRing,
}

/// Raw `u` and `s` (with `ape`) rows of a compressor: `[n_slots][rows]`, by position.
#[derive(Debug)]
pub(crate) struct StateRing {
    rows: usize,
    width: usize,
    u: Vec<f32>,
    s: Vec<f32>,
}

impl StateRing {
    fn new(n_slots: usize, rows: usize, width: usize) -> Self {
        let len = n_slots * rows * width;
        Self { rows, width, u: vec![0.0; len], s: vec![0.0; len] }
    }

    fn start(&self, slot: usize, position: usize) -> usize {
        (slot * self.rows + position % self.rows) * self.width
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of `position` in `slot`.
    pub(crate) fn get(&self, slot: usize, position: usize) -> (&[f32], &[f32]) {
        let start = self.start(slot, position);
        (&self.u[start..start + self.width], &self.s[start..start + self.width])
    }

    pub(crate) fn get_mut(&mut self, slot: usize, position: usize) -> (&mut [f32], &mut [f32]) {
        let range = self.start(slot, position);
        let range = range..range + self.width;
        (&mut self.u[range.clone()], &mut self.s[range])
    }

    pub(crate) fn put(&mut self, slot: usize, position: usize, u: &[f32], s: &[f32]) {
        let start = self.start(slot, position);
        self.u[start..start + self.width].copy_from_slice(u);
        self.s[start..start + self.width].copy_from_slice(s);
    }
}

/// All cache stores of one rank.
#[derive(Debug)]
pub struct CpuCache {
    pub(crate) spec: CacheSpec,
    pub(crate) layers: Vec<LayerCache>,
    /// `[n_slots][copies_rows]` rows of copies.
    copies: Vec<u8>,
    /// `[n_snapshots]`, each [`CacheSpec::snapshot_bytes`]; empty until first captured.
    pub(crate) snapshots: Vec<Vec<u8>>,
}

impl CpuCache {
    /// Zeroed stores for `spec`.
    #[must_use]
    pub fn new(spec: &CacheSpec) -> Self {
        let layer = |&kind: &LayerKind| {
            let rows = CacheSpec::rows_per_block(kind) * spec.n_blocks;
            let width = kind.compressor_width();
            let (state_rows, indexed) = (spec.state_rows(kind), usize::from(kind.has_indexer()));
            LayerCache {
                kind,
                window: vec![0; spec.n_slots * spec.window_rows() * spec.kv.row_bytes()],
                pending: Vec::new(),
                entries: vec![0; rows * spec.kv.row_bytes()],
                keys: vec![0; rows * indexed * spec.index_keys.row_bytes()],
                state: StateRing::new(spec.n_slots, state_rows, width * HEAD_DIM),
                key_state: StateRing::new(
                    spec.n_slots,
                    state_rows * indexed,
                    width * INDEX_HEAD_DIM,
                ),
            }
        };
        Self {
            spec: spec.clone(),
            layers: spec.layers.iter().map(layer).collect(),
            copies: vec![0; spec.n_slots * spec.copies_rows() * spec.copies_row_bytes()],
            snapshots: vec![Vec::new(); spec.n_snapshots],
        }
    }

    /// The geometry this cache was made for.
    #[must_use]
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Stored bytes of the window row of `position`.
    pub(crate) fn window_row(&self, layer: usize, slot: usize, position: usize) -> &[u8] {
        let (ring, bytes) = (self.spec.window_rows(), self.spec.kv.row_bytes());
        let start = (slot * ring + position % ring) * bytes;
        &self.layers[layer].window[start..start + bytes]
    }

    /// The same, to write.
    pub(crate) fn window_row_mut(
        &mut self,
        layer: usize,
        slot: usize,
        position: usize,
    ) -> &mut [u8] {
        let (ring, bytes) = (self.spec.window_rows(), self.spec.kv.row_bytes());
        let start = (slot * ring + position % ring) * bytes;
        &mut self.layers[layer].window[start..start + bytes]
    }

    /// Copies row `row` of the pending rows into the window ring.
    pub(crate) fn commit_window_row(
        &mut self,
        layer: usize,
        slot: usize,
        position: usize,
        row: usize,
    ) {
        let (ring, bytes) = (self.spec.window_rows(), self.spec.kv.row_bytes());
        let start = (slot * ring + position % ring) * bytes;
        let LayerCache { window, pending, .. } = &mut self.layers[layer];
        window[start..start + bytes].copy_from_slice(&pending[row * bytes..(row + 1) * bytes]);
    }

    fn copies_range(&self, slot: usize, position: usize) -> std::ops::Range<usize> {
        let (rows, bytes) = (self.spec.copies_rows(), self.spec.copies_row_bytes());
        let start = (slot * rows + position % rows) * bytes;
        start..start + bytes
    }

    /// Stored bytes of the copies of `position`; there must be a ring of copies.
    pub(crate) fn copies_row(&self, slot: usize, position: usize) -> &[u8] {
        &self.copies[self.copies_range(slot, position)]
    }

    /// The same, to write.
    pub(crate) fn copies_row_mut(&mut self, slot: usize, position: usize) -> &mut [u8] {
        let range = self.copies_range(slot, position);
        &mut self.copies[range]
    }

    /// Stores the copies of `position`, `[draft_width]`.
    pub(crate) fn keep_copies(&mut self, slot: usize, position: usize, values: &[f32]) {
        let put = if self.spec.has_f32_copies() { put_f32 } else { put_bf16 };
        put(values, self.copies_row_mut(slot, position));
    }

    /// Reads what [`keep_copies`](Self::keep_copies) stored.
    pub(crate) fn kept_copies(&self, slot: usize, position: usize, out: &mut [f32]) {
        let get = if self.spec.has_f32_copies() { get_f32 } else { get_bf16 };
        get(self.copies_row(slot, position), out);
    }

    fn row_range(
        &self,
        layer: usize,
        blocks: &[u32],
        entry: usize,
        bytes: usize,
    ) -> std::ops::Range<usize> {
        let per_block = CacheSpec::rows_per_block(self.layers[layer].kind);
        let row = blocks[entry / per_block] as usize * per_block + entry % per_block;
        row * bytes..(row + 1) * bytes
    }

    /// Stored bytes of compressed entry `entry` of the sequence with `blocks`.
    pub(crate) fn entry(&self, layer: usize, blocks: &[u32], entry: usize) -> &[u8] {
        &self.layers[layer].entries[self.row_range(layer, blocks, entry, self.spec.kv.row_bytes())]
    }

    pub(crate) fn entry_mut(&mut self, layer: usize, blocks: &[u32], entry: usize) -> &mut [u8] {
        let range = self.row_range(layer, blocks, entry, self.spec.kv.row_bytes());
        &mut self.layers[layer].entries[range]
    }

    /// Stored bytes of indexer key `entry`.
    pub(crate) fn key(&self, layer: usize, blocks: &[u32], entry: usize) -> &[u8] {
        let bytes = self.spec.index_keys.row_bytes();
        &self.layers[layer].keys[self.row_range(layer, blocks, entry, bytes)]
    }

    pub(crate) fn key_mut(&mut self, layer: usize, blocks: &[u32], entry: usize) -> &mut [u8] {
        let range = self.row_range(layer, blocks, entry, self.spec.index_keys.row_bytes());
        &mut self.layers[layer].keys[range]
    }

    /// Entries that `blocks` can hold in `layer`.
    pub(crate) fn capacity(&self, layer: usize, n_blocks: usize) -> usize {
        self.layers[layer].kind.n_entries(n_blocks * BLOCK_TOKENS)
    }
}

/// Stores a KV row that is *not* yet quantised. Formats wider than FP8 get the simulated values if
/// the numeric mode `quantises`; afterwards `values` holds what a later read returns.
pub(crate) fn store_kv(format: KvFormat, quantises: bool, values: &mut [f32], out: &mut [u8]) {
    if quantises && format != KvFormat::Fp8 {
        quantise_kv(&mut values[..NOPE_DIM]);
    }
    pack_kv(format, values, out);
    if format != KvFormat::F32 {
        unpack_kv(format, out, values);
    }
}

/// The same for an indexer key.
pub(crate) fn store_key(
    format: IndexKeyFormat,
    quantises: bool,
    values: &mut [f32],
    out: &mut [u8],
) {
    if quantises && format != IndexKeyFormat::Mxfp4 {
        quantise_index(values);
    }
    pack_key(format, values, out);
}

/// Packs a KV row; FP8 quantises from the given values.
fn pack_kv(format: KvFormat, values: &[f32], out: &mut [u8]) {
    match format {
        KvFormat::F32 => put_f32(values, out),
        KvFormat::Bf16 => put_bf16(values, out),
        KvFormat::Fp8 => {
            let (nope, rope) = values.split_at(NOPE_DIM);
            let (codes, rest) = out.split_at_mut(NOPE_DIM);
            let (rope_bytes, scales) = rest.split_at_mut(2 * rope.len());
            put_bf16(rope, rope_bytes);
            scales.fill(0);
            for ((block, codes), scale) in
                nope.chunks_exact(KV_BLOCK).zip(codes.chunks_exact_mut(KV_BLOCK)).zip(scales)
            {
                let factor = fp8_block_scale(block.iter().fold(0.0, |m, x| x.abs().max(m)));
                *scale = factor.byte();
                let inverse = Ue8m0::from_exponent(-factor.exponent()).to_f32();
                for (code, x) in codes.iter_mut().zip(block) {
                    *code = e4m3_from_f32(x * inverse);
                }
            }
        }
    }
}

/// Unpacks a KV row of 512 channels.
pub(crate) fn unpack_kv(format: KvFormat, row: &[u8], out: &mut [f32]) {
    match format {
        KvFormat::F32 => get_f32(row, out),
        KvFormat::Bf16 => get_bf16(row, out),
        KvFormat::Fp8 => {
            let (codes, rest) = row.split_at(NOPE_DIM);
            let (nope, rope) = out.split_at_mut(NOPE_DIM);
            let (rope_bytes, scales) = rest.split_at(2 * rope.len());
            get_bf16(rope_bytes, rope);
            for ((codes, out), scale) in
                codes.chunks_exact(KV_BLOCK).zip(nope.chunks_exact_mut(KV_BLOCK)).zip(scales)
            {
                let factor = Ue8m0::from_exponent(i32::from(*scale) - 127).to_f32();
                unpack_codes(codes, factor, out);
            }
        }
    }
}

simd_fn! {
    /// `out = code * factor`, as [`fathom_core::num::e4m3_to_f32`] has it, without a table.
    fn unpack_codes(codes: &[u8], factor: f32, out: &mut [f32]) {
        // Sign to bit 31, exponent and mantissa to bits 20..27: too small by 2^120.
        let scale = f32::from_bits((120 + 127) << 23);
        for (out, code) in out.iter_mut().zip(codes) {
            let spread = ((u32::from(*code) << 24) as i32 >> 4) as u32 & 0x87f0_0000;
            let value = f32::from_bits(spread) * scale * factor;
            *out = if *code & 0x7f == 0x7f { f32::NAN } else { value };
        }
    }
}

/// The scale of a whole key: the smallest power of two not below `amax / 448`. No floor like that of
/// activations: small FP4 values are exact, and must stay so. Two exponents above the smallest normal
/// number keep the inverse normal.
fn fp8_key_scale(amax: f32) -> Ue8m0 {
    Ue8m0::ceil((amax * (1.0 / 448.0)).max(4.0 * f32::MIN_POSITIVE))
}

/// Packs an indexer key; MXFP4 quantises from the given values.
fn pack_key(format: IndexKeyFormat, values: &[f32], out: &mut [u8]) {
    match format {
        IndexKeyFormat::F32 => put_f32(values, out),
        IndexKeyFormat::Bf16 => put_bf16(values, out),
        IndexKeyFormat::Fp8 => {
            let (codes, scale) = out.split_at_mut(INDEX_HEAD_DIM);
            let factor = fp8_key_scale(values.iter().fold(0.0, |m, x| x.abs().max(m)));
            scale.copy_from_slice(&factor.to_f32().to_le_bytes());
            let inverse = Ue8m0::from_exponent(-factor.exponent()).to_f32();
            for (code, x) in codes.iter_mut().zip(values) {
                *code = e4m3_from_f32(x * inverse);
            }
        }
        IndexKeyFormat::Mxfp4 => {
            let (codes, scales) = out.split_at_mut(INDEX_HEAD_DIM / 2);
            for ((block, codes), scale) in values
                .chunks_exact(INDEX_BLOCK)
                .zip(codes.chunks_exact_mut(INDEX_BLOCK / 2))
                .zip(scales)
            {
                let factor = fp4_block_scale(block.iter().fold(0.0, |m, x| x.abs().max(m)));
                *scale = factor.byte();
                let inverse = Ue8m0::from_exponent(-factor.exponent()).to_f32();
                let (pairs, _) = block.as_chunks::<2>();
                for (code, [low, high]) in codes.iter_mut().zip(pairs) {
                    *code = e2m1_from_f32(low * inverse) | e2m1_from_f32(high * inverse) << 4;
                }
            }
        }
    }
}

/// Unpacks an indexer key of 128 channels.
pub(crate) fn unpack_key(format: IndexKeyFormat, row: &[u8], out: &mut [f32]) {
    match format {
        IndexKeyFormat::F32 => get_f32(row, out),
        IndexKeyFormat::Bf16 => get_bf16(row, out),
        IndexKeyFormat::Fp8 => {
            let (codes, scale) = row.split_at(INDEX_HEAD_DIM);
            let factor = scale.first_chunk().map_or(0.0, |bytes| f32::from_le_bytes(*bytes));
            unpack_codes(codes, factor, out);
        }
        IndexKeyFormat::Mxfp4 => {
            let (codes, scales) = row.split_at(INDEX_HEAD_DIM / 2);
            for ((codes, out), scale) in codes
                .chunks_exact(INDEX_BLOCK / 2)
                .zip(out.chunks_exact_mut(INDEX_BLOCK))
                .zip(scales)
            {
                let factor = Ue8m0::from_exponent(i32::from(*scale) - 127).to_f32();
                let (pairs, _) = out.as_chunks_mut::<2>();
                for ([low, high], code) in pairs.iter_mut().zip(codes) {
                    *low = e2m1_to_f32(*code) * factor;
                    *high = e2m1_to_f32(code >> 4) * factor;
                }
            }
        }
    }
}

fn put_f32(values: &[f32], out: &mut [u8]) {
    let (chunks, _) = out.as_chunks_mut::<4>();
    chunks.iter_mut().zip(values).for_each(|(out, x)| *out = x.to_le_bytes());
}

fn get_f32(row: &[u8], out: &mut [f32]) {
    let (chunks, _) = row.as_chunks::<4>();
    out.iter_mut().zip(chunks).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
}

fn put_bf16(values: &[f32], out: &mut [u8]) {
    let (chunks, _) = out.as_chunks_mut::<2>();
    chunks.iter_mut().zip(values).for_each(|(out, x)| *out = bf16::from_f32(*x).to_le_bytes());
}

fn get_bf16(row: &[u8], out: &mut [f32]) {
    let (chunks, _) = row.as_chunks::<2>();
    out.iter_mut().zip(chunks).for_each(|(out, b)| *out = bf16::from_le_bytes(*b).to_f32());
}

/// KV rows as the stores keep them: for the tests of what moves them.
#[cfg(test)]
pub(crate) fn pack_rows(format: KvFormat, values: &[f32]) -> Vec<u8> {
    let mut rows = vec![0xff; values.len() / HEAD_DIM * format.row_bytes()];
    let both = rows.chunks_exact_mut(format.row_bytes()).zip(values.chunks_exact(HEAD_DIM));
    both.for_each(|(row, values)| pack_kv(format, values, row));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use fathom_core::num::{e4m3_to_f32, round_bf16};
    use proptest::prelude::*;

    #[test]
    fn every_code_unpacks_to_its_value_also_the_nans() {
        let codes: Vec<u8> = (0..=255).collect();
        for exponent in [-100, -7, 0, 3] {
            let factor = 2.0_f32.powi(exponent);
            let mut got = [0.0; 256];
            unpack_codes(&codes, factor, &mut got);
            for (code, got) in codes.iter().zip(got) {
                let expected = e4m3_to_f32(*code) * factor;
                assert!(
                    got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                    "{code}: {got} instead of {expected}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn an_fp8_row_is_bit_equal_to_the_quantisation_simulation(
            values in prop::collection::vec(-30.0_f32..30.0, HEAD_DIM),
            magnitude in -12_i32..12,
        ) {
            let scale = 2.0_f32.powi(magnitude);
            let values: Vec<f32> = values.iter().map(|x| round_bf16(x * scale)).collect();
            let mut expected = values.clone();
            quantise_kv(&mut expected[..NOPE_DIM]);
            let mut row = vec![0xff; KvFormat::Fp8.row_bytes()];
            pack_kv(KvFormat::Fp8, &values, &mut row);
            let mut got = vec![0.0; HEAD_DIM];
            unpack_kv(KvFormat::Fp8, &row, &mut got);
            prop_assert_eq!(got, expected);
            prop_assert_eq!(row[583], 0, "the pad byte");
        }

        #[test]
        fn an_fp8_key_holds_fp4_values_whose_blocks_are_within_two_to_the_fourteenth(
            values in prop::collection::vec(-6.0_f32..6.0, INDEX_HEAD_DIM),
            least in -100_i32..100,
            exponents in prop::collection::vec(0..=13_i32, INDEX_HEAD_DIM / INDEX_BLOCK),
        ) {
            let mut values = values;
            for (block, exponent) in values.chunks_mut(INDEX_BLOCK).zip(&exponents) {
                // At least one value close to the largest: the blocks' scales are as drawn.
                block[0] = 5.9;
                block.iter_mut().for_each(|x| *x *= 2.0_f32.powi(least + exponent));
            }
            quantise_index(&mut values);
            let mut row = vec![0xff; IndexKeyFormat::Fp8.row_bytes()];
            pack_key(IndexKeyFormat::Fp8, &values, &mut row);
            let mut got = vec![0.0; INDEX_HEAD_DIM];
            unpack_key(IndexKeyFormat::Fp8, &row, &mut got);
            prop_assert_eq!(got, values);
            let scale = f32::from_le_bytes(*row.last_chunk().unwrap());
            prop_assert_eq!(scale.to_bits() & 0x007f_ffff, 0, "a power of two");
        }

        #[test]
        fn an_mxfp4_key_is_bit_equal_to_the_quantisation_simulation(
            values in prop::collection::vec(-3.0_f32..3.0, INDEX_HEAD_DIM),
        ) {
            let mut expected = values.clone();
            quantise_index(&mut expected);
            let mut row = vec![0; IndexKeyFormat::Mxfp4.row_bytes()];
            pack_key(IndexKeyFormat::Mxfp4, &values, &mut row);
            let mut got = vec![0.0; INDEX_HEAD_DIM];
            unpack_key(IndexKeyFormat::Mxfp4, &row, &mut got);
            prop_assert_eq!(got, expected);
        }
    }
}
