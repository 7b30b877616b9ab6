//! The forms for sm_90a: routed experts and FP8 linear layers on tensor cores in FP8.

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
use fathom_ops::{Backend, Batch, MoeOps, Ops, Scales, Solo, WeightData, WeightSource};

use crate::compare::{BF16_STEP, assert_close};
use crate::process::{in_every_mode_on_hopper, weight_buffer};
use crate::weights::Random;

const WIDTH: usize = 384;
const CHANNELS: usize = 128;
const EXPERTS: usize = 10;
const TOP_K: usize = 3;
/// No row of the table names expert 0, every one names expert 1.
const TABLE: [[u16; TOP_K]; 4] = [[1, 5, 2], [3, 1, 9], [4, 7, 1], [8, 1, 6]];

/// The scales of the matrix's groups of 32 spread over 2^15.
fn widened(source: WeightSource) -> WeightSource {
    let WeightData::Fp4 { codes, scales } = source.data else { unreachable!("FP4") };
    let scales = scales.iter().enumerate().map(|(i, &byte)| byte - 15 * (i % 2) as u8).collect();
    WeightSource { data: WeightData::Fp4 { codes, scales }, ..source }
}

fn weights<B: Backend>(ops: &B, is_wide: bool) -> MoeWeights<B> {
    let mut random = Random::new(8);
    let mut matrix = |rows, cols| {
        let matrix = random.fp4(rows, cols);
        if is_wide { widened(matrix) } else { matrix }
    };
    let experts: Vec<_> = (0..EXPERTS)
        .map(|_| [matrix(CHANNELS, WIDTH), matrix(CHANNELS, WIDTH), matrix(WIDTH, CHANNELS)])
        .collect();
    let mut random = Random::new(9);
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
fn run<B: Ops>(ops: &B, n_tokens: usize, ids: &[u32], is_wide: bool) -> Vec<f32> {
    let weights = weights(ops, is_wide);
    let values = Random::new(n_tokens as u64).values(n_tokens * WIDTH, 1.5);
    let x = ops.upload(n_tokens, WIDTH, &values).unwrap();
    let tokens: Vec<u32> = ids.iter().copied().cycle().take(n_tokens).collect();
    let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
    let (_, out) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
    ops.download(&out).unwrap()
}

fn compare(n_tokens: usize, ids: &[u32], is_wide: bool) {
    let expected = run(&CpuOps::new(Numerics::Bf16), n_tokens, ids, is_wide);
    in_every_mode_on_hopper(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let got = run(&ops, n_tokens, ids, is_wide);
        assert_close("experts", &got, &expected, BF16_STEP);
    });
}

#[test]
fn experts_of_few_tokens_agree_with_the_cpu() {
    compare(1, &[2], false);
    compare(7, &[0, 1, 2, 3], false);
}

#[test]
fn experts_with_ragged_numbers_of_tokens_agree_with_the_cpu() {
    // Expert 1 gets all 21 tokens, expert 0 none, the others 5 or 6.
    compare(21, &[0, 1, 2, 3], false);
}

#[test]
fn an_expert_with_more_tokens_than_an_item_holds_agrees_with_the_cpu() {
    compare(135, &[0, 0, 1], false);
}

#[test]
fn experts_whose_scales_cannot_be_folded_agree_with_the_cpu() {
    compare(3, &[0, 3], true);
    compare(40, &[1, 2], true);
}

#[test]
fn a_token_has_the_same_bits_however_many_others_are_in_the_step() {
    in_every_mode_on_hopper(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let weights = weights(&ops, false);
        let values = Random::new(4).values(20 * WIDTH, 1.5);
        let outputs: Vec<Vec<f32>> = [2, 20]
            .map(|n_tokens: usize| {
                let x = ops.upload(n_tokens, WIDTH, &values[..n_tokens * WIDTH]).unwrap();
                let batch = Batch::single(0, 0, &vec![3; n_tokens], &[0]);
                let step = ops.prepare_step(&batch).unwrap();
                let (_, out) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
                ops.download(&out).unwrap()
            })
            .into();
        assert_eq!(outputs[0], outputs[1][..2 * WIDTH]);
    });
}

