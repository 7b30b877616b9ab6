//! How long layers take at best: pure functions of a configuration, of the rows of a step, and of how
//! many experts it reached.
//!
//! A layer must read its weights, those of the experts that were reached, and the cache rows that
//! attention and indexer look at; what operators hand to each other may stay on the chip and is not
//! counted. Beside that it multiplies, and the copies of the hyper-connections pass through memory.
//! The larger of the two is the floor. With the counts of uniform routing these are the figures of
//! the slice table and of the prefill table of the performance design (the tests compare).
//!
//! Not here: what a real machine takes (`run`).

use fathom_core::model_config::{HC_MIX, HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use fathom_core::{LayerKind, ModelConfig};
use fathom_ops::IndexKeyFormat;

use crate::bench::ceilings::Rates;

/// Bytes of a KV row.
const KV_ROW: f64 = 584.0;

/// Tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Position of the first.
    pub(super) position: usize,
    pub(super) n_tokens: usize,
}

/// What a part of a model must do in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Work {
    /// Bytes of matrices outside of the routed experts.
    pub(super) weights: f64,
    /// Bytes of the experts that are reached.
    pub(super) experts: f64,
    /// Bytes of cache rows that are looked at.
    pub(super) cache: f64,
    /// Bytes of the copies of the hyper-connections, in and out of both boundaries.
    pub(super) copies: f64,
    pub(super) fp8_flops: f64,
    pub(super) bf16_flops: f64,
}

impl Work {
    /// Seconds below which it cannot be done.
    pub(super) fn floor_s(&self, rates: &Rates) -> f64 {
        let bytes_s = (self.weights + self.experts + self.cache) / rates.bytes;
        let products_s = self.fp8_flops / rates.fp8 + self.bf16_flops / rates.bf16;
        bytes_s.max(products_s + self.copies / rates.bytes)
    }
}

/// Bytes of an FP8 matrix with a scale byte per 128 x 128.
fn fp8_bytes(rows: usize, cols: usize) -> f64 {
    (rows * cols + rows.div_ceil(128) * cols.div_ceil(128)) as f64
}

/// Bytes of one routed expert: FP4 with a scale byte per 32 values.
pub(super) fn expert_bytes(config: &ModelConfig) -> f64 {
    (3 * config.hidden_size * config.moe_intermediate_size) as f64 * 17.0 / 32.0
}

/// Different experts that `n` tokens reach if each chooses independently and uniformly.
pub(super) fn uniform_distinct(config: &ModelConfig, n: usize) -> f64 {
    let (all, chosen) = (config.n_routed_experts as f64, config.num_experts_per_tok as f64);
    all * (1.0 - (1.0 - chosen / all).powf(n as f64))
}

/// Rows that the compressors and the indexer's weights take, all bf16 over the hidden state.
fn compressor_rows(config: &ModelConfig, kind: LayerKind) -> usize {
    let of = |width: usize| 2 * kind.compressor_width() * width;
    let index = if kind.has_indexer() { of(INDEX_HEAD_DIM) + config.index_n_heads } else { 0 };
    of(HEAD_DIM) + index
}

/// The FP8 matrices of a layer outside of the routed experts that one of `tp` ranks has: rows and
/// columns.
fn fp8_matrices(config: &ModelConfig, kind: LayerKind, tp: usize) -> Vec<(usize, usize)> {
    let (d, q, width) = (config.hidden_size, config.q_lora_rank, config.attention_width());
    let (groups, rank, inner) = (config.o_groups, config.o_lora_rank, config.moe_intermediate_size);
    let (outer, inner) = (groups * rank / tp, inner / tp);
    let mut matrices = vec![
        (q, d),
        (HEAD_DIM, d),
        (width / tp, q),
        (outer, width / groups),
        (d, outer),
        (inner, d),
        (inner, d),
        (d, inner),
    ];
    if kind.has_indexer() {
        matrices.push((config.index_n_heads * INDEX_HEAD_DIM, q));
    }
    matrices
}

