//! Tensor maps: how a tensor lies in device memory, for copies of boxes of it (`tensor_load`).
//!
//! A [`TensorMapSpec`] says it in our words and checks what the driver's manual demands, so that the
//! emulator refuses what a driver would; the device encodes it ([`Device::encode`](super::Device)).
//!
//! Not here: who copies through which map (the launchers).

use super::device::DeviceError;

/// Dimensions a map can have.
const MAX_RANK: usize = 5;
/// Elements of a box along one dimension.
const MAX_BOX: u32 = 256;
/// Columns that 4-bit boxes have, and of which whole numbers lie in a row.
const FP4_COLUMNS: u64 = 128;

/// What an element is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapElement {
    /// 8 bits.
    U8,
    /// 16 bits.
    Bf16,
    /// 4 bits; in shared memory 16 of them lie in the first 8 of 16 bytes.
    Padded4,
}

impl MapElement {
    /// Bits in device memory.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::U8 => 8,
            Self::Bf16 => 16,
            Self::Padded4 => 4,
        }
    }

    const fn shared_bits(self) -> u32 {
        match self {
            Self::U8 | Self::Padded4 => 8,
            Self::Bf16 => 16,
        }
    }
}

/// In which span of bytes the 16-byte pieces of a box are exchanged, as tensor cores want them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// 32 bytes.
    B32,
    /// 64 bytes.
    B64,
    /// 128 bytes.
    B128,
}

impl Swizzle {
    /// Bytes of the span; 0 for none.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::B32 => 32,
            Self::B64 => 64,
            Self::B128 => 128,
        }
    }
}

/// A tensor and the box that one copy takes of it. What lies outside of the tensor is read as zeros.
#[derive(Debug, Clone)]
pub struct TensorMapSpec<'a> {
    /// What it consists of.
    pub element: MapElement,
    /// Of the first element.
    pub address: u64,
    /// Elements along each dimension, innermost first.
    pub dims: &'a [u64],
    /// Bytes between neighbours along each dimension but the innermost, where they are side by side.
    pub strides: &'a [u64],
    /// Elements of the box along each dimension.
    pub box_dims: &'a [u32],
    /// How the box lies in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMapSpec<'_> {
    /// Checks what the manual of `cuTensorMapEncodeTiled` demands.
    ///
    /// # Errors
    /// [`DeviceError::TensorMap`] with what is wrong.
    pub fn check(&self) -> Result<(), DeviceError> {
        let rank = self.dims.len();
        let refuse = |reason: String| Err(DeviceError::TensorMap { reason });
        if rank == 0 || rank > MAX_RANK {
            return refuse(format!("{rank} dimensions; 1 to {MAX_RANK} are possible"));
        }
        if self.box_dims.len() != rank || self.strides.len() != rank - 1 {
            let (n_boxes, n_strides) = (self.box_dims.len(), self.strides.len());
            return refuse(format!("{rank} dimensions, {n_boxes} of the box, {n_strides} strides"));
        }
        let is_fp4 = self.element == MapElement::Padded4;
        let align = if is_fp4 { 32 } else { 16 };
        if !self.address.is_multiple_of(align) {
            let address = self.address;
            return refuse(format!("address {address:#x} is no multiple of {align}"));
        }
        if let Some(n) = self.dims.iter().find(|&&n| n == 0 || n > 1 << 32) {
            return refuse(format!("{n} elements along a dimension; 1 to 2^32 are possible"));
        }
        if let Some(n) = self.box_dims.iter().find(|&&n| n == 0 || n > MAX_BOX) {
            return refuse(format!("{n} elements of the box; 1 to {MAX_BOX} are possible"));
        }
        let stride_is_wrong = |&&n: &&u64| !n.is_multiple_of(align) || n >= 1 << 40;
        if let Some(n) = self.strides.iter().find(stride_is_wrong) {
            return refuse(format!("a stride of {n} bytes is no multiple of {align} below 2^40"));
        }
        let row_bytes = self.box_dims[0] * self.element.shared_bits() / 8;
        let span = self.swizzle.bytes();
        if !row_bytes.is_multiple_of(16) || (span > 0 && row_bytes > span) {
            return refuse(format!(
                "a box of {row_bytes} bytes along the innermost dimension: a multiple of 16 is \
                 needed, and with {span}-byte swizzle no more than that"
            ));
        }
        if is_fp4 {
            let whole = self.dims[0].is_multiple_of(FP4_COLUMNS);
            let is_swizzled = matches!(self.swizzle, Swizzle::None | Swizzle::B128);
            if !whole || u64::from(self.box_dims[0]) != FP4_COLUMNS || !is_swizzled {
                let (columns, box_columns) = (self.dims[0], self.box_dims[0]);
                return refuse(format!(
                    "{columns} columns of 4 bits in boxes of {box_columns}: boxes of {FP4_COLUMNS} \
                     of a multiple of it are possible, with 128-byte swizzle or none"
                ));
            }
        }
        Ok(())
    }
}

/// An encoded tensor map, passed to kernels by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(align(128))]
pub struct TensorMap(pub(crate) [u8; 128]);

impl TensorMap {
    /// Nothing, where nobody copies.
    pub const NONE: Self = Self([0; 128]);

    /// The form that the emulator reads (`Map` in `kernels/emulator/copy.cpp`).
    #[must_use]
    pub(crate) fn for_emulator(spec: &TensorMapSpec<'_>) -> Self {
        let mut bytes = spec.address.to_le_bytes().to_vec();
        let mut words = vec![spec.dims.len() as u32, spec.element.bits(), spec.swizzle.bytes()];
        words.extend(spec.box_dims);
        words.resize(3 + MAX_RANK, 1);
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let mut longs = spec.dims.to_vec();
        longs.resize(MAX_RANK, 1);
        longs.extend(spec.strides);
        longs.resize(2 * MAX_RANK - 1, 0);
        bytes.extend(longs.iter().flat_map(|long| long.to_le_bytes()));
        let mut map = Self::NONE;
        map.0[..bytes.len()].copy_from_slice(&bytes);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_would_refuse_is_refused_with_its_reason() {
        let sound = TensorMapSpec {
            element: MapElement::U8,
            address: 256,
            dims: &[528, 70],
            strides: &[528],
            box_dims: &[128, 128],
            swizzle: Swizzle::B128,
        };
        sound.check().unwrap();
        let fp4 = TensorMapSpec { element: MapElement::Padded4, dims: &[256, 70], ..sound.clone() };
        TensorMapSpec { strides: &[128], ..fp4.clone() }.check().unwrap();
        for (wrong, says) in [
            (TensorMapSpec { address: 8, ..sound.clone() }, "address 0x8"),
            (TensorMapSpec { strides: &[520], ..sound.clone() }, "a stride of 520"),
            (TensorMapSpec { strides: &[], ..sound.clone() }, "0 strides"),
            (TensorMapSpec { box_dims: &[128, 257], ..sound.clone() }, "257 elements"),
            (TensorMapSpec { swizzle: Swizzle::B64, ..sound.clone() }, "a box of 128 bytes"),
            (TensorMapSpec { dims: &[], ..sound.clone() }, "0 dimensions"),
            (TensorMapSpec { dims: &[0, 70], ..sound.clone() }, "0 elements"),
            (TensorMapSpec { dims: &[192, 70], strides: &[96], ..fp4 }, "192 columns"),
        ] {
            let message = wrong.check().unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
