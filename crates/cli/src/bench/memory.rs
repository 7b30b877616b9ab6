//! Decode of a synthetic checkpoint against the speed at which memory can be read.
//!
//! Decoding one token reads every weight of the layers once, except those of experts that were not
//! chosen: it can be no faster than memory. The checkpoint has the proportions of Flash and enough
//! weights not to fit any cache.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use fathom_core::{ExpertFormat, LayerKind, ModelConfig, Numerics, YarnConfig};
use fathom_model::Session;
use fathom_ops::Solo;
use fathom_weights::expected::{Component, Place, patterns_of, places};
use fathom_weights::{Checkpoint, Variant};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::speed;

/// Bytes of the buffer whose reading is timed: larger than any cache.
const BUFFER_BYTES: usize = 512 << 20;

/// Writes the checkpoint if it is not there, measures both, and returns them with their ratio.
pub(super) fn run(
    scratch: &Path,
    numerics: Numerics,
    threads: usize,
    n_decode: usize,
) -> Result<Value> {
    let checkpoint = synthetic(scratch)?;
    let model = speed::load(&checkpoint, numerics)?;
    let token_bytes = bytes_per_token(checkpoint.config());

    let mut session = Session::new(&model, &Solo, 2 * n_decode + 16, 0)?;
    let mut tokens = vec![speed::step(&mut session, &[0, 11, 222])?];
    speed::decode(&mut session, &mut tokens, n_decode)?;
    // Alternating, so that a busy machine slows both; the best of each counts.
    let (mut read, mut decode_s) = (0.0_f64, f64::INFINITY);
    let buffer = vec![1_u64; BUFFER_BYTES / 8];
    for _ in 0..5 {
        read = read.max(read_bandwidth(&buffer));
        session.rewind(0);
        tokens.truncate(1);
        speed::step(&mut session, &[0, 11, 222])?;
        let seconds = speed::decode(&mut session, &mut tokens, n_decode)?;
        decode_s = decode_s.min(seconds / n_decode as f64);
    }
    let decode_bandwidth = token_bytes as f64 / decode_s;
    Ok(json!({
        "numerics": numerics.name(),
        "threads": threads,
        "checkpoint_bytes": checkpoint.n_bytes(),
        "bytes_per_token": token_bytes,
        "decode_s_per_token": decode_s,
        "decode_bytes_per_s": decode_bandwidth,
        "memory_read_bytes_per_s": read,
        "fraction_of_memory_read": decode_bandwidth / read,
    }))
}

const SEED: u64 = 4;

/// The checkpoint in `scratch`, which is written if it is not there.
///
/// # Errors
/// If it cannot be written or is not sound.
pub(super) fn synthetic(scratch: &Path) -> Result<Checkpoint> {
    if !scratch.join("model.safetensors.index.json").exists() {
        fathom_weights::synthetic::write_synthetic(scratch, &flash_like(), SEED)
            .with_context(|| format!("writing a synthetic checkpoint to {}", scratch.display()))?;
    }
    Ok(Checkpoint::open(scratch)?)
}

/// Flash at half width, 12 layers and 32 experts: 2.2 GB, of which a token reads not quite half.
fn flash_like() -> ModelConfig {
    let mut layer_kinds = vec![LayerKind::Window; 2];
    layer_kinds.extend([LayerKind::Csa, LayerKind::Hca].repeat(5));
    ModelConfig {
        vocab_size: 32_768,
        hidden_size: 2048,
        num_hidden_layers: layer_kinds.len(),
        num_nextn_predict_layers: 0,
        num_attention_heads: 32,
        q_lora_rank: 512,
        o_groups: 4,
        o_lora_rank: 1024,
        layer_kinds,
        rope_theta: 10_000.0,
        compress_rope_theta: 160_000.0,
        yarn: YarnConfig {
            factor: 16.0,
            original_max_position_embeddings: 65_536,
            beta_fast: 32.0,
            beta_slow: 1.0,
        },
        index_n_heads: 32,
        index_topk: 512,
        n_routed_experts: 32,
        num_experts_per_tok: 6,
        moe_intermediate_size: 1024,
        num_hash_layers: 3,
        routed_scaling_factor: 1.5,
        swiglu_limit: Some(10.0),
        hc_sinkhorn_iters: 20,
        hc_eps: 1e-6,
        rms_norm_eps: 1e-6,
        expert_format: ExpertFormat::Fp4,
        max_position_embeddings: 1 << 20,
        bos_token_id: 0,
        eos_token_id: 1,
    }
}

/// Weight bytes that decoding one token reads: all but the embedding table, the expert tables
/// (one row each) and the routed experts that were not chosen.
fn bytes_per_token(config: &ModelConfig) -> u64 {
    let main = places(config).filter(|place| !matches!(place, Place::Mtp(_)));
    main.flat_map(|place| patterns_of(config, Variant::of(config), place))
        .map(|pattern| match pattern.component {
            Component::Embed | Component::Tid2eid => 0,
            Component::RoutedExperts => {
                let chosen = config.num_experts_per_tok as u64;
                pattern.bytes() * chosen / config.n_routed_experts as u64
            }
            _ => pattern.bytes(),
        })
        .sum()
}

/// Bytes per second at which all compute threads together read `buffer`.
fn read_bandwidth(buffer: &[u64]) -> f64 {
    let chunk = buffer.len().div_ceil(rayon::current_num_threads());
    let start = Instant::now();
    // Eight sums, or the additions would wait for each other instead of for memory.
    let sum = |part: &[u64]| {
        let (lanes, _) = part.as_chunks::<8>();
        lanes.iter().fold([0_u64; 8], |sums, lane| {
            std::array::from_fn(|index| sums[index].wrapping_add(lane[index]))
        })
    };
    let sums: Vec<[u64; 8]> = buffer.par_chunks(chunk).map(sum).collect();
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(sums);
    size_of_val(buffer) as f64 / seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_synthetic_model_has_two_gigabytes_and_reads_a_part_of_them_per_token() {
        let config = flash_like();
        let patterns =
            places(&config).flat_map(|place| patterns_of(&config, Variant::of(&config), place));
        let total: u64 = patterns.map(|pattern| pattern.bytes()).sum();
        assert!((1_900_000_000..2_400_000_000).contains(&total), "{total}");
        let token = bytes_per_token(&config);
        assert!(token > total / 8 && token < total / 2, "{token} of {total}");
    }
}