/// Sum over the tokens of `run` of `min(position + 1, limit)` divided by `ratio`, rounded down.
fn sum_of_visible(run: Run, ratio: usize, limit: usize) -> f64 {
    (run.position + 1..=run.position + run.n_tokens).map(|n| (n / ratio).min(limit) as f64).sum()
}

/// What a layer of `kind` must do for the sequences `runs`, of whose tokens `distinct` different
/// experts were chosen.
pub(super) fn layer(
    config: &ModelConfig,
    kind: LayerKind,
    runs: &[Run],
    distinct: f64,
    keys: IndexKeyFormat,
) -> Work {
    rank_layer(config, kind, runs, distinct, keys, 1)
}

/// [`layer`] for one of `tp` ranks. They share out heads and intermediate channels; the first
/// projections, compressors, indexer, router, hyper-connections and the cache are each rank's own.
pub(super) fn rank_layer(
    config: &ModelConfig,
    kind: LayerKind,
    runs: &[Run],
    distinct: f64,
    keys: IndexKeyFormat,
    tp: usize,
) -> Work {
    let d = config.hidden_size;
    let n = runs.iter().map(|run| run.n_tokens).sum::<usize>() as f64;
    let matrices = fp8_matrices(config, kind, tp);
    let unquantised = (compressor_rows(config, kind) + config.n_routed_experts) * d;
    let mixing = HC_MIX * HC_MULT * d;
    let mut work = Work {
        weights: matrices.iter().map(|&(rows, cols)| fp8_bytes(rows, cols)).sum::<f64>()
            + (2 * unquantised + 2 * 4 * mixing) as f64,
        experts: distinct * expert_bytes(config) / tp as f64,
        // Each boundary reads and writes the copies, reads the sublayer's output and the copies for
        // the mix, and writes the next input.
        copies: n * (2 * (3 * HC_MULT + 2) * d * 2) as f64,
        ..Work::default()
    };
    let dense: usize = matrices.iter().map(|&(rows, cols)| rows * cols).sum();
    let routed = config.num_experts_per_tok * 3 * d * config.moe_intermediate_size / tp;
    work.fp8_flops = 2.0 * n * (dense + routed) as f64;
    work.bf16_flops = 2.0 * n * (unquantised + 2 * mixing) as f64;
    for &run in runs {
        let end = run.position + run.n_tokens;
        let mut attended = sum_of_visible(run, 1, WINDOW);
        let mut rows = end.min(WINDOW - 1 + run.n_tokens);
        match kind {
            LayerKind::Window => {}
            LayerKind::Csa => {
                let entries = kind.n_entries(end);
                attended += sum_of_visible(run, 4, config.index_topk);
                rows += entries.min(run.n_tokens * config.index_topk);
                work.cache += (entries * keys.row_bytes()) as f64;
                let scored = sum_of_visible(run, 4, usize::MAX);
                work.fp8_flops += 2.0 * scored * (config.index_n_heads * INDEX_HEAD_DIM) as f64;
            }
            LayerKind::Hca => {
                attended += sum_of_visible(run, 128, usize::MAX);
                rows += kind.n_entries(end);
            }
        }
        work.cache += rows as f64 * KV_ROW;
        // Scores and values.
        work.bf16_flops += 4.0 * attended * (config.attention_width() / tp) as f64;
    }
    work
}

/// What the head must do for `n` rows; the logits may stay on the chip.
pub(super) fn head(config: &ModelConfig, n: usize) -> Work {
    rank_head(config, n, 1)
}

/// [`head`] for one of `tp` ranks, which share out the vocabulary.
fn rank_head(config: &ModelConfig, n: usize, tp: usize) -> Work {
    let values = (config.vocab_size / tp * config.hidden_size) as f64;
    Work { weights: 2.0 * values, bf16_flops: 2.0 * n as f64 * values, ..Work::default() }
}

