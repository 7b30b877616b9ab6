//! Copies kept for the MTP block: the device finds what the CPU finds, also in snapshots.

use std::sync::Arc;

use fathom_core::{LayerKind, Numerics};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{Activations, CudaOps};
use fathom_ops::{Batch, CacheSpec, HeadOps, IndexKeyFormat, KvFormat};

use crate::process::in_every_mode;
use crate::weights::Random;

const WIDTH: usize = 64;

fn spec() -> CacheSpec {
    CacheSpec {
        layers: vec![LayerKind::Window],
        n_slots: 3,
        n_blocks: 1,
        n_snapshots: 1,
        spare_rows: 2,
        draft_width: WIDTH,
        kv: KvFormat::Fp8,
        index_keys: IndexKeyFormat::Mxfp4,
    }
}

/// Sequences of (slot, position, tokens).
fn batch(sequences: &[(u32, u32, usize)]) -> Batch {
    let mut batch = Batch::default();
    for &(slot, position, n_tokens) in sequences {
        batch.push(slot, position, &vec![0; n_tokens], &[], false);
    }
    batch
}

/// Keeps the copies of two steps, takes a snapshot and restores it into another slot; returns what
/// is found after each, and the snapshot.
fn found<B: HeadOps>(ops: &B, values: &[f32]) -> (Vec<Vec<f32>>, Vec<u8>) {
    let mut cache = ops.new_cache(&spec()).unwrap();
    // More rows than the ring of ten has, and a ring that wraps.
    let first = batch(&[(2, 0, 3), (0, 113, 14)]);
    let second = batch(&[(0, 127, 1), (2, 3, 2), (1, 7, 1)]);
    let upload =
        |batch: &Batch| ops.upload(batch.n_tokens(), WIDTH, &values[..batch.n_tokens() * WIDTH]);
    let x = upload(&first).unwrap();
    ops.keep_copies(&first, &x, &mut cache).unwrap();
    let y = ops.upload(second.n_tokens(), WIDTH, &values[17 * WIDTH..21 * WIDTH]).unwrap();

    // Some rows are kept, some are in the step that is not kept yet, and one slot has both.
    let wanted = batch(&[(0, 118, 10), (2, 1, 4), (1, 7, 1)]);
    let mut found = vec![ops.kept_copies(&wanted, Some((&second, &y)), &cache).unwrap()];
    ops.keep_copies(&second, &y, &mut cache).unwrap();
    found.push(ops.kept_copies(&wanted, None, &cache).unwrap());

    ops.capture(&mut cache, 0, 128, 0).unwrap();
    ops.restore(&mut cache, 0, 1, 128).unwrap();
    found.push(ops.kept_copies(&batch(&[(1, 127, 1)]), None, &cache).unwrap());
    let found = found.iter().map(|tensor| ops.download(tensor).unwrap()).collect();
    (found, ops.read_snapshot(&cache, 0).unwrap())
}

#[test]
fn copies_are_found_by_position_whether_kept_current_or_restored() {
    let values = Random::new(5).values(21 * WIDTH, 1.0);
    let cpu = found(&CpuOps::new(Numerics::Bf16), &values);
    // The CPU's tensors hold f32: compare the kept ones, which are bf16, with themselves.
    assert_eq!(cpu.0[1][9 * WIDTH..10 * WIDTH], cpu.0[2]);
    assert_eq!(cpu.1.len(), 127 * 584 + 2 * WIDTH);
    in_every_mode(|device| {
        let device = found(&CudaOps::new(Arc::clone(device), Activations::Fp8Grid), &values);
        assert_eq!(device.0[0], device.0[1], "kept copies are the current ones");
        assert_eq!((&device.0[1..], &device.1), (&cpu.0[1..], &cpu.1));
    });
}
