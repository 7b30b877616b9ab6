//! How many drafts are worth their time, step by step.
//!
//! # The cost model
//! A step of `r` rows takes `s + s' r`, making `d` drafts takes `m + m' d` (`m` only if there are any);
//! both lines are fitted to what the last steps took. A sequence's draft `i` gives a token with
//! probability `p_i = a_1 a_2 ... a_i`, where `a_j` is how often its draft `j` was accepted when all
//! before it were. Of `b` decoding sequences those drafts are run that maximise tokens per second:
//!
//! ```text
//! (b + sum p) / (s + s' (b + d) + m + m' d)
//! ```
//!
//! For a known rate `q`, a draft is worth it if `p > q (s' + m')`; the best rate is found by repeating
//! that with the rate it leads to (Dinkelbach). If the best is no better than none, none are made.
//! Large batches, where a row costs as much as it does alone, and poor drafts thus switch speculation
//! off, without a threshold to set.
//!
//! What is not tried is not measured: a sequence that had no drafts for a while gets one, and every
//! few thousand steps some run each number of drafts, to fit the lines again. That costs at most some
//! hundredths where drafts are useless.
//!
//! Not here: which tokens are drafted (a [`Drafter`](super::Drafter)).

use std::time::Duration;

use fathom_scheduler::SequenceIndex;

use super::MAX_DRAFTS;

/// Acceptance that is assumed before anything was measured: good enough to try.
const PRIOR: f32 = 0.7;

/// Weight of one observation in a sequence's own acceptance, and in the average of all.
const OWN_GAIN: f32 = 1.0 / 8.0;
const AVERAGE_GAIN: f32 = 1.0 / 64.0;

/// Steps without drafts after which a sequence gets one; a new sequence has waited for most of it.
const PATIENCE: u32 = 96;
const NEW_WAITED: u32 = PATIENCE - 8;

/// Steps between fitting the lines anew.
const REFIT_EVERY: u32 = 4096;

/// How often the drafts at each position were accepted, if all before them were.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acceptance {
    shares: [f32; MAX_DRAFTS],
    gain: f32,
    /// Steps since the last draft.
    waited: u32,
}

impl Acceptance {
    fn average() -> Self {
        Self { shares: [PRIOR; MAX_DRAFTS], gain: AVERAGE_GAIN, waited: 0 }
    }

    /// Counts one verification.
    pub(super) fn note(&mut self, n_drafts: usize, n_accepted: usize) {
        let judged = n_drafts.min(n_accepted + 1);
        for (position, share) in self.shares[..judged].iter_mut().enumerate() {
            let was_accepted = if position < n_accepted { 1.0 } else { 0.0 };
            *share += self.gain * (was_accepted - *share);
        }
    }

    /// Counts a step, with or without drafts.
    pub(super) fn wait(&mut self, has_drafts: bool) {
        self.waited = if has_drafts { 0 } else { self.waited + 1 };
    }

    /// Probability that draft `position` and all before it are accepted, for each position.
    fn gains(&self) -> impl Iterator<Item = f64> + '_ {
        self.shares.iter().scan(1.0, |all, &share| {
            *all *= f64::from(share);
            Some(*all)
        })
    }
}

/// A sequence that could have drafts in the next step.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) index: SequenceIndex,
    pub(super) slot: u32,
    /// Drafts that fit.
    room: u32,
    acceptance: Acceptance,
    /// Drafts that are to be made.
    pub(super) n_drafts: u32,
}

impl Candidate {
    pub(super) const fn new(
        index: SequenceIndex,
        slot: u32,
        room: u32,
        acceptance: &Acceptance,
    ) -> Self {
        Self { index, slot, room, acceptance: *acceptance, n_drafts: 0 }
    }
}

/// A line through (x, seconds), fitted to recent observations; old ones fade.
#[derive(Debug, Clone, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
    slope: f64,
}

impl Line {
    /// What is left of an observation's weight after the next one.
    const FADE: f64 = 0.97;

