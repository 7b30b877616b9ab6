//! Tensor memory and block-scaled products (sm_100f): d[128][n] (+)= a[128][128] b[128][n], with an E8M0 scale for each
//! 32 values along k.

use fathom_core::num::{e2m1_to_f32, e4m3_from_f32, e4m3_to_f32};

use super::super::Report;
use super::{Check, floats, integer, swizzled, words_of};
use crate::OpError;

const ROWS: usize = 128;
const DEPTH: usize = 128;

/// The matrices of one block; codes [row][k], scales [row][k / 32].
struct Product {
    is_fp4: bool,
    n: usize,
    a: Vec<u8>,
    b: Vec<u8>,
    a_scales: Vec<u8>,
    b_scales: Vec<u8>,
    adds: bool,
}

fn e4m3_any(report: &mut Report<'_>) -> u8 {
    let code = report.random.bits() as u8;
    if code & 0x7f == 0x7f { 0 } else { code }
}

fn scales(report: &mut Report<'_>, first: u8, n: usize) -> Vec<u8> {
    (0..ROWS * 4).map(|_| first + report.random.below(n) as u8).collect()
}

impl Product {
    /// Small integers and scales close together: sums have 20 bits at most.
    fn of_integers(report: &mut Report<'_>, is_fp4: bool, n: usize, adds: bool) -> Self {
        let integers = |report: &mut Report<'_>| -> Vec<u8> {
            (0..ROWS * DEPTH).map(|_| e4m3_from_f32(integer(report, 4))).collect()
        };
        let a = if is_fp4 {
            (0..ROWS * DEPTH).map(|_| report.random.bits() as u8 & 15).collect()
        } else {
            integers(report)
        };
        let b = integers(report);
        let (a_scales, b_scales) = (scales(report, 126, 3), scales(report, 127, 2));
        Self { is_fp4, n, a, b, a_scales, b_scales, adds }
    }

    /// One code in each row of A, any codes in B, scales far apart.
    fn of_codes(report: &mut Report<'_>, is_fp4: bool, n: usize) -> Self {
        let mut a = vec![0; ROWS * DEPTH];
        for row in a.chunks_mut(DEPTH) {
            let code = if is_fp4 { report.random.bits() as u8 & 15 } else { e4m3_any(report) };
            row[report.random.below(DEPTH)] = code;
        }
        let b = (0..ROWS * DEPTH).map(|_| e4m3_any(report)).collect();
        let (a_scales, b_scales) = (scales(report, 107, 40), scales(report, 107, 40));
        Self { is_fp4, n, a, b, a_scales, b_scales, adds: false }
    }

    fn words(&self) -> Vec<u32> {
        let mut a = vec![0xff; ROWS * DEPTH];
        if self.is_fp4 {
            // 16 codes in the first 8 of 16 bytes.
            for (i, pair) in self.a.chunks_exact(2).enumerate() {
                a[swizzled(i / 8 * 16 + i % 8)] = pair[0] | pair[1] << 4;
            }
        } else {
            self.a.iter().enumerate().for_each(|(i, &code)| a[swizzled(i)] = code);
        }
        let mut b = vec![0; ROWS * DEPTH];
        self.b.iter().enumerate().for_each(|(i, &code)| b[swizzled(i)] = code);
        let mut words = words_of(&a);
        words.extend(words_of(&b));
        for scales in [&self.a_scales, &self.b_scales] {
            // The four bytes of row r are word 4 (r % 32) + r / 32.
            let rows = words_of(scales);
            words.extend((0..ROWS).map(|word| rows[word % 4 * 32 + word / 4]));
        }
        words.extend([self.n as u32, self.adds.into()]);
        words
    }

    /// What columns `..n` of D are to become: the products are done twice.
    fn result(&self) -> Vec<f32> {
        let a_value = if self.is_fp4 { e2m1_to_f32 } else { e4m3_to_f32 };
        let a: Vec<f32> = self.a.iter().map(|&code| a_value(code)).collect();
        let b: Vec<f32> = self.b.iter().map(|&code| e4m3_to_f32(code)).collect();
        let times = if self.adds { 2.0 } else { 1.0 };
        (0..ROWS * self.n)
            .map(|at| {
                let (row, column) = (at / self.n, at % self.n);
                let block = |i: usize| {
                    let (a, b) = (&a[row * DEPTH + 32 * i..], &b[column * DEPTH + 32 * i..]);
                    let sum: f64 = a.iter().zip(b).take(32).map(|(a, b)| f64::from(a * b)).sum();
                    let exponents = i32::from(self.a_scales[row * 4 + i])
                        + i32::from(self.b_scales[column * 4 + i]);
                    sum * 2.0_f64.powi(exponents - 254)
                };
                (times * (0..4).map(block).sum::<f64>()) as f32
            })
            .collect()
    }
}

/// Both kinds of products, at the fewest columns and at those of the pipelines.
pub(super) fn products(report: &mut Report<'_>) -> Result<(), OpError> {
    for (kernel, is_fp4) in [("check_scaled_fp4", true), ("check_scaled_fp8", false)] {
        for n in [8, 32, 128] {
            let blocks = [
                ("integers", Product::of_integers(report, is_fp4, n, false)),
                ("integers, added", Product::of_integers(report, is_fp4, n, true)),
                ("codes", Product::of_codes(report, is_fp4, n)),
            ];
            let input: Vec<u32> = blocks.iter().flat_map(|(_, block)| block.words()).collect();
            let check =
                Check { kernel, blocks: blocks.len(), threads: 128, shared_bytes: 34 * 1024 };
            // SAFETY: 8,450 words of input and 128 x 128 of output for each block.
            let got = floats(&unsafe { check.run(report, &input, blocks.len() * ROWS * ROWS)? });
            for ((what, block), rows) in blocks.iter().zip(got.chunks_exact(ROWS * ROWS)) {
                let got: Vec<f32> =
                    rows.chunks_exact(ROWS).flat_map(|row| row[..n].to_vec()).collect();
                let what = format!("mma_scaled, {}, {n} columns, {what}", &kernel[13..]);
                report.mostly_equal(what, &got, &block.result(), 0.0);
            }
        }
    }
    Ok(())
}
