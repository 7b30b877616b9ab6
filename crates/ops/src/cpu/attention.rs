//! Sparse attention of one layer: window and compressed rows in one softmax, with sinks.
//!
//! Keys of a row in order: window positions ascending, then compressed entries ascending; both
//! parts are cut into blocks of 64 for the online softmax, as in the official kernel. The order
//! follows from the position alone.
//!
//! Source: `Attention.forward` and `sparse_attn` of the official release.

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use fathom_core::num::round_bf16;
use rayon::prelude::*;

use crate::cpu::cache::{CpuCache, unpack_kv};
use crate::cpu::rope::Rotation;
use crate::cpu::simd::{LANES, exp, simd_fn, sum_lanes};
use crate::cpu::tensor::HostTensor;
use crate::cpu::{CpuOps, in_parallel};
use crate::layer::AttentionWeights;
use crate::{Batch, OpError, SequenceSlice};

use super::indexer::Selection;

/// One key that is also its value.
type KvRow = [f32; HEAD_DIM];

/// Keys per step of the online softmax.
const KEY_BLOCK: usize = 64;

/// Scale of the scores: `512^-0.5`.
const SOFTMAX_SCALE: f32 = 0.044_194_173;

/// Running state of one head's online softmax.
struct Head<'a> {
    q: &'a [f32; HEAD_DIM],
    acc: &'a mut [f32; HEAD_DIM],
    max: f32,
    sum: f32,
}

simd_fn! {
    /// Folds one block of keys into a head.
    fn fold_block(head: &mut Head<'_>, keys: &[&KvRow], is_bf16: bool) {
        let mut scores = [0.0_f32; KEY_BLOCK];
        let (fours, rest) = keys.as_chunks::<4>();
        for (keys, scores) in fours.iter().zip(scores.chunks_exact_mut(4)) {
            let mut lanes = [[0.0_f32; LANES]; 4];
            for step in 0..HEAD_DIM / LANES {
                let range = step * LANES..(step + 1) * LANES;
                let q = &head.q[range.clone()];
                for (lanes, key) in lanes.iter_mut().zip(keys) {
                    let key = &key[range.clone()];
                    for lane in 0..LANES {
                        lanes[lane] = q[lane].mul_add(key[lane], lanes[lane]);
                    }
                }
            }
            for (score, lanes) in scores.iter_mut().zip(lanes) {
                *score = sum_lanes(lanes) * SOFTMAX_SCALE;
            }
        }
        let done = keys.len() - rest.len();
        for (key, score) in rest.iter().zip(&mut scores[done..]) {
            *score = crate::cpu::simd::dot(head.q, *key) * SOFTMAX_SCALE;
        }
        let scores = &mut scores[..keys.len()];

        let max = scores.iter().copied().fold(head.max, f32::max);
        let rescale = exp(head.max - max);
        head.max = max;
        let mut sum = 0.0_f32;
        for score in scores.iter_mut() {
            *score = exp(*score - max);
            sum += *score;
            if is_bf16 {
                *score = round_bf16(*score);
            }
        }
        head.sum = head.sum.mul_add(rescale, sum);
        for acc in head.acc.iter_mut() {
            *acc *= rescale;
        }
        let (weights, weights_rest) = scores.as_chunks::<4>();
        for (keys, w) in fours.iter().zip(weights) {
            for (channel, acc) in head.acc.iter_mut().enumerate() {
                let sum = w[0].mul_add(keys[0][channel], *acc);
                let sum = w[1].mul_add(keys[1][channel], sum);
                let sum = w[2].mul_add(keys[2][channel], sum);
                *acc = w[3].mul_add(keys[3][channel], sum);
            }
        }
        for (key, w) in rest.iter().zip(weights_rest) {
            for (acc, v) in head.acc.iter_mut().zip(*key) {
                *acc = w.mul_add(*v, *acc);
            }
        }
    }
}

