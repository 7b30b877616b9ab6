//! Outputs in f64, from the very inputs of an operator: the official formulas written down once more, without the
//! CPU operators' order of sums, packed weights and vector instructions.
//!
//! Values are rounded where the definition rounds between two steps (to bf16, to the FP8 grid) and
//! nowhere else. A case recomputes some hundred outputs, whatever its size, so that real sizes are held
//! against the definition itself and not only against other f32 sums.
//!
//! - products of every weight format; hyper-connections; experts; attention over a list of keys.
//!
//! Not here: which outputs, and how close they must be (the cases).

use fathom_core::num::{
    Ue8m0, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32, fp8_block_scale, round_bf16,
};
use rayon::prelude::*;

use super::Size;
use super::random::Random;
use crate::{Activations, Scales, WeightData, WeightSource};

/// Outputs of an operator that are recomputed.
pub(super) const fn n_outputs(size: Size) -> usize {
    match size {
        Size::Small => 40,
        Size::Real => 256,
    }
}

/// What bf16 results may differ by from an exact value: half a step of bf16 (relative to the largest
/// value, which may lie just above a power of two), and as much as a quarter of that for sums of
/// many products, of which sm_90a keeps some 14 bits.
pub(super) const ROUNDED: f64 = 1.25 / 256.0;

/// The same for attention, whose output is rounded before it is rotated back and after: two half steps. The
/// weights of its keys are rounded to bf16 too; such errors are random and many.
pub(super) const ATTENDED: f64 = 1.25 / 128.0;

/// Random places of a `[rows, cols]` result.
pub(super) fn places(
    random: &mut Random,
    size: Size,
    (rows, cols): (usize, usize),
) -> Vec<(usize, usize)> {
    (0..n_outputs(size)).map(|_| (random.below(rows), random.below(cols))).collect()
}

/// The values of a `[_, cols]` result at `places`.
pub(super) fn at(values: &[f32], cols: usize, places: &[(usize, usize)]) -> Vec<f32> {
    places.iter().map(|&(row, col)| values[row * cols + col]).collect()
}

/// Row `row` of a matrix: codes times scales.
fn weight_row(source: &WeightSource, row: usize) -> Vec<f64> {
    let cols = source.n_cols();
    let power = |byte: u8| f64::from(Ue8m0::from_exponent(i32::from(byte) - 127).to_f32());
    let f32_at = |bytes: &[u8], i: usize| {
        f64::from(f32::from_bits(u32::from_le_bytes([0, 1, 2, 3].map(|b| bytes[4 * i + b]))))
    };
    let bf16_at = |bytes: &[u8], i: usize| {
        f64::from(half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    };
    let value = |col: usize| {
        let at = row * cols + col;
        match &source.data {
            WeightData::Fp8 { codes, scales } => {
                let block = row / 128 * cols.div_ceil(128) + col / 128;
                let scale = match scales {
                    Scales::Ue8m0(bytes) => power(bytes[block]),
                    Scales::F32(bytes) => f32_at(bytes, block),
                };
                f64::from(e4m3_to_f32(codes[at])) * scale
            }
            WeightData::Fp4 { codes, scales } => {
                let code = codes[at / 2] >> (4 * (at % 2)) & 15;
                f64::from(e2m1_to_f32(code)) * power(scales[at / 32])
            }
            WeightData::Bf16(bytes) => bf16_at(bytes, at),
            WeightData::F32(bytes) => f32_at(bytes, at),
        }
    };
    (0..cols).map(value).collect()
}

fn dot(weights: &[f64], x: &[f32]) -> f64 {
    weights.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum()
}

/// Puts the input of an FP8 or FP4 layer on the FP8 grid, in blocks of 128.
pub(super) fn quantise(x: &mut [f32]) {
    for block in x.chunks_mut(128) {
        let scale = fp8_block_scale(block.iter().fold(0.0, |most, x| x.abs().max(most))).to_f32();
        block.iter_mut().for_each(|x| *x = e4m3_to_f32(e4m3_from_f32(*x / scale)) * scale);
    }
}

/// The input of an FP8 or FP4 layer.
fn layer_input(x: &[f32], activations: Activations) -> Vec<f32> {
    let mut input = x.to_vec();
    if activations == Activations::Fp8Grid {
        quantise(&mut input);
    }
    input
}

fn bf16(x: f64) -> f32 {
    round_bf16(x as f32)
}

/// `x W^T` at `places`: a row of `x` and a row of the matrix each.
pub(super) fn products(
    source: &WeightSource,
    x: &[f32],
    activations: Activations,
    places: &[(usize, usize)],
) -> Vec<f32> {
    let k = source.n_cols();
    let product = |&(row, col): &(usize, usize)| {
        let input = layer_input(&x[row * k..(row + 1) * k], activations);
        dot(&weight_row(source, col), &input) as f32
    };
    places.par_iter().map(product).collect()
}

/// A hyper-connection site.
pub(super) struct Site<'a> {
    pub(super) function: &'a WeightSource,
    pub(super) base: &'a [f32],
    pub(super) scale: &'a [f32],
    pub(super) norm: &'a [f32],
}

