//! Element formats as stored in a shard.
//!
//! Not here: what the bits mean as numbers (`core::num`).

use std::fmt;

/// Format of a stored tensor's elements, by its safetensors name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoredDtype {
    /// `F8_E4M3`: weights of FP8 linears, one byte each.
    F8E4M3,
    /// `F8_E8M0`: power-of-two scales, one exponent byte each.
    F8E8M0,
    /// `I8`: two packed E2M1 codes per byte (routed experts).
    I8,
    /// `BF16`.
    BF16,
    /// `F32`.
    F32,
    /// `I64`: expert ids.
    I64,
}

impl StoredDtype {
    /// Every format a DeepSeek-V4 checkpoint uses.
    pub const ALL: [Self; 6] =
        [Self::BF16, Self::F32, Self::F8E4M3, Self::F8E8M0, Self::I64, Self::I8];

    /// The format called `name` in a safetensors header, or `None` if V4 does not use it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// The safetensors name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E8M0 => "F8_E8M0",
            Self::I8 => "I8",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
            Self::I64 => "I64",
        }
    }

    /// Bytes per stored element.
    #[must_use]
    pub const fn size(self) -> u64 {
        match self {
            Self::F8E4M3 | Self::F8E8M0 | Self::I8 => 1,
            Self::BF16 => 2,
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Bytes of a tensor, or `None` where the product leaves 64 bits.
#[must_use]
pub fn byte_len(dtype: StoredDtype, shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(u64::try_from(n).ok()?))
}
