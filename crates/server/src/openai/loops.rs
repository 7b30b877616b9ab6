//! Answers that say the same over and over: noticed by their tokens.
//!
//! A run of `period` tokens that follows itself is a loop once it has done so often enough and long
//! enough: lists of zeros and rows of dashes are short, an answer that hangs is not. One token costs
//! one comparison per period that is looked for.

use fathom_core::TokenId;
use fathom_protocol::openai::response::TokenLoop;

use crate::config::{LoopAction, LoopConfig};

/// Watches one answer.
pub(crate) struct LoopDetector {
    min_repeats: usize,
    min_tokens: usize,
    /// The last tokens, as many as the longest period, by position modulo their number.
    last: Vec<TokenId>,
    n_tokens: usize,
    /// By period, from 1: how many tokens in a row equal the one a period before.
    n_equal: Vec<usize>,
    found: Option<TokenLoop>,
}

impl LoopDetector {
    /// A detector with these settings; `None` if nobody wants to know.
    pub(crate) fn new(config: &LoopConfig) -> Option<Self> {
        (config.action != LoopAction::Off).then(|| Self {
            min_repeats: config.min_repeats,
            min_tokens: config.min_tokens,
            last: vec![0; config.max_period],
            n_tokens: 0,
            n_equal: vec![0; config.max_period],
            found: None,
        })
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, token: TokenId) {
        let len = self.last.len();
        let mut found = None;
        for (index, n_equal) in self.n_equal.iter_mut().enumerate().take(self.n_tokens) {
            let period = index + 1;
            let earlier = self.last[(self.n_tokens - period) % len];
            *n_equal = if earlier == token { *n_equal + 1 } else { 0 };
            let n_tokens = *n_equal + period;
            let is_loop = *n_equal > 0
                && n_tokens >= self.min_tokens
                && n_tokens / period >= self.min_repeats;
            // The shortest period says it best: a multiple of it repeats as well.
            if is_loop && found.is_none() {
                let repeats = (n_tokens / period) as u32;
                found = Some(TokenLoop { period: period as u32, repeats });
            }
        }
        self.last[self.n_tokens % len] = token;
        self.n_tokens += 1;
        if found.is_some() {
            self.found = found;
        }
    }

    /// The last loop that was found, if there was one.
    pub(crate) const fn found(&self) -> Option<TokenLoop> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(tokens: impl IntoIterator<Item = TokenId>) -> Option<TokenLoop> {
        let config =
            LoopConfig { max_period: 4, min_repeats: 3, min_tokens: 6, ..LoopConfig::default() };
        let mut detector = LoopDetector::new(&config).unwrap();
        tokens.into_iter().for_each(|token| detector.push(token));
        detector.found()
    }

    #[test]
    fn a_run_that_follows_itself_often_enough_is_a_loop_of_its_shortest_period() {
        assert_eq!(watch([1, 2, 7, 8, 7, 8, 7, 8]), Some(TokenLoop { period: 2, repeats: 3 }));
        assert_eq!(watch([5; 6]), Some(TokenLoop { period: 1, repeats: 6 }));
    }

    #[test]
    fn short_rows_and_runs_that_differ_are_no_loops() {
        assert_eq!(watch([5; 5]), None);
        assert_eq!(watch([7, 8, 7, 8, 7, 9, 7, 8, 7, 8]), None);
        assert_eq!(watch(0..100), None);
        // Longer than what is looked for.
        assert_eq!(watch((0..40).map(|i| i % 5)), None);
    }

    #[test]
    fn nobody_looks_if_it_is_off() {
        let config = LoopConfig { action: LoopAction::Off, ..LoopConfig::default() };
        assert!(LoopDetector::new(&config).is_none());
    }
}
