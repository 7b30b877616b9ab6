//! The sampler against a plain definition in f64, and against the distribution it should have.

use fathom_core::{SamplingParams, TokenId};
use fathom_engine::sample::{RequestSampler, SampleScratch};
use fathom_ops::sample::noise::Noise;
use proptest::prelude::*;

fn sample(params: &SamplingParams, logits: &[f32], position: u32) -> TokenId {
    let mut sampler = RequestSampler::new(params.clone(), &[], None);
    let mut logits = logits.to_vec();
    let sampled = sampler.sample(&mut logits, position, &[], &mut SampleScratch::default());
    sampled.unwrap().token
}

/// Probabilities after temperature, top-k, top-p and min-p, by sorting everything.
fn reference(params: &SamplingParams, logits: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let most = f64::from(logits[order[0]]);
    let weight =
        |token: usize| ((f64::from(logits[token]) - most) / f64::from(params.temperature)).exp();
    if params.temperature == 0.0 || params.top_p == 0.0 {
        order.truncate(1);
    } else {
        if params.top_k > 0 {
            order.truncate(params.top_k as usize);
        }
        let total: f64 = order.iter().map(|&token| weight(token)).sum();
        let mut sum = 0.0;
        let mut n_kept = 0;
        for &token in &order {
            n_kept += 1;
            sum += weight(token);
            if sum >= f64::from(params.top_p) * total {
                break;
            }
        }
        if params.top_p < 1.0 {
            order.truncate(n_kept);
        }
        order.retain(|&token| weight(token) >= f64::from(params.min_p));
    }
    let mut probabilities = vec![0.0; logits.len()];
    for &token in &order {
        probabilities[token] = if params.temperature == 0.0 { 1.0 } else { weight(token) };
    }
    let total: f64 = probabilities.iter().sum();
    probabilities.iter().map(|probability| probability / total).collect()
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Coarse values, so that ties are common, and fine ones.
    prop_oneof![
        prop::collection::vec((-8..8_i32).prop_map(|x| x as f32), 1..400),
        prop::collection::vec(-30.0..30.0_f32, 1..400),
    ]
}

fn params() -> impl Strategy<Value = SamplingParams> {
    (
        prop_oneof![Just(0.0), Just(0.3), Just(1.0), Just(2.0)],
        prop_oneof![Just(0.0), Just(0.5), Just(0.95), Just(1.0)],
        prop_oneof![Just(0), 1..100_u32],
        prop_oneof![Just(0.0), Just(0.05), Just(1.0)],
        any::<u64>(),
    )
        .prop_map(|(temperature, top_p, top_k, min_p, seed)| SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            ..SamplingParams::sampled(1, seed)
        })
}

proptest! {
    #[test]
    fn the_draw_is_the_noisiest_of_the_tokens_that_the_definition_keeps(
        params in params(),
        logits in logits(),
        position in any::<u32>(),
    ) {
        let probabilities = reference(&params, &logits);
        let noise = Noise::new(params.seed, params.choice, position);
        let score = |token: usize| probabilities[token].ln() + noise.gumbel(token as TokenId);
        let best = (0..logits.len())
            .filter(|&token| probabilities[token] > 0.0)
            .max_by(|&a, &b| score(a).total_cmp(&score(b)))
            .unwrap();
        prop_assert_eq!(sample(&params, &logits, position) as usize, best);
    }
}

/// Whether `counts` could come from `probabilities`: the chi-square statistic stays below its mean
/// by less than five standard deviations. Seeds are fixed, so this never fails by chance.
pub(crate) fn assert_follows(probabilities: &[f64], counts: &[u32]) {
    let n: u32 = counts.iter().sum();
    let mut statistic = 0.0;
    let mut freedom = -1.0_f64;
    for (&probability, &count) in probabilities.iter().zip(counts) {
        let expected = probability * f64::from(n);
        if probability == 0.0 {
            assert_eq!(count, 0, "a token that was filtered out is never drawn");
        } else {
            statistic += (f64::from(count) - expected).powi(2) / expected;
            freedom += 1.0;
        }
    }
    assert!(
        statistic < freedom + 5.0 * (2.0 * freedom).sqrt(),
        "chi-square {statistic:.1} with {freedom} degrees of freedom"
    );
}

#[test]
fn draws_follow_the_distribution_over_positions_seeds_and_choices() {
    let logits: Vec<f32> = (0..40).map(|i| ((i * 29 % 17) as f32) / 5.0).collect();
    let plain = SamplingParams::sampled(1, 11);
    for params in [
        plain.clone(),
        SamplingParams { temperature: 0.6, ..plain.clone() },
        SamplingParams { top_p: 0.8, ..plain.clone() },
        SamplingParams { top_k: 7, min_p: 0.3, temperature: 1.7, ..plain },
    ] {
        let probabilities = reference(&params, &logits);
        let mut by_position = vec![0; logits.len()];
        let mut by_seed = vec![0; logits.len()];
        let mut by_choice = vec![0; logits.len()];
        for i in 0..20_000 {
            by_position[sample(&params, &logits, i) as usize] += 1;
            let other = SamplingParams { seed: u64::from(i) << 20, ..params.clone() };
            by_seed[sample(&other, &logits, 7) as usize] += 1;
            let other = SamplingParams { choice: i, ..params.clone() };
            by_choice[sample(&other, &logits, 7) as usize] += 1;
        }
        for counts in [by_position, by_seed, by_choice] {
            assert_follows(&probabilities, &counts);
        }
    }
}

#[test]
fn consecutive_draws_are_independent() {
    let logits = [0.0_f32; 4];
    let params = SamplingParams::sampled(1, 5);
    let mut pairs = vec![0; 16];
    for position in (0..40_000).step_by(2) {
        let first = sample(&params, &logits, position);
        let second = sample(&params, &logits, position + 1);
        pairs[(4 * first + second) as usize] += 1;
    }
    assert_follows(&[1.0 / 16.0; 16], &pairs);
}

#[test]
fn a_vocabulary_of_full_size_is_drawn_from_as_by_definition() {
    // Shaped like a trained model's logits: a few likely tokens, a long unlikely rest.
    let logits: Vec<f32> = (0..129_280_u32)
        .map(|i| {
            let hash = f64::from(i.wrapping_mul(2_654_435_761)) / f64::from(u32::MAX);
            (8.0 * (hash + 1e-9).ln().abs().ln()) as f32
        })
        .collect();
    let params = SamplingParams::sampled(1, 77);
    let noise = |position| Noise::new(params.seed, 0, position);
    for position in 0..10 {
        let score =
            |token: usize| f64::from(logits[token]) + noise(position).gumbel(token as TokenId);
        let best = (0..logits.len()).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap();
        assert_eq!(sample(&params, &logits, position) as usize, best);
    }
}

#[test]
fn greedy_takes_the_lowest_id_on_ties() {
    let params = SamplingParams::greedy(1);
    let mut logits = vec![0.5; 100];
    logits[70] = 1.0;
    logits[33] = 1.0;
    assert_eq!(sample(&params, &logits, 0), 33);
}
