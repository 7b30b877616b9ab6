//! The figures of `fathom bench slice`: one line per case, and JSON.

use std::fmt::Write as _;

use fathom_core::{LayerKind, ModelConfig};
use fathom_ops::{CacheSpec, IndexKeyFormat};
use serde_json::{Map, Value, json};

use super::floors::{self, Run, spread};
use super::parallel;
use super::prepare::Prepared;
use super::run::{Measured, quantile};
use super::shape::{Case, SliceArgs, Work};
use super::stages::kind_name;
use crate::bench::ceilings::{Ceilings, H200, Rates};

/// Format of the indexer keys that a GPU's cache has.
const KEYS: IndexKeyFormat = CacheSpec::formats_for(fathom_core::Numerics::Bf16).1;

/// Columns of the lines of cases.
pub(super) const HEADING: &str = "\
case                       layers experts   median ms    p90 ms  floor ms  of floor  model ms (est.)  tokens/s (est.)";

/// Floor of the slice that was measured, with the experts each layer really reached.
fn slice_floor_s(config: &ModelConfig, measured: &Measured, rates: &Rates) -> f64 {
    let layers = measured.distinct.iter().enumerate().map(|(index, &distinct)| {
        floors::layer(config, config.layer_kind(index), &measured.runs, distinct, KEYS)
            .floor_s(rates)
    });
    layers.sum::<f64>() + floors::head(config, measured.n_logits).floor_s(rates)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
    if n > 0.0 { sum / n } else { 0.0 }
}

/// Seconds of the whole model from the slice's: layers that are missing take what those of their kind
/// took; without that, as long in proportion as their floor.
fn estimated_s(
    config: &ModelConfig,
    measured: &Measured,
    median: f64,
    floor_ratio: f64,
) -> (f64, &'static str) {
    let missing = measured.distinct.len()..config.num_hidden_layers;
    let time_of = |layer: usize| {
        measured.kinds.get(kind_name(config.layer_kind(layer))).map(|(_, seconds, _)| *seconds)
    };
    match missing.map(time_of).collect::<Option<Vec<f64>>>() {
        Some(times) => (median + times.iter().sum::<f64>(), "measured layers"),
        None => (median * floor_ratio, "ratio of floors"),
    }
}

/// A case as JSON.
pub(super) fn case(
    config: &ModelConfig,
    prepared: &Prepared,
    case: Case,
    measured: &Measured,
    ceilings: &Ceilings,
) -> Value {
    let rates = &ceilings.rates;
    let median = quantile(&measured.seconds, 0.5);
    let floor = slice_floor_s(config, measured, rates);
    let distinct = mean(measured.distinct.iter().copied());
    let (runs, n_logits) = (&measured.runs, measured.n_logits);
    let model_floor = floors::model_floor_s(config, runs, n_logits, distinct, KEYS, rates);
    let (model_s, how) = estimated_s(config, measured, median, model_floor / floor);
    let n_tokens: usize = runs.iter().map(|run| run.n_tokens).sum();
    let on_several = if super::is_prefill(case) {
        Vec::new()
    } else {
        let step = parallel::Step { runs, distinct, keys: KEYS, seconds: model_s };
        parallel::estimates(config, &step, rates)
    };
    let kinds = measured.kinds.iter().map(|(name, (kind, seconds, layers))| {
        let experts = mean(layers.iter().map(|&layer| measured.distinct[layer]));
        let floor = floors::layer(config, *kind, runs, experts, KEYS).floor_s(rates);
        let value = json!({
            "layers": layers.len(),
            "distinct_experts": experts,
            "seconds": seconds,
            "floor_s": floor,
            "of_floor": ratio(floor, *seconds),
        });
        ((*name).to_owned(), value)
    });
    let (what, batch, context) = match case.work {
        Work::Decode { batch, context } => ("decode", batch, context),
        Work::Prefill { n_tokens, prefix } => ("prefill", n_tokens, prefix),
    };
    let reference = ceilings.reference.map(|reference| {
        let floor = slice_floor_s(config, measured, &reference);
        json!({ "floor_s": floor, "of_floor": ratio(floor, median) })
    });
    json!({
        "case": case.name(),
        "work": what,
        // Of prefill: tokens of the chunk, and tokens before it.
        "batch": batch,
        "context": context,
        "routing": if case.zipf { "zipf" } else { "uniform" },
        "layers": prepared.n_layers(),
        "distinct_experts": distinct,
        "is_replayed": measured.is_replayed,
        "largest_hidden": measured.largest_hidden,
        "seconds": measured.seconds,
        "median_s": median,
        "p90_s": quantile(&measured.seconds, 0.9),
        "floor_s": floor,
        "of_floor": ratio(floor, median),
        "with_reference_rates": reference,
        "kinds": kinds.collect::<Map<_, _>>(),
        "estimated_model": {
            "from": how,
            "layers": config.num_hidden_layers,
            "step_s": model_s,
            "floor_s": model_floor,
            "tokens_per_s": ratio(n_tokens as f64, model_s),
        },
        "estimated_on_several_gpus": on_several,
    })
}

