//! The forms for sm_100f of layers whose activations stay bf16: bf16 matrices, and FP8 weights expanded.

use std::sync::Arc;

use fathom_core::Numerics;
use fathom_core::num::e4m3_to_f32;
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{
    Activations, Arg, Buffer, CudaOps, Device, Launch, MapElement, Swizzle, TensorMap,
    TensorMapSpec,
};
use fathom_ops::{Backend, HeadOps, Scales, Solo, WeightData};

use crate::compare::assert_close;
use crate::process::{in_every_mode_as, weight_buffer};
use crate::weights::Random;

const ARCH: &str = "sm_100f";
/// The most that a block of one form has.
const SHARED_BYTES: u32 = 226 * 1024;

/// A form of a kernel: its name, tokens of a block, blocks of a cluster.
type Form = (&'static str, usize, usize);

fn map(
    device: &Arc<dyn Device>,
    buffer: &Buffer,
    [cols, rows]: [usize; 2],
    box_dims: [u32; 2],
    element: MapElement,
) -> Arg {
    let spec = TensorMapSpec {
        element,
        address: buffer.address(),
        dims: &[cols as u64, rows as u64],
        strides: &[cols as u64 * u64::from(element.bits()) / 8],
        box_dims: &box_dims,
        swizzle: Swizzle::B128,
    };
    Arg::Map(device.encode(&spec).unwrap())
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

fn sizes<const N: usize>(values: [usize; N]) -> [Arg; N] {
    values.map(|value| Arg::U32(value as u32))
}

fn f32_values(buffer: &Buffer, n: usize) -> Vec<f32> {
    let bytes = buffer.read(0, 4 * n).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn launch(device: &Arc<dyn Device>, (kernel, tokens, cluster): Form, n: [usize; 3], args: &[Arg]) {
    let [n_tiles, rows, n_groups] = n;
    let grid = [cluster * n_tiles, rows.div_ceil(tokens), n_groups].map(|n| n as u32);
    let launch = Launch { kernel, grid, block: [224, 1, 1], shared_bytes: SHARED_BYTES, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

/// Products of rows of `w` and of `x` in f64, `[tokens, rows]`.
fn exact(w: &[f64], x: &[f32], k: usize) -> Vec<f32> {
    let dot = |w: &[f64], x: &[f32]| w.iter().zip(x).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
    let row = |x| w.chunks(k).map(move |w| dot(w, x) as f32);
    x.chunks(k).flat_map(row).collect()
}

/// Ragged tiles; blocks of K that segments share unevenly, the last a partial one.
const ROWS: [usize; 2] = [200, 72];
const K: usize = 5 * 128 + 40;
/// More tokens than the widest block has, and a ragged rest.
const TOKENS: usize = 256 + 19;

/// The products of two matrices and the first `tokens` rows of an x, one in f32 and one in bf16.
fn two_products(device: &Arc<dyn Device>, form: Form, tokens: usize) -> [Vec<f32>; 2] {
    let mut random = Random::new(3);
    let w = ROWS.map(|rows| weight_buffer(device, &bf16_bytes(&random.values(rows * K, 0.125))));
    let x = Random::new(4).values(TOKENS * K, 1.0);
    let x = Buffer::from_bytes(device, &bf16_bytes(&x[..tokens * K])).unwrap();
    let outs = [4, 2].map(|bytes| Buffer::new(device, tokens * ROWS[0] * bytes).unwrap());
    let mut args = vec![map(device, &x, [K, tokens], [64, form.1 as u32], MapElement::Bf16)];
    args.extend(sizes([K, tokens]));
    // The first of five is not there, nor is one between.
    for matrix in [None, Some(0), None, Some(1), None] {
        if let Some(i) = matrix {
            args.push(map(device, &w[i], [K, ROWS[i]], [64, 128], MapElement::Bf16));
            args.push((&outs[i]).into());
            args.extend(sizes([ROWS[i], ROWS[i], 1 - i]));
        } else {
            args.extend([Arg::Map(TensorMap::NONE), Arg::NULL]);
            args.extend(sizes([0, 0, 0]));
        }
    }
    let n_tiles = ROWS.iter().map(|rows| rows.div_ceil(128)).sum();
    launch(device, form, [n_tiles, tokens, 1], &args);
    let bytes = outs[1].read(0, 2 * tokens * ROWS[1]).unwrap();
    let half = bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32());
    [f32_values(&outs[0], tokens * ROWS[0]), half.collect()]
}

fn expected(tokens: usize) -> [Vec<f32>; 2] {
    let mut random = Random::new(3);
    let x = Random::new(4).values(TOKENS * K, 1.0);
    ROWS.map(|rows| {
        let w: Vec<f64> = random.values(rows * K, 0.125).into_iter().map(f64::from).collect();
        exact(&w, &x[..tokens * K], K)
    })
}

const FORMS: [(Form, Form); 3] = [
    (("linear100_bf16_64_c1", 64, 1), ("linear100_bf16_256_s1", 256, 1)),
    (("linear100_bf16_64_c2", 64, 2), ("linear100_bf16_256_s2", 256, 1)),
    (("linear100_bf16_64_c4", 64, 4), ("linear100_bf16_128_s4", 128, 1)),
];

#[test]
fn several_matrices_agree_with_f64_in_every_form_and_a_token_has_the_same_bits() {
    const FEW: usize = 70;
    let (few, all) = (expected(FEW), expected(TOKENS));
    in_every_mode_as(ARCH, |device| {
        for (split, whole) in FORMS {
            let got = two_products(device, split, FEW);
            assert_close(split.0, &got[0], &few[0], 1e-6);
            assert_close(split.0, &got[1], &few[1], 1.0 / 256.0);
            let many = two_products(device, whole, TOKENS);
            assert_close(whole.0, &many[0], &all[0], 1e-6);
            assert_close(whole.0, &many[1], &all[1], 1.0 / 256.0);
            for (got, many) in got.iter().zip(&many) {
                assert!(*got == many[..got.len()], "{} and {}", split.0, whole.0);
            }
        }
    });
}

#[test]
fn fp8_weights_of_groups_agree_with_f64_in_every_form_and_a_token_has_the_same_bits() {
    const GROUPS: usize = 2;
    const K: usize = 3 * 128;
    const N: usize = 128;
    const FEW: usize = 18;
    let source = Random::new(14).fp8(GROUPS * N, K);
    let WeightData::Fp8 { codes, scales: Scales::Ue8m0(bytes) } = &source.data else {
        unreachable!("FP8")
    };
    let scales: Vec<f32> = bytes.iter().map(|&b| 2_f32.powi(i32::from(b) - 127)).collect();
    let weight = |(i, &code): (usize, &u8)| {
        let scale = scales[i / K / 128 * (K / 128) + i % K / 128];
        f64::from(e4m3_to_f32(code)) * f64::from(scale)
    };
    let weights: Vec<f64> = codes.iter().enumerate().map(weight).collect();
    let x = Random::new(15).values(TOKENS * GROUPS * K, 1.0);
    let mut expected = vec![0.0; TOKENS * GROUPS * N];
    for group in 0..GROUPS {
        let part = |row: &[f32]| row[group * K..][..K].to_vec();
        let x: Vec<f32> = x.chunks(GROUPS * K).flat_map(part).collect();
        let got = exact(&weights[group * N * K..][..N * K], &x, K);
        for (out, got) in expected.chunks_mut(GROUPS * N).zip(got.chunks(N)) {
            out[group * N..][..N].copy_from_slice(got);
        }
    }
    in_every_mode_as(ARCH, |device| {
        let w = weight_buffer(device, codes);
        let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        let scales = weight_buffer(device, &bytes);
        let run = |form: Form, tokens: usize| {
            let x = Buffer::from_bytes(device, &bf16_bytes(&x[..tokens * GROUPS * K])).unwrap();
            let out = Buffer::new(device, tokens * GROUPS * N * 4).unwrap();
            let box_dims = [64, form.1 as u32];
            let mut args = vec![map(device, &x, [GROUPS * K, tokens], box_dims, MapElement::Bf16)];
            args.extend(sizes([K, tokens]));
            args.push(map(device, &w, [K, GROUPS * N], [128, 128], MapElement::U8));
            args.extend([Arg::from(&scales), (&out).into()]);
            args.extend(sizes([N, GROUPS * N, 1]));
            launch(device, form, [1, tokens, GROUPS], &args);
            let got = f32_values(&out, tokens * GROUPS * N);
            assert_close(form.0, &got, &expected[..got.len()], 1e-6);
            got
        };
        for (split, whole) in [
            (("linear100_wo_64_c1", 64, 1), ("linear100_wo_256_s1", 256, 1)),
            (("linear100_wo_64_c2", 64, 2), ("linear100_wo_256_s2", 256, 1)),
            (("linear100_wo_64_c4", 64, 4), ("linear100_wo_128_s4", 128, 1)),
        ] {
            let few = run(split, FEW);
            assert!(few == run(whole, TOKENS)[..few.len()], "{} and {}", split.0, whole.0);
        }
    });
}

/// `x W^T` of a bf16 matrix in f32, of `rows` rows.
fn bf16_product<B: Backend + HeadOps>(ops: &B, rows: usize, x: &[f32]) -> Vec<f32> {
    let w = ops.load_linear(&Random::new(3).bf16(rows, 208)).unwrap();
    let x = ops.upload(x.len() / 208, 208, x).unwrap();
    ops.download(&ops.logits(&w, &x, &Solo).unwrap()).unwrap()
}

#[test]
fn launches_for_some_tokens_and_for_many_agree_with_the_cpu() {
    // The second fills the card with blocks of 128 tokens each.
    for (rows, n_tokens) in [(140, 70), (3, 111 * 128)] {
        let x = Random::new(6).values(n_tokens * 208, 1.0);
        let last = &x[(n_tokens - 9) * 208..];
        let [first, last] =
            [&x[..9 * 208], last].map(|x| bf16_product(&CpuOps::new(Numerics::Bf16), rows, x));
        in_every_mode_as(ARCH, |device| {
            let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
            let got = bf16_product(&ops, rows, &x);
            assert_close("first", &got[..9 * rows], &first, 2e-6);
            assert_close("last", &got[(n_tokens - 9) * rows..], &last, 2e-6);
        });
    }
}

#[test]
fn where_results_must_not_depend_on_their_number_tokens_have_the_bits_of_few() {
    in_every_mode_as(ARCH, |device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid).with_determinism(true);
        let x = Random::new(8).values(12 * 208, 1.0);
        let few = bf16_product(&ops, 40, &x[..3 * 208]);
        assert_eq!(few, bf16_product(&ops, 40, &x)[..3 * 40]);
    });
}
