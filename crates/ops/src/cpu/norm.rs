//! RMS norms: f32 inside, one rounding at the end.
//!
//! Source: `RMSNorm.forward` and the per-head norm of `Attention.forward`.

use crate::cpu::simd::{dot, simd_fn};
use fathom_core::num::round_bf16;

simd_fn! {
    /// `out = x * rsqrt(mean(x^2) + eps) * weight`, rounded to bf16 if `is_bf16`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, is_bf16: bool, out: &mut [f32]) {
        let factor = inverse_rms(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            let y = x * factor * weight;
            *out = if is_bf16 { round_bf16(y) } else { y };
        }
    }
}

simd_fn! {
    /// The same without a weight, in place: one attention head.
    pub fn head_norm(x: &mut [f32], eps: f32, is_bf16: bool) {
        let factor = inverse_rms(x, eps);
        for x in x {
            let y = *x * factor;
            *x = if is_bf16 { round_bf16(y) } else { y };
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + eps).sqrt().recip()
}
