//! E8M0: a bare 8-bit exponent, used as the scale of a block.

/// A power-of-two scale `2^(byte - 127)`. Byte 255 (NaN) cannot be constructed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ue8m0(u8);

impl Ue8m0 {
    /// The scale stored as `byte`, or `None` for the NaN byte 255.
    #[inline]
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        if byte == 255 { None } else { Some(Self(byte)) }
    }

    /// The scale `2^exponent`, clamped to the format's range -127..=127.
    #[inline]
    #[must_use]
    pub const fn from_exponent(exponent: i32) -> Self {
        let biased = exponent + 127;
        Self(if biased < 0 {
            0
        } else if biased > 254 {
            254
        } else {
            biased as u8
        })
    }

    /// The stored byte.
    #[inline]
    #[must_use]
    pub const fn byte(self) -> u8 {
        self.0
    }

    /// The exponent `e` of the scale `2^e`.
    #[inline]
    #[must_use]
    pub const fn exponent(self) -> i32 {
        self.0 as i32 - 127
    }

    /// The scale's value.
    #[inline]
    #[must_use]
    pub const fn to_f32(self) -> f32 {
        if self.0 == 0 {
            // 2^-127 is subnormal in f32.
            f32::from_bits(1 << 22)
        } else {
            f32::from_bits((self.0 as u32) << 23)
        }
    }

    /// The smallest power of two that is not below `x` (finite, positive), by its exponent bits.
    #[inline]
    #[must_use]
    pub const fn ceil(x: f32) -> Self {
        let bits = x.to_bits();
        let exponent = ((bits >> 23) & 255) as i32 - 127;
        let up = (bits & 0x007f_ffff != 0) as i32;
        Self::from_exponent(exponent + up)
    }
}

#[cfg(test)]
mod tests {
    use super::Ue8m0;

    #[test]
    fn every_byte_but_255_is_its_power_of_two() {
        for byte in 0..=254_u8 {
            let expected = 2.0_f64.powi(i32::from(byte) - 127);
            assert_eq!(f64::from(Ue8m0::from_byte(byte).unwrap().to_f32()), expected);
        }
        assert_eq!(Ue8m0::from_byte(255), None);
    }

    #[test]
    fn ceil_keeps_powers_of_two_and_rounds_everything_else_up() {
        assert_eq!(Ue8m0::ceil(8.0).exponent(), 3);
        assert_eq!(Ue8m0::ceil(f32::from_bits(8.0_f32.to_bits() + 1)).exponent(), 4);
        assert_eq!(Ue8m0::ceil(f32::from_bits(8.0_f32.to_bits() - 1)).exponent(), 3);
    }
}
