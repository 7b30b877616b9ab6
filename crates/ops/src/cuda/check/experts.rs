//! Routing and experts.

use fathom_core::parallel::ExpertShard;

use super::exact::{self, Expert};
use super::parts::{CPU_ROWS, VOCAB, cpu, step};
use super::random::Random;
use super::{BF16_STEP, Report, Size, pick, plain};
use crate::layer::{MoeWeights, Router, SharedExpert};
use crate::traits::MoeOps;
use crate::{Backend, OpError, Solo, WeightSource};

/// Rows of a step that are recomputed in f64: each takes all of its experts' weights.
const EXACT_ROWS: usize = 4;
/// Factor of routing weights, and where SwiGLU is cut off.
const FACTOR: f32 = 1.5;
const LIMIT: f32 = 2.5;

/// Dimensions of a mixture of experts.
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    channels: usize,
    n_experts: usize,
    top_k: usize,
}

type MakeExpert = fn(&mut Random, usize, usize) -> Result<WeightSource, OpError>;

/// What both sides load.
struct Sources {
    experts: Vec<Expert>,
    shared: Expert,
    gate: WeightSource,
    bias: Vec<f32>,
    top_k: usize,
}

impl Sources {
    fn new(random: &mut Random, shape: Shape, make: MakeExpert) -> Result<Self, OpError> {
        let Shape { width, channels, n_experts, top_k } = shape;
        let mut expert = |make: MakeExpert| {
            let (gate, up) = (make(random, channels, width)?, make(random, channels, width)?);
            Ok::<_, OpError>([gate, up, make(random, width, channels)?])
        };
        let experts = (0..n_experts).map(|_| expert(make)).collect::<Result<Vec<_>, _>>()?;
        let shared = expert(Random::fp8)?;
        let gate = random.bf16(n_experts, width)?;
        Ok(Self { experts, shared, gate, bias: random.numbers(n_experts, 0.0), top_k })
    }

    fn load<B: Backend>(&self, ops: &B, hashes: bool) -> Result<MoeWeights<B>, OpError> {
        let (n_experts, channels) = (self.experts.len(), self.shared[0].n_rows());
        let k = self.top_k;
        let router = if hashes {
            let id = |i: usize| ((i / k + 2 * (i % k)) % n_experts) as u16;
            let table: Vec<u16> = (0..VOCAB * k).map(id).collect();
            Router::Hash(ops.load_expert_table(&table, k)?)
        } else {
            Router::Score(ops.load_vector(&self.bias)?)
        };
        let [w1, w3, w2] = &self.shared;
        Ok(MoeWeights {
            gate: ops.load_linear(&self.gate)?,
            router,
            experts: ops.load_experts(&self.experts, 0, n_experts)?,
            shard: ExpertShard { experts: 0..n_experts, channels: 0..channels },
            experts_are_slices: false,
            shared: SharedExpert {
                w1: ops.load_linear(w1)?,
                w3: ops.load_linear(w3)?,
                w2: ops.load_linear(w2)?,
                is_slice: false,
            },
            top_k: k,
            routed_scaling_factor: FACTOR,
            swiglu_limit: Some(LIMIT),
        })
    }
}

/// What the device computed for a step.
struct Got<'a> {
    x: &'a [f32],
    ids: &'a [u32],
    factors: &'a [f32],
    out: &'a [f32],
}

/// Some outputs of some rows in f64, for the experts that the device chose.
fn in_f64(report: &mut Report<'_>, sources: &Sources, got: &Got<'_>, shape_text: &str) {
    let (k, width) = (sources.top_k, sources.gate.n_cols());
    let rows = report.random.some_of(got.ids.len() / k, EXACT_ROWS);
    let n_cols = exact::n_outputs(report.size).div_ceil(rows.len());
    let cols = report.random.some_of(width, n_cols);
    let (mut values, mut expected) = (Vec::new(), Vec::new());
    let (mut factors, mut expected_factors) = (Vec::new(), Vec::new());
    for row in rows {
        let x = &got.x[row * width..(row + 1) * width];
        let own = row * k..(row + 1) * k;
        let (ids, weights) = (&got.ids[own.clone()], &got.factors[own]);
        if ids.iter().any(|&id| id as usize >= sources.experts.len()) {
            report.close(format!("experts of row {row} {shape_text}"), &[f32::NAN], &[0.0], 0.0);
            continue;
        }
        factors.extend_from_slice(weights);
        expected_factors.extend(exact::routing_weights(&sources.gate, x, ids, FACTOR));
        let chosen: Vec<(u32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        values.extend(cols.iter().map(|&col| got.out[row * width + col]));
        let (experts, activations) =
            ((&*sources.experts, &sources.shared), report.ops.activations());
        expected.extend(exact::mixture(experts, x, &chosen, Some(LIMIT), activations, &cols));
    }
    let what = format!("experts {shape_text}, {} outputs in f64", values.len());
    report.close(what, &values, &expected, 2.0 * BF16_STEP);
    let what = format!("routing weights {shape_text}, {} in f64", factors.len());
    report.close(what, &factors, &expected_factors, 1e-5);
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
        let sources = Sources::new(&mut report.random, shape, make)?;
        let (weights, cpu_weights) = (sources.load(ops, hashes)?, sources.load(&cpu, hashes)?);
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
            let all = Got { x: &values, ids: &ids, factors: &factors, out: &got };
            in_f64(report, &sources, &all, &shape_text);
            let is_known = ids.iter().all(|&id| (id as usize) < shape.n_experts);
            if is_known && plain::is_affordable(report.size, rows) {
                let weights = (&*sources.experts, &sources.shared);
                let chosen = (&*ids, &*factors);
                let all = plain::mixture(report, weights, &values, chosen, LIMIT)?;
                let what = format!("experts {shape_text}, the plain kernels");
                report.close(
                    what,
                    &pick(&all, shape.width, &checked),
                    &expected.data,
                    2.0 * BF16_STEP,
                );
                // Activations between gate/up and down fall to either of two codes here, too.
                let what = format!("experts {shape_text}, all outputs as the plain kernels'");
                report.close(what, &got, &all, 2.0 * BF16_STEP);
            }
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
