//! The unit goldens: quantisation bit for bit, f32 operators to relL2 1e-6.

use std::sync::Arc;

use fathom_core::Numerics;
use fathom_core::model_config::{HC_MIX, HEAD_DIM, NOPE_DIM};
use fathom_core::num::{Ue8m0, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32, fp8_block_scale};
use fathom_core::parallel::ExpertShard;
use fathom_ops::cpu::rope::Rotation;
use fathom_ops::cpu::{
    CpuLinear, CpuOps, HostTensor, Routing, attend_single, norm, quant, split_sinkhorn,
    sqrt_softplus,
};
use fathom_ops::layer::{HcHead, HcSite, MoeWeights, Norm, Router, SharedExpert};
use fathom_ops::{Backend, Batch, HeadOps, HyperConnectionOps, MoeOps, Solo};

use crate::fixtures::{File, Nano, rel_l2};

const F32_LIMIT: f64 = 1e-6;

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32]) {
    let error = rel_l2(got, expected);
    assert!(error <= F32_LIMIT, "relL2 {error:.2e}");
}

#[test]
fn code_tables_are_the_official_ones() {
    let units = File::units();
    for (code, expected) in (0_u8..).zip(units.values("e2m1/all_codes_f32")) {
        assert_eq!(e2m1_to_f32(code), expected);
    }
    for (code, expected) in (0..=255_u8).zip(units.values("e4m3/all_codes_f32")) {
        let got = e4m3_to_f32(code);
        assert!(got == expected || (got.is_nan() && expected.is_nan()), "{code:#x}");
    }
    for (byte, expected) in (0_u8..).zip(units.values("e8m0/all_codes_f32")) {
        assert_eq!(Ue8m0::from_byte(byte).unwrap().to_f32(), expected, "{byte}");
    }
    for (x, expected) in units.values("pow2_ceil/in").iter().zip(units.values("pow2_ceil/out")) {
        assert_eq!(Ue8m0::ceil(*x).to_f32(), expected, "{x}");
    }
}

#[test]
fn fp8_quantisation_gives_the_official_codes_and_scales() {
    let units = File::units();
    let (codes, scales) = (units.bytes("act_quant128/q"), units.bytes("act_quant128/scale"));
    let input = units.values("act_quant128/in");
    let mut simulated = input.clone();
    quant::quantise_linear_input(&mut simulated);
    for (block, (x, y)) in input.chunks(128).zip(simulated.chunks(128)).enumerate() {
        let scale = fp8_block_scale(x.iter().fold(0.0, |m, x| x.abs().max(m)));
        assert_eq!(scale.byte(), scales[block]);
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            let code = codes[128 * block + i];
            assert_eq!(e4m3_from_f32(x / scale.to_f32()), code);
            assert_eq!(*y, e4m3_to_f32(code) * scale.to_f32());
        }
    }
}

#[test]
fn in_place_quantisation_is_bit_exact() {
    let units = File::units();
    let mut kv = units.values("act_quant64_inplace/in");
    quant::quantise_kv(&mut kv);
    assert_eq!(kv, units.values("act_quant64_inplace/out"));
    let mut index = units.values("fp4_act_quant32_inplace/in");
    quant::quantise_index(&mut index);
    assert_eq!(index, units.values("fp4_act_quant32_inplace/out"));
}

#[test]
fn the_hadamard_rotation_is_bit_exact() {
    let units = File::units();
    let mut values = units.values("hadamard128/in");
    values.as_chunks_mut::<128>().0.iter_mut().for_each(|row| quant::hadamard(row, true));
    assert_eq!(values, units.values("hadamard128/out"));
}

#[test]
fn rotary_embedding_turns_and_turns_back() {
    let units = File::units();
    for kind in ["rope_main", "rope_compress"] {
        let get = |name: &str| units.values(&format!("{kind}/{name}"));
        let frequencies = get("inv_freq");
        let (x, y, inverse) = (get("x"), get("y"), get("y_inverse_of_x"));
        for (row, position) in units.integers(&format!("{kind}/positions")).iter().enumerate() {
            let rotation = Rotation::at(*position as usize, &frequencies);
            let range = 64 * row..64 * (row + 1);
            let mut forward = x[range.clone()].to_vec();
            rotation.apply(&mut forward, false);
            assert_close(&forward, &y[range.clone()]);
            let mut backward = x[range.clone()].to_vec();
            rotation.apply_inverse(&mut backward, false);
            assert_close(&backward, &inverse[range]);
        }
    }
}

