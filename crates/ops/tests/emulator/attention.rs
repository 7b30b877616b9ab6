//! A layer's attention over several steps: projections, compressors, indexer, sparse attention.
//!
//! Every operator gets the CPU's inputs, so that a difference shows where it arises. The cache is
//! compared byte for byte after every step; the two may differ only where a norm or an exponential
//! rounds otherwise.

use std::sync::Arc;

use fathom_core::model_config::HEAD_DIM;
use fathom_core::{LayerKind, Numerics};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{Activations, CudaOps, Device};
use fathom_ops::layer::{AttentionWeights, CompressorWeights, IndexerWeights};
use fathom_ops::traits::{Projected, Queries};
use fathom_ops::{AttentionOps, Backend, Batch, CacheSpec, IndexKeyFormat, KvFormat, Solo};

use crate::compare::{BF16_STEP, assert_close, max_error};
use crate::process::{in_every_mode, in_every_mode_as, in_every_mode_on_hopper};
use crate::weights::Random;

const WIDTH: usize = 256;
const RANK: usize = 128;
const HEADS: usize = 6;
const GROUPS: usize = 2;
/// Rows of a group of `wo_a`.
const GROUP_RANK: usize = 128;
const INDEX_HEADS: usize = 8;
const TOP_K: usize = 16;

fn spec(kind: LayerKind) -> CacheSpec {
    CacheSpec {
        layers: vec![kind],
        n_slots: 3,
        n_blocks: 4,
        n_snapshots: 2,
        spare_rows: 3,
        draft_width: 0,
        kv: KvFormat::Fp8,
        index_keys: IndexKeyFormat::Mxfp4,
    }
}

fn compressor<B: Backend>(
    ops: &B,
    random: &mut Random,
    kind: LayerKind,
    width: usize,
) -> CompressorWeights<B> {
    let rows = kind.compressor_width() * width;
    CompressorWeights {
        width,
        wkv: ops.load_linear(&random.bf16(rows, WIDTH)).unwrap(),
        wgate: ops.load_linear(&random.bf16(rows, WIDTH)).unwrap(),
        ape: random.vector(ops, kind.ratio() * rows, 0.0),
        norm: random.norm(ops, width),
    }
}

fn weights<B: Backend>(ops: &B, kind: LayerKind) -> AttentionWeights<B> {
    let mut random = Random::new(9);
    let frequencies: Vec<f32> = (0..32).map(|i| 10_000_f32.powf(-2.0 * i as f32 / 64.0)).collect();
    let compresses = kind != LayerKind::Window;
    AttentionWeights {
        kind,
        n_heads: HEADS,
        n_groups: GROUPS,
        wq_a: ops.load_linear(&random.fp8(RANK, WIDTH)).unwrap(),
        q_norm: random.norm(ops, RANK),
        wq_b: ops.load_linear(&random.fp8(HEADS * HEAD_DIM, RANK)).unwrap(),
        wkv: ops.load_linear(&random.fp8(HEAD_DIM, WIDTH)).unwrap(),
        kv_norm: random.norm(ops, HEAD_DIM),
        wo_a: ops.load_linear(&random.fp8(GROUPS * GROUP_RANK, HEADS / GROUPS * HEAD_DIM)).unwrap(),
        wo_b: ops.load_linear(&random.fp8(WIDTH, GROUPS * GROUP_RANK)).unwrap(),
        attn_sink: random.vector(ops, HEADS, 0.0),
        rope: ops.load_vector(&frequencies).unwrap(),
        compressor: compresses.then(|| compressor(ops, &mut random, kind, HEAD_DIM)),
        indexer: kind.has_indexer().then(|| IndexerWeights {
            n_heads: INDEX_HEADS,
            top_k: TOP_K,
            wq_b: ops.load_linear(&random.fp8(INDEX_HEADS * 128, RANK)).unwrap(),
            weights_proj: ops.load_linear(&random.bf16(INDEX_HEADS, WIDTH)).unwrap(),
            compressor: compressor(ops, &mut random, kind, 128),
        }),
    }
}

/// A backend with one layer's weights and cache.
struct Side<B: Backend> {
    ops: B,
    weights: AttentionWeights<B>,
    cache: B::Cache,
}

