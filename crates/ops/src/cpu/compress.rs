//! Compressors: a softmax-weighted sum of 8 (ratio 4) or 128 (ratio 128) tokens per channel.
//!
//! Sources come from this step's rows or, for earlier positions, from the state ring; which one a
//! position is in follows from the position alone, so chunking never changes an entry.
//!
//! Source: `Compressor.forward` of the official release (section 7 of the model specification).

use fathom_core::LayerKind;
use fathom_core::model_config::INDEX_HEAD_DIM;

use crate::batch::SequenceSlice;
use crate::cpu::cache::{CpuCache, StateRing, store_key, store_kv};
use crate::cpu::norm::rms_norm;
use crate::cpu::quant::hadamard;
use crate::cpu::rope::Rotation;
use crate::cpu::simd::{exp, simd_fn};
use crate::cpu::tensor::{HostTensor, for_each_row, round_to_bf16};
use crate::cpu::{CpuOps, in_parallel};
use crate::layer::CompressorWeights;
use crate::{Batch, OpError};

/// What a compressor produces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Compressed KV, 512 channels.
    Entries,
    /// Indexer keys, 128 channels.
    Keys,
}

simd_fn! {
    /// `out[c] = sum_i softmax_i(s[i][c]) * u[i][c]` over the sources, in their order.
    fn pool(u: &[&[f32]], s: &[&[f32]], out: &mut [f32]) {
        const WIDTH: usize = 64;
        for (chunk, out) in out.chunks_mut(WIDTH).enumerate() {
            let range = chunk * WIDTH..chunk * WIDTH + out.len();
            let mut max = [f32::NEG_INFINITY; WIDTH];
            for s in s {
                for (max, s) in max.iter_mut().zip(&s[range.clone()]) {
                    *max = max.max(*s);
                }
            }
            let (mut sum, mut weighted) = ([0.0_f32; WIDTH], [0.0_f32; WIDTH]);
            for (u, s) in u.iter().zip(s) {
                let (u, s) = (&u[range.clone()], &s[range.clone()]);
                for (((sum, weighted), max), (u, s)) in
                    sum.iter_mut().zip(&mut weighted).zip(&max).zip(u.iter().zip(s))
                {
                    let weight = exp(s - max);
                    *sum += weight;
                    *weighted = weight.mul_add(*u, *weighted);
                }
            }
            for ((out, weighted), sum) in out.iter_mut().zip(&weighted).zip(&sum) {
                *out = weighted / sum;
            }
        }
    }
}

/// `u` and `s` rows of one sequence: this step's rows, and the ring for what came before.
struct Sources<'a> {
    ring: &'a StateRing,
    slot: usize,
    first: usize,
    row: usize,
    u: &'a HostTensor,
    s: &'a HostTensor,
}

impl<'a> Sources<'a> {
    fn at(&self, position: usize) -> (&'a [f32], &'a [f32]) {
        match position.checked_sub(self.first) {
            Some(offset) => (self.u.row(self.row + offset), self.s.row(self.row + offset)),
            None => self.ring.get(self.slot, position),
        }
    }
}