/// Bytes of a model of `n_layers` layers: what must fit beside cache and workspace. Embedding and head
/// are bf16.
pub(super) fn resident_bytes(config: &ModelConfig, n_layers: usize) -> f64 {
    let all_experts = config.n_routed_experts as f64;
    let layers = (0..n_layers).map(|index| {
        let work = layer(config, config.layer_kind(index), &[], all_experts, IndexKeyFormat::Mxfp4);
        work.weights + work.experts
    });
    layers.sum::<f64>() + 2.0 * head(config, 0).weights
}

/// Seconds below which a step of all of `config`'s layers with its head cannot be done.
pub(super) fn model_floor_s(
    config: &ModelConfig,
    runs: &[Run],
    n_logits: usize,
    distinct: f64,
    keys: IndexKeyFormat,
    rates: &Rates,
) -> f64 {
    rank_floor_s(config, runs, n_logits, distinct, keys, rates, 1)
}

/// [`model_floor_s`] for one of `tp` ranks, without what they send each other.
pub(super) fn rank_floor_s(
    config: &ModelConfig,
    runs: &[Run],
    n_logits: usize,
    distinct: f64,
    keys: IndexKeyFormat,
    rates: &Rates,
    tp: usize,
) -> f64 {
    let kinds = &config.layer_kinds[..config.num_hidden_layers];
    let work = |&kind: &LayerKind| rank_layer(config, kind, runs, distinct, keys, tp);
    let layers = kinds.iter().map(|kind| work(kind).floor_s(rates));
    layers.sum::<f64>() + rank_head(config, n_logits, tp).floor_s(rates)
}

