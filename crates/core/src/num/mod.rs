//! Number formats of the checkpoint and of quantised activations, bit for bit.
//!
//! Source: sections 3 and 9 of the model specification (`act_quant`, `fp4_act_quant` and the
//! kernels of `inference/kernel.py` of the official release).
//!
//! Not here: whole-row quantisation (`ops::cpu::quant`) and matrix products.

mod block;
mod e2m1;
mod e4m3;
mod ue8m0;

pub use block::{FP4_AMAX_FLOOR, FP8_AMAX_FLOOR, fp4_block_scale, fp8_block_scale};
pub use e2m1::{E2M1_VALUES, e2m1_from_f32, e2m1_to_f32};
pub use e4m3::{E4M3_MAX, e4m3_from_f32, e4m3_to_f32};
pub use ue8m0::Ue8m0;

/// Rounds to the nearest bf16 value, ties to even, and widens back.
#[inline]
#[must_use]
pub fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    if x.is_nan() {
        return x;
    }
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(rounded)
}

#[cfg(test)]
mod tests {
    use super::round_bf16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounding_to_bf16_agrees_with_the_half_crate(bits: u32) {
            let x = f32::from_bits(bits);
            let expected = half::bf16::from_f32(x).to_f32();
            let got = round_bf16(x);
            prop_assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()));
        }
    }
}
