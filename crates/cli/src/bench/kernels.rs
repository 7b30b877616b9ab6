//! `fathom bench kernels`: the time of each hot operator on a GPU beside what its bytes and its
//! operations allow.
//!
//! Shapes are those of Flash. Steps are timed as replays of a recording; weights rotate over more
//! bytes than the second-level cache holds; inputs are random. The floor is the larger of bytes over
//! bandwidth and operations over rate; both rates are a share of the data sheet that other kernels
//! reached on the same kind of card, until they are measured in the same run.
//!
//! Not yet run on a GPU.

use anyhow::{Context, Result};
use fathom_ops::cuda::check::bench::{self, Measured, Operator};
use serde_json::{Value, json};

use crate::gpu::{self, DeviceChoice};

/// Bytes and operations per second that a card can be expected to reach.
pub(super) struct Ceiling {
    /// Part of the card's name.
    name: &'static str,
    pub(super) bytes_per_s: f64,
    pub(super) bf16_flops: f64,
    /// Those of bf16 where there is no FP8.
    pub(super) fp8_flops: f64,
}

/// 0.896 of the data sheet's bandwidth, 0.80 of its dense rate.
const CEILINGS: [Ceiling; 5] = [
    Ceiling { name: "A100", bytes_per_s: 1.83e12, bf16_flops: 250e12, fp8_flops: 250e12 },
    Ceiling { name: "H200", bytes_per_s: 4.30e12, bf16_flops: 790e12, fp8_flops: 1580e12 },
    Ceiling { name: "H100", bytes_per_s: 3.00e12, bf16_flops: 790e12, fp8_flops: 1580e12 },
    Ceiling { name: "B200", bytes_per_s: 7.17e12, bf16_flops: 1800e12, fp8_flops: 3600e12 },
    Ceiling { name: "B300", bytes_per_s: 7.17e12, bf16_flops: 1800e12, fp8_flops: 3600e12 },
];

/// What is known of the card `name`.
pub(super) fn ceiling(name: &str) -> Option<&'static Ceiling> {
    CEILINGS.iter().find(|ceiling| name.contains(ceiling.name))
}

/// Seconds below which the operator cannot go.
fn floor_s(measured: &Measured, ceiling: &Ceiling) -> f64 {
    (measured.bytes / ceiling.bytes_per_s).max(measured.flops / ceiling.bf16_flops)
}

fn line(measured: &Measured, ceiling: Option<&Ceiling>) -> String {
    let Measured { name, seconds, bytes, .. } = measured;
    let rate = bytes / seconds / 1e12;
    let mut line = format!("{name:<40}{:>10.1} us  {rate:>6.2} TB/s", seconds * 1e6);
    if let Some(ceiling) = ceiling {
        let floor = floor_s(measured, ceiling);
        line += &format!("  floor {:>8.1} us  {:>5.2} of it", floor * 1e6, floor / seconds);
    }
    line
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
    let name = gpu.device.name();
    let ceiling = ceiling(&name);
    let mut rows = Vec::new();
    bench::run(&gpu.device, gpu.activations, only, &mut |measured| {
        println!("{}", line(&measured, ceiling));
        rows.push(json!({
            "name": measured.name,
            "seconds": measured.seconds,
            "bytes": measured.bytes,
            "flops": measured.flops,
            "floor_s": ceiling.map(|ceiling| floor_s(&measured, ceiling)),
        }));
    })?;
    Ok(json!({
        "device": gpu.about,
        "ceilings": ceiling.map(|c| json!({
            "bytes_per_s": c.bytes_per_s, "bf16_flops": c.bf16_flops, "measured": false,
        })),
        "kernels": rows,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_the_larger_of_bytes_and_operations() {
        let measured =
            |bytes, flops| Measured { name: "x".to_owned(), seconds: 1e-5, bytes, flops };
        let h200 = ceiling("NVIDIA H200").unwrap();
        assert!((floor_s(&measured(4.3e6, 0.0), h200) - 1e-6).abs() < 1e-12);
        assert!((floor_s(&measured(4.3e6, 7.9e9), h200) - 1e-5).abs() < 1e-12);
        assert!(line(&measured(4.3e6, 0.0), Some(h200)).contains("0.10 of it"));
        assert!(ceiling("Some other card").is_none());
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
