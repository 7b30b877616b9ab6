//! Activations on the CPU: row-major f32, whatever the numeric mode.
//!
//! In mode `bf16` the values are bf16 values stored in f32; operators round where the official
//! code does, so nothing is lost and nothing is converted back and forth.

use rayon::prelude::*;

use fathom_core::num::round_bf16;

use crate::OpError;
use crate::cpu::simd::simd_fn;
use crate::error::check_len;

/// `[rows, cols]` activations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostTensor {
    /// Rows.
    pub rows: usize,
    /// Values per row.
    pub cols: usize,
    /// Row-major values.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// All zeros.
    #[must_use]
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Takes `data` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the length does not fit.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self, OpError> {
        check_len("tensor", "data", data.len(), rows * cols)?;
        Ok(Self { rows, cols, data })
    }

    /// One row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// One row, to write.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// Refuses a tensor that is not `[rows, cols]`.
    pub(crate) fn expect(
        &self,
        op: &'static str,
        arg: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<(), OpError> {
        check_len(op, arg, self.rows, rows)?;
        check_len(op, arg, self.cols, cols)
    }
}

simd_fn! {
    /// Rounds every value to bf16.
    pub(crate) fn round_to_bf16(values: &mut [f32]) {
        for value in values {
            *value = round_bf16(*value);
        }
    }
}

/// Values below which a loop over rows stays on the calling thread.
const INLINE_VALUES: usize = 16 * 1024;

/// Runs `body(row, out_row)` for every row of `out`, on all threads if there is enough to do.
pub(crate) fn for_each_row(out: &mut HostTensor, body: impl Fn(usize, &mut [f32]) + Sync) {
    if out.cols == 0 {
        return;
    }
    if out.rows < 2 || out.data.len() < INLINE_VALUES {
        out.data.chunks_exact_mut(out.cols).enumerate().for_each(|(row, out)| body(row, out));
    } else {
        out.data.par_chunks_exact_mut(out.cols).enumerate().for_each(|(row, out)| body(row, out));
    }
}
