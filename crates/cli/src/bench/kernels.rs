//! `fathom bench kernels`: the time of each hot operator on a GPU beside what its bytes and its
//! operations allow.
//!
//! Shapes are those of Flash, and of Pro's attention. Steps are timed as replays of a recording;
//! weights and cache rows rotate over more bytes than the second-level cache holds; values are drawn on
//! the device. The floor is the larger of bytes over bandwidth and operations over rate, both measured
//! in this process where that says something ([`ceilings`](super::ceilings)).
//!
//! Not yet run on a GPU.

use anyhow::{Context, Result};
use fathom_ops::cuda::check::bench::{self, Measured, Operator};
use serde_json::{Value, json};

use super::ceilings::{self, Rates};
use crate::gpu::{self, DeviceChoice};

/// Seconds below which the operator cannot go.
fn floor_s(measured: &Measured, rates: &Rates) -> f64 {
    let flops = if measured.is_fp8 { rates.fp8 } else { rates.bf16 };
    (measured.bytes / rates.bytes).max(measured.flops / flops)
}

fn line(measured: &Measured, rates: &Rates) -> String {
    let Measured { name, seconds, bytes, flops, .. } = measured;
    let (us, floor) = (seconds * 1e6, floor_s(measured, rates));
    format!(
        "{name:<40}{us:>10.1} us  {:>6.2} TB/s  {:>6.0} TFLOP/s  floor {:>8.1} us  {:>5.2} of it",
        bytes / seconds / 1e12,
        flops / seconds / 1e12,
        floor * 1e6,
        floor / seconds,
    )
}

/// What is timed, so that a peer can be given the same.
pub(super) fn shapes() -> Value {
    let shape = |shape: &bench::Shape| {
        let (bytes, flops) = shape.work();
        let mut value = match shape.operator {
            Operator::Fp8Linear { n, k, .. } => json!({ "operator": "fp8_linear", "n": n, "k": k }),
            Operator::Bf16Linear { n, k } => json!({ "operator": "bf16_linear", "n": n, "k": k }),
            Operator::Boundary { width } => json!({ "operator": "boundary", "width": width }),
            Operator::Experts { width, channels, n_experts, top_k } => json!({
                "operator": "experts",
                "width": width,
                "channels": channels,
                "n_experts": n_experts,
                "top_k": top_k,
            }),
            Operator::Attention { n_heads, top_k, context } => json!({
                "operator": "attention",
                "n_heads": n_heads,
                "top_k": top_k,
                "context": context,
            }),
            Operator::IndexSelect { n_heads, top_k, context } => json!({
                "operator": "index_select",
                "n_heads": n_heads,
                "top_k": top_k,
                "context": context,
            }),
        };
        value["name"] = shape.name().into();
        value["rows"] = shape.rows.into();
        value["bytes"] = bytes.into();
        value["flops"] = flops.into();
        value
    };
    json!({ "shapes": bench::shapes().iter().map(shape).collect::<Vec<_>>() })
}

/// Times every operator whose name contains `only` on the GPU.
///
/// # Errors
/// Where there is no GPU, saying why and what to run on a machine that has one.
pub(super) fn run(only: &str) -> Result<Value> {
    let gpu =
        gpu::open(DeviceChoice::Cuda).and_then(|gpu| gpu.context("there is no GPU")).context(
            "no GPU, so no kernel can be timed here; on a machine with one this table is filled by \
             `fathom bench kernels --out FILE`",
        )?;
    println!("{}", gpu.about);
    let ceilings = ceilings::ceilings(&gpu, false)?;
    println!("{}", ceilings.line());
    let mut rows = Vec::new();
    bench::run(&gpu.device, gpu.activations, only, &mut |measured| {
        println!("{}", line(&measured, &ceilings.rates));
        rows.push(json!({
            "name": measured.name,
            "seconds": measured.seconds,
            "bytes": measured.bytes,
            "flops": measured.flops,
            "is_fp8": measured.is_fp8,
            "floor_s": floor_s(&measured, &ceilings.rates),
        }));
    })?;
    Ok(json!({ "device": gpu.about, "ceilings": ceilings.json(), "kernels": rows }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_the_larger_of_bytes_and_operations() {
        let measured = |bytes, flops, is_fp8| Measured {
            name: "x".to_owned(),
            seconds: 1e-5,
            bytes,
            flops,
            is_fp8,
        };
        let h200 = ceilings::H200;
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got}");
        close(floor_s(&measured(4.3e6, 0.0, false), &h200), 1e-6);
        close(floor_s(&measured(4.3e6, 7.9e9, false), &h200), 1e-5);
        close(floor_s(&measured(4.3e6, 7.9e9, true), &h200), 5e-6);
        assert!(line(&measured(4.3e6, 0.0, false), &h200).contains("0.10 of it"));
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
            let error = format!("{:#}", run("").unwrap_err());
            assert!(error.contains("no GPU") && error.contains("fathom bench kernels"), "{error}");
        }
    }
}
