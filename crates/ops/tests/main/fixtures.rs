//! Tensors of the nano checkpoint and its unit goldens.

use std::path::PathBuf;

use bytes::Bytes;
use fathom_ops::cpu::CpuLinear;
use fathom_ops::{Scales, WeightData, WeightSource};
use safetensors::{Dtype, SafeTensors};

fn nano() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/nano")
}

/// A safetensors file in memory.
pub(crate) struct File(Vec<u8>);

impl File {
    /// The unit goldens.
    pub(crate) fn units() -> Self {
        Self(std::fs::read(nano().join("goldens/nano_units.safetensors")).unwrap())
    }

    fn parsed(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    /// Raw bytes of a tensor.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        self.parsed().tensor(name).unwrap().data().to_vec()
    }

    /// Values of an F32 or BF16 tensor.
    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        let file = self.parsed();
        let tensor = file.tensor(name).unwrap();
        to_f32(tensor.dtype(), tensor.data())
    }

    /// Values of an I32 or I64 tensor.
    pub(crate) fn integers(&self, name: &str) -> Vec<i64> {
        let file = self.parsed();
        let tensor = file.tensor(name).unwrap();
        match tensor.dtype() {
            Dtype::I32 => chunks(tensor.data(), |b| i64::from(i32::from_le_bytes(b))),
            Dtype::I64 => chunks(tensor.data(), i64::from_le_bytes),
            other => panic!("{name} is {other:?}"),
        }
    }
}

fn chunks<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| convert(*b)).collect()
}

fn to_f32(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => chunks(data, f32::from_le_bytes),
        Dtype::BF16 => chunks(data, |b| half::bf16::from_le_bytes(b).to_f32()),
        other => panic!("{other:?} has no plain values"),
    }
}

/// The checkpoint's tensors.
pub(crate) struct Nano(Vec<File>);

impl Nano {
    pub(crate) fn open() -> Self {
        let shard = |i| nano().join(format!("model-0000{i}-of-00003.safetensors"));
        Self((1..=3).map(|i| File(std::fs::read(shard(i)).unwrap())).collect())
    }

    fn file(&self, name: &str) -> &File {
        self.0.iter().find(|file| file.parsed().tensor(name).is_ok()).unwrap()
    }

    /// A plain vector or matrix, row-major.
    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.file(name).values(name)
    }

    /// Integers of `tid2eid`.
    pub(crate) fn integers(&self, name: &str) -> Vec<i64> {
        self.file(name).integers(name)
    }

    /// A matrix as the loader would describe it; `name` without `.weight`.
    pub(crate) fn source(&self, name: &str) -> WeightSource {
        let full = format!("{name}.weight");
        let (name, file) = match self.0.iter().any(|f| f.parsed().tensor(&full).is_ok()) {
            true => (full.as_str(), self.file(&full)),
            false => (name, self.file(name)),
        };
        let parsed = file.parsed();
        let tensor = parsed.tensor(name).unwrap();
        let codes = Bytes::copy_from_slice(tensor.data());
        let (rows, mut cols) = (tensor.shape()[0], tensor.shape()[1]);
        let scales = || {
            let scale = name.replace(".weight", ".scale");
            Bytes::from(self.file(&scale).bytes(&scale))
        };
        let data = match tensor.dtype() {
            Dtype::F8_E4M3 => WeightData::Fp8 { codes, scales: Scales::Ue8m0(scales()) },
            Dtype::I8 => {
                cols *= 2;
                WeightData::Fp4 { codes, scales: scales() }
            }
            Dtype::BF16 => WeightData::Bf16(codes),
            Dtype::F32 => WeightData::F32(codes),
            other => panic!("{name} is {other:?}"),
        };
        WeightSource::new(name, rows, cols, data).unwrap()
    }

    pub(crate) fn linear(&self, name: &str) -> CpuLinear {
        CpuLinear::new(&self.source(name)).unwrap()
    }
}

/// `|a - b| / |b|`.
pub(crate) fn rel_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let distance: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (distance / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}