/// Context lengths of a batch around `context`: spread by a quarter to both sides, so that sequences
/// end apart.
pub(super) fn spread(context: usize, batch: usize) -> Vec<usize> {
    let length = |index: usize| {
        if batch == 1 {
            return context;
        }
        let share = 0.75 + 0.5 * index as f64 / (batch - 1) as f64;
        ((context as f64 * share).round() as usize).max(1)
    };
    (0..batch).map(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ceilings::H200;

    fn config(text: &str) -> ModelConfig {
        fathom_weights::parse_config(text.as_bytes()).unwrap().config
    }

    fn flash() -> ModelConfig {
        config(include_str!("../../../../../models/flash/config.json"))
    }

    fn nano() -> ModelConfig {
        config(include_str!("../../../../../models/nano/config.json"))
    }

    fn decode(context: usize, batch: usize) -> Vec<Run> {
        vec![Run { position: context - 1, n_tokens: 1 }; batch]
    }

    #[track_caller]
    fn near(got: f64, expected: f64, tolerance: f64) {
        assert!((got / expected - 1.0).abs() < tolerance, "{got}, expected {expected}");
    }

    #[test]
    fn layers_of_nano_take_the_bytes_that_a_hand_counts() {
        let work = layer(&nano(), LayerKind::Window, &decode(1, 1), 3.0, IndexKeyFormat::Mxfp4);
        let mixing = 2 * 24 * 4 * 256 * 4;
        let attention = (128 * 256 + 2) + (512 * 256 + 8) + (2048 * 128 + 16);
        let output = (256 * 1024 + 16) + (256 * 256 + 4);
        let (router, shared) = (8 * 256 * 2, 3 * (128 * 256 + 2));
        let weights = f64::from(mixing + attention + output + router + shared);
        assert_eq!(work.weights, weights);
        assert_eq!(weights, 1_052_724.0);
        assert_eq!(work.experts, 3.0 * 52_224.0);
        assert_eq!(work.cache, 584.0);

        // Ratio 4 at 100 tokens: 25 entries, of which 16 are chosen; 100 rows of the window.
        let csa = layer(&nano(), LayerKind::Csa, &decode(100, 1), 3.0, IndexKeyFormat::Mxfp4);
        let (compressors, index_q) = ((2048 + 512 + 8) * 256 * 2, 1024 * 128 + 8);
        assert_eq!(csa.weights, weights + f64::from(compressors + index_q));
        assert_eq!(csa.cache, f64::from((100 + 16) * 584 + 25 * 68));
        // Ratio 128 at 300 tokens, twice: 2 entries and a whole window each.
        let hca = layer(&nano(), LayerKind::Hca, &decode(300, 2), 5.0, IndexKeyFormat::Mxfp4);
        assert_eq!(hca.weights, weights + f64::from(1024 * 256 * 2));
        assert_eq!((hca.experts, hca.cache), (5.0 * 52_224.0, f64::from(2 * 130 * 584)));
    }

    #[test]
    fn floors_of_flash_are_those_of_the_slice_table() {
        let config = flash();
        // Context, batch; ratio 4, ratio 128, window in us; the model in ms. Index keys in FP8.
        for (context, batch, csa, hca, window, model) in [
            (1024, 1, 57.6, 52.6, 50.6, 2.61),
            (1024, 8, 176.9, 171.6, 169.6, 7.73),
            (1024, 32, 464.1, 457.8, 455.8, 20.06),
            (1024, 64, 664.2, 656.6, 654.5, 28.64),
            (1024, 128, 804.3, 794.0, 791.9, 34.60),
            (32_768, 1, 57.9, 52.6, 50.6, 2.62),
            (32_768, 32, 473.0, 458.9, 455.8, 20.27),
            (32_768, 128, 839.9, 798.3, 791.9, 35.43),
            (131_072, 1, 58.6, 52.7, 50.6, 2.63),
            (131_072, 8, 185.2, 172.7, 169.6, 7.93),
            (131_072, 128, 936.5, 811.6, 791.9, 37.73),
        ] {
            let (runs, distinct) = (decode(context, batch), uniform_distinct(&config, batch));
            let us = |kind| {
                layer(&config, kind, &runs, distinct, IndexKeyFormat::Fp8).floor_s(&H200) * 1e6
            };
            near(us(LayerKind::Csa), csa, 0.004);
            near(us(LayerKind::Hca), hca, 0.004);
            near(us(LayerKind::Window), window, 0.004);
            let keys = IndexKeyFormat::Fp8;
            let whole = model_floor_s(&config, &runs, batch, distinct, keys, &H200);
            near(whole * 1e3, model, 0.004);
        }
        near(head(&config, 1).floor_s(&H200) * 1e6, 246.0, 0.002);
    }

    #[test]
    fn floors_of_prefill_are_those_of_the_prefill_table() {
        let config = flash();
        for (prompt, tokens_per_s) in [(4096, 47_998.0), (32_768, 44_689.0), (131_072, 37_904.0)] {
            let runs = [Run { position: 0, n_tokens: prompt }];
            // The table takes the products with bf16 weights at the FP8 rate: hence the tolerance.
            let all = config.n_routed_experts as f64;
            let seconds = model_floor_s(&config, &runs, 0, all, IndexKeyFormat::Fp8, &H200);
            near(prompt as f64 / seconds, tokens_per_s, 0.08);
        }
    }

    #[test]
    fn resident_bytes_are_those_of_the_parameter_table() {
        let config = flash();
        near(resident_bytes(&config, 43), 156.0e9, 0.003);
        near(expert_bytes(&config), 13.37e6, 0.001);
        // 39 of 43 layers in 132 GiB.
        let fits = |n| resident_bytes(&config, n) < 132.5 * f64::from(1 << 30);
        assert!(fits(39) && !fits(40));
        for (n, distinct) in [(1, 6.0), (8, 44.2), (64, 199.9), (512, 256.0)] {
            near(uniform_distinct(&config, n), distinct, 0.002);
        }
    }

    #[test]
    fn lengths_are_spread_around_the_context() {
        assert_eq!(spread(1024, 1), [1024]);
        assert_eq!(spread(1024, 3), [768, 1024, 1280]);
        assert_eq!(spread(1, 2), [1, 1]);
    }
}
