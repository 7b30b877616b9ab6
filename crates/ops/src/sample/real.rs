//! Exponential and logarithm as a fixed sequence of additions, multiplications and divisions of f64,
//! each rounded once: the same bits on every CPU and GPU, whatever its own functions give.
//!
//! Errors are below 2 units of the last place, which no choice depends on.
//!
//! Twin: `kernels/include/real.cuh`, operation by operation. Not here: functions of the model, which
//! are f32 and agree within tolerances.

/// Weights are multiples of its inverse: sums of integers have no order.
pub const WEIGHT_ONE: f64 = (1_u64 << WEIGHT_BITS) as f64;

const WEIGHT_BITS: u32 = 46;
/// Added to a number below 2^51 in size, it leaves the nearest integer in the low bits.
const ROUNDER: f64 = 1.5 * (1_u64 << 52) as f64;
const ONE_BITS: u64 = 1023;
const MANTISSA_BITS: u32 = 52;
/// ln 2 in two parts; multiples of the first by exponents are exact.
const LN2_HIGH: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);
/// 13!, 12!, .. 0!, inverted: the series of e^r.
const EXP: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    1.0 / 2.0,
    1.0,
    1.0,
];
/// The series of ln((1 + s) / (1 - s)) in s^2, behind its first term.
const LN: [f64; 11] = [
    2.0 / 23.0,
    2.0 / 21.0,
    2.0 / 19.0,
    2.0 / 17.0,
    2.0 / 15.0,
    2.0 / 13.0,
    2.0 / 11.0,
    2.0 / 9.0,
    2.0 / 7.0,
    2.0 / 5.0,
    2.0 / 3.0,
];

/// `e^x` times [`WEIGHT_ONE`], to the nearest integer, for `x <= 0`.
#[must_use]
pub fn weight(x: f64) -> u64 {
    // Here the weight is zero already.
    let x = if x > -40.0 { x } else { -40.0 };
    let rounded = x * std::f64::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let rest = (x - n * LN2_HIGH) - n * LN2_LOW;
    let power = EXP.into_iter().reduce(|sum, term| sum * rest + term).unwrap_or_default();
    let exponent = rounded.to_bits().wrapping_sub(ROUNDER.to_bits());
    let scale = (ONE_BITS + u64::from(WEIGHT_BITS)).wrapping_add(exponent) << MANTISSA_BITS;
    let scaled = power * f64::from_bits(scale);
    // Below 2^52, units of the last place of 2^52 + x are integers.
    let base = (1_u64 << MANTISSA_BITS) as f64;
    (scaled + base).to_bits() - base.to_bits()
}

/// The natural logarithm of a positive normal number.
#[must_use]
pub fn ln(x: f64) -> f64 {
    // x = 2^n m with m between the root of a half and that of two.
    let above = x.to_bits().wrapping_sub(std::f64::consts::FRAC_1_SQRT_2.to_bits()) as i64;
    let exponent = above >> MANTISSA_BITS;
    let m = f64::from_bits(x.to_bits().wrapping_sub((exponent << MANTISSA_BITS) as u64));
    let n = exponent as f64;
    let f = m - 1.0;
    let s = f / (f + 2.0);
    let square = s * s;
    let series = LN.into_iter().reduce(|sum, term| sum * square + term).unwrap_or_default();
    let small = s * (square * series) + n * LN2_LOW;
    n * LN2_HIGH + (2.0 * s + small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_rounded_exponentials() {
        assert_eq!(weight(0.0), 1 << WEIGHT_BITS);
        assert_eq!(weight(f64::NEG_INFINITY), 0);
        assert_eq!(weight(-40.0), 0);
        for i in 0..40_000 {
            let x = -f64::from(i) * 0.001;
            let expected = x.exp() * WEIGHT_ONE;
            let error = (weight(x) as f64 - expected).abs();
            assert!(error <= 0.5 + expected * 4.0 * f64::EPSILON, "{x}: {error}");
        }
    }

    #[test]
    fn logarithms_are_right_to_two_units_also_near_one() {
        assert_eq!(ln(1.0), 0.0);
        let far = (-1000..1000).map(|i| (f64::from(i) * 0.7).exp());
        let near = (1..2000).map(|i| 1.0 + (f64::from(i) - 1000.5) * 2_f64.powi(-33));
        let middle = (1..5000).map(|i| f64::from(i) * 0.0007);
        for x in far.chain(near).chain(middle) {
            let error = (ln(x) - x.ln()).abs();
            assert!(error <= 2.0 * f64::EPSILON * x.ln().abs(), "{x}: {error}");
        }
    }
}
