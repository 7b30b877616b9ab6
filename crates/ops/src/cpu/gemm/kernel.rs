//! The two products: few rows of `x` against codes decoded on the way, and many rows of `x`
//! against panels of decoded blocks.

use std::ops::Range;

use super::format::{Bf16, F32, Format, Fp4, Fp8};
use super::isa::{Block, Isa, LANES, Lanes, STEPS, Task, Tile};
use super::linear::{CpuLinear, RowCodes, Stored};
use super::run::Output;

/// Up to this many rows of `x` a code is decoded into a register and used from there.
pub(super) const FEW: usize = 4;
/// Weight rows of a panel: at 512 bytes a block, it stays in the L1 cache.
pub(super) const PANEL_ROWS: usize = 16;
/// Rows of `x` that share a panel.
pub(super) const PANEL_TOKENS: usize = 24;

/// Memory of one thread for [`Product`].
#[derive(Debug, Default)]
pub(super) struct Scratch {
    acc: Vec<Lanes>,
    panel: Vec<Block>,
    scales: Vec<Lanes>,
}

impl Scratch {
    pub(super) const NEW: Self = Self { acc: Vec::new(), panel: Vec::new(), scales: Vec::new() };
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
fn product<I: Isa, F: Format>(isa: I, mut args: Product<'_>) {
    match args.tokens.len() {
        1 => few_rows::<I, F, 4, 1>(isa, &args),
        2 => few_rows::<I, F, 4, 2>(isa, &args),
        3 => few_rows::<I, F, 2, 3>(isa, &args),
        4 => few_rows::<I, F, 2, 4>(isa, &args),
        _ => many::<I, F>(isa, &mut args),
    }
}

#[inline(always)]
fn few_rows<I: Isa, F: Format, const R: usize, const M: usize>(isa: I, args: &Product<'_>) {
    let mut row = args.rows.start;
    while row + R <= args.rows.end {
        few::<I, F, R, M>(isa, args, row);
        row += R;
    }
    while row < args.rows.end {
        few::<I, F, 1, M>(isa, args, row);
        row += 1;
    }
}

/// `R` weight rows from `row` against the `M` rows of `x`: all accumulators stay in registers.
#[inline(always)]
fn few<I: Isa, F: Format, const R: usize, const M: usize>(isa: I, args: &Product<'_>, row: usize) {
    let codes: [RowCodes<'_>; R] = std::array::from_fn(|r| args.linear.row_codes(row + r));
    let scales: [F::Scales<'_>; R] = std::array::from_fn(|r| F::scales(args.linear, row + r));
    let mut sums = [[Lanes::ZERO; R]; M];
    for part in 0..I::PARTS {
        let mut acc = [[isa.zero(); R]; M];
        let blocks = args.x.chunks_exact(args.n_tokens).enumerate();
        for (block, x) in blocks {
            let x: &[Block; M] = x[args.tokens.clone()].try_into().expect("M tokens were taken");
            let mut partial = [[isa.zero(); R]; M];
            let raws: [_; R] = std::array::from_fn(|r| codes[r].block(block, F::RAWS));
            for q in 0..F::RAWS {
                let raw: [_; R] = std::array::from_fn(|r| isa.raw(&raws[r][q], part));
                for j in 0..F::RAW_STEPS {
                    let weights: [_; R] = std::array::from_fn(|r| F::decode(isa, raw[r], j));
                    for m in 0..M {
                        let x = isa.load(&x[m].0[q * F::RAW_STEPS + j], part);
                        for r in 0..R {
                            partial[m][r] = isa.fma(weights[r], x, partial[m][r]);
                        }
                    }
                }
            }
            for r in 0..R {
                let scale = F::scale(isa, scales[r], block, part);
                for m in 0..M {
                    acc[m][r] = isa.fma(partial[m][r], scale, acc[m][r]);
                }
            }
        }
        for m in 0..M {
            for r in 0..R {
                isa.store(acc[m][r], &mut sums[m][r], part);
            }
        }
    }
    for m in 0..M {
        store_sums(isa, &sums[m], args.out, args.tokens.start + m, row);
    }
}

/// Adds the lanes of each accumulator and writes the sums of neighbouring rows of one token.
#[inline(always)]
fn store_sums<I: Isa>(isa: I, acc: &[Lanes], out: &Output<'_>, token: usize, row: usize) {
    for (row, acc) in (row..).step_by(4).zip(acc.chunks(4)) {
        let lanes: [&Lanes; 4] = std::array::from_fn(|i| acc.get(i).unwrap_or(&Lanes::ZERO));
        out.write(token, row, &isa.sum4(lanes)[..acc.len()]);
    }
}

/// Panels of `PANEL_ROWS` decoded weight rows, one block at a time, against `PANEL_TOKENS` rows of
/// `x`: decoding is paid once per panel, and both operands of the tiles come from the L1 cache.
#[inline(always)]
fn many<I: Isa, F: Format>(isa: I, args: &mut Product<'_>) {
    let Scratch { acc, panel, scales } = &mut *args.scratch;
    panel.resize(PANEL_ROWS, Block::ZERO);
    scales.resize(PANEL_ROWS, Lanes::ZERO);
    acc.resize(PANEL_ROWS * PANEL_TOKENS, Lanes::ZERO);
    let mut token = args.tokens.start;
    while token < args.tokens.end {
        let n_tokens = PANEL_TOKENS.min(args.tokens.end - token);
        let mut row = args.rows.start;
        while row < args.rows.end {
            let n_rows = PANEL_ROWS.min(args.rows.end - row);
            // Rows are padded to whole tiles; what the padding holds is never read.
            let padded_rows = n_rows.next_multiple_of(I::TILE_ROWS);
            let acc = &mut acc[..padded_rows * n_tokens];
            acc.fill(Lanes::ZERO);
            for (block, x) in args.x.chunks_exact(args.n_tokens).enumerate() {
                for r in 0..n_rows {
                    let (panel, scale) = (&mut panel[r], &mut scales[r]);
                    decode_block::<I, F>(isa, args.linear, row + r, block, panel, scale);
                }
                let x = &x[token..token + n_tokens];
                let groups = acc.chunks_exact_mut(I::TILE_ROWS * n_tokens);
                for (group, acc) in groups.enumerate() {
                    let rows = group * I::TILE_ROWS..(group + 1) * I::TILE_ROWS;
                    let (weights, scales) = (&panel[rows.clone()], &scales[rows]);
                    let tiles = x.chunks(I::TILE_TOKENS);
                    for (x, acc) in tiles.zip(acc.chunks_mut(I::TILE_TOKENS * I::TILE_ROWS)) {
                        isa.tile(Tile { weights, scales, x, acc });
                    }
                }
            }
            for (group, acc) in acc.chunks_exact(I::TILE_ROWS * n_tokens).enumerate() {
                let first = group * I::TILE_ROWS;
                let n = I::TILE_ROWS.min(n_rows - first);
                for (t, acc) in acc.chunks_exact(I::TILE_ROWS).enumerate() {
                    store_sums(isa, &acc[..n], args.out, token + t, row + first);
                }
            }
            row += n_rows;
        }
        token += n_tokens;
    }
}

/// One block of a row as f32, and its scale.
#[inline(always)]
fn decode_block<I: Isa, F: Format>(
    isa: I,
    linear: &CpuLinear,
    row: usize,
    block: usize,
    values: &mut Block,
    scale: &mut Lanes,
) {
    let raws = linear.row_codes(row).block(block, F::RAWS);
    let scales = F::scales(linear, row);
    for part in 0..I::PARTS {
        for q in 0..F::RAWS {
            let raw = isa.raw(&raws[q], part);
            for j in 0..F::RAW_STEPS {
                let lanes = &mut values.0[q * F::RAW_STEPS + j];
                isa.store(F::decode(isa, raw, j), lanes, part);
            }
        }
        isa.store(F::scale(isa, scales, block, part), scale, part);
    }
}

/// One block of `R` weight rows against `M` rows of `x`: the body of [`Isa::tile`].
#[inline(always)]
pub(super) fn tile<I: Isa, const R: usize, const M: usize>(isa: I, args: Tile<'_>) {
    let weights: &[Block; R] = args.weights.try_into().expect("a tile has R weight rows");
    let scales: &[Lanes; R] = args.scales.try_into().expect("a tile has R scales");
    let x: &[Block; M] = args.x.try_into().expect("a tile has M rows of x");
    let (acc, _) = args.acc.as_chunks_mut::<R>();
    let acc: &mut [[Lanes; R]; M] = acc.try_into().expect("a tile has M x R accumulators");
    for part in 0..I::PARTS {
        let mut partial = [[isa.zero(); R]; M];
        for step in 0..STEPS {
            let w: [_; R] = std::array::from_fn(|r| isa.load(&weights[r].0[step], part));
            for m in 0..M {
                let x = isa.load(&x[m].0[step], part);
                for r in 0..R {
                    partial[m][r] = isa.fma(w[r], x, partial[m][r]);
                }
            }
        }
        for r in 0..R {
            let scale = isa.load(&scales[r], part);
            for m in 0..M {
                let sum = isa.load(&acc[m][r], part);
                isa.store(isa.fma(partial[m][r], scale, sum), &mut acc[m][r], part);
            }
        }
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
    let (mut values, mut scale) = (Block::ZERO, Lanes::ZERO);
    for (block, out) in out.chunks_mut(STEPS * LANES).enumerate() {
        let isa = super::portable::Portable;
        decode_block::<_, F>(isa, linear, row, block, &mut values, &mut scale);
        for (column, out) in out.iter_mut().enumerate() {
            let (raw, within) = (column / (LANES * F::RAW_STEPS), column % (LANES * F::RAW_STEPS));
            let (lane, step) = (within / F::RAW_STEPS, within % F::RAW_STEPS);
            *out = values.0[raw * F::RAW_STEPS + step].0[lane] * scale.0[lane];
        }
    }
}
