//! What a decode step would take on several GPUs, estimated from one.
//!
//! A rank's part of the work has a floor of its own ([`floors`]). How much of what one GPU loses against
//! its floor shrinks with the work is not known from one GPU: at least the step keeps its share of the
//! floor (all shrinks, as unused bandwidth does), at most its distance from it (nothing does, as launches
//! do not). What ranks send each other is modelled: a latency per collective, and bytes over the rate of
//! a link, nothing overlapped. Latencies and rates are those of the design's tables (the tests compare).
//!
//! Two placements: tensor parallel shares out heads, channels and vocabulary, and all ranks see all
//! sequences; expert parallel shares out sequences and experts. Not here: whether they fit in memory.

use std::fmt::Write as _;

use fathom_core::ModelConfig;
use fathom_ops::IndexKeyFormat;
use serde_json::{Value, json};

use super::floors::{Run, model_floor_s, rank_floor_s};
use crate::bench::ceilings::Rates;

/// Links between the GPUs of a node.
#[derive(Debug, Clone, Copy)]
struct Links {
    /// One way.
    bytes_per_s: f64,
    /// Of a sum over all ranks; a layer has two.
    all_reduce_s: f64,
    /// Of sending tokens to experts, and as much for sending them back.
    dispatch_s: f64,
}

/// H200s of a node: assumed, not measured.
const LINKS: Links = Links { bytes_per_s: 450e9, all_reduce_s: 4e-6, dispatch_s: 12e-6 };

/// How ranks share a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    Tensor,
    Expert,
}

/// Placements that are estimated, and ranks.
const PLACEMENTS: [(Placement, usize); 4] = [
    (Placement::Tensor, 2),
    (Placement::Tensor, 4),
    (Placement::Expert, 4),
    (Placement::Expert, 8),
];

/// The step of one GPU that the estimates start from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step<'a> {
    /// Sequences of the step: one token each.
    pub(super) runs: &'a [Run],
    /// Different experts per layer.
    pub(super) distinct: f64,
    pub(super) keys: IndexKeyFormat,
    /// Seconds of the whole model, itself estimated from the slice.
    pub(super) seconds: f64,
}

/// Seconds that ranks spend sending, in all layers of a step of `n` tokens.
fn links_s(config: &ModelConfig, placement: Placement, n_ranks: usize, n: usize) -> f64 {
    let (ranks, width) = (n_ranks as f64, config.hidden_size as f64);
    // The part of everything that is another rank's.
    let others = (ranks - 1.0) / ranks;
    let per_layer = match placement {
        Placement::Tensor => {
            // Reduced, then gathered, bf16.
            let bytes = 2.0 * others * n as f64 * width * 2.0;
            2.0 * (LINKS.all_reduce_s + bytes / LINKS.bytes_per_s)
        }
        Placement::Expert => {
            // Sent in FP8 with a scale per 128, sent back in bf16, for each chosen expert.
            let pairs = n as f64 / ranks * config.num_experts_per_tok as f64 * others;
            let bytes = pairs * width * (1.0 + 1.0 / 128.0 + 2.0);
            2.0 * LINKS.dispatch_s + bytes / LINKS.bytes_per_s
        }
    };
    per_layer * config.num_hidden_layers as f64
}

/// A rank's floor without links, if the placement can share the step out evenly.
fn floor_s(
    config: &ModelConfig,
    step: &Step<'_>,
    (placement, n_ranks): (Placement, usize),
    rates: &Rates,
) -> Option<f64> {
    let n = step.runs.len();
    match placement {
        Placement::Tensor => {
            let parts = [config.o_groups, config.moe_intermediate_size, config.vocab_size];
            let fits = parts.iter().all(|part| part.is_multiple_of(n_ranks));
            fits.then(|| {
                rank_floor_s(config, step.runs, n, step.distinct, step.keys, rates, n_ranks)
            })
        }
        Placement::Expert => (n > 0 && n.is_multiple_of(n_ranks)).then(|| {
            // Lengths ascend and are dealt out in turns: the last rank has the longest.
            let runs: Vec<Run> =
                step.runs.iter().skip(n_ranks - 1).step_by(n_ranks).copied().collect();
            let distinct = step.distinct / n_ranks as f64;
            model_floor_s(config, &runs, runs.len(), distinct, step.keys, rates)
        }),
    }
}

/// Estimates of all placements that fit the step, as JSON with what they are made of.
pub(super) fn estimates(config: &ModelConfig, step: &Step<'_>, rates: &Rates) -> Vec<Value> {
    let n = step.runs.len();
    let one = model_floor_s(config, step.runs, n, step.distinct, step.keys, rates);
    let estimate = |&(placement, n_ranks): &(Placement, usize)| {
        let rank = floor_s(config, step, (placement, n_ranks), rates)?;
        let links = links_s(config, placement, n_ranks, n);
        let least = rank * step.seconds / one + links;
        let most = rank + (step.seconds - one).max(0.0) + links;
        Some(json!({
            "placement": match placement { Placement::Tensor => "TP", Placement::Expert => "DP+EP" },
            "gpus": n_ranks,
            "label": "estimated",
            "step_s": { "least": least, "most": most },
            "tokens_per_s": { "least": n as f64 / most, "most": n as f64 / least },
            "inputs": {
                "one_gpu_step_s": step.seconds,
                "one_gpu_floor_s": one,
                "rank_floor_s": rank,
                "links_s": links,
                "link_bytes_per_s": LINKS.bytes_per_s,
                "all_reduce_latency_s": LINKS.all_reduce_s,
                "dispatch_latency_s": LINKS.dispatch_s,
            },
        }))
    };
    PLACEMENTS.iter().filter_map(estimate).collect()
}

