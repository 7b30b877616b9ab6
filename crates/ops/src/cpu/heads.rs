//! The online softmax of several attention heads over the same keys.
//!
//! All heads of a layer share one KV row, which is key and value. So heads go through a block of
//! keys together: a key is loaded for several of them, and sums stay in registers. Each head's
//! arithmetic has one fixed order, whatever heads it is computed with:
//!
//! - score: 16 lanes start at zero and take the channels `16 i + lane` in order, fused; the lanes are
//!   added as a tree, as in `gemm`;
//! - the sum of a block's weights: lane by lane, the lanes as a tree;
//! - output: each channel takes the keys in order, fused.
//!
//! Loops have indices, for the reason that `gemm` gives.
//!
//! Not here: which keys, in which order and blocks (`attention`).

use super::isa::{GROUP, Isa, LANES, Lanes, Level, Task};
use super::simd::{exp, sum_lanes};
use fathom_core::model_config::HEAD_DIM;
use fathom_core::num::round_bf16;

/// One key that is also its value.
pub(super) type KvRow = [f32; HEAD_DIM];

/// Keys per step of the online softmax.
pub(super) const KEY_BLOCK: usize = 64;

/// Heads that go through the keys together: their queries and four keys share the L1 cache.
pub(super) const HEADS: usize = 8;

/// Scale of the scores: `512^-0.5`.
const SOFTMAX_SCALE: f32 = 0.044_194_173;

/// Runs of 16 channels whose sums stay in registers.
const RUNS: usize = 4;

/// Up to [`HEADS`] heads on their way through the keys.
pub(super) struct Heads<'a> {
    q: &'a [KvRow],
    acc: &'a mut [KvRow],
    max: [f32; HEADS],
    sum: [f32; HEADS],
}

impl<'a> Heads<'a> {
    /// Heads that have seen no key, with their queries; outputs are gathered in `acc`.
    ///
    /// # Panics
    /// If there are more than [`HEADS`] queries or not as many outputs.
    pub(super) fn new(q: &'a [KvRow], acc: &'a mut [KvRow]) -> Self {
        assert!(q.len() <= HEADS && q.len() == acc.len(), "an output for each query");
        acc.fill([0.0; HEAD_DIM]);
        Self { q, acc, max: [f32::NEG_INFINITY; HEADS], sum: [0.0; HEADS] }
    }

    /// Takes in one block of at most [`KEY_BLOCK`] keys.
    pub(super) fn fold(&mut self, keys: &[&KvRow], is_bf16: bool) {
        Level::best().run(Fold { heads: self, keys, is_bf16 });
    }

    /// Normalises the outputs. Each head's sink takes part in its final maximum, so a sink far above
    /// every score cannot overflow.
    pub(super) fn finish(self, sinks: &[f32], is_bf16: bool) {
        for (head, (acc, sink)) in self.acc.iter_mut().zip(sinks).enumerate() {
            let max = self.max[head].max(*sink);
            let rescale = exp(self.max[head] - max);
            let denominator = self.sum[head].mul_add(rescale, exp(sink - max));
            for value in acc.iter_mut() {
                let y = *value * rescale / denominator;
                *value = if is_bf16 { round_bf16(y) } else { y };
            }
        }
    }
}

/// One block of keys for some heads.
struct Fold<'f, 'a> {
    heads: &'f mut Heads<'a>,
    keys: &'f [&'f KvRow],
    is_bf16: bool,
}

impl Task for Fold<'_, '_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { heads, keys, is_bf16 } = self;
        let n_heads = heads.q.len();
        let mut weights = [[0.0_f32; KEY_BLOCK]; HEADS];
        for (group, keys) in keys.chunks(GROUP).enumerate() {
            // A last group is whole: what its surplus keys give is not looked at.
            let mut four = [keys[0]; GROUP];
            four[..keys.len()].copy_from_slice(keys);
            let mut first = 0;
            while I::HEADS >= 4 && first + 4 <= n_heads {
                scores::<I, 4>(isa, heads.q, four, &mut weights, (first, group));
                first += 4;
            }
            while first + 2 <= n_heads {
                scores::<I, 2>(isa, heads.q, four, &mut weights, (first, group));
                first += 2;
            }
            if first < n_heads {
                scores::<I, 1>(isa, heads.q, four, &mut weights, (first, group));
            }
        }
        let mut rescales = [0.0_f32; HEADS];
        for head in 0..n_heads {
            let weights = &mut weights[head];
            weights[keys.len()..].fill(f32::NEG_INFINITY);
            let max = heads.max[head].max(largest(weights));
            rescales[head] = exp(heads.max[head] - max);
            heads.max[head] = max;
            for weight in weights.iter_mut() {
                *weight = exp(*weight - max);
            }
            heads.sum[head] = heads.sum[head].mul_add(rescales[head], total(weights));
            if is_bf16 {
                for weight in weights.iter_mut() {
                    *weight = round_bf16(*weight);
                }
            }
        }
        let mut first = 0;
        while I::HEADS >= 4 && first + 4 <= n_heads {
            add_values::<I, 4>(isa, heads.acc, &weights, &rescales, first, keys);
            first += 4;
        }
        while first + 2 <= n_heads {
            add_values::<I, 2>(isa, heads.acc, &weights, &rescales, first, keys);
            first += 2;
        }
        if first < n_heads {
            add_values::<I, 1>(isa, heads.acc, &weights, &rescales, first, keys);
        }
    }
}

/// The largest weight.
#[inline(always)]
fn largest(weights: &[f32; KEY_BLOCK]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for run in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] = if run[lane] > lanes[lane] { run[lane] } else { lanes[lane] };
        }
    }
    let mut max = f32::NEG_INFINITY;
    for lane in lanes {
        max = max.max(lane);
    }
    max
}

