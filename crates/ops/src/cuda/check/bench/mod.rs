//! The operators of a step at the dimensions of Flash and Pro, timed.
//!
//! - [`shapes`](self::shapes()): what is timed; `work`: what must move and be multiplied;
//! - `products`, `attention`, `streams`: inputs of each operator, and its calls;
//! - [`launches`]: what a launch costs that does nothing.
//!
//! Values are drawn on the device. Weights, cache rows and inputs rotate over more bytes than a large
//! second-level cache holds, except for what the operator before would have left there.
//!
//! Not here: which operators a step has (`fathom-model`), what a device does at best (`timing`).

mod attention;
mod launches;
mod products;
mod shapes;
mod streams;
mod work;

use std::sync::Arc;

pub use launches::{LaunchCost, launches};
pub use shapes::{Operator, Shape, large_products, shapes, small_shapes};

use super::random::Random;
use crate::cuda::device::Device;
use crate::cuda::draw::Values;
use crate::cuda::memory::{ArenaSizes, Memory, Place};
use crate::cuda::ops::CudaOps;
use crate::cuda::rehearsal::Rehearsal;
use crate::cuda::tensor::{DeviceTensor, Element};
use crate::cuda::timing::{Effort, Timed};
use crate::{Activations, Drawing, OpError};

/// One operator's time.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Operator and shape.
    pub name: String,
    /// Of one call.
    pub timed: Timed,
    /// Bytes that must move.
    pub bytes: f64,
    /// Multiplications and additions of its products.
    pub flops: f64,
    /// Whether the products are those of FP8 values where the device has them, else of bf16.
    pub is_fp8: bool,
}

const DRAWING: Drawing = Drawing { seed: 5, zipf: false };
/// Bytes over which inputs rotate: four times a large second-level cache.
const ROTATED_BYTES: usize = 240 << 20;

/// How much is measured, and over how many bytes inputs rotate.
#[derive(Debug, Clone, Copy)]
struct Extent {
    effort: Effort,
    rotated_bytes: usize,
}

/// Times every one of `shapes` and reports each. `is_quick` runs each a few times, to see that it
/// runs.
///
/// # Errors
/// What an operator fails with; [`OpError::Device`] if the device has no room.
pub fn run(
    device: &Arc<dyn Device>,
    activations: Activations,
    shapes: &[Shape],
    is_quick: bool,
    report: &mut dyn FnMut(Measured),
) -> Result<(), OpError> {
    let extent = if is_quick {
        Extent { effort: Effort::LEAST, rotated_bytes: 0 }
    } else {
        Extent { effort: Effort::FULL, rotated_bytes: ROTATED_BYTES }
    };
    // Once for show, to see how much memory it takes.
    let rehearsal = Rehearsal::memory(device.arch()).drawing(DRAWING);
    let ops = CudaOps::over(rehearsal.clone(), activations);
    Bench { ops: &ops, random: Random::hollow(5), extent, report: None }.all(shapes)?;
    let sizes = ArenaSizes {
        weights: rehearsal.reach(Place::Weights),
        cache: rehearsal.reach(Place::Cache),
        workspace: rehearsal.reach(Place::Workspace),
    };
    let memory = Memory::planned(Arc::clone(device), sizes)?.drawing(DRAWING);
    let ops = CudaOps::over(memory, activations);
    Bench { ops: &ops, random: Random::hollow(5), extent, report: Some(report) }.all(shapes)
}

/// Calls of operators: timed and reported, or once.
struct Bench<'a, 'r> {
    ops: &'a CudaOps,
    random: Random,
    extent: Extent,
    report: Option<&'r mut dyn FnMut(Measured)>,
}