/// [`estimates`] to read, a line each.
pub(super) fn lines(estimates: &Value) -> String {
    let mut lines = String::new();
    for one in estimates.as_array().into_iter().flatten() {
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let (step, rate) = (&one["step_s"], &one["tokens_per_s"]);
        let _ = write!(
            lines,
            "\n    estimated, {} x {}: {:.2} to {:.2} ms, {:.0} to {:.0} tokens/s",
            one["gpus"],
            one["placement"].as_str().unwrap_or(""),
            number(&step["least"]) * 1e3,
            number(&step["most"]) * 1e3,
            number(&rate["least"]),
            number(&rate["most"]),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ceilings::H200;
    use crate::bench::slice::floors::uniform_distinct;
    use crate::bench::slice::shape::model;

    #[track_caller]
    fn near(got: f64, expected: f64, tolerance: f64) {
        assert!((got / expected - 1.0).abs() < tolerance, "{got}, expected {expected}");
    }

    fn runs(context: usize, batch: usize) -> Vec<Run> {
        vec![Run { position: context - 1, n_tokens: 1 }; batch]
    }

    #[test]
    fn sending_takes_what_a_hand_counts() {
        let flash = model("flash").unwrap();
        // 1 token to 4 ranks: 8,192 bytes, of which 1.5 times go through a link, twice per layer.
        let bytes_s = 1.5 * 8192.0 / 450e9;
        near(links_s(&flash, Placement::Tensor, 4, 1), 43.0 * 2.0 * (4e-6 + bytes_s), 1e-12);
        // 8 tokens on 4 ranks: 2 of a rank, 6 experts each, of which 4.5 are elsewhere; 4,096 values
        // of a byte with 32 scales there, 8,192 bytes back.
        let bytes_s = 2.0 * 4.5 * (4096.0 + 32.0 + 8192.0) / 450e9;
        near(links_s(&flash, Placement::Expert, 4, 8), 43.0 * (24e-6 + bytes_s), 1e-12);
    }

    #[test]
    fn estimates_at_the_floor_are_those_of_the_placement_table() {
        let flash = model("flash").unwrap();
        // Context 4,096; batch, placement, ranks; tokens/s by bytes and products, and with links.
        for (batch, placement, n_ranks, alone, linked) in [
            (1, Placement::Tensor, 2, 685.0, 554.0),
            (1, Placement::Tensor, 4, 1133.0, 814.0),
            (32, Placement::Tensor, 4, 5931.0, 5504.0),
            (128, Placement::Tensor, 2, 7105.0, 6897.0),
            (8, Placement::Expert, 4, 2429.0, 1845.0),
            (128, Placement::Expert, 4, 12_650.0, 11_306.0),
            (128, Placement::Expert, 8, 21_471.0, 18_045.0),
        ] {
            let runs = runs(4096, batch);
            let distinct = uniform_distinct(&flash, batch);
            let keys = IndexKeyFormat::Fp8;
            let step = Step { runs: &runs, distinct, keys, seconds: 0.0 };
            let floor = floor_s(&flash, &step, (placement, n_ranks), &H200).unwrap();
            near(batch as f64 / floor, alone, 0.02);
            let links = links_s(&flash, placement, n_ranks, batch);
            near(batch as f64 / (floor + links), linked, 0.02);
        }
    }

    #[test]
    fn what_is_lost_against_the_floor_shrinks_with_the_work_or_stays() {
        let flash = model("flash").unwrap();
        let (runs, keys) = (runs(1024, 8), IndexKeyFormat::Fp8);
        let distinct = uniform_distinct(&flash, 8);
        let one = model_floor_s(&flash, &runs, 8, distinct, keys, &H200);
        let step = Step { runs: &runs, distinct, keys, seconds: 2.0 * one };
        let all = estimates(&flash, &step, &H200);
        let names: Vec<String> =
            all.iter().map(|one| format!("{} {}", one["gpus"], one["placement"])).collect();
        assert_eq!(names, ["2 \"TP\"", "4 \"TP\"", "4 \"DP+EP\"", "8 \"DP+EP\""]);
        let input = |name: &str| all[0]["inputs"][name].as_f64().unwrap();
        let (rank, links) = (input("rank_floor_s"), input("links_s"));
        near(all[0]["step_s"]["least"].as_f64().unwrap(), 2.0 * rank + links, 1e-12);
        near(all[0]["step_s"]["most"].as_f64().unwrap(), rank + one + links, 1e-12);
        assert!(all.iter().all(|one| one["label"] == "estimated"));
        let text = lines(&json!(all));
        assert!(
            text.starts_with("\n    estimated, 2 x TP: ") && text.contains("tokens/s"),
            "{text}"
        );
    }

    #[test]
    fn a_batch_that_ranks_cannot_share_evenly_is_left_out() {
        let flash = model("flash").unwrap();
        let runs = runs(1024, 6);
        let keys = IndexKeyFormat::Fp8;
        let step = Step { runs: &runs, distinct: 30.0, keys, seconds: 1e-2 };
        let all = estimates(&flash, &step, &H200);
        assert!(all.len() == 2 && all.iter().all(|one| one["placement"] == "TP"), "{all:?}");
    }
}
