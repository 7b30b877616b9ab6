//! Hot operators at Flash's dimensions, timed.
//!
//! Bytes and operations are counted from the shapes: what must be read and written once, and the
//! multiplications and additions of the products.

mod attention;

use std::sync::Arc;

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};
use fathom_core::parallel::ExpertShard;

use super::random::Random;
use crate::cuda::device::Device;
use crate::cuda::memory::{ArenaSizes, Memory, Place};
use crate::cuda::ops::CudaOps;
use crate::cuda::rehearsal::Rehearsal;
use crate::layer::{HcSite, MoeWeights, Router, SharedExpert};
use crate::traits::{HcMix, HeadOps, HyperConnectionOps, MoeOps};
use crate::{
    Activations, Backend, Batch, Drawing, IndexKeyFormat, KvFormat, OpError, Solo, WeightSource,
};

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
    /// Whether the products are those of FP8 values where the device has them, else of bf16.
    pub is_fp8: bool,
}

/// An operator with its sizes: what is timed here, and what a peer must be given to be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `x [rows, k]` bf16 times `W [n, k]` in FP8, quantised input.
    Fp8Linear {
        /// Where in a layer of Flash.
        part: &'static str,
        /// Rows of W.
        n: usize,
        /// Columns of W.
        k: usize,
    },
    /// `x [rows, k]` bf16 times `W [n, k]` bf16, f32 results.
    Bf16Linear {
        /// Rows of W.
        n: usize,
        /// Columns of W.
        k: usize,
    },
    /// The end of one sublayer and the beginning of the next, over four copies.
    Boundary {
        /// Hidden size.
        width: usize,
    },
    /// FP4 experts and the shared expert, without the router.
    Experts {
        /// Hidden size.
        width: usize,
        /// Intermediate size.
        channels: usize,
        /// Experts there are.
        n_experts: usize,
        /// Experts of a token.
        top_k: usize,
    },
    /// Sparse attention of one token per sequence over FP8 rows: the window's, and chosen entries.
    Attention {
        /// Query heads.
        n_heads: usize,
        /// Chosen entries.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
    },
    /// Scores of a ratio-4 layer's FP4 index keys and the best entries, one token per sequence.
    IndexSelect {
        /// Index heads.
        n_heads: usize,
        /// Entries to choose.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
    },
}

/// An operator for a number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The operator.
    pub operator: Operator,
    /// Tokens.
    pub rows: usize,
}

const FP8_LINEARS: [(&str, usize, usize); 4] = [
    ("wq_a and wkv", 1536, 4096),
    ("wq_b", 32_768, 1024),
    ("wo_b", 4096, 8192),
    ("shared expert, up", 2048, 4096),
];
/// An eighth of the head.
const HEAD_PART: (usize, usize) = (129_280 / 8, 4096);
const WIDTH: usize = 4096;
/// Enough experts that one token's are not in the second-level cache from the call before.
const EXPERTS: Operator =
    Operator::Experts { width: WIDTH, channels: 2048, n_experts: 64, top_k: 6 };

/// Flash's attention, and Pro's.
const ATTENTIONS: [(usize, usize); 2] = [(64, 512), (128, 1024)];
/// Enough tokens to choose from.
const ATTENTION_CONTEXT: usize = 16_384;
/// Tokens of the sequences that are scored.
const INDEX_CONTEXTS: [usize; 3] = [32_768, 131_072, 1_048_576];

impl Shape {
    /// As [`Measured::name`].
    #[must_use]
    pub fn name(&self) -> String {
        let rows = self.rows;
        match self.operator {
            Operator::Fp8Linear { part, n, k } => format!("FP8 {part} [{n}, {k}] x {rows}"),
            Operator::Bf16Linear { n, k } => {
                format!("bf16, an eighth of the head [{n}, {k}] x {rows}")
            }
            Operator::Boundary { width } => format!("boundary, width {width}, x {rows}"),
            Operator::Experts { n_experts, .. } => {
                format!("experts, {n_experts} of Flash's, x {rows}")
            }
            Operator::Attention { n_heads, top_k, .. } => {
                format!("attention, {n_heads} heads, {} keys x {rows}", WINDOW + top_k)
            }
            Operator::IndexSelect { top_k, context, .. } => {
                format!("index, {top_k} of {} x {rows}", LayerKind::Csa.n_entries(context))
            }
        }
    }

