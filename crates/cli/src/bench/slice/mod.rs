//! `fathom bench slice`: as many layers of a model as fit one GPU, at their real sizes, through the
//! steps that the engine runs, against what their bytes and operations allow.
//!
//! Nothing is carried: weights and cache rows are drawn on the device. Decode steps are replays of a
//! recording, prefill chunks plain launches; the device's own events give the times. Floors count the
//! experts that the steps really reached, and are given for the rates measured in this process and for
//! those that the design's tables take. What is said of a whole model is estimated and called so.
//!
//! - [`floors`]: bytes, operations and floors; [`shape`]: the command's arguments;
//! - [`prepare`]: what fits, and the drawn model; [`run`]: the cases; [`stages`]: launches of a layer;
//! - [`parallel`]: what several GPUs would take, estimated;
//! - [`report`]: the table and the JSON; [`plot`]: the JSON as a picture.
//!
//! Not yet run on a GPU; CI runs it on the block emulator with nano, where times mean nothing.

mod floors;
mod parallel;
pub(super) mod plot;
mod prepare;
mod report;
mod run;
mod shape;
mod stages;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

pub(super) use shape::SliceArgs;
use shape::{Case, Work};

use super::ceilings::{self, Extent};
use crate::gpu::{self, DeviceChoice};

/// Runs the cases that are asked for; `save` gets the result after every one of them.
///
/// # Errors
/// Where there is no GPU or nothing fits it, with the numbers; or a step fails.
pub(super) fn run(args: &SliceArgs, save: &mut dyn FnMut(&Value) -> Result<()>) -> Result<()> {
    let config = shape::model(&args.model)?;
    if args.floors_only {
        let result = report::floors(&config, args);
        print!("{}", report::floors_table(&result));
        return save(&result);
    }
    let begun = Instant::now();
    let gpu = gpu::open(DeviceChoice::Cuda)
        .and_then(|gpu| gpu.context("there is no GPU"))
        .context(
            "no GPU, so no step can be timed here; `fathom bench slice --floors-only` prints what \
             should be reached, and on a machine with a GPU `fathom bench slice --out FILE` measures \
             it",
        )?;
    println!("{}", gpu.about);
    let extent = if args.quick { Extent::Quick } else { Extent::Full };
    let ceilings = ceilings::ceilings(&gpu, extent)?;
    println!("{}", ceilings.line());
    let stages = stages::per_layer(&config, gpu.kernels())?;
    println!("{}", stages.line());
    let mut result = json!({
        "bench": "slice",
        "version": env!("CARGO_PKG_VERSION"),
        "device": gpu.about,
        "is_emulator": gpu.is_emulator,
        "model": args.model,
        "model_layers": config.num_hidden_layers,
        "ceilings": ceilings.json(),
        "launches_per_layer": stages.json(),
        "cases": [],
        "skipped": [],
    });
    println!("{}", report::HEADING);
    let mut n_failed = 0;
    for group in shape::groups(args) {
        let seconds_left = || args.budget_s.map(|s| s - begun.elapsed().as_secs_f64());
        if seconds_left().is_some_and(|left| left <= 0.0) {
            for case in &group.cases {
                push(&mut result, "skipped", json!({ "case": case.name(), "why": "no time left" }));
            }
            save(&result)?;
            continue;
        }
        let mut prepared = match prepare::prepare(&config, &gpu, args, &group) {
            Ok(prepared) => prepared,
            // Groups differ in what they need; the others may fit.
            Err(error) => {
                println!("{}: {error:#}", group.name());
                let why = format!("{error:#}");
                for case in &group.cases {
                    push(&mut result, "skipped", json!({ "case": case.name(), "why": why }));
                }
                n_failed += 1;
                save(&result)?;
                continue;
            }
        };
        println!("{}", prepared.about());
        for &case in &group.cases {
            if seconds_left().is_some_and(|left| left <= 0.0) {
                push(&mut result, "skipped", json!({ "case": case.name(), "why": "no time left" }));
                continue;
            }
            let measured = run::case(&prepared, case, args)
                .with_context(|| format!("measuring {}", case.name()))?;
            let mut value = report::case(&config, &prepared, case, &measured, &ceilings);
            if args.deterministic {
                prepared.set_deterministic(true);
                let again = run::case(&prepared, case, args);
                prepared.set_deterministic(false);
                let again = again.with_context(|| format!("{}, deterministic", case.name()))?;
                value["deterministic"] = report::deterministic(&measured, &again);
            }
            println!("{}", report::line(&value));
            push(&mut result, "cases", value);
            save(&result)?;
        }
    }
    save(&result)?;
    if gpu.is_emulator {
        println!("times are those of the block emulator and say nothing about a GPU");
    }
    let n_cases = result["cases"].as_array().map_or(0, Vec::len);
    ensure!(n_cases > 0 || n_failed == 0, "no case fits this GPU; see above for what would");
    Ok(())
}

fn push(result: &mut Value, list: &str, value: Value) {
    if let Some(values) = result[list].as_array_mut() {
        values.push(value);
    }
}

/// Whether a case prefills.
const fn is_prefill(case: Case) -> bool {
    matches!(case.work, Work::Prefill { .. })
}
