//! The two products: few rows of `x` against codes decoded on the way, and panels of many rows of
//! `x` against strips of decoded weight rows.
//!
//! Loops over arrays of registers are written with indices: a closure may be compiled outside the
//! function that has the instructions enabled, and then costs a call per instruction.

#![expect(clippy::needless_range_loop, reason = "see above: indices, not closures")]

use std::marker::PhantomData;
use std::ops::Range;
use std::slice;

use super::format::{Bf16, F32, Format, Fp4, Fp8};
use super::linear::{CpuLinear, RowCodes, Stored};
use super::output::Rectangle;
use super::single::single;
use crate::cpu::isa::Portable;
use crate::cpu::isa::{Block, GROUP, Isa, LANES, Lanes, RAW_BYTES, STEPS, Task};

/// Weight rows of a strip. They are decoded together for many rows of `x`, whose sums for them are a
/// cache line.
pub(super) const STRIP: usize = LANES;
/// Rows of `x` of a panel: with some blocks of a strip they fit the L1 cache.
pub(super) const PANEL_TOKENS: usize = 12;
/// Blocks of weight rows that a single row of `x` meets in one go.
const SHORT_BLOCKS: usize = 8;
/// Blocks that go through a tile before the next tile's do.
const TILE_BLOCKS: usize = 2;
/// Blocks of `x` that share a decoded strip: 512 KiB of the L2 cache.
const SHARED_BLOCKS: usize = 1024;
/// Blocks of `x` that go through a strip before the next ones do: 16 KiB of the L1 cache.
const CHUNK_BLOCKS: usize = 32;
/// How far ahead of a row's decoding its codes are asked for: memory answers late, and streams of
/// a few kilobytes end before the CPU's own prefetcher has seen them.
pub(super) const AHEAD_BYTES: usize = 8192;
/// The same for strips, in blocks.
const AHEAD_BLOCKS: usize = 4;

/// Memory of one thread for [`Product`].
#[derive(Debug)]
pub(super) struct Scratch {
    /// Of few rows of `x`: for each group of weight rows and each row of `x`, the lanes.
    groups: Vec<[Lanes; GROUP]>,
    /// Of many: for each row of `x`, the lanes of each weight row of a strip.
    sums: Vec<[Lanes; STRIP]>,
    /// A decoded strip: for each block, that of each row.
    weights: Vec<[Block; STRIP]>,
    scales: Vec<[Lanes; STRIP]>,
}

impl Scratch {
    pub(super) const NEW: Self =
        Self { groups: Vec::new(), sums: Vec::new(), weights: Vec::new(), scales: Vec::new() };
}

impl Default for Scratch {
    fn default() -> Self {
        Self::NEW
    }
}

/// A rectangle of one product.
pub(super) struct Product<'a> {
    pub(super) linear: &'a CpuLinear,
    /// All of `x` in panels of `panel_tokens` rows (the last may have fewer), each packed.
    pub(super) x: &'a [Block],
    pub(super) panel_tokens: usize,
    pub(super) rows: Range<usize>,
    /// Begins with a panel.
    pub(super) tokens: Range<usize>,
    pub(super) out: Rectangle<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl Task for Product<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match &self.linear.stored {
            Stored::Fp4 { .. } => product::<I, Fp4>(isa, self),
            Stored::Fp8 { .. } => product::<I, Fp8>(isa, self),
            Stored::Bf16 => product::<I, Bf16>(isa, self),
            Stored::F32 => product::<I, F32>(isa, self),
        }
    }
}

