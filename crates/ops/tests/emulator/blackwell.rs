//! The forms for sm_100f: routed experts and FP8 linear layers as block-scaled products.

use std::sync::Arc;

use fathom_core::Numerics;
use fathom_core::num::{e4m3_from_f32, e4m3_to_f32, fp8_block_scale};
use fathom_core::parallel::ExpertShard;
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{
    Activations, Arg, Buffer, CudaOps, Device, Launch, MapElement, Swizzle, TensorMap,
    TensorMapSpec,
};
use fathom_ops::layer::{MoeWeights, Router, SharedExpert};
use fathom_ops::{Backend, Batch, Ops, Scales, Solo, WeightData};

use crate::compare::{BF16_STEP, assert_close};
use crate::process::{in_every_mode_as, weight_buffer};
use crate::weights::Random;

const ARCH: &str = "sm_100f";
const WIDTH: usize = 384;
const CHANNELS: usize = 128;
const EXPERTS: usize = 6;
const TOP_K: usize = 2;
/// No row of the table names expert 0, every one names expert 1.
const TABLE: [[u16; TOP_K]; 3] = [[1, 5], [3, 1], [4, 1]];

fn weights<B: Backend>(ops: &B) -> MoeWeights<B> {
    let mut random = Random::new(8);
    let experts: Vec<_> = (0..EXPERTS)
        .map(|_| {
            let (up, down) = ((CHANNELS, WIDTH), (WIDTH, CHANNELS));
            [up, up, down].map(|(rows, cols)| random.fp4(rows, cols))
        })
        .collect();
    MoeWeights {
        gate: ops.load_linear(&random.bf16(EXPERTS, WIDTH)).unwrap(),
        router: Router::Hash(ops.load_expert_table(TABLE.as_flattened(), TOP_K).unwrap()),
        experts: ops.load_experts(&experts, 0, EXPERTS).unwrap(),
        shard: ExpertShard { experts: 0..EXPERTS, channels: 0..CHANNELS },
        experts_are_slices: false,
        shared: SharedExpert {
            w1: ops.load_linear(&random.fp8(CHANNELS, WIDTH)).unwrap(),
            w3: ops.load_linear(&random.fp8(CHANNELS, WIDTH)).unwrap(),
            w2: ops.load_linear(&random.fp8(WIDTH, CHANNELS)).unwrap(),
            is_slice: false,
        },
        top_k: TOP_K,
        routed_scaling_factor: 1.5,
        swiglu_limit: Some(2.5),
    }
}

/// The layer's output for tokens whose ids cycle through `ids` (rows of the table).
fn run<B: Ops>(ops: &B, values: &[f32], ids: &[u32]) -> Vec<f32> {
    let (weights, n_tokens) = (weights(ops), values.len() / WIDTH);
    let x = ops.upload(n_tokens, WIDTH, values).unwrap();
    let tokens: Vec<u32> = ids.iter().copied().cycle().take(n_tokens).collect();
    let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
    let (_, out) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
    ops.download(&out).unwrap()
}

#[test]
fn experts_agree_with_the_cpu_for_few_tokens_and_for_more_than_an_item_holds() {
    // Expert 1 gets all tokens: several items of it above 128.
    for (n_tokens, ids) in [(1, &[2][..]), (11, &[0, 1, 2]), (135, &[0, 0, 1])] {
        let values = Random::new(n_tokens as u64).values(n_tokens * WIDTH, 1.5);
        let expected = run(&CpuOps::new(Numerics::Bf16), &values, ids);
        in_every_mode_as(ARCH, |device| {
            let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
            for ops in [ops.clone(), ops.with_determinism(true)] {
                let got = run(&ops, &values, ids);
                assert_close("experts", &got, &expected, BF16_STEP);
            }
        });
    }
}

#[test]
fn a_token_has_the_same_bits_on_every_form_of_the_experts() {
    in_every_mode_as(ARCH, |device| {
        // Otherwise the shared expert of few tokens runs the kernels of sm_80.
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid).with_determinism(true);
        let values = Random::new(4).values(34 * WIDTH, 1.5);
        let few = run(&ops, &values[..2 * WIDTH], &[1]);
        assert_eq!(few, run(&ops, &values, &[1])[..2 * WIDTH]);
    });
}

/// Rows and columns of the matrix of the linear tests: ragged tiles, ten blocks of K, the last partial.
const ROWS: usize = 200;
const COLS: usize = 1168;

/// A matrix as the kernels take it, and its values.
struct Matrix {
    _codes: Buffer,
    map: TensorMap,
    scales: Buffer,
    values: Vec<f64>,
}

