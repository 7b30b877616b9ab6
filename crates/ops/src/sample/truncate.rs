//! Top-k, top-p and min-p: which of the most likely tokens stay.
//!
//! All three keep a head of the order by (logit descending, id ascending). Only as much of that
//! order is sorted as the filters need: the vocabulary has 129,280 entries, the head usually fewer
//! than a hundred.

use fathom_core::{SamplingParams, TokenId};

use super::real::{ln, weight};

/// Candidates that are sorted first; four times as many if they do not suffice.
const FIRST_HEAD: usize = 64;

/// Tokens further below the most likely one, in scaled logits, are not looked at: even the luckiest
/// noise (26 in all, see `noise`) could not make them win, and all of them together weigh 1e-12.
const REACH: f64 = 40.0;

/// Tokens in the running, with their logits.
pub(super) type Candidates = Vec<(TokenId, f32)>;

/// Whether any of the three filters is on.
pub(super) fn is_on(params: &SamplingParams) -> bool {
    params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0
}

/// Fills `kept` with the tokens that stay, in no particular order. `logits` is `[vocab_size]`, finite
/// or negative infinity (forbidden); `most` is the highest of them and finite.
pub(super) fn truncate(params: &SamplingParams, logits: &[f32], most: f32, kept: &mut Candidates) {
    kept.clear();
    let temperature = f64::from(params.temperature);
    let scaled = |logit: f32| (f64::from(logit) - f64::from(most)) / temperature;
    let least = (f64::from(most) - REACH * temperature) as f32;
    // Below every finite number are the forbidden ones; both zeros are above the lower one.
    let least = if least == 0.0 { -0.0 } else { least.max(f32::MIN) };
    let candidates = logits.iter().enumerate().filter(|&(_, &logit)| logit >= least);
    kept.extend(candidates.map(|(token, &logit)| (token as TokenId, logit)));

    if params.top_k > 0 && (params.top_k as usize) < kept.len() {
        sort_head(kept, params.top_k as usize);
        kept.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let total: u64 = kept.iter().map(|&(_, logit)| weight(scaled(logit))).sum();
        let wanted = (f64::from(params.top_p) * total as f64).ceil() as u64;
        let n_kept = nucleus(kept, wanted, |logit| weight(scaled(logit)));
        kept.truncate(n_kept);
    }
    if params.min_p > 0.0 {
        let least = ln(f64::from(params.min_p));
        kept.retain(|&(_, logit)| scaled(logit) >= least);
    }
}

/// Sorts a growing head until its weights reach `wanted`; returns how many that takes, at least 1.
fn nucleus(candidates: &mut Candidates, wanted: u64, weight: impl Fn(f32) -> u64) -> usize {
    let mut head = FIRST_HEAD;
    loop {
        sort_head(candidates, head);
        let mut sum = 0;
        for (index, &(_, logit)) in candidates.iter().take(head).enumerate() {
            sum += weight(logit);
            if sum >= wanted {
                return index + 1;
            }
        }
        if head >= candidates.len() {
            return candidates.len();
        }
        head *= 4;
    }
}

/// Brings the first `n` of the order to the front, sorted.
fn sort_head(candidates: &mut Candidates, n: usize) {
    let order = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let n = n.min(candidates.len());
    if n < candidates.len() {
        candidates.select_nth_unstable_by(n, order);
    }
    candidates[..n].sort_unstable_by(order);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(params: &SamplingParams, probabilities: &[f32]) -> Vec<TokenId> {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut kept = Vec::new();
        truncate(params, &logits, most, &mut kept);
        let mut tokens: Vec<TokenId> = kept.iter().map(|&(token, _)| token).collect();
        tokens.sort_unstable();
        tokens
    }

    fn params() -> SamplingParams {
        SamplingParams::sampled(1, 0)
    }

    #[test]
    fn top_k_keeps_exactly_k_and_prefers_lower_ids_on_ties() {
        let params = SamplingParams { top_k: 2, ..params() };
        assert_eq!(kept(&params, &[0.2, 0.2, 0.4, 0.2]), [0, 2]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let top_p = |top_p| SamplingParams { top_p, ..params() };
        assert_eq!(kept(&top_p(0.45), &[0.1, 0.5, 0.15, 0.25]), [1]);
        assert_eq!(kept(&top_p(0.7), &[0.1, 0.5, 0.15, 0.25]), [1, 3]);
        assert_eq!(kept(&top_p(0.8), &[0.1, 0.5, 0.15, 0.25]), [1, 2, 3]);
    }

    #[test]
    fn top_p_is_a_share_of_what_top_k_left() {
        let params = SamplingParams { top_k: 2, top_p: 0.6, ..params() };
        // Of all tokens 0.5 is not enough, of the first two it is two thirds.
        assert_eq!(kept(&params, &[0.1, 0.5, 0.15, 0.25]), [1]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely_token() {
        let params = SamplingParams { min_p: 0.25, ..params() };
        assert_eq!(kept(&params, &[0.1, 0.5, 0.15, 0.25]), [1, 2, 3]);
    }

    #[test]
    fn forbidden_tokens_are_never_kept() {
        let params = SamplingParams { top_k: 9, ..params() };
        assert_eq!(kept(&params, &[0.0, 0.5, 0.0, 0.5]), [1, 3]);
    }
}