#[inline(always)]
fn product<I: Isa, F: Format>(isa: I, mut args: Product<'_>) {
    let n_blocks = args.linear.n_blocks();
    // As many panels as the L2 cache holds share each decoded strip.
    let panels = (SHARED_BLOCKS / (args.panel_tokens * n_blocks)).max(1);
    for first in args.tokens.clone().step_by(panels * args.panel_tokens) {
        let tokens = first..args.tokens.end.min(first + panels * args.panel_tokens);
        let x = &args.x[first * n_blocks..tokens.end * n_blocks];
        match tokens.len() {
            1 if n_blocks <= SHORT_BLOCKS => single::<I, F>(isa, &mut args, x, first),
            // One weight row after the other: the codes are one stream.
            1 => few::<I, F, 1, 1>(isa, &mut args, x, first),
            // More at once, so that loads of x are shared: as many as registers hold.
            2 if I::FEW >= 7 => few::<I, F, 4, 2>(isa, &mut args, x, first),
            2 if I::FEW >= 2 => few::<I, F, 2, 2>(isa, &mut args, x, first),
            3 if I::FEW >= 3 => few::<I, F, 4, 3>(isa, &mut args, x, first),
            4 if I::FEW >= 4 => few::<I, F, 2, 4>(isa, &mut args, x, first),
            5 if I::FEW >= 5 => few::<I, F, 2, 5>(isa, &mut args, x, first),
            6 if I::FEW >= 6 => few::<I, F, 2, 6>(isa, &mut args, x, first),
            7 if I::FEW >= 7 => few::<I, F, 2, 7>(isa, &mut args, x, first),
            _ => many::<I, F>(isa, &mut args, x, tokens),
        }
    }
}

/// The `M` rows of `x` against strips of weight rows, `R` of them at a time, a chunk of columns
/// after the other, so that `x` comes from the L1 cache.
#[inline(always)]
fn few<I: Isa, F: Format, const R: usize, const M: usize>(
    isa: I,
    args: &mut Product<'_>,
    x: &[Block],
    first_token: usize,
) {
    let Product { linear, rows, out, scratch, .. } = args;
    let (x, _) = x.as_chunks::<M>();
    let (n_blocks, stride) = (linear.n_blocks(), linear.stride());
    let block_bytes = F::RAWS * RAW_BYTES;
    let chunk = (CHUNK_BLOCKS / M.next_power_of_two()).min(n_blocks);
    scratch.groups.resize(M * STRIP / GROUP, [Lanes::ZERO; GROUP]);
    for strip in rows.clone().step_by(STRIP) {
        let end = rows.end.min(strip + STRIP);
        let (acc, _) = scratch.groups.as_chunks_mut::<M>();
        let acc = &mut acc[..(end - strip).div_ceil(GROUP)];
        acc.fill([[Lanes::ZERO; GROUP]; M]);
        for first in (0..n_blocks).step_by(chunk) {
            let blocks = first..n_blocks.min(first + chunk);
            // The same place in the next chunk, or in the first chunk of the next strip.
            let ahead = if chunk == n_blocks {
                AHEAD_BYTES.max(R * stride)
            } else if blocks.end < n_blocks {
                chunk * block_bytes
            } else {
                (STRIP * stride).wrapping_sub(first * block_bytes)
            };
            let (x, format) = (&x[blocks.clone()], PhantomData);
            let rows = strip..end;
            let chunk: Chunk<'_, F, R, M> = Chunk { linear, rows, blocks, x, ahead, acc, format };
            isa.enter(chunk);
        }
        for (group, acc) in (strip..end).step_by(GROUP).zip(acc) {
            for (token, acc) in (first_token..).zip(acc) {
                out.write(token, group, GROUP.min(end - group), isa.sum(acc));
            }
        }
    }
}

/// Some blocks of the weight rows of a strip against `M` rows of `x`, `R` weight rows at a time.
struct Chunk<'a, F, const R: usize, const M: usize> {
    linear: &'a CpuLinear,
    rows: Range<usize>,
    blocks: Range<usize>,
    x: &'a [[Block; M]],
    /// Codes this many bytes further will be needed next.
    ahead: usize,
    /// The lanes of each group of rows, for each row of `x`.
    acc: &'a mut [[[Lanes; GROUP]; M]],
    format: PhantomData<F>,
}