    /// Bytes that must move, and multiplications and additions of the products.
    #[must_use]
    pub fn work(&self) -> (f64, f64) {
        let rows = self.rows;
        let (bytes, flops) = match self.operator {
            Operator::Fp8Linear { n, k, .. } => (n * k + 2 * rows * (n + k), 2 * rows * n * k),
            Operator::Bf16Linear { n, k } => (2 * n * k + rows * (4 * n + 2 * k), 2 * rows * n * k),
            // The copies in and out, the sublayer's output, the next one's input in two forms.
            Operator::Boundary { width } => {
                (2 * rows * width * (4 + 4 + 1 + 2) + 4 * 24 * 4 * width, 2 * rows * 24 * 4 * width)
            }
            Operator::Experts { width, channels, n_experts, top_k } => {
                // Uniform routing: how many different experts `rows` tokens reach.
                let missed = 1.0 - top_k as f64 / n_experts as f64;
                let hit = n_experts as f64 * (1.0 - missed.powi(rows as i32));
                let expert_bytes = 3 * width * channels * 17 / 32;
                let rest = 3 * width * channels + 4 * rows * width;
                let flops = 2 * rows * (top_k + 1) * 3 * width * channels;
                return (hit * expert_bytes as f64 + rest as f64, flops as f64);
            }
            // Keys and values are the same rows; queries in, results out.
            Operator::Attention { n_heads, top_k, .. } => {
                let keys = WINDOW + top_k;
                let row_bytes = KvFormat::Fp8.row_bytes() * keys + 4 * n_heads * HEAD_DIM;
                (rows * row_bytes, rows * 4 * n_heads * HEAD_DIM * keys)
            }
            Operator::IndexSelect { n_heads, top_k, context } => {
                let entries = LayerKind::Csa.n_entries(context);
                let queries = 2 * n_heads * INDEX_HEAD_DIM;
                let row_bytes = IndexKeyFormat::Mxfp4.row_bytes() * entries + queries + 4 * top_k;
                (rows * row_bytes, rows * 2 * n_heads * INDEX_HEAD_DIM * entries)
            }
        };
        (bytes as f64, flops as f64)
    }

    /// As [`Measured::is_fp8`].
    #[must_use]
    pub const fn is_fp8(&self) -> bool {
        matches!(self.operator, Operator::Fp8Linear { .. } | Operator::Experts { .. })
    }
}

/// Everything that is timed, in this order.
#[must_use]
pub fn shapes() -> Vec<Shape> {
    let of = |operator, rows: &[usize]| {
        rows.iter().map(move |&rows| Shape { operator, rows }).collect::<Vec<_>>()
    };
    let mut shapes = Vec::new();
    for (part, n, k) in FP8_LINEARS {
        shapes.extend(of(Operator::Fp8Linear { part, n, k }, &[1, 8, 64, 1024]));
    }
    let (n, k) = HEAD_PART;
    shapes.extend(of(Operator::Bf16Linear { n, k }, &[1, 64, 1024]));
    shapes.extend(of(Operator::Boundary { width: WIDTH }, &[1, 8, 64, 1024]));
    shapes.extend(of(EXPERTS, &[1, 4, 8, 64, 1024]));
    for (n_heads, top_k) in ATTENTIONS {
        let context = ATTENTION_CONTEXT;
        shapes.extend(of(Operator::Attention { n_heads, top_k, context }, &[1, 8, 32, 128]));
    }
    for context in INDEX_CONTEXTS {
        shapes.extend(of(Operator::IndexSelect { n_heads: 64, top_k: 512, context }, &[1, 8]));
    }
    shapes
}

const DRAWING: Drawing = Drawing { seed: 5, zipf: false };
/// Bytes over which weights rotate: four times a large second-level cache.
const ROTATED_BYTES: usize = 240 << 20;