#[test]
fn sinkhorn_and_the_split_agree() {
    let units = File::units();
    let base: [f32; HC_MIX] = units.values("sinkhorn/base").try_into().unwrap();
    let scale: [f32; 3] = units.values("sinkhorn/scale").try_into().unwrap();
    let mixes = units.values("sinkhorn/mixes");
    let (mut pre, mut post, mut comb) = (vec![], vec![], vec![]);
    for mix in mixes.as_chunks::<HC_MIX>().0 {
        let site = split_sinkhorn(mix, &scale, &base, 20, 1e-6);
        pre.extend(site.pre);
        post.extend(site.post);
        comb.extend(site.comb.into_iter().flatten());
    }
    assert_close(&pre, &units.values("sinkhorn/pre"));
    assert_close(&post, &units.values("sinkhorn/post"));
    assert_close(&comb, &units.values("sinkhorn/comb"));
}

fn norm(weight: Vec<f32>) -> Norm<CpuOps> {
    Norm { weight: weight.into(), eps: 1e-6 }
}

#[test]
fn a_hyper_connection_site_mixes_as_the_official_code() {
    let (units, nano, ops) = (File::units(), Nano::open(), CpuOps::new(Numerics::F32));
    let site = HcSite::<CpuOps> {
        function: nano.linear("layers.1.hc_attn_fn"),
        base: nano.values("layers.1.hc_attn_base").into(),
        scale: nano.values("layers.1.hc_attn_scale").into(),
        sinkhorn_iters: 20,
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let x = HostTensor::from_vec(3, 1024, units.values("hc_l1_attn/x")).unwrap();
    let pre = ops.hc_pre(&x, &site, &norm(vec![1.0; 256])).unwrap();
    assert_close(&pre.mix.post.data, &units.values("hc_l1_attn/post"));
    assert_close(&pre.mix.comb.data, &units.values("hc_l1_attn/comb"));
    // The operator also normalises; do the same to the expected mix.
    let mut expected = vec![0.0; 3 * 256];
    for (x, out) in units.values("hc_l1_attn/pre_out").chunks(256).zip(expected.chunks_mut(256)) {
        norm::rms_norm(x, &[1.0; 256], 1e-6, false, out);
    }
    assert_close(&pre.normed.data, &expected);
    let y = HostTensor::from_vec(3, 256, units.values("hc_l1_attn/block_out")).unwrap();
    let out = ops.hc_post(&x, &y, &pre.mix).unwrap();
    assert_close(&out.data, &units.values("hc_l1_attn/post_out"));
}

#[test]
fn the_head_collapses_the_copies_as_the_official_code() {
    let (units, nano, ops) = (File::units(), Nano::open(), CpuOps::new(Numerics::F32));
    let head = HcHead::<CpuOps> {
        function: nano.linear("hc_head_fn"),
        base: nano.values("hc_head_base").into(),
        scale: nano.values("hc_head_scale").into(),
        hc_eps: 1e-6,
        norm_eps: 1e-6,
    };
    let x = HostTensor::from_vec(3, 1024, units.values("hc_head/x")).unwrap();
    let got = ops.hc_head(&x, &head, &norm(vec![1.0; 256])).unwrap();
    let mut expected = vec![0.0; 3 * 256];
    for (x, out) in units.values("hc_head/out").chunks(256).zip(expected.chunks_mut(256)) {
        norm::rms_norm(x, &[1.0; 256], 1e-6, false, out);
    }
    assert_close(&got.data, &expected);
}

#[test]
fn rms_norm_and_sqrt_softplus_agree() {
    let (units, nano) = (File::units(), Nano::open());
    let weight = nano.values("layers.0.attn_norm.weight");
    let (x, mut out) = (units.values("rmsnorm_l0_attn/x"), vec![0.0; 3 * 256]);
    for (x, out) in x.chunks(256).zip(out.chunks_mut(256)) {
        norm::rms_norm(x, &weight, 1e-6, false, out);
    }
    assert_close(&out, &units.values("rmsnorm_l0_attn/out"));
    let scores: Vec<f32> =
        units.values("sqrtsoftplus/in").iter().map(|x| sqrt_softplus(*x)).collect();
    assert_close(&scores, &units.values("sqrtsoftplus/out"));
}

#[test]
fn sparse_attention_skips_absent_keys_and_counts_the_sink_in_the_denominator() {
    let units = File::units();
    let kv = units.values("sparse_attn/kv");
    let (kv, _) = kv.as_chunks::<HEAD_DIM>();
    let (q, sink) = (units.values("sparse_attn/q"), units.values("sparse_attn/sink"));
    let mut out = Vec::new();
    for (ids, q) in units.integers("sparse_attn/idx").chunks(144).zip(q.chunks(4 * HEAD_DIM)) {
        let keys = |ids: &[i64]| -> Vec<[f32; HEAD_DIM]> {
            ids.iter().filter(|id| **id >= 0).map(|id| kv[*id as usize]).collect()
        };
        let (window, compressed) = (keys(&ids[..128]), keys(&ids[128..]));
        for (q, sink) in q.as_chunks::<HEAD_DIM>().0.iter().zip(&sink) {
            out.extend(attend_single(q, *sink, &window, &compressed));
        }
    }
    assert_close(&out, &units.values("sparse_attn/out"));
}

#[test]
fn a_sink_far_above_every_score_silences_the_head_without_overflow() {
    let key = [1.0; HEAD_DIM];
    let out = attend_single(&key, 1e30, &[key], &[]);
    assert_eq!(out, [0.0; HEAD_DIM]);
}

#[test]
fn a_sink_level_with_every_score_takes_one_share() {
    let mut query = [0.0; HEAD_DIM];
    query[0] = 1.0;
    let key = |v: f32| std::array::from_fn(|i| if i == 0 { 0.0 } else { v });
    let out = attend_single(&query, 0.0, &[key(1.0), key(3.0)], &[key(5.0)]);
    // Three equal scores and the sink: the mean times 3/4.
    assert!((out[NOPE_DIM] - 3.0 * 0.75).abs() < 1e-6, "{}", out[NOPE_DIM]);
}

/// The mixture of experts of one nano layer, with all experts on this rank.
fn moe(nano: &Nano, ops: CpuOps, prefix: &str, router: Router<CpuOps>) -> MoeWeights<CpuOps> {
    let expert =
        |e: usize| ["w1", "w3", "w2"].map(|w| nano.source(&format!("{prefix}.experts.{e}.{w}")));
    let experts: Vec<_> = (0..8).map(expert).collect();
    let shared = |w: &str| nano.linear(&format!("{prefix}.shared_experts.{w}"));
    MoeWeights {
        gate: nano.linear(&format!("{prefix}.gate")),
        router,
        experts: ops.load_experts(&experts, 0, 8).unwrap(),
        shard: ExpertShard { experts: 0..8, channels: 0..128 },
        experts_are_slices: false,
        shared: SharedExpert {
            w1: shared("w1"),
            w3: shared("w3"),
            w2: shared("w2"),
            is_slice: false,
        },
        top_k: 3,
        routed_scaling_factor: 1.5,
        swiglu_limit: Some(2.5),
    }
}

/// A step of these tokens.
fn rows(tokens: &[u32]) -> Batch {
    Batch::single(0, 0, tokens, &[0])
}

#[test]
fn score_routing_chooses_and_weighs_as_the_official_gate() {
    let (units, nano, ops) = (File::units(), Nano::open(), CpuOps::new(Numerics::F32));
    let bias: Arc<[f32]> = nano.values("layers.3.ffn.gate.bias").into();
    let weights = moe(&nano, ops, "layers.3.ffn", Router::Score(bias));
    let x = HostTensor::from_vec(3, 256, units.values("gate_last/x")).unwrap();
    let routing = ops.route(&weights, &x, &rows(&[0, 0, 0])).unwrap();
    let (ids, values) = ops.read_routing(&routing).unwrap();
    let expected: Vec<u32> = units.integers("gate_last/ids").iter().map(|id| *id as u32).collect();
    assert_eq!(ids, expected);
    assert_close(&values, &units.values("gate_last/weights"));
}

#[test]
fn hash_routing_follows_the_token_id_and_weighs_by_score() {
    let (units, nano, ops) = (File::units(), Nano::open(), CpuOps::new(Numerics::F32));
    let table: Vec<u16> =
        nano.integers("layers.0.ffn.gate.tid2eid").iter().map(|id| *id as u16).collect();
    let router = Router::Hash(ops.load_expert_table(&table, 3).unwrap());
    let weights = moe(&nano, ops, "layers.0.ffn", router);
    let x = HostTensor::from_vec(3, 256, units.values("gate_hash_l0/x")).unwrap();
    let tokens: Vec<u32> =
        units.integers("gate_hash_l0/token_ids").iter().map(|id| *id as u32).collect();
    let routing = ops.route(&weights, &x, &rows(&tokens)).unwrap();
    let (ids, values) = ops.read_routing(&routing).unwrap();
    let expected: Vec<u32> =
        units.integers("gate_hash_l0/ids").iter().map(|id| *id as u32).collect();
    assert_eq!(ids, expected);
    assert_close(&values, &units.values("gate_hash_l0/weights"));
    assert!(ops.route(&weights, &x, &rows(&[0, 1, 1024])).is_err(), "a token outside the table");
    assert_eq!(ops.moe(&weights, &x, &routing, &Solo).unwrap().data.len(), 3 * 256);
}

#[test]
fn fp8_and_fp4_linears_agree_with_and_without_quantised_inputs() {
    let (units, nano) = (File::units(), Nano::open());
    for (unit, matrix) in [
        ("linear_wkv_l0", "layers.0.attn.wkv"),
        ("linear_expert1_w1_l0", "layers.0.ffn.experts.1.w1"),
    ] {
        let linear = nano.linear(matrix);
        let mut x = units.values(&format!("{unit}/x"));
        let mut y = vec![0.0; x.len() / linear.n_cols() * linear.n_rows()];
        linear.matmul(&x, &mut y).unwrap();
        assert_close(&y, &units.values(&format!("{unit}/y_noquant")));
        quant::quantise_linear_input(&mut x);
        linear.matmul(&x, &mut y).unwrap();
        assert_close(&y, &units.values(&format!("{unit}/y_f32qat")));
    }
}

#[test]
fn an_expert_applies_the_routing_weight_before_its_second_projection() {
    let (units, nano, ops) = (File::units(), Nano::open(), CpuOps::new(Numerics::F32Qat));
    let bias: Arc<[f32]> = vec![0.0; 8].into();
    let mut weights = moe(&nano, ops, "layers.0.ffn", Router::Score(bias));
    weights.top_k = 1;
    // Silence the shared expert, which the unit does not include.
    weights.shared.w2 = CpuLinear::from_f32(256, 128, vec![0.0; 256 * 128]).unwrap();
    let x = HostTensor::from_vec(3, 256, units.values("expert1_l0/x")).unwrap();
    let routing = Routing::new(1, vec![1; 3], units.values("expert1_l0/w")).unwrap();
    let y = ops.moe(&weights, &x, &routing, &Solo).unwrap();
    assert_close(&y.data, &units.values("expert1_l0/out_f32qat"));
}

#[test]
fn an_fp8_scale_follows_the_exponent_bits_of_its_largest_value() {
    // One ulp above a power of two must round the scale up, at both ends of the range.
    for exponent in [-18, 0, 20] {
        let unit = 2.0_f32.powi(exponent);
        assert_eq!(fp8_block_scale(448.0 * unit).exponent(), exponent);
        assert_eq!(fp8_block_scale(449.0 * unit).exponent(), exponent + 1);
    }
}