impl<F: Format, const R: usize, const M: usize> Task for Chunk<'_, F, R, M> {
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let mut row = self.rows.start;
        while row + R <= self.rows.end {
            self.add_rows::<I, R>(isa, row);
            row += R;
        }
        while row < self.rows.end {
            self.add_rows::<I, 1>(isa, row);
            row += 1;
        }
    }
}

impl<F: Format, const R: usize, const M: usize> Chunk<'_, F, R, M> {
    /// Weight rows `row..row + N`: all sums stay in registers.
    #[inline(always)]
    fn add_rows<I: Isa, const N: usize>(&mut self, isa: I, row: usize) {
        let rows = Rows::<F, N>::of(self.linear, row);
        let (group, first) = ((row - self.rows.start) / GROUP, (row - self.rows.start) % GROUP);
        for part in 0..I::PARTS {
            let mut sums = [[isa.zero(); M]; N];
            for r in 0..N {
                for m in 0..M {
                    sums[r][m] = isa.load(&self.acc[group][m][first + r], part);
                }
            }
            rows.add(isa, part, self.ahead, self.blocks.clone(), self.x, &mut sums);
            for r in 0..N {
                for m in 0..M {
                    isa.store(sums[r][m], &mut self.acc[group][m][first + r], part);
                }
            }
        }
    }
}