/// The sum of the weights: each lane takes every sixteenth, the lanes are added as a tree.
#[inline(always)]
fn total(weights: &[f32; KEY_BLOCK]) -> f32 {
    let mut lanes = [0.0; LANES];
    for run in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += run[lane];
        }
    }
    sum_lanes(lanes)
}

/// Scaled scores of the heads `first..first + H` against the four keys of a group, into `weights`.
#[inline(always)]
fn scores<I: Isa, const H: usize>(
    isa: I,
    q: &[KvRow],
    keys: [&KvRow; GROUP],
    weights: &mut [[f32; KEY_BLOCK]; HEADS],
    (first, group): (usize, usize),
) {
    let Some(q) = q[first..].first_chunk::<H>() else { return };
    let mut lanes = [[Lanes::ZERO; GROUP]; H];
    for part in 0..I::PARTS {
        let mut sums = [[isa.zero(); GROUP]; H];
        for run in 0..HEAD_DIM / LANES {
            let mut k = [isa.zero(); GROUP];
            for i in 0..GROUP {
                k[i] = isa.read(&keys[i].as_chunks::<LANES>().0[run], part);
            }
            for h in 0..H {
                let q = isa.read(&q[h].as_chunks::<LANES>().0[run], part);
                for i in 0..GROUP {
                    sums[h][i] = isa.fma(q, k[i], sums[h][i]);
                }
            }
        }
        for h in 0..H {
            for i in 0..GROUP {
                isa.store(sums[h][i], &mut lanes[h][i], part);
            }
        }
    }
    for h in 0..H {
        let scores = isa.sum(&lanes[h]);
        for i in 0..GROUP {
            weights[first + h][GROUP * group + i] = scores[i] * SOFTMAX_SCALE;
        }
    }
}

/// `acc = rescale acc + sum over keys of weight * key`, for the heads `first..first + H`.
#[inline(always)]
fn add_values<I: Isa, const H: usize>(
    isa: I,
    acc: &mut [KvRow],
    weights: &[[f32; KEY_BLOCK]; HEADS],
    rescale: &[f32; HEADS],
    first_head: usize,
    keys: &[&KvRow],
) {
    let Some(acc) = acc[first_head..].first_chunk_mut::<H>() else { return };
    let Some(weights) = weights[first_head..].first_chunk::<H>() else { return };
    for first in (0..HEAD_DIM / LANES).step_by(RUNS) {
        for part in 0..I::PARTS {
            let mut sums = [[isa.zero(); RUNS]; H];
            for h in 0..H {
                let runs = acc[h].as_chunks::<LANES>().0;
                let rescale = isa.splat(rescale[first_head + h]);
                for c in 0..RUNS {
                    sums[h][c] = isa.mul(isa.read(&runs[first + c], part), rescale);
                }
            }
            for i in 0..keys.len().min(KEY_BLOCK) {
                let runs = keys[i].as_chunks::<LANES>().0;
                let mut w = [isa.zero(); H];
                for h in 0..H {
                    w[h] = isa.splat(weights[h][i]);
                }
                for c in 0..RUNS {
                    let value = isa.read(&runs[first + c], part);
                    for h in 0..H {
                        sums[h][c] = isa.fma(w[h], value, sums[h][c]);
                    }
                }
            }
            for h in 0..H {
                let runs = acc[h].as_chunks_mut::<LANES>().0;
                for c in 0..RUNS {
                    isa.write(sums[h][c], &mut runs[first + c], part);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values in -1..1.
    fn rows(n: usize, seed: u32) -> Vec<KvRow> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| std::array::from_fn(|_| next())).collect()
    }

    fn attend(level: Level, q: &[KvRow], keys: &[KvRow], is_bf16: bool) -> Vec<KvRow> {
        let mut out = vec![[f32::NAN; HEAD_DIM]; q.len()];
        let mut heads = Heads::new(q, &mut out);
        let keys: Vec<&KvRow> = keys.iter().collect();
        for keys in keys.chunks(KEY_BLOCK) {
            level.run(Fold { heads: &mut heads, keys, is_bf16 });
        }
        heads.finish(&[0.25; HEADS], is_bf16);
        out
    }

    #[test]
    fn every_instruction_set_and_any_company_give_the_same_bits() {
        let (q, keys) = (rows(HEADS - 1, 1), rows(KEY_BLOCK + 7, 2));
        for is_bf16 in [false, true] {
            let alone: Vec<KvRow> =
                q.chunks(1).flat_map(|q| attend(Level::portable(), q, &keys, is_bf16)).collect();
            for level in Level::available() {
                assert_eq!(attend(level, &q, &keys, is_bf16), alone, "{}", level.name());
            }
        }
    }

    #[test]
    fn the_result_is_the_softmax_weighted_mean_with_the_sink_in_the_denominator() {
        for n_keys in [1, 2, 3, 4, 5, 63, 64, 65, 130] {
            let (q, keys) = (rows(3, 3), rows(n_keys, 4));
            let out = attend(Level::best(), &q, &keys, false);
            for (q, out) in q.iter().zip(out) {
                let dot = |key: &KvRow| {
                    q.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                };
                let exps: Vec<f64> =
                    keys.iter().map(|key| (dot(key) / 512f64.sqrt()).exp()).collect();
                let total = exps.iter().sum::<f64>() + 0.25f64.exp();
                for (channel, value) in out.iter().enumerate() {
                    let weighted = keys.iter().zip(&exps).map(|(k, e)| f64::from(k[channel]) * e);
                    let expected = weighted.sum::<f64>() / total;
                    assert!((f64::from(*value) - expected).abs() < 2e-6, "{value} {expected}");
                }
            }
        }
    }
}
