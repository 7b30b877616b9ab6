//! Queries on sm_90a in one launch: the bits of the launches it stands for, and the CPU's numbers.

use std::sync::Arc;

use fathom_core::num::Ue8m0;
use fathom_core::{LayerKind, Numerics};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{
    Activations, Arg, Buffer, CudaOps, Device, Launch, MapElement, Swizzle, TensorMapSpec,
};
use fathom_ops::layer::{AttentionWeights, CompressorWeights, IndexerWeights};
use fathom_ops::traits::{Projected, Queries};
use fathom_ops::{AttentionOps, Backend, Batch, Scales, WeightData};

use crate::compare::{BF16_STEP, assert_close};
use crate::process::{Emulator, MODES, in_every_mode_on_hopper, weight_buffer};
use crate::weights::Random;

/// Columns: two blocks of K and a ragged third.
const K: usize = 272;
const EPS: f32 = 1e-6;
const PIPELINE_BYTES: u32 = 225 * 1024;

fn launch(
    device: &Arc<dyn Device>,
    kernel: &'static str,
    blocks: usize,
    (threads, shared_bytes): (u32, u32),
    args: &[Arg],
) {
    let grid = [blocks as u32, 1, 1];
    let launch = Launch { kernel, grid, block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

/// An FP8 matrix with its map and scales.
struct Matrix {
    _codes: Buffer,
    map: Arg,
    scales: Buffer,
    rows: usize,
}

fn matrix(device: &Arc<dyn Device>, random: &mut Random, rows: usize) -> Matrix {
    let WeightData::Fp8 { codes, scales: Scales::Ue8m0(bytes) } = random.fp8(rows, K).data else {
        unreachable!("FP8")
    };
    let codes = weight_buffer(device, &codes);
    let spec = TensorMapSpec {
        element: MapElement::U8,
        address: codes.address(),
        dims: &[K as u64, rows as u64],
        strides: &[K as u64],
        box_dims: &[128, 64],
        swizzle: Swizzle::B128,
    };
    let map = Arg::Map(device.encode(&spec).unwrap());
    let scale = |&byte: &u8| Ue8m0::from_byte(byte).unwrap().to_f32().to_le_bytes();
    let scales: Vec<u8> = bytes.iter().flat_map(scale).collect();
    let scales = weight_buffer(device, &scales);
    Matrix { _codes: codes, map, scales, rows }
}

fn f32_buffer(device: &Arc<dyn Device>, values: &[f32]) -> Buffer {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    weight_buffer(device, &bytes)
}

fn u32s<const N: usize>(values: [usize; N]) -> [Arg; N] {
    values.map(|value| Arg::U32(value as u32))
}

#[test]
fn one_launch_has_the_bits_of_the_five_it_stands_for() {
    const HEADS: usize = 1;
    const INDEX_HEADS: usize = 4;
    in_every_mode_on_hopper(|device| {
        for n_tokens in [1, 7] {
            let mut random = Random::new(31);
            let wq_b = matrix(device, &mut random, HEADS * 512);
            let index_wq_b = matrix(device, &mut random, INDEX_HEADS * 128);
            let qr: Vec<u8> = random
                .values(n_tokens * K, 3.0)
                .iter()
                .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                .collect();
            let qr = Buffer::from_bytes(device, &qr).unwrap();
            let norm = f32_buffer(device, &random.values(K, 1.5));
            let frequencies = f32_buffer(device, &random.values(32, 1.0));
            let positions: Vec<u8> =
                (0..n_tokens as u32).flat_map(|i| (1000 * i + 3).to_le_bytes()).collect();
            let positions = Buffer::from_bytes(device, &positions).unwrap();
            let buffer = |n: usize| Buffer::from_bytes(device, &vec![0; 2 * n]).unwrap();
            let read = |buffer: &Buffer| buffer.read(0, buffer.len()).unwrap();

            let normed = buffer(n_tokens * K);
            let mut args: Vec<Arg> = [&qr, &norm, &normed].map(Arg::from).into();
            args.extend([Arg::NULL, Arg::U32(K as u32), Arg::F32(EPS)]);
            launch(device, "rms_norm", n_tokens, (256, 1024), &args);
            let separate = [&wq_b, &index_wq_b].map(|w| {
                let out = buffer(n_tokens * w.rows);
                let mut args = vec![w.map, (&w.scales).into(), (&normed).into()];
                args.extend([Arg::NULL, Arg::NULL, (&out).into()]);
                args.extend(u32s([w.rows, K, K, 0, n_tokens, w.rows, 0, 2]));
                let blocks = w.rows / 64;
                launch(device, "linear90_8_c1", blocks, (384, PIPELINE_BYTES), &args);
                out
            });
            for (kernel, out, n_heads) in [
                ("attn_finish_q", &separate[0], HEADS),
                ("attn_finish_index_q", &separate[1], INDEX_HEADS),
            ] {
                let mut args: Vec<Arg> = [out, &frequencies, &positions].map(Arg::from).into();
                args.extend(u32s([n_tokens, n_heads]));
                args.extend((n_heads == HEADS).then_some(Arg::F32(EPS)));
                launch(device, kernel, (n_tokens * n_heads).div_ceil(4), (128, 0), &args);
            }

            let together = [&wq_b, &index_wq_b].map(|w| buffer(n_tokens * w.rows));
            let mut args = Vec::new();
            for ((w, out), n_heads) in
                [&wq_b, &index_wq_b].into_iter().zip(&together).zip([HEADS, INDEX_HEADS])
            {
                args.extend([w.map, (&w.scales).into(), out.into(), Arg::U32(n_heads as u32)]);
            }
            args.extend([(&qr).into(), (&norm).into(), Arg::F32(EPS)]);
            args.extend([Arg::from(&frequencies), Arg::from(&positions)]);
            args.extend(u32s([K, n_tokens]));
            launch(device, "queries90", 16, (384, PIPELINE_BYTES), &args);
            assert!(read(&separate[0]).iter().any(|&byte| byte != 0));
            assert_eq!(read(&together[0]), read(&separate[0]), "q of {n_tokens} tokens");
            assert_eq!(read(&together[1]), read(&separate[1]), "index q of {n_tokens} tokens");
        }
    });
}

/// As many heads as the form for many row tiles needs, of both kinds.
const HEADS: usize = 15;
const INDEX_HEADS: usize = 60;
const RANK: usize = 128;

fn queries<B: AttentionOps>(ops: &B) -> Queries<B::Tensor> {
    let mut random = Random::new(33);
    let nothing = |random: &mut Random| ops.load_linear(&random.bf16(8, 8)).unwrap();
    let compressor = |random: &mut Random| CompressorWeights {
        width: 128,
        wkv: nothing(random),
        wgate: nothing(random),
        ape: random.vector(ops, 8, 0.0),
        norm: random.norm(ops, 8),
    };
    let weights = AttentionWeights {
        kind: LayerKind::Csa,
        n_heads: HEADS,
        n_groups: 1,
        wq_a: nothing(&mut random),
        q_norm: random.norm(ops, RANK),
        wq_b: ops.load_linear(&random.fp8(HEADS * 512, RANK)).unwrap(),
        wkv: nothing(&mut random),
        kv_norm: random.norm(ops, 8),
        wo_a: nothing(&mut random),
        wo_b: nothing(&mut random),
        attn_sink: random.vector(ops, HEADS, 0.0),
        rope: ops.load_vector(&random.values(32, 1.0)).unwrap(),
        compressor: Some(compressor(&mut random)),
        indexer: Some(IndexerWeights {
            n_heads: INDEX_HEADS,
            top_k: 16,
            wq_b: ops.load_linear(&random.fp8(INDEX_HEADS * 128, RANK)).unwrap(),
            weights_proj: nothing(&mut random),
            compressor: compressor(&mut random),
        }),
    };
    let projected = Projected {
        qr: ops.upload(2, RANK, &random.values(2 * RANK, 2.0)).unwrap(),
        kv: ops.upload(2, 8, &[0.0; 16]).unwrap(),
        compressor: None,
        index_compressor: None,
        index_weights: None,
    };
    let step = ops.prepare_step(&Batch::single(0, 37, &[0; 2], &[0])).unwrap();
    ops.attn_queries(&weights, &projected, &step).unwrap()
}

#[test]
fn queries_in_one_launch_agree_with_the_cpu() {
    // One mode: the other test runs the kernel in all of them.
    let Some(device) = Emulator::start_as(MODES[2], "sm_90a") else { return };
    let (cpu, device) = (CpuOps::new(Numerics::Bf16), CudaOps::new(device, Activations::Fp8Grid));
    let (expected, got) = (queries(&cpu), queries(&device));
    let values = device.download(&got.q).unwrap();
    assert_close("q", &values, &expected.q.data, 2.0 * BF16_STEP);
    let values = device.download(&got.index.unwrap()).unwrap();
    let expected = expected.index.unwrap().data;
    // A sum in another order may move a value to the next point of the FP4 grid.
    let wrong = values.iter().zip(&expected).filter(|(a, b)| a != b).count();
    assert!(wrong * 50 <= expected.len(), "{wrong} of {}", expected.len());
    assert_eq!(values.len(), expected.len());
}
