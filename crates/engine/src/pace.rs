//! How many prefill tokens a step may run, so that it takes no longer than it should.
//!
//! A step cannot be interrupted: cancelling waits for it, and so does every answer that decodes in
//! it. The token budget that suits a GPU makes a step of many seconds on a CPU, so the budget of
//! prefill follows what steps were seen to take. Tokens do not depend on chunks, only times do.
//!
//! Not here: the hard limit of tokens per step (`scheduler`).

use std::time::Duration;

/// Prefill tokens that are allowed before anything was measured.
const FIRST: u32 = 512;

/// Prefill never gets less: even the slowest machine makes progress.
const LEAST: u32 = 16;

/// Most by which the allowance grows from one step to the next. When it doubled, a long prompt beside
/// short ones made the slowest hundredth of gaps 1.6 times the target (the traffic of
/// `a_limit_on_step_time_is_a_limit_on_gaps_between_tokens`).
const GROWTH: f64 = 1.15;

/// Prefill tokens per step, adapted to measured times.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    target: Option<Duration>,
    most: u32,
    allowed: u32,
}

impl Pace {
    /// Steps should take at most `target` (`None`: whatever they take) and never run more than
    /// `most` tokens.
    pub(crate) fn new(target: Option<Duration>, most: u32) -> Self {
        let allowed = if target.is_some() { FIRST.min(most) } else { most };
        Self { target, most, allowed }
    }

    /// Prefill tokens for the next step.
    pub(crate) const fn allowed(&self) -> u32 {
        self.allowed
    }

    /// Notes what a step of `n_tokens`, of them `n_prefill` in prefill, took.
    pub(crate) fn observe(&mut self, n_tokens: u32, n_prefill: u32, took: Duration) {
        let Some(target) = self.target else { return };
        if n_prefill == 0 {
            return;
        }
        let spare = target.as_secs_f64() / took.as_secs_f64().max(1e-9);
        if spare < 1.0 {
            // What decodes cost is not prefill's to spend, but a step has at least its share.
            let affordable = (f64::from(n_tokens) * spare) as u32;
            let decodes = n_tokens - n_prefill;
            self.allowed = affordable.saturating_sub(decodes).max(LEAST).min(self.most);
        } else if n_prefill > self.allowed / 2 {
            // Grow by what was measured, but carefully: the next step may run tokens that cost much
            // more, because they stand further on or belong to another prompt.
            let growth = spare.min(GROWTH);
            let grown = (f64::from(self.allowed) * growth) as u32;
            self.allowed = grown.max(self.allowed + 1).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The budget after many full steps on a machine that runs `tokens_per_second`.
    fn settled(tokens_per_second: f64) -> u32 {
        let mut pace = Pace::new(Some(Duration::from_millis(500)), 8192);
        for _ in 0..50 {
            let n = pace.allowed();
            pace.observe(n + 8, n, Duration::from_secs_f64(f64::from(n + 8) / tokens_per_second));
        }
        pace.allowed()
    }

    #[test]
    fn a_slow_machine_gets_steps_of_the_target_length_and_a_fast_one_the_whole_budget() {
        assert!((900..=1000).contains(&settled(2000.0)), "{}", settled(2000.0));
        assert!((180..=200).contains(&settled(400.0)), "{}", settled(400.0));
        assert_eq!(settled(1e6), 8192);
        assert_eq!(settled(1.0), LEAST);
    }

    #[test]
    fn small_steps_say_nothing_about_large_ones() {
        let mut pace = Pace::new(Some(Duration::from_millis(500)), 8192);
        pace.observe(20, 10, Duration::from_micros(1));
        assert_eq!(pace.allowed(), FIRST);
        pace.observe(64, 0, Duration::from_secs(9));
        assert_eq!(pace.allowed(), FIRST);
    }

    #[test]
    fn without_a_target_the_budget_is_the_limit_from_the_start() {
        let mut pace = Pace::new(None, 4096);
        pace.observe(4096, 4096, Duration::from_secs(60));
        assert_eq!(pace.allowed(), 4096);
    }
}
