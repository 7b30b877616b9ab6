//! Embedding, hyper-connections, head and MTP input, at widths with ragged blocks.

use std::sync::Arc;

use fathom_core::Numerics;
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{Activations, CudaOps, Device};
use fathom_ops::layer::{HcHead, HcSite, MtpInputWeights};
use fathom_ops::{Backend, Batch, HyperConnectionOps, Ops, Solo};

use crate::compare::{BF16_STEP, assert_close, max_error};
use crate::process::{Emulator, MODES, in_every_mode, in_every_mode_as, in_every_mode_on_hopper};
use crate::weights::Random;

const VOCAB: usize = 37;

pub(crate) fn site<B: Backend>(ops: &B, random: &mut Random, width: usize) -> HcSite<B> {
    HcSite {
        function: ops.load_linear(&random.f32(24, 4 * width)).unwrap(),
        base: random.vector(ops, 24, 0.0),
        scale: random.vector(ops, 3, 1.0),
        sinkhorn_iters: 20,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    }
}

/// Everything this file checks, in order, as f32 values.
fn run<B: Ops>(ops: &B, width: usize, n_tokens: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut random = Random::new(width as u64);
    let embed = ops.load_linear(&random.bf16(VOCAB, width)).unwrap();
    let tokens: Vec<u32> = (0..n_tokens).map(|_| random.below(VOCAB as u32)).collect();
    let x = ops.upload(n_tokens, 4 * width, &random.values(n_tokens * 4 * width, 2.0)).unwrap();
    let y = ops.upload(n_tokens, width, &random.values(n_tokens * width, 1.0)).unwrap();
    let (first, second) = (site(ops, &mut random, width), site(ops, &mut random, width));
    let norm = random.norm(ops, width);
    let head = HcHead {
        function: ops.load_linear(&random.f32(4, 4 * width)).unwrap(),
        base: random.vector(ops, 4, 0.0),
        scale: random.vector(ops, 1, 1.0),
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let mtp = MtpInputWeights {
        enorm: random.norm(ops, width),
        hnorm: random.norm(ops, width),
        e_proj: ops.load_linear(&random.fp8(width, width)).unwrap(),
        h_proj: ops.load_linear(&random.fp8(width, width)).unwrap(),
    };

    let mut results = Vec::new();
    let mut keep = |name, tensor: &B::Tensor| results.push((name, ops.download(tensor).unwrap()));
    let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
    keep("embed", &ops.embed(&embed, &step).unwrap());
    let pre = ops.hc_pre(&x, &first, &norm).unwrap();
    keep("hc_pre normed", &pre.normed);
    keep("hc_pre post", &pre.mix.post);
    keep("hc_pre comb", &pre.mix.comb);
    keep("hc_post", &ops.hc_post(&x, &y, &pre.mix).unwrap());
    let mut copies = x.clone();
    let next = ops.hc_boundary(&mut copies, &y, &pre.mix, (&second, &norm), &step).unwrap();
    keep("boundary x", &copies);
    keep("boundary normed", &next.normed);
    keep("boundary comb", &next.mix.comb);
    let collapsed = ops.hc_head(&x, &head, &norm).unwrap();
    keep("hc_head", &collapsed);
    keep("logits", &ops.logits(&embed, &collapsed, &Solo).unwrap());
    keep("mtp_input", &ops.mtp_input(&mtp, &embed, &step, &x).unwrap());
    let rows: Vec<u32> = (0..n_tokens as u32).rev().step_by(2).collect();
    keep("select_rows", &ops.select_rows(&y, &rows).unwrap());
    results
}

/// What each result may differ by, relative to its largest value.
fn limit(name: &str) -> f32 {
    match name {
        "embed" | "select_rows" => 0.0,
        // Equal apart from the sums behind `post` and `comb`.
        "hc_pre post" | "hc_pre comb" | "boundary comb" => 2e-5,
        _ => BF16_STEP,
    }
}

fn compare(device: &Arc<dyn Device>, width: usize, n_tokens: usize) {
    let expected = run(&CpuOps::new(Numerics::Bf16), width, n_tokens);
    let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
    for ((name, got), (_, expected)) in run(&ops, width, n_tokens).iter().zip(&expected) {
        assert_close(&format!("{name}, width {width}"), got, expected, limit(name));
    }
}

#[test]
fn linear_layers_of_more_than_eight_rows_agree_with_the_cpu_on_hopper() {
    // Three tokens, four copies: twelve rows of `h_proj`.
    in_every_mode_on_hopper(|device| compare(device, 384, 3));
}

#[test]
fn hyper_connections_and_head_agree_with_the_cpu_at_ragged_widths() {
    in_every_mode(|device| compare(device, 384, 3));
}

#[test]
fn more_tokens_than_one_tile_agree_with_the_cpu() {
    in_every_mode(|device| compare(device, 640, 11));
}

#[test]
fn a_boundary_in_one_launch_agrees_with_the_cpu_for_more_tokens_than_a_cluster_takes() {
    in_every_mode_as("sm_100f", |device| compare(device, 640, 11));
}

/// The copies behind a boundary, the next input with what it is on the FP8 grid, and its weights: of the
/// first `n_tokens` of `n_values`.
fn boundary(device: &Arc<dyn Device>, width: usize, n_tokens: usize) -> Vec<(Vec<f32>, usize)> {
    const VALUES: usize = 33;
    let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
    let mut random = Random::new(width as u64);
    let (first, second) = (site(&ops, &mut random, width), site(&ops, &mut random, width));
    let norm = random.norm(&ops, width);
    let x = random.values(VALUES * 4 * width, 2.0);
    let y = random.values(VALUES * width, 1.0);
    let mut x = ops.upload(n_tokens, 4 * width, &x[..n_tokens * 4 * width]).unwrap();
    let y = ops.upload(n_tokens, width, &y[..n_tokens * width]).unwrap();
    let one = ops.hc_pre(&x, &first, &norm).unwrap();
    let step = ops.prepare_step(&Batch::single(0, 0, &vec![0; n_tokens], &[0])).unwrap();
    let two = ops.hc_boundary(&mut x, &y, &one.mix, (&second, &norm), &step).unwrap();
    let mut results = vec![(ops.download(&x).unwrap(), 4 * width)];
    for pre in [one, two] {
        let (normed, on_grid) = (&pre.normed, pre.normed.on_grid().unwrap());
        for (tensor, cols) in
            [(normed, width), (&on_grid, width), (&pre.mix.post, 4), (&pre.mix.comb, 16)]
        {
            results.push((ops.download(tensor).unwrap(), cols));
        }
    }
    results
}

#[test]
fn a_boundary_in_one_launch_gives_the_bits_of_two_launches_whatever_the_number_of_tokens() {
    // One, two and four slices of a block, whole and ragged, blocks without any; tokens of one cluster and of several.
    for (width, counts) in [(8, &[2][..]), (640, &[1, 8, 9, 32]), (2184, &[3]), (6160, &[1])] {
        for mode in MODES {
            let Some(narrow) = Emulator::start_narrow(mode, "sm_90a") else { return };
            let Some(device) = Emulator::start_as(mode, "sm_90a") else { return };
            // Too many for one launch.
            let expected = boundary(&narrow, width, if width == 640 { 33 } else { counts[0] });
            for &n_tokens in counts {
                let results = boundary(&device, width, n_tokens);
                for (index, ((got, cols), (all, _))) in results.iter().zip(&expected).enumerate() {
                    assert!(
                        *got == all[..n_tokens * cols],
                        "{width}, {n_tokens} tokens, result {index}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_boundary_of_one_token_without_clusters_gives_the_bits_of_two_launches() {
    for width in [8, 640, 2184, 6160] {
        in_every_mode(|device| {
            let expected = boundary(device, width, 2);
            let results = boundary(device, width, 1);
            for (index, ((got, cols), (all, _))) in results.iter().zip(&expected).enumerate() {
                assert!(*got == all[..*cols], "{width}, result {index}");
            }
        });
    }
}

#[test]
fn unquantised_activations_come_closer_to_f32_than_quantised_ones() {
    let f32 = run(&CpuOps::new(Numerics::F32), 384, 2);
    in_every_mode(|device| {
        let error = |activations| {
            let results = run(&CudaOps::new(Arc::clone(device), activations), 384, 2);
            let mtp = results.iter().zip(&f32).find(|((name, _), _)| *name == "mtp_input");
            let ((_, got), (_, expected)) = mtp.expect("the list above has it");
            max_error(got, expected)
        };
        let (bf16, fp8) = (error(Activations::Bf16), error(Activations::Fp8Grid));
        assert!(bf16 <= BF16_STEP && 2.0 * bf16 < fp8, "{bf16} against {fp8}");
    });
}
