//! Rotary frequencies by layer kind: theta 10,000 on window layers, 160,000 with YaRN elsewhere.
//!
//! Computed in f32 in the order of the official `precompute_freqs_cis`, which at large positions
//! decides the last bits of every angle.
//!
//! Not here: applying them (`fathom-ops`), always to the last 64 channels in adjacent pairs.

use std::f64::consts::PI;

use fathom_core::model_config::ROPE_DIM;
use fathom_core::{LayerKind, ModelConfig, YarnConfig};

/// Frequencies of a layer: one per pair of rotary channels.
pub const N_FREQUENCIES: usize = ROPE_DIM / 2;

/// Radians per position of each channel pair, for layers of `kind`.
///
/// # Source
/// `precompute_freqs_cis` in `inference/model.py` of the official release.
#[must_use]
pub fn frequencies(config: &ModelConfig, kind: LayerKind) -> [f32; N_FREQUENCIES] {
    match kind {
        LayerKind::Window => plain(config.rope_theta),
        LayerKind::Csa | LayerKind::Hca => {
            yarn(plain(config.compress_rope_theta), config.compress_rope_theta, &config.yarn)
        }
    }
}

/// `theta^(-2i / 64)`.
fn plain(theta: f64) -> [f32; N_FREQUENCIES] {
    std::array::from_fn(|i| {
        let power = theta.powf(2.0 * i as f64 / ROPE_DIM as f64) as f32;
        1.0 / power
    })
}

/// Pairs below `low` keep their frequency, pairs from `high` on are slowed by the full factor.
fn ramp_bounds(theta: f64, yarn: &YarnConfig) -> (f32, f32) {
    let context = f64::from(yarn.original_max_position_embeddings);
    let pair_with = |rotations: f64| {
        ROPE_DIM as f64 * (context / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let low = pair_with(yarn.beta_fast).floor().max(0.0);
    let high = pair_with(yarn.beta_slow).ceil().min(ROPE_DIM as f64 - 1.0);
    (low as f32, high as f32)
}

fn yarn(plain: [f32; N_FREQUENCIES], theta: f64, yarn: &YarnConfig) -> [f32; N_FREQUENCIES] {
    let (low, high) = ramp_bounds(theta, yarn);
    // The official code widens an empty ramp by this much instead of dividing by zero.
    let width = if low == high { 0.001 } else { high - low };
    std::array::from_fn(|i| {
        let smooth = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
        plain[i] / yarn.factor as f32 * (1.0 - smooth) + plain[i] * smooth
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const YARN: YarnConfig = YarnConfig {
        factor: 16.0,
        original_max_position_embeddings: 65_536,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };

    #[test]
    fn the_ramp_runs_from_pair_15_to_pair_25() {
        assert_eq!(ramp_bounds(160_000.0, &YARN), (15.0, 25.0));
    }

    #[test]
    fn the_frequencies_are_those_of_the_model_specification() {
        let pairs = [0, 1, 15, 16, 20, 24, 25, 31];
        let before =
            [1.0, 0.687656, 3.63554e-3, 2.5e-3, 5.59017e-4, 1.25e-4, 8.59570e-5, 9.08885e-6];
        let after = [
            1.0,
            0.687656,
            3.63554e-3,
            2.265625e-3,
            2.96978e-4,
            1.953125e-5,
            5.37231e-6,
            5.68053e-7,
        ];
        let plain = plain(160_000.0);
        let scaled = yarn(plain, 160_000.0, &YARN);
        for (k, pair) in pairs.into_iter().enumerate() {
            let close = |got: f32, expected: f32| (got / expected - 1.0).abs() < 2e-6;
            assert!(close(plain[pair], before[k]), "pair {pair}: {} {}", plain[pair], before[k]);
            assert!(close(scaled[pair], after[k]), "pair {pair}: {} {}", scaled[pair], after[k]);
        }
    }
}
