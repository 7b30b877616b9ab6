//! A matrix of the checkpoint, ready for products: its bytes stay where they are.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use fathom_core::num::Ue8m0;

use super::format::{Bf16, F32, Format, Fp4, Fp8};
use super::run::{Job, run};
use crate::cpu::isa::{BLOCK, RAW_BYTES};
use crate::{OpError, Scales, WeightData, WeightSource};

/// Times 256, it is finite. With it, most codes mean values beyond f32.
const MAX_FP8_SCALE: f32 = f32::from_bits((119 + 127) << 23);

/// A `[rows, cols]` matrix ready for `out = x W^T` on the CPU.
///
/// Codes are shared with the checkpoint's mapping and decoded in registers; a block of some rows
/// is the most that ever exists as f32. The NaN codes of E4M3 (0x7f, 0xff) are not looked for and
/// read as ±480.
#[derive(Debug, Clone)]
pub struct CpuLinear {
    rows: usize,
    cols: usize,
    /// From the first code of the first row.
    codes: Bytes,
    /// Bytes between the starts of two rows.
    stride: usize,
    /// Row 0 is this row of `tail` and of the row blocks of FP8 scales.
    pub(super) first_row: usize,
    /// Codes of the columns after the last whole block, padded with zeros to a block per row.
    tail: Option<Arc<[[u8; RAW_BYTES]]>>,
    pub(super) stored: Stored,
}

/// Format and scales.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// E8M0 bytes from the first group of the first row, `stride` bytes between rows.
    Fp4 {
        scales: Bytes,
        stride: usize,
    },
    /// `[row blocks, column blocks]`, times 256: see [`Fp8`].
    Fp8 {
        scales: Arc<[f32]>,
    },
    Bf16,
    F32,
}

impl Stored {
    /// Pieces of 64 bytes in a block.
    pub(super) fn raws(&self) -> usize {
        match self {
            Self::Fp4 { .. } => Fp4::RAWS,
            Self::Fp8 { .. } => Fp8::RAWS,
            Self::Bf16 => Bf16::RAWS,
            Self::F32 => F32::RAWS,
        }
    }

    /// Distance between the columns of neighbouring lanes, [`Format::STRIDE`].
    pub(super) fn stride(&self) -> usize {
        match self {
            Self::Fp4 { .. } => Fp4::STRIDE,
            Self::Fp8 { .. } => Fp8::STRIDE,
            Self::Bf16 => Bf16::STRIDE,
            Self::F32 => F32::STRIDE,
        }
    }

    fn row_bytes(&self, cols: usize) -> usize {
        cols * self.raws() * RAW_BYTES / BLOCK
    }
}

impl CpuLinear {
    /// Prepares the rows and columns that `source` wants.
    ///
    /// Reads the scales it will use, once, and no codes.
    ///
    /// # Errors
    /// [`OpError::Weight`] if an E8M0 scale is NaN (255) or FP8 or FP4 columns are no multiple of
    /// 128.
    pub fn new(source: &WeightSource) -> Result<Self, OpError> {
        let (rows, cols) = (source.n_rows(), source.n_cols());
        let quantised = matches!(source.data, WeightData::Fp8 { .. } | WeightData::Fp4 { .. });
        if quantised && !(source.stored_cols.is_multiple_of(BLOCK) && cols.is_multiple_of(BLOCK)) {
            return Err(bad(source, format!("{cols} columns are no multiple of {BLOCK}")));
        }
        let (codes, stored) = match &source.data {
            WeightData::Fp8 { codes, scales } => {
                (codes, Stored::Fp8 { scales: fp8_scales(source, scales)? })
            }
            WeightData::Fp4 { codes, scales } => {
                let stride = source.stored_cols / 32;
                let wanted = span(source.rows.start, rows, stride, cols / 32);
                let scales = scales.slice(shifted(wanted, source.cols.start / 32));
                for row in 0..rows {
                    if let Some(group) =
                        scales[row * stride..][..cols / 32].iter().position(|&byte| byte == 255)
                    {
                        return Err(nan_scale(source, source.rows.start + row, group));
                    }
                }
                (codes, Stored::Fp4 { scales, stride })
            }
            WeightData::Bf16(codes) => (codes, Stored::Bf16),
            WeightData::F32(codes) => (codes, Stored::F32),
        };
        let stride = stored.row_bytes(source.stored_cols);
        let wanted = span(source.rows.start, rows, stride, stored.row_bytes(cols));
        let codes = codes.slice(shifted(wanted, stored.row_bytes(source.cols.start)));
        let mut linear = Self::assemble(rows, cols, codes, stride, stored);
        if linear.tail.is_none() {
            linear.first_row = source.rows.start % BLOCK;
        }
        Ok(linear)
    }

