//! Routing and experts.

use std::sync::Arc;

use fathom_core::Numerics;
use fathom_core::parallel::ExpertShard;
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::{Activations, CudaOps, Device};
use fathom_ops::layer::{MoeWeights, Router, SharedExpert};
use fathom_ops::{Backend, Batch, HyperConnectionOps, MoeOps, Ops, Solo, WeightSource};

use crate::compare::{BF16_STEP, assert_close};
use crate::hyper_connection::site;
use crate::process::{in_every_mode, in_every_mode_as};
use crate::weights::Random;

const WIDTH: usize = 384;
const CHANNELS: usize = 128;
const EXPERTS: usize = 9;
const TOP_K: usize = 3;
const VOCAB: usize = 20;

fn weights<B: Backend>(ops: &B, hashes: bool) -> MoeWeights<B> {
    weights_of(ops, hashes, Random::fp4)
}

fn weights_of<B: Backend>(
    ops: &B,
    hashes: bool,
    matrix: fn(&mut Random, usize, usize) -> WeightSource,
) -> MoeWeights<B> {
    let mut random = Random::new(5);
    let mut expert = || {
        [(CHANNELS, WIDTH), (CHANNELS, WIDTH), (WIDTH, CHANNELS)]
            .map(|(n, k)| matrix(&mut random, n, k))
    };
    let experts: Vec<_> = (0..EXPERTS).map(|_| expert()).collect();
    let table: Vec<u16> =
        (0..VOCAB * TOP_K).map(|i| ((i / TOP_K + 2 * (i % TOP_K)) % EXPERTS) as u16).collect();
    let router = if hashes {
        Router::Hash(ops.load_expert_table(&table, TOP_K).unwrap())
    } else {
        Router::Score(random.vector(ops, EXPERTS, 0.0))
    };
    MoeWeights {
        gate: ops.load_linear(&random.bf16(EXPERTS, WIDTH)).unwrap(),
        router,
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

struct Results {
    ids: Vec<u32>,
    weights: Vec<f32>,
    out: Vec<f32>,
}

fn run<B: Ops>(ops: &B, n_tokens: usize, hashes: bool) -> Results {
    let weights = weights(ops, hashes);
    let mut random = Random::new(n_tokens as u64);
    let x = ops.upload(n_tokens, WIDTH, &random.values(n_tokens * WIDTH, 1.5)).unwrap();
    let tokens: Vec<u32> = (0..n_tokens).map(|_| random.below(VOCAB as u32)).collect();
    let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
    let (routing, out) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
    let (ids, factors) = ops.read_routing(&routing).unwrap();
    Results { ids, weights: factors, out: ops.download(&out).unwrap() }
}

fn compare(n_tokens: usize, hashes: bool) {
    let expected = run(&CpuOps::new(Numerics::Bf16), n_tokens, hashes);
    in_every_mode(|device| {
        let got = run(&CudaOps::new(Arc::clone(device), Activations::Fp8Grid), n_tokens, hashes);
        assert_eq!(got.ids, expected.ids);
        assert_close("routing weights", &got.weights, &expected.weights, 1e-5);
        assert_close("experts", &got.out, &expected.out, BF16_STEP);
    });
}

#[test]
fn experts_of_one_token_agree_with_the_cpu() {
    compare(1, false);
}

#[test]
fn experts_with_more_tokens_than_an_item_holds_agree_with_the_cpu() {
    compare(31, false);
}

#[test]
fn experts_of_many_tokens_give_each_the_bits_of_few() {
    in_every_mode(|device| {
        for matrix in [Random::fp4, Random::fp8] {
            many_as_few(device, matrix);
        }
    });
}

#[test]
fn experts_of_many_tokens_give_each_the_bits_of_few_on_blackwell() {
    in_every_mode_as("sm_100f", |device| many_as_few(device, Random::fp4));
}

/// The first expert has so many tokens that they are two items of the most, others fewer than a tile.
fn many_as_few(device: &Arc<dyn Device>, matrix: fn(&mut Random, usize, usize) -> WeightSource) {
    const MANY: usize = 80;
    let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid).with_determinism(true);
    let weights = weights_of(&ops, true, matrix);
    let of = |rows: std::ops::Range<usize>| {
        let x = Random::new(29).values(MANY * WIDTH, 1.5);
        let x = &x[rows.start * WIDTH..rows.end * WIDTH];
        let x = ops.upload(rows.len(), WIDTH, x).unwrap();
        let tokens: Vec<u32> =
            rows.map(|row| if row % 5 == 4 { 1 + row as u32 % 11 } else { 0 }).collect();
        let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
        let (routing, out) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
        (ops.read_routing(&routing).unwrap().0, ops.download(&out).unwrap())
    };
    let (ids, all) = of(0..MANY);
    assert!(ids.iter().filter(|&&id| id == ids[0]).count() > 64);
    for few in [0..7, MANY - 2..MANY, 3..30] {
        assert!(of(few.clone()).1 == all[few.start * WIDTH..few.end * WIDTH], "{few:?}");
    }
}

#[test]
fn hash_routing_agrees_with_the_cpu() {
    compare(5, true);
}

/// What routing decides for `n_tokens` of 17, in one launch with the grouping and by itself.
fn routed(ops: &CudaOps, n_tokens: usize, hashes: bool) -> [(Vec<u32>, Vec<f32>); 2] {
    const ALL: usize = 17;
    let weights = weights(ops, hashes);
    let mut random = Random::new(23);
    let x = random.values(ALL * WIDTH, 1.5);
    let tokens: Vec<u32> = (0..ALL).map(|_| random.below(VOCAB as u32)).collect();
    let x = ops.upload(n_tokens, WIDTH, &x[..n_tokens * WIDTH]).unwrap();
    let step = ops.prepare_step(&Batch::single(0, 0, &tokens[..n_tokens], &[0])).unwrap();
    // Twice: the first leaves the step's count as it was.
    let (first, _) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
    let (second, _) = ops.route_and_moe(&weights, &x, &step, &Solo).unwrap();
    let at_once = ops.read_routing(&first).unwrap();
    assert!(at_once == ops.read_routing(&second).unwrap());
    [at_once, ops.read_routing(&ops.route(&weights, &x, &step).unwrap()).unwrap()]
}

#[test]
fn routing_in_one_launch_gives_the_bits_of_a_product_and_routing() {
    in_every_mode(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        for hashes in [false, true] {
            let [_, (all_ids, all_weights)] = routed(&ops, 17, hashes);
            for n_tokens in [1, 7, 9, 16, 17] {
                let n = n_tokens * TOP_K;
                for (ids, weights) in routed(&ops, n_tokens, hashes) {
                    assert!(ids == all_ids[..n], "{n_tokens} tokens");
                    assert!(weights == all_weights[..n], "{n_tokens} tokens");
                }
            }
        }
    });
}

