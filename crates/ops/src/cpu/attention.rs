//! Sparse attention of one layer: window and compressed rows in one softmax, with sinks.
//!
//! Keys of a row in order: window positions ascending, then compressed entries ascending; both
//! parts are cut into blocks of 64 for the online softmax, as in the official kernel. The order
//! follows from the position alone.
//!
//! Source: `Attention.forward` and `sparse_attn` of the official release.

use std::cell::Cell;

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use rayon::prelude::*;

use crate::cpu::CpuOps;
use crate::cpu::cache::{CpuCache, unpack_kv};
use crate::cpu::heads::{HEADS, Heads, KEY_BLOCK, KvRow};
use crate::cpu::rope::Rotation;
use crate::cpu::tensor::HostTensor;
use crate::layer::AttentionWeights;
use crate::row_formats::KvFormat;
use crate::{Batch, OpError, SequenceSlice};

use super::indexer::Selection;

/// Rows that are worth a thread of their own to unpack: some microseconds.
const UNPACKED: usize = 32;

/// Multiply-adds from which one row's heads are shared among threads: about 10 us of one.
const SHARED_WORK: usize = 128 * 1024;

/// Attention of some heads over `window`, then `compressed`; writes the normalised outputs.
pub(crate) fn attend_heads(
    q: &[KvRow],
    sinks: &[f32],
    window: &[&KvRow],
    compressed: &[&KvRow],
    is_bf16: bool,
    out: &mut [KvRow],
) {
    let groups = q.chunks(HEADS).zip(sinks.chunks(HEADS)).zip(out.chunks_mut(HEADS));
    for ((q, sinks), out) in groups {
        let mut heads = Heads::new(q, out);
        for block in window.chunks(KEY_BLOCK).chain(compressed.chunks(KEY_BLOCK)) {
            heads.fold(block, is_bf16);
        }
        heads.finish(sinks, is_bf16);
    }
}

thread_local! {
    /// Memory for unpacked rows, kept from call to call: fresh memory costs more than unpacking.
    static KEYS: Cell<SequenceKeys> = const {
        Cell::new(SequenceKeys { first: 0, window: Vec::new(), entries: Vec::new() })
    };
    static GATHERED: Cell<Vec<KvRow>> = const { Cell::new(Vec::new()) };
}

/// All KV rows a sequence's rows may need, unpacked. Rows that are read where they lie are not here.
#[derive(Default)]
struct SequenceKeys {
    /// Position of `window[0]`.
    first: usize,
    /// The rows from before this step.
    window: Vec<KvRow>,
    /// Every visible entry of a ratio-128 layer; empty on others.
    entries: Vec<KvRow>,
}

/// A stored row as it is, if its format is that of unpacked rows.
fn in_place(format: KvFormat, row: &[u8]) -> Option<&KvRow> {
    let is_same = format == KvFormat::F32 && cfg!(target_endian = "little");
    // Memory that happens not to be aligned is copied like the other formats.
    if is_same { bytemuck::try_from_bytes(row).ok() } else { None }
}