/// What results that do not depend on the batch cost: the times of `again` beside those of `measured`.
pub(super) fn deterministic(measured: &Measured, again: &Measured) -> Value {
    let medians = [measured, again].map(|one| quantile(&one.seconds, 0.5));
    json!({
        "seconds": again.seconds,
        "median_s": medians[1],
        "p90_s": quantile(&again.seconds, 0.9),
        "cost": ratio(medians[1], medians[0]) - 1.0,
    })
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The line of a case, from its JSON.
pub(super) fn line(case: &Value) -> String {
    let number = |key: &str| case[key].as_f64().unwrap_or(0.0);
    let model = &case["estimated_model"];
    let mut line = format!(
        "{:<27}{:>6}{:>8.1}{:>12.3}{:>10.3}{:>10.3}{:>10.2}{:>17.3}{:>17.0}",
        case["case"].as_str().unwrap_or(""),
        number("layers"),
        number("distinct_experts"),
        number("median_s") * 1e3,
        number("p90_s") * 1e3,
        number("floor_s") * 1e3,
        number("of_floor"),
        model["step_s"].as_f64().unwrap_or(0.0) * 1e3,
        model["tokens_per_s"].as_f64().unwrap_or(0.0),
    );
    for (name, kind) in case["kinds"].as_object().into_iter().flatten() {
        let number = |key: &str| kind[key].as_f64().unwrap_or(0.0);
        let (us, floor) = (number("seconds") * 1e6, number("floor_s") * 1e6);
        let of_floor = number("of_floor");
        let _ =
            write!(line, "\n    {name:<12}{us:>10.1} us, floor {floor:.1}, {of_floor:.2} of it");
    }
    if let Some(cost) = case["deterministic"]["cost"].as_f64() {
        let ms = case["deterministic"]["median_s"].as_f64().unwrap_or(0.0) * 1e3;
        let _ = write!(line, "\n    deterministic {ms:.3} ms, {:+.1} %", cost * 100.0);
    }
    line + &parallel::lines(&case["estimated_on_several_gpus"])
}

/// Floors of the grid for an H200, with uniform routing.
pub(super) fn floors(config: &ModelConfig, args: &SliceArgs) -> Value {
    let mut kinds = config.layer_kinds[..config.num_hidden_layers].to_vec();
    kinds.sort_by_key(|kind| (*kind == LayerKind::Window, kind.ratio()));
    kinds.dedup();
    let row = |what: &str, batch: usize, context: usize, runs: &[Run], n_logits: usize| {
        let n_tokens: usize = runs.iter().map(|run| run.n_tokens).sum();
        let distinct = floors::uniform_distinct(config, n_tokens);
        let layers = kinds.iter().map(|&kind| {
            let work = floors::layer(config, kind, runs, distinct, KEYS);
            (kind_name(kind).to_owned(), json!(work.floor_s(&H200)))
        });
        let model_s = floors::model_floor_s(config, runs, n_logits, distinct, KEYS, &H200);
        json!({
            "work": what,
            "batch": batch,
            "context": context,
            "distinct_experts": distinct,
            "layer_s": layers.collect::<Map<_, _>>(),
            "head_s": floors::head(config, n_logits).floor_s(&H200),
            "model_s": model_s,
            "tokens_per_s": n_tokens as f64 / model_s,
        })
    };
    let mut rows = Vec::new();
    for context in args.context.iter().map(|tokens| tokens.0.max(1)) {
        for &batch in args.batch.iter().filter(|&&batch| batch > 0) {
            let lengths = spread(context, batch).into_iter();
            let runs: Vec<Run> = lengths.map(|n| Run { position: n - 1, n_tokens: 1 }).collect();
            rows.push(row("decode", batch, context, &runs, batch));
        }
    }
    for n_tokens in args.prefill.iter().map(|tokens| tokens.0.max(1)) {
        for prefix in [0].into_iter().chain(args.context.iter().skip(1).map(|tokens| tokens.0)) {
            rows.push(row("prefill", n_tokens, prefix, &[Run { position: prefix, n_tokens }], 1));
        }
    }
    let Rates { bytes, fp8, bf16 } = H200;
    json!({
        "bench": "slice floors",
        "model": args.model,
        "model_layers": config.num_hidden_layers,
        "rates": { "card": "H200", "bytes_per_s": bytes, "fp8_flops": fp8, "bf16_flops": bf16 },
        "floors": rows,
    })
}

/// [`floors`] to read.
pub(super) fn floors_table(result: &Value) -> String {
    let mut table = "floors on one H200 (4.3 TB/s, 1580 FP8 and 790 bf16 TFLOP/s), us per layer, \
                     uniform routing\n"
        .to_owned();
    let rows = result["floors"].as_array().map(Vec::as_slice).unwrap_or_default();
    for row in rows {
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let (batch, context) = (number(&row["batch"]), number(&row["context"]));
        let work = row["work"].as_str().unwrap_or("");
        let _ = write!(table, "{work:<8}{batch:>6} x {context:<7}");
        for (kind, seconds) in row["layer_s"].as_object().into_iter().flatten() {
            let _ = write!(table, "  {kind} {:>7.1}", number(seconds) * 1e6);
        }
        let _ = writeln!(
            table,
            "  model {:>7.2} ms  {:>6.0} tokens/s",
            number(&row["model_s"]) * 1e3,
            number(&row["tokens_per_s"]),
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn measured(n_layers: usize, seconds: f64) -> Measured {
        Measured {
            seconds: vec![seconds; 3],
            runs: vec![Run { position: 1023, n_tokens: 1 }],
            n_logits: 1,
            distinct: vec![6.0; n_layers],
            kinds: BTreeMap::new(),
            largest_hidden: 1.0,
            is_replayed: true,
        }
    }

    #[test]
    fn layers_that_are_missing_take_what_those_of_their_kind_took() {
        let flash = super::super::shape::model("flash").unwrap();
        let mut measured = measured(39, 4e-3);
        assert_eq!(estimated_s(&flash, &measured, 4e-3, 1.1), (4.4e-3, "ratio of floors"));
        // 39, 41: ratio 128; 40, 42: ratio 4.
        measured.kinds.insert("ratio-4", (LayerKind::Csa, 1e-4, vec![38]));
        measured.kinds.insert("ratio-128", (LayerKind::Hca, 9e-5, vec![37]));
        let (seconds, how) = estimated_s(&flash, &measured, 4e-3, 1.1);
        assert!((seconds - 4.38e-3).abs() < 1e-9 && how == "measured layers", "{seconds}");
    }

    #[test]
    fn what_determinism_costs_is_a_share_of_the_time_without_it() {
        let mut case = json!({ "case": "decode 1 x 1024" });
        assert!(!line(&case).contains("deterministic"));
        case["deterministic"] = deterministic(&measured(2, 4e-3), &measured(2, 4.5e-3));
        let cost = case["deterministic"]["cost"].as_f64().unwrap();
        assert!((cost - 0.125).abs() < 1e-9, "{cost}");
        assert!(line(&case).contains("deterministic 4.500 ms, +12.5 %"), "{}", line(&case));
    }

    #[test]
    fn a_slice_of_all_layers_has_the_floor_of_the_model() {
        let flash = super::super::shape::model("flash").unwrap();
        let measured = measured(43, 4e-3);
        let slice = slice_floor_s(&flash, &measured, &H200);
        let model = floors::model_floor_s(&flash, &measured.runs, 1, 6.0, KEYS, &H200);
        assert!((slice / model - 1.0).abs() < 1e-12);
        assert!((slice * 1e3 - 2.61).abs() < 0.01, "{slice}");
    }
}