impl<B: Backend> Side<B> {
    fn new(ops: B, kind: LayerKind) -> Self {
        let (weights, cache) = (weights(&ops, kind), ops.new_cache(&spec(kind)).unwrap());
        Self { ops, weights, cache }
    }
}

/// The CPU's tensors on the device; f32 where the operators exchange f32.
struct Pair {
    cpu: Side<CpuOps>,
    device: Side<CudaOps>,
}

impl Pair {
    fn new(device: &Arc<dyn Device>, kind: LayerKind) -> Self {
        // Few tokens are divided into splits of one block of keys, or of four in deterministic mode.
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid)
            .with_determinism(kind == LayerKind::Hca);
        Self { cpu: Side::new(CpuOps::new(Numerics::Bf16), kind), device: Side::new(ops, kind) }
    }

    fn check(
        &self,
        what: &str,
        got: &<CudaOps as Backend>::Tensor,
        expected: &<CpuOps as Backend>::Tensor,
        limit: f32,
    ) {
        let got = self.device.ops.download(got).unwrap();
        assert_close(what, &got, &self.cpu.ops.download(expected).unwrap(), limit);
    }

    /// Runs a step on both sides and compares every operator.
    fn step(&mut self, batch: &Batch, seed: u64) {
        let (cpu, device) = (self.cpu.ops, self.device.ops.clone());
        let n_tokens = batch.n_tokens();
        batch.validate(3, 4, 1).unwrap();
        let x = Random::new(seed).values(n_tokens * WIDTH, 2.0);
        let (cpu_step, step) = (batch.clone(), device.prepare_step(batch).unwrap());
        let cpu_x = cpu.upload(n_tokens, WIDTH, &x).unwrap();
        let device_x = device.upload(n_tokens, WIDTH, &x).unwrap();
        let to_device = |tensor: &<CpuOps as Backend>::Tensor| {
            device.upload(tensor.rows, tensor.cols, &tensor.data).unwrap()
        };

        let expected = cpu.attn_project(&self.cpu.weights, &cpu_x).unwrap();
        let got = device.attn_project(&self.device.weights, &device_x).unwrap();
        self.check("qr", &got.qr, &expected.qr, BF16_STEP);
        self.check("kv", &got.kv, &expected.kv, BF16_STEP);
        for (got, expected) in [
            (&got.compressor, &expected.compressor),
            (&got.index_compressor, &expected.index_compressor),
        ] {
            for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                self.check("compressor input", got, expected, 1e-5);
            }
        }
        // f32 compressor inputs cannot be uploaded; the device goes on with its own.
        let projected = Projected {
            qr: to_device(&expected.qr),
            kv: to_device(&expected.kv),
            index_weights: expected.index_weights.as_ref().map(to_device),
            compressor: got.compressor,
            index_compressor: got.index_compressor,
        };

        let queries = cpu.attn_queries(&self.cpu.weights, &expected, &cpu_step).unwrap();
        let got = device.attn_queries(&self.device.weights, &projected, &step).unwrap();
        self.check("q", &got.q, &queries.q, 2.0 * BF16_STEP);
        if let (Some(got), Some(expected)) = (&got.index, &queries.index) {
            // A sum in another order may move a value to the next point of the FP4 grid.
            let got = device.download(got).unwrap();
            let wrong = got.iter().zip(&expected.data).filter(|(a, b)| a != b).count();
            assert!(wrong * 50 <= got.len(), "{wrong} of {} index query values", got.len());
        }
        let device_queries =
            Queries { q: to_device(&queries.q), index: queries.index.as_ref().map(to_device) };

        let (cpu_side, device_side) = (&mut self.cpu, &mut self.device);
        let kv = cpu
            .attn_store(&cpu_side.weights, &expected, &cpu_step, &mut cpu_side.cache, 0)
            .unwrap();
        let got = device
            .attn_store(&device_side.weights, &projected, &step, &mut device_side.cache, 0)
            .unwrap();
        assert_close("stored kv", &device.download(&got).unwrap(), &kv.data, 1.0 / 16.0);

        let selection = device_side.weights.indexer.is_some().then(|| {
            let expected = cpu
                .index_select(&cpu_side.weights, &queries, &expected, &cpu_step, &cpu_side.cache, 0)
                .unwrap();
            let got = device
                .index_select(
                    &device_side.weights,
                    &device_queries,
                    &projected,
                    &step,
                    &device_side.cache,
                    0,
                )
                .unwrap();
            let (got_rows, rows) =
                (device.read_selection(&got).unwrap(), cpu.read_selection(&expected).unwrap());
            for (got, expected) in got_rows.iter().zip(&rows) {
                assert_eq!(got.len(), expected.len());
                assert!(got.is_sorted_by(|a, b| a < b), "{got:?}");
                let missing = expected.iter().filter(|entry| !got.contains(entry)).count();
                assert!(missing <= 1, "{got:?} {expected:?}");
            }
            (expected, got, got_rows == rows)
        });
        let o = cpu
            .attend(
                &cpu_side.weights,
                &queries,
                &kv,
                selection.as_ref().map(|s| &s.0),
                &cpu_step,
                &mut cpu_side.cache,
                0,
            )
            .unwrap();
        let got = device
            .attend(
                &device_side.weights,
                &device_queries,
                &to_device(&kv),
                selection.as_ref().map(|s| &s.1),
                &step,
                &mut device_side.cache,
                0,
            )
            .unwrap();
        if selection.is_none_or(|s| s.2) {
            self.check("o", &got, &o, 2.0 * BF16_STEP);
        }
        let y = cpu.attn_output(&self.cpu.weights, &o, &Solo).unwrap();
        let got = device.attn_output(&self.device.weights, &to_device(&o), &Solo).unwrap();
        self.check("y", &got, &y, BF16_STEP);
    }

    /// Compressed entries `0..n` of a sequence on both sides.
    fn check_entries(&self, blocks: &[u32], n: usize) {
        for entry in 0..n {
            let (expected, key) =
                self.cpu.ops.read_entry(&self.cpu.cache, 0, blocks, entry).unwrap();
            let (got, got_key) =
                self.device.ops.read_entry(&self.device.cache, 0, blocks, entry).unwrap();
            assert_close("entry", &got, &expected, 1.0 / 16.0);
            if let (Some(got), Some(expected)) = (got_key, key) {
                assert!(max_error(&got, &expected) <= 0.5, "{got:?} {expected:?}");
                let wrong = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert!(wrong <= 8, "{wrong} values of key {entry}");
            }
        }
    }

    /// Runs positions up to 128 of slot 1 on the CPU, then hands its state to the device.
    fn resume_at_128(&mut self, blocks: &[u32]) {
        let cpu = self.cpu.ops;
        let batch = Batch::single(1, 0, &[0; 128], blocks);
        let x = Random::new(77).values(128 * WIDTH, 2.0);
        let x = cpu.upload(128, WIDTH, &x).unwrap();
        let side = &mut self.cpu;
        let projected = cpu.attn_project(&side.weights, &x).unwrap();
        let kv = cpu.attn_store(&side.weights, &projected, &batch, &mut side.cache, 0).unwrap();
        // Only the window rows matter here; few heads would do as well as all.
        let queries = cpu.attn_queries(&side.weights, &projected, &batch).unwrap();
        let selection = side.weights.indexer.is_some().then(|| {
            cpu.index_select(&side.weights, &queries, &projected, &batch, &side.cache, 0).unwrap()
        });
        cpu.attend(&side.weights, &queries, &kv, selection.as_ref(), &batch, &mut side.cache, 0)
            .unwrap();
        cpu.capture(&mut side.cache, 1, 128, 0).unwrap();
        let snapshot = cpu.read_snapshot(&side.cache, 0).unwrap();
        let device = self.device.ops.clone();
        let cache = &mut self.device.cache;
        device.write_snapshot(cache, 1, &snapshot).unwrap();
        device.restore(cache, 1, 1, 128).unwrap();
        device.capture(cache, 1, 128, 0).unwrap();
        assert_eq!(device.read_snapshot(cache, 0).unwrap(), snapshot);
        for &block in blocks {
            let bytes = cpu.read_block(&self.cpu.cache, block).unwrap();
            device.write_block(cache, block, &bytes).unwrap();
            assert_eq!(device.read_block(cache, block).unwrap(), bytes);
        }
    }
}

