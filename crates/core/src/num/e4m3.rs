//! FP8 E4M3: sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinities, NaN is 0x7f / 0xff.

/// The largest finite value.
pub const E4M3_MAX: f32 = 448.0;

/// The value of a code; 0x7f and 0xff are NaN.
#[inline]
#[must_use]
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let sign = ((code & 0x80) as u32) << 24;
    let magnitude = (code & 0x7f) as u32;
    if magnitude == 0x7f {
        return f32::NAN;
    }
    // Exponent and mantissa sit 20 bits lower than in f32, so the value is off by 2^(127 - 7).
    // The multiplication is exact and turns E4M3's subnormals into normal numbers.
    let shifted = f32::from_bits(sign | (magnitude << 20));
    shifted * f32::from_bits((120 + 127) << 23)
}

/// The nearest code, ties to even, saturating at ±448. NaN gives 0x7f.
#[inline]
#[must_use]
pub const fn e4m3_from_f32(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    if x.is_nan() {
        return 0x7f;
    }
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    if magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    let code = if magnitude < 0.015_625 {
        // Below 2^-6 the grid is uniform with step 2^-9: let f32 addition do the rounding.
        let snapped = magnitude + 16_384.0;
        snapped.to_bits().wrapping_sub(0x4680_0000)
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x0007_ffff + ((bits >> 20) & 1)) >> 20) - 0x3c0
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every finite magnitude in ascending order.
    fn grid() -> Vec<f32> {
        (0..0x7f).map(e4m3_to_f32).collect()
    }

    #[test]
    fn every_finite_code_survives_a_round_trip() {
        for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(e4m3_from_f32(e4m3_to_f32(code)), code);
        }
    }

    #[test]
    fn codes_follow_the_definition() {
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_to_f32(0x01), 2.0_f32.powi(-9));
        assert_eq!(e4m3_to_f32(0x08), 2.0_f32.powi(-6));
        assert_eq!(e4m3_to_f32(0xb8), -1.0);
        assert!(e4m3_to_f32(0x7f).is_nan());
    }

    #[test]
    fn ties_between_neighbours_go_to_the_even_code() {
        let grid = grid();
        for (low, pair) in grid.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            let expected = if low % 2 == 0 { low } else { low + 1 };
            assert_eq!(usize::from(e4m3_from_f32(middle)), expected, "between {pair:?}");
        }
    }

    proptest! {
        #[test]
        fn encoding_picks_the_nearest_value(x in -600.0_f32..600.0) {
            let got = e4m3_to_f32(e4m3_from_f32(x));
            let clamped = x.clamp(-E4M3_MAX, E4M3_MAX);
            let best = grid().into_iter().map(|v| (v - clamped.abs()).abs()).fold(f32::MAX, f32::min);
            prop_assert!((got - clamped).abs() <= best);
        }
    }
}
