//! Rotary embedding of the last 64 channels, interleaved pairs, in f32.
//!
//! Source: `apply_rotary_emb`; angles as the official table forms them, `fp32(position) * fp32(f)`,
//! with full-range sine and cosine. Frequencies (with YaRN) come with the weights.

use fathom_core::model_config::ROPE_DIM;
use fathom_core::num::round_bf16;

/// Rotated pairs of one head.
pub const PAIRS: usize = ROPE_DIM / 2;

/// Cosine and sine of each pair at one position.
#[derive(Debug, Clone, Copy)]
pub struct Rotation {
    cos: [f32; PAIRS],
    sin: [f32; PAIRS],
}

impl Rotation {
    /// The rotation at `position` for `frequencies [32]` in radians per position.
    #[must_use]
    pub fn at(position: usize, frequencies: &[f32]) -> Self {
        let mut rotation = Self { cos: [1.0; PAIRS], sin: [0.0; PAIRS] };
        for (pair, frequency) in frequencies.iter().take(PAIRS).enumerate() {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (rotation.cos[pair], rotation.sin[pair]) = (cos, sin);
        }
        rotation
    }

    /// Rotates the trailing 64 channels of `head` forward.
    pub fn apply(&self, head: &mut [f32], is_bf16: bool) {
        self.rotate(head, is_bf16, 1.0);
    }

    /// Rotates them back.
    pub fn apply_inverse(&self, head: &mut [f32], is_bf16: bool) {
        self.rotate(head, is_bf16, -1.0);
    }

    fn rotate(&self, head: &mut [f32], is_bf16: bool, direction: f32) {
        let start = head.len() - ROPE_DIM;
        let (pairs, _) = head[start..].as_chunks_mut::<2>();
        for (pair, (cos, sin)) in pairs.iter_mut().zip(self.cos.iter().zip(&self.sin)) {
            let [re, im] = *pair;
            let sin = sin * direction;
            *pair = [re * cos - im * sin, re * sin + im * cos];
            if is_bf16 {
                *pair = pair.map(round_bf16);
            }
        }
    }
}
