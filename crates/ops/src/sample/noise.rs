//! Random numbers that are looked up instead of drawn in order: Philox 4x32-10.
//!
//! A counter-based generator has no state to carry along, so preemption, batching and speculation
//! cannot shift it.
//!
//! # Source
//! Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the test
//! vectors are those published with their library Random123.

use fathom_core::TokenId;

use super::real::ln;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

/// The random block of a counter under a key.
#[must_use]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let product = |lane: usize, word: u32| u64::from(MULTIPLIERS[lane]) * u64::from(word);
        let (low, high) = (product(0, counter[0]), product(1, counter[2]));
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// No noise is above this: the largest 32-bit number gives 33 ln 2 = 22.874.
pub const MAX_GUMBEL: f64 = 22.88;

/// No noise is below this.
pub const MIN_GUMBEL: f64 = -3.135;

/// The Gumbel noise of all tokens at one position of one choice.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    key: [u32; 2],
    choice: u32,
    position: u32,
}

impl Noise {
    /// The noise for the token at `position` of the sequence (0 is the prompt's first token).
    #[must_use]
    pub const fn new(seed: u64, choice: u32, position: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], choice, position }
    }

    /// Noise of tokens `4 * group ..= 4 * group + 3`.
    #[must_use]
    pub fn gumbel_group(&self, group: u32) -> [f64; 4] {
        philox4x32([group, self.position, self.choice, 0], self.key).map(gumbel)
    }

    /// Noise of one token.
    #[must_use]
    pub fn gumbel(&self, token: TokenId) -> f64 {
        let block = philox4x32([token / 4, self.position, self.choice, 0], self.key);
        gumbel(block[token as usize % 4])
    }
}

/// Standard Gumbel noise from 32 random bits, by inversion; always finite.
fn gumbel(bits: u32) -> f64 {
    let uniform = (f64::from(bits) + 0.5) * 2f64.powi(-32);
    -ln(-ln(uniform))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_values() {
        let known = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in known {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn noise_stays_within_its_stated_bounds() {
        assert!(gumbel(u32::MAX) < MAX_GUMBEL && gumbel(u32::MAX) > MAX_GUMBEL - 0.01);
        assert!(gumbel(0) > MIN_GUMBEL && gumbel(0) < MIN_GUMBEL + 0.01);
    }

    #[test]
    fn noise_depends_on_each_part_of_its_address_and_on_nothing_else() {
        let noise = |seed, choice, position, token| {
            Noise::new(seed, choice, position).gumbel(token).to_bits()
        };
        let base = noise(1 << 40, 2, 3, 4);
        assert_eq!(base, noise(1 << 40, 2, 3, 4));
        for other in [
            noise(1 << 41, 2, 3, 4),
            noise(1, 2, 3, 4),
            noise(1 << 40, 3, 3, 4),
            noise(1 << 40, 2, 4, 4),
            noise(1 << 40, 2, 3, 5),
        ] {
            assert_ne!(base, other);
        }
        let group = Noise::new(7, 0, 9).gumbel_group(3);
        assert_eq!(group[2].to_bits(), Noise::new(7, 0, 9).gumbel(14).to_bits());
    }
}
