//! Drawn weights, and the ceilings that benches measure.

use std::sync::Arc;

use bytes::Bytes;
use fathom_core::LayerKind;
use fathom_ops::cuda::{CudaOps, Device, Memory};
use fathom_ops::{
    Activations, BLOCK_TOKENS, Backend, CacheSpec, Drawing, HeadOps, IndexKeyFormat, KvFormat,
    Scales, Solo, WeightData, WeightSource,
};

use crate::process::{Emulator, MODES, in_every_mode_on_hopper};

const ROWS: usize = 256;
const COLS: usize = 128;

fn drawing(device: &Arc<dyn Device>, seed: u32) -> CudaOps {
    let memory = Memory::loose(Arc::clone(device)).drawing(Drawing { seed, zipf: false });
    CudaOps::over(memory, Activations::Bf16)
}

/// A matrix whose stored values are zeros, which nobody reads.
fn unread(is_fp8: bool) -> WeightSource {
    let zeros = |n: usize| Bytes::from(vec![0; n]);
    let data = if is_fp8 {
        let scales = Scales::Ue8m0(zeros(ROWS.div_ceil(128) * COLS.div_ceil(128)));
        WeightData::Fp8 { codes: zeros(ROWS * COLS), scales }
    } else {
        WeightData::Bf16(zeros(2 * ROWS * COLS))
    };
    WeightSource::new("matrix", ROWS, COLS, data).unwrap()
}

/// Columns of the matrix, as products with unit vectors.
fn columns(ops: &CudaOps, is_fp8: bool) -> Vec<f32> {
    let matrix = ops.load_linear(&unread(is_fp8)).unwrap();
    let mut units = vec![0.0; 8 * COLS];
    (0..8).for_each(|row| units[row * COLS + 16 * row + row] = 1.0);
    let x = ops.upload(8, COLS, &units).unwrap();
    ops.download(&ops.logits(&matrix, &x, &Solo).unwrap()).unwrap()
}

#[test]
fn drawn_matrices_keep_the_size_of_their_inputs_and_differ_by_seed_and_place() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    for is_fp8 in [false, true] {
        let ops = drawing(&device, 1);
        let (first, second) = (columns(&ops, is_fp8), columns(&ops, is_fp8));
        assert_eq!(first, columns(&drawing(&device, 1), is_fp8), "one seed, one model");
        assert_ne!(first, columns(&drawing(&device, 2), is_fp8));
        assert_ne!(first, second, "every matrix has values of its own");
        let n = first.len() as f32;
        let size = (first.iter().map(|x| x * x).sum::<f32>() / n * COLS as f32).sqrt();
        let mean = first.iter().sum::<f32>() / n * (COLS as f32).sqrt();
        // FP8 scales are powers of two, this one or half of it.
        assert!((0.5..1.4).contains(&size), "FP8 {is_fp8}: {size}");
        assert!(mean.abs() < 0.1, "FP8 {is_fp8}: {mean}");
    }
}

#[test]
fn a_drawn_cache_holds_numbers_everywhere() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    let ops = drawing(&device, 3);
    let spec = CacheSpec {
        layers: vec![LayerKind::Csa],
        n_slots: 1,
        n_blocks: 2,
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv: KvFormat::Fp8,
        index_keys: IndexKeyFormat::Mxfp4,
    };
    let cache = ops.new_cache(&spec).unwrap();
    ops.draw_cache(&cache).unwrap();
    for entry in [0, 1, 2 * BLOCK_TOKENS / 4 - 1] {
        let (row, key) = ops.read_entry(&cache, 0, &[0, 1], entry).unwrap();
        for values in [row, key.unwrap()] {
            let size = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
            assert!((0.3..4.0).contains(&size), "entry {entry}: {size}");
        }
    }
}

#[test]
fn ceilings_are_measured_with_the_fastest_products_of_the_device() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    let ops = CudaOps::new(device, Activations::Fp8Grid);
    assert!(ops.copy_rate(1 << 16).unwrap() > 0.0);
    let (rate, is_fp8) = ops.product_rate(1, 1).unwrap();
    assert!(rate > 0.0 && rate.is_finite() && !is_fp8);
    in_every_mode_on_hopper(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let (rate, is_fp8) = ops.product_rate(1, 1).unwrap();
        assert!(rate > 0.0 && rate.is_finite() && is_fp8);
    });
}
