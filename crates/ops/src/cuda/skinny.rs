//! Products of few tokens on the kernels of sm_80 (also on sm_100f) that would be several launches: two matrices of one input, an
//! input that is put on the FP8 grid first, the shared expert's gate and up, attention's queries from the norm
//! before them to the rotation behind them.
//!
//! Each says `None` where its form does not fit; results have the same bits either way.
//!
//! Not here: the separate launches (`linear`, `moe`, `attention`).

use fathom_core::model_config::HEAD_DIM;
use fathom_core::parallel::QUANT_BLOCK;

use super::device::Arg;
use super::linear::{DeviceLinear, Fp8Form, GEMM_ROWS, GEMM_SHARED_8, GEMM_THREADS, LinearData};
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::{DeviceStep, ENDED_HEADS, MAX_ENDED_HEADS};
use super::tensor::{DeviceTensor, Element};
use crate::error::check_len;
use crate::layer::AttentionWeights;
use crate::traits::Queries;
use crate::{Activations, OpError};

/// Most tokens of a block of these kernels.
pub(super) const FEW: usize = 8;
/// Channels of a block of gate and up.
const GATE_UP_CHANNELS: usize = 16;
/// Shared memory of `QueriesShared`.
const QUERIES_SHARED: u32 = GEMM_SHARED_8 + 4 * 8 * 8 + 4;
/// Most shared memory for an input that lies there as a whole: eight rows of Pro's experts.
const MAX_RESIDENT: usize = 50 << 10;

/// Shared memory of a product whose input of `rows` rows lies there as a whole, if it may.
pub(super) fn resident_bytes(rows: usize, cols: usize) -> Option<u32> {
    let bytes = rows * (cols.next_multiple_of(QUANT_BLOCK) + 8) * 2;
    (rows <= FEW && bytes <= MAX_RESIDENT).then_some((bytes as u32).max(GEMM_SHARED_8))
}

impl CudaOps {
    /// Whether `rows` tokens of FP8 layers run the kernels here on sm_100f: fewer launches than block-scaled
    /// products need, but another order of additions than those of more tokens.
    pub(super) fn is_skinny_blackwell(&self, rows: usize) -> bool {
        self.is_blackwell() && rows <= FEW && !self.is_deterministic()
    }

