//! FP4 E2M1: sign, 2 exponent bits, 1 mantissa bit. Codes 0..=7, then the negatives.

/// The value of each code; code 8 is negative zero.
pub const E2M1_VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of the code in the low nibble.
#[inline]
#[must_use]
pub const fn e2m1_to_f32(code: u8) -> f32 {
    E2M1_VALUES[(code & 15) as usize]
}

/// The nearest code, ties to the even code, saturating at ±6. NaN gives code 7.
#[inline]
#[must_use]
pub const fn e2m1_from_f32(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 28) & 8) as u8;
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    if magnitude >= 6.0 || x.is_nan() {
        return sign | 7;
    }
    let code = if magnitude < 1.0 {
        // Below 1 the grid is uniform with step 1/2: let f32 addition do the rounding.
        let snapped = magnitude + 4_194_304.0;
        snapped.to_bits().wrapping_sub(0x4a80_0000)
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x001f_ffff + ((bits >> 22) & 1)) >> 22) - 0xfc
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_even_code() {
        let cases = [
            (0.25, 0.0),
            (0.75, 1.0),
            (1.25, 1.0),
            (1.75, 2.0),
            (2.5, 2.0),
            (3.5, 4.0),
            (5.0, 4.0),
        ];
        for (x, expected) in cases {
            assert_eq!(e2m1_to_f32(e2m1_from_f32(x)), expected, "{x}");
            assert_eq!(e2m1_to_f32(e2m1_from_f32(-x)), -expected, "-{x}");
        }
    }

    #[test]
    fn every_code_survives_a_round_trip_and_large_values_saturate() {
        for code in 0..16 {
            assert_eq!(e2m1_from_f32(e2m1_to_f32(code)), code);
        }
        assert_eq!(e2m1_from_f32(1e9), 7);
        assert_eq!(e2m1_from_f32(-7.0), 15);
    }

    #[test]
    fn encoding_picks_the_nearest_value_everywhere() {
        for step in -7000..7000 {
            let x = step as f32 / 1000.0;
            let got = e2m1_to_f32(e2m1_from_f32(x));
            let best = E2M1_VALUES.iter().map(|v| (v - x).abs()).fold(f32::MAX, f32::min);
            assert!((got - x).abs() <= best, "{x} -> {got}");
        }
    }
}
