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
use fathom_ops::cuda::check::bench::{self, Measured};
use serde_json::{Value, json};

use crate::gpu::{self, DeviceChoice};

/// Bytes and operations per second that a card can be expected to reach.
struct Ceiling {
    /// Part of the card's name.
    name: &'static str,
    bytes_per_s: f64,
    bf16_flops: f64,
}

/// 0.896 of the data sheet's bandwidth, 0.80 of its dense rate.
const CEILINGS: [Ceiling; 5] = [
    Ceiling { name: "A100", bytes_per_s: 1.83e12, bf16_flops: 250e12 },
    Ceiling { name: "H200", bytes_per_s: 4.30e12, bf16_flops: 790e12 },
    Ceiling { name: "H100", bytes_per_s: 3.00e12, bf16_flops: 790e12 },
    Ceiling { name: "B200", bytes_per_s: 7.17e12, bf16_flops: 1800e12 },
    Ceiling { name: "B300", bytes_per_s: 7.17e12, bf16_flops: 1800e12 },
];

fn ceiling(name: &str) -> Option<&'static Ceiling> {
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

/// Times every operator of the list on the GPU.
///
/// # Errors
/// Where there is no GPU, saying why and what to run on a machine that has one.
pub(super) fn run() -> Result<Value> {
    let gpu =
        gpu::open(DeviceChoice::Cuda).and_then(|gpu| gpu.context("there is no GPU")).context(
            "no GPU, so no kernel can be timed here; on a machine with one this table is filled by \
             `fathom bench kernels --out FILE`",
        )?;
    println!("{}", gpu.about);
    let name = gpu.device.name();
    let ceiling = ceiling(&name);
    let mut rows = Vec::new();
    bench::run(&gpu.device, gpu.activations, &mut |measured| {
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
    fn without_a_gpu_it_says_so_and_what_to_run_elsewhere() {
        if !fathom_ops::cuda::gpu::has_driver() {
            let error = format!("{:#}", run().unwrap_err());
            assert!(error.contains("no GPU") && error.contains("fathom bench kernels"), "{error}");
        }
    }
}