    /// Codes and scales of an FP8 matrix for the kernels here, and for `rows` tokens.
    fn rows_of<'a>(&self, w: &'a DeviceLinear, rows: usize) -> Option<(&'a Buffer, &'a Buffer)> {
        match &w.data {
            LinearData::Fp8 { codes, scales, form: Fp8Form::Rows | Fp8Form::RowsOfPowers } => {
                Some((codes, scales))
            }
            LinearData::Fp8 { codes, scales, form: Fp8Form::Scaled(_) } => {
                self.is_skinny_blackwell(rows).then_some((codes, scales))
            }
            _ => None,
        }
    }

    /// The same of two matrices with as many columns.
    fn both_rows_of<'a>(
        &self,
        [first, second]: [&'a DeviceLinear; 2],
        rows: usize,
    ) -> Option<[(&'a Buffer, &'a Buffer); 2]> {
        let both = [self.rows_of(first, rows)?, self.rows_of(second, rows)?];
        Some(both).filter(|_| first.cols == second.cols)
    }

    /// Both products of `x` as it is, in bf16.
    pub(super) fn pair80(
        &self,
        matrices: [&DeviceLinear; 2],
        x: &DeviceTensor,
    ) -> Result<Option<[DeviceTensor; 2]>, OpError> {
        const OP: &str = "linear_fp8_pair_8";
        let [first, second] = matrices;
        let fits = x.rows <= FEW && !x.is_taken_on_grid();
        let Some([(codes, scales), (other_codes, other_scales)]) =
            self.both_rows_of(matrices, x.rows).filter(|_| fits)
        else {
            return Ok(None);
        };
        x.expect(OP, "x", x.rows, first.cols, Element::Bf16)?;
        let out = self.tensor(x.rows, first.rows, Element::Bf16)?;
        let other_out = self.tensor(x.rows, second.rows, Element::Bf16)?;
        // SAFETY: both matrices have x's columns, a multiple of 16 as loading checked, and an output of
        // their own, [rows of x, their rows] bf16.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [first.rows.div_ceil(GEMM_ROWS) + second.rows.div_ceil(GEMM_ROWS), 1, 1],
                threads: GEMM_THREADS,
                shared_bytes: GEMM_SHARED_8,
                args: &[
                    (&x.values).into(),
                    (x.cols as u32).into(),
                    (x.rows as u32).into(),
                    codes.into(),
                    scales.into(),
                    (&out.values).into(),
                    (first.rows as u32).into(),
                    other_codes.into(),
                    other_scales.into(),
                    (&other_out.values).into(),
                    (second.rows as u32).into(),
                ],
            })?;
        }
        Ok(Some([out, other_out]))
    }

    /// `x W^T` in bf16, of `x` on the FP8 grid where layers take it so, which nobody has put there yet.
    pub(super) fn linear_on_grid(
        &self,
        w: &DeviceLinear,
        x: &DeviceTensor,
    ) -> Result<Option<DeviceTensor>, OpError> {
        const OP: &str = "linear_fp8_grid_8";
        let is_needed = self.activations == Activations::Fp8Grid && x.quantised.is_none();
        let shared_bytes = resident_bytes(x.rows, w.cols).filter(|_| is_needed);
        let Some(((codes, scales), shared_bytes)) = self.rows_of(w, x.rows).zip(shared_bytes)
        else {
            return Ok(None);
        };
        x.expect(OP, "x", x.rows, w.cols, Element::Bf16)?;
        let out = self.tensor(x.rows, w.rows, Element::Bf16)?;
        // SAFETY: W has x's columns, a multiple of 16 as loading checked; all rows of x fit the shared
        // memory, and `out` is [rows of x, rows of W] bf16.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [w.rows.div_ceil(GEMM_ROWS), 1, 1],
                threads: GEMM_THREADS,
                shared_bytes,
                args: &[
                    codes.into(),
                    scales.into(),
                    (&x.values).into(),
                    (&out.values).into(),
                    (w.rows as u32).into(),
                    (w.cols as u32).into(),
                    (x.rows as u32).into(),
                    0_u32.into(),
                ],
            })?;
        }
        Ok(Some(out))
    }

    /// Gate and up of the shared expert with its activation, of `x` as it is.
    pub(super) fn gate_up80(
        &self,
        matrices: [&DeviceLinear; 2],
        x: &DeviceTensor,
        limit: f32,
    ) -> Result<Option<DeviceTensor>, OpError> {
        const OP: &str = "moe_shared_gate_up";
        let fits = x.rows <= FEW && !x.is_taken_on_grid();
        let Some([(w1, s1), (w3, s3)]) = self.both_rows_of(matrices, x.rows).filter(|_| fits)
        else {
            return Ok(None);
        };
        let (channels, width) = (matrices[0].rows, matrices[0].cols);
        check_len(OP, "rows of w3", matrices[1].rows, channels)?;
        x.expect(OP, "x", x.rows, width, Element::Bf16)?;
        let h = self.tensor(x.rows, channels, Element::Bf16)?;
        // SAFETY: both matrices are [channels, width] with x's columns, a multiple of 16 as loading
        // checked; h is [rows of x, channels] bf16.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [channels.div_ceil(GATE_UP_CHANNELS), 1, 1],
                threads: GEMM_THREADS,
                shared_bytes: GEMM_SHARED_8,
                args: &[
                    w1.into(),
                    s1.into(),
                    w3.into(),
                    s3.into(),
                    (&x.values).into(),
                    (&h.values).into(),
                    (channels as u32).into(),
                    (width as u32).into(),
                    (x.rows as u32).into(),
                    limit.into(),
                ],
            })?;
        }
        Ok(Some(h))
    }

    /// Queries of attention and of the indexer from `qr`, not yet normalised. The caller has checked the
    /// frequencies and the rows of `qr`.
    pub(super) fn queries80(
        &self,
        weights: &AttentionWeights<Self>,
        qr: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<Option<Queries<DeviceTensor>>, OpError> {
        const OP: &str = "queries";
        let (n_heads, k) = (weights.n_heads, weights.wq_b.cols);
        let n_index_heads = weights.indexer.as_ref().map_or(0, |indexer| indexer.n_heads);
        let index_wq_b = weights.indexer.as_ref().map_or(&weights.wq_b, |indexer| &indexer.wq_b);
        // The rows of qr lie where a ring of stages would.
        let fits = resident_bytes(qr.rows, k) == Some(GEMM_SHARED_8)
            && n_heads + n_index_heads <= MAX_ENDED_HEADS;
        let matrices = self.both_rows_of([&weights.wq_b, index_wq_b], qr.rows).filter(|_| fits);
        let Some([(codes, scales), (index_codes, index_scales)]) = matrices else {
            return Ok(None);
        };
        let (q, index_q) = self.query_outputs(OP, weights, qr, step)?;
        let index_rows = index_q.cols;
        let on_grid = self.activations == Activations::Fp8Grid;
        // SAFETY: both matrices have qr's columns, a multiple of 16 as loading checked, as the norm's weight
        // has; outputs are [rows, n_heads, 512] and [rows, n_index_heads, 128] bf16, positions have a value
        // per row, 32 frequencies; every head has a word of the step, in which no launch beside this one
        // counts.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [(n_heads * HEAD_DIM + index_rows) / GEMM_ROWS, 1, 1],
                threads: GEMM_THREADS,
                shared_bytes: QUERIES_SHARED,
                args: &[
                    codes.into(),
                    scales.into(),
                    (&q.values).into(),
                    (n_heads as u32).into(),
                    index_codes.into(),
                    index_scales.into(),
                    (&index_q.values).into(),
                    (n_index_heads as u32).into(),
                    (&qr.values).into(),
                    (&weights.q_norm.weight.values).into(),
                    weights.q_norm.eps.into(),
                    (&weights.rope.values).into(),
                    (&step.rows(OP, qr.rows)?.positions).into(),
                    step.ended(ENDED_HEADS),
                    (k as u32).into(),
                    (qr.rows as u32).into(),
                    Arg::U32(u32::from(on_grid)),
                ],
            })?;
        }
        Ok(Some(Queries { q, index: weights.indexer.as_ref().map(|_| index_q) }))
    }
}