/// Times every operator whose name contains `only` and reports each.
///
/// # Errors
/// What an operator fails with; [`OpError::Device`] if the device has no room.
pub fn run(
    device: &Arc<dyn Device>,
    activations: Activations,
    only: &str,
    report: &mut dyn FnMut(Measured),
) -> Result<(), OpError> {
    // Values are drawn on the device. Once for show, to see how much memory it takes.
    let rehearsal = Rehearsal::memory(device.arch()).drawing(DRAWING);
    all(&CudaOps::over(rehearsal.clone(), activations), only, None)?;
    let sizes = ArenaSizes {
        weights: rehearsal.reach(Place::Weights),
        cache: rehearsal.reach(Place::Cache),
        // Timing waits for a few bytes of its own.
        workspace: rehearsal.reach(Place::Workspace) + (1 << 20),
    };
    let memory = Memory::planned(Arc::clone(device), sizes)?.drawing(DRAWING);
    all(&CudaOps::over(memory, activations), only, Some(report))
}

/// Calls `body` for each operator: timed and reported, or once.
struct Bench<'a, 'r> {
    ops: &'a CudaOps,
    report: Option<&'r mut dyn FnMut(Measured)>,
}

impl Bench<'_, '_> {
    fn time(
        &mut self,
        shape: Shape,
        n_copies: usize,
        body: &mut dyn FnMut(usize) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let Some(report) = &mut self.report else { return (0..n_copies).try_for_each(body) };
        // As many calls as copies at least, so that each is read once per round.
        let seconds = self.ops.time(n_copies.max(8), &mut |call| body(call % n_copies))?;
        let (bytes, flops) = shape.work();
        let (name, is_fp8) = (shape.name(), shape.is_fp8());
        report(Measured { name, seconds, bytes, flops, is_fp8 });
        Ok(())
    }
}

fn all(ops: &CudaOps, only: &str, report: Option<&mut dyn FnMut(Measured)>) -> Result<(), OpError> {
    let mut bench = Bench { ops, report };
    let mut random = Random::new(5);
    let wanted: Vec<Shape> =
        shapes().into_iter().filter(|shape| shape.name().contains(only)).collect();
    // Weights are made once for all rows of an operator.
    for group in wanted.chunk_by(|a, b| a.operator == b.operator) {
        let rows: Vec<usize> = group.iter().map(|shape| shape.rows).collect();
        match group[0].operator {
            operator @ Operator::Fp8Linear { n, k, .. } => {
                fp8_linear(&mut bench, &mut random, operator, (n, k), &rows)?;
            }
            operator @ Operator::Bf16Linear { n, k } => {
                bf16_linear(&mut bench, &mut random, operator, (n, k), &rows)?;
            }
            Operator::Boundary { width } => boundaries(&mut bench, &mut random, width, &rows)?,
            Operator::Experts { .. } => experts(&mut bench, &mut random, group)?,
            Operator::Attention { .. } => attention::attention(&mut bench, &mut random, group)?,
            Operator::IndexSelect { .. } => attention::selection(&mut bench, &mut random, group)?,
        }
    }
    Ok(())
}

/// `copies` matrices that share their host bytes and not their device memory.
fn matrices<T>(
    source: &WeightSource,
    bytes: usize,
    load: impl Fn(&WeightSource) -> Result<T, OpError>,
) -> Result<Vec<T>, OpError> {
    (0..ROTATED_BYTES.div_ceil(bytes).max(2)).map(|_| load(source)).collect()
}

fn fp8_linear(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    operator: Operator,
    (n, k): (usize, usize),
    all_rows: &[usize],
) -> Result<(), OpError> {
    let ops = bench.ops;
    let weights = matrices(&random.fp8(n, k)?, n * k, |w| ops.load_linear(w))?;
    for &rows in all_rows {
        let x = ops.upload(rows, k, &random.values(rows * k, 1.0))?;
        bench.time(Shape { operator, rows }, weights.len(), &mut |copy| {
            ops.quantised_linear(&weights[copy], &x).map(drop)
        })?;
    }
    Ok(())
}

