//! Hyper-connections: mixing the four copies of the residual stream.
//!
//! Source: `Block.hc_pre`, `Block.hc_post`, `hc_split_sinkhorn` and `Transformer.hc_head` of the
//! official release. Everything is f32 inside; one rounding to bf16 at the end.
//!
//! Not here: the mixing product `fn @ x`, which is an ordinary matrix product.

use fathom_core::model_config::{HC_MIX, HC_MULT};
use fathom_core::num::round_bf16;

use crate::cpu::norm::{inverse_rms, rms_norm};
use crate::cpu::simd::{exp, sigmoid, simd_fn};
use crate::cpu::tensor::{HostTensor, for_each_row};
use crate::cpu::{CpuLinear, CpuOps, in_parallel};
use crate::error::check_len;
use crate::layer::{HcHead, HcSite, Norm};
use crate::traits::{HcMix, HcPre, HyperConnectionOps};
use crate::{Batch, OpError};

/// Mixing weights of one token at one site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SiteMix {
    /// Share of each copy in the sublayer's input.
    pub pre: [f32; HC_MULT],
    /// Weight of the sublayer's output in each copy.
    pub post: [f32; HC_MULT],
    /// `comb[i][j]`: share of source copy `i` in destination copy `j`.
    pub comb: [[f32; HC_MULT]; HC_MULT],
}

/// Splits the 24 mixes of a token into `pre`, `post` and the Sinkhorn-normalised `comb`.
///
/// `n_iters` counts column passes; each but the first follows a row pass, and the first row pass
/// is the softmax.
#[must_use]
pub fn split_sinkhorn(
    mix: &[f32; HC_MIX],
    scale: &[f32; 3],
    base: &[f32; HC_MIX],
    n_iters: u32,
    eps: f32,
) -> SiteMix {
    let mut out = SiteMix { pre: [0.0; 4], post: [0.0; 4], comb: [[0.0; 4]; 4] };
    split(mix, scale, base, n_iters, eps, &mut out);
    out
}

simd_fn! {
    /// [`split_sinkhorn`], in loops over arrays: a closure might be compiled without the vector
    /// instructions. Sums are taken in the order of the index.
    fn split(
        mix: &[f32; HC_MIX],
        scale: &[f32; 3],
        base: &[f32; HC_MIX],
        n_iters: u32,
        eps: f32,
        out: &mut SiteMix,
    ) {
        for i in 0..HC_MULT {
            out.pre[i] = sigmoid(mix[i] * scale[0] + base[i]) + eps;
            let k = HC_MULT + i;
            out.post[i] = 2.0 * sigmoid(mix[k] * scale[1] + base[k]);
        }
        let mut comb = [[0.0_f32; HC_MULT]; HC_MULT];
        let (logits, _) = mix[2 * HC_MULT..].as_chunks::<HC_MULT>();
        let (bases, _) = base[2 * HC_MULT..].as_chunks::<HC_MULT>();
        for ((row, logits), bases) in comb.iter_mut().zip(logits).zip(bases) {
            let mut max = f32::NEG_INFINITY;
            for ((x, logit), base) in row.iter_mut().zip(logits).zip(bases) {
                *x = logit * scale[2] + base;
                max = max.max(*x);
            }
            for x in row.iter_mut() {
                *x = exp(*x - max);
            }
            let sum = row[0] + row[1] + row[2] + row[3];
            for x in row.iter_mut() {
                *x = *x / sum + eps;
            }
        }
        for iter in 0..n_iters {
            if iter > 0 {
                for row in &mut comb {
                    let sum = row[0] + row[1] + row[2] + row[3] + eps;
                    for x in row.iter_mut() {
                        *x /= sum;
                    }
                }
            }
            let mut sums = [0.0_f32; HC_MULT];
            for row in &comb {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x;
                }
            }
            for row in &mut comb {
                for (x, sum) in row.iter_mut().zip(sums) {
                    *x /= sum + eps;
                }
            }
        }
        out.comb = comb;
    }
}

simd_fn! {
    /// `out = sum_j pre[j] * x[j]` over the copies of one token.
    fn collapse(pre: &[f32; HC_MULT], x: &[f32], is_bf16: bool, out: &mut [f32]) {
        let width = out.len();
        let (x0, x1) = x.split_at(2 * width);
        let ((x0, x1), (x2, x3)) = (x0.split_at(width), x1.split_at(width));
        for ((((out, a), b), c), d) in out.iter_mut().zip(x0).zip(x1).zip(x2).zip(x3) {
            let y = pre[0] * a + pre[1] * b + pre[2] * c + pre[3] * d;
            *out = if is_bf16 { round_bf16(y) } else { y };
        }
    }
}

