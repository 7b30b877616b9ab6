//! What one thread computes by itself.

use super::super::{Comparison, Report};
use super::{Check, words};
use crate::OpError;

/// Threads of a kernel.
const N: usize = 4096;

/// The same bits for every NaN.
fn number(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

/// The same for every zero, too: of two zeros either may be the larger.
fn unsigned_zero(x: f32) -> u32 {
    if x == 0.0 { 0 } else { number(x) }
}

/// Bits of a float: any, subnormal, near 1, between two bf16 values, or special. No signalling NaN: what the larger of one and a
/// number is differs.
fn float_bits(report: &mut Report<'_>) -> u32 {
    const SPECIAL: [u32; 8] =
        [0, 1, 0x007f_ffff, 0x0080_0000, 0x3f80_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7fc0_0000];
    let bits = report.random.bits();
    let bits = match report.random.below(8) {
        0 => bits & 0x807f_ffff,
        1 => bits & 0x8000_0000 | SPECIAL[report.random.below(8)],
        2 => bits & 0xffff_0000 | 0x8000 | report.random.bits() & 1,
        3..=4 => bits & 0x83ff_ffff | 0x3c00_0000,
        _ => bits,
    };
    if f32::from_bits(bits).is_nan() { bits | 0x0040_0000 } else { bits }
}

/// The nearest bf16 of a value, ties to even, by its definition.
fn nearest_bf16(x: f64) -> u32 {
    if x.is_nan() {
        return 0x7fff;
    }
    let sign = u32::from(x.is_sign_negative()) << 15;
    let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).clamp(-126, 200);
    let step = 2.0_f64.powi(exponent - 7);
    let rounded = (x.abs() / step).round_ties_even() * step;
    sign | ((rounded as f32).to_bits() >> 16)
}

/// Both halves, with the same bits for every NaN.
fn bf16_pair(pair: u32) -> u32 {
    let half = |bits: u32| if bits & 0x7fff > 0x7f80 { 0x7fff } else { bits };
    half(pair >> 16) << 16 | half(pair & 0xffff)
}

/// Eight bytes, of which each digit of the selector picks one, or its sign if its high bit is set.
fn picked_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
    let pick = |i: u32| {
        let digit = (selector >> (4 * i)) as usize % 16;
        let byte = bytes[digit % 8];
        if digit < 8 { byte } else { ((byte as i8) >> 7) as u8 }
    };
    u32::from_le_bytes([pick(0), pick(1), pick(2), pick(3)])
}

/// What is done with three words, in the order of `check_arithmetic`; a result is brought to one form by
/// the function behind it.
fn operations(a: u32, b: u32, c: u32) -> [u32; 14] {
    let [x, y, z] = [a, b, c].map(f32::from_bits);
    let half = |word: u32, i: u32| f64::from(f32::from_bits(word >> (16 * i) << 16));
    let product = |i| nearest_bf16(half(a, i) * half(b, i));
    [
        number(x.mul_add(y, z)),
        number(x * y),
        number(x + y),
        number(x / y),
        number(x.sqrt()),
        unsigned_zero(x.max(y)),
        unsigned_zero(x.min(y)),
        number(x.abs()),
        picked_bytes(a, b, c),
        a.count_ones() | a.leading_zeros() << 8,
        a.min(b),
        a.max(b),
        bf16_pair(nearest_bf16(y.into()) << 16 | nearest_bf16(x.into())),
        bf16_pair(product(1) << 16 | product(0)),
    ]
}

/// Arithmetic with one rounding, minima and maxima, bytes and bits, bf16 pairs.
pub(super) fn arithmetic(report: &mut Report<'_>) -> Result<(), OpError> {
    const NAMES: [&str; 14] = [
        "fma_rn",
        "mul_rn",
        "add_rn",
        "div_rn",
        "sqrt_rn",
        "max_f32",
        "min_f32",
        "abs_f32",
        "byte_perm",
        "popcount, count_leading_zeros",
        "min_u32",
        "max_u32",
        "pack_bf16x2",
        "mul_bf16x2",
    ];
    let input: Vec<u32> = (0..3 * N).map(|_| float_bits(report)).collect();
    // SAFETY: three words of input and 14 of output for each thread.
    let out = unsafe { Check::over("check_arithmetic", N).run(report, &input, 14 * N)? };
    let expected: Vec<[u32; 14]> =
        input.chunks_exact(3).map(|x| operations(x[0], x[1], x[2])).collect();
    for (i, name) in NAMES.into_iter().enumerate() {
        let form = |word: u32| match i {
            0..=4 | 7 => number(f32::from_bits(word)),
            5 | 6 => unsigned_zero(f32::from_bits(word)),
            12 | 13 => bf16_pair(word),
            _ => word,
        };
        let got: Vec<u32> = out.chunks_exact(14).map(|words| form(words[i])).collect();
        let expected: Vec<u32> = expected.iter().map(|words| words[i]).collect();
        report.mostly_equal(name, &got, &expected, 0.0);
    }
    Ok(())
}

