//! `fathom bench kernels`: the time of each operator on a GPU beside what its bytes and its operations
//! allow, and of a launch that does nothing.
//!
//! Shapes are those of Flash, and of Pro where it differs. Operators are timed as replays of a
//! recording, 30 times at least: the median counts, and the distance of the quartiles is given. The
//! floor is the larger of bytes over bandwidth and operations over rate, both measured in this process
//! where that says something ([`ceilings`](super::ceilings)).
//!
//! Not yet run on a GPU; CI runs it on the block emulator with small shapes, where times mean nothing.

use anyhow::{Context, Result, ensure};
use fathom_ops::cuda::Effort;
use fathom_ops::cuda::check::bench::{self, LaunchCost, Measured, Shape};
use serde_json::{Map, Value, json};

use super::ceilings::{self, Extent, Rates};
use crate::gpu::{self, DeviceChoice, Gpu};

/// What `--only` calls the launches that do nothing.
const LAUNCHES: &str = "launch";

/// Seconds below which the operator cannot go.
fn floor_s(measured: &Measured, rates: &Rates) -> f64 {
    let flops = if measured.is_fp8 { rates.fp8 } else { rates.bf16 };
    (measured.bytes / rates.bytes).max(measured.flops / flops)
}

fn line(measured: &Measured, rates: &Rates) -> String {
    let Measured { name, timed, bytes, flops, .. } = measured;
    let (us, floor) = (timed.median * 1e6, floor_s(measured, rates));
    format!(
        "{name:<58}{us:>10.1} us +-{:>4.1} %  {:>5.2} TB/s  {:>5.0} TFLOP/s  floor {:>8.1} us  {:>5.2} of it",
        timed.spread() * 50.0,
        bytes / timed.median / 1e12,
        flops / timed.median / 1e12,
        floor * 1e6,
        floor / timed.median,
    )
}

fn kernel_json(measured: &Measured, rates: &Rates) -> Value {
    let floor = floor_s(measured, rates);
    json!({
        "name": measured.name,
        "seconds": measured.timed.median,
        "quartiles": measured.timed.quartiles,
        "samples": measured.timed.samples,
        "bytes": measured.bytes,
        "flops": measured.flops,
        "is_fp8": measured.is_fp8,
        "floor_s": floor,
        "of_floor": floor / measured.timed.median,
    })
}

fn launch_line(cost: &LaunchCost) -> String {
    let LaunchCost { name, seconds, spread } = cost;
    let name = format!("{LAUNCHES} behind another, {name}");
    format!("{name:<58}{:>10.2} us +- {:.2} us", seconds * 1e6, spread / 2.0 * 1e6)
}

/// What is timed, so that a peer can be given the same.
pub(super) fn shapes() -> Value {
    let shape = |shape: &Shape| {
        let (bytes, flops) = shape.work();
        let mut value = Map::new();
        value.insert("operator".to_owned(), shape.operator.kind().into());
        for (name, size) in shape.operator.sizes() {
            value.insert(name.to_owned(), size.into());
        }
        value.insert("name".to_owned(), shape.name().into());
        value.insert("rows".to_owned(), shape.rows.into());
        value.insert("bytes".to_owned(), bytes.into());
        value.insert("flops".to_owned(), flops.into());
        Value::Object(value)
    };
    json!({ "shapes": bench::shapes().iter().map(shape).collect::<Vec<_>>() })
}

/// Times every operator whose name contains `only` on the GPU, with `small` at sizes where times mean
/// nothing; `save` gets the result when it is worth keeping.
///
/// # Errors
/// Where there is no GPU, saying why and what to run on a machine that has one.
pub(super) fn run(
    only: &str,
    small: bool,
    save: &mut dyn FnMut(&Value) -> Result<()>,
) -> Result<()> {
    let gpu =
        gpu::open(DeviceChoice::Cuda).and_then(|gpu| gpu.context("there is no GPU")).context(
            "no GPU, so no kernel can be timed here; on a machine with one this table is filled by \
             `fathom bench kernels --out FILE`",
        )?;
    println!("{}", gpu.about);
    let is_small = small || gpu.is_emulator;
    let extent = if is_small { Extent::Small } else { Extent::Full };
    let ceilings = ceilings::ceilings(&gpu, extent)?;
    println!("{}", ceilings.line());
    let host_rate = gpu.device.host_rate().context("copying to the GPU")?;
    if let Some(rate) = host_rate {
        println!("host to device, from pinned memory: {:.2} GB/s", rate / 1e9);
    }
    let mut result = json!({
        "device": gpu.about,
        "host_to_device_bytes_per_s": host_rate,
        "is_emulator": gpu.is_emulator,
        "ceilings": ceilings.json(),
        "kernels": [],
        "launches": [],
    });
    if only.is_empty() {
        let large = ceilings::large_products(&gpu, is_small)?;
        println!("{}", large.line(&ceilings.rates));
        result["large_products"] = large.json();
    }
    let all = if is_small { bench::small_shapes() } else { bench::shapes() };
    let shapes: Vec<Shape> = all.into_iter().filter(|shape| shape.name().contains(only)).collect();
    let times_launches = LAUNCHES.contains(only);
    ensure!(!shapes.is_empty() || times_launches, "nothing that is timed is called `{only}`");
    let mut kernels = Vec::new();
    let timed = bench::run(&gpu.device, gpu.activations, &shapes, is_small, &mut |measured| {
        println!("{}", line(&measured, &ceilings.rates));
        kernels.push(kernel_json(&measured, &ceilings.rates));
    });
    result["kernels"] = kernels.into();
    save(&result)?;
    timed?;
    if times_launches {
        launches(&gpu, is_small, &mut result, save)?;
    }
    if is_small {
        let whose = if gpu.is_emulator { "of the block emulator" } else { "at small sizes" };
        println!("times are those {whose} and say nothing about a GPU");
    }
    Ok(())
}