simd_fn! {
    /// `out[j] = post[j] * y + sum_i comb[i][j] * x[i]` for one destination copy `j` of one token,
    /// accumulated in that order: with it the short goldens agree to 2e-7, while summing the copies
    /// first lands one activation on the other side of an FP8 midpoint.
    fn expand(
        post: f32,
        comb: &[f32; HC_MULT],
        x: &[f32],
        y: &[f32],
        is_bf16: bool,
        out: &mut [f32],
    ) {
        let width = out.len();
        let (x0, x1) = x.split_at(2 * width);
        let ((x0, x1), (x2, x3)) = (x0.split_at(width), x1.split_at(width));
        for (((((out, y), a), b), c), d) in out.iter_mut().zip(y).zip(x0).zip(x1).zip(x2).zip(x3) {
            let value = comb[0].mul_add(*a, post * y);
            let value = comb[1].mul_add(*b, value);
            let value = comb[2].mul_add(*c, value);
            let value = comb[3].mul_add(*d, value);
            *out = if is_bf16 { round_bf16(value) } else { value };
        }
    }
}

simd_fn! {
    /// The norm factor of the flattened copies of one token.
    fn copies_norm(x: &[f32], eps: f32) -> f32 {
        inverse_rms(x, eps)
    }
}

/// Reads a fixed number of values from a vector.
fn fixed<const N: usize>(
    op: &'static str,
    arg: &'static str,
    values: &[f32],
) -> Result<[f32; N], OpError> {
    values.try_into().map_err(|_| OpError::Shape { op, arg, got: values.len(), expected: N })
}

impl CpuOps {
    /// `fn @ x * g` for each row: `[T, fn.rows]`, with `g` the norm factor of the row.
    fn mixes(&self, x: &HostTensor, function: &CpuLinear, eps: f32) -> Result<HostTensor, OpError> {
        let mut mixes = HostTensor::unset(x.rows, function.n_rows());
        function.matmul(&x.data, &mut mixes.data)?;
        let factors = in_parallel(x.data.len(), 0..x.rows, |row| copies_norm(x.row(row), eps));
        for (row, factor) in factors.into_iter().enumerate() {
            mixes.row_mut(row).iter_mut().for_each(|m| *m *= factor);
        }
        Ok(mixes)
    }
}

impl HyperConnectionOps for CpuOps {
    fn embed(&self, embed: &CpuLinear, step: &Batch) -> Result<HostTensor, OpError> {
        let width = embed.n_cols();
        let mut x = HostTensor::unset(step.n_tokens(), HC_MULT * width);
        let limit = embed.n_rows();
        if let Some(&token) = step.tokens.iter().find(|token| **token as usize >= limit) {
            let got = token as usize;
            return Err(OpError::OutOfRange { op: "embed", what: "token id", got, limit });
        }
        for_each_row(&mut x, |row, copies| {
            let (first, rest) = copies.split_at_mut(width);
            embed.row(step.tokens[row] as usize, first);
            rest.chunks_exact_mut(width).for_each(|copy| copy.copy_from_slice(first));
        });
        Ok(x)
    }

