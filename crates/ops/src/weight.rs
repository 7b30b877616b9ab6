//! A matrix as it lies in the checkpoint: bytes, format and the part of it a rank wants.
//!
//! Bytes are shared with the memory-mapped shard; nothing is copied until a backend does.

use std::ops::Range;

use bytes::Bytes;
use fathom_core::parallel::QUANT_BLOCK;

use crate::OpError;

/// A `[rows, cols]` matrix of the checkpoint, `y = W x`, possibly narrowed to a shard.
#[derive(Debug, Clone)]
pub struct WeightSource {
    /// Name in the checkpoint, for errors.
    pub name: String,
    /// Output rows of the stored matrix.
    pub stored_rows: usize,
    /// Input columns of the stored matrix.
    pub stored_cols: usize,
    /// The bytes and their format.
    pub data: WeightData,
    /// Rows wanted.
    pub rows: Range<usize>,
    /// Columns wanted.
    pub cols: Range<usize>,
}

/// Stored values of a matrix, row-major.
#[derive(Debug, Clone)]
pub enum WeightData {
    /// E4M3 codes `[rows, cols]` with a scale per 128x128 block.
    Fp8 {
        /// One byte per value.
        codes: Bytes,
        /// `[ceil(rows / 128), ceil(cols / 128)]`.
        scales: Scales,
    },
    /// E2M1 codes `[rows, cols / 2]`, low nibble first, with an E8M0 scale per 32 inputs of a row.
    Fp4 {
        /// Two values per byte.
        codes: Bytes,
        /// E8M0 bytes `[rows, cols / 32]`.
        scales: Bytes,
    },
    /// bf16, little-endian.
    Bf16(Bytes),
    /// f32, little-endian.
    F32(Bytes),
}

/// Scales of an FP8 matrix.
#[derive(Debug, Clone)]
pub enum Scales {
    /// One E8M0 byte each (the releases).
    Ue8m0(Bytes),
    /// One little-endian f32 each (the -Base checkpoints).
    F32(Bytes),
}

impl WeightSource {
    /// The whole matrix.
    ///
    /// # Errors
    /// [`OpError::Weight`] if the byte counts do not fit the shape.
    pub fn new(
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        data: WeightData,
    ) -> Result<Self, OpError> {
        let name = name.into();
        let blocks = rows.div_ceil(QUANT_BLOCK) * cols.div_ceil(QUANT_BLOCK);
        let expected = match &data {
            WeightData::Fp8 { codes, scales: Scales::Ue8m0(scales) } => {
                [(codes.len(), rows * cols), (scales.len(), blocks)]
            }
            WeightData::Fp8 { codes, scales: Scales::F32(scales) } => {
                [(codes.len(), rows * cols), (scales.len(), 4 * blocks)]
            }
            WeightData::Fp4 { codes, scales } => {
                [(codes.len(), rows * cols / 2), (scales.len(), rows * cols / 32)]
            }
            WeightData::Bf16(values) => [(values.len(), 2 * rows * cols); 2],
            WeightData::F32(values) => [(values.len(), 4 * rows * cols); 2],
        };
        for (got, expected) in expected {
            if got != expected {
                let reason = format!("[{rows}, {cols}] needs {expected} bytes, got {got}");
                return Err(OpError::Weight { name, reason });
            }
        }
        Ok(Self { name, stored_rows: rows, stored_cols: cols, data, rows: 0..rows, cols: 0..cols })
    }

    /// Narrows to `rows` of the rows wanted so far.
    ///
    /// # Errors
    /// [`OpError::Weight`] if the range leaves the matrix or cuts a 128-wide FP8 block.
    pub fn slice_rows(mut self, rows: Range<usize>) -> Result<Self, OpError> {
        self.rows = self.narrowed("rows", &self.rows, &rows)?;
        Ok(self)
    }

    /// Narrows to `cols` of the columns wanted so far.
    ///
    /// # Errors
    /// [`OpError::Weight`] if the range leaves the matrix or cuts a quantisation block.
    pub fn slice_cols(mut self, cols: Range<usize>) -> Result<Self, OpError> {
        self.cols = self.narrowed("columns", &self.cols, &cols)?;
        Ok(self)
    }

    fn narrowed(
        &self,
        what: &str,
        now: &Range<usize>,
        wanted: &Range<usize>,
    ) -> Result<Range<usize>, OpError> {
        let range = now.start + wanted.start..now.start + wanted.end;
        let cut = match &self.data {
            // A row slice of FP4 cuts nothing: its scales belong to single rows.
            WeightData::Fp4 { .. } if what == "rows" => 1,
            WeightData::Fp8 { .. } | WeightData::Fp4 { .. } => QUANT_BLOCK,
            WeightData::Bf16(_) | WeightData::F32(_) => 1,
        };
        let whole = range.start.is_multiple_of(cut) && range.end.is_multiple_of(cut);
        if range.end > now.end || range.start > range.end || !whole {
            let name = self.name.clone();
            let reason = format!(
                "cannot take {what} {wanted:?} of {now:?}: outside, or no whole blocks of {cut}"
            );
            return Err(OpError::Weight { name, reason });
        }
        Ok(range)
    }

    /// Rows wanted.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// Columns wanted.
    #[must_use]
    pub fn n_cols(&self) -> usize {
        self.cols.len()
    }
}
