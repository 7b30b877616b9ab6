//! Random weights and activations: the same for every backend, and for every run of a seed.

use bytes::Bytes;
use fathom_core::num::round_bf16;

use crate::layer::Norm;
use crate::{Backend, OpError, Scales, WeightData, WeightSource};

/// A small random generator.
#[derive(Debug, Clone)]
pub(super) struct Random {
    state: u64,
    /// Whether bytes of matrices are zeros.
    is_hollow: bool,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, is_hollow: false }
    }

    /// The same whose matrices cost nothing and hold nothing but their shapes: for memory that draws.
    pub(super) fn hollow(seed: u64) -> Self {
        Self { is_hollow: true, ..Self::new(seed) }
    }

    pub(super) fn bits(&mut self) -> u32 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 24) as u32
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.bits() as usize % limit
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        self.bits() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }

    /// `n` bf16 values between `-scale` and `scale`.
    pub(super) fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| round_bf16(self.unit() * scale)).collect()
    }

    /// `n` different numbers below `limit`, or all of them, ascending.
    pub(super) fn some_of(&mut self, limit: usize, n: usize) -> Vec<usize> {
        if limit <= n {
            return (0..limit).collect();
        }
        let mut chosen = std::collections::BTreeSet::from([0, limit - 1]);
        while chosen.len() < n {
            chosen.insert(self.below(limit));
        }
        chosen.into_iter().collect()
    }

    fn bytes(&mut self, n: usize, byte: impl Fn(u32) -> u8) -> Bytes {
        if self.is_hollow {
            return vec![0; n].into();
        }
        (0..n).map(|_| byte(self.bits())).collect()
    }

    /// An FP8 matrix whose products keep the size of their inputs.
    pub(super) fn fp8(&mut self, rows: usize, cols: usize) -> Result<WeightSource, OpError> {
        // No NaN codes; exponents up to 2^2 before the scale.
        let codes =
            self.bytes(rows * cols, |bits| (bits & 0x80) as u8 | ((bits >> 8) as u8 % 0x48));
        let shift = cols.ilog2() as u8 / 2;
        let blocks = rows.div_ceil(128) * cols.div_ceil(128);
        let scales = self.bytes(blocks, |bits| 125 - shift + (bits % 4) as u8);
        let data = WeightData::Fp8 { codes, scales: Scales::Ue8m0(scales) };
        WeightSource::new("fp8", rows, cols, data)
    }

    /// The same with f32 scales that are no powers of two.
    pub(super) fn fp8_f32(&mut self, rows: usize, cols: usize) -> Result<WeightSource, OpError> {
        let mut source = self.fp8(rows, cols)?;
        let scale = (cols as f32).sqrt().recip();
        let blocks = rows.div_ceil(128) * cols.div_ceil(128);
        let scales =
            (0..blocks).flat_map(|_| ((1.5 + self.unit()) * scale).to_le_bytes()).collect();
        if let WeightData::Fp8 { scales: stored, .. } = &mut source.data {
            *stored = Scales::F32(scales);
        }
        Ok(source)
    }

    pub(super) fn fp4(&mut self, rows: usize, cols: usize) -> Result<WeightSource, OpError> {
        let codes = self.bytes(rows * cols / 2, |bits| bits as u8);
        let shift = cols.ilog2() as u8 / 2;
        let scales = self.bytes(rows * cols / 32, |bits| 124 - shift + (bits % 6) as u8);
        WeightSource::new("fp4", rows, cols, WeightData::Fp4 { codes, scales })
    }

    pub(super) fn bf16(&mut self, rows: usize, cols: usize) -> Result<WeightSource, OpError> {
        let scale = 2.0 / (cols as f32).sqrt();
        let bytes = if self.is_hollow {
            vec![0; 2 * rows * cols].into()
        } else {
            let values = self.values(rows * cols, scale);
            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
        };
        WeightSource::new("bf16", rows, cols, WeightData::Bf16(bytes))
    }

    pub(super) fn f32(&mut self, rows: usize, cols: usize) -> Result<WeightSource, OpError> {
        let scale = 2.0 / (cols as f32).sqrt();
        let bytes = if self.is_hollow {
            vec![0; 4 * rows * cols].into()
        } else {
            (0..rows * cols).flat_map(|_| (self.unit() * scale).to_le_bytes()).collect()
        };
        WeightSource::new("f32", rows, cols, WeightData::F32(bytes))
    }

    pub(super) fn vector<B: Backend>(
        &mut self,
        ops: &B,
        n: usize,
        middle: f32,
    ) -> Result<B::Vector, OpError> {
        ops.load_vector(&self.numbers(n, middle))
    }

    /// `n` f32 values around `middle`.
    pub(super) fn numbers(&mut self, n: usize, middle: f32) -> Vec<f32> {
        (0..n).map(|_| middle + 0.5 * self.unit()).collect()
    }

    pub(super) fn norm<B: Backend>(&mut self, ops: &B, n: usize) -> Result<Norm<B>, OpError> {
        Ok(Norm { weight: self.vector(ops, n, 1.0)?, eps: 1e-6 })
    }
}