/// Neighbouring weight rows.
pub(super) struct Rows<'w, F: Format, const N: usize> {
    codes: [RowCodes<'w, F>; N],
    scales: [&'w [F::Scale]; N],
}

impl<'w, F: Format, const N: usize> Rows<'w, F, N> {
    /// Rows `row..row + N`.
    #[inline(always)]
    pub(super) fn of(linear: &'w CpuLinear, row: usize) -> Self {
        let mut codes = [linear.row_codes::<F>(row); N];
        let mut scales = [F::scales(linear, row); N];
        for r in 1..N {
            codes[r] = linear.row_codes(row + r);
            scales[r] = F::scales(linear, row + r);
        }
        Self { codes, scales }
    }

    /// Adds their `blocks` times those of `M` rows of `x` to `sums`; the last may be padded.
    #[inline(always)]
    pub(super) fn add<I: Isa, const M: usize>(
        &self,
        isa: I,
        part: usize,
        ahead: usize,
        blocks: Range<usize>,
        x: &[[Block; M]],
        sums: &mut [[I::Vector; M]; N],
    ) {
        let Self { codes, scales } = self;
        let whole = blocks.start..blocks.end.min(codes[0].whole.len());
        let (mut run, mut run_scales) = ([&codes[0].whole[..0]; N], [&scales[0][..0]; N]);
        for r in 0..N {
            run[r] = &codes[r].whole[whole.clone()];
            run_scales[r] = &scales[r][whole.clone()];
        }
        let (x, rest) = x.split_at(whole.len());
        add_blocks::<I, F, N, M>(isa, part, ahead, run, run_scales, x, sums);
        if !rest.is_empty() {
            for r in 0..N {
                run[r] = codes[r].padded.map_or(&[][..], slice::from_ref);
                run_scales[r] = &scales[r][whole.end..];
            }
            add_blocks::<I, F, N, M>(isa, part, ahead, run, run_scales, rest, sums);
        }
    }
}

/// Adds a run of blocks of `N` weight rows times `M` rows of `x` to `sums`. Codes `ahead` bytes further
/// will be needed next.
#[inline(always)]
fn add_blocks<I: Isa, F: Format, const N: usize, const M: usize>(
    isa: I,
    part: usize,
    ahead: usize,
    codes: [&[F::Codes]; N],
    scales: [&[F::Scale]; N],
    x: &[[Block; M]],
    sums: &mut [[I::Vector; M]; N],
) {
    for r in 0..N {
        assert!(codes[r].len() == x.len() && scales[r].len() == x.len(), "runs are equally long");
    }
    for (block, x) in x.iter().enumerate() {
        let mut partial = [[isa.zero(); M]; N];
        for q in 0..F::RAWS {
            let mut raw = [F::load(isa, &codes[0][block].as_ref()[q], part); N];
            for r in 0..N {
                let codes = &codes[r][block].as_ref()[q];
                raw[r] = F::load(isa, codes, part);
                isa.prefetch(codes.as_ptr().wrapping_add(ahead));
            }
            for j in 0..F::RAW_STEPS {
                let step = q * F::RAW_STEPS + j;
                let mut w = [isa.zero(); N];
                for r in 0..N {
                    w[r] = F::decode(isa, raw[r], j);
                }
                for m in 0..M {
                    let x = isa.load(&x[m].0[step], part);
                    for r in 0..N {
                        partial[r][m] = multiply_add(isa, step, w[r], x, partial[r][m]);
                    }
                }
            }
        }
        for r in 0..N {
            let scale = F::scale(isa, scales[r][block], part);
            for m in 0..M {
                sums[r][m] = isa.fma(partial[r][m], scale, sums[r][m]);
            }
        }
    }
}

/// Step `step` of a block: the first is a product, there is nothing to add it to.
#[inline(always)]
fn multiply_add<I: Isa>(
    isa: I,
    step: usize,
    weight: I::Vector,
    x: I::Vector,
    partial: I::Vector,
) -> I::Vector {
    if step == 0 { isa.mul(weight, x) } else { isa.fma(weight, x, partial) }
}

/// Strips of decoded weight rows against panels of `x`, some blocks at a time: decoding is paid once
/// for all panels, and what the tiles of a panel touch is in the L1 cache.
#[inline(always)]
fn many<I: Isa, F: Format>(isa: I, args: &mut Product<'_>, x: &[Block], tokens: Range<usize>) {
    let Product { linear, rows, out, scratch, panel_tokens, .. } = args;
    let n_blocks = linear.n_blocks();
    scratch.sums.resize(PANEL_TOKENS, [Lanes::ZERO; STRIP]);
    scratch.weights.resize(n_blocks, [Block::ZERO; STRIP]);
    scratch.scales.resize(n_blocks, [Lanes::ZERO; STRIP]);
    for strip in rows.clone().step_by(STRIP) {
        let n_rows = STRIP.min(rows.end - strip);
        decode_strip::<I, F>(isa, linear, strip..strip + n_rows, scratch);
        // A last group is whole: what it computes with the rows of the strip before is dropped.
        let n_groups = n_rows.div_ceil(GROUP);
        for first in tokens.clone().step_by(*panel_tokens) {
            let panel = first..tokens.end.min(first + *panel_tokens);
            let x = &x[(first - tokens.start) * n_blocks..(panel.end - tokens.start) * n_blocks];
            let sums = &mut scratch.sums[..panel.len()];
            for start in (0..n_blocks).step_by(TILE_BLOCKS) {
                let blocks = start..n_blocks.min(start + TILE_BLOCKS);
                let x = &x[start * panel.len()..blocks.end * panel.len()];
                let weights = &scratch.weights[blocks.clone()];
                let scales = &scratch.scales[blocks];
                for group in 0..n_groups {
                    let strip = Strip { weights, scales, row: group * GROUP, is_first: start == 0 };
                    let n_tokens = panel.len();
                    for (index, sums) in sums.chunks_mut(I::TILE_TOKENS).enumerate() {
                        let token = index * I::TILE_TOKENS;
                        tile(isa, &strip, Panel { x, n_tokens, token }, sums);
                    }
                }
            }
            for (token, sums) in panel.zip(sums) {
                isa.sum_all(sums, out.run(token, strip..strip + n_rows));
            }
        }
    }
}

/// Decodes the weight rows `rows`, at most a strip of them.
#[inline(always)]
fn decode_strip<I: Isa, F: Format>(
    isa: I,
    linear: &CpuLinear,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    let (n_rows, n_blocks) = (rows.len(), linear.n_blocks());
    let block_bytes = F::RAWS * RAW_BYTES;
    let mut codes = [linear.row_codes::<F>(rows.start); STRIP];
    let mut scales = [F::scales(linear, rows.start); STRIP];
    for r in 1..n_rows {
        codes[r] = linear.row_codes(rows.start + r);
        scales[r] = F::scales(linear, rows.start + r);
    }
    let decoded = scratch.weights.iter_mut().zip(&mut scratch.scales);
    for (block, (values, row_scales)) in decoded.enumerate() {
        // The codes of a later block, or of one of the next strip.
        let ahead = if block + AHEAD_BLOCKS < n_blocks {
            AHEAD_BLOCKS * block_bytes
        } else {
            let back = n_blocks - AHEAD_BLOCKS.min(n_blocks);
            (STRIP * linear.stride()).wrapping_sub(back * block_bytes)
        };
        isa.enter(Decode::<F> {
            codes: &codes[..n_rows],
            scales: &scales[..n_rows],
            block,
            ahead,
            values: &mut values[..n_rows],
            row_scales: &mut row_scales[..n_rows],
        });
    }
}

/// One block of some weight rows to be decoded.
struct Decode<'w, 'a, F: Format> {
    codes: &'a [RowCodes<'w, F>],
    scales: &'a [&'w [F::Scale]],
    block: usize,
    /// Codes this many bytes further will be needed soon.
    ahead: usize,
    /// The values of each row.
    values: &'a mut [Block],
    /// The scale of each row.
    row_scales: &'a mut [Lanes],
}