    fn observe(&mut self, x: u32, took: Duration) {
        let x = f64::from(x);
        let mut y = took.as_secs_f64();
        if self.weight > 8.0 {
            // The machine was busy with something else.
            y = y.min(4.0 * self.at(x));
        }
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.x, x),
            (&mut self.y, y),
            (&mut self.xx, x * x),
            (&mut self.xy, x * y),
        ] {
            *sum = *sum * Self::FADE + value;
        }
        let (x, y) = (self.x / self.weight, self.y / self.weight);
        let variance = self.xx / self.weight - x * x;
        // Observations of one size say nothing new about the slope.
        if variance > 0.05 * x * x {
            self.slope = ((self.xy / self.weight - x * y) / variance).max(0.0);
        }
    }

    fn at(&self, x: f64) -> f64 {
        if self.weight == 0.0 {
            return 0.0;
        }
        (self.y / self.weight + self.slope * (x - self.x / self.weight)).max(0.0)
    }
}

/// Chooses numbers of drafts.
#[derive(Debug)]
pub(super) struct Policy {
    max_drafts: u32,
    is_adaptive: bool,
    average: Acceptance,
    /// Seconds of a step by its rows.
    step: Line,
    /// Seconds of drafting by its drafts.
    drafting: Line,
    n_choices: u32,
}

impl Policy {
    pub(super) fn new(max_drafts: u32, is_adaptive: bool) -> Self {
        Self {
            max_drafts,
            is_adaptive,
            average: Acceptance::average(),
            step: Line::default(),
            drafting: Line::default(),
            n_choices: 0,
        }
    }

    /// What to assume of a sequence that had no drafts yet.
    pub(super) const fn acceptance(&self) -> Acceptance {
        Acceptance { gain: OWN_GAIN, waited: NEW_WAITED, ..self.average }
    }

    /// Counts one verification.
    pub(super) fn note(&mut self, n_drafts: usize, n_accepted: usize) {
        self.average.note(n_drafts, n_accepted);
    }

    /// Notes what a step without prefill took.
    pub(super) fn observe_step(&mut self, n_rows: u32, took: Duration) {
        self.step.observe(n_rows, took);
    }

    /// Notes what making drafts took.
    pub(super) fn observe_drafting(&mut self, n_drafts: u32, took: Duration) {
        self.drafting.observe(n_drafts, took);
    }

    /// Decides how many drafts each candidate gets.
    pub(super) fn choose(&mut self, candidates: &mut [Candidate]) {
        let turn = self.n_choices % REFIT_EVERY;
        self.n_choices = self.n_choices.wrapping_add(1);
        let fixed = if !self.is_adaptive {
            Some(self.max_drafts)
        } else if turn < 2 * (self.max_drafts + 1) {
            Some(turn % (self.max_drafts + 1))
        } else {
            None
        };
        if let Some(n_drafts) = fixed {
            candidates.iter_mut().for_each(|of| of.n_drafts = n_drafts.min(of.room));
            return;
        }
        self.maximise(candidates);
        for candidate in candidates {
            if candidate.n_drafts == 0 && candidate.acceptance.waited >= PATIENCE {
                candidate.n_drafts = 1.min(candidate.room);
            }
        }
    }