/// Distance from the exact result in steps of f32 at that place.
fn steps(got: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    if got == nearest || got.is_nan() && exact.is_nan() {
        return 0.0;
    }
    let exponent = ((nearest.abs().to_bits() >> 23) as i32 - 127).clamp(-126, 127);
    (f64::from(got) - exact).abs() / 2.0_f64.powi(exponent - 23)
}

/// Relative distance of 2^x; results below the normal range are 0.
fn exp2_error(got: f32, x: f32) -> f64 {
    let exact = f64::from(x).exp2();
    let exact = if exact < f64::from(f32::MIN_POSITIVE) { 0.0 } else { exact };
    let is_equal = f64::from(got) == exact || got.is_nan() && x.is_nan();
    let is_above = exact > f64::from(f32::MAX) && got == f32::INFINITY;
    if is_equal || is_above { 0.0 } else { (f64::from(got) - exact).abs() / exact }
}

/// The functions that need not be exact. Limits: 2^-22 of the value for 2^x, as documented for `ex2.approx.ftz`; four
/// steps of f32 for the others, of which CUDA promises two at most.
pub(super) fn functions(report: &mut Report<'_>) -> Result<(), OpError> {
    let input: Vec<f32> = (0..N)
        .map(|i| match i % 4 {
            0 => f32::from_bits(float_bits(report)),
            1 => (report.random.bits() as f32 / u32::MAX as f32 - 0.5) * 300.0,
            2 => (report.random.bits() as f32 / u32::MAX as f32 - 0.5) * 4.0,
            // Angles of positions.
            _ => report.random.bits() as f32 / 4096.0,
        })
        // Around 2^-126 either 0 or the value is right.
        .map(|x| if (x + 126.0).abs() < 1e-3 { 0.0 } else { x })
        .collect();
    let bits: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    // SAFETY: one word of input and five of output for each thread.
    let out = unsafe { Check::over("check_functions", N).run(report, &bits, 5 * N)? };
    type Function = fn(f64) -> f64;
    let exact: [(&str, Function); 4] =
        [("exp", f64::exp), ("log1p", f64::ln_1p), ("sine", f64::sin), ("cosine", f64::cos)];
    let column = |i: usize| out.chunks_exact(5).map(move |words| f32::from_bits(words[i]));
    let error = largest(column(0).zip(&input).map(|(got, &x)| exp2_error(got, x)));
    let what = "exp2_approx, relative error".to_owned();
    report.found.push(Comparison { what, error, limit: 2.0_f64.powi(-22) });
    for (i, (name, exact)) in exact.into_iter().enumerate() {
        let errors = column(1 + i).zip(&input).map(|(got, &x)| steps(got, exact(x.into())));
        let (error, what) = (largest(errors), format!("{name}, steps of f32"));
        report.found.push(Comparison { what, error, limit: 4.0 });
    }
    Ok(())
}

/// The largest error; infinite if one is no number.
fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |worst, e| if e.is_nan() { f64::INFINITY } else { worst.max(e) })
}

/// Arithmetic of f64 with one rounding.
pub(super) fn double(report: &mut Report<'_>) -> Result<(), OpError> {
    let mut input = words(report, 4 * N);
    for (i, high) in input.iter_mut().skip(1).step_by(2).enumerate() {
        // Half of them of about the same size, some subnormal.
        match i / 2 % 4 {
            0 | 1 => *high = *high & 0x807f_ffff | 0x3f80_0000,
            2 => *high &= 0x800f_ffff,
            _ => {}
        }
    }
    // SAFETY: four words of input and six of output for each thread.
    let out = unsafe { Check::over("check_double", N).run(report, &input, 6 * N)? };
    let doubles = |words: &[u32]| -> Vec<f64> {
        let double = |w: &[u32]| f64::from_bits(u64::from(w[0]) | u64::from(w[1]) << 32);
        words.chunks_exact(2).map(double).collect()
    };
    let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
    let got: Vec<u64> = doubles(&out).into_iter().map(bits).collect();
    let expected: Vec<u64> = doubles(&input)
        .chunks_exact(2)
        .flat_map(|x| [x[0] * x[1], x[0] + x[1], x[0] / x[1]])
        .map(bits)
        .collect();
    for (i, name) in ["mul_rn64", "add_rn64", "div_rn64"].into_iter().enumerate() {
        let third = |all: &[u64]| all.iter().skip(i).step_by(3).copied().collect::<Vec<u64>>();
        report.mostly_equal(name, &third(&got), &third(&expected), 0.0);
    }
    Ok(())
}