impl<F: Format> Task for Decode<'_, '_, F> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let rows = self.codes.iter().zip(self.scales);
        for ((&codes, &scales), (values, scale)) in
            rows.zip(self.values.iter_mut().zip(self.row_scales))
        {
            let Some(pieces) = codes.whole.get(self.block).or(codes.padded) else { continue };
            for part in 0..I::PARTS {
                for q in 0..F::RAWS {
                    let codes = &pieces.as_ref()[q];
                    isa.prefetch(codes.as_ptr().wrapping_add(self.ahead));
                    let raw = F::load(isa, codes, part);
                    for j in 0..F::RAW_STEPS {
                        let lanes = &mut values.0[q * F::RAW_STEPS + j];
                        isa.store(F::decode(isa, raw, j), lanes, part);
                    }
                }
                isa.store(F::scale(isa, scales[self.block], part), scale, part);
            }
        }
    }
}

/// Some blocks of a group of weight rows.
struct Strip<'a> {
    /// For each block, the decoded values of each row of the strip.
    weights: &'a [[Block; STRIP]],
    /// For each block, the scale of each row.
    scales: &'a [[Lanes; STRIP]],
    /// The group's first row in the strip.
    row: usize,
    /// Whether these are the first blocks of the rows.
    is_first: bool,
}

/// The same blocks of some rows of `x`.
struct Panel<'a> {
    /// For each block, that of each of `n_tokens` rows.
    x: &'a [Block],
    n_tokens: usize,
    /// The first row that is wanted.
    token: usize,
}

/// A group of weight rows against `M` rows of `x`: for some blocks, sums stay in registers.
struct Tile<'a, const M: usize> {
    strip: &'a Strip<'a>,
    panel: Panel<'a>,
    /// For each row of `x`, the lanes of each weight row of the strip.
    acc: &'a mut [[Lanes; STRIP]; M],
}