/// What a site hands on for one token.
pub(super) struct SiteOutput {
    pub(super) normed: Vec<f32>,
    pub(super) post: [f64; 4],
    /// `comb[i][j]`: share of copy `i` in copy `j`.
    pub(super) comb: [[f64; 4]; 4],
}

/// Epsilon of every norm and of the hyper-connections.
const EPS: f64 = 1e-6;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn inverse_rms(x: &[f32]) -> f64 {
    let sum: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (sum / x.len() as f64 + EPS).sqrt().recip()
}

impl Site<'_> {
    /// The mixes of the copies `x`, times the factor of their norm, scaled and shifted.
    fn logit(&self, x: &[f32], factor: f64, index: usize, part: usize) -> f64 {
        let mix = dot(&weight_row(self.function, index), x) * factor;
        mix * f64::from(self.scale[part]) + f64::from(self.base[index])
    }

    /// The copies of a token, added up and normalised.
    fn collapse(&self, x: &[f32], factor: f64) -> Vec<f32> {
        let width = self.norm.len();
        let pre = [0, 1, 2, 3].map(|i| sigmoid(self.logit(x, factor, i, 0)) + EPS);
        let copy = |i: usize, channel: usize| f64::from(x[i * width + channel]);
        let collapsed: Vec<f32> =
            (0..width).map(|c| bf16((0..4).map(|i| pre[i] * copy(i, c)).sum())).collect();
        let factor = inverse_rms(&collapsed);
        let normed = collapsed.iter().zip(self.norm);
        normed.map(|(&x, &weight)| bf16(f64::from(x) * factor * f64::from(weight))).collect()
    }

    /// `hc_head`: the site has four mixes and one scale.
    pub(super) fn head(&self, x: &[f32]) -> Vec<f32> {
        self.collapse(x, inverse_rms(x))
    }

    /// `hc_pre` with 20 passes of Sinkhorn.
    pub(super) fn pre(&self, x: &[f32]) -> SiteOutput {
        let factor = inverse_rms(x);
        let post = [4, 5, 6, 7].map(|i| 2.0 * sigmoid(self.logit(x, factor, i, 1)));
        let mut comb = [[0.0; 4]; 4];
        for (i, row) in comb.iter_mut().enumerate() {
            *row = [0, 1, 2, 3].map(|j| self.logit(x, factor, 8 + 4 * i + j, 2));
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            *row = row.map(|x| (x - most).exp());
            let sum: f64 = row.iter().sum();
            *row = row.map(|x| x / sum + EPS);
        }
        for pass in 0..20 {
            if pass > 0 {
                for row in &mut comb {
                    let sum = row.iter().sum::<f64>() + EPS;
                    *row = row.map(|x| x / sum);
                }
            }
            for j in 0..4 {
                let sum = comb.iter().map(|row| row[j]).sum::<f64>() + EPS;
                comb.iter_mut().for_each(|row| row[j] /= sum);
            }
        }
        SiteOutput { normed: self.collapse(x, factor), post, comb }
    }
}

