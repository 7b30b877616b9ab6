//! Every wrapper of `kernels/include` by itself: the PTX bodies on a GPU, the host bodies in the block
//! emulator, both against what the wrapper is meant to do, which is written down here once more. Where a
//! GPU passes, so is proven what the emulator takes the GPU for.
//!
//! - `scalar`: arithmetic, functions, bytes, bf16 pairs;
//! - `warp`: shuffles, barriers, atomics, small copies, matrix loads, products of a warp;
//! - `hopper`: barriers in shared memory, bulk copies, clusters; `wgmma`: products of a warpgroup;
//! - `blackwell`: tensor memory and block-scaled products; `blackwell_bf16`: its products of bf16 values.
//!
//! Inputs of exact products are small integers, so that the sums are the same in any order and in every
//! accumulator, or rows of one value only, so that every code is multiplied by every other.
//!
//! Not here: tensor copies (`copies`), conversions in integers (`formats`), the launch that waits for the
//! one before it (`overlap`).

mod blackwell;
mod blackwell_bf16;
mod hopper;
mod scalar;
mod warp;
mod wgmma;

use super::Report;
use crate::OpError;
use crate::cuda::device::Arg;
use crate::cuda::ops::Call;

/// All wrappers that the device's architecture has.
pub(super) fn wrappers(report: &mut Report<'_>) -> Result<(), OpError> {
    scalar::arithmetic(report)?;
    scalar::functions(report)?;
    scalar::double(report)?;
    warp::exchanges(report)?;
    warp::barriers(report)?;
    warp::atomics(report)?;
    warp::last_block(report)?;
    warp::copies(report)?;
    warp::matrix_loads(report)?;
    warp::products(report)?;
    let arch = report.ops.memory().device().arch();
    if matches!(arch, "sm_90a" | "sm_100f") {
        hopper::pipeline(report)?;
        hopper::clusters(report)?;
        hopper::threads(report)?;
        hopper::codes(report)?;
    }
    match arch {
        "sm_90a" => wgmma::products(report),
        "sm_100f" => {
            blackwell::products(report)?;
            blackwell_bf16::products(report)
        }
        _ => Ok(()),
    }
}

/// A launch of a check kernel.
#[derive(Clone, Copy)]
struct Check {
    kernel: &'static str,
    blocks: usize,
    threads: u32,
    shared_bytes: u32,
}

impl Check {
    /// `n` threads in blocks of 128, without shared memory.
    const fn over(kernel: &'static str, n: usize) -> Self {
        Self { kernel, blocks: n / 128, threads: 128, shared_bytes: 0 }
    }

    /// Launches the kernel over `input`; the `n_out` words it is given for results, all ones before.
    ///
    /// # Safety
    /// The kernel reads nothing behind `input` and writes nothing behind `n_out` words.
    unsafe fn run(
        self,
        report: &Report<'_>,
        input: &[u32],
        n_out: usize,
    ) -> Result<Vec<u32>, OpError> {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.run_from(report, input, &vec![u32::MAX; n_out]) }
    }

    /// The same where the words are `before` at first.
    ///
    /// # Safety
    /// As [`Self::run`].
    unsafe fn run_from(
        self,
        report: &Report<'_>,
        input: &[u32],
        before: &[u32],
    ) -> Result<Vec<u32>, OpError> {
        let ops = report.ops;
        let bytes_of =
            |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let (input, out) = (ops.uploaded(&bytes_of(input))?, ops.uploaded(&bytes_of(before))?);
        // SAFETY: the caller's promise.
        unsafe {
            ops.launch(Call {
                kernel: self.kernel,
                grid: [self.blocks, 1, 1],
                threads: self.threads,
                shared_bytes: self.shared_bytes,
                args: &[Arg::from(&input), Arg::from(&out)],
            })?;
        }
        let words = out.read(0, 4 * before.len())?;
        Ok(words
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect())
    }
}

/// `n` random words.
fn words(report: &mut Report<'_>, n: usize) -> Vec<u32> {
    (0..n).map(|_| report.random.bits()).collect()
}

/// A random integer from `-limit` to `limit`.
fn integer(report: &mut Report<'_>, limit: usize) -> f32 {
    report.random.below(2 * limit + 1) as f32 - limit as f32
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}

/// The bits of a bf16 that holds `x` exactly.
const fn bf16_bits(x: f32) -> u32 {
    x.to_bits() >> 16
}

/// Place of a byte of a matrix in shared memory with the 128-byte swizzle: of its 16-byte pieces, each
/// is exchanged by the number of the 128 bytes it lies in.
const fn swizzled(at: usize) -> usize {
    at ^ (at / 128 % 8 * 16)
}

/// Words of the bytes of a matrix.
fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect()
}
