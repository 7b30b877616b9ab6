//! Matrix products of the CPU backend: `out = x W^T`, weights decoded in registers.
//!
//! For every (row of `x`, row of `W`) the arithmetic has one fixed order, whatever the number of
//! rows of `x`, the tiling, the threads and the instruction set. Per block of 128 columns, 16 lanes
//! start at zero and take 8 fused multiply-adds each, `part[lane] = fma(w, x, part[lane])`; then
//! `acc[lane] = fma(part[lane], scale, acc[lane])`, blocks ascending. At the end the lanes are
//! added as a tree: `i` and `i + 8`, then `i` and `i + 4`, `i + 2`, `i + 1`.
//!
//! Which column a lane takes at a step is a matter of the format ([`format`]): the one that makes
//! decoding 16 codes cheapest. `x` is put into that order once per product ([`pack`]).
//!
//! - [`linear`]: a matrix of the checkpoint, its bytes where they are; [`format`]: its four formats;
//! - [`kernel`]: products of few rows of `x` (memory bound) and of many (compute bound), written
//!   once over [`super::isa`], which has three sets of instructions: `avx512`, `avx2`, `portable`;
//! - [`single`]: a single row of `x` and short weight rows;
//! - [`run`]: several products at once, divided among threads;
//! - [`probe`]: the machine's limits, for benches.
//!
//! Not here: activation quantisation, rounding of the output (the operators' business).

mod format;
mod kernel;
mod linear;
mod output;
mod pack;
pub mod probe;
mod run;
mod single;
#[cfg(test)]
mod tests;

pub use super::isa::Level;
pub use linear::CpuLinear;
pub use run::{Job, run, run_at};

/// The instruction set that products use on this machine: `avx512`, `avx2` or `portable`.
#[must_use]
pub fn isa() -> &'static str {
    Level::best().name()
}