    fn hc_pre(
        &self,
        x: &HostTensor,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<HostTensor>, OpError> {
        const OP: &str = "hc_pre";
        let width = norm.weight.len();
        x.expect(OP, "x", x.rows, HC_MULT * width)?;
        check_len(OP, "fn", site.function.n_rows(), HC_MIX)?;
        let base = fixed::<HC_MIX>(OP, "base", &site.base)?;
        let scale = fixed::<3>(OP, "scale", &site.scale)?;
        let mixes = self.mixes(x, &site.function, site.norm_eps)?;
        let (rows, _) = mixes.data.as_chunks::<HC_MIX>();
        let work = x.rows * HC_MIX * site.sinkhorn_iters as usize;
        let mixed = in_parallel(work, 0..x.rows, |row| {
            split_sinkhorn(&rows[row], &scale, &base, site.sinkhorn_iters, site.hc_eps)
        });

        let is_bf16 = self.is_bf16();
        let mut normed = HostTensor::unset(x.rows, width);
        for_each_row(&mut normed, |row, out| {
            let mut collapsed = vec![0.0; width];
            collapse(&mixed[row].pre, x.row(row), is_bf16, &mut collapsed);
            rms_norm(&collapsed, &norm.weight, norm.eps, is_bf16, out);
        });
        let mut post = HostTensor::unset(x.rows, HC_MULT);
        let mut comb = HostTensor::unset(x.rows, HC_MULT * HC_MULT);
        for (row, mix) in mixed.iter().enumerate() {
            post.row_mut(row).copy_from_slice(&mix.post);
            comb.row_mut(row).copy_from_slice(mix.comb.as_flattened());
        }
        Ok(HcPre { normed, mix: HcMix { post, comb } })
    }

    fn hc_post(
        &self,
        x: &HostTensor,
        y: &HostTensor,
        mix: &HcMix<HostTensor>,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "hc_post";
        x.expect(OP, "x", y.rows, HC_MULT * y.cols)?;
        mix.post.expect(OP, "post", y.rows, HC_MULT)?;
        mix.comb.expect(OP, "comb", y.rows, HC_MULT * HC_MULT)?;
        let is_bf16 = self.is_bf16();
        let mut out = HostTensor::unset(x.rows, x.cols);
        for_each_row(&mut out, |row, out| {
            let (post, comb) = (mix.post.row(row), mix.comb.row(row));
            for (j, out) in out.chunks_exact_mut(y.cols).enumerate() {
                // `comb` is used transposed: its first index is the source copy.
                let into_j = std::array::from_fn(|i| comb[HC_MULT * i + j]);
                expand(post[j], &into_j, x.row(row), y.row(row), is_bf16, out);
            }
        });
        Ok(out)
    }
}

impl CpuOps {
    /// The collapse before a head, normalised; see [`HeadOps::hc_head`](crate::HeadOps::hc_head).
    pub(crate) fn collapse_for_head(
        &self,
        x: &HostTensor,
        head: &HcHead<Self>,
        norm: &Norm<Self>,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "hc_head";
        let width = norm.weight.len();
        x.expect(OP, "x", x.rows, HC_MULT * width)?;
        check_len(OP, "fn", head.function.n_rows(), HC_MULT)?;
        let base = fixed::<HC_MULT>(OP, "base", &head.base)?;
        let [scale] = fixed::<1>(OP, "scale", &head.scale)?;
        let mixes = self.mixes(x, &head.function, head.norm_eps)?;
        let is_bf16 = self.is_bf16();
        let mut out = HostTensor::unset(x.rows, width);
        for_each_row(&mut out, |row, out| {
            let mix = mixes.row(row);
            let pre = std::array::from_fn(|i| sigmoid(mix[i] * scale + base[i]) + head.hc_eps);
            let mut collapsed = vec![0.0; width];
            collapse(&pre, x.row(row), is_bf16, &mut collapsed);
            rms_norm(&collapsed, &norm.weight, norm.eps, is_bf16, out);
        });
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn comb_is_doubly_stochastic(mix in prop::collection::vec(-1.0_f32..1.0, HC_MIX)) {
            let mix: [f32; HC_MIX] = mix.try_into().unwrap();
            let site = split_sinkhorn(&mix, &[1.0; 3], &[0.0; HC_MIX], 20, 1e-6);
            for i in 0..HC_MULT {
                let row: f32 = site.comb[i].iter().sum();
                let column: f32 = site.comb.iter().map(|row| row[i]).sum();
                prop_assert!((row - 1.0).abs() < 2e-5, "row {i} sums to {row}");
                prop_assert!((column - 1.0).abs() < 4e-6, "column {i} sums to {column}");
            }
        }

        #[test]
        fn sinkhorn_agrees_with_a_double_precision_evaluation(
            mix in prop::collection::vec(-2.0_f32..2.0, HC_MIX),
        ) {
            let mix: [f32; HC_MIX] = mix.try_into().unwrap();
            let got = split_sinkhorn(&mix, &[0.7, 1.3, 0.9], &[0.1; HC_MIX], 20, 1e-6);
            let mut comb: Vec<Vec<f64>> = (0..4)
                .map(|i| (0..4).map(|j| f64::from(mix[8 + 4 * i + j]) * f64::from(0.9_f32) + f64::from(0.1_f32)).collect())
                .collect();
            for row in &mut comb {
                let max = row.iter().copied().fold(f64::MIN, f64::max);
                row.iter_mut().for_each(|x| *x = (*x - max).exp());
                let sum: f64 = row.iter().sum();
                row.iter_mut().for_each(|x| *x = *x / sum + 1e-6);
            }
            for iter in 0..20 {
                if iter > 0 {
                    for row in &mut comb {
                        let sum: f64 = row.iter().sum::<f64>() + 1e-6;
                        row.iter_mut().for_each(|x| *x /= sum);
                    }
                }
                for j in 0..4 {
                    let sum: f64 = comb.iter().map(|row| row[j]).sum::<f64>() + 1e-6;
                    comb.iter_mut().for_each(|row| row[j] /= sum);
                }
            }
            for (got, expected) in got.comb.iter().flatten().zip(comb.iter().flatten()) {
                prop_assert!((f64::from(*got) - expected).abs() < 2e-6);
            }
        }
    }
}
