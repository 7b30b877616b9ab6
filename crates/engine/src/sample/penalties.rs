//! Penalties and bias: sparse changes to the logits of single tokens.
//!
//! Repetition looks at prompt and output, frequency and presence at the output only (api.md A-606).

use std::collections::HashMap;

use fathom_core::{SamplingParams, TokenId};

/// Which tokens a request has seen, kept only if a penalty asks for it.
#[derive(Debug, Clone)]
pub struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// Occurrences in the output; prompt tokens are there with 0 if repetition needs them.
    counts: HashMap<TokenId, u32>,
}

impl Penalties {
    /// The penalties of `params` for a prompt.
    #[must_use]
    pub fn new(params: &SamplingParams, prompt: &[TokenId]) -> Self {
        let mut penalties = Self {
            repetition: params.repetition_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            counts: HashMap::new(),
        };
        if penalties.repetition != 1.0 {
            penalties.counts.extend(prompt.iter().map(|&token| (token, 0)));
        }
        penalties
    }

    fn is_off(&self) -> bool {
        self.repetition == 1.0 && self.frequency == 0.0 && self.presence == 0.0
    }

    /// Notes a sampled token.
    pub fn note(&mut self, token: TokenId) {
        if !self.is_off() {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Applies repetition, then frequency and presence. `logits` is `[vocab_size]`.
    pub fn apply(&self, logits: &mut [f32]) {
        if self.is_off() {
            return;
        }
        // Each token is changed by itself: the map's order does not matter.
        for (&token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if *logit > 0.0 {
                *logit /= self.repetition;
            } else {
                *logit *= self.repetition;
            }
            if count > 0 {
                *logit -= self.frequency * count as f32 + self.presence;
            }
        }
    }
}

/// Adds the request's bias to single tokens. `logits` is `[vocab_size]`.
pub fn add_bias(bias: &[(TokenId, f32)], logits: &mut [f32]) {
    for &(token, value) in bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalised(params: &SamplingParams, prompt: &[TokenId], output: &[TokenId]) -> Vec<f32> {
        let mut penalties = Penalties::new(params, prompt);
        for &token in output {
            penalties.note(token);
        }
        let mut logits = vec![4.0, -4.0, 1.0, 2.0];
        penalties.apply(&mut logits);
        logits
    }

    #[test]
    fn repetition_pushes_seen_tokens_down_whatever_their_sign() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy(1) };
        assert_eq!(penalised(&params, &[0], &[1, 1]), [2.0, -8.0, 1.0, 2.0]);
    }

    #[test]
    fn frequency_and_presence_count_generated_tokens_only() {
        let params = SamplingParams {
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplingParams::greedy(1)
        };
        assert_eq!(penalised(&params, &[0, 2], &[1, 1, 3]), [4.0, -5.25, 1.0, 1.25]);
    }

    #[test]
    fn bias_is_added_and_adds_up() {
        let mut logits = vec![1.0, 1.0];
        add_bias(&[(0, -100.0), (0, 1.0), (9, 5.0)], &mut logits);
        assert_eq!(logits, [-98.0, 1.0]);
    }
}