impl<const M: usize> Task for Tile<'_, M> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { strip: &Strip { weights, scales, row, is_first }, panel, acc } = self;
        assert!(row <= STRIP - GROUP, "a group is in the strip");
        for part in 0..I::PARTS {
            let mut sums = [[isa.zero(); GROUP]; M];
            if !is_first {
                for m in 0..M {
                    for r in 0..GROUP {
                        sums[m][r] = isa.load(&acc[m][row + r], part);
                    }
                }
            }
            let panels = panel.x.chunks_exact(panel.n_tokens);
            for ((weights, scales), x) in weights.iter().zip(scales).zip(panels) {
                let Some(x) = x[panel.token..].first_chunk::<M>() else { return };
                let Some(weights) = weights[row..].first_chunk::<GROUP>() else { return };
                let Some(scales) = scales[row..].first_chunk::<GROUP>() else { return };
                let mut partial = [[isa.zero(); GROUP]; M];
                for step in 0..STEPS {
                    // The M rows of x are held, weights pass one by one: with the sums,
                    // 2 * M * GROUP + M + 1 registers. (AVX2 has fewer: sums rest in memory
                    // between blocks.)
                    let mut rows = [isa.zero(); M];
                    for m in 0..M {
                        rows[m] = isa.load(&x[m].0[step], part);
                    }
                    for r in 0..GROUP {
                        let weight = isa.load(&weights[r].0[step], part);
                        for m in 0..M {
                            partial[m][r] = multiply_add(isa, step, weight, rows[m], partial[m][r]);
                        }
                    }
                }
                for r in 0..GROUP {
                    let scale = isa.load(&scales[r], part);
                    for m in 0..M {
                        sums[m][r] = isa.fma(partial[m][r], scale, sums[m][r]);
                    }
                }
            }
            for m in 0..M {
                for r in 0..GROUP {
                    isa.store(sums[m][r], &mut acc[m][row + r], part);
                }
            }
        }
    }
}

/// A tile of as many rows of `x` as `acc` has, up to [`Isa::TILE_TOKENS`].
#[inline(always)]
fn tile<I: Isa>(isa: I, strip: &Strip<'_>, panel: Panel<'_>, acc: &mut [[Lanes; STRIP]]) {
    macro_rules! tile_of {
        ($m:literal) => {{
            let acc: &mut [[Lanes; STRIP]; $m] =
                acc.try_into().expect("the arm matches the length");
            isa.enter(Tile { strip, panel, acc })
        }};
    }
    match acc.len() {
        3 if I::TILE_TOKENS >= 3 => tile_of!(3),
        2 if I::TILE_TOKENS >= 2 => tile_of!(2),
        _ => tile_of!(1),
    }
}

/// Body of [`CpuLinear::row`]: speed does not matter, so there is one version of it.
pub(super) fn dequantise_row(linear: &CpuLinear, row: usize, out: &mut [f32]) {
    match &linear.stored {
        Stored::Fp4 { .. } => dequantise::<Fp4>(linear, row, out),
        Stored::Fp8 { .. } => dequantise::<Fp8>(linear, row, out),
        Stored::Bf16 => dequantise::<Bf16>(linear, row, out),
        Stored::F32 => dequantise::<F32>(linear, row, out),
    }
}

fn dequantise<F: Format>(linear: &CpuLinear, row: usize, out: &mut [f32]) {
    assert!(row < linear.n_rows(), "row {row} of a matrix of {} rows", linear.n_rows());
    assert_eq!(out.len(), linear.n_cols(), "a row has one value for each column");
    let (codes, scales) = (linear.row_codes::<F>(row), F::scales(linear, row));
    for (block, out) in out.chunks_mut(STEPS * LANES).enumerate() {
        let (mut values, mut row_scales) = ([Block::ZERO], [Lanes::ZERO]);
        Decode::<F> {
            codes: &[codes],
            scales: &[scales],
            block,
            ahead: 0,
            values: &mut values,
            row_scales: &mut row_scales,
        }
        .run(Portable);
        for (column, out) in out.iter_mut().enumerate() {
            let (run, within) = (column / (LANES * F::STRIDE), column % (LANES * F::STRIDE));
            let (lane, step) = (within / F::STRIDE, run * F::STRIDE + within % F::STRIDE);
            *out = values[0].0[step].0[lane] * row_scales[0].0[lane];
        }
    }
}
