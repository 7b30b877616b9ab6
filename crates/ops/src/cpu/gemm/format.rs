//! The four formats of a matrix: how codes become lanes, and where their scales are.
//!
//! A block of 128 columns is 1, 2, 4 or 8 pieces of 64 bytes, and a piece feeds 8, 4, 2 or 1 steps.
//! At step `s`, lane `i` takes column `16 n (s / n) + i n + s % n`, where `n` is the stride of the
//! format: how many neighbouring values lie in the word that a lane decodes.

use std::fmt::Debug;

use super::linear::{CpuLinear, Stored};
use crate::cpu::isa::{BLOCK, Isa, RAW_BYTES, STEPS};

/// A format, as the kernels are compiled for it.
pub(super) trait Format: 'static {
    /// The codes of a block, `RAWS` pieces of 64 bytes.
    type Codes: Debug + Copy + AsRef<[[u8; RAW_BYTES]]>;
    const RAWS: usize;
    /// Steps that one piece feeds.
    const RAW_STEPS: usize = STEPS / Self::RAWS;
    /// Distance between the columns of neighbouring lanes.
    const STRIDE: usize;
    /// The scales of a block.
    type Scale: Debug + Copy;

    /// The whole blocks in `pieces`.
    fn blocks(pieces: &[[u8; RAW_BYTES]]) -> &[Self::Codes];
    /// The scales of each block of a row.
    fn scales(linear: &CpuLinear, row: usize) -> &[Self::Scale];
    fn scale<I: Isa>(isa: I, scale: Self::Scale, part: usize) -> I::Vector;
    fn load<I: Isa>(isa: I, codes: &[u8; RAW_BYTES], part: usize) -> I::Raw;
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector;
}

/// E2M1 codes, an E8M0 scale per 32 columns: groups of four lanes.
pub(super) struct Fp4;
/// E4M3 codes, an f32 scale per block. Codes decode to 1/256 of their value, scales are stored
/// times 256: both are exact, and the former is what a conversion from f16 gives.
pub(super) struct Fp8;
/// bf16, no scale.
pub(super) struct Bf16;
/// f32, no scale.
pub(super) struct F32;

impl Format for Fp4 {
    type Codes = [[u8; RAW_BYTES]; 1];
    const RAWS: usize = 1;
    const STRIDE: usize = 8;
    type Scale = [u8; 4];

    #[inline(always)]
    fn blocks(pieces: &[[u8; RAW_BYTES]]) -> &[Self::Codes] {
        pieces.as_chunks().0
    }

    #[inline(always)]
    fn scales(linear: &CpuLinear, row: usize) -> &[[u8; 4]] {
        let Stored::Fp4 { scales, stride } = &linear.stored else { return &[] };
        scales[row * stride..][..4 * linear.n_blocks()].as_chunks().0
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, scale: [u8; 4], part: usize) -> I::Vector {
        isa.group_scales(scale, part)
    }

    #[inline(always)]
    fn load<I: Isa>(isa: I, codes: &[u8; RAW_BYTES], part: usize) -> I::Raw {
        isa.dwords(codes, part)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.e2m1(raw, step)
    }
}

impl Format for Fp8 {
    type Codes = [[u8; RAW_BYTES]; 2];
    const RAWS: usize = 2;
    const STRIDE: usize = 2;
    type Scale = f32;

    #[inline(always)]
    fn blocks(pieces: &[[u8; RAW_BYTES]]) -> &[Self::Codes] {
        pieces.as_chunks().0
    }

    #[inline(always)]
    fn scales(linear: &CpuLinear, row: usize) -> &[f32] {
        let Stored::Fp8 { scales } = &linear.stored else { return &[] };
        let row_block = (linear.first_row + row) / BLOCK;
        &scales[row_block * linear.n_blocks()..][..linear.n_blocks()]
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, scale: f32, _part: usize) -> I::Vector {
        isa.splat(scale)
    }

    #[inline(always)]
    fn load<I: Isa>(isa: I, codes: &[u8; RAW_BYTES], part: usize) -> I::Raw {
        isa.words(codes, part)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.e4m3_by_256(raw, step)
    }
}

impl Format for Bf16 {
    type Codes = [[u8; RAW_BYTES]; 4];
    const RAWS: usize = 4;
    const STRIDE: usize = 2;
    type Scale = ();

    #[inline(always)]
    fn blocks(pieces: &[[u8; RAW_BYTES]]) -> &[Self::Codes] {
        pieces.as_chunks().0
    }

    #[inline(always)]
    fn scales(linear: &CpuLinear, _row: usize) -> &[()] {
        &[(); usize::MAX][..linear.n_blocks()]
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, (): (), _part: usize) -> I::Vector {
        isa.splat(1.0)
    }

    #[inline(always)]
    fn load<I: Isa>(isa: I, codes: &[u8; RAW_BYTES], part: usize) -> I::Raw {
        isa.dwords(codes, part)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.bf16(raw, step)
    }
}

impl Format for F32 {
    type Codes = [[u8; RAW_BYTES]; 8];
    const RAWS: usize = 8;
    const STRIDE: usize = 1;
    type Scale = ();

    #[inline(always)]
    fn blocks(pieces: &[[u8; RAW_BYTES]]) -> &[Self::Codes] {
        pieces.as_chunks().0
    }

    #[inline(always)]
    fn scales(linear: &CpuLinear, _row: usize) -> &[()] {
        &[(); usize::MAX][..linear.n_blocks()]
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, (): (), _part: usize) -> I::Vector {
        isa.splat(1.0)
    }

    #[inline(always)]
    fn load<I: Isa>(isa: I, codes: &[u8; RAW_BYTES], part: usize) -> I::Raw {
        isa.dwords(codes, part)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, _step: usize) -> I::Vector {
        isa.f32(raw)
    }
}