/// Launches that do nothing: last, because overlapping ones have not run on every card.
fn launches(
    gpu: &Gpu,
    is_small: bool,
    result: &mut Value,
    save: &mut dyn FnMut(&Value) -> Result<()>,
) -> Result<()> {
    let effort = if is_small { Effort::LEAST } else { Effort::FULL };
    let mut saved = Ok(());
    bench::launches(&gpu.device, effort, &mut |cost| {
        println!("{}", launch_line(&cost));
        let LaunchCost { name, seconds, spread } = cost;
        let value = json!({ "name": name, "seconds": seconds, "spread_s": spread });
        if let Some(launches) = result["launches"].as_array_mut() {
            launches.push(value);
        }
        if saved.is_ok() {
            saved = save(result);
        }
    })?;
    saved
}

#[cfg(test)]
mod tests {
    use fathom_ops::cuda::Timed;

    use super::*;

    fn measured(bytes: f64, flops: f64, is_fp8: bool) -> Measured {
        let timed = Timed::of(vec![0.9e-5, 1e-5, 1e-5, 1e-5, 1.2e-5]);
        Measured { name: "x".to_owned(), timed, bytes, flops, is_fp8 }
    }

    #[test]
    fn the_floor_is_the_larger_of_bytes_and_operations() {
        let h200 = ceilings::H200;
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got}");
        close(floor_s(&measured(4.3e6, 0.0, false), &h200), 1e-6);
        close(floor_s(&measured(4.3e6, 7.9e9, false), &h200), 1e-5);
        close(floor_s(&measured(4.3e6, 7.9e9, true), &h200), 5e-6);
        assert!(line(&measured(4.3e6, 0.0, false), &h200).contains("0.10 of it"));
    }

    #[test]
    fn the_spread_is_half_the_distance_of_the_quartiles_and_in_the_result() {
        let mut one = measured(4.3e6, 0.0, false);
        one.timed = Timed::of(vec![0.8e-5, 0.9e-5, 1e-5, 1.1e-5, 1.2e-5]);
        let text = line(&one, &ceilings::H200);
        assert!(text.contains("10.0 us +-10.0 %"), "{text}");
        let json = kernel_json(&one, &ceilings::H200);
        assert_eq!((&json["quartiles"], &json["samples"]), (&json!([0.9e-5, 1.1e-5]), &json!(5)));
        let cost = LaunchCost { name: "recorded", seconds: 1.5e-6, spread: 2e-7 };
        assert!(launch_line(&cost).ends_with("1.50 us +- 0.10 us"), "{}", launch_line(&cost));
    }

    #[test]
    fn shapes_name_everything_that_a_peer_needs() {
        let shapes = shapes();
        let all = shapes["shapes"].as_array().unwrap();
        assert_eq!(all.len(), bench::shapes().len());
        assert_eq!(all[0]["operator"], "fp8_linear");
        assert_eq!(
            (&all[0]["n"], &all[0]["k"], &all[0]["rows"]),
            (&json!(1536), &json!(4096), &json!(1))
        );
    }

    #[test]
    fn without_a_gpu_it_says_so_and_what_to_run_elsewhere() {
        if !fathom_ops::cuda::gpu::has_driver() {
            let error = format!("{:#}", run("", false, &mut |_| Ok(())).unwrap_err());
            assert!(error.contains("no GPU") && error.contains("fathom bench kernels"), "{error}");
        }
    }
}
