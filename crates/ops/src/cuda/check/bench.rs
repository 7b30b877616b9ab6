//! Hot operators at Flash's dimensions, timed.
//!
//! Bytes and operations are counted from the shapes: what must be read and written once, and the
//! multiplications and additions of the products.

use std::sync::Arc;

use fathom_core::parallel::ExpertShard;

use super::random::Random;
use crate::cuda::device::Device;
use crate::cuda::memory::{ArenaSizes, Memory, Place};
use crate::cuda::ops::CudaOps;
use crate::cuda::rehearsal::Rehearsal;
use crate::layer::{HcSite, MoeWeights, Router, SharedExpert};
use crate::traits::{HcMix, HeadOps, HyperConnectionOps, MoeOps};
use crate::{Activations, Backend, Batch, OpError, Solo, WeightSource};

/// One operator's time.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Operator and shape.
    pub name: String,
    /// Median of one call.
    pub seconds: f64,
    /// Bytes that must move.
    pub bytes: f64,
    /// Multiplications and additions of its products.
    pub flops: f64,
}

/// Bytes over which weights rotate: four times a large second-level cache.
const ROTATED_BYTES: usize = 240 << 20;

/// Times every operator and reports each.
///
/// # Errors
/// What an operator fails with; [`OpError::Device`] if the device has no room.
pub fn run(
    device: &Arc<dyn Device>,
    activations: Activations,
    report: &mut dyn FnMut(Measured),
) -> Result<(), OpError> {
    // Once for show, to see how much memory it takes.
    let rehearsal = Rehearsal::memory(device.arch());
    all(&CudaOps::over(rehearsal.clone(), activations), None)?;
    let sizes = ArenaSizes {
        weights: rehearsal.reach(Place::Weights),
        cache: 0,
        // Timing waits for a few bytes of its own.
        workspace: rehearsal.reach(Place::Workspace) + (1 << 20),
    };
    let memory = Memory::planned(Arc::clone(device), sizes)?;
    all(&CudaOps::over(memory, activations), Some(report))
}

/// Calls `body` for each operator: timed and reported, or once.
struct Bench<'a, 'r> {
    ops: &'a CudaOps,
    report: Option<&'r mut dyn FnMut(Measured)>,
}

impl Bench<'_, '_> {
    fn time(
        &mut self,
        name: String,
        (bytes, flops): (f64, f64),
        n_copies: usize,
        body: &mut dyn FnMut(usize) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let Some(report) = &mut self.report else { return (0..n_copies).try_for_each(body) };
        // As many calls as copies at least, so that each is read once per round.
        let seconds = self.ops.time(n_copies.max(8), &mut |call| body(call % n_copies))?;
        report(Measured { name, seconds, bytes, flops });
        Ok(())
    }
}

fn all(ops: &CudaOps, report: Option<&mut dyn FnMut(Measured)>) -> Result<(), OpError> {
    let mut bench = Bench { ops, report };
    let mut random = Random::new(5);
    products(&mut bench, &mut random)?;
    boundaries(&mut bench, &mut random)?;
    experts(&mut bench, &mut random)
}

/// `copies` matrices that share their host bytes and not their device memory.
fn matrices<T>(
    source: &WeightSource,
    bytes: usize,
    load: impl Fn(&WeightSource) -> Result<T, OpError>,
) -> Result<Vec<T>, OpError> {
    (0..ROTATED_BYTES.div_ceil(bytes).max(2)).map(|_| load(source)).collect()
}

fn products(bench: &mut Bench<'_, '_>, random: &mut Random) -> Result<(), OpError> {
    let ops = bench.ops;
    for (name, n, k) in [
        ("wq_a and wkv", 1536, 4096),
        ("wq_b", 32_768, 1024),
        ("wo_b", 4096, 8192),
        ("shared expert, up", 2048, 4096),
    ] {
        let weights = matrices(&random.fp8(n, k)?, n * k, |w| ops.load_linear(w))?;
        for rows in [1, 8, 64, 1024] {
            let x = ops.upload(rows, k, &random.values(rows * k, 1.0))?;
            let bytes = (n * k + 2 * rows * (n + k)) as f64;
            let flops = (2 * rows * n * k) as f64;
            let name = format!("FP8 {name} [{n}, {k}] x {rows}");
            bench.time(name, (bytes, flops), weights.len(), &mut |copy| {
                ops.quantised_linear(&weights[copy], &x).map(drop)
            })?;
        }
    }
    let (n, k) = (129_280 / 8, 4096);
    let heads = matrices(&random.bf16(n, k)?, 2 * n * k, |w| ops.load_linear(w))?;
    for rows in [1, 64] {
        let x = ops.upload(rows, k, &random.values(rows * k, 1.0))?;
        let bytes = (2 * n * k + rows * (4 * n + 2 * k)) as f64;
        let flops = (2 * rows * n * k) as f64;
        let name = format!("bf16, an eighth of the head [{n}, {k}] x {rows}");
        bench.time(name, (bytes, flops), heads.len(), &mut |copy| {
            ops.logits(&heads[copy], &x, &Solo).map(drop)
        })?;
    }
    Ok(())
}

