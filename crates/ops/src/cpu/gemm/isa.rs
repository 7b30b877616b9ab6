//! What the kernels ask of an instruction set, and which one this machine has.
//!
//! A value of a type that implements [`Isa`] is proof that the CPU has its instructions: such a
//! value comes from detection only. That is what makes the methods safe to call.

use std::sync::OnceLock;

use super::portable::Portable;

/// Lanes of an accumulator.
pub(super) const LANES: usize = 16;
/// Fused multiply-adds each lane takes per block.
pub(super) const STEPS: usize = 8;
/// Columns of a block.
pub(super) const BLOCK: usize = LANES * STEPS;
/// Bytes of codes that are loaded at once: a dword for each lane.
pub(super) const RAW_BYTES: usize = 64;

/// One f32 for each lane.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

impl Lanes {
    pub(super) const ZERO: Self = Self([0.0; LANES]);
}

/// 128 columns of a row, in the order in which the lanes take them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block(pub(super) [Lanes; STEPS]);

impl Block {
    pub(super) const ZERO: Self = Self([Lanes::ZERO; STEPS]);
}

/// Arguments of [`Isa::tile`]: one block of `TILE_ROWS` weight rows against up to `TILE_TOKENS`
/// rows of `x`.
pub(super) struct Tile<'a> {
    /// A decoded block of each weight row.
    pub(super) weights: &'a [Block],
    /// The scale of each weight row.
    pub(super) scales: &'a [Lanes],
    /// The block of each row of `x`.
    pub(super) x: &'a [Block],
    /// `[x rows, TILE_ROWS]`.
    pub(super) acc: &'a mut [Lanes],
}

/// An instruction set.
///
/// The 16 lanes are `PARTS` vectors. No operation crosses lanes, except the sum at the end.
pub(super) trait Isa: Copy + Send + Sync + 'static {
    /// `16 / PARTS` f32 lanes.
    type Vector: Copy;
    /// `16 / PARTS` dwords of codes.
    type Raw: Copy;
    /// Vectors that make up the 16 lanes.
    const PARTS: usize;
    /// Weight rows of a tile whose accumulators stay in registers.
    const TILE_ROWS: usize;
    /// Rows of `x` of such a tile.
    const TILE_TOKENS: usize;

    fn zero(self) -> Self::Vector;
    fn splat(self, value: f32) -> Self::Vector;
    fn load(self, lanes: &Lanes, part: usize) -> Self::Vector;
    fn store(self, value: Self::Vector, lanes: &mut Lanes, part: usize);
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;

    fn raw(self, codes: &[u8; RAW_BYTES], part: usize) -> Self::Raw;
    /// The value of nibble `step` of each dword.
    fn e2m1(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// The value of byte `step` of each dword; the NaN codes read as ±480.
    fn e4m3(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// The value of bf16 half `step` of each dword.
    fn bf16(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// The f32 that each dword is.
    fn f32(self, raw: Self::Raw) -> Self::Vector;
    /// Lane `i` gets the E8M0 scale `i / 4`.
    fn group_scales(self, bytes: [u8; 4], part: usize) -> Self::Vector;

    /// The tree sum of the lanes of four accumulators.
    fn sum4(self, acc: [&Lanes; 4]) -> [f32; 4];
    /// `lane i` of step `s` becomes value `i * stride + s` of each run of `16 * stride` values.
    fn deinterleave(self, values: &[f32; BLOCK], stride: usize, out: &mut Block);
    fn tile(self, tile: Tile<'_>);

    /// Runs a task in a function compiled for these instructions.
    fn enter<T: Task>(self, task: T);
}

/// Work written once for all instruction sets. Implementations are `#[inline(always)]`, so that
/// they are compiled inside [`Isa::enter`].
pub(super) trait Task {
    fn run<I: Isa>(self, isa: I);
}

/// An instruction set this machine has.
#[derive(Debug, Clone, Copy)]
pub struct Level(Kind);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Portable(Portable),
}

impl Level {
    /// Every set this machine has, the fastest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        vec![Self(Kind::Portable(Portable))]
    }

    /// The fastest set this machine has.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// `avx512`, `avx2` or `portable`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable(_) => "portable",
        }
    }

    pub(super) fn run(self, task: impl Task) {
        match self.0 {
            Kind::Portable(isa) => isa.enter(task),
        }
    }
}
