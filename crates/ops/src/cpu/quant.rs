//! Quantisation of activations, simulated: values go to their FP8 or FP4 grid and stay f32.
//!
//! Scales are powers of two, so multiplying quantised values by their scale commutes with the
//! rounding of every later f32 operation: a product of simulated values is bit for bit the product
//! of the codes times the scales.
//!
//! Source: `act_quant`, `fp4_act_quant` and `rotate_activation` of the official release.

use fathom_core::model_config::INDEX_HEAD_DIM;
use fathom_core::num::{Ue8m0, fp4_block_scale, fp8_block_scale, round_bf16};

use crate::cpu::simd::simd_fn;

/// Inputs that share one scale in front of an FP8 or FP4 linear layer.
pub const LINEAR_BLOCK: usize = 128;
/// Channels of a KV row that share one scale.
pub const KV_BLOCK: usize = 64;
/// Channels of an index vector that share one scale.
pub const INDEX_BLOCK: usize = 32;

/// Rounds to the nearest multiple of the FP8 grid at `x`, ties to even, for `|x| <= 448`.
///
/// Adding `1.5 * 2^23` grid steps makes f32 addition do the rounding; the grid step is uniform
/// below the smallest normal number.
#[inline(always)]
fn on_e4m3_grid(x: f32) -> f32 {
    let exponent = ((x.to_bits() >> 23) & 255).max(127 - 6);
    let magic = f32::from_bits(((exponent + 20) << 23) | 0x0040_0000);
    (x + magic) - magic
}

/// The same for the FP4 grid, for `|x| <= 6`.
#[inline(always)]
fn on_e2m1_grid(x: f32) -> f32 {
    let exponent = ((x.to_bits() >> 23) & 255).max(127);
    let magic = f32::from_bits(((exponent + 22) << 23) | 0x0040_0000);
    (x + magic) - magic
}

/// The largest magnitude of a block; NaN counts as absent.
#[inline(always)]
fn amax(block: &[f32]) -> f32 {
    block.iter().fold(0.0_f32, |m, x| m.max(x.abs()))
}

/// `2^-e` of a scale `2^e`; both stay normal because scales come from clamped amax values.
#[inline(always)]
fn inverse(scale: Ue8m0) -> f32 {
    Ue8m0::from_exponent(-scale.exponent()).to_f32()
}

#[inline(always)]
fn fp8_block(block: &mut [f32]) -> Ue8m0 {
    let scale = fp8_block_scale(amax(block));
    let (inverse, factor) = (inverse(scale), scale.to_f32());
    for x in block {
        *x = on_e4m3_grid((*x * inverse).clamp(-448.0, 448.0)) * factor;
    }
    scale
}

#[inline(always)]
fn fp4_block(block: &mut [f32]) -> Ue8m0 {
    let scale = fp4_block_scale(amax(block));
    let (inverse, factor) = (inverse(scale), scale.to_f32());
    for x in block {
        *x = on_e2m1_grid((*x * inverse).clamp(-6.0, 6.0)) * factor;
    }
    scale
}

simd_fn! {
    /// `act_quant` in front of a linear layer: blocks of 128, E4M3.
    pub fn quantise_linear_input(values: &mut [f32]) {
        for block in values.chunks_mut(LINEAR_BLOCK) {
            fp8_block(block);
        }
    }
}

simd_fn! {
    /// `act_quant` in place on the 448 channels without rope of a KV row: blocks of 64, E4M3.
    pub fn quantise_kv(values: &mut [f32]) {
        for block in values.chunks_mut(KV_BLOCK) {
            fp8_block(block);
        }
    }
}

simd_fn! {
    /// `fp4_act_quant` in place on index vectors: blocks of 32, E2M1.
    pub fn quantise_index(values: &mut [f32]) {
        for block in values.chunks_mut(INDEX_BLOCK) {
            fp4_block(block);
        }
    }
}

simd_fn! {
    /// Walsh-Hadamard transform of 128 values in natural order, times `128^-0.5`.
    ///
    /// With `is_bf16` the result is rounded to bf16 (`rotate_activation`).
    pub fn hadamard(values: &mut [f32; INDEX_HEAD_DIM], is_bf16: bool) {
        let mut half = 1;
        while half < INDEX_HEAD_DIM {
            for block in values.chunks_exact_mut(2 * half) {
                let (low, high) = block.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = (INDEX_HEAD_DIM as f32).sqrt().recip();
        for value in values {
            *value *= scale;
            if is_bf16 {
                *value = round_bf16(*value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fathom_core::num::{e2m1_from_f32, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_grid_trick_is_the_fp8_code_round_trip(x in -448.0_f32..=448.0) {
            prop_assert_eq!(on_e4m3_grid(x), e4m3_to_f32(e4m3_from_f32(x)));
            let small = x * 1e-4;
            prop_assert_eq!(on_e4m3_grid(small), e4m3_to_f32(e4m3_from_f32(small)));
        }

        #[test]
        fn the_grid_trick_is_the_fp4_code_round_trip(x in -6.0_f32..=6.0) {
            prop_assert_eq!(on_e2m1_grid(x), e2m1_to_f32(e2m1_from_f32(x)));
        }
    }

    #[test]
    fn ties_go_to_even_on_both_grids() {
        for x in [0.25_f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] {
            assert_eq!(on_e2m1_grid(x), e2m1_to_f32(e2m1_from_f32(x)), "{x}");
        }
        for code in 0..0x7e_u8 {
            let middle = (e4m3_to_f32(code) + e4m3_to_f32(code + 1)) / 2.0;
            assert_eq!(on_e4m3_grid(middle), e4m3_to_f32(e4m3_from_f32(middle)), "{code}");
        }
    }

    #[test]
    fn a_block_is_not_disturbed_by_its_neighbours() {
        let mut pair: Vec<f32> =
            (0..256).map(|i| if i < 128 { 1e-3 } else { 1e3 } * i as f32).collect();
        let mut alone = pair[..128].to_vec();
        quantise_linear_input(&mut pair);
        quantise_linear_input(&mut alone);
        assert_eq!(pair[..128], alone);
    }
}