fn boundaries(bench: &mut Bench<'_, '_>, random: &mut Random) -> Result<(), OpError> {
    let ops = bench.ops;
    let width = 4096;
    let site = HcSite {
        function: ops.load_linear(&random.f32(24, 4 * width)?)?,
        base: random.vector(ops, 24, 0.0)?,
        scale: random.vector(ops, 3, 1.0)?,
        sinkhorn_iters: 20,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let norm = random.norm(ops, width)?;
    for rows in [1, 8, 64, 1024] {
        let x = ops.upload(rows, 4 * width, &random.values(rows * 4 * width, 1.0))?;
        let y = ops.upload(rows, width, &random.values(rows * width, 1.0))?;
        let HcMix { post, comb } = ops.hc_pre(&x, &site, &norm)?.mix;
        let mix = HcMix { post, comb };
        // The copies in and out, the sublayer's output, the next one's input in two forms.
        let bytes = (2 * rows * width * (4 + 4 + 1 + 2) + 4 * 24 * 4 * width) as f64;
        let flops = (2 * rows * 24 * 4 * width) as f64;
        bench.time(format!("boundary, width {width}, x {rows}"), (bytes, flops), 1, &mut |_| {
            let mut copies = x.clone();
            ops.hc_boundary(&mut copies, &y, &mix, &site, &norm).map(drop)
        })?;
    }
    Ok(())
}

fn experts(bench: &mut Bench<'_, '_>, random: &mut Random) -> Result<(), OpError> {
    let ops = bench.ops;
    // Enough experts that one token's are not in the second-level cache from the call before.
    let (width, channels, n_experts, top_k) = (4096, 2048, 64, 6);
    let up = random.fp4(channels, width)?;
    let down = random.fp4(width, channels)?;
    let all: Vec<_> = (0..n_experts).map(|_| [up.clone(), up.clone(), down.clone()]).collect();
    let weights = MoeWeights::<CudaOps> {
        gate: ops.load_linear(&random.bf16(n_experts, width)?)?,
        router: Router::Score(random.vector(ops, n_experts, 0.0)?),
        experts: ops.load_experts(&all, 0, n_experts)?,
        shard: ExpertShard { experts: 0..n_experts, channels: 0..channels },
        experts_are_slices: false,
        shared: SharedExpert {
            w1: ops.load_linear(&random.fp8(channels, width)?)?,
            w3: ops.load_linear(&random.fp8(channels, width)?)?,
            w2: ops.load_linear(&random.fp8(width, channels)?)?,
            is_slice: false,
        },
        top_k,
        routed_scaling_factor: 1.5,
        swiglu_limit: Some(10.0),
    };
    let expert_bytes = 3 * width * channels * 17 / 32;
    for rows in [1_usize, 4, 8, 64, 1024] {
        let n_copies = if rows == 1 { 8 } else { 2 };
        let blocks: Vec<u32> = (0..rows.div_ceil(256) as u32).collect();
        let step = ops.prepare_step(&Batch::single(0, 0, &vec![0; rows], &blocks))?;
        let inputs = (0..n_copies)
            .map(|_| {
                let x = ops.upload(rows, width, &random.values(rows * width, 1.0))?;
                let routing = ops.route(&weights, &x, &step)?;
                Ok((x, routing))
            })
            .collect::<Result<Vec<_>, OpError>>()?;
        // Uniform routing: how many different experts `rows` tokens reach.
        let hit =
            n_experts as f64 * (1.0 - (1.0 - top_k as f64 / n_experts as f64).powi(rows as i32));
        let bytes = hit * expert_bytes as f64 + (3 * width * channels + 4 * rows * width) as f64;
        let flops = (2 * rows * (top_k + 1) * 3 * width * channels) as f64;
        let name = format!("experts, {n_experts} of Flash's, x {rows}");
        bench.time(name, (bytes, flops), n_copies, &mut |copy| {
            let (x, routing) = &inputs[copy];
            ops.moe(&weights, x, routing, &Solo).map(drop)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rehearsal_runs_every_operator_and_knows_its_memory() {
        // Small, because random weights of Flash's size take seconds to draw.
        let memory = Rehearsal::memory("sm_80");
        let ops = CudaOps::over(memory.clone(), Activations::Fp8Grid);
        let mut bench = Bench { ops: &ops, report: None };
        boundaries(&mut bench, &mut Random::new(1)).unwrap();
        assert!(memory.reach(Place::Workspace) > 1024 * 4 * 4096 * 2);
    }
}
