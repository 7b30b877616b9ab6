//! What the operators pass to each other, in device memory.

use half::bf16;

use super::memory::Buffer;
use super::moe::Groups;
use crate::OpError;
use crate::error::check_len;

/// How the values of a tensor lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Two bytes: what operators exchange.
    Bf16,
    /// Four bytes: compressor inputs, mixing weights, logits.
    F32,
}

impl Element {
    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// `[rows, cols]` activations, row-major.
#[derive(Debug, Clone)]
pub struct DeviceTensor {
    /// Rows.
    pub rows: usize,
    /// Values per row.
    pub cols: usize,
    /// How a value is stored.
    pub element: Element,
    /// The values.
    pub values: Buffer,
    /// The same values on the FP8 grid of a linear layer's input (bf16), where the operator that
    /// made the tensor wrote them too. The buffer of `values` itself: they are to be taken on the
    /// grid, and the kernel that reads them rounds them (sm_90a).
    pub(crate) quantised: Option<Buffer>,
    /// What is still to be added to `values`: only who adds it may read them.
    pub(crate) addends: Option<Addends>,
}

/// Parts of the experts of each row: `[rows, k, cols]` bf16, to be added to it in f32 in this order of
/// the k (`[rows, k]` u32), the row itself last.
#[derive(Debug, Clone)]
pub(crate) struct Addends {
    pub(crate) parts: Buffer,
    pub(crate) order: Buffer,
    pub(crate) k: usize,
}

impl DeviceTensor {
    /// `values` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if there are not as many.
    pub fn of(rows: usize, cols: usize, element: Element, values: Buffer) -> Result<Self, OpError> {
        let bytes = (rows * cols * element.bytes()).max(1);
        check_len("tensor", "bytes", values.len(), bytes)?;
        Ok(Self { rows, cols, element, values, quantised: None, addends: None })
    }

    /// The values on the FP8 grid, where the operator that made the tensor wrote them.
    #[must_use]
    pub fn on_grid(&self) -> Option<Self> {
        let values = self.quantised.clone()?;
        Some(Self { values, quantised: None, ..self.clone() })
    }
}

/// A small f32 vector.
#[derive(Debug, Clone)]
pub struct DeviceVector {
    pub(crate) len: usize,
    pub(crate) values: Buffer,
}

/// `tid2eid [vocab, k]`, u16.
#[derive(Debug, Clone)]
pub struct DeviceExpertTable {
    pub(crate) n_tokens: usize,
    pub(crate) k: usize,
    pub(crate) ids: Buffer,
}

/// Chosen experts and weights, `[rows, k]` u32 and f32.
#[derive(Debug)]
pub struct DeviceRouting {
    pub(crate) rows: usize,
    pub(crate) k: usize,
    pub(crate) ids: Buffer,
    pub(crate) weights: Buffer,
    /// The choices of each row by ascending id.
    pub(crate) order: Buffer,
    /// Tokens by expert, if they were grouped at once.
    pub(crate) groups: Option<Groups>,
}

/// Chosen compressed entries, `[rows, top_k]` u32 with a count per row.
#[derive(Debug)]
pub struct DeviceSelection {
    pub(crate) rows: usize,
    pub(crate) top_k: usize,
    pub(crate) chosen: Buffer,
    pub(crate) counts: Buffer,
}

/// Little-endian f32 values.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Little-endian u32 values.
pub(crate) fn u32_bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The reverse of [`f32_bytes`].
pub(crate) fn f32_values(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The reverse of [`u32_bytes`].
pub(crate) fn u32_values(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// f32 values rounded to little-endian bf16.
pub(crate) fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
}

/// The reverse of [`bf16_bytes`].
pub(crate) fn bf16_values(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
}
