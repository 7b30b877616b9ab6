//! Products against f64 sums, and bit for bit against each other.

use fathom_core::num::{Ue8m0, e2m1_to_f32, e4m3_to_f32};

use super::{CpuLinear, Job, Level, run_at};
use crate::{Scales, WeightData, WeightSource};

/// A generator of test data: xorshift, seeded.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.next() >> 32) as u8).collect()
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as i64 as f64 / 2.0_f64.powi(62)) as f32).collect()
    }

    fn scale_bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| 117 + (self.next() >> 32) as u8 % 20).collect()
    }
}

const FORMATS: [&str; 5] = ["fp4", "fp8", "fp8 with f32 scales", "bf16", "f32"];

/// A matrix of random codes, and its values.
fn matrix(format: &str, rows: usize, cols: usize, noise: &mut Noise) -> (WeightSource, Vec<f32>) {
    let n = rows * cols;
    let blocks = (rows.div_ceil(128), cols.div_ceil(128));
    let at = |i: usize| (i / cols, i % cols);
    let (data, values): (_, Vec<f32>) = match format {
        "fp4" => {
            let (codes, scales) = (noise.bytes(n / 2), noise.scale_bytes(n / 32));
            let value = |i| {
                let scale = Ue8m0::from_byte(scales[i / 32]).unwrap().to_f32();
                e2m1_to_f32(codes[i / 2] >> (4 * (i % 2))) * scale
            };
            let values = (0..n).map(value).collect();
            (WeightData::Fp4 { codes: codes.into(), scales: scales.into() }, values)
        }
        "fp8" | "fp8 with f32 scales" => {
            let codes: Vec<u8> =
                noise.bytes(n).into_iter().map(|b| if b & 0x7f == 0x7f { 0 } else { b }).collect();
            let bytes = noise.scale_bytes(blocks.0 * blocks.1);
            let power = |&byte: &u8| Ue8m0::from_byte(byte).unwrap().to_f32();
            let (scales, factors): (_, Vec<f32>) = if format == "fp8" {
                let factors = bytes.iter().map(power).collect();
                (Scales::Ue8m0(bytes.into()), factors)
            } else {
                let factors: Vec<f32> = noise.values(bytes.len());
                let bytes: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
                (Scales::F32(bytes.into()), factors)
            };
            let value = |i| {
                let (row, col) = at(i);
                e4m3_to_f32(codes[i]) * factors[row / 128 * blocks.1 + col / 128]
            };
            let values = (0..n).map(value).collect();
            (WeightData::Fp8 { codes: codes.into(), scales }, values)
        }
        "bf16" => {
            let values: Vec<_> = noise.values(n).into_iter().map(half::bf16::from_f32).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (WeightData::Bf16(bytes.into()), values.into_iter().map(half::bf16::to_f32).collect())
        }
        _ => {
            let values = noise.values(n);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (WeightData::F32(bytes.into()), values)
        }
    };
    (WeightSource::new("w", rows, cols, data).unwrap(), values)
}

fn product(level: Level, linear: &CpuLinear, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / linear.n_cols() * linear.n_rows()];
    run_at(level, &mut [Job { linear, x, out: &mut out }]).unwrap();
    out
}

/// Each sum is within a few roundings of the sum of magnitudes of the f64 result.
fn assert_close(got: &[f32], weights: &[f32], x: &[f32], cols: usize, what: &str) {
    let rows = weights.len() / cols;
    for (i, &got) in got.iter().enumerate() {
        let (token, row) = (i / rows, i % rows);
        let terms = x[token * cols..][..cols].iter().zip(&weights[row * cols..][..cols]);
        let terms = terms.map(|(&x, &w)| f64::from(x) * f64::from(w));
        let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
        let limit = 2e-6 * magnitude + 1e-30;
        assert!((f64::from(got) - sum).abs() <= limit, "{what} [{token}, {row}]: {got} {sum}");
    }
}

#[test]
fn every_format_equals_the_f64_sum() {
    let mut noise = Noise(1);
    for format in FORMATS {
        for (rows, cols, n) in
            [(1, 128, 1), (5, 384, 3), (37, 256, 4), (130, 512, 9), (18, 1280, 61)]
        {
            let (source, weights) = matrix(format, rows, cols, &mut noise);
            let linear = CpuLinear::new(&source).unwrap();
            let x = noise.values(n * cols);
            for level in Level::available() {
                let what = format!("{format} {rows}x{cols}x{n} {}", level.name());
                assert_close(&product(level, &linear, &x), &weights, &x, cols, &what);
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut noise = Noise(2);
    for format in FORMATS {
        for (rows, cols) in [(1, 128), (3, 256), (21, 384), (137, 640)] {
            let (source, _) = matrix(format, rows, cols, &mut noise);
            let linear = CpuLinear::new(&source).unwrap();
            for n in [1, 2, 3, 4, 5, 6, 7, 24, 25, 53] {
                let x = noise.values(n * cols);
                let expected = bits(&product(Level::available().pop().unwrap(), &linear, &x));
                for level in Level::available() {
                    let got = bits(&product(level, &linear, &x));
                    assert_eq!(got, expected, "{format} {rows}x{cols}x{n} {}", level.name());
                }
            }
        }
    }
}
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