    fn maximise(&self, candidates: &mut [Candidate]) {
        let n = candidates.len() as f64;
        let alone = self.step.at(n);
        let first_draft = self.drafting.at(0.0);
        let draft = self.step.slope + self.drafting.slope;
        if alone <= 0.0 {
            // Nothing was measured yet.
            candidates.iter_mut().for_each(|of| of.n_drafts = self.max_drafts.min(of.room));
            return;
        }
        let mut rate = n / alone;
        // The rate rises from turn to turn and reaches its maximum after a few.
        for _ in 0..8 {
            let (mut gain, mut n_drafts) = (0.0, 0);
            for candidate in &mut *candidates {
                let most = self.max_drafts.min(candidate.room) as usize;
                let worth =
                    candidate.acceptance.gains().take(most).take_while(|p| *p > rate * draft);
                candidate.n_drafts = 0;
                for p in worth {
                    gain += p;
                    candidate.n_drafts += 1;
                }
                n_drafts += candidate.n_drafts;
            }
            let time = alone + first_draft + draft * f64::from(n_drafts);
            let new_rate = (n + gain) / time;
            if n_drafts == 0 || new_rate <= n / alone {
                candidates.iter_mut().for_each(|of| of.n_drafts = 0);
                return;
            }
            if new_rate <= rate * (1.0 + 1e-9) {
                return;
            }
            rate = new_rate;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose steps take `fixed + per_row * rows` and whose drafts take `per_draft` each.
    struct Machine {
        fixed: f64,
        per_row: f64,
        per_draft: f64,
    }

    /// Lets `n` sequences decode, whose drafts are accepted with `share` at each position, and
    /// returns (drafts per step and sequence, tokens per second over those without drafts) of the
    /// last steps.
    fn settled(machine: &Machine, n: u32, share: f64) -> (f64, f64) {
        let mut policy = Policy::new(4, true);
        let mut own: Vec<Acceptance> = (0..n).map(|_| policy.acceptance()).collect();
        let mut random = 1_u64;
        let (mut drafts, mut tokens, mut time, mut n_steps) = (0, 0, 0.0, 0);
        for step in 0..5000 {
            let mut candidates: Vec<_> =
                own.iter().enumerate().map(|(i, a)| Candidate::new(i as u32, 0, 9, a)).collect();
            policy.choose(&mut candidates);
            let n_drafts: u32 = candidates.iter().map(|of| of.n_drafts).sum();
            let drafting = machine.per_draft * f64::from(n_drafts);
            let took = machine.fixed + machine.per_row * f64::from(n + n_drafts);
            if n_drafts > 0 {
                policy.observe_drafting(n_drafts, Duration::from_secs_f64(drafting));
            }
            policy.observe_step(n + n_drafts, Duration::from_secs_f64(took));
            let mut n_tokens = n;
            for (candidate, own) in candidates.iter().zip(&mut own) {
                own.wait(candidate.n_drafts > 0);
                let mut n_accepted = 0;
                while n_accepted < candidate.n_drafts && {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    ((random >> 33) as f64) < share * 2_f64.powi(31)
                } {
                    n_accepted += 1;
                }
                own.note(candidate.n_drafts as usize, n_accepted as usize);
                policy.note(candidate.n_drafts as usize, n_accepted as usize);
                n_tokens += n_accepted;
            }
            if step >= 300 {
                n_steps += 1;
                drafts += n_drafts;
                tokens += n_tokens;
                time += took + drafting;
            }
        }
        let alone = f64::from(n) / (machine.fixed + machine.per_row * f64::from(n));
        let per_step = f64::from(drafts) / f64::from(n_steps * n);
        (per_step, f64::from(tokens) / time / alone)
    }

    #[test]
    fn where_rows_are_nearly_free_good_drafts_are_all_run_and_poor_ones_few() {
        let device = Machine { fixed: 0.010, per_row: 0.000_1, per_draft: 0.000_5 };
        let (drafts, speedup) = settled(&device, 1, 0.9);
        assert!(drafts > 3.5 && speedup > 2.5, "{drafts} {speedup}");
        let (drafts, speedup) = settled(&device, 1, 0.3);
        assert!(drafts < 3.0 && speedup > 1.1, "{drafts} {speedup}");
    }

    #[test]
    fn useless_drafts_cost_a_few_hundredths_at_most() {
        for n in [1, 16] {
            let device = Machine { fixed: 0.010, per_row: 0.003, per_draft: 0.001 };
            let (drafts, speedup) = settled(&device, n, 0.02);
            assert!(drafts < 0.1 && speedup > 0.97, "{n}: {drafts} {speedup}");
        }
    }

    #[test]
    fn a_large_batch_whose_rows_cost_their_full_price_runs_without_drafts() {
        let device = Machine { fixed: 0.010, per_row: 0.002, per_draft: 0.000_1 };
        let (few, speedup) = settled(&device, 1, 0.7);
        assert!(few > 1.5 && speedup > 1.3, "{few} {speedup}");
        let (many, speedup) = settled(&device, 64, 0.7);
        assert!(many < 0.1 && speedup > 0.97, "{many} {speedup}");
    }

    #[test]
    fn a_fixed_number_is_run_whatever_it_costs_where_it_fits() {
        let mut policy = Policy::new(3, false);
        let acceptance = policy.acceptance();
        let mut candidates = [9, 2, 0].map(|room| Candidate::new(0, 0, room, &acceptance));
        policy.choose(&mut candidates);
        assert_eq!(candidates.map(|of| of.n_drafts), [3, 2, 0]);
    }

    #[test]
    fn a_stall_of_the_machine_does_not_bend_the_line() {
        let mut line = Line::default();
        for step in 0..200 {
            let x = 1 + step % 5;
            let stalled = if step == 150 { 3.0 } else { 0.0 };
            line.observe(x, Duration::from_secs_f64(0.01 + 0.001 * f64::from(x) + stalled));
        }
        assert!((line.slope - 0.001).abs() < 0.000_5, "{}", line.slope);
    }
}