impl CpuOps {
    /// Emits the entries that this step completes and advances the state; `us` are the projections
    /// `u` and `s` without `ape`.
    #[expect(clippy::too_many_arguments, reason = "the inputs of one fused operator")]
    pub(crate) fn compress(
        &self,
        weights: &CompressorWeights<Self>,
        rope: &[f32],
        us: &[HostTensor; 2],
        batch: &Batch,
        cache: &mut CpuCache,
        layer: usize,
        target: Target,
    ) -> Result<(), OpError> {
        const OP: &str = "compress";
        let kind = cache.layers[layer].kind;
        let (ratio, width) = (kind.ratio(), kind.compressor_width() * weights.width);
        let [u, gate] = us;
        u.expect(OP, "u", batch.n_tokens(), width)?;
        gate.expect(OP, "s", batch.n_tokens(), width)?;
        crate::error::check_len(OP, "ape", weights.ape.len(), ratio * width)?;
        let positions = batch.positions();
        let mut s = HostTensor::unset(gate.rows, gate.cols);
        for_each_row(&mut s, |row, s| {
            let ape = &weights.ape[positions[row] % ratio * width..][..width];
            for ((s, gate), ape) in s.iter_mut().zip(gate.row(row)).zip(ape) {
                *s = gate + ape;
            }
        });
        for sequence in &batch.sequences {
            let blocks = batch.blocks_of(sequence);
            let entries = self.entries(weights, rope, u, &s, sequence, cache, layer, target);
            let first = kind.n_entries(sequence.positions().start);
            for (entry, mut values) in (first..).zip(entries) {
                let (kv, keys) = (cache.spec.kv, cache.spec.index_keys);
                let quantises = self.numerics.quantises();
                match target {
                    Target::Entries => {
                        store_kv(kv, quantises, &mut values, cache.entry_mut(layer, blocks, entry));
                    }
                    Target::Keys => {
                        store_key(
                            keys,
                            quantises,
                            &mut values,
                            cache.key_mut(layer, blocks, entry),
                        );
                    }
                }
            }
            let ring = ring_mut(cache, layer, target);
            let keep = sequence.positions().len().min(ring.rows());
            let rows = sequence.rows().zip(sequence.positions()).rev().take(keep);
            for (row, position) in rows {
                ring.put(sequence.slot as usize, position, u.row(row), s.row(row));
            }
        }
        Ok(())
    }

    /// The entries completed by `sequence`, after norm, rope and Hadamard, not yet quantised.
    #[expect(clippy::too_many_arguments, reason = "the inputs of one fused operator")]
    fn entries(
        &self,
        weights: &CompressorWeights<Self>,
        rope: &[f32],
        u: &HostTensor,
        s: &HostTensor,
        sequence: &SequenceSlice,
        cache: &CpuCache,
        layer: usize,
        target: Target,
    ) -> Vec<Vec<f32>> {
        let kind = cache.layers[layer].kind;
        let positions = sequence.positions();
        let sources = Sources {
            ring: match target {
                Target::Entries => &cache.layers[layer].state,
                Target::Keys => &cache.layers[layer].key_state,
            },
            slot: sequence.slot as usize,
            first: positions.start,
            row: sequence.row as usize,
            u,
            s,
        };
        let entries = kind.n_entries(positions.start)..kind.n_entries(positions.end);
        let work = entries.len() * kind.ratio() * u.cols * 16;
        in_parallel(work, entries, |entry| self.entry(weights, rope, kind, &sources, entry))
    }

    fn entry(
        &self,
        weights: &CompressorWeights<Self>,
        rope: &[f32],
        kind: LayerKind,
        sources: &Sources<'_>,
        entry: usize,
    ) -> Vec<f32> {
        let (ratio, width) = (kind.ratio(), weights.width);
        let start = entry * ratio;
        let own = (start..start + ratio).map(|position| sources.at(position));
        let (u, s): (Vec<&[f32]>, Vec<&[f32]>) = match kind {
            // Groups overlap: the previous group's "a" half, then the own group's "b" half.
            LayerKind::Csa => (start.saturating_sub(ratio)..start)
                .map(|position| sources.at(position))
                .map(|(u, s)| (&u[..width], &s[..width]))
                .chain(own.map(|(u, s)| (&u[width..], &s[width..])))
                .unzip(),
            _ => own.unzip(),
        };
        let is_bf16 = self.is_bf16();
        let mut pooled = vec![0.0; width];
        pool(&u, &s, &mut pooled);
        if is_bf16 {
            round_to_bf16(&mut pooled);
        }
        let mut values = vec![0.0; width];
        rms_norm(&pooled, &weights.norm.weight, weights.norm.eps, is_bf16, &mut values);
        Rotation::at(start, rope).apply(&mut values, is_bf16);
        if let Ok(key) = <&mut [f32; INDEX_HEAD_DIM]>::try_from(values.as_mut_slice()) {
            hadamard(key, is_bf16);
        }
        values
    }
}

fn ring_mut(cache: &mut CpuCache, layer: usize, target: Target) -> &mut StateRing {
    match target {
        Target::Entries => &mut cache.layers[layer].state,
        Target::Keys => &mut cache.layers[layer].key_state,
    }
}
