//! Operators without a cache: products, hyper-connections, head, experts.

use fathom_core::Numerics;
use fathom_core::parallel::ExpertShard;

use super::random::Random;
use super::{BF16_STEP, Report, Size, pick};
use crate::cpu::CpuOps;
use crate::layer::{HcHead, HcSite, MoeWeights, MtpInputWeights, Router, SharedExpert};
use crate::traits::{HcMix, HeadOps, MoeOps};
use crate::{Backend, Batch, OpError, Ops, Solo, WeightSource};

/// Rows that the CPU computes of a large step, and most rows of a small one.
const CPU_ROWS: usize = 8;
const MANY_ROWS: usize = 32;

/// The CPU's form of the operators that a report's device has.
pub(super) fn cpu(report: &Report<'_>) -> CpuOps {
    CpuOps::new(Numerics::Bf16).with_activations(report.ops.activations())
}

/// A step of one sequence with these tokens, for operators that look at tokens only.
fn step<B: Backend>(ops: &B, tokens: &[u32]) -> Result<B::Step, OpError> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(256) as u32).collect();
    ops.prepare_step(&Batch::single(0, 0, tokens, &blocks))
}

/// `x W^T` through the head operator (bf16 and f32 results of every format).
pub(super) fn linear(report: &mut Report<'_>) -> Result<(), OpError> {
    // (rows of W, columns): ragged ones, then those of Flash and Pro.
    let (shapes, row_counts): (&[(usize, usize)], &[usize]) = match report.size {
        Size::Small => (&[(70, 128), (129, 384)], &[1, 9, 33]),
        Size::Real => {
            // On sm_100f the last two take one and two segments of K, the others four.
            (
                &[
                    (1536, 4096),
                    (4096, 8192),
                    (2624, 4096),
                    (7168, 16384),
                    (16_160, 4096),
                    (8192, 4096),
                ],
                &[1, 8, 61, 1024],
            )
        }
    };
    let (ops, cpu) = (report.ops, cpu(report));
    for &(n, k) in shapes {
        let fp8 = report.random.fp8(n, k)?;
        let (head, cpu_head) = {
            let bf16 = report.random.bf16(n, k)?;
            (ops.load_linear(&bf16)?, cpu.load_linear(&bf16)?)
        };
        let (w, cpu_w) = (ops.load_linear(&fp8)?, cpu.load_linear(&fp8)?);
        for &rows in row_counts {
            let x = report.random.values(rows * k, 1.0);
            let checked = report.random.some_of(rows, CPU_ROWS);
            let device_x = ops.upload(rows, k, &x)?;
            let cpu_x = cpu.upload(checked.len(), k, &pick(&x, k, &checked))?;
            let got = ops.download(&ops.logits(&head, &device_x, &Solo)?)?;
            let expected = cpu.logits(&cpu_head, &cpu_x, &Solo)?;
            let what = format!("bf16 [{rows}, {k}] x [{n}, {k}]");
            // Products of many rows on sm_90a (and perhaps sm_100f) cut what they add instead of
            // rounding it.
            let limit = if rows > 8 { 5e-5 } else { 2e-5 };
            report.close(what, &pick(&got, n, &checked), &expected.data, limit);
            let got = ops.download(&ops.quantised_linear(&w, &device_x)?)?;
            let expected = cpu.quantised_linear(&cpu_w, &cpu_x)?;
            let what = format!("FP8 [{rows}, {k}] x [{n}, {k}]");
            report.close(what, &pick(&got, n, &checked), &expected.data, BF16_STEP);
            // As the grouped output projection takes its input.
            let got = ops.download(&ops.logits(&w, &device_x, &Solo)?)?;
            let expected = cpu.logits(&cpu_w, &cpu_x, &Solo)?;
            let what = format!("FP8 by bf16 [{rows}, {k}] x [{n}, {k}]");
            report.close(what, &pick(&got, n, &checked), &expected.data, limit);
        }
    }
    Ok(())
}

const VOCAB: usize = 37;

fn site<B: Backend>(ops: &B, random: &mut Random, width: usize) -> Result<HcSite<B>, OpError> {
    Ok(HcSite {
        function: ops.load_linear(&random.f32(24, 4 * width)?)?,
        base: random.vector(ops, 24, 0.0)?,
        scale: random.vector(ops, 3, 1.0)?,
        sinkhorn_iters: 20,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    })
}

