//! The four formats of a matrix: how codes become lanes, and where their scales are.
//!
//! A block of 128 columns is `RAWS` pieces of 64 bytes, a piece is a dword for each lane, and a
//! dword holds the lane's values of `8 / RAWS` steps. So lane `i` takes, at step `s` of piece `q`,
//! column `16 q n + i n + s` where `n = 8 / RAWS`: consecutive columns share a dword.

use super::isa::{BLOCK, Isa, STEPS};
use super::linear::{CpuLinear, Stored};

/// A format, as the kernels are compiled for it.
pub(super) trait Format: 'static {
    /// Pieces of 64 bytes in a block.
    const RAWS: usize;
    /// Steps that one piece feeds.
    const RAW_STEPS: usize = STEPS / Self::RAWS;
    /// The scales of one row.
    type Scales<'a>: Copy;

    fn scales(linear: &CpuLinear, row: usize) -> Self::Scales<'_>;
    fn scale<I: Isa>(isa: I, scales: Self::Scales<'_>, block: usize, part: usize) -> I::Vector;
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector;
}

/// E2M1 codes, an E8M0 scale per 32 columns: groups of four lanes.
pub(super) struct Fp4;
/// E4M3 codes, an f32 scale per block.
pub(super) struct Fp8;
/// bf16, no scale.
pub(super) struct Bf16;
/// f32, no scale.
pub(super) struct F32;

impl Format for Fp4 {
    const RAWS: usize = 1;
    type Scales<'a> = &'a [[u8; 4]];

    #[inline(always)]
    fn scales(linear: &CpuLinear, row: usize) -> &[[u8; 4]] {
        let Stored::Fp4 { scales, stride } = &linear.stored else { return &[] };
        scales[row * stride..][..4 * linear.n_blocks()].as_chunks().0
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, scales: &[[u8; 4]], block: usize, part: usize) -> I::Vector {
        isa.group_scales(scales[block], part)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.e2m1(raw, step)
    }
}

impl Format for Fp8 {
    const RAWS: usize = 2;
    type Scales<'a> = &'a [f32];

    #[inline(always)]
    fn scales(linear: &CpuLinear, row: usize) -> &[f32] {
        let Stored::Fp8 { scales } = &linear.stored else { return &[] };
        &scales[(linear.first_row + row) / BLOCK * linear.n_blocks()..][..linear.n_blocks()]
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, scales: &[f32], block: usize, _part: usize) -> I::Vector {
        isa.splat(scales[block])
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.e4m3(raw, step)
    }
}

impl Format for Bf16 {
    const RAWS: usize = 4;
    type Scales<'a> = ();

    #[inline(always)]
    fn scales(_linear: &CpuLinear, _row: usize) {}

    #[inline(always)]
    fn scale<I: Isa>(isa: I, (): (), _block: usize, _part: usize) -> I::Vector {
        isa.splat(1.0)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, step: usize) -> I::Vector {
        isa.bf16(raw, step)
    }
}

impl Format for F32 {
    const RAWS: usize = 8;
    type Scales<'a> = ();

    #[inline(always)]
    fn scales(_linear: &CpuLinear, _row: usize) {}

    #[inline(always)]
    fn scale<I: Isa>(isa: I, (): (), _block: usize, _part: usize) -> I::Vector {
        isa.splat(1.0)
    }

    #[inline(always)]
    fn decode<I: Isa>(isa: I, raw: I::Raw, _step: usize) -> I::Vector {
        isa.f32(raw)
    }
}
