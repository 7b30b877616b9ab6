//! How cache rows are stored: formats by name, and which of them lose nothing.
//!
//! What a numeric mode computes decides what a row must hold. Every format that is accepted holds it
//! without loss, so formats change memory and never tokens; one that would round is refused.
//!
//! Not here: packing (`cpu::cache`), sizes of whole caches (`cache_spec`), pages (`cache_page`).

use std::fmt;
use std::str::FromStr;

use fathom_core::Numerics;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, NOPE_DIM, ROPE_DIM};

/// How a KV row of 512 channels is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 584 bytes: 448 E4M3, 64 bf16 rope channels, 7 E8M0 scales (one per 64 channels), 1 pad.
    Fp8,
    /// 1,024 bytes.
    Bf16,
    /// 2,048 bytes; what the two f32 numeric modes need.
    F32,
}

impl KvFormat {
    /// All formats.
    pub const ALL: [Self; 3] = [Self::Fp8, Self::Bf16, Self::F32];

    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(self) -> usize {
        match self {
            Self::Fp8 => NOPE_DIM + 2 * ROPE_DIM + 8,
            Self::Bf16 => 2 * HEAD_DIM,
            Self::F32 => 4 * HEAD_DIM,
        }
    }

    /// The name used on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp8 => "fp8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// Whether rows hold what `numerics` computes. FP8 values are bf16 values, and rope channels are
    /// bf16 in the mode that computes in bf16.
    #[must_use]
    pub const fn is_exact_for(self, numerics: Numerics) -> bool {
        matches!((self, numerics), (Self::F32, _) | (_, Numerics::Bf16))
    }
}

/// How an indexer key of 128 channels is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexKeyFormat {
    /// 68 bytes: 64 packed E2M1 (low nibble first) and 4 E8M0 scales; exact.
    Mxfp4,
    /// 132 bytes: 128 E4M3 and one f32 power of two; what FP8 kernels read. Exact while the four
    /// blocks of a key are within a factor of 2^14 of each other; what is smaller still is rounded.
    Fp8,
    /// 256 bytes.
    Bf16,
    /// 512 bytes; what the `f32` numeric mode needs.
    F32,
}

impl IndexKeyFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Mxfp4, Self::Fp8, Self::Bf16, Self::F32];

    /// Bytes of one key.
    #[must_use]
    pub const fn row_bytes(self) -> usize {
        match self {
            Self::Mxfp4 => INDEX_HEAD_DIM / 2 + 4,
            Self::Fp8 => INDEX_HEAD_DIM + 4,
            Self::Bf16 => 2 * INDEX_HEAD_DIM,
            Self::F32 => 4 * INDEX_HEAD_DIM,
        }
    }

    /// The name used on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Fp8 => "fp8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// Whether keys hold what `numerics` computes: FP4 values unless nothing is quantised.
    #[must_use]
    pub const fn is_exact_for(self, numerics: Numerics) -> bool {
        matches!(self, Self::F32) || numerics.quantises()
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for IndexKeyFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Formats that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum FormatError {
    #[error("unknown format `{0}` of KV rows: use fp8, bf16 or f32")]
    UnknownKv(String),
    #[error("unknown format `{0}` of indexer keys: use mxfp4, fp8, bf16 or f32")]
    UnknownIndexKey(String),
    #[error("KV rows in {format} would round what numerics {numerics} computes: use f32")]
    LossyKv { format: KvFormat, numerics: Numerics },
    #[error("indexer keys in {format} would round what numerics {numerics} computes: use f32")]
    LossyIndexKey { format: IndexKeyFormat, numerics: Numerics },
}

impl FromStr for KvFormat {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| FormatError::UnknownKv(name.to_owned()))
    }
}

impl FromStr for IndexKeyFormat {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| FormatError::UnknownIndexKey(name.to_owned()))
    }
}

/// Formats that hold what a numeric mode computes: having them is the proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowFormats {
    kv: KvFormat,
    index_keys: IndexKeyFormat,
}

impl RowFormats {
    /// The smallest formats for `numerics`.
    #[must_use]
    pub const fn smallest(numerics: Numerics) -> Self {
        match numerics {
            Numerics::F32 => Self { kv: KvFormat::F32, index_keys: IndexKeyFormat::F32 },
            Numerics::F32Qat => Self { kv: KvFormat::F32, index_keys: IndexKeyFormat::Mxfp4 },
            Numerics::Bf16 => Self { kv: KvFormat::Fp8, index_keys: IndexKeyFormat::Mxfp4 },
        }
    }

    /// The formats asked for, the smallest where none is.
    ///
    /// # Errors
    /// [`FormatError::LossyKv`] or [`FormatError::LossyIndexKey`].
    pub fn choose(
        numerics: Numerics,
        kv: Option<KvFormat>,
        index_keys: Option<IndexKeyFormat>,
    ) -> Result<Self, FormatError> {
        let smallest = Self::smallest(numerics);
        let kv = kv.unwrap_or(smallest.kv);
        let index_keys = index_keys.unwrap_or(smallest.index_keys);
        if !kv.is_exact_for(numerics) {
            return Err(FormatError::LossyKv { format: kv, numerics });
        }
        if !index_keys.is_exact_for(numerics) {
            return Err(FormatError::LossyIndexKey { format: index_keys, numerics });
        }
        Ok(Self { kv, index_keys })
    }

    /// Of window and compressed KV rows.
    #[must_use]
    pub const fn kv(self) -> KvFormat {
        self.kv
    }

    /// Of indexer keys.
    #[must_use]
    pub const fn index_keys(self) -> IndexKeyFormat {
        self.index_keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_sizes_of_the_cache_specification() {
        assert_eq!(KvFormat::ALL.map(KvFormat::row_bytes), [584, 1024, 2048]);
        assert_eq!(IndexKeyFormat::ALL.map(IndexKeyFormat::row_bytes), [68, 132, 256, 512]);
    }

    #[test]
    fn every_name_leads_to_its_format_and_no_other_does() {
        for format in KvFormat::ALL {
            assert_eq!(format.name().parse(), Ok(format));
        }
        for format in IndexKeyFormat::ALL {
            assert_eq!(format.name().parse(), Ok(format));
        }
        let unknown = "fp4".parse::<KvFormat>().unwrap_err().to_string();
        assert!(unknown.contains("`fp4`") && unknown.contains("fp8, bf16 or f32"), "{unknown}");
    }

    #[test]
    fn formats_that_would_round_are_refused_and_the_smallest_never_do() {
        for numerics in [Numerics::F32, Numerics::F32Qat, Numerics::Bf16] {
            let smallest = RowFormats::smallest(numerics);
            assert_eq!(RowFormats::choose(numerics, None, None), Ok(smallest));
            assert!(smallest.kv.is_exact_for(numerics));
            assert!(smallest.index_keys.is_exact_for(numerics));
        }
        let choose = RowFormats::choose;
        assert!(choose(Numerics::F32Qat, Some(KvFormat::Bf16), None).is_err());
        assert!(choose(Numerics::F32, None, Some(IndexKeyFormat::Bf16)).is_err());
        assert!(choose(Numerics::F32Qat, None, Some(IndexKeyFormat::Fp8)).is_ok());
        assert!(choose(Numerics::Bf16, Some(KvFormat::F32), Some(IndexKeyFormat::Bf16)).is_ok());
    }
}