/// Name, values and columns of everything that one side computes.
type Results = Vec<(&'static str, Vec<f32>, usize)>;

fn hc_results<B: Ops>(
    ops: &B,
    mut random: Random,
    width: usize,
    rows: usize,
    wanted: &[usize],
) -> Result<Results, OpError> {
    let n = wanted.len();
    let embed = ops.load_linear(&random.bf16(VOCAB, width)?)?;
    let (first, second) = (site(ops, &mut random, width)?, site(ops, &mut random, width)?);
    let norm = random.norm(ops, width)?;
    let head = HcHead {
        function: ops.load_linear(&random.f32(4, 4 * width)?)?,
        base: random.vector(ops, 4, 0.0)?,
        scale: random.vector(ops, 1, 1.0)?,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let mtp = MtpInputWeights {
        enorm: random.norm(ops, width)?,
        hnorm: random.norm(ops, width)?,
        e_proj: ops.load_linear(&random.fp8(width, width)?)?,
        h_proj: ops.load_linear(&random.fp8(width, width)?)?,
    };
    let tokens: Vec<u32> = (0..rows).map(|_| random.below(VOCAB) as u32).collect();
    let x = random.values(rows * 4 * width, 2.0);
    let y = random.values(rows * width, 1.0);
    let x = ops.upload(n, 4 * width, &pick(&x, 4 * width, wanted))?;
    let y = ops.upload(n, width, &pick(&y, width, wanted))?;
    let tokens: Vec<u32> = wanted.iter().map(|&row| tokens[row]).collect();
    let step = step(ops, &tokens)?;

    let mut results = Results::new();
    let mut keep = |name, tensor: &B::Tensor| {
        results.push((name, ops.download(tensor)?, ops.shape(tensor).1));
        Ok::<_, OpError>(())
    };
    keep("embed", &ops.embed(&embed, &step)?)?;
    let pre = ops.hc_pre(&x, &first, &norm)?;
    keep("hc_pre normed", &pre.normed)?;
    keep("hc_pre post", &pre.mix.post)?;
    keep("hc_pre comb", &pre.mix.comb)?;
    let HcMix { post, comb } = &pre.mix;
    let mix = HcMix { post: post.clone(), comb: comb.clone() };
    keep("hc_post", &ops.hc_post(&x, &y, &mix)?)?;
    let mut copies = x.clone();
    let next = ops.hc_boundary(&mut copies, &y, &mix, (&second, &norm), &step)?;
    keep("boundary x", &copies)?;
    keep("boundary normed", &next.normed)?;
    keep("boundary comb", &next.mix.comb)?;
    let collapsed = ops.hc_head(&x, &head, &norm)?;
    keep("hc_head", &collapsed)?;
    keep("mtp_input", &ops.mtp_input(&mtp, &embed, &step, &x)?)?;
    Ok(results)
}

/// Everything of `HyperConnectionOps` and `HeadOps`.
pub(super) fn hyper_connections(report: &mut Report<'_>) -> Result<(), OpError> {
    let (widths, row_counts): (&[usize], &[usize]) = match report.size {
        Size::Small => (&[384], &[3, 33]),
        Size::Real => (&[4096, 7168], &[1, 8, 1024]),
    };
    let (ops, cpu) = (report.ops, cpu(report));
    for &width in widths {
        for &rows in row_counts {
            let checked = report.random.some_of(rows, CPU_ROWS);
            let all: Vec<usize> = (0..rows).collect();
            let random = report.random.clone();
            report.random.bits();
            let got = hc_results(ops, random.clone(), width, rows, &all)?;
            let expected = hc_results(&cpu, random.clone(), width, rows, &checked)?;
            for ((name, got, cols), (_, expected, _)) in got.iter().zip(&expected) {
                let limit = match *name {
                    "embed" => 0.0,
                    // Equal apart from the sums behind `post` and `comb`.
                    "hc_pre post" | "hc_pre comb" => 2e-5,
                    // Of copies rounded to bf16: where one falls to the other side, 3e-5 is seen.
                    "boundary comb" => 5e-4,
                    _ => BF16_STEP,
                };
                let what = format!("{name} [{rows}, {cols}]");
                report.close(what, &pick(got, *cols, &checked), expected, limit);
            }
            if rows <= MANY_ROWS {
                continue;
            }
            // Boundaries of few rows may take one launch: the bits are the same.
            let first = [0, 1, 2];
            let few = hc_results(ops, random, width, rows, &first)?;
            let boundaries =
                |(name, ..): &&(&str, _, _)| name.contains("pre") || name.contains("bound");
            for ((name, got, cols), (_, few, _)) in
                got.iter().zip(&few).filter(|(all, _)| boundaries(all))
            {
                let what = format!("{name}, three rows like those of [{rows}, {cols}]");
                report.mostly_equal(what, few, &pick(got, *cols, &first), 0.0);
            }
        }
    }
    Ok(())
}

/// Dimensions of a mixture of experts.
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    channels: usize,
    n_experts: usize,
    top_k: usize,
}

type MakeExpert = fn(&mut Random, usize, usize) -> Result<WeightSource, OpError>;

fn moe_weights<B: Backend>(
    ops: &B,
    random: &mut Random,
    shape: Shape,
    make: MakeExpert,
    hashes: bool,
) -> Result<MoeWeights<B>, OpError> {
    let Shape { width, channels, n_experts, top_k } = shape;
    let expert = |random: &mut Random| {
        let (gate, up) = (make(random, channels, width)?, make(random, channels, width)?);
        Ok([gate, up, make(random, width, channels)?])
    };
    let experts = (0..n_experts).map(|_| expert(random)).collect::<Result<Vec<_>, OpError>>()?;
    let table: Vec<u16> =
        (0..VOCAB * top_k).map(|i| ((i / top_k + 2 * (i % top_k)) % n_experts) as u16).collect();
    let router = if hashes {
        Router::Hash(ops.load_expert_table(&table, top_k)?)
    } else {
        Router::Score(random.vector(ops, n_experts, 0.0)?)
    };
    Ok(MoeWeights {
        gate: ops.load_linear(&random.bf16(n_experts, width)?)?,
        router,
        experts: ops.load_experts(&experts, 0, n_experts)?,
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
        swiglu_limit: Some(2.5),
    })
}

fn experts(report: &mut Report<'_>, make: MakeExpert) -> Result<(), OpError> {
    let (shapes, row_counts): (&[Shape], &[usize]) = match report.size {
        Size::Small => (&[Shape { width: 384, channels: 128, n_experts: 9, top_k: 3 }], &[1, 31]),
        // A part of the experts suffices: each is a matrix of its own.
        Size::Real => (
            &[
                Shape { width: 4096, channels: 2048, n_experts: 16, top_k: 6 },
                Shape { width: 7168, channels: 3072, n_experts: 12, top_k: 6 },
            ],
            &[1, 4, 64, 1024],
        ),
    };
    let (ops, cpu) = (report.ops, cpu(report));
    for (index, &shape) in shapes.iter().enumerate() {
        let hashes = index % 2 == 0 && report.size == Size::Real;
        let mut random = report.random.clone();
        let weights = moe_weights(ops, &mut random, shape, make, hashes)?;
        let cpu_weights = moe_weights(&cpu, &mut report.random, shape, make, hashes)?;
        for &rows in row_counts {
            let tokens: Vec<u32> = (0..rows).map(|_| report.random.below(VOCAB) as u32).collect();
            let values = report.random.values(rows * shape.width, 1.0);
            let checked = report.random.some_of(rows, CPU_ROWS);
            let x = ops.upload(rows, shape.width, &values)?;
            let routing = ops.route(&weights, &x, &step(ops, &tokens)?)?;
            let (ids, factors) = ops.read_routing(&routing)?;
            let got = ops.download(&ops.moe(&weights, &x, &routing, &Solo)?)?;

            let picked: Vec<u32> = checked.iter().map(|&row| tokens[row]).collect();
            let cpu_x =
                cpu.upload(checked.len(), shape.width, &pick(&values, shape.width, &checked))?;
            let routing = cpu.route(&cpu_weights, &cpu_x, &step(&cpu, &picked)?)?;
            let (cpu_ids, cpu_factors) = cpu.read_routing(&routing)?;
            let expected = cpu.moe(&cpu_weights, &cpu_x, &routing, &Solo)?;
            let k = shape.top_k;
            let rows_of_ids: Vec<u32> =
                checked.iter().flat_map(|&row| ids[row * k..(row + 1) * k].to_vec()).collect();
            let shape_text = format!("[{rows}, {}]", shape.width);
            report.mostly_equal(format!("chosen {shape_text}"), &rows_of_ids, &cpu_ids, 0.0);
            let factors = pick(&factors, k, &checked);
            report.close(format!("routing weights {shape_text}"), &factors, &cpu_factors, 1e-5);
            let got = pick(&got, shape.width, &checked);
            // Sums of FP8 products keep some 14 bits on sm_90a: a few of the values between gate/up
            // and down then fall to the neighbouring code.
            report.close(format!("experts {shape_text}"), &got, &expected.data, 2.0 * BF16_STEP);
        }
    }
    Ok(())
}

/// Routing and FP4 experts.
pub(super) fn experts_fp4(report: &mut Report<'_>) -> Result<(), OpError> {
    experts(report, Random::fp4)
}

/// Routing and FP8 experts with f32 scales, as in -Base checkpoints.
pub(super) fn experts_fp8(report: &mut Report<'_>) -> Result<(), OpError> {
    experts(report, Random::fp8_f32)
}
