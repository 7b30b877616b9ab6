//! Scales of quantisation blocks, by the exponent-bit rule of the official kernels.

use super::Ue8m0;

/// Smallest amax of an FP8 block.
pub const FP8_AMAX_FLOOR: f32 = 1e-4;
/// Smallest amax of an FP4 block: `6 * 2^-126`.
pub const FP4_AMAX_FLOOR: f32 = 6.0 * f32::MIN_POSITIVE;

/// The scale of an FP8 block whose largest magnitude is `amax`:
/// the smallest power of two not below `max(amax, 1e-4) / 448`.
///
/// The division is a multiplication by `fp32(1/448)`, as in `act_quant`.
#[inline]
#[must_use]
pub fn fp8_block_scale(amax: f32) -> Ue8m0 {
    Ue8m0::ceil(amax.max(FP8_AMAX_FLOOR) * (1.0 / 448.0))
}

/// The scale of an FP4 block whose largest magnitude is `amax`:
/// the smallest power of two not below `max(amax, 6 * 2^-126) / 6`.
///
/// The division is a multiplication by `fp32(1/6)`, as in `fp4_act_quant`.
#[inline]
#[must_use]
pub fn fp4_block_scale(amax: f32) -> Ue8m0 {
    Ue8m0::ceil(amax.max(FP4_AMAX_FLOOR) * (1.0 / 6.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_fills_the_format_exactly_gets_exactly_its_power_of_two() {
        for k in -10..=10 {
            let unit = 2.0_f32.powi(k);
            assert_eq!(fp8_block_scale(448.0 * unit).exponent(), k, "448 * 2^{k}");
            assert_eq!(fp4_block_scale(6.0 * unit).exponent(), k, "6 * 2^{k}");
        }
    }

    #[test]
    fn an_empty_block_gets_the_floor_scale() {
        assert_eq!(fp8_block_scale(0.0), fp8_block_scale(1e-4));
        assert_eq!(fp4_block_scale(0.0).exponent(), -126);
    }
}