/// Attention of one head over `window`, then `compressed`; writes the normalised output.
///
/// The sink takes part in the final maximum, so a sink far above every score cannot overflow.
pub(crate) fn attend_head(
    q: &KvRow,
    sink: f32,
    window: &[&KvRow],
    compressed: &[&KvRow],
    is_bf16: bool,
    out: &mut KvRow,
) {
    out.fill(0.0);
    let mut head = Head { q, acc: out, max: f32::NEG_INFINITY, sum: 0.0 };
    for block in window.chunks(KEY_BLOCK).chain(compressed.chunks(KEY_BLOCK)) {
        fold_block(&mut head, block, is_bf16);
    }
    let max = head.max.max(sink);
    let rescale = exp(head.max - max);
    let denominator = head.sum.mul_add(rescale, exp(sink - max));
    for value in head.acc.iter_mut() {
        let y = *value * rescale / denominator;
        *value = if is_bf16 { round_bf16(y) } else { y };
    }
}

/// All KV rows a sequence's rows may need, unpacked.
struct SequenceKeys {
    /// Position of `window[0]`.
    first: usize,
    window: Vec<KvRow>,
    /// Every visible entry of a ratio-128 layer; empty on others.
    entries: Vec<KvRow>,
}

impl CpuOps {
    /// Sparse attention; see [`AttentionOps::attend`](crate::AttentionOps::attend).
    #[expect(clippy::too_many_arguments, reason = "the inputs of one fused operator")]
    pub(crate) fn sparse_attention(
        &self,
        weights: &AttentionWeights<Self>,
        q: &HostTensor,
        kv: &HostTensor,
        selection: Option<&Selection>,
        batch: &Batch,
        cache: &mut CpuCache,
        layer: usize,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "sparse_attention";
        let n_tokens = batch.n_tokens();
        q.expect(OP, "q", n_tokens, weights.n_heads * HEAD_DIM)?;
        kv.expect(OP, "kv", n_tokens, HEAD_DIM)?;
        crate::error::check_len(OP, "attn_sink", weights.attn_sink.len(), weights.n_heads)?;
        if let Some(selection) = selection {
            crate::error::check_len(OP, "selection", selection.rows.len(), n_tokens)?;
        }
        let mut out = HostTensor::zeros(n_tokens, q.cols);
        for sequence in &batch.sequences {
            let keys = sequence_keys(kv, sequence, batch.blocks_of(sequence), cache, layer);
            let rows = sequence.rows();
            let out = &mut out.data[rows.start * q.cols..rows.end * q.cols];
            let row = |(row, out): (usize, &mut [f32])| {
                self.attend_row(
                    weights, q, selection, batch, sequence, cache, layer, &keys, row, out,
                );
            };
            if rows.len() > 1 {
                out.par_chunks_exact_mut(q.cols).enumerate().for_each(row);
            } else {
                out.chunks_exact_mut(q.cols).enumerate().for_each(row);
            }
        }
        for sequence in &batch.sequences {
            let keep = sequence.positions().len().min(cache.spec.window_rows());
            for (row, position) in sequence.rows().zip(sequence.positions()).rev().take(keep) {
                cache.commit_window_row(layer, sequence.slot as usize, position, row);
            }
        }
        Ok(out)
    }