fn launch(
    device: &Arc<dyn Device>,
    kernel: &'static str,
    grid: [usize; 3],
    threads: u32,
    args: &[Arg],
) {
    let shared_bytes = if threads == 224 { 112 * 1024 } else { 0 };
    let grid = grid.map(|n| n as u32);
    let launch = Launch { kernel, grid, block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

fn matrix(device: &Arc<dyn Device>) -> Matrix {
    let source = Random::new(12).fp8(ROWS, COLS);
    let WeightData::Fp8 { codes, scales: Scales::Ue8m0(bytes) } = &source.data else {
        unreachable!("FP8")
    };
    let n_blocks = COLS.div_ceil(128);
    let scales: Vec<f32> = bytes.iter().map(|&b| 2_f32.powi(i32::from(b) - 127)).collect();
    let value = |(i, &code): (usize, &u8)| {
        let scale = scales[i / COLS / 128 * n_blocks + i % COLS / 128];
        f64::from(e4m3_to_f32(code)) * f64::from(scale)
    };
    let values = codes.iter().enumerate().map(value).collect();
    let codes = weight_buffer(device, codes);
    let map = device
        .encode(&TensorMapSpec {
            element: MapElement::U8,
            address: codes.address(),
            dims: &[COLS as u64, ROWS as u64],
            strides: &[COLS as u64],
            box_dims: &[128, 128],
            swizzle: Swizzle::B128,
        })
        .unwrap();
    let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
    let plain = Buffer::from_bytes(device, &bytes).unwrap();
    let bytes = ROWS.div_ceil(128) * n_blocks * 512;
    let scales = Buffer::new(device, bytes).unwrap().for_weights().unwrap();
    let args = [Arg::from(&plain), Arg::from(&scales)];
    launch(device, "linear_pack_scales100", [n_blocks, ROWS.div_ceil(128), 1], 128, &args);
    Matrix { _codes: codes, map, scales, values }
}

/// The product by `kernel`, which takes `tokens` to a block and clusters of `cluster`.
fn product(
    device: &Arc<dyn Device>,
    w: &Matrix,
    x: &[f32],
    (kernel, tokens, cluster): (&'static str, usize, usize),
) -> Vec<f32> {
    let (rows, n_blocks) = (x.len() / COLS, COLS.div_ceil(128));
    let x_rows = rows.next_multiple_of(8);
    let sizes = |values: &[usize]| values.iter().map(|&n| Arg::U32(n as u32)).collect::<Vec<_>>();
    let bytes: Vec<u8> = x.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    let x = Buffer::from_bytes(device, &bytes).unwrap();
    let codes = Buffer::new(device, n_blocks * x_rows * 128).unwrap();
    let scales = Buffer::new(device, n_blocks * (x_rows + 32) * 16).unwrap();
    let mut args = vec![(&x).into(), Arg::NULL, Arg::NULL, (&codes).into(), (&scales).into()];
    args.extend(sizes(&[COLS, rows, x_rows, 1]));
    launch(device, "act_quant_tiles100", [x_rows.div_ceil(16), n_blocks, 1], 256, &args);
    let out = Buffer::new(device, rows * ROWS * 4).unwrap();
    let mut args = vec![Arg::Map(w.map)];
    args.extend([&w.scales, &codes, &scales, &out].map(Arg::from));
    args.extend(sizes(&[ROWS, COLS, x_rows, rows, ROWS, 1]));
    let grid = [cluster * ROWS.div_ceil(128), rows.div_ceil(tokens), 1];
    launch(device, kernel, grid, 224, &args);
    let bytes = out.read(0, rows * ROWS * 4).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The same in f64, of x on the FP8 grid.
fn exact(w: &Matrix, x: &[f32]) -> Vec<f32> {
    let on_grid = |block: &[f32]| {
        let scale = fp8_block_scale(block.iter().fold(0.0, |m: f32, x| m.max(x.abs()))).to_f32();
        let round = |x: &f32| f64::from(e4m3_to_f32(e4m3_from_f32(x / scale)) * scale);
        block.iter().map(round).collect::<Vec<f64>>()
    };
    let mut out = Vec::new();
    for row in x.chunks(COLS) {
        let grid: Vec<f64> = row.chunks(128).flat_map(on_grid).collect();
        for weights in w.values.chunks(COLS) {
            out.push(weights.iter().zip(&grid).map(|(a, b)| a * b).sum::<f64>() as f32);
        }
    }
    out
}

#[test]
fn linear_layers_of_every_form_are_exact_up_to_their_sums() {
    in_every_mode_as(ARCH, |device| {
        let w = matrix(device);
        let x = Random::new(6).values(133 * COLS, 1.0);
        for (rows, form) in [
            (1, ("linear100_32_c1", 32, 1)),
            (9, ("linear100_32_c4", 32, 4)),
            (35, ("linear100_32_c8", 32, 8)),
            (133, ("linear100_128_c1", 128, 1)),
            (61, ("linear100_128_c8", 128, 8)),
        ] {
            let x = &x[..rows * COLS];
            assert_close(form.0, &product(device, &w, x, form), &exact(&w, x), 1e-6);
        }
    });
}

#[test]
fn linear_layers_have_the_same_bits_for_few_tokens_and_many() {
    in_every_mode_as(ARCH, |device| {
        let w = matrix(device);
        let x = Random::new(7).values(40 * COLS, 1.0);
        for (few, many) in [
            (("linear100_32_c2", 32, 2), ("linear100_128_c2", 128, 2)),
            (("linear100_32_c4", 32, 4), ("linear100_128_c4", 128, 4)),
        ] {
            let some = product(device, &w, &x[..3 * COLS], few);
            assert_eq!(product(device, &w, &x, many)[..3 * ROWS], some);
        }
    });
}