impl Bench<'_, '_> {
    /// Runs every shape, in their order.
    fn all(&mut self, shapes: &[Shape]) -> Result<(), OpError> {
        // Weights are made once for all rows of an operator.
        for group in shapes.chunk_by(|a, b| a.operator == b.operator) {
            match group[0].operator {
                Operator::Fp8Linear { n, k, .. } => self.fp8_linear(group, (n, k))?,
                Operator::Bf16Linear { n, k, .. } => self.bf16_linear(group, (n, k))?,
                Operator::CompressorInputs { width, kind, index_heads } => {
                    self.compressor_inputs(group, (width, kind, index_heads))?;
                }
                Operator::GroupedOutput { n_groups, rank, group_width } => {
                    self.grouped_output(group, (n_groups, rank, group_width))?;
                }
                Operator::Queries { rank, n_heads, index_heads } => {
                    self.queries(group, (rank, n_heads, index_heads))?;
                }
                Operator::Store { .. } => self.store(group)?,
                Operator::Router { width, n_experts, top_k, table_tokens } => {
                    self.router(group, (width, n_experts, top_k), table_tokens)?;
                }
                Operator::Experts { .. } => self.experts(group)?,
                Operator::SharedExpert { width, channels } => {
                    self.shared_expert(group, (width, channels))?;
                }
                Operator::Boundary { width } => self.boundary(group, width)?,
                Operator::Attention { .. } => self.attention(group)?,
                Operator::IndexScores { .. }
                | Operator::IndexTopK { .. }
                | Operator::IndexSelect { .. } => self.selection(group)?,
                Operator::Embed { width, vocab } => self.embed(group, (width, vocab))?,
                Operator::HeadNorm { width } => self.head_norm(group, width)?,
                Operator::MtpInput { width, vocab } => self.mtp_input(group, (width, vocab))?,
                Operator::Choose { vocab, is_drawn } => self.choose(group, (vocab, is_drawn))?,
            }
        }
        Ok(())
    }

    fn time(
        &mut self,
        shape: Shape,
        n_inputs: usize,
        body: &mut dyn FnMut(usize) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let Some(report) = &mut self.report else { return (0..n_inputs).try_for_each(body) };
        let timed = self.ops.time(n_inputs, self.extent.effort, body)?;
        let (bytes, flops) = shape.work();
        let (name, is_fp8) = (shape.name(), shape.operator.is_fp8());
        report(Measured { name, timed, bytes, flops, is_fp8 });
        Ok(())
    }

    /// How many of something of `bytes` bytes leave the second-level cache between two uses of one.
    fn n_copies(&self, bytes: usize) -> usize {
        self.extent.rotated_bytes.div_ceil(bytes.max(1)).max(2)
    }

    /// As many of something of `bytes` bytes.
    fn copies<T>(
        &self,
        bytes: usize,
        load: impl Fn() -> Result<T, OpError>,
    ) -> Result<Vec<T>, OpError> {
        (0..self.n_copies(bytes)).map(|_| load()).collect()
    }

    /// `[rows, cols]` bf16 activations.
    fn drawn(&self, rows: usize, cols: usize) -> Result<DeviceTensor, OpError> {
        let x = self.ops.tensor(rows, cols.next_multiple_of(2), Element::Bf16)?;
        let bytes = x.values.len();
        self.ops.memory().draw(&x.values, 0, bytes, Values::Bf16 { deviation: 1.0 })?;
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory that a rehearsal of the shapes whose name contains `only` takes.
    fn rehearsed(arch: &'static str, only: &str) -> Memory {
        let memory = Rehearsal::memory(arch).drawing(DRAWING);
        let ops = CudaOps::over(memory.clone(), Activations::Fp8Grid);
        let wanted: Vec<Shape> =
            shapes().into_iter().filter(|shape| shape.name().contains(only)).collect();
        assert!(!wanted.is_empty(), "{only}");
        let extent = Extent { effort: Effort::FULL, rotated_bytes: ROTATED_BYTES };
        let (ops, random) = (&ops, Random::hollow(5));
        Bench { ops, random, extent, report: None }.all(&wanted).unwrap();
        memory
    }

    #[test]
    fn every_operator_is_rehearsed_at_its_real_sizes_and_its_memory_is_known() {
        for arch in ["sm_80", "sm_90a", "sm_100f"] {
            let memory = rehearsed(arch, "");
            // Experts of Pro; four copies of a chunk; keys of eight sequences of a million tokens.
            assert!(memory.reach(Place::Weights) > 12 << 30, "{arch}");
            assert!(memory.reach(Place::Workspace) > 4096 * 4 * 4096 * 2, "{arch}");
            assert!(memory.reach(Place::Cache) > 2 << 30, "{arch}");
            let all: usize = Place::ALL.iter().map(|&place| memory.reach(place)).sum();
            assert!(all < 64 << 30, "{arch}: {all} bytes");
        }
    }

    #[test]
    fn inputs_rotate_over_more_than_a_second_level_cache_holds() {
        let memory = rehearsed("sm_90a", "FP8 wq_a and wkv [1536");
        assert!(memory.reach(Place::Weights) > ROTATED_BYTES);
        let memory = rehearsed("sm_90a", "attention, 64 heads, 640 keys x 1");
        assert!(memory.reach(Place::Cache) > 100 << 20);
    }
}
