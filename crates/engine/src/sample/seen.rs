//! What a request has seen, as far as penalties ask for it.
//!
//! Repetition looks at prompt and output, frequency and presence at the output only (api.md A-606).

use std::collections::HashMap;

use fathom_core::{SamplingParams, TokenId};
use fathom_ops::sample::penalises;

/// Tokens and how often they were generated; empty if no penalty asks.
#[derive(Debug, Clone)]
pub struct Seen {
    is_wanted: bool,
    /// Each token once. Prompt tokens are there with 0 if repetition needs them.
    counts: Vec<(TokenId, u32)>,
    places: HashMap<TokenId, usize>,
}

impl Seen {
    /// What the penalties of `params` need to know of a prompt.
    #[must_use]
    pub fn new(params: &SamplingParams, prompt: &[TokenId]) -> Self {
        let repeats = params.repetition_penalty != 1.0;
        let mut seen =
            Self { is_wanted: penalises(params), counts: Vec::new(), places: HashMap::new() };
        if repeats {
            prompt.iter().for_each(|&token| *seen.count(token) += 0);
        }
        seen
    }

    fn count(&mut self, token: TokenId) -> &mut u32 {
        let place = *self.places.entry(token).or_insert(self.counts.len());
        if place == self.counts.len() {
            self.counts.push((token, 0));
        }
        &mut self.counts[place].1
    }

    /// Notes a sampled token.
    pub fn note(&mut self, token: TokenId) {
        if self.is_wanted {
            *self.count(token) += 1;
        }
    }

    /// Each token once, with how often it was generated.
    #[must_use]
    pub fn counts(&self) -> &[(TokenId, u32)] {
        &self.counts
    }

    /// The same, if `next` are generated too.
    #[must_use]
    pub fn counts_after(&self, next: &[TokenId]) -> Vec<(TokenId, u32)> {
        let mut counts = self.counts.clone();
        for &token in next.iter().filter(|_| self.is_wanted) {
            let new = || counts[self.counts.len()..].iter().position(|&(other, _)| other == token);
            let place = self.places.get(&token).copied();
            match place.or_else(|| new().map(|index| self.counts.len() + index)) {
                Some(place) => counts[place].1 += 1,
                None => counts.push((token, 1)),
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_sees_the_prompt_and_the_others_only_what_was_generated() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy(1) };
        let mut seen = Seen::new(&params, &[4, 5, 4]);
        seen.note(5);
        seen.note(7);
        assert_eq!(seen.counts(), [(4, 0), (5, 1), (7, 1)]);
        let params = SamplingParams { presence_penalty: 0.5, ..SamplingParams::greedy(1) };
        let mut seen = Seen::new(&params, &[4, 5]);
        seen.note(5);
        assert_eq!(seen.counts(), [(5, 1)]);
        let mut seen = Seen::new(&SamplingParams::greedy(1), &[4]);
        seen.note(5);
        assert_eq!(seen.counts(), []);
        assert_eq!(seen.counts_after(&[6]), []);
    }

    #[test]
    fn looking_ahead_counts_as_noting_would() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy(1) };
        let mut seen = Seen::new(&params, &[4, 5]);
        let next = [5, 9, 9, 4, 9];
        let ahead = seen.counts_after(&next);
        next.iter().for_each(|&token| seen.note(token));
        assert_eq!(ahead, seen.counts());
    }
}
