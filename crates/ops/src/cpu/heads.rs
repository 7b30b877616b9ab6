//! The online softmax of several attention heads over the same keys.
//!
//! All heads of a layer share one KV row, which is key and value. So heads go through a block of
//! keys together: a key is loaded for several of them, and sums stay in registers. Each head's
//! arithmetic has one fixed order, whatever heads it is computed with:
//!
//! - score: 16 lanes start at zero and take the channels `16 i + lane` in order, fused; the lanes are
//!   added as a tree, as in `gemm`;
//! - output: each channel takes the keys in order, fused.
//!
//! Not here: which keys, in which order and blocks (`attention`).

use super::isa::{GROUP, Isa, LANES, Lanes, Level, Task};
use super::simd::exp;
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
            let keys: [&KvRow; GROUP] = std::array::from_fn(|i| keys[i.min(keys.len() - 1)]);
            let (pairs, odd) = heads.q.as_chunks::<2>();
            let (out, last) = weights[..n_heads].as_chunks_mut::<2>();
            for (q, weights) in pairs.iter().zip(out) {
                let scores = scores(isa, q, keys);
                for (weights, scores) in weights.iter_mut().zip(scores) {
                    weights.as_chunks_mut().0[group] = scores;
                }
            }
            for (q, weights) in odd.iter().zip(last) {
                let [scores] = scores(isa, std::array::from_ref(q), keys);
                weights.as_chunks_mut().0[group] = scores;
            }
        }
        let mut rescales = [0.0_f32; HEADS];
        for head in 0..n_heads {
            let weights = &mut weights[head][..keys.len()];
            let max = weights.iter().copied().fold(heads.max[head], f32::max);
            rescales[head] = exp(heads.max[head] - max);
            heads.max[head] = max;
            for weight in weights.iter_mut() {
                *weight = exp(*weight - max);
            }
            let sum = weights.iter().fold(0.0_f32, |sum, weight| sum + weight);
            if is_bf16 {
                for weight in weights.iter_mut() {
                    *weight = round_bf16(*weight);
                }
            }
            heads.sum[head] = heads.sum[head].mul_add(rescales[head], sum);
        }
        let (pairs, odd) = heads.acc.as_chunks_mut::<2>();
        let n_paired = 2 * pairs.len();
        let (pair_weights, odd_weights) = weights.split_at(n_paired);
        let (pair_rescales, odd_rescales) = rescales.split_at(n_paired);
        let (pair_weights, _) = pair_weights.as_chunks::<2>();
        let (pair_rescales, _) = pair_rescales.as_chunks::<2>();
        for ((acc, weights), rescale) in pairs.iter_mut().zip(pair_weights).zip(pair_rescales) {
            add_values(isa, acc, weights, rescale, keys);
        }
        for acc in odd {
            let acc = std::array::from_mut(acc);
            let weights = std::array::from_ref(&odd_weights[0]);
            add_values(isa, acc, weights, std::array::from_ref(&odd_rescales[0]), keys);
        }
    }
}

/// Scaled scores of `H` queries against four keys.
#[inline(always)]
fn scores<I: Isa, const H: usize>(
    isa: I,
    q: &[KvRow; H],
    keys: [&KvRow; GROUP],
) -> [[f32; GROUP]; H] {
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
    lanes.map(|lanes| isa.sum(&lanes).map(|score| score * SOFTMAX_SCALE))
}

/// `acc = rescale acc + sum over keys of weight * key`, for `H` heads.
#[inline(always)]
fn add_values<I: Isa, const H: usize>(
    isa: I,
    acc: &mut [KvRow; H],
    weights: &[[f32; KEY_BLOCK]; H],
    rescale: &[f32; H],
    keys: &[&KvRow],
) {
    for first in (0..HEAD_DIM / LANES).step_by(RUNS) {
        for part in 0..I::PARTS {
            let mut sums = [[isa.zero(); RUNS]; H];
            for h in 0..H {
                let runs = acc[h].as_chunks::<LANES>().0;
                let rescale = isa.splat(rescale[h]);
                for c in 0..RUNS {
                    sums[h][c] = isa.mul(isa.read(&runs[first + c], part), rescale);
                }
            }
            for (i, key) in keys.iter().enumerate() {
                let runs = key.as_chunks::<LANES>().0;
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
