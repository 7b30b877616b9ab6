//! candle's CPU operators as an independent opinion on norm, rotary embedding and softmax.

use candle_core::{Device, Tensor};
use fathom_core::model_config::HEAD_DIM;
use fathom_ops::cpu::rope::Rotation;
use fathom_ops::cpu::{attend_single, norm};
use proptest::prelude::*;

use crate::fixtures::rel_l2;

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn rms_norm_agrees_with_candle(
        x in prop::collection::vec(-4.0_f32..4.0, 256),
        weight in prop::collection::vec(0.5_f32..1.5, 256),
    ) {
        let mut got = vec![0.0; 256];
        norm::rms_norm(&x, &weight, 1e-6, false, &mut got);
        let expected = candle_nn::ops::rms_norm(&tensor(&x, &[1, 256]), &tensor(&weight, &[256]), 1e-6);
        prop_assert!(rel_l2(&got, &flat(&expected.unwrap())) < 1e-6);
    }

    #[test]
    fn interleaved_rotation_agrees_with_candle(
        x in prop::collection::vec(-2.0_f32..2.0, 64),
        position in 0_usize..4096,
    ) {
        let frequencies: Vec<f32> = (0..32).map(|i| 1e4_f32.powf(-(i as f32) / 32.0)).collect();
        let angles: Vec<f32> = frequencies.iter().map(|f| position as f32 * f).collect();
        let table = |f: fn(f32) -> f32| tensor(&angles.iter().map(|a| f(*a)).collect::<Vec<_>>(), &[1, 32]);
        let expected = candle_nn::rotary_emb::rope_i(
            &tensor(&x, &[1, 1, 1, 64]),
            &table(f32::cos),
            &table(f32::sin),
        );
        let mut got = x;
        Rotation::at(position, &frequencies).apply(&mut got, false);
        prop_assert!(rel_l2(&got, &flat(&expected.unwrap())) < 1e-6);
    }

    #[test]
    fn attention_agrees_with_a_two_pass_softmax(n_keys in 1_usize..200, seed in 0_u32..1000) {
        let value = |i: usize| ((i as f32 * 0.37 + seed as f32).sin() * 2.0).fract();
        let row = |r: usize| std::array::from_fn(|c| value(r * 7919 + c));
        let (q, keys): ([f32; HEAD_DIM], Vec<[f32; HEAD_DIM]>) = (row(1), (2..2 + n_keys).map(row).collect());
        let kv = tensor(keys.as_flattened(), &[n_keys, HEAD_DIM]);
        let scores = tensor(&q, &[1, HEAD_DIM]).matmul(&kv.t().unwrap()).unwrap();
        let scores = (scores / (HEAD_DIM as f64).sqrt()).unwrap();
        let weights = candle_nn::ops::softmax(&scores, 1).unwrap();
        let expected = flat(&weights.matmul(&kv).unwrap());
        let split = n_keys.min(128);
        let got = attend_single(&q, f32::NEG_INFINITY, &keys[..split], &keys[split..]);
        prop_assert!(rel_l2(&got, &expected) < 1e-5);
    }
}
