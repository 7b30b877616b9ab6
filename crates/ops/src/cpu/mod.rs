//! The CPU backend: the definition of every operator's result, and fast enough to serve.
//!
//! Activations are f32 in memory in every numeric mode; see [`HostTensor`]. Each row's arithmetic
//! has one fixed order, whatever the batch, the chunking, the thread count or the vector tier.
//!
//! One file per group of operators, as in [`crate::traits`]; `gemm` holds the matrix products,
//! `heads` the online softmax, and `isa` the vector instructions that both are written over.

mod attention;
mod attention_ops;
mod awake;
mod cache;
mod compress;
pub mod gemm;
mod hc;
mod head;
mod heads;
mod indexer;
pub(crate) mod isa;
mod moe;
pub mod norm;
mod pool;
pub mod quant;
pub mod rope;
mod simd;
mod snapshot;
mod tensor;

use std::borrow::Cow;
use std::sync::Arc;

use fathom_core::Numerics;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};
use rayon::prelude::*;

pub use attention::attend_single;
pub use cache::CpuCache;
#[cfg(test)]
pub(crate) use cache::pack_rows;
pub use gemm::CpuLinear;
pub use hc::{SiteMix, split_sinkhorn};
pub use indexer::Selection;
pub use moe::{CpuExperts, ExpertTable, Routing, sqrt_softplus};
pub use tensor::HostTensor;

use crate::traits::{Activations, Backend};
use crate::{Batch, CacheSpec, OpError, WeightSource};

/// Multiply-adds (or the like) below which a loop stays on the calling thread: some microseconds.
const INLINE_WORK: usize = 16 * 1024;

/// Maps a range, on all threads if `work` is worth it; results stay in order.
pub(crate) fn in_parallel<T: Send>(
    work: usize,
    range: std::ops::Range<usize>,
    body: impl Fn(usize) -> T + Sync + Send,
) -> Vec<T> {
    if work < INLINE_WORK || range.len() < 2 {
        range.map(body).collect()
    } else {
        range.into_par_iter().map(body).collect()
    }
}

/// The operators on host memory, in one numeric mode.
#[derive(Debug, Clone, Copy)]
pub struct CpuOps {
    pub(crate) numerics: Numerics,
    activations: Activations,
}

impl CpuOps {
    /// Operators that compute in `numerics`.
    #[must_use]
    pub const fn new(numerics: Numerics) -> Self {
        Self { numerics, activations: Activations::Fp8Grid }
    }

    /// The same with other inputs of FP8 and FP4 layers. [`Activations::Bf16`] is the A16 form of
    /// these operators, what GPUs without FP8 arithmetic compute; KV rows and index vectors are
    /// quantised as ever.
    #[must_use]
    pub const fn with_activations(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Whether inputs of FP8 and FP4 layers are put on the FP8 grid.
    pub(crate) const fn quantises_inputs(self) -> bool {
        self.numerics.quantises() && matches!(self.activations, Activations::Fp8Grid)
    }

    pub(crate) const fn is_bf16(self) -> bool {
        self.numerics.is_bf16()
    }

    /// `x` as an FP8 or FP4 layer sees it: quantised per 128 inputs if the mode does so.
    pub(crate) fn linear_input<'x>(&self, x: &'x HostTensor) -> Cow<'x, HostTensor> {
        if !self.quantises_inputs() {
            return Cow::Borrowed(x);
        }
        let mut input = HostTensor::unset(x.rows, x.cols);
        tensor::for_each_row(&mut input, |row, input| {
            input.copy_from_slice(x.row(row));
            quant::quantise_linear_input(input);
        });
        Cow::Owned(input)
    }

    /// An FP8 linear layer: quantised input, output rounded as the mode says.
    pub(crate) fn quantised_linear(
        &self,
        linear: &CpuLinear,
        x: &HostTensor,
    ) -> Result<HostTensor, OpError> {
        self.linear(linear, &self.linear_input(x))
    }

    /// A product on the input as it is, output rounded as the mode says.
    pub(crate) fn linear(&self, linear: &CpuLinear, x: &HostTensor) -> Result<HostTensor, OpError> {
        let mut out = HostTensor::unset(x.rows, linear.n_rows());
        linear.matmul(&x.data, &mut out.data)?;
        if self.is_bf16() {
            tensor::round_tensor(&mut out);
        }
        Ok(out)
    }
}

impl Backend for CpuOps {
    type Tensor = HostTensor;
    type Linear = CpuLinear;
    type Experts = CpuExperts;
    type Vector = Arc<[f32]>;
    type ExpertTable = ExpertTable;
    type Cache = CpuCache;
    type Step = Batch;
    type Routing = Routing;
    type Selection = Selection;

    fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// On a thread of a pool: from outside, each parallel loop would put the calling thread to
    /// sleep and wake it up again, some dozens of times per decoded token.
    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        pool::enter(|| awake::keep_awake(work))
    }

    fn takes_wanted_rows(&self) -> bool {
        true
    }

    fn load_linear(&self, source: &WeightSource) -> Result<CpuLinear, OpError> {
        CpuLinear::new(source)
    }

    fn load_experts(
        &self,
        experts: &[[WeightSource; 3]],
        first_id: usize,
        _n_total: usize,
    ) -> Result<CpuExperts, OpError> {
        let load = |[w1, w3, w2]: &[WeightSource; 3]| {
            Ok(moe::ExpertWeights {
                w1: CpuLinear::new(w1)?,
                w3: CpuLinear::new(w3)?,
                w2: CpuLinear::new(w2)?,
            })
        };
        Ok(CpuExperts { first_id, experts: experts.iter().map(load).collect::<Result<_, _>>()? })
    }

    fn load_vector(&self, values: &[f32]) -> Result<Arc<[f32]>, OpError> {
        Ok(values.into())
    }

    fn load_expert_table(&self, ids: &[u16], k: usize) -> Result<ExpertTable, OpError> {
        Ok(ExpertTable { ids: ids.into(), k })
    }

    fn new_cache(&self, spec: &CacheSpec) -> Result<CpuCache, OpError> {
        Ok(CpuCache::new(spec))
    }

    fn prepare_step(&self, batch: &Batch) -> Result<Batch, OpError> {
        Ok(batch.clone())
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<HostTensor, OpError> {
        HostTensor::from_vec(rows, cols, values.to_vec())
    }

    fn download(&self, tensor: &HostTensor) -> Result<Vec<f32>, OpError> {
        Ok(tensor.data.to_vec())
    }

    fn shape(&self, tensor: &HostTensor) -> (usize, usize) {
        (tensor.rows, tensor.cols)
    }

    fn wanted_rows(
        &self,
        tensor: &HostTensor,
        step: &Batch,
    ) -> Result<Option<HostTensor>, OpError> {
        if step.wants_all_rows() {
            return Ok(None);
        }
        self.select_rows(tensor, &step.logit_rows).map(Some)
    }

    fn select_rows(&self, tensor: &HostTensor, rows: &[u32]) -> Result<HostTensor, OpError> {
        let mut out = HostTensor::unset(rows.len(), tensor.cols);
        for (index, &row) in rows.iter().enumerate() {
            let (got, limit) = (row as usize, tensor.rows);
            if got >= limit {
                return Err(OpError::OutOfRange { op: "select_rows", what: "row", got, limit });
            }
            out.row_mut(index).copy_from_slice(tensor.row(got));
        }
        Ok(out)
    }

    fn read_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>), OpError> {
        Ok((routing.ids.clone(), routing.weights.clone()))
    }

    fn read_selection(&self, selection: &Selection) -> Result<Vec<Vec<u32>>, OpError> {
        Ok(selection.rows.clone())
    }

    fn capture(
        &self,
        cache: &mut CpuCache,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError> {
        cache.capture(slot, position, snapshot)
    }

    fn restore(
        &self,
        cache: &mut CpuCache,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError> {
        cache.restore(snapshot, slot, position)
    }

    fn read_block(&self, cache: &CpuCache, block: u32) -> Result<Vec<u8>, OpError> {
        cache.read_block(block)
    }

    fn write_block(&self, cache: &mut CpuCache, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        cache.write_block(block, bytes)
    }

    fn read_snapshot(&self, cache: &CpuCache, snapshot: u32) -> Result<Vec<u8>, OpError> {
        cache.read_snapshot(snapshot)
    }

    fn write_snapshot(
        &self,
        cache: &mut CpuCache,
        snapshot: u32,
        bytes: &[u8],
    ) -> Result<(), OpError> {
        cache.write_snapshot(snapshot, bytes)
    }

    fn read_entry(
        &self,
        cache: &CpuCache,
        layer: usize,
        blocks: &[u32],
        entry: usize,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), OpError> {
        let limit = cache.capacity(layer, blocks.len());
        if entry >= limit {
            let what = "compressed entry";
            return Err(OpError::OutOfRange { op: "read_entry", what, got: entry, limit });
        }
        let mut values = vec![0.0; HEAD_DIM];
        cache::unpack_kv(cache.spec.kv, cache.entry(layer, blocks, entry), &mut values);
        let key = cache.layers[layer].kind.has_indexer().then(|| {
            let mut key = vec![0.0; INDEX_HEAD_DIM];
            cache::unpack_key(cache.spec.index_keys, cache.key(layer, blocks, entry), &mut key);
            key
        });
        Ok((values, key))
    }
}

/// Values of a stored KV row and of an indexer key, in `spec`'s formats.
pub(crate) fn unpack_rows(
    spec: &CacheSpec,
    row: &[u8],
    key: Option<&[u8]>,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let mut values = vec![0.0; HEAD_DIM];
    cache::unpack_kv(spec.kv, row, &mut values);
    let key = key.map(|row| {
        let mut key = vec![0.0; INDEX_HEAD_DIM];
        cache::unpack_key(spec.index_keys, row, &mut key);
        key
    });
    (values, key)
}