fn bf16_linear(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    operator: Operator,
    (n, k): (usize, usize),
    all_rows: &[usize],
) -> Result<(), OpError> {
    let ops = bench.ops;
    let heads = matrices(&random.bf16(n, k)?, 2 * n * k, |w| ops.load_linear(w))?;
    for &rows in all_rows {
        let x = ops.upload(rows, k, &random.values(rows * k, 1.0))?;
        bench.time(Shape { operator, rows }, heads.len(), &mut |copy| {
            ops.logits(&heads[copy], &x, &Solo).map(drop)
        })?;
    }
    Ok(())
}

fn boundaries(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    width: usize,
    all_rows: &[usize],
) -> Result<(), OpError> {
    let ops = bench.ops;
    let site = HcSite {
        function: ops.load_linear(&random.f32(24, 4 * width)?)?,
        base: random.vector(ops, 24, 0.0)?,
        scale: random.vector(ops, 3, 1.0)?,
        sinkhorn_iters: 20,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let norm = random.norm(ops, width)?;
    for &rows in all_rows {
        let x = ops.upload(rows, 4 * width, &random.values(rows * 4 * width, 1.0))?;
        let y = ops.upload(rows, width, &random.values(rows * width, 1.0))?;
        let HcMix { post, comb } = ops.hc_pre(&x, &site, &norm)?.mix;
        let mix = HcMix { post, comb };
        let step = ops.prepare_exact_step(&Batch::single(0, 0, &vec![0; rows], &[]))?;
        bench.time(Shape { operator: Operator::Boundary { width }, rows }, 1, &mut |_| {
            let mut copies = x.clone();
            ops.hc_boundary(&mut copies, &y, &mix, (&site, &norm), &step).map(drop)
        })?;
    }
    Ok(())
}

fn experts(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    shapes: &[Shape],
) -> Result<(), OpError> {
    let ops = bench.ops;
    let Some(Operator::Experts { width, channels, n_experts, top_k }) =
        shapes.first().map(|shape| shape.operator)
    else {
        return Ok(());
    };
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
    for &shape in shapes {
        let rows = shape.rows;
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
        bench.time(shape, n_copies, &mut |copy| {
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
        boundaries(&mut bench, &mut Random::new(1), WIDTH, &[1, 1024]).unwrap();
        assert!(memory.reach(Place::Workspace) > 1024 * 4 * 4096 * 2);
    }

    #[test]
    fn attention_and_selection_are_rehearsed_at_their_real_sizes() {
        for (arch, only) in [("sm_90a", "attention, 64"), ("sm_80", "index, 512 of 8192")] {
            let memory = Rehearsal::memory(arch).drawing(DRAWING);
            let ops = CudaOps::over(memory.clone(), Activations::Fp8Grid);
            all(&ops, only, None).unwrap();
            // Enough groups of sequences to leave a large second-level cache.
            assert!(memory.reach(Place::Cache) > 100 << 20, "{only}");
        }
        let shape = |name: &str| shapes().into_iter().find(|shape| shape.name() == name).unwrap();
        assert_eq!(shape("attention, 64 heads, 640 keys x 1").work(), (504_832.0, 83_886_080.0));
        let index = shape("index, 512 of 262144 x 8").work();
        assert_eq!(index, (8.0 * (262_144.0 * 68.0 + 18_432.0), 8.0 * 4_294_967_296.0));
    }

    #[test]
    fn every_shape_has_a_name_of_its_own_and_work_to_do() {
        let shapes = shapes();
        let names: std::collections::BTreeSet<String> = shapes.iter().map(Shape::name).collect();
        assert_eq!((names.len(), shapes.len()), (42, 42));
        let (bytes, flops) = shapes[0].work();
        assert_eq!((bytes, flops), (6_302_720.0, 12_582_912.0));
        assert!(shapes.iter().all(|shape| shape.work().0 > 0.0 && shape.work().1 > 0.0));
    }
}