    /// A matrix from values computed here, row-major.
    ///
    /// # Errors
    /// [`OpError::Shape`] if `values` is not `rows * cols` long.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Result<Self, OpError> {
        crate::error::check_len("matrix", "values", values.len(), rows * cols)?;
        let codes = values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        Ok(Self::assemble(rows, cols, codes.into(), 4 * cols, Stored::F32))
    }

    fn assemble(rows: usize, cols: usize, codes: Bytes, stride: usize, stored: Stored) -> Self {
        let whole = stored.row_bytes(cols / BLOCK * BLOCK);
        let rest = stored.row_bytes(cols) - whole;
        let tail = (rest > 0).then(|| {
            let raws = stored.raws();
            let mut tail = vec![[0; RAW_BYTES]; rows * raws];
            for (row, padded) in tail.chunks_exact_mut(raws).enumerate() {
                padded.as_flattened_mut()[..rest]
                    .copy_from_slice(&codes[row * stride + whole..][..rest]);
            }
            tail.into()
        });
        Self { rows, cols, codes, stride, first_row: 0, tail, stored }
    }

    /// The matrix of some of the rows; bytes are shared.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if there are no such rows.
    pub fn slice_rows(&self, rows: Range<usize>) -> Result<Self, OpError> {
        let (got, limit) = (rows.end, self.rows);
        if rows.start > got || got > limit {
            return Err(OpError::OutOfRange { op: "slice_rows", what: "row", got, limit });
        }
        let row_bytes = self.stored.row_bytes(self.cols);
        let codes = self.codes.slice(span(rows.start, rows.len(), self.stride, row_bytes));
        let stored = match &self.stored {
            Stored::Fp4 { scales, stride } => {
                let scales = scales.slice(span(rows.start, rows.len(), *stride, self.cols / 32));
                Stored::Fp4 { scales, stride: *stride }
            }
            other => other.clone(),
        };
        let (rows, first_row) = (rows.len(), self.first_row + rows.start);
        Ok(Self { rows, codes, first_row, stored, tail: self.tail.clone(), ..*self })
    }

    /// Output rows.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.rows
    }

    /// Input columns.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.cols
    }

    /// Bytes of codes and scales that one product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scales = match &self.stored {
            Stored::Fp4 { .. } => self.rows * self.cols / 32,
            Stored::Fp8 { .. } => {
                let first = self.first_row / BLOCK;
                4 * ((self.first_row + self.rows).div_ceil(BLOCK) - first) * self.n_blocks()
            }
            Stored::Bf16 | Stored::F32 => 0,
        };
        self.rows * self.stored.row_bytes(self.cols) + scales
    }

    /// `out [n, rows] = x [n, cols] W^T`, row-major, f32 sums.
    ///
    /// # Errors
    /// [`OpError::Shape`] if `x` is not a whole number of rows or `out` does not fit it.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) -> Result<(), OpError> {
        run(&mut [Job::new(self, x, out)])
    }

    /// Writes row `row`, dequantised, to `out [cols]`.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `cols` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        super::kernel::dequantise_row(self, row, out);
    }

    /// Blocks of 128 columns, the padded one included.
    #[inline(always)]
    pub(super) fn n_blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Bytes between the starts of two rows.
    #[inline(always)]
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// The codes of row `row` of a matrix of format `F`.
    #[inline(always)]
    pub(super) fn row_codes<F: Format>(&self, row: usize) -> RowCodes<'_, F> {
        let bytes = &self.codes[row * self.stride..][..self.cols / BLOCK * F::RAWS * RAW_BYTES];
        let tail = self.tail.as_deref().unwrap_or_default();
        let padded = F::blocks(tail).get(self.first_row + row);
        RowCodes { whole: F::blocks(bytes.as_chunks().0), padded }
    }
}

/// The codes of one row.
#[derive(Debug)]
pub(super) struct RowCodes<'a, F: Format> {
    /// Its whole blocks.
    pub(super) whole: &'a [F::Codes],
    /// The columns after them, as a block padded with zeros.
    pub(super) padded: Option<&'a F::Codes>,
}

impl<F: Format> Clone for RowCodes<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F: Format> Copy for RowCodes<'_, F> {}

/// The bytes of `rows` rows from row `first`, `row_bytes` of each at distances of `stride`.
fn span(first: usize, rows: usize, stride: usize, row_bytes: usize) -> Range<usize> {
    if rows == 0 { 0..0 } else { first * stride..(first + rows - 1) * stride + row_bytes }
}

fn shifted(range: Range<usize>, by: usize) -> Range<usize> {
    if range.is_empty() { range } else { range.start + by..range.end + by }
}

fn fp8_scales(source: &WeightSource, scales: &Scales) -> Result<Arc<[f32]>, OpError> {
    let stored_blocks = source.stored_cols / BLOCK;
    let row_blocks = source.rows.start / BLOCK..source.rows.end.div_ceil(BLOCK);
    let col_blocks = source.cols.start / BLOCK..source.cols.end / BLOCK;
    let mut values = Vec::with_capacity(row_blocks.len() * col_blocks.len());
    for row_block in row_blocks {
        for col_block in col_blocks.clone() {
            let index = row_block * stored_blocks + col_block;
            let value = match scales {
                Scales::Ue8m0(bytes) => Ue8m0::from_byte(bytes[index])
                    .ok_or_else(|| nan_scale(source, row_block, col_block))?
                    .to_f32(),
                Scales::F32(bytes) => {
                    let bytes = bytes[4 * index..][..4].try_into().expect("four bytes were taken");
                    f32::from_le_bytes(bytes)
                }
            };
            if value.is_nan() || value.abs() > MAX_FP8_SCALE {
                let reason = format!(
                    "scale [{row_block}, {col_block}] is {value}, expected at most \
                     {MAX_FP8_SCALE:e}; the file is damaged"
                );
                return Err(bad(source, reason));
            }
            values.push(256.0 * value);
        }
    }
    Ok(values.into())
}

fn nan_scale(source: &WeightSource, row: usize, col: usize) -> OpError {
    bad(source, format!("scale [{row}, {col}] is 255, the NaN of E8M0; the file is damaged"))
}

fn bad(source: &WeightSource, reason: String) -> OpError {
    OpError::Weight { name: source.name.clone(), reason }
}
