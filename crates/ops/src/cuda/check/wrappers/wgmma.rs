//! Products of a warpgroup (sm_90a): d[64][n] (+)= a[64][k] b[k][n], with 128 bytes of k.

use fathom_core::num::{e4m3_from_f32, e4m3_to_f32};

use super::super::Report;
use super::{Check, bf16_bits, floats, integer, swizzled, words_of};
use crate::OpError;

const ROWS: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    E4m3,
    Bf16,
}
use Element::{Bf16, E4m3};

/// Where operands lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A in registers, B in shared memory.
    Registers,
    /// Both in shared memory.
    Shared,
    /// A in registers, B in shared memory with its columns side by side.
    Columns,
}
use Form::{Columns, Registers, Shared};

/// A kernel, the format of its operands, its columns.
type Variant = (&'static str, Element, Form, usize);

const VARIANTS: [Variant; 14] = [
    ("check_wgmma_e4m3_8", E4m3, Registers, 8),
    ("check_wgmma_e4m3_32", E4m3, Registers, 32),
    ("check_wgmma_e4m3_64", E4m3, Registers, 64),
    ("check_wgmma_e4m3_128", E4m3, Registers, 128),
    ("check_wgmma_e4m3_shared_8", E4m3, Shared, 8),
    ("check_wgmma_e4m3_shared_64", E4m3, Shared, 64),
    ("check_wgmma_e4m3_shared_128", E4m3, Shared, 128),
    ("check_wgmma_bf16_8", Bf16, Registers, 8),
    ("check_wgmma_bf16_64", Bf16, Registers, 64),
    ("check_wgmma_bf16_128", Bf16, Registers, 128),
    ("check_wgmma_bf16_shared_8", Bf16, Shared, 8),
    ("check_wgmma_bf16_shared_64", Bf16, Shared, 64),
    ("check_wgmma_bf16_shared_128", Bf16, Shared, 128),
    ("check_wgmma_bf16_mn_256", Bf16, Columns, 256),
];

impl Element {
    const fn bytes(self) -> usize {
        match self {
            E4m3 => 1,
            Bf16 => 2,
        }
    }

    /// Values along k.
    const fn depth(self) -> usize {
        128 / self.bytes()
    }

    fn code(self, value: f32) -> u16 {
        match self {
            E4m3 => e4m3_from_f32(value).into(),
            Bf16 => bf16_bits(value) as u16,
        }
    }

    fn value(self, code: u16) -> f32 {
        match self {
            E4m3 => e4m3_to_f32(code as u8),
            Bf16 => f32::from_bits(u32::from(code) << 16),
        }
    }

    /// Any code of a number; of bf16 one whose products are normal.
    fn any(self, report: &mut Report<'_>) -> u16 {
        let bits = report.random.bits() as u16;
        match self {
            E4m3 if bits & 0x7f == 0x7f => 0,
            E4m3 => bits & 0xff,
            Bf16 => bits & 0x8fff | 0x3000,
        }
    }
}

/// The matrices of one block.
struct Product {
    a: Vec<u16>, // codes [row][k]
    b: Vec<u16>, // codes [column][k]
    d: Vec<f32>, // [row][column]
    adds: bool,
}

impl Product {
    /// Small integers: sums have 12 bits, which all accumulators keep.
    fn of_integers(report: &mut Report<'_>, element: Element, n: usize, adds: bool) -> Self {
        let depth = element.depth();
        let mut codes =
            |n| (0..n * depth).map(|_| element.code(integer(report, 4))).collect::<Vec<u16>>();
        let (a, b) = (codes(ROWS), codes(n));
        let d = if adds {
            (0..ROWS * n).map(|_| integer(report, 500)).collect()
        } else {
            vec![f32::NAN; ROWS * n]
        };
        Self { a, b, d, adds }
    }

    /// One code in each row of A, of E4M3 from `first` on; any codes in B. Every sum is one product.
    fn of_codes(report: &mut Report<'_>, element: Element, n: usize, first: usize) -> Self {
        let depth = element.depth();
        let mut a = vec![0; ROWS * depth];
        for (row, code) in a.chunks_mut(depth).zip(first..) {
            let is_next = element == E4m3 && code & 0x7f != 0x7f;
            let code = if is_next { code as u16 } else { element.any(report) };
            row[report.random.below(depth)] = code;
        }
        let b = (0..n * depth).map(|_| element.any(report)).collect();
        Self { a, b, d: vec![f32::NAN; ROWS * n], adds: false }
    }

    fn columns(&self) -> usize {
        self.d.len() / ROWS
    }

    /// Words that a block is given.
    fn words(&self, element: Element, form: Form) -> Vec<u32> {
        let mut words = if form == Shared {
            rows_in_shared_memory(&self.a, element)
        } else {
            registers(&self.a, element)
        };
        words.extend(if form == Columns {
            columns_in_shared_memory(&self.b, element)
        } else {
            rows_in_shared_memory(&self.b, element)
        });
        words.extend(self.fragments(&self.d).iter().map(|x| x.to_bits()));
        words.push(self.adds.into());
        words
    }

    /// D as the threads hold it: register 4 j + i of lane l of warp w is row 16 w + l / 4 + 8 (i / 2), column
    /// 8 j + 2 (l % 4) + i % 2.
    fn fragments(&self, d: &[f32]) -> Vec<f32> {
        let n = self.columns();
        let place = |at: usize| {
            let (thread, j, i) = (at / (n / 2), at % (n / 2) / 4, at % 4);
            let row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8;
            row * n + j * 8 + thread % 4 * 2 + i % 2
        };
        (0..d.len()).map(|at| d[place(at)]).collect()
    }

    /// What D is to become.
    fn result(&self, element: Element) -> Vec<f32> {
        let (n, depth) = (self.columns(), element.depth());
        let values = |codes: &[u16]| codes.iter().map(|&code| element.value(code)).collect();
        let (a, b): (Vec<f32>, Vec<f32>) = (values(&self.a), values(&self.b));
        (0..ROWS * n)
            .map(|at| {
                let rows = a[at / n * depth..].iter().zip(&b[at % n * depth..]);
                let sum: f64 = rows.take(depth).map(|(a, b)| f64::from(a * b)).sum();
                (sum + if self.adds { f64::from(self.d[at]) } else { 0.0 }) as f32
            })
            .collect()
    }
}

/// Puts codes at their bytes.
fn placed(codes: &[u16], element: Element, place: impl Fn(usize) -> usize) -> Vec<u32> {
    let size = element.bytes();
    let mut bytes = vec![0; codes.len() * size];
    for (i, code) in codes.iter().enumerate() {
        bytes[place(i)..][..size].copy_from_slice(&code.to_le_bytes()[..size]);
    }
    words_of(&bytes)
}

/// Rows of 128 bytes.
fn rows_in_shared_memory(codes: &[u16], element: Element) -> Vec<u32> {
    placed(codes, element, |i| swizzled(i * element.bytes()))
}

/// Of [column][k]: rows of k with 64 columns each, then the next 64 columns.
fn columns_in_shared_memory(codes: &[u16], element: Element) -> Vec<u32> {
    let depth = element.depth();
    placed(codes, element, |i| {
        let (column, k) = (i / depth, i % depth);
        swizzled(column / 64 * depth * 128 + k * 128 + column % 64 * 2)
    })
}

/// Registers of A, [thread][step][r]: row 16 w + l / 4 + 8 (r % 2) of lane l of warp w; four bytes, from byte
/// 4 (l % 4) + 16 (r / 2) of the step's 32 on.
fn registers(codes: &[u16], element: Element) -> Vec<u32> {
    let rows = placed(codes, element, |i| i * element.bytes());
    (0..rows.len())
        .map(|at| {
            let (thread, step, r) = (at / 16, at / 4 % 4, at % 4);
            let row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
            rows[row * 32 + step * 8 + thread % 4 + r / 2 * 4]
        })
        .collect()
}

/// Every variant: integers with and without what was there before, then codes.
pub(super) fn products(report: &mut Report<'_>) -> Result<(), OpError> {
    for (kernel, element, form, n) in VARIANTS {
        let mut blocks = vec![
            Product::of_integers(report, element, n, true),
            Product::of_integers(report, element, n, false),
        ];
        blocks.extend((0..4).map(|i| Product::of_codes(report, element, n, i * ROWS)));
        let input: Vec<u32> = blocks.iter().flat_map(|block| block.words(element, form)).collect();
        let check = Check {
            kernel,
            blocks: blocks.len(),
            threads: 128,
            shared_bytes: (8192 + n * 128) as u32,
        };
        let n_out = blocks.len() * ROWS * n;
        // SAFETY: 2,048 + 96 n + 1 words of input and 64 n of output for each block.
        let got = floats(&unsafe { check.run(report, &input, n_out)? });
        for (what, range) in [("integers, added", 0..1), ("integers", 1..2), ("codes", 2..6)] {
            let expected: Vec<f32> = blocks[range.clone()]
                .iter()
                .flat_map(|block| block.fragments(&block.result(element)))
                .collect();
            let got = &got[range.start * ROWS * n..range.end * ROWS * n];
            report.mostly_equal(format!("{}, {what}", &kernel[6..]), got, &expected, 0.0);
        }
    }
    Ok(())
}