/// Rows and columns of the matrix of the linear tests: ragged tiles, five blocks of K.
const ROWS: usize = 144;
const COLS: usize = 528;

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
    grid: [u32; 3],
    threads: u32,
    args: &[Arg],
) {
    let shared_bytes = if threads == 384 { 225 * 1024 } else { 0 };
    let launch = Launch { kernel, grid, block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

fn sizes<const N: usize>(values: [usize; N]) -> [Arg; N] {
    values.map(|value| Arg::U32(value as u32))
}

fn matrix(device: &Arc<dyn Device>) -> Matrix {
    let mut random = Random::new(12);
    let source = random.fp8(ROWS, COLS);
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
            box_dims: &[128, 64],
            swizzle: Swizzle::B128,
        })
        .unwrap();
    let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
    Matrix { _codes: codes, map, scales: weight_buffer(device, &bytes), values }
}

/// The product by `kernel`, which takes `tokens` to a block and clusters of `cluster`.
fn product(
    device: &Arc<dyn Device>,
    w: &Matrix,
    x: &[f32],
    kernel: &'static str,
    tokens: usize,
    cluster: usize,
) -> Vec<f32> {
    let (rows, n_blocks, n_tiles) = (x.len() / COLS, COLS.div_ceil(128), ROWS.div_ceil(64));
    let x_rows = rows.next_multiple_of(8);
    let bytes: Vec<u8> = x.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    let x = Buffer::from_bytes(device, &bytes).unwrap();
    let codes = Buffer::new(device, n_blocks * x_rows * 128).unwrap();
    let scales = Buffer::new(device, n_blocks * x_rows * 4).unwrap();
    if tokens > 8 {
        let mut args = vec![(&x).into(), Arg::NULL, Arg::NULL, (&codes).into(), (&scales).into()];
        args.extend(sizes([COLS, rows, x_rows, 1]));
        let grid = [x_rows.div_ceil(16) as u32, n_blocks as u32, 1];
        launch(device, "act_quant_tiles", grid, 256, &args);
    }
    let out = Buffer::new(device, rows * ROWS * 4).unwrap();
    let mut args = vec![Arg::Map(w.map)];
    args.extend([&w.scales, &x, &codes, &scales, &out].map(Arg::from));
    args.extend(sizes([ROWS, COLS, COLS, x_rows, rows, ROWS, 1, 2 * cluster]));
    let blocks = if tokens == 128 { n_tiles.div_ceil(2) } else { cluster * n_tiles };
    let grid = [blocks as u32, rows.div_ceil(tokens) as u32, 1];
    launch(device, kernel, grid, 384, &args);
    let bytes = out.read(0, rows * ROWS * 4).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The same in f64, of x on the FP8 grid.
fn exact(w: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for row in x.chunks(COLS) {
        let grid: Vec<f64> = row
            .chunks(128)
            .flat_map(|block| {
                let scale = fp8_block_scale(block.iter().fold(0.0, |m: f32, x| m.max(x.abs())));
                let scale = scale.to_f32();
                block.iter().map(move |x| f64::from(e4m3_to_f32(e4m3_from_f32(x / scale)) * scale))
            })
            .collect();
        for weights in w.values.chunks(COLS) {
            out.push(weights.iter().zip(&grid).map(|(a, b)| a * b).sum::<f64>() as f32);
        }
    }
    out
}

#[test]
fn linear_layers_of_every_form_are_exact_up_to_their_sums() {
    in_every_mode_on_hopper(|device| {
        let w = matrix(device);
        let x = Random::new(6).values(133 * COLS, 1.0);
        for (kernel, rows, tokens, cluster) in [
            ("linear90_8_c1", 5, 8, 1),
            ("linear90_8_c4", 8, 8, 4),
            ("linear90_64_c1", 70, 64, 1),
            ("linear90_64_c2", 33, 64, 2),
            ("linear90_128", 133, 128, 2),
        ] {
            let x = &x[..rows * COLS];
            let got = product(device, &w, x, kernel, tokens, cluster);
            assert_close(kernel, &got, &exact(&w, x), 1e-6);
        }
    });
}

#[test]
fn linear_layers_have_the_same_bits_in_every_form() {
    in_every_mode_on_hopper(|device| {
        let w = matrix(device);
        let x = Random::new(7).values(8 * COLS, 1.0);
        for (cluster, few, some) in
            [(1, "linear90_8_c1", "linear90_64_c1"), (2, "linear90_8_c2", "linear90_64_c2")]
        {
            let expected = product(device, &w, &x, few, 8, cluster);
            assert_eq!(product(device, &w, &x, some, 64, cluster), expected);
            assert_eq!(product(device, &w, &x, "linear90_128", 128, cluster), expected);
        }
    });
}

/// The numbers of the `k` highest scores, ascending; of equal ones the lower.
fn highest(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

#[test]
fn a_cluster_selects_the_highest_scores_and_the_lower_of_equal_ones() {
    const K: usize = 96;
    // More than a round of each block, little more than K, and no more than K.
    let n_entries = [4500, 97, 40];
    in_every_mode_on_hopper(|device| {
        let mut random = Random::new(2);
        // Few different values: many are equal.
        let scores: Vec<f32> =
            (0..3 * n_entries[0]).map(|_| (random.unit() * 40.0).round()).collect();
        let bytes: Vec<u8> = scores.iter().flat_map(|x| x.to_le_bytes()).collect();
        let positions = n_entries.map(|n| (4 * n as u32 + 1).to_le_bytes());
        let scores_in = Buffer::from_bytes(device, &bytes).unwrap();
        let positions = Buffer::from_bytes(device, positions.as_flattened()).unwrap();
        let chosen = Buffer::new(device, 3 * K * 4).unwrap();
        let counts = Buffer::new(device, 3 * 4).unwrap();
        let mut args: Vec<Arg> =
            [&scores_in, &positions, &chosen, &counts].into_iter().map(Arg::from).collect();
        args.extend(sizes([n_entries[0], K]));
        let (kernel, shared_bytes) = ("index_top_k90", 20 * 1024);
        let launch =
            Launch { kernel, grid: [24, 1, 1], block: [512, 1, 1], shared_bytes, args: &args };
        // SAFETY: the emulator checks every access itself.
        unsafe { device.launch(launch) }.unwrap();
        for (token, &n) in n_entries.iter().enumerate() {
            let expected = highest(&scores[token * n_entries[0]..][..n], K);
            let count = counts.read(4 * token, 4).unwrap();
            assert_eq!(count, (expected.len() as u32).to_le_bytes());
            let bytes = chosen.read(4 * token * K, 4 * expected.len()).unwrap();
            let got: Vec<u32> =
                bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            assert_eq!(got, expected, "{n} entries");
        }
    });
}

/// `x W^T` of a bf16 matrix in f32, of `rows` rows.
fn bf16_product<B: Ops>(ops: &B, rows: usize, x: &[f32]) -> Vec<f32> {
    let w = ops.load_linear(&Random::new(3).bf16(rows, COLS)).unwrap();
    let x = ops.upload(x.len() / COLS, COLS, x).unwrap();
    ops.download(&ops.logits(&w, &x, &Solo).unwrap()).unwrap()
}

#[test]
fn bf16_layers_of_many_tokens_agree_with_the_cpu() {
    // Ragged tokens and rows in clusters of four, two and one; then two row tiles to a block.
    for (rows, n_tokens) in [(144, 70), (3850, 10), (7700, 10), (3168, 400)] {
        let x = Random::new(6).values(n_tokens * COLS, 1.0);
        let expected = bf16_product(&CpuOps::new(Numerics::Bf16), rows, &x[..9 * COLS]);
        in_every_mode_on_hopper(|device| {
            let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
            let got = bf16_product(&ops, rows, &x);
            assert_close("bf16", &got[..9 * rows], &expected, 2e-6);
            // The last tokens too: those of the ragged block.
            let last = &x[(n_tokens - 5) * COLS..];
            let expected = bf16_product(&CpuOps::new(Numerics::Bf16), rows, last);
            assert_close("bf16", &got[(n_tokens - 5) * rows..], &expected, 2e-6);
        });
    }
}

#[test]
fn fp8_weights_of_unquantised_activations_agree_with_f64_in_every_form() {
    const GROUPS: usize = 2;
    const K: usize = 256;
    const N: usize = 128;
    in_every_mode_on_hopper(|device| {
        let source = Random::new(14).fp8(GROUPS * N, K);
        let WeightData::Fp8 { codes, scales: Scales::Ue8m0(bytes) } = &source.data else {
            unreachable!("FP8")
        };
        let scales: Vec<f32> = bytes.iter().map(|&b| 2_f32.powi(i32::from(b) - 127)).collect();
        let weight = |row: usize, k: usize| {
            let scale = scales[row / 128 * (K / 128) + k / 128];
            f64::from(e4m3_to_f32(codes[row * K + k])) * f64::from(scale)
        };
        let w = weight_buffer(device, codes);
        let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        let scales = weight_buffer(device, &bytes);
        let map =
            |buffer: &Buffer, element, dims: [usize; 2], stride: usize, box_dims: [u32; 2]| {
                let spec = TensorMapSpec {
                    element,
                    address: buffer.address(),
                    dims: &dims.map(|n| n as u64),
                    strides: &[stride as u64],
                    box_dims: &box_dims,
                    swizzle: Swizzle::B128,
                };
                Arg::Map(device.encode(&spec).unwrap())
            };
        for (kernel, tokens, cluster, rows) in [
            ("linear90_wo_64_c1", 64, 1, 70),
            ("linear90_wo_64_c2", 64, 2, 70),
            ("linear90_wo_64_c4", 64, 4, 70),
            ("linear90_wo_128", 128, 2, 131),
        ] {
            let x = Random::new(15).values(rows * GROUPS * K, 1.0);
            let bytes: Vec<u8> =
                x.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
            let x_buffer = Buffer::from_bytes(device, &bytes).unwrap();
            let out = Buffer::new(device, rows * GROUPS * N * 4).unwrap();
            let w_map = map(&w, MapElement::U8, [K, GROUPS * N], K, [128, 64]);
            let x_dims = [GROUPS * K, rows];
            let x_map =
                map(&x_buffer, MapElement::Bf16, x_dims, 2 * GROUPS * K, [64, tokens as u32]);
            let mut args = vec![w_map, (&scales).into(), x_map, (&out).into()];
            args.extend(sizes([N, K, rows, GROUPS * N, 1, 2 * cluster]));
            let blocks = if tokens == 128 { N / 128 } else { cluster * N / 64 };
            let grid = [blocks as u32, rows.div_ceil(tokens) as u32, GROUPS as u32];
            launch(device, kernel, grid, 384, &args);
            let bytes = out.read(0, rows * GROUPS * N * 4).unwrap();
            let got: Vec<f32> =
                bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let mut expected = Vec::new();
            for token in 0..rows {
                for row in 0..GROUPS * N {
                    let at = token * GROUPS * K + row / N * K;
                    let sum: f64 = (0..K).map(|k| weight(row, k) * f64::from(x[at + k])).sum();
                    expected.push(sum as f32);
                }
            }
            assert_close(kernel, &got, &expected, 1e-6);
        }
    });
}

#[test]
fn index_scores_of_keys_in_registers_are_those_of_the_form_for_every_architecture() {
    const HEADS: usize = 64;
    const ENTRIES: usize = 330;
    in_every_mode_on_hopper(|device| {
        let mut random = Random::new(21);
        let bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
        };
        let words = |values: &[u32]| -> Vec<u8> {
            values.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        // Halves up to 3: on the FP4 grid with a scale of 1.
        let grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -0.5, -1.0];
        let q: Vec<f32> = (0..2 * HEADS * 128).map(|_| grid[random.below(8) as usize]).collect();
        let w = random.values(2 * HEADS, 1.0);
        // Blocks of 64 rows of 64 bytes of codes and 4 scales.
        let keys: Vec<u8> = (0..6 * 64 * 68)
            .map(|i| if i % 68 < 64 { random.bits() as u8 } else { 120 + random.below(9) as u8 })
            .collect();
        // Two tokens of one sequence, the first with fewer entries.
        let positions = words(&[4 * 250 + 1, 4 * ENTRIES as u32 + 2]);
        let sequence = words(&[0, 0, 2, 0, 0, 6, 0, 0]);
        let inputs = [
            bytes(&q),
            bytes(&w),
            keys,
            positions,
            words(&[0, 0]),
            sequence,
            words(&[3, 0, 5, 1, 4, 2]),
        ]
        .map(|bytes| Buffer::from_bytes(device, &bytes).unwrap());
        let run = |kernel, keys_of_a_block: usize, shared_bytes| -> Vec<f32> {
            let scores = Buffer::from_bytes(device, &vec![0; 4 * 2 * ENTRIES]).unwrap();
            let mut args: Vec<Arg> = inputs.iter().map(Arg::from).collect();
            args.push((&scores).into());
            args.extend(sizes([HEADS, ENTRIES, 16]));
            args.push(Arg::F32(0.011));
            let grid = [ENTRIES.div_ceil(keys_of_a_block) as u32, 2, 1];
            let launch = Launch { kernel, grid, block: [128, 1, 1], shared_bytes, args: &args };
            // SAFETY: the emulator checks every access itself.
            unsafe { device.launch(launch) }.unwrap();
            let bytes = scores.read(0, 4 * 2 * ENTRIES).unwrap();
            bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let expected = run("index_scores", 64, 40 * 1024);
        let got = run("index_scores90", 256, 17 * 1024);
        assert!(expected.iter().filter(|x| **x != 0.0).count() > 500);
        assert_close("scores", &got, &expected, 1e-6);
    });
}
