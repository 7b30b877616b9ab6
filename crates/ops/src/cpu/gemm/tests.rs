//! Products against f64 sums and the goldens, and bit for bit against each other.

use fathom_core::num::{Ue8m0, e2m1_to_f32, e4m3_to_f32};

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::{CpuLinear, Job, Level, run, run_at};
use crate::{OpError, Scales, WeightData, WeightSource};

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
    run_at(level, &mut [Job::new(linear, x, &mut out)]).unwrap();
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
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

/// The columns a format allows, about `cols` of them.
fn allowed(format: &str, cols: usize) -> usize {
    if format.starts_with("fp") { cols.next_multiple_of(128) } else { cols }
}

#[test]
fn every_format_equals_the_f64_sum() {
    let mut noise = Noise(1);
    for format in FORMATS {
        let shapes = [(1, 1, 1), (5, 384, 3), (37, 200, 4), (130, 512, 9), (18, 1283, 61)];
        for (rows, cols, n) in shapes {
            let cols = allowed(format, cols);
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
        for (rows, cols) in [(1, 100), (3, 256), (21, 400), (70, 4224)] {
            let cols = allowed(format, cols);
            let (source, _) = matrix(format, rows, cols, &mut noise);
            let linear = CpuLinear::new(&source).unwrap();
            for n in [1, 2, 3, 4, 5, 6, 7, 8, 24, 25, 53] {
                let n = if cols > 1000 { n.min(8) } else { n };
                let x = noise.values(n * cols);
                let expected = bits(&product(Level::portable(), &linear, &x));
                for level in Level::available() {
                    let got = bits(&product(level, &linear, &x));
                    assert_eq!(got, expected, "{format} {rows}x{cols}x{n} {}", level.name());
                }
            }
        }
    }
}

#[test]
fn subnormal_codes_and_scales_and_tiny_activations_give_the_same_bits_too() {
    let (rows, cols) = (8, 128);
    let mut noise = Noise(3);
    let codes: Vec<u8> = noise.bytes(rows * cols).into_iter().map(|b| b & 0x87).collect();
    let fp8 = |scale: u8| {
        let scales = Scales::Ue8m0(vec![scale].into());
        WeightData::Fp8 { codes: codes.clone().into(), scales }
    };
    let fp4 = |scale: u8| {
        let codes = codes[..rows * cols / 2].to_vec().into();
        WeightData::Fp4 { codes, scales: vec![scale; rows * cols / 32].into() }
    };
    for data in [fp8(0), fp8(1), fp8(100), fp4(0), fp4(1), fp4(254)] {
        let source = WeightSource::new("w", rows, cols, data).unwrap();
        let linear = CpuLinear::new(&source).unwrap();
        for magnitude in [1e-40, 1e-30, 1.0, 1e30] {
            let x: Vec<f32> = noise.values(3 * cols).into_iter().map(|x| x * magnitude).collect();
            let expected = bits(&product(Level::portable(), &linear, &x));
            for level in Level::available() {
                assert_eq!(bits(&product(level, &linear, &x)), expected, "{}", level.name());
            }
        }
    }
}

#[test]
fn a_row_of_x_gives_the_same_bits_alone_and_in_any_batch() {
    let mut noise = Noise(4);
    for format in FORMATS {
        let (rows, cols) = (41, 640);
        let (source, _) = matrix(format, rows, cols, &mut noise);
        let linear = CpuLinear::new(&source).unwrap();
        let x = noise.values(60 * cols);
        let alone: Vec<u32> =
            x.chunks(cols).flat_map(|x| bits(&product(Level::best(), &linear, x))).collect();
        for n in 1..=60 {
            let first = 60 - n;
            let got = bits(&product(Level::best(), &linear, &x[first * cols..]));
            assert_eq!(got, alone[first * rows..], "{format}, {n} rows");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut noise = Noise(5);
    for format in FORMATS {
        // Large enough to be divided by rows, by tokens, and to be packed in parallel.
        for (rows, cols, n) in [(1500, 1024, 1), (300, 1024, 7), (24, 2048, 200)] {
            let (source, _) = matrix(format, rows, cols, &mut noise);
            let linear = CpuLinear::new(&source).unwrap();
            let x = noise.values(n * cols);
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                bits(&pool.install(|| product(Level::best(), &linear, &x)))
            };
            let expected = on(1);
            for threads in [2, 3, 8] {
                assert!(on(threads) == expected, "{format} {rows}x{cols}x{n} on {threads} threads");
            }
        }
    }
}

#[test]
fn jobs_run_together_give_what_each_gives_alone() {
    let mut noise = Noise(6);
    let linears: Vec<CpuLinear> = (0..30)
        .map(|i| {
            let (source, _) = matrix(FORMATS[i % 5], 8 + 40 * i, 256, &mut noise);
            CpuLinear::new(&source).unwrap()
        })
        .collect();
    // Shared inputs, own inputs, and none.
    let inputs: Vec<Vec<f32>> = (0..4).map(|n| noise.values(n * 256)).collect();
    let input = |i: usize| &inputs[i / 3 % 4];
    let mut outs: Vec<Vec<f32>> =
        (0..30).map(|i| vec![f32::NAN; input(i).len() / 256 * linears[i].n_rows()]).collect();
    let mut jobs: Vec<Job<'_>> = linears
        .iter()
        .zip(&mut outs)
        .enumerate()
        .map(|(i, (linear, out))| Job::new(linear, input(i), out))
        .collect();
    run(&mut jobs).unwrap();
    for (i, out) in outs.iter().enumerate() {
        assert_eq!(bits(out), bits(&product(Level::best(), &linears[i], input(i))), "job {i}");
    }
}

#[test]
fn a_slice_is_the_matrix_of_those_rows_and_columns() {
    let mut noise = Noise(7);
    let (rows, cols) = (384, 1024);
    for format in FORMATS {
        let (source, weights) = matrix(format, rows, cols, &mut noise);
        let sliced = source.slice_rows(128..384).unwrap().slice_cols(256..896).unwrap();
        let linear = CpuLinear::new(&sliced).unwrap();
        // Once more, now through the middle of a 128-row block.
        let linear = linear.slice_rows(100..200).unwrap().slice_rows(7..100).unwrap();
        let part: Vec<f32> = (128 + 107..128 + 200)
            .flat_map(|row| weights[row * cols + 256..row * cols + 896].to_vec())
            .collect();
        let mut row = vec![0.0; 640];
        for (row_id, expected) in part.chunks(640).enumerate() {
            linear.row(row_id, &mut row);
            assert_eq!(row, expected, "{format}, row {row_id}");
        }
        for n in [1, 3, 9] {
            let x = noise.values(n * 640);
            assert_close(&product(Level::best(), &linear, &x), &part, &x, 640, format);
        }
        assert!(matches!(linear.slice_rows(90..94), Err(OpError::OutOfRange { got: 94, .. })));
    }
}

#[test]
fn columns_that_fill_no_block_are_sliced_and_multiplied_too() {
    let mut noise = Noise(8);
    for format in ["bf16", "f32"] {
        let (source, weights) = matrix(format, 50, 300, &mut noise);
        let source = source.slice_cols(3..296).unwrap();
        let linear = CpuLinear::new(&source).unwrap().slice_rows(9..50).unwrap();
        let part: Vec<f32> =
            (9..50).flat_map(|row| weights[row * 300 + 3..row * 300 + 296].to_vec()).collect();
        let mut row = vec![0.0; 293];
        linear.row(40, &mut row);
        assert_eq!(row, part[40 * 293..]);
        let x = noise.values(8 * 293);
        assert_close(&product(Level::best(), &linear, &x), &part, &x, 293, format);
    }
}

#[test]
fn values_computed_here_become_a_matrix() {
    let linear = CpuLinear::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    assert_eq!(product(Level::best(), &linear, &[1.0, 10.0, 100.0]), [321.0, 654.0]);
    assert_eq!(linear.bytes(), 24);
    assert!(matches!(
        CpuLinear::from_f32(2, 3, vec![0.0; 5]),
        Err(OpError::Shape { got: 5, expected: 6, .. })
    ));
}

#[test]
fn the_bytes_of_a_product_are_its_codes_and_the_scales_it_uses() {
    let mut noise = Noise(9);
    let bytes = |format| {
        let (source, _) = matrix(format, 256, 512, &mut noise);
        CpuLinear::new(&source).unwrap().bytes()
    };
    let expected = [256 * 512 / 2 + 256 * 16, 256 * 512 + 4 * 8, 256 * 512 + 4 * 8];
    assert_eq!(["fp4", "fp8", "fp8 with f32 scales"].map(bytes), expected);
}

#[test]
fn damaged_scales_and_wrong_lengths_are_refused_by_name() {
    let codes = || vec![0_u8; 256 * 256];
    let ue8m0 = |scales: Vec<u8>| Scales::Ue8m0(scales.into());
    let f32s = |scale: f32| {
        Scales::F32([1.0, 1.0, scale, 1.0].into_iter().flat_map(f32::to_le_bytes).collect())
    };
    for scales in [ue8m0(vec![1, 2, 255, 4]), f32s(f32::NAN), f32s(f32::INFINITY), f32s(1e38)] {
        let data = WeightData::Fp8 { codes: codes().into(), scales };
        let error = CpuLinear::new(&WeightSource::new("a.b", 256, 256, data).unwrap()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("`a.b`") && message.contains("[1, 0]"), "{message}");
    }

    let mut scales = vec![127_u8; 256 * 8];
    scales[5 * 8 + 3] = 255;
    let codes = codes()[..256 * 128].to_vec().into();
    let data = WeightData::Fp4 { codes, scales: scales.into() };
    let source = WeightSource::new("w1", 256, 256, data).unwrap();
    let message = CpuLinear::new(&source).unwrap_err().to_string();
    assert!(message.contains("`w1`") && message.contains("[5, 3]"), "{message}");
    // A rank that does not use the damaged row does not read it.
    CpuLinear::new(&source.slice_rows(6..256).unwrap()).unwrap();

    let data = WeightData::Fp8 { codes: vec![0; 192].into(), scales: ue8m0(vec![127; 2]) };
    let error = CpuLinear::new(&WeightSource::new("odd", 1, 192, data).unwrap()).unwrap_err();
    assert!(matches!(error, OpError::Weight { ref name, .. } if name == "odd"), "{error}");

    let linear = CpuLinear::from_f32(2, 3, vec![0.0; 6]).unwrap();
    let got = |x: usize, out: usize| linear.matmul(&vec![0.0; x], &mut vec![0.0; out]);
    assert!(matches!(got(4, 2), Err(OpError::Shape { arg: "x", got: 4, expected: 3, .. })));
    assert!(matches!(got(6, 3), Err(OpError::Shape { arg: "out", got: 3, expected: 4, .. })));
    got(0, 0).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_shape_gives_the_same_bits_on_every_instruction_set(
        format in prop::sample::select(&FORMATS[..]),
        rows in 1_usize..40,
        cols in 1_usize..700,
        n in 1_usize..30,
        seed in 1_u64..,
    ) {
        let mut noise = Noise(seed);
        let cols = allowed(format, cols);
        let (source, weights) = matrix(format, rows, cols, &mut noise);
        let linear = CpuLinear::new(&source).unwrap();
        let x = noise.values(n * cols);
        let expected = product(Level::portable(), &linear, &x);
        assert_close(&expected, &weights, &x, cols, format);
        for level in Level::available() {
            prop_assert_eq!(bits(&product(level, &linear, &x)), bits(&expected));
        }
    }
}

/// Tensors of `models/nano`.
struct Nano {
    files: Vec<Vec<u8>>,
}

impl Nano {
    fn open() -> Self {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano/");
        let names = ["model-00001-of-00003.safetensors", "goldens/nano_units.safetensors"];
        Self { files: names.map(|name| std::fs::read(format!("{dir}{name}")).unwrap()).into() }
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let found = self.files.iter().find_map(|file| {
            Some(SafeTensors::deserialize(file).unwrap().tensor(name).ok()?.data().to_vec())
        });
        found.unwrap_or_else(|| panic!("{name} is not in the first shard or the units"))
    }

    fn values(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// `layers.0.attn.wkv`, FP8, and `layers.0.ffn.experts.1.w1`, FP4.
    fn linears(&self) -> [(&'static str, CpuLinear); 2] {
        let part = |name: &str, part: &str| self.bytes(&format!("{name}.{part}")).into();
        let (wkv, w1) = ("layers.0.attn.wkv", "layers.0.ffn.experts.1.w1");
        let scales = Scales::Ue8m0(part(wkv, "scale"));
        let fp8 = WeightData::Fp8 { codes: part(wkv, "weight"), scales };
        let fp4 = WeightData::Fp4 { codes: part(w1, "weight"), scales: part(w1, "scale") };
        [(wkv, 512, fp8), (w1, 128, fp4)].map(|(name, rows, data)| {
            (name, CpuLinear::new(&WeightSource::new(name, rows, 256, data).unwrap()).unwrap())
        })
    }
}

#[test]
fn golden_weights_dequantise_exactly() {
    let nano = Nano::open();
    for (name, linear) in nano.linears() {
        let expected = nano.values(&format!("dequant/{name}.weight_first8rows"));
        let mut row = vec![0.0; 256];
        for (row_id, expected) in expected.chunks(256).enumerate() {
            linear.row(row_id, &mut row);
            assert_eq!(row, expected, "{name}, row {row_id}");
        }
    }
}

/// The sums are f32 in another order: 1e-6 relative L2, the limit of the float32 units.
#[test]
fn golden_products_without_activation_quantisation_are_met() {
    let nano = Nano::open();
    let units = ["linear_wkv_l0", "linear_expert1_w1_l0"];
    for (unit, (_, linear)) in units.into_iter().zip(nano.linears()) {
        let x = nano.values(&format!("{unit}/x"));
        let expected = nano.values(&format!("{unit}/y_noquant"));
        for level in Level::available() {
            let got = product(level, &linear, &x);
            let square = |value: f32| f64::from(value).powi(2);
            let error: f64 = got.iter().zip(&expected).map(|(g, e)| square(g - e)).sum();
            let norm: f64 = expected.iter().map(|&e| square(e)).sum();
            let rel_l2 = (error / norm).sqrt();
            assert!(rel_l2 <= 1e-6, "{unit} {}: {rel_l2:e}", level.name());
        }
    }
}
