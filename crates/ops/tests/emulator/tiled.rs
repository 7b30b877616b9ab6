//! Products for many tokens on the kernels of sm_80: the bits of those for few.

use std::sync::Arc;

use fathom_ops::WeightData;
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::few_tokens::{Matrix, bf16_buffer, empty, read, u32s};
use crate::process::{in_every_mode, weight_buffer};
use crate::weights::Random;

/// A kernel, rows and tokens of its blocks, and its shared memory.
type Form = (&'static str, usize, usize, u32);

const FP8: [Form; 2] = [("linear_fp8_32", 32, 32, 69_632), ("linear_fp8_64", 128, 64, 98_304)];
const BF16: [Form; 2] = [("linear_bf16_32", 32, 32, 69_632), ("linear_bf16_64", 128, 64, 98_304)];
const EACH: [Form; 2] =
    [("linear_bf16_each_32", 32, 32, 69_632), ("linear_bf16_each_64", 128, 64, 98_304)];

fn launch(
    device: &Arc<dyn Device>,
    (kernel, .., shared_bytes): Form,
    grid: [usize; 3],
    args: &[Arg],
) {
    let grid = grid.map(|n| n as u32);
    let launch = Launch { kernel, grid, block: [256, 1, 1], shared_bytes, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

fn bf16_matrix(device: &Arc<dyn Device>, random: &mut Random, rows: usize, k: usize) -> Buffer {
    let WeightData::Bf16(bytes) = random.bf16(rows, k).data else { unreachable!("bf16") };
    weight_buffer(device, &bytes)
}

fn same_bits(what: &str, [few, many]: &[Buffer; 2]) {
    assert!(read(few).iter().any(|&byte| byte != 0), "{what}");
    assert!(read(few) == read(many), "{what}");
}

#[test]
fn fp8_products_of_many_tokens_have_the_bits_of_few() {
    in_every_mode(|device| {
        // Rows behind the last and k behind it; segments of one block, of several and without any; two blocks of
        // tokens, one with few; groups.
        for (rows, k, tokens, groups) in [(200, 1168, 70, 1), (130, 272, 33, 1), (128, 640, 9, 2)] {
            let mut random = Random::new(k as u64);
            let w = Matrix::new(device, &mut random, groups * rows, k);
            let x = bf16_buffer(device, &random.values(tokens * groups * k, 3.0));
            let outs = FP8.map(|form| {
                let out = empty(device, tokens * groups * rows);
                let mut args: Vec<Arg> = [&w.codes, &w.scales, &x, &out].map(Arg::from).into();
                args.extend(u32s([rows, k, groups * k, tokens, groups * rows, 0]));
                let grid = [rows.div_ceil(form.1), tokens.div_ceil(form.2), groups];
                launch(device, form, grid, &args);
                out
            });
            same_bits(&format!("{rows} x {k}, {tokens} tokens"), &outs);
        }
    });
}

#[test]
fn bf16_products_of_many_tokens_have_the_bits_of_few() {
    in_every_mode(|device| {
        for (rows, k, tokens, is_f32) in [(200, 680, 70, false), (40, 1096, 35, true)] {
            let mut random = Random::new(k as u64);
            let w = bf16_matrix(device, &mut random, rows, k);
            let x = bf16_buffer(device, &random.values(tokens * k, 3.0));
            let outs = BF16.map(|form| {
                let out = empty(device, 2 * tokens * rows);
                let mut args: Vec<Arg> = [&w, &x, &out].map(Arg::from).into();
                args.extend(u32s([rows, k, k, tokens, rows, usize::from(is_f32)]));
                launch(device, form, [rows.div_ceil(form.1), tokens.div_ceil(form.2), 1], &args);
                out
            });
            same_bits(&format!("{rows} x {k}, {tokens} tokens"), &outs);
        }
    });
}

#[test]
fn several_matrices_of_many_tokens_have_the_bits_of_few() {
    const ROWS: [usize; 3] = [136, 24, 72];
    const K: usize = 392;
    const TOKENS: usize = 67;
    in_every_mode(|device| {
        let mut random = Random::new(53);
        let matrices = ROWS.map(|rows| bf16_matrix(device, &mut random, rows, K));
        let x = bf16_buffer(device, &random.values(TOKENS * K, 3.0));
        let outs = EACH.map(|form| {
            let outs = ROWS.map(|rows| empty(device, 2 * TOKENS * rows));
            let mut args = vec![Arg::from(&x)];
            args.extend(u32s([K, TOKENS]));
            for ((w, out), rows) in matrices.iter().zip(&outs).zip(ROWS) {
                args.extend([Arg::from(w), Arg::from(out)]);
                args.extend(u32s([rows, usize::from(rows == 24)]));
            }
            for _ in ROWS.len()..5 {
                args.extend([Arg::NULL, Arg::NULL, Arg::U32(0), Arg::U32(0)]);
            }
            let n_blocks = ROWS.map(|rows| rows.div_ceil(form.1)).iter().sum();
            launch(device, form, [n_blocks, TOKENS.div_ceil(form.2), 1], &args);
            outs
        });
        let [few, many] = outs;
        for ((few, many), rows) in few.into_iter().zip(many).zip(ROWS) {
            same_bits(&format!("{rows} rows"), &[few, many]);
        }
    });
}
