//! Summaries of logits.

use std::sync::Arc;

use fathom_ops::cuda::{Activations, CudaOps};
use fathom_ops::{Backend, HeadOps, Solo};

use crate::process::in_every_mode;
use crate::weights::Random;

#[test]
fn a_summary_names_the_lowest_of_equal_maxima_and_the_softmax_denominator() {
    in_every_mode(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let mut random = Random::new(3);
        // Every row of the head occurs twice, so that each maximum does too.
        let mut head = random.bf16(601, 128);
        let fathom_ops::WeightData::Bf16(values) = &head.data else { unreachable!() };
        let half = &values[..600 * 128];
        let bytes = [half, half, &values[1200 * 128..]].concat();
        head.data = fathom_ops::WeightData::Bf16(bytes.into());
        let head = ops.load_linear(&head).unwrap();
        let x = ops.upload(3, 128, &random.values(3 * 128, 1.0)).unwrap();
        let logits = ops.logits(&head, &x, &Solo).unwrap();
        let values = ops.download(&logits).unwrap();
        let summaries = ops.row_summary(&logits).unwrap();
        for (row, summary) in values.chunks_exact(601).zip(summaries) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let token = row.iter().position(|&x| x == max).unwrap();
            let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            assert_eq!((summary.token as usize, summary.max), (token, max));
            assert!((f64::from(summary.sum) - sum).abs() < 1e-5 * sum);
            assert!(!summary.is_broken);
        }
    });
}

#[test]
fn a_row_with_a_nan_or_an_infinity_is_marked_and_only_that_row() {
    in_every_mode(|device| {
        let ops = CudaOps::new(Arc::clone(device), Activations::Fp8Grid);
        let mut random = Random::new(4);
        let head = ops.load_linear(&random.bf16(70, 128)).unwrap();
        let mut x = random.values(3 * 128, 1.0);
        x[130] = f32::NAN;
        let x = ops.upload(3, 128, &x).unwrap();
        let logits = ops.logits(&head, &x, &Solo).unwrap();
        let broken: Vec<bool> =
            ops.row_summary(&logits).unwrap().iter().map(|row| row.is_broken).collect();
        assert_eq!(broken, [false, true, false]);
    });
}