/// What one row of a step asks for.
struct Query<'a> {
    heads: &'a [KvRow],
    /// Entries that the indexer chose; none on other layers.
    chosen: &'a [u32],
    /// Its row in the batch.
    row: usize,
    /// No other row of its sequence asks.
    is_alone: bool,
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
        let step_rows = batch.step_rows(OP, "q", q.rows)?;
        q.expect(OP, "q", q.rows, weights.n_heads * HEAD_DIM)?;
        kv.expect(OP, "kv", batch.n_tokens(), HEAD_DIM)?;
        crate::error::check_len(OP, "attn_sink", weights.attn_sink.len(), weights.n_heads)?;
        if let Some(selection) = selection {
            crate::error::check_len(OP, "selection", selection.rows.len(), q.rows)?;
        }
        let mut out = HostTensor::unset(q.rows, q.cols);
        for sequence in &batch.sequences {
            let rows = step_rows.of(sequence);
            if rows.is_empty() {
                continue;
            }
            let mut keys = KEYS.take();
            keys.fill(sequence, batch.blocks_of(sequence), cache, layer);
            let out = &mut out.data[rows.start * q.cols..rows.end * q.cols];
            let is_alone = rows.len() == 1;
            let row = |(index, out): (usize, &mut [f32])| {
                let number = rows.start + index;
                let query = Query {
                    heads: q.row(number).as_chunks().0,
                    chosen: selection.map_or(&[], |selection| &selection.rows[number]),
                    row: step_rows.row(number),
                    is_alone,
                };
                self.attend_row(weights, &query, kv, batch, sequence, cache, layer, &keys, out);
            };
            if !is_alone {
                out.par_chunks_exact_mut(q.cols).enumerate().for_each(row);
            } else {
                out.chunks_exact_mut(q.cols).enumerate().for_each(row);
            }
            KEYS.set(keys);
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
        query: &Query<'_>,
        kv: &HostTensor,
        batch: &Batch,
        sequence: &SequenceSlice,
        cache: &CpuCache,
        layer: usize,
        keys: &SequenceKeys,
        out: &mut [f32],
    ) {
        let Query { heads, chosen, row, is_alone } = *query;
        let start = sequence.position as usize;
        let position = start + row - sequence.row as usize;
        let (kind, format) = (cache.layers[layer].kind, cache.spec.kv);
        let window_first = (position + 1).saturating_sub(WINDOW);
        let slot = sequence.slot as usize;
        let cached = (window_first..start).map(|position| {
            let stored = cache.window_row(layer, slot, position);
            in_place(format, stored).unwrap_or_else(|| &keys.window[position - keys.first])
        });
        let (own, _) = kv.data.as_chunks::<HEAD_DIM>();
        let own = &own[row + window_first.max(start) - position..=row];
        let window: Vec<&KvRow> = cached.chain(own).collect();
        let blocks = batch.blocks_of(sequence);
        let mut gathered = GATHERED.take();
        // Every row that is read is written below; what an earlier call left is not cleared first.
        gathered.resize(chosen.len(), [0.0; HEAD_DIM]);
        let chosen_row = |index: usize| cache.entry(layer, blocks, chosen[index] as usize);
        fill_rows(&mut gathered, is_alone, format, chosen_row);
        let compressed: Vec<&KvRow> = match kind {
            LayerKind::Hca => (0..kind.n_entries(position + 1))
                .map(|entry| {
                    let stored = cache.entry(layer, blocks, entry);
                    in_place(format, stored).unwrap_or_else(|| &keys.entries[entry])
                })
                .collect(),
            _ => gathered
                .iter()
                .enumerate()
                .map(|(index, row)| in_place(format, chosen_row(index)).unwrap_or(row))
                .collect(),
        };
        let is_bf16 = self.is_bf16();
        let rotation = Rotation::at(position, &weights.rope);
        let (outs, _) = out.as_chunks_mut::<HEAD_DIM>();
        let sinks: &[f32] = &weights.attn_sink;
        let attend = |((q, sinks), out): ((&[KvRow], &[f32]), &mut [KvRow])| {
            attend_heads(q, sinks, &window, &compressed, is_bf16, out);
            for out in out {
                rotation.apply_inverse(out, is_bf16);
            }
        };
        let work = heads.len() * (window.len() + compressed.len()) * HEAD_DIM;
        // A single row of a long context: share its heads among the threads.
        if is_alone && work > SHARED_WORK {
            let each = heads.len().div_ceil(rayon::current_num_threads()).min(HEADS);
            let parts = heads.par_chunks(each).zip(sinks.par_chunks(each));
            parts.zip(outs.par_chunks_mut(each)).for_each(attend);
        } else {
            attend(((heads, sinks), outs));
        }
        GATHERED.set(gathered);
    }

    /// `q` per head, of the tokens at `positions`: norm, rope. In place.
    pub(crate) fn finish_queries(
        &self,
        q: &mut HostTensor,
        positions: &[usize],
        rope: &[f32],
        eps: Option<f32>,
        head_dim: usize,
    ) {
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

impl SequenceKeys {
    /// Unpacks the window rows before this step and, on ratio-128 layers, every visible entry.
    fn fill(&mut self, sequence: &SequenceSlice, blocks: &[u32], cache: &CpuCache, layer: usize) {
        let positions = sequence.positions();
        let format = cache.spec.kv;
        self.first = (positions.start + 1).saturating_sub(WINDOW);
        // Every row is written below; what an earlier call left is not cleared first.
        self.window.resize(positions.start - self.first, [0.0; HEAD_DIM]);
        let (first, slot) = (self.first, sequence.slot as usize);
        let window_row = |index: usize| cache.window_row(layer, slot, first + index);
        fill_rows(&mut self.window, true, format, window_row);
        let n_entries = match cache.layers[layer].kind {
            kind @ LayerKind::Hca => kind.n_entries(positions.end),
            LayerKind::Window | LayerKind::Csa => 0,
        };
        self.entries.resize(n_entries, [0.0; HEAD_DIM]);
        fill_rows(&mut self.entries, true, format, |entry| cache.entry(layer, blocks, entry));
    }
}

/// Unpacks the `stored` rows that are not read in place; on all threads if it `may` and there are
/// enough.
fn fill_rows<'a>(
    rows: &mut [KvRow],
    may: bool,
    format: KvFormat,
    stored: impl Fn(usize) -> &'a [u8] + Sync,
) {
    let is_needed = |index| in_place(format, stored(index)).is_none();
    if !(0..rows.len()).any(is_needed) {
        return;
    }
    let unpack = |(index, row): (usize, &mut KvRow)| unpack_kv(format, stored(index), row);
    if may && rows.len() >= 2 * UNPACKED {
        rows.par_iter_mut().enumerate().with_min_len(UNPACKED).for_each(unpack);
    } else {
        rows.iter_mut().enumerate().for_each(unpack);
    }
}

/// Attention of one head over a plain list of keys: the operator without a cache, as the unit
/// goldens have it. `window` are the first keys, `compressed` the rest.
#[must_use]
pub fn attend_single(q: &KvRow, sink: f32, window: &[KvRow], compressed: &[KvRow]) -> KvRow {
    let mut out = [[0.0; HEAD_DIM]];
    attend_heads(
        std::slice::from_ref(q),
        &[sink],
        &window.iter().collect::<Vec<_>>(),
        &compressed.iter().collect::<Vec<_>>(),
        false,
        &mut out,
    );
    out[0]
}