impl SiteOutput {
    /// `hc_post`: the copies `x` of a token after its sublayer put out `y`.
    pub(super) fn post(&self, x: &[f32], y: &[f32]) -> Vec<f32> {
        let width = y.len();
        let value = |at: usize| {
            let (j, c) = (at / width, at % width);
            let copies = (0..4).map(|i| self.comb[i][j] * f64::from(x[i * width + c]));
            bf16(self.post[j] * f64::from(y[c]) + copies.sum::<f64>())
        };
        (0..4 * width).map(value).collect()
    }
}

/// One expert, routed or shared: gate, up, down.
pub(super) type Expert = [WeightSource; 3];

/// Channels `cols` of an expert's output for `input`, which is as its layers take it, with a routing weight.
pub(super) fn expert(
    [gate, up, down]: &Expert,
    input: &[f32],
    (weight, limit): (f32, Option<f32>),
    activations: Activations,
    cols: &[usize],
) -> Vec<f32> {
    let limit = f64::from(limit.unwrap_or(f32::INFINITY));
    let channel = |index: usize| {
        let product = |source| f64::from(bf16(dot(&weight_row(source, index), input)));
        let (gate, up) = (product(gate).min(limit), product(up).clamp(-limit, limit));
        bf16(gate * sigmoid(gate) * up * f64::from(weight))
    };
    let hidden: Vec<f32> = (0..gate.n_rows()).into_par_iter().map(channel).collect();
    let hidden = layer_input(&hidden, activations);
    cols.par_iter().map(|&col| bf16(dot(&weight_row(down, col), &hidden))).collect()
}

/// Channels `cols` of a token's mixture: `chosen` are its experts with their routing weights.
pub(super) fn mixture(
    (experts, shared): (&[Expert], &Expert),
    x: &[f32],
    chosen: &[(u32, f32)],
    limit: Option<f32>,
    activations: Activations,
    cols: &[usize],
) -> Vec<f32> {
    let input = layer_input(x, activations);
    let mut sum = vec![0.0; cols.len()];
    let routed = chosen.iter().map(|&(id, weight)| (&experts[id as usize], weight));
    for (weights, weight) in routed.chain([(shared, 1.0)]) {
        let out = expert(weights, &input, (weight, limit), activations, cols);
        sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += f64::from(out));
    }
    sum.into_iter().map(bf16).collect()
}

/// Routing weights of the experts `chosen` for a token.
pub(super) fn routing_weights(
    gate: &WeightSource,
    x: &[f32],
    chosen: &[u32],
    factor: f32,
) -> Vec<f32> {
    let score = |&id: &u32| dot(&weight_row(gate, id as usize), x).exp().ln_1p().sqrt();
    let scores: Vec<f64> = chosen.iter().map(score).collect();
    let sum: f64 = scores.iter().sum();
    scores.into_iter().map(|score| (score / sum * f64::from(factor)) as f32).collect()
}