/// A short prompt in two pieces, then one token; beside it another sequence.
fn from_the_start(device: &Arc<dyn Device>, kind: LayerKind) {
    let mut pair = Pair::new(device, kind);
    let mut batch = Batch::default();
    batch.push(2, 0, &[0; 5], &[3], true);
    pair.step(&batch, 1);
    let mut batch = Batch::default();
    batch.push(0, 0, &[0; 2], &[1], true);
    batch.push(2, 5, &[0; 4], &[3], true);
    pair.step(&batch, 2);
    let mut batch = Batch::default();
    batch.push(2, 9, &[0; 1], &[3], true);
    pair.step(&batch, 3);
    pair.check_entries(&[3], kind.n_entries(10));
}

/// Onwards from position 128: the window is full and wraps, entries compete.
fn from_128(device: &Arc<dyn Device>, kind: LayerKind) {
    let mut pair = Pair::new(device, kind);
    pair.resume_at_128(&[2]);
    for (position, n_tokens) in [(128, 3), (131, 1), (132, 1)] {
        pair.step(&Batch::single(1, position, &vec![0; n_tokens], &[2]), u64::from(position));
    }
    pair.check_entries(&[2], kind.n_entries(133));
}

#[test]
fn window_layers_agree_with_the_cpu() {
    in_every_mode(|device| {
        from_the_start(device, LayerKind::Window);
        from_128(device, LayerKind::Window);
    });
}

