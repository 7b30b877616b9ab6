//! Attention's products for sm_90a of few tokens that would be several launches: two matrices of one
//! input, and queries from the norm before them to the rotation behind them.
//!
//! Each says `None` where its form does not fit; results have the same bits either way.
//!
//! Not here: the separate launches (`attention`, `hopper`).

use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};

use super::hopper::{FEW, LINEAR_SHARED_8, THREADS, TILE_ROWS, cluster_of};
use super::linear::{DeviceLinear, Fp8Form, LinearData};
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::DeviceStep;
use super::tensor::{DeviceTensor, Element};
use super::tensor_map::TensorMap;
use crate::OpError;
use crate::cuda::Arg;
use crate::error::check_len;
use crate::layer::AttentionWeights;
use crate::traits::Queries;

/// Blocks of a cluster of `queries90`: tiles of a head.
const HEAD_TILES: usize = HEAD_DIM / TILE_ROWS;

/// The map and the scales of an FP8 matrix that has a map, if its K is shared by clusters of `cluster`.
fn mapped(w: &DeviceLinear, cluster: usize) -> Option<(&TensorMap, &Buffer)> {
    match &w.data {
        LinearData::Fp8 { scales, form: Fp8Form::Mapped(map), .. }
            if cluster_of(w.rows.div_ceil(TILE_ROWS)) == cluster =>
        {
            Some((map, scales))
        }
        _ => None,
    }
}

impl CudaOps {
    /// Both products of `x`, which is to be taken on the FP8 grid, in bf16.
    pub(super) fn pair90(
        &self,
        [first, second]: [&DeviceLinear; 2],
        x: &DeviceTensor,
    ) -> Result<Option<[DeviceTensor; 2]>, OpError> {
        const OP: &str = "linear90_pair_8_c4";
        let fits = x.rows <= FEW && x.is_taken_on_grid() && first.cols == second.cols;
        let maps = mapped(first, 4).zip(mapped(second, 4)).filter(|_| fits);
        let Some(((map, scales), (other_map, other_scales))) = maps else { return Ok(None) };
        x.expect(OP, "x", x.rows, first.cols, Element::Bf16)?;
        let out = self.tensor(x.rows, first.rows, Element::Bf16)?;
        let other_out = self.tensor(x.rows, second.rows, Element::Bf16)?;
        let n_tiles = first.rows.div_ceil(TILE_ROWS) + second.rows.div_ceil(TILE_ROWS);
        // SAFETY: both matrices have x's columns and an output of their own, [rows of x, their rows]
        // bf16; the kernel guards ragged tokens, rows and k itself.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [4 * n_tiles, 1, 1],
                threads: THREADS,
                shared_bytes: LINEAR_SHARED_8,
                args: &[
                    Arg::Map(*map),
                    scales.into(),
                    (&out.values).into(),
                    (first.rows as u32).into(),
                    Arg::Map(*other_map),
                    other_scales.into(),
                    (&other_out.values).into(),
                    (second.rows as u32).into(),
                    (&x.values).into(),
                    (x.cols as u32).into(),
                    (x.rows as u32).into(),
                ],
            })?;
        }
        Ok(Some([out, other_out]))
    }

    /// Where one launch leaves the queries of attention and of the indexer (none: no columns) from `qr`.
    pub(super) fn query_outputs(
        &self,
        op: &'static str,
        weights: &AttentionWeights<Self>,
        qr: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<(DeviceTensor, DeviceTensor), OpError> {
        let (n_heads, k) = (weights.n_heads, weights.wq_b.cols);
        let (index_rows, n_index_heads) =
            weights.indexer.as_ref().map_or((0, 0), |indexer| (indexer.wq_b.rows, indexer.n_heads));
        qr.expect(op, "qr", step.rows(op, qr.rows)?.n, k, Element::Bf16)?;
        check_len(op, "q_norm", weights.q_norm.weight.len, k)?;
        check_len(op, "q", weights.wq_b.rows, n_heads * HEAD_DIM)?;
        check_len(op, "index q", index_rows, n_index_heads * INDEX_HEAD_DIM)?;
        let q = self.tensor(qr.rows, n_heads * HEAD_DIM, Element::Bf16)?;
        Ok((q, self.tensor(qr.rows, index_rows, Element::Bf16)?))
    }

    /// Queries of attention and of the indexer from `qr`, not yet normalised. The caller has checked the
    /// frequencies and the rows of `qr`.
    pub(super) fn queries90(
        &self,
        weights: &AttentionWeights<Self>,
        qr: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<Option<Queries<DeviceTensor>>, OpError> {
        const OP: &str = "queries90";
        let (n_heads, k) = (weights.n_heads, weights.wq_b.cols);
        let Some((map, scales)) = mapped(&weights.wq_b, 1) else { return Ok(None) };
        let index = match &weights.indexer {
            None => Some((map, scales, 0)),
            Some(indexer) => mapped(&indexer.wq_b, 1)
                .filter(|_| indexer.n_heads.is_multiple_of(4) && indexer.wq_b.cols == k)
                .map(|(map, scales)| (map, scales, indexer.n_heads)),
        };
        let Some((index_map, index_scales, n_index_heads)) = index else { return Ok(None) };
        if qr.rows > FEW || !self.is_hopper() {
            return Ok(None);
        }
        let (q, index_q) = self.query_outputs(OP, weights, qr, step)?;
        let index_rows = index_q.cols;
        // SAFETY: both matrices have qr's columns, as the norm's weight has; outputs are
        // [rows, n_heads, 512] and [rows, n_index_heads, 128] bf16, positions have a value per row,
        // 32 frequencies; tiles of both matrices fill whole clusters.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [HEAD_TILES * n_heads + index_rows / TILE_ROWS, 1, 1],
                threads: THREADS,
                shared_bytes: LINEAR_SHARED_8,
                args: &[
                    Arg::Map(*map),
                    scales.into(),
                    (&q.values).into(),
                    (n_heads as u32).into(),
                    Arg::Map(*index_map),
                    index_scales.into(),
                    (&index_q.values).into(),
                    (n_index_heads as u32).into(),
                    (&qr.values).into(),
                    (&weights.q_norm.weight.values).into(),
                    weights.q_norm.eps.into(),
                    (&weights.rope.values).into(),
                    (&step.rows(OP, qr.rows)?.positions).into(),
                    (k as u32).into(),
                    (qr.rows as u32).into(),
                ],
            })?;
        }
        Ok(Some(Queries { q, index: weights.indexer.as_ref().map(|_| index_q) }))
    }
}
