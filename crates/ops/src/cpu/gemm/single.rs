//! The product of a single row of `x` and short weight rows, as small models decode: what a row costs
//! besides its blocks counts, so nothing is cut into chunks or kept between strips.

use std::marker::PhantomData;
use std::ops::Range;
use std::slice;

use super::format::Format;
use super::kernel::{AHEAD_BYTES, Product, Rows, STRIP};
use super::linear::CpuLinear;
use crate::cpu::isa::{Block, GROUP, Isa, Lanes, Task};

/// The product of `args.rows` and the row `x` of token `token`.
#[inline(always)]
pub(super) fn single<I: Isa, F: Format>(isa: I, args: &mut Product<'_>, x: &[Block], token: usize) {
    let (linear, rows) = (args.linear, args.rows.clone());
    let out = args.out.run(token, rows.clone());
    isa.enter(Single::<F> { linear, rows, x, out, format: PhantomData });
}

struct Single<'a, F> {
    linear: &'a CpuLinear,
    rows: Range<usize>,
    x: &'a [Block],
    /// One for each of `rows`.
    out: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Task for Single<'_, F> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { linear, rows, x, out, .. } = self;
        let mut sums = [Lanes::ZERO; STRIP];
        for (strip, out) in rows.step_by(STRIP).zip(out.chunks_mut(STRIP)) {
            let (groups, rest) = sums[..out.len()].as_chunks_mut::<GROUP>();
            let mut row = strip;
            for sums in groups {
                add_rows::<I, F, GROUP>(isa, linear, x, row, sums);
                row += GROUP;
            }
            for sums in rest {
                add_rows::<I, F, 1>(
                    isa,
                    linear,
                    x,
                    row,
                    slice::from_mut(sums).try_into().expect("one"),
                );
                row += 1;
            }
            isa.sum_all(&sums, out);
        }
    }
}

/// Weight rows `row..row + N` against `x`: all sums stay in registers until their last block.
#[inline(always)]
fn add_rows<I: Isa, F: Format, const N: usize>(
    isa: I,
    linear: &CpuLinear,
    x: &[Block],
    row: usize,
    out: &mut [Lanes; N],
) {
    let ahead = AHEAD_BYTES.max(N * linear.stride());
    let rows = Rows::<F, N>::of(linear, row);
    let (x, _) = x.as_chunks::<1>();
    for part in 0..I::PARTS {
        let mut sums = [[isa.zero(); 1]; N];
        rows.add(isa, part, ahead, 0..x.len(), x, &mut sums);
        for (sum, out) in sums.iter().zip(&mut *out) {
            isa.store(sum[0], out, part);
        }
    }
}