#[test]
fn ratio_4_layers_agree_with_the_cpu() {
    in_every_mode(|device| {
        from_the_start(device, LayerKind::Csa);
        from_128(device, LayerKind::Csa);
    });
}

#[test]
fn ratio_128_layers_agree_with_the_cpu() {
    in_every_mode(|device| {
        from_the_start(device, LayerKind::Hca);
        from_128(device, LayerKind::Hca);
    });
}

#[test]
fn ratio_4_layers_agree_with_the_cpu_on_hopper() {
    in_every_mode_on_hopper(|device| from_128(device, LayerKind::Csa));
}

#[test]
fn layers_agree_with_the_cpu_on_blackwell() {
    in_every_mode_as("sm_100f", |device| {
        from_the_start(device, LayerKind::Window);
        from_128(device, LayerKind::Csa);
    });
}

#[test]
fn more_tokens_than_few_agree_with_the_cpu_before_and_behind_attention_on_blackwell() {
    // Both have forms of their own above eight tokens: five matrices of one input, and two groups.
    const N: usize = 20;
    let cpu = CpuOps::new(Numerics::Bf16);
    let cpu_weights = weights(&cpu, LayerKind::Csa);
    let o = Random::new(5).values(N * HEADS * HEAD_DIM, 1.0);
    let cpu_o = cpu.upload(N, HEADS * HEAD_DIM, &o).unwrap();
    let x = &o[..N * WIDTH];
    let cpu_x = cpu.upload(N, WIDTH, x).unwrap();
    let y = cpu.attn_output(&cpu_weights, &cpu_o, &Solo).unwrap();
    let projected = cpu.attn_project(&cpu_weights, &cpu_x).unwrap();
    in_every_mode_as("sm_100f", |device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let weights = weights(&ops, LayerKind::Csa);
        let device_o = ops.upload(N, HEADS * HEAD_DIM, &o).unwrap();
        let got = ops.attn_output(&weights, &device_o, &Solo).unwrap();
        assert_close("y", &ops.download(&got).unwrap(), &y.data, BF16_STEP);
        let got = ops.attn_project(&weights, &ops.upload(N, WIDTH, x).unwrap()).unwrap();
        let products = [
            (&got.compressor, &projected.compressor),
            (&got.index_compressor, &projected.index_compressor),
        ];
        for (got, expected) in products {
            for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                assert_close("product", &ops.download(got).unwrap(), &expected.data, 2e-6);
            }
        }
        let (got, expected) = (got.index_weights.unwrap(), projected.index_weights.as_ref());
        let got = ops.download(&got).unwrap();
        assert_close("index weights", &got, &expected.unwrap().data, BF16_STEP);
    });
}

#[test]
fn ratio_128_layers_agree_with_the_cpu_on_hopper() {
    in_every_mode_on_hopper(|device| from_128(device, LayerKind::Hca));
}
