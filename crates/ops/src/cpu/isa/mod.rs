//! Vector instructions as the kernels use them, and which set of them this machine has.
//!
//! A value of a type that implements [`Isa`] is proof that the CPU has its instructions: such a
//! value comes from detection only. That is what makes the methods safe to call.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of an accumulator.
pub(crate) const LANES: usize = 16;
/// Fused multiply-adds each lane takes per block.
pub(crate) const STEPS: usize = 8;
/// Columns of a block.
pub(crate) const BLOCK: usize = LANES * STEPS;
/// Bytes of codes that are loaded at once: a dword for each lane.
pub(crate) const RAW_BYTES: usize = 64;

/// One f32 for each lane.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);
}

/// 128 columns of a row, in the order in which the lanes take them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Block(pub(crate) [Lanes; STEPS]);

impl Block {
    pub(crate) const ZERO: Self = Self([Lanes::ZERO; STEPS]);
}

/// Weight rows that are multiplied, and whose lanes are added up, together.
pub(crate) const GROUP: usize = 4;

/// An instruction set.
///
/// The 16 lanes are `PARTS` vectors. No operation crosses lanes, except the sum at the end.
pub(crate) trait Isa: Copy + Send + Sync + 'static {
    /// `16 / PARTS` f32 lanes.
    type Vector: Copy;
    /// `64 / PARTS` bytes of codes.
    type Raw: Copy;
    /// Vectors that make up the 16 lanes.
    const PARTS: usize;
    /// Rows of `x` of a tile whose sums stay in registers.
    const TILE_TOKENS: usize;
    /// Up to this many rows of `x`, a code is decoded into a register and used from there.
    const FEW: usize;
    /// Attention heads whose sums against four keys stay in registers.
    const HEADS: usize;

    fn zero(self) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn splat(self, value: f32) -> Self::Vector;
    fn load(self, lanes: &Lanes, part: usize) -> Self::Vector;
    fn store(self, value: Self::Vector, lanes: &mut Lanes, part: usize);
    /// As `load`, from values that are aligned to nothing.
    fn read(self, values: &[f32; LANES], part: usize) -> Self::Vector;
    /// As `store`, to values that are aligned to nothing.
    fn write(self, value: Self::Vector, values: &mut [f32; LANES], part: usize);
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;

    /// A dword for each lane: lane `i` has bytes `4 i..4 i + 4`.
    fn dwords(self, codes: &[u8; RAW_BYTES], part: usize) -> Self::Raw;
    /// Two words for each lane: lane `i` has bytes `2 i..2 i + 2` of either half.
    fn words(self, codes: &[u8; RAW_BYTES], part: usize) -> Self::Raw;
    /// Of dwords, the value of nibble `step`.
    fn e2m1(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// Of words, 1/256 of the value of byte `step % 2` in half `step / 2`; the NaN codes read as
    /// ±480.
    fn e4m3_by_256(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// Of dwords, the value of bf16 half `step`.
    fn bf16(self, raw: Self::Raw, step: usize) -> Self::Vector;
    /// Of dwords, the f32 that each is.
    fn f32(self, raw: Self::Raw) -> Self::Vector;
    /// Lane `i` gets the E8M0 scale `i / 4`.
    fn group_scales(self, bytes: [u8; 4], part: usize) -> Self::Vector;

    /// The tree sum of the lanes of each accumulator.
    fn sum(self, acc: &[Lanes; GROUP]) -> [f32; GROUP];
    /// The same for the first `out.len()` of 16 accumulators; the others may be anything.
    #[inline(always)]
    fn sum_all(self, acc: &[Lanes; LANES], out: &mut [f32]) {
        for (acc, out) in acc.as_chunks::<GROUP>().0.iter().zip(out.chunks_mut(GROUP)) {
            out.copy_from_slice(&self.sum(acc)[..out.len()]);
        }
    }
    /// Lane `i` of step `s` becomes value `STRIDE * i + s` of each run of `16 * STRIDE` values.
    fn deinterleave<const STRIDE: usize>(self, values: &[f32; BLOCK], out: &mut Block);
    /// Asks for the cache line of `byte`, which will be read soon.
    fn prefetch(self, byte: *const u8);

    /// Runs a task in a function of its own, compiled for these instructions. (Inlined into a large
    /// one, tasks get worse code: the compiler moves their constants into registers they need.)
    fn enter<T: Task>(self, task: T);
}

/// Work written once for all instruction sets. Implementations are `#[inline(always)]`, so that
/// they are compiled inside [`Isa::enter`].
pub(crate) trait Task {
    fn run<I: Isa>(self, isa: I);
}

/// An instruction set this machine has.
#[derive(Debug, Clone, Copy)]
pub struct Level(Kind);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Level {
    /// Every set this machine has, the fastest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx512::detect().map(|isa| Self(Kind::Avx512(isa))));
            levels.extend(Avx2::detect().map(|isa| Self(Kind::Avx2(isa))));
        }
        levels.push(Self::portable());
        levels
    }

    /// Plain Rust, which every machine has.
    #[must_use]
    pub fn portable() -> Self {
        Self(Kind::Portable(Portable))
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
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }

    pub(crate) fn run(self, task: impl Task) {
        match self.0 {
            Kind::Portable(isa) => isa.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(isa) => isa.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(isa) => isa.enter(task),
        }
    }
}
