//! Matrix products of the CPU backend: codes read per second next to the memory's rate, and
//! multiply-adds next to the CPU's, both measured in the same rounds; candle's f32 product of the
//! same shape beside them.
//!
//! Matrices for 1 and 8 tokens are larger than caches, as those of a model are. Every number is the
//! best of its rounds, and a round measures product, candle, memory and multiply-adds one after
//! the other, in short pieces, so that each finds moments without a busy neighbour.
//!
//! Run: `cargo bench -p fathom-benches --bench gemm [-- THREADS]`.
#![expect(clippy::print_stdout, reason = "a bench prints its result")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use fathom_ops::cpu::gemm::{CpuLinear, Level, isa, probe};
use fathom_ops::{Scales, WeightData, WeightSource};
use rayon::prelude::*;

const COLS: usize = 4096;
/// Bytes of codes of a matrix that comes from memory.
const LARGE_BYTES: usize = 1 << 26;
/// Read in parts, each timed for itself.
const READ_BYTES: usize = 1 << 28;
const READ_PARTS: usize = 4;
const PROBE_MULTIPLY_ADDS: usize = 20_000_000;

fn main() {
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(0);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("the first pool");
    let threads = rayon::current_num_threads();
    println!("{threads} threads, {}, {COLS} columns; f32 matrices in candle", isa());
    println!(
        "format tokens  rows     time      codes of memory   flops of peak     candle   ratio"
    );
    let memory: Vec<u64> = (0..READ_BYTES as u64 / 8).collect();
    for (format, bits) in [("fp4", 4), ("fp8", 8), ("bf16", 16), ("f32", 32)] {
        for n_tokens in [1, 8, 64, 600] {
            let large_rows = LARGE_BYTES * 8 / bits / COLS;
            let rows = if n_tokens > 8 { 2048 } else { large_rows };
            measure(format, rows, n_tokens, &memory);
        }
    }
}

/// Seconds of one product, and what is to be compared with it.
struct Best {
    product: f64,
    candle: f64,
    bytes_per_s: f64,
    flops: f64,
}

fn measure(format: &str, rows: usize, n_tokens: usize, memory: &[u64]) {
    let linear = matrix(format, rows);
    let x: Vec<f32> = noise(n_tokens * COLS).map(|bits| bits as i32 as f32 * 1e-9).collect();
    let mut out = vec![0.0; n_tokens * rows];
    let candle = {
        let values = noise(rows * COLS).map(|bits| bits as i32 as f32 * 1e-9).collect();
        let weight = Tensor::from_vec(values, (rows, COLS), &Device::Cpu).expect("a matrix");
        let x = Tensor::from_slice(&x, (n_tokens, COLS), &Device::Cpu).expect("a matrix");
        let transposed = weight.t().expect("a matrix");
        move || x.matmul(&transposed).expect("shapes fit")
    };
    let mut best = Best { product: f64::MAX, candle: f64::MAX, bytes_per_s: 0.0, flops: 0.0 };
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        let multiply = || linear.matmul(&x, &mut out).expect("shapes fit");
        best.product = best.product.min(seconds(multiply));
        best.candle = best.candle.min(seconds(|| drop(black_box(candle()))));
        let (bytes_per_s, flops) = limits(memory);
        best.bytes_per_s = best.bytes_per_s.max(bytes_per_s);
        best.flops = best.flops.max(flops);
    }
    let bytes_per_s = linear.bytes() as f64 / best.product;
    let flops = 2.0 * (n_tokens * rows * COLS) as f64 / best.product;
    println!(
        "{format:6} {n_tokens:6} {rows:5} {:8.2} ms {:6.1} GB/s {:5.2} {:7.1} GF/s {:5.2} {:7.1} GF/s {:6.2}x",
        1e3 * best.product,
        bytes_per_s / 1e9,
        bytes_per_s / best.bytes_per_s,
        flops / 1e9,
        flops / best.flops,
        flops / 1e9 * best.product / best.candle,
        best.candle / best.product,
    );
}

/// Bytes per second of reading, and flops per second of multiply-adds in registers, by all threads.
fn limits(memory: &[u64]) -> (f64, f64) {
    let level = Level::best();
    let threads = rayon::current_num_threads();
    let (mut bytes_per_s, mut flops) = (0.0_f64, 0.0_f64);
    for part in memory.chunks(memory.len() / READ_PARTS) {
        let read = seconds(|| {
            let sums = part.par_chunks(1 << 16).map(|part| probe::read(level, part));
            black_box(sums.reduce(|| 0, u64::wrapping_add));
        });
        bytes_per_s = bytes_per_s.max(size_of_val(part) as f64 / read);
        let mut multiply_adds = 0;
        let compute = seconds(|| {
            let each = (0..threads).into_par_iter().with_max_len(1);
            multiply_adds = each.map(|_| probe::multiply_adds(level, PROBE_MULTIPLY_ADDS)).sum();
        });
        flops = flops.max(2.0 * multiply_adds as f64 / compute);
    }
    (bytes_per_s, flops)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Random codes; scales are 1.
fn matrix(format: &str, rows: usize) -> CpuLinear {
    let values = rows * COLS;
    let codes = |bytes: usize| noise(bytes / 4).flat_map(u32::to_le_bytes).collect::<Vec<_>>();
    let data = match format {
        "fp4" => WeightData::Fp4 {
            codes: codes(values / 2).into(),
            scales: vec![127; values / 32].into(),
        },
        "fp8" => WeightData::Fp8 {
            codes: codes(values).into(),
            scales: Scales::Ue8m0(vec![127; values / (128 * 128)].into()),
        },
        "bf16" => WeightData::Bf16(codes(2 * values).into()),
        _ => WeightData::F32(codes(4 * values).into()),
    };
    let source = WeightSource::new(format, rows, COLS, data).expect("whole blocks");
    CpuLinear::new(&source).expect("sound scales")
}

/// xorshift, without the exponents near infinity that would make f32 and bf16 overflow.
fn noise(n: usize) -> impl Iterator<Item = u32> {
    let mut state = 0x2545_f491_u32;
    (0..n).map(move |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state & 0xbfff_bfff
    })
}