    #[expect(clippy::too_many_arguments, reason = "the inputs of one fused operator")]
    fn attend_row(
        &self,
        weights: &AttentionWeights<Self>,
        q: &HostTensor,
        selection: Option<&Selection>,
        batch: &Batch,
        sequence: &SequenceSlice,
        cache: &CpuCache,
        layer: usize,
        keys: &SequenceKeys,
        offset: usize,
        out: &mut [f32],
    ) {
        let position = sequence.position as usize + offset;
        let row = sequence.row as usize + offset;
        let kind = cache.layers[layer].kind;
        let window_first = (position + 1).saturating_sub(WINDOW);
        let window: Vec<&KvRow> =
            keys.window[window_first - keys.first..=position - keys.first].iter().collect();
        let gathered: Vec<KvRow> = match (kind, selection) {
            (LayerKind::Csa, Some(selection)) => selection.rows[row]
                .iter()
                .map(|&entry| {
                    let mut values = [0.0; HEAD_DIM];
                    let stored = cache.entry(layer, batch.blocks_of(sequence), entry as usize);
                    unpack_kv(cache.spec.kv, stored, &mut values);
                    values
                })
                .collect(),
            _ => Vec::new(),
        };
        let compressed: Vec<&KvRow> = match kind {
            LayerKind::Hca => keys.entries[..kind.n_entries(position + 1)].iter().collect(),
            _ => gathered.iter().collect(),
        };
        let is_bf16 = self.is_bf16();
        let rotation = Rotation::at(position, &weights.rope);
        let (heads, _) = q.row(row).as_chunks::<HEAD_DIM>();
        let (outs, _) = out.as_chunks_mut::<HEAD_DIM>();
        let sinks: &[f32] = &weights.attn_sink;
        let head = |((q, sink), out): ((&KvRow, &f32), &mut KvRow)| {
            attend_head(q, *sink, &window, &compressed, is_bf16, out);
            rotation.apply_inverse(out, is_bf16);
        };
        let work = heads.len() * (window.len() + compressed.len()) * HEAD_DIM;
        // A single row of a long context: share its heads among the threads.
        if sequence.n_tokens == 1 && work > 2 * super::INLINE_WORK {
            heads.par_iter().zip(sinks).zip(outs.par_iter_mut()).for_each(head);
        } else {
            heads.iter().zip(sinks).zip(outs).for_each(head);
        }
    }

    /// `q` per head: norm, rope. In place.
    pub(crate) fn finish_queries(
        &self,
        q: &mut HostTensor,
        batch: &Batch,
        rope: &[f32],
        eps: Option<f32>,
        head_dim: usize,
    ) {
        let positions = batch.positions();
        let is_bf16 = self.is_bf16();
        let quantises = self.numerics.quantises();
        super::tensor::for_each_row(q, |row, q| {
            let rotation = Rotation::at(positions[row], rope);
            for head in q.chunks_exact_mut(head_dim) {
                if let Some(eps) = eps {
                    super::norm::head_norm(head, eps, is_bf16);
                }
                rotation.apply(head, is_bf16);
                if let Ok(index) = <&mut [f32; INDEX_HEAD_DIM]>::try_from(&mut *head) {
                    super::quant::hadamard(index, is_bf16);
                    if quantises {
                        super::quant::quantise_index(index);
                    }
                }
            }
        });
    }
}

/// Unpacks the window rows before this step and, on ratio-128 layers, every visible entry.
fn sequence_keys(
    kv: &HostTensor,
    sequence: &SequenceSlice,
    blocks: &[u32],
    cache: &CpuCache,
    layer: usize,
) -> SequenceKeys {
    let positions = sequence.positions();
    let first = (positions.start + 1).saturating_sub(WINDOW);
    let format = cache.spec.kv;
    let unpack = |stored: &[u8]| {
        let mut values = [0.0; HEAD_DIM];
        unpack_kv(format, stored, &mut values);
        values
    };
    let mut window: Vec<KvRow> = (first..positions.start)
        .map(|position| unpack(cache.window_row(layer, sequence.slot as usize, position)))
        .collect();
    window.extend(sequence.rows().map(|row| {
        let mut values = [0.0; HEAD_DIM];
        values.copy_from_slice(kv.row(row));
        values
    }));
    let entries = match cache.layers[layer].kind {
        kind @ LayerKind::Hca => {
            let n_entries = kind.n_entries(positions.end);
            in_parallel(n_entries * HEAD_DIM, 0..n_entries, |entry| {
                unpack(cache.entry(layer, blocks, entry))
            })
        }
        _ => Vec::new(),
    };
    SequenceKeys { first, window, entries }
}

/// Attention of one head over a plain list of keys: the operator without a cache, as the unit
/// goldens have it. `window` are the first keys, `compressed` the rest.
#[must_use]
pub fn attend_single(q: &KvRow, sink: f32, window: &[KvRow], compressed: &[KvRow]) -> KvRow {
    let mut out = [0.0; HEAD_DIM];
    attend_head(
        q,
        sink,
        &window.iter().collect::<Vec<_>>(),
        &compressed.iter().collect::<Vec<_>>(),
        false,
        &mut out,
    );
    out
}
