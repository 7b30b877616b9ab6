//! Pieces of sampling that run on the device: launcher of `sample`.
//!
//! Not here: penalties, truncation and the draw (the engine's sampler on the host, for now).

use super::device::Arg;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceTensor, Element, f32_values, u32_values};
use crate::OpError;

/// Shared memory of `SummaryShared`.
const SUMMARY_SHARED: u32 = 4 * 16 * 4;

/// What greedy decoding and log-probabilities need of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowSummary {
    /// The token with the highest logit, the lowest id among equals.
    pub token: u32,
    /// Its logit.
    pub max: f32,
    /// Sum of `exp(logit - max)`.
    pub sum: f32,
    /// Whether a logit is NaN or infinite; the other fields then mean nothing.
    pub is_broken: bool,
}

impl CudaOps {
    /// Summarises each row of `logits [rows, vocab]` f32.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the logits are not f32 or there are none in a row; [`OpError::Device`]
    /// if the device failed.
    pub fn row_summary(&self, logits: &DeviceTensor) -> Result<Vec<RowSummary>, OpError> {
        const OP: &str = "row_summary";
        let (rows, vocab) = (logits.rows, logits.cols);
        logits.expect(OP, "logits", rows, vocab.max(1), Element::F32)?;
        let out = self.buffer(16 * rows)?;
        let column = |index: usize| Arg::Address(out.address() + (4 * rows * index) as u64);
        // SAFETY: logits are [rows, vocab] f32; `out` holds four columns of `rows` words.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [rows, 1, 1],
                threads: 512,
                shared_bytes: SUMMARY_SHARED,
                args: &[
                    (&logits.values).into(),
                    column(0),
                    column(1),
                    column(2),
                    column(3),
                    (vocab as u32).into(),
                ],
            })?;
        }
        let bytes = out.read(0, 16 * rows)?;
        let words = u32_values(&bytes);
        let floats = f32_values(&bytes);
        let summary = |row: usize| RowSummary {
            token: words[row],
            max: floats[rows + row],
            sum: floats[2 * rows + row],
            is_broken: words[3 * rows + row] != 0,
        };
        Ok((0..rows).map(summary).collect())
    }
}
