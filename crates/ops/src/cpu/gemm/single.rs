//! The product of a single row of `x` and short weight rows, as small models decode: what a row costs
//! besides its blocks counts, so nothing is cut into chunks or kept between strips.

use std::marker::PhantomData;
use std::ops::Range;
use std::slice;

use super::format::Format;
use super::kernel::{AHEAD_BYTES, Product, STRIP, add_blocks};
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
    let mut codes = [linear.row_codes::<F>(row); N];
    let mut scales = [F::scales(linear, row); N];
    for r in 1..N {
        codes[r] = linear.row_codes(row + r);
        scales[r] = F::scales(linear, row + r);
    }
    let n_whole = codes[0].whole.len();
    let (whole, rest) = x.as_chunks::<1>().0.split_at(n_whole);
    for part in 0..I::PARTS {
        let mut sums = [[isa.zero(); 1]; N];
        let (mut run, mut run_scales) = ([codes[0].whole; N], [&scales[0][..0]; N]);
        for r in 0..N {
            run[r] = codes[r].whole;
            run_scales[r] = &scales[r][..n_whole];
        }
        add_blocks::<I, F, N, 1>(isa, part, ahead, run, run_scales, whole, &mut sums);
        if !rest.is_empty() {
            for r in 0..N {
                run[r] = codes[r].padded.map_or(&[][..], slice::from_ref);
                run_scales[r] = &scales[r][n_whole..];
            }
            add_blocks::<I, F, N, 1>(isa, part, ahead, run, run_scales, rest, &mut sums);
        }
        for r in 0..N {
            isa.store(sums[r][0], &mut out[r], part);
        }
    }
}