#[test]
fn experts_added_up_at_the_boundary_give_the_bits_of_those_added_before() {
    in_every_mode(added_up_at_the_boundary);
}

#[test]
fn experts_added_up_at_a_boundary_of_one_launch_give_the_bits_of_those_added_before() {
    in_every_mode_as("sm_90a", added_up_at_the_boundary);
}

fn added_up_at_the_boundary(device: &Arc<dyn Device>) {
    let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
    let mut random = Random::new(3);
    let (first, second) = (site(&ops, &mut random, WIDTH), site(&ops, &mut random, WIDTH));
    let norm = random.norm(&ops, WIDTH);
    // Routed and grouped in one launch, and in two.
    for n_tokens in [1, 3, 18] {
        let weights = weights(&ops, false);
        let tokens = vec![0; n_tokens];
        let step = ops.prepare_step(&Batch::single(0, 0, &tokens, &[0])).unwrap();
        let copies = random.values(n_tokens * 4 * WIDTH, 2.0);
        let copies = ops.upload(n_tokens, 4 * WIDTH, &copies).unwrap();
        let x = ops.hc_pre(&copies, &first, &norm).unwrap();
        let (_, at_once) = ops.route_and_moe(&weights, &x.normed, &step, &Solo).unwrap();
        let routing = ops.route(&weights, &x.normed, &step).unwrap();
        let before = ops.moe(&weights, &x.normed, &routing, &Solo).unwrap();
        let follow = |y| {
            let mut copies = copies.clone();
            let next = ops.hc_boundary(&mut copies, y, &x.mix, (&second, &norm), &step).unwrap();
            let last = ops.hc_post(&copies, y, &x.mix).unwrap();
            [copies, next.normed, last].map(|tensor| ops.download(&tensor).unwrap())
        };
        assert!(follow(&at_once) == follow(&before), "{n_tokens} tokens");
        assert!(ops.route(&weights, &at_once, &step).is_err(), "who does not add refuses");
    }
}
