//! Vector code without intrinsics: lane arrays that the compiler turns into AVX-512 or AVX2.
//!
//! A function written with [`simd_fn!`] is compiled three times and picked at run time. All
//! versions do the same IEEE operations in the same order (multiplication and addition fuse only
//! where `mul_add` says so), so every tier gives the same bits.
//!
//! Not here: weight formats and matrix products (`gemm`).

/// f32 values that one accumulator holds; sums are taken per lane, then over lanes as a tree.
pub(crate) const LANES: usize = 16;

/// Compiles a function for AVX-512, AVX2 with FMA and the baseline, and picks at run time.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "the public signature decides")]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "the public signature decides")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "the public signature decides")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                match $crate::cpu::simd::tier() {
                    // SAFETY: the tier was detected on this processor.
                    $crate::cpu::simd::Tier::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the tier was detected on this processor.
                    $crate::cpu::simd::Tier::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Tier::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use simd_fn;

/// What the processor can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    /// AVX-512 F, VL, BW, DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The target's baseline.
    Portable,
}

/// The best tier of this processor; detection is cached by the standard library.
#[inline]
pub(crate) fn tier() -> Tier {
    #[cfg(target_arch = "x86_64")]
    {
        let has_fma = is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2");
        if has_fma
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
        {
            return Tier::Avx512;
        }
        if has_fma {
            return Tier::Avx2;
        }
    }
    Tier::Portable
}

/// Adds up the lanes of an accumulator as a fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `a[i] * b[i]`, fused, lane by lane; a ragged tail goes to the first lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for (lane, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        lanes[lane] = a.mul_add(*b, lanes[lane]);
    }
    sum_lanes(lanes)
}

/// e^x with an error below 2 ulp for results in the normal range, 0 below it, without a table or a
/// library call, so that it vectorises and gives the same bits everywhere.
///
/// Range reduction `x = n ln 2 + r`, then a polynomial of degree 6 on `|r| <= ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 split so that `n * LN2_HIGH` is exact for |n| < 2^9.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // Beyond these the result is infinite or rounds to zero.
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let n = clamped.mul_add(LOG2_E, ROUND) - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    // 2^n in two factors: n = 128 and n = -127 have no normal f32 of their own.
    let exponent = n as i32;
    let half = exponent >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let value = p * scale(half) * scale(exponent - half);
    let value = if x < -87.336_54 { 0.0 } else { value };
    let value = if x > 88.722_83 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_stays_within_two_ulp_of_the_true_value() {
        let mut worst = 0.0_f64;
        for step in 0..2_000_000 {
            let x = -87.0 + step as f32 * (175.0 / 2_000_000.0);
            let expected = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((expected as f32).to_bits() + 1))
                - f64::from(expected as f32);
            worst = worst.max((f64::from(exp(x)) - expected).abs() / ulp.abs());
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_handles_the_ends_of_its_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_dot_product_with_a_ragged_tail_counts_every_value() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let expected: f32 = a.iter().map(|x| x * x).sum();
        assert_eq!(dot(&a, &a), expected);
    }
}
