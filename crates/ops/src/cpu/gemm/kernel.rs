//! The two products: few rows of `x` against codes decoded on the way, and many rows of `x`
//! against panels of decoded blocks.
//!
//! Loops over arrays of registers are written with indices: a closure may be compiled outside the
//! function that has the instructions enabled, and then costs a call per instruction.

use std::marker::PhantomData;
use std::ops::Range;

use super::format::{Bf16, F32, Format, Fp4, Fp8};
use super::isa::{Block, GROUP, Isa, LANES, Lanes, RAW_BYTES, STEPS, Task};
use super::linear::{CpuLinear, RowCodes, Stored};
use super::portable::Portable;
use super::run::Output;

const fn opt(o: Option<&'static str>, d: usize) -> usize {
    match o {
        Some(x) => {
            let b = x.as_bytes();
            let mut i = 0;
            let mut n = 0;
            while i < b.len() {
                n = n * 10 + (b[i] - 48) as usize;
                i += 1
            }
            n
        }
        None => d,
    }
}
/// Weight rows of a strip. They are decoded together for many rows of `x`.
pub(super) const STRIP: usize = opt(option_env!("PR"), 8);
/// Rows of `x` that share a decoded strip.
pub(super) const PANEL_TOKENS: usize = opt(option_env!("PT"), 24);
/// Blocks of `x` that go through a strip before the next ones do: 16 KiB of the L1 cache.
const CHUNK_BLOCKS: usize = opt(option_env!("CB"), 32);
/// How far ahead of a row's decoding its codes are asked for: memory answers late, and streams of
/// a few kilobytes end before the CPU's own prefetcher has seen them.
const AHEAD_BYTES: usize = opt(option_env!("PF"), 8192);
/// The same for panels, in blocks.
const AHEAD_BLOCKS: usize = opt(option_env!("PA"), 4);

/// Memory of one thread for [`Product`].
#[derive(Debug)]
pub(super) struct Scratch {
    acc: Vec<[Lanes; GROUP]>,
    panel: Vec<Block>,
}

impl Scratch {
    pub(super) const NEW: Self = Self { acc: Vec::new(), panel: Vec::new() };
}

impl Default for Scratch {
    fn default() -> Self {
        Self::NEW
    }
}

/// A rectangle of one product.
pub(super) struct Product<'a> {
    pub(super) linear: &'a CpuLinear,
    /// `[blocks, n_tokens]`.
    pub(super) x: &'a [Block],
    pub(super) n_tokens: usize,
    pub(super) rows: Range<usize>,
    pub(super) tokens: Range<usize>,
    pub(super) out: &'a Output<'a>,
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
fn product<I: Isa, F: Format>(isa: I, args: Product<'_>) {
    match args.tokens.len() {
        // One row after the other: the codes are one stream.
        1 => few::<I, F, 1, 1>(isa, args),
        2 if I::FEW >= 2 => few::<I, F, 4, 2>(isa, args),
        3 if I::FEW >= 3 => few::<I, F, 4, 3>(isa, args),
        4 if I::FEW >= 4 => few::<I, F, 2, 4>(isa, args),
        5 if I::FEW >= 5 => few::<I, F, 2, 5>(isa, args),
        6 if I::FEW >= 6 => few::<I, F, 2, 6>(isa, args),
        _ => many::<I, F>(isa, args),
    }
}

/// The `M` rows of `x` against strips of weight rows, `R` of them at a time, a chunk of columns
/// after the other, so that `x` comes from the L1 cache.
#[inline(always)]
fn few<I: Isa, F: Format, const R: usize, const M: usize>(isa: I, args: Product<'_>) {
    let Product { linear, n_tokens, rows, tokens, out, scratch, .. } = args;
    let (n_blocks, stride) = (linear.n_blocks(), linear.stride());
    let block_bytes = F::RAWS * RAW_BYTES;
    let chunk = (CHUNK_BLOCKS / M.next_power_of_two()).min(n_blocks);
    scratch.acc.resize(PANEL_TOKENS * STRIP / GROUP, [Lanes::ZERO; GROUP]);
    for strip in rows.clone().step_by(STRIP) {
        let end = rows.end.min(strip + STRIP);
        let acc = &mut scratch.acc[..(end - strip).div_ceil(GROUP) * M];
        acc.fill([Lanes::ZERO; GROUP]);
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
            let x = &args.x[first * n_tokens + tokens.start..blocks.end * n_tokens];
            for (group, acc) in (strip..end).step_by(GROUP).zip(acc.chunks_exact_mut(M)) {
                let acc: &mut [_; M] = acc.try_into().expect("chunks of M were taken");
                let n_rows = GROUP.min(end - group);
                let mut r = 0;
                while r + R <= n_rows {
                    let (blocks, row) = (blocks.clone(), group + r);
                    let format = PhantomData::<F>;
                    let chunk: Chunk<'_, F, R, M> =
                        Chunk { linear, row, blocks, x, n_tokens, ahead, acc, first: r, format };
                    isa.enter(chunk);
                    r += R;
                }
                while r < n_rows {
                    let (blocks, row) = (blocks.clone(), group + r);
                    let format = PhantomData::<F>;
                    let chunk: Chunk<'_, F, 1, M> =
                        Chunk { linear, row, blocks, x, n_tokens, ahead, acc, first: r, format };
                    isa.enter(chunk);
                    r += 1;
                }
            }
        }
        for (group, acc) in (strip..end).step_by(GROUP).zip(acc.chunks_exact(M)) {
            for (token, acc) in tokens.clone().zip(acc) {
                out.write(token, group, GROUP.min(end - group), isa.sum(acc));
            }
        }
    }
}