/// Attention of one head over `keys`, which are values too, rotated back from `position`.
pub(super) fn attend(
    q: &[f32],
    sink: f32,
    keys: &[&[f32]],
    position: usize,
    frequencies: &[f32],
) -> Vec<f32> {
    let scale = (q.len() as f64).sqrt().recip();
    let score = |key: &&[f32]| {
        q.iter().zip(*key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() * scale
    };
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let most = scores.iter().copied().fold(f64::from(sink), f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum = weights.iter().sum::<f64>() + (f64::from(sink) - most).exp();
    let mut out = vec![0.0; q.len()];
    for (weight, key) in weights.iter().zip(keys) {
        out.iter_mut().zip(*key).for_each(|(out, &value)| *out += weight / sum * f64::from(value));
    }
    let mut out: Vec<f32> = out.into_iter().map(|x| x as f32).collect();
    rotate_back(&mut out, position, frequencies);
    out
}

/// Rounds a head's output and rotates it back.
pub(super) fn rotate_back(out: &mut [f32], position: usize, frequencies: &[f32]) {
    out.iter_mut().for_each(|x| *x = round_bf16(*x));
    let first = out.len() - 2 * frequencies.len();
    for (pair, frequency) in out[first..].chunks_exact_mut(2).zip(frequencies) {
        // The angle is an f32, as in the official table.
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (re, im) = (f64::from(pair[0]), f64::from(pair[1]));
        (pair[0], pair[1]) = (bf16(re * cos + im * sin), bf16(im * cos - re * sin));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::quant::quantise_linear_input;
    use crate::cpu::{CpuLinear, split_sinkhorn};

    #[test]
    fn rows_of_every_format_are_those_that_the_cpu_decodes() {
        let mut random = Random::new(4);
        let sources = [
            random.fp8(130, 256).unwrap(),
            random.fp8_f32(130, 256).unwrap(),
            random.fp4(130, 256).unwrap(),
            random.bf16(130, 256).unwrap(),
            random.f32(130, 256).unwrap(),
        ];
        for source in sources {
            let cpu = CpuLinear::new(&source).unwrap();
            for row in [0, 77, 129] {
                let mut expected = vec![0.0; 256];
                cpu.row(row, &mut expected);
                let got: Vec<f32> = weight_row(&source, row).iter().map(|x| *x as f32).collect();
                assert_eq!(got, expected, "{} row {row}", source.name);
            }
        }
    }

    #[test]
    fn inputs_are_quantised_as_the_cpu_quantises_them() {
        let values: Vec<f32> = Random::new(5).values(640, 300.0);
        let (mut got, mut expected) = (values.clone(), values);
        quantise(&mut got);
        quantise_linear_input(&mut expected);
        assert_eq!(got, expected);
    }

    #[test]
    fn sites_mix_as_the_cpu_mixes() {
        let mut random = Random::new(6);
        let function = random.f32(24, 64).unwrap();
        let (base, scale) = (random.numbers(24, 0.0), random.numbers(3, 1.0));
        let norm = random.numbers(16, 1.0);
        let x = random.values(64, 2.0);
        let site = Site { function: &function, base: &base, scale: &scale, norm: &norm };
        let factor = inverse_rms(&x);
        let mix: [f32; 24] =
            std::array::from_fn(|i| (dot(&weight_row(&function, i), &x) * factor) as f32);
        let expected = split_sinkhorn(
            &mix,
            scale.as_slice().try_into().unwrap(),
            base.as_slice().try_into().unwrap(),
            20,
            1e-6,
        );
        let got = site.pre(&x);
        let close = |a: f64, b: f32| (a - f64::from(b)).abs() < 1e-5;
        assert!(got.post.iter().zip(expected.post).all(|(a, b)| close(*a, b)));
        let comb = got.comb.as_flattened().iter().zip(expected.comb.as_flattened());
        assert!(comb.into_iter().all(|(a, b)| close(*a, *b)));
    }

    #[test]
    fn attention_over_one_key_is_that_key_shared_with_the_sink() {
        let key = vec![1.0_f32; 512];
        // A score of log(3): three quarters for the key beside a sink of 0.
        let q = vec![3.0_f32.ln() * 512.0_f32.sqrt() / 512.0; 512];
        let out = attend(&q, 0.0, &[&key], 0, &[0.0; 32]);
        assert!(out.iter().all(|x| (x - 0.75).abs() < 1e-3), "{out:?}");
    }
}
