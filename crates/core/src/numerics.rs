//! The three numeric modes in which the model can be computed.

use std::str::FromStr;

/// How values are rounded on the way through the model (goldens: one file per mode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Numerics {
    /// Pure mathematics in f32: weights dequantised exactly, no activation is ever quantised.
    F32,
    /// f32 values, but quantised where the official kernels quantise activations, KV and index.
    F32Qat,
    /// The official semantics: as [`Numerics::F32Qat`], with bf16 activations and linear outputs.
    #[default]
    Bf16,
}

impl Numerics {
    /// Whether activations, KV rows and index vectors are rounded to FP8 / FP4 grids.
    #[must_use]
    pub const fn quantises(self) -> bool {
        matches!(self, Self::F32Qat | Self::Bf16)
    }

    /// Whether activations between operators are bf16 values.
    #[must_use]
    pub const fn is_bf16(self) -> bool {
        matches!(self, Self::Bf16)
    }

    /// The name used on the command line and in golden files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F32Qat => "f32qat",
            Self::Bf16 => "bf16",
        }
    }
}

impl std::fmt::Display for Numerics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A numeric mode's name is none of `f32`, `f32qat`, `bf16`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown numeric mode `{0}`: use f32, f32qat or bf16")]
pub struct UnknownNumerics(pub String);

impl FromStr for Numerics {
    type Err = UnknownNumerics;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "f32" => Ok(Self::F32),
            "f32qat" => Ok(Self::F32Qat),
            "bf16" => Ok(Self::Bf16),
            other => Err(UnknownNumerics(other.to_owned())),
        }
    }
}