/// Some blocks of weight rows, `x`, and what both add up to.
struct Chunk<'a, F, const R: usize, const M: usize> {
    linear: &'a CpuLinear,
    row: usize,
    blocks: Range<usize>,
    /// `[blocks, n_tokens]`, beginning with the token wanted.
    x: &'a [Block],
    n_tokens: usize,
    /// Codes this many bytes further will be needed next.
    ahead: usize,
    acc: &'a mut [[Lanes; GROUP]; M],
    /// Where the rows begin in the groups of `acc`.
    first: usize,
    format: PhantomData<F>,
}

impl<F: Format, const R: usize, const M: usize> Task for Chunk<'_, F, R, M> {
    /// All sums stay in registers.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { linear, row, first, acc, .. } = self;
        let mut codes = [linear.row_codes(row); R];
        let mut scales = [F::scales(linear, row); R];
        for r in 1..R {
            codes[r] = linear.row_codes(row + r);
            scales[r] = F::scales(linear, row + r);
        }
        for part in 0..I::PARTS {
            let mut sums = [[isa.zero(); M]; R];
            for r in 0..R {
                for m in 0..M {
                    sums[r][m] = isa.load(&acc[m][first + r], part);
                }
            }
            for (block, x) in self.blocks.clone().zip(self.x.chunks(self.n_tokens)) {
                let x: &[Block; M] = x.first_chunk().expect("M tokens are left");
                let mut partial = [[isa.zero(); M]; R];
                for q in 0..F::RAWS {
                    let mut raw = [F::load(isa, codes[0].raw(block, F::RAWS, q), part); R];
                    for r in 0..R {
                        let codes = codes[r].raw(block, F::RAWS, q);
                        raw[r] = F::load(isa, codes, part);
                        isa.prefetch(codes.as_ptr().wrapping_add(self.ahead));
                    }
                    for j in 0..F::RAW_STEPS {
                        let step = q * F::RAW_STEPS + j;
                        let mut w = [isa.zero(); R];
                        for r in 0..R {
                            w[r] = F::decode(isa, raw[r], j);
                        }
                        for m in 0..M {
                            let x = isa.load(&x[m].0[step], part);
                            for r in 0..R {
                                partial[r][m] = multiply_add(isa, step, w[r], x, partial[r][m]);
                            }
                        }
                    }
                }
                for r in 0..R {
                    let scale = F::scale(isa, scales[r], block, part);
                    for m in 0..M {
                        sums[r][m] = isa.fma(partial[r][m], scale, sums[r][m]);
                    }
                }
            }
            for r in 0..R {
                for m in 0..M {
                    isa.store(sums[r][m], &mut acc[m][first + r], part);
                }
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

/// Panels of `STRIP` decoded weight rows, one block at a time, against `PANEL_TOKENS` rows of `x`:
/// decoding is paid once per panel, and all that a tile touches is in the L1 cache.
#[inline(always)]
fn many<I: Isa, F: Format>(isa: I, args: Product<'_>) {
    let Product { linear, rows, out, scratch, .. } = args;
    let (n_blocks, stride) = (linear.n_blocks(), linear.stride());
    let block_bytes = F::RAWS * RAW_BYTES;
    scratch.acc.resize(PANEL_TOKENS * STRIP / GROUP, [Lanes::ZERO; GROUP]);
    scratch.panel.resize(STRIP, Block::ZERO);
    let mut panel_scales = [Lanes::ZERO; STRIP];
    for first_token in args.tokens.clone().step_by(PANEL_TOKENS) {
        let tokens = first_token..args.tokens.end.min(first_token + PANEL_TOKENS);
        for strip in rows.clone().step_by(STRIP) {
            let n_rows = STRIP.min(rows.end - strip);
            let mut codes = [linear.row_codes(strip); STRIP];
            let mut scales = [F::scales(linear, strip); STRIP];
            for r in 1..n_rows {
                codes[r] = linear.row_codes(strip + r);
                scales[r] = F::scales(linear, strip + r);
            }
            // A last group is whole: what it computes with the rows of the strip before is dropped.
            let acc = &mut scratch.acc[..n_rows.div_ceil(GROUP) * tokens.len()];
            acc.fill([Lanes::ZERO; GROUP]);
            for (block, x) in args.x.chunks_exact(args.n_tokens).enumerate() {
                // The codes of a later block, or of one of the next strip.
                let ahead = if block + AHEAD_BLOCKS < n_blocks {
                    AHEAD_BLOCKS * block_bytes
                } else {
                    let back = n_blocks - AHEAD_BLOCKS.min(n_blocks);
                    (STRIP * stride).wrapping_sub(back * block_bytes)
                };
                let (codes, scales) = (&codes[..n_rows], &scales[..n_rows]);
                let (values, row_scales) =
                    (&mut scratch.panel[..n_rows], &mut panel_scales[..n_rows]);
                isa.enter(Decode::<F> { codes, scales, block, ahead, values, row_scales });
                let x = &x[tokens.clone()];
                let (weights, _) = scratch.panel.as_chunks::<GROUP>();
                let (row_scales, _) = panel_scales.as_chunks::<GROUP>();
                let groups = weights.iter().zip(row_scales).zip(acc.chunks_exact_mut(tokens.len()));
                for (group, acc) in groups {
                    let tiles = x.chunks(I::TILE_TOKENS).zip(acc.chunks_mut(I::TILE_TOKENS));
                    for (x, acc) in tiles {
                        tile(isa, group, x, acc);
                    }
                }
            }
            for (group, acc) in acc.chunks_exact(tokens.len()).enumerate() {
                let first = group * GROUP;
                for (token, acc) in tokens.clone().zip(acc) {
                    out.write(token, strip + first, GROUP.min(n_rows - first), isa.sum(acc));
                }
            }
        }
    }
}

/// One block of some weight rows to be decoded.
struct Decode<'w, 'a, F: Format> {
    codes: &'a [RowCodes<'w>],
    scales: &'a [F::Scales<'w>],
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
            for part in 0..I::PARTS {
                for q in 0..F::RAWS {
                    let codes = codes.raw(self.block, F::RAWS, q);
                    isa.prefetch(codes.as_ptr().wrapping_add(self.ahead));
                    let raw = F::load(isa, codes, part);
                    for j in 0..F::RAW_STEPS {
                        let lanes = &mut values.0[q * F::RAW_STEPS + j];
                        isa.store(F::decode(isa, raw, j), lanes, part);
                    }
                }
                isa.store(F::scale(isa, scales, self.block, part), scale, part);
            }
        }
    }
}

