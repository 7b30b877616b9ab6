//! Random weights and activations, the same for every backend.

use bytes::Bytes;
use fathom_core::num::round_bf16;
use fathom_ops::layer::Norm;
use fathom_ops::{Backend, Scales, WeightData, WeightSource};

/// A small random generator: tests must repeat.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 24) as u32
    }

    pub(crate) fn below(&mut self, limit: u32) -> u32 {
        self.bits() % limit
    }

    /// Between -1 and 1.
    pub(crate) fn unit(&mut self) -> f32 {
        self.bits() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }

    /// `n` bf16 values between `-scale` and `scale`.
    pub(crate) fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| round_bf16(self.unit() * scale)).collect()
    }

    fn bytes(&mut self, n: usize, byte: impl Fn(u32) -> u8) -> Bytes {
        (0..n).map(|_| byte(self.bits())).collect()
    }

    /// An FP8 matrix with values of magnitude about 2^-5.
    pub(crate) fn fp8(&mut self, rows: usize, cols: usize) -> WeightSource {
        // No NaN codes; exponents up to 2^2 before the scale.
        let codes =
            self.bytes(rows * cols, |bits| (bits & 0x80) as u8 | ((bits >> 8) as u8 % 0x48));
        let blocks = rows.div_ceil(128) * cols.div_ceil(128);
        let scales = self.bytes(blocks, |bits| 119 + (bits % 4) as u8);
        let data = WeightData::Fp8 { codes, scales: Scales::Ue8m0(scales) };
        WeightSource::new("fp8", rows, cols, data).unwrap()
    }

    /// An FP4 matrix with values of magnitude about 2^-4.
    pub(crate) fn fp4(&mut self, rows: usize, cols: usize) -> WeightSource {
        let codes = self.bytes(rows * cols / 2, |bits| bits as u8);
        let scales = self.bytes(rows * cols / 32, |bits| 118 + (bits % 6) as u8);
        WeightSource::new("fp4", rows, cols, WeightData::Fp4 { codes, scales }).unwrap()
    }

    pub(crate) fn bf16(&mut self, rows: usize, cols: usize) -> WeightSource {
        let values = self.values(rows * cols, 0.125);
        let bytes = values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        WeightSource::new("bf16", rows, cols, WeightData::Bf16(bytes)).unwrap()
    }

    pub(crate) fn f32(&mut self, rows: usize, cols: usize) -> WeightSource {
        let bytes = (0..rows * cols).flat_map(|_| (self.unit() * 0.05).to_le_bytes()).collect();
        WeightSource::new("f32", rows, cols, WeightData::F32(bytes)).unwrap()
    }

    pub(crate) fn vector<B: Backend>(&mut self, ops: &B, n: usize, middle: f32) -> B::Vector {
        let values: Vec<f32> = (0..n).map(|_| middle + 0.5 * self.unit()).collect();
        ops.load_vector(&values).unwrap()
    }

    pub(crate) fn norm<B: Backend>(&mut self, ops: &B, n: usize) -> Norm<B> {
        Norm { weight: self.vector(ops, n, 1.0), eps: 1e-6 }
    }
}
