//! Launches of few tokens on the kernels of sm_80: the bits of the several launches that each stands for.

use std::sync::Arc;

use fathom_ops::cuda::{Arg, Buffer, Device, Launch};
use fathom_ops::{Scales, WeightData};

use crate::process::{in_every_mode, weight_buffer};
use crate::weights::Random;

/// Shared memory of the products, and of an x that lies there as a whole.
const RING_BYTES: u32 = 34_816;
const RESIDENT_BYTES: u32 = 48 << 10;
const QUERIES_BYTES: u32 = RING_BYTES + 4 * 8 * 8 + 4;
const EPS: f32 = 1e-6;
const LIMIT: f32 = 2.5;

pub(crate) fn launch(
    device: &Arc<dyn Device>,
    kernel: &'static str,
    grid: [usize; 2],
    (threads, shared_bytes): (u32, u32),
    args: &[Arg],
) {
    let grid = [grid[0] as u32, grid[1] as u32, 1];
    let launch = Launch { kernel, grid, block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

pub(crate) fn u32s<const N: usize>(values: [usize; N]) -> [Arg; N] {
    values.map(|value| Arg::U32(value as u32))
}

pub(crate) fn bf16_buffer(device: &Arc<dyn Device>, values: &[f32]) -> Buffer {
    let bytes: Vec<u8> =
        values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    Buffer::from_bytes(device, &bytes).unwrap()
}

pub(crate) fn empty(device: &Arc<dyn Device>, n: usize) -> Buffer {
    Buffer::from_bytes(device, &vec![0; 2 * n]).unwrap()
}

pub(crate) fn read(buffer: &Buffer) -> Vec<u8> {
    buffer.read(0, buffer.len()).unwrap()
}

/// An FP8 matrix with its scales.
pub(crate) struct Matrix {
    pub(crate) codes: Buffer,
    pub(crate) scales: Buffer,
    pub(crate) rows: usize,
    k: usize,
}

impl Matrix {
    pub(crate) fn new(
        device: &Arc<dyn Device>,
        random: &mut Random,
        rows: usize,
        k: usize,
    ) -> Self {
        let WeightData::Fp8 { codes, scales: Scales::Ue8m0(bytes) } = random.fp8(rows, k).data
        else {
            unreachable!("FP8")
        };
        let scale =
            |&byte: &u8| fathom_core::num::Ue8m0::from_byte(byte).unwrap().to_f32().to_le_bytes();
        let scales: Vec<u8> = bytes.iter().flat_map(scale).collect();
        let (codes, scales) = (weight_buffer(device, &codes), weight_buffer(device, &scales));
        Self { codes, scales, rows, k }
    }

    /// `linear_fp8_8` by itself.
    fn times(&self, device: &Arc<dyn Device>, x: &Buffer, n_tokens: usize) -> Buffer {
        let out = empty(device, n_tokens * self.rows);
        let mut args: Vec<Arg> = [&self.codes, &self.scales, x, &out].map(Arg::from).into();
        args.extend(u32s([self.rows, self.k, self.k, n_tokens, self.rows, 0]));
        launch(device, "linear_fp8_8", [self.rows.div_ceil(32), 1], (256, RING_BYTES), &args);
        out
    }
}

/// What `act_quant_grid` makes of `x [n_tokens, k]`.
fn on_grid(device: &Arc<dyn Device>, x: &Buffer, n_tokens: usize, k: usize) -> Buffer {
    let out = empty(device, n_tokens * k);
    let args = [Arg::from(x), (&out).into(), Arg::U32(k as u32)];
    launch(device, "act_quant_grid", [k.div_ceil(2048), n_tokens], (256, 0), &args);
    out
}

#[test]
fn a_product_that_rounds_its_input_gives_the_bits_of_rounding_and_product() {
    in_every_mode(|device| {
        // Segments of one block and of several, ragged and without any; rows behind the last.
        for (rows, k, n_tokens) in [(40, 1168, 1), (32, 2320, 3), (70, 272, 8), (16, 16, 2)] {
            let mut random = Random::new(k as u64);
            let w = Matrix::new(device, &mut random, rows, k);
            let x = bf16_buffer(device, &random.values(n_tokens * k, 3.0));
            let expected = w.times(device, &on_grid(device, &x, n_tokens, k), n_tokens);
            let out = empty(device, n_tokens * rows);
            let mut args: Vec<Arg> = [&w.codes, &w.scales, &x, &out].map(Arg::from).into();
            args.extend(u32s([rows, k, n_tokens, 0]));
            let shape = (256, RESIDENT_BYTES);
            launch(device, "linear_fp8_grid_8", [rows.div_ceil(32), 1], shape, &args);
            assert!(read(&expected).iter().any(|&byte| byte != 0));
            assert!(read(&out) == read(&expected), "{rows} x {k}, {n_tokens} tokens");
        }
    });
}

#[test]
fn two_products_in_one_launch_give_the_bits_of_two_launches() {
    const K: usize = 656;
    in_every_mode(|device| {
        for n_tokens in [1, 5] {
            let mut random = Random::new(41);
            let [first, second] = [40, 96].map(|rows| Matrix::new(device, &mut random, rows, K));
            let x = bf16_buffer(device, &random.values(n_tokens * K, 3.0));
            let outs = [&first, &second].map(|w| empty(device, n_tokens * w.rows));
            let mut args = vec![Arg::from(&x)];
            args.extend(u32s([K, n_tokens]));
            for (w, out) in [&first, &second].into_iter().zip(&outs) {
                args.extend([&w.codes, &w.scales, out].map(Arg::from));
                args.extend(u32s([w.rows]));
            }
            launch(device, "linear_fp8_pair_8", [2 + 3, 1], (256, RING_BYTES), &args);
            for (w, out) in [&first, &second].into_iter().zip(&outs) {
                assert!(read(out) == read(&w.times(device, &x, n_tokens)), "{} rows", w.rows);
            }
        }
    });
}

#[test]
fn gate_and_up_with_their_activation_give_the_bits_of_three_launches() {
    const K: usize = 272;
    const CHANNELS: usize = 40;
    in_every_mode(|device| {
        for n_tokens in [1, 6] {
            let mut random = Random::new(43);
            let [w1, w3] = [0; 2].map(|_| Matrix::new(device, &mut random, CHANNELS, K));
            let x = bf16_buffer(device, &random.values(n_tokens * K, 3.0));
            let [expected, got] = [0; 2].map(|_| empty(device, n_tokens * CHANNELS));
            let (gate, up) = (w1.times(device, &x, n_tokens), w3.times(device, &x, n_tokens));
            let mut args: Vec<Arg> = [&gate, &up, &expected].map(Arg::from).into();
            args.extend([Arg::U32((n_tokens * CHANNELS) as u32), Arg::F32(LIMIT)]);
            launch(device, "swiglu", [1, 1], (128, 0), &args);
            let mut args: Vec<Arg> =
                [&w1.codes, &w1.scales, &w3.codes, &w3.scales, &x, &got].map(Arg::from).into();
            args.extend(u32s([CHANNELS, K, n_tokens]));
            args.push(Arg::F32(LIMIT));
            let shape = (256, RING_BYTES);
            launch(device, "moe_shared_gate_up", [CHANNELS.div_ceil(16), 1], shape, &args);
            assert!(read(&expected).iter().any(|&byte| byte != 0));
            assert!(read(&got) == read(&expected), "{n_tokens} tokens");
        }
    });
}

#[test]
fn queries_in_one_launch_have_the_bits_of_the_five_it_stands_for() {
    const K: usize = 272;
    const HEADS: usize = 2;
    const INDEX_HEADS: usize = 3;
    in_every_mode(|device| {
        let mut random = Random::new(47);
        let [wq_b, index_wq_b] =
            [HEADS * 512, INDEX_HEADS * 128].map(|rows| Matrix::new(device, &mut random, rows, K));
        let f32s = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            weight_buffer(device, &bytes)
        };
        let norm = f32s(&random.values(K, 1.5));
        let frequencies = f32s(&random.values(32, 1.0));
        let ended = Buffer::from_bytes(device, &[0; 4 * (HEADS + INDEX_HEADS)]).unwrap();
        for (n_tokens, on_grid) in [(1, true), (1, false), (7, true)] {
            let qr = bf16_buffer(device, &random.values(n_tokens * K, 3.0));
            let positions: Vec<u8> =
                (0..n_tokens as u32).flat_map(|i| (1000 * i + 3).to_le_bytes()).collect();
            let positions = Buffer::from_bytes(device, &positions).unwrap();
            let normed = empty(device, n_tokens * K);
            let mut args: Vec<Arg> = [&qr, &norm, &normed].map(Arg::from).into();
            args.extend([Arg::NULL, Arg::U32(K as u32), Arg::F32(EPS)]);
            launch(device, "rms_norm", [n_tokens, 1], (256, 1024), &args);
            let input = if on_grid { self::on_grid(device, &normed, n_tokens, K) } else { normed };
            let separate = [&wq_b, &index_wq_b].map(|w| w.times(device, &input, n_tokens));
            for (kernel, out, n_heads) in [
                ("attn_finish_q", &separate[0], HEADS),
                ("attn_finish_index_q", &separate[1], INDEX_HEADS),
            ] {
                let mut args: Vec<Arg> = [out, &frequencies, &positions].map(Arg::from).into();
                args.extend(u32s([n_tokens, n_heads]));
                args.extend((n_heads == HEADS).then_some(Arg::F32(EPS)));
                launch(device, kernel, [(n_tokens * n_heads).div_ceil(4), 1], (128, 0), &args);
            }

            let together = [&wq_b, &index_wq_b].map(|w| empty(device, n_tokens * w.rows));
            let mut args = Vec::new();
            for ((w, out), n_heads) in
                [&wq_b, &index_wq_b].into_iter().zip(&together).zip([HEADS, INDEX_HEADS])
            {
                args.extend([&w.codes, &w.scales, out].map(Arg::from));
                args.extend(u32s([n_heads]));
            }
            args.extend([(&qr).into(), (&norm).into(), Arg::F32(EPS)]);
            args.extend([&frequencies, &positions, &ended].map(Arg::from));
            args.extend(u32s([K, n_tokens, usize::from(on_grid)]));
            let grid = [16 * HEADS + 4 * INDEX_HEADS, 1];
            launch(device, "queries", grid, (256, QUERIES_BYTES), &args);
            assert!(read(&separate[0]).iter().any(|&byte| byte != 0));
            assert!(read(&together[0]) == read(&separate[0]), "q of {n_tokens} tokens");
            assert!(read(&together[1]) == read(&separate[1]), "index q of {n_tokens} tokens");
            assert!(read(&ended).iter().all(|&byte| byte == 0), "counts are set back");
        }
    });
}