/// One block of a group of weight rows against `M` rows of `x`.
pub(super) struct Tile<'a, const M: usize> {
    /// A decoded block of each weight row.
    weights: &'a [Block; GROUP],
    /// The scale of each weight row.
    scales: &'a [Lanes; GROUP],
    x: &'a [Block; M],
    /// For each row of `x`, the lanes of each weight row.
    acc: &'a mut [[Lanes; GROUP]; M],
}

impl<const M: usize> Task for Tile<'_, M> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { weights, scales, x, acc } = self;
        for part in 0..I::PARTS {
            let mut partial = [[isa.zero(); GROUP]; M];
            for step in 0..STEPS {
                let mut w = [isa.zero(); GROUP];
                for r in 0..GROUP {
                    w[r] = isa.load(&weights[r].0[step], part);
                }
                for m in 0..M {
                    let x = isa.load(&x[m].0[step], part);
                    for r in 0..GROUP {
                        partial[m][r] = multiply_add(isa, step, w[r], x, partial[m][r]);
                    }
                }
            }
            for m in 0..M {
                for r in 0..GROUP {
                    let scale = isa.load(&scales[r], part);
                    let sum = isa.load(&acc[m][r], part);
                    isa.store(isa.fma(partial[m][r], scale, sum), &mut acc[m][r], part);
                }
            }
        }
    }
}

/// A tile of as many rows of `x` as there are, up to [`Isa::TILE_TOKENS`].
#[inline(always)]
fn tile<I: Isa>(
    isa: I,
    (weights, scales): (&[Block; GROUP], &[Lanes; GROUP]),
    x: &[Block],
    acc: &mut [[Lanes; GROUP]],
) {
    macro_rules! tile_of {
        ($m:literal) => {{
            let x: &[Block; $m] = x.try_into().expect("the arm matches the length");
            let acc: &mut [[Lanes; GROUP]; $m] = acc.try_into().expect("as long as x");
            isa.enter(Tile { weights, scales, x, acc })
        }};
    }
    match x.len() {
        6 if I::TILE_TOKENS >= 6 => tile_of!(6),
        5 if I::TILE_TOKENS >= 5 => tile_of!(5),
        4 if I::TILE_TOKENS >= 4 => tile_of!(4),
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
    let (codes, scales) = (linear.row_codes(row), F::scales(linear, row));
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
