//! Log-probabilities of the raw logits.

use fathom_core::{TokenId, TokenLogprob};

use super::real::{WEIGHT_ONE, ln, weight};

/// The highest logit; negative infinity if there is none. No logit is NaN.
#[must_use]
pub fn highest(logits: &[f32]) -> f32 {
    // Independent lanes: one running maximum would wait for itself at every step.
    const LANES: usize = 16;
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (most, &logit) in lanes.iter_mut().zip(chunk) {
            *most = if logit > *most { logit } else { *most };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Natural logarithm of the sum of exponentials, of which those below 2^-47 of the largest count as
/// nothing. `logits` are finite.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(highest(logits));
    let sum: u64 = logits.iter().map(|&logit| weight(f64::from(logit) - most)).sum();
    most + ln(sum as f64 / WEIGHT_ONE)
}

/// The `n_top` highest logits, descending, ties by lower id: as many as there are.
#[must_use]
pub fn top_logits(logits: &[f32], n_top: usize) -> Vec<(TokenId, f32)> {
    // The API allows 20: an insertion into a short sorted list is rare and cheap.
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(n_top.min(logits.len()) + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if top.len() < n_top || top.last().is_some_and(|&(_, least)| logit > least) {
            let place = top.partition_point(|&(_, other)| other >= logit);
            top.insert(place, (token as TokenId, logit));
            top.truncate(n_top);
        }
    }
    top
}

/// What is reported for `token`, given the logits as the model made them.
#[must_use]
pub fn logprobs(raw: &[f32], token: TokenId, n_top: u32) -> TokenLogprob {
    let total = log_sum_exp(raw);
    // A probability of one may round to a logarithm above zero.
    let logprob = |logit: f32| ((f64::from(logit) - total) as f32).min(0.0);
    let mut top = top_logits(raw, n_top as usize);
    for (_, value) in &mut top {
        *value = logprob(*value);
    }
    TokenLogprob { logprob: logprob(raw[token as usize]), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_a_distribution_and_ties_go_to_the_lower_id() {
        let raw = [1.0, 3.0, -2.0, 3.0];
        let all = logprobs(&raw, 0, 4);
        let order: Vec<TokenId> = all.top.iter().map(|&(token, _)| token).collect();
        assert_eq!(order, [1, 3, 0, 2]);
        let sum: f32 = all.top.iter().map(|&(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(all.logprob, all.top[2].1);
        assert_eq!(logprobs(&raw, 2, 0).top, []);
        assert_eq!(logprobs(&raw, 2, 9).top.len(), 4);
    }

    #[test]
    fn a_certain_token_has_logprob_zero_and_never_more() {
        assert_eq!(logprobs(&[1000.0, 0.0], 0, 1).logprob, 0.0);
    }
}
