//! A stored tensor, as bytes of the file it lies in, and typed readings of it.

use std::sync::Arc;

use bytes::Bytes;

use crate::dtype::StoredDtype;
use crate::error::LoadError;

/// A tensor of a checkpoint. `data` shares the mapped file: cloning and slicing copy nothing.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// The release's name.
    pub name: String,
    /// Element format.
    pub dtype: StoredDtype,
    /// Stored shape; for packed FP4 the last axis counts bytes.
    pub shape: Vec<usize>,
    /// Row-major, little-endian, not necessarily aligned to the element.
    pub data: Bytes,
    /// The file it lies in, for messages.
    pub file: Arc<str>,
}

impl TensorView {
    /// Product of the shape.
    #[must_use]
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements of an F32 tensor.
    ///
    /// # Errors
    /// [`LoadError::WrongDtype`] for any other format.
    pub fn f32_vec(&self) -> Result<Vec<f32>, LoadError> {
        self.expect(StoredDtype::F32)?;
        let (chunks, _) = self.data.as_chunks::<4>();
        Ok(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// The elements of a BF16 tensor, widened exactly.
    ///
    /// # Errors
    /// [`LoadError::WrongDtype`] for any other format.
    pub fn bf16_vec(&self) -> Result<Vec<f32>, LoadError> {
        self.expect(StoredDtype::BF16)?;
        let (chunks, _) = self.data.as_chunks::<2>();
        let widen = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        Ok(chunks.iter().map(widen).collect())
    }

    /// The elements of an F32 or BF16 tensor as f32.
    ///
    /// # Errors
    /// [`LoadError::WrongDtype`] for any other format.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, LoadError> {
        if self.dtype == StoredDtype::BF16 { self.bf16_vec() } else { self.f32_vec() }
    }

    /// The scales of an FP8 or FP4 weight as f32, checked: powers of two from E8M0, or F32.
    ///
    /// # Errors
    /// [`LoadError::NanScale`] and [`LoadError::BadScale`] name the position of a bad scale;
    /// [`LoadError::WrongDtype`] for a tensor that holds no scales.
    pub fn scale_vec(&self) -> Result<Vec<f32>, LoadError> {
        crate::verify::check_scales(self)?;
        match self.dtype {
            StoredDtype::F32 => self.f32_vec(),
            _ => Ok(self.data.iter().map(|byte| e8m0(*byte)).collect()),
        }
    }

    /// The expert ids of a hash-routed layer, `[vocabulary, experts per token]`, checked.
    ///
    /// # Errors
    /// [`LoadError::ExpertOutOfRange`] and [`LoadError::ExpertRepeated`] name token and expert;
    /// [`LoadError::WrongDtype`] for any other tensor.
    pub fn tid2eid(&self, n_experts: usize) -> Result<Vec<u16>, LoadError> {
        crate::verify::expert_ids(self, n_experts)
    }

    /// Requires the element format `expected`.
    ///
    /// # Errors
    /// [`LoadError::WrongDtype`] otherwise.
    pub fn expect(&self, expected: StoredDtype) -> Result<(), LoadError> {
        if self.dtype == expected {
            return Ok(());
        }
        Err(LoadError::WrongDtype {
            name: self.name.clone(),
            file: self.file.to_string(),
            found: self.dtype.to_string(),
            expected,
        })
    }
}

/// The scale stored as `byte`, which is known not to be 255.
fn e8m0(byte: u8) -> f32 {
    fathom_core::num::Ue8m0::from_byte(byte).expect("checked by the caller").to_f32()
}
