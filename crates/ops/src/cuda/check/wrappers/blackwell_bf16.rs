//! Products of bf16 values in tensor memory (sm_100f), and its tiles as threads load and store them:
//! d[m][n] (+)= a[m][64] b[64][n].

use super::super::Report;
use super::{Check, bf16_bits, floats, integer, swizzled, words_of};
use crate::OpError;

const LANES: usize = 128;
const COLUMNS: usize = 256;
const DEPTH: usize = 64;
/// Words of A, of B and of the shape.
const IN_WORDS: usize = 128 * 32 + 256 * 32 + 6;

/// One form of the product.
#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    /// The first lane of d.
    lane: usize,
    a_is_shared: bool,
    /// Columns of B lie side by side in memory.
    b_is_mn: bool,
}

impl Shape {
    const fn new(m: usize, n: usize, lane: usize, a_is_shared: bool, b_is_mn: bool) -> Self {
        Self { m, n, lane, a_is_shared, b_is_mn }
    }

    /// The row that a lane of tensor memory holds.
    fn row(self, lane: usize) -> Option<usize> {
        match self.m {
            64 if lane % 32 / 16 * 16 == self.lane => Some(lane / 32 * 16 + lane % 16),
            64 => None,
            _ => Some(lane),
        }
    }
}

/// Those of attention first (scores, values); then the narrowest, and 128 rows.
const SHAPES: [Shape; 7] = [
    Shape::new(64, 64, 0, false, false),
    Shape::new(64, 256, 16, true, true),
    Shape::new(64, 8, 16, true, false),
    Shape::new(64, 256, 0, false, true),
    Shape::new(128, 16, 0, false, false),
    Shape::new(128, 128, 0, true, false),
    Shape::new(128, 256, 0, true, true),
];

/// The matrices of one block.
struct Product {
    shape: Shape,
    a: Vec<u16>, // codes [row][k]
    b: Vec<u16>, // codes [column][k]
    adds: bool,
}

fn value(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

impl Product {
    /// Small integers: sums have 12 bits, which all accumulators keep.
    fn of_integers(report: &mut Report<'_>, shape: Shape, adds: bool) -> Self {
        let mut codes = |rows: usize| -> Vec<u16> {
            (0..rows * DEPTH).map(|_| bf16_bits(integer(report, 4)) as u16).collect()
        };
        Self { shape, a: codes(shape.m), b: codes(shape.n), adds }
    }

    /// One code in each row of A, any codes in B, whose products are normal.
    fn of_codes(report: &mut Report<'_>, shape: Shape) -> Self {
        let mut any = || report.random.bits() as u16 & 0x8fff | 0x3000;
        let b = (0..shape.n * DEPTH).map(|_| any()).collect();
        let codes: Vec<u16> = (0..shape.m).map(|_| any()).collect();
        let mut a = vec![0; shape.m * DEPTH];
        for (row, code) in a.chunks_mut(DEPTH).zip(codes) {
            row[report.random.below(DEPTH)] = code;
        }
        Self { shape, a, b, adds: false }
    }

    fn words(&self) -> Vec<u32> {
        let Shape { m, n, lane, a_is_shared, b_is_mn } = self.shape;
        let mut words: Vec<u32> = self
            .a
            .chunks_exact(2)
            .map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16)
            .collect();
        words.resize(128 * 32, 0);
        let mut b = vec![0; 256 * 128];
        for (i, code) in self.b.iter().enumerate() {
            let (column, k) = (i / DEPTH, i % DEPTH);
            let at = if b_is_mn {
                column / 64 * 64 * 128 + k * 128 + column % 64 * 2
            } else {
                column * 128 + k * 2
            };
            b[swizzled(at)..][..2].copy_from_slice(&code.to_le_bytes());
        }
        words.extend(words_of(&b));
        let flags = [a_is_shared, b_is_mn, self.adds].map(u32::from);
        words.extend([m, n, lane].map(|x| x as u32).into_iter().chain(flags));
        words
    }

    /// What all lanes of 256 columns are to become.
    fn result(&self) -> Vec<f32> {
        let dot = |row: usize, column: usize| -> f64 {
            let rows = self.a[row * DEPTH..].iter().zip(&self.b[column * DEPTH..]).take(DEPTH);
            rows.map(|(&a, &b)| f64::from(value(a) * value(b))).sum()
        };
        (0..LANES * COLUMNS)
            .map(|at| {
                let (lane, column) = (at / COLUMNS, at % COLUMNS);
                let before = ((7 * lane + column) % 64) as f32;
                match self.shape.row(lane) {
                    Some(row) if column < self.shape.n => {
                        (dot(row, column) + if self.adds { f64::from(before) } else { 0.0 }) as f32
                    }
                    _ => before,
                }
            })
            .collect()
    }
}

/// Every form: integers, with and without what was there before, then codes.
pub(super) fn products(report: &mut Report<'_>) -> Result<(), OpError> {
    for shape in SHAPES {
        let blocks = [
            ("integers", Product::of_integers(report, shape, false)),
            ("integers, added", Product::of_integers(report, shape, true)),
            ("codes", Product::of_codes(report, shape)),
        ];
        let input: Vec<u32> = blocks.iter().flat_map(|(_, block)| block.words()).collect();
        debug_assert_eq!(input.len(), blocks.len() * IN_WORDS);
        let check = Check {
            kernel: "check_bf16",
            blocks: blocks.len(),
            threads: 128,
            shared_bytes: 50 * 1024,
        };
        let n_out = LANES * COLUMNS;
        // SAFETY: `IN_WORDS` words of input and 128 x 256 of output for each block.
        let got = floats(&unsafe { check.run(report, &input, blocks.len() * n_out)? });
        for ((what, block), got) in blocks.iter().zip(got.chunks_exact(n_out)) {
            let Shape { m, n, a_is_shared, b_is_mn, .. } = shape;
            let a = if a_is_shared { "shared" } else { "tensor memory" };
            let b = if b_is_mn { "columns" } else { "rows" };
            let what = format!("mma_bf16 {m} x {n}, {a}, {b}, {what}");
            report.mostly_equal(what, got, &block.result(), 0.0);
        }
    }
    Ok(())
}
