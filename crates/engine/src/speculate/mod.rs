//! Speculative decoding: tokens are guessed cheaply and verified in the target model's own step.
//!
//! After a step a [`Drafter`] guesses how its sequences go on; the next step runs the guesses behind
//! each sequence's newest token and gives the logits of all these rows. The request's sampler then
//! goes through the rows in order, as if they were steps: at each position it chooses by the target's
//! logits and its own state alone. While its choice equals the draft, the next row is worth looking
//! at. Drafts thus decide how many tokens a step gives, never which.
//!
//! Invariants:
//! - a draft is accepted only if it is the token that would have been sampled without it;
//! - sampler, constraint and events see accepted tokens only, each once and in order;
//! - rejected rows are never read again: the cache is addressed by position, and the next step
//!   overwrites them.
//!
//! - [`ngram`]: guesses from the text so far; [`mtp`]: guesses of the model's MTP block;
//! - `policy`: how many guesses are worth their time.
//!
//! Not here: how many drafts a step has room for (`scheduler`), taking back rows (`ops`).

pub mod mtp;
pub mod ngram;
mod policy;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fathom_core::{SamplingParams, TokenId};
use fathom_ops::sample::Beside;
use fathom_scheduler::{PlanEntry, Scheduler, SequenceIndex, StepPlan, Work};

use self::mtp::MtpDrafter;
use self::ngram::NgramDrafter;
use self::policy::{Acceptance, Candidate, Policy};
use crate::runner::{StepError, StepRunner};
use crate::stats::DraftCounts;

/// Drafts of one sequence in one step, at most.
pub const MAX_DRAFTS: usize = 8;

/// Who guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DraftMethod {
    /// Nobody.
    #[default]
    Off,
    /// The text so far: what followed the last tokens when they occurred before.
    Ngram,
    /// The model's MTP block, used recurrently.
    Mtp,
}

/// How an engine speculates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeculationConfig {
    /// Who guesses. Default: nobody.
    pub method: DraftMethod,
    /// Drafts of a sequence in a step, at most; cut to what the runner can take back. Default 3.
    pub max_drafts: u32,
    /// Whether fewer or no drafts are run where they would cost more time than they save; if not,
    /// every decode has as many as there are. Default true.
    pub is_adaptive: bool,
}

impl Default for SpeculationConfig {
    fn default() -> Self {
        Self { method: DraftMethod::Off, max_drafts: 3, is_adaptive: true }
    }
}

/// A sequence whose continuation is wanted.
#[derive(Debug, Clone)]
pub struct DraftRequest<'a> {
    /// The sequence's number until [`Drafter::end`]; then it may be another one's.
    pub index: SequenceIndex,
    /// Its state slot in the runner.
    pub slot: u32,
    /// Prompt and answer so far. All but the last have run.
    pub tokens: &'a [TokenId],
    /// Tokens wanted, at least 1; fewer are welcome where a guess would be poor.
    pub n_drafts: u32,
    /// How the request chooses its tokens. A drafter that has logits gets most guesses accepted if
    /// it chooses the same way, with the same noise.
    pub sampling: &'a Arc<SamplingParams>,
}

/// Guesses how sequences go on.
pub trait Drafter: Send {
    /// Appends the guesses for `requests[i]` to `drafts[i]`, which is empty. `runner` has just run
    /// a step; drafters that compute do so on its device, and call `beside` when they wait for it.
    ///
    /// # Errors
    /// [`StepError`], after which nothing in the runner's memory is trusted.
    fn draft(
        &mut self,
        requests: &[DraftRequest<'_>],
        runner: &mut dyn StepRunner,
        drafts: &mut [Vec<TokenId>],
        beside: &mut Beside<'_>,
    ) -> Result<(), StepError>;

    /// A sequence has ended: whatever was kept about it is of no use any more.
    fn end(&mut self, index: SequenceIndex) {
        let _ = index;
    }
}

/// What is known about the drafts of one sequence.
#[derive(Debug, Default)]
struct SequenceDrafts {
    tokens: Vec<TokenId>,
    acceptance: Option<Acceptance>,
}

/// Drafts of the running sequences. Without a drafter it does nothing and costs nothing.
pub(crate) struct Speculation {
    drafter: Option<Box<dyn Drafter>>,
    policy: Policy,
    /// By the scheduler's sequence index.
    sequences: Vec<SequenceDrafts>,
    candidates: Vec<Candidate>,
    /// How the candidates choose their tokens.
    sampling: Vec<Arc<SamplingParams>>,
    /// Drafts of the candidates, while they are made.
    made: Vec<Vec<TokenId>>,
    counts: DraftCounts,
}

impl Speculation {
    /// Speculates as `config` says, with `drafter` if there is one, over a runner that can take back
    /// `limit` tokens.
    pub(crate) fn new(
        config: &SpeculationConfig,
        drafter: Option<Box<dyn Drafter>>,
        limit: u32,
    ) -> Self {
        let drafter = drafter.or_else(|| -> Option<Box<dyn Drafter>> {
            match config.method {
                DraftMethod::Off => None,
                DraftMethod::Ngram => Some(Box::new(NgramDrafter::default())),
                DraftMethod::Mtp => Some(Box::new(MtpDrafter::default())),
            }
        });
        let max_drafts = config.max_drafts.min(limit).min(MAX_DRAFTS as u32);
        Self {
            drafter: drafter.filter(|_| max_drafts > 0),
            policy: Policy::new(max_drafts, config.is_adaptive),
            sequences: Vec::new(),
            candidates: Vec::new(),
            sampling: Vec::new(),
            made: Vec::new(),
            counts: DraftCounts::default(),
        }
    }

    /// The drafts that `entry` runs, after the tokens that its sequence has.
    pub(crate) fn drafts(&self, entry: &PlanEntry) -> &[TokenId] {
        match entry.n_drafts as usize {
            0 => &[],
            n_drafts => &self.sequences[entry.index as usize].tokens[..n_drafts],
        }
    }

    /// Notes how many drafts of `entry` were accepted.
    pub(crate) fn note(&mut self, entry: &PlanEntry, n_accepted: usize) {
        let n_drafts = entry.n_drafts as usize;
        if n_drafts == 0 {
            return;
        }
        self.counts.drafts += 1;
        self.counts.drafted[..n_drafts].iter_mut().for_each(|count| *count += 1);
        self.counts.accepted[..n_accepted].iter_mut().for_each(|count| *count += 1);
        self.policy.note(n_drafts, n_accepted);
        if let Some(acceptance) = &mut self.sequences[entry.index as usize].acceptance {
            acceptance.note(n_drafts, n_accepted);
        }
    }

    /// A sequence has ended.
    pub(crate) fn end(&mut self, index: SequenceIndex) {
        let Some(drafter) = &mut self.drafter else { return };
        drafter.end(index);
        if let Some(sequence) = self.sequences.get_mut(index as usize) {
            sequence.acceptance = None;
        }
    }

    /// Counters.
    pub(crate) const fn counts(&self) -> DraftCounts {
        self.counts
    }

    /// After a step that ran `plan` and took `step_time`: chooses which of the sequences that got a
    /// token and did not end are worth guesses. `sampling` gives their parameters, or `None` for those
    /// that ended.
    pub(crate) fn choose<'a>(
        &mut self,
        plan: &StepPlan,
        step_time: Duration,
        scheduler: &Scheduler,
        sampling: impl Fn(SequenceIndex) -> Option<&'a Arc<SamplingParams>>,
    ) {
        if self.drafter.is_none() {
            return;
        }
        if plan.entries.iter().all(|entry| entry.work == Work::Decode) {
            self.policy.observe_step(plan.n_tokens(), step_time);
        }
        self.candidates.clear();
        let got_token = plan.entries.iter().filter(|entry| entry.wants_logits);
        for entry in got_token.filter(|entry| sampling(entry.index).is_some()) {
            let index = entry.index as usize;
            if index >= self.sequences.len() {
                self.sequences.resize_with(index + 1, SequenceDrafts::default);
            }
            let average = self.policy.acceptance();
            let acceptance = self.sequences[index].acceptance.get_or_insert(average);
            let room = scheduler.sequence(entry.index).room_for_drafts();
            self.candidates.push(Candidate::new(entry.index, entry.slot, room, acceptance));
        }
        self.policy.choose(&mut self.candidates);
        for chosen in &self.candidates {
            let sequence = &mut self.sequences[chosen.index as usize];
            sequence.tokens.clear();
            if let Some(acceptance) = &mut sequence.acceptance {
                acceptance.wait(chosen.n_drafts > 0);
            }
        }
        self.candidates.retain(|candidate| candidate.n_drafts > 0);
        self.sampling.clear();
        let chosen = self.candidates.iter().filter_map(|chosen| sampling(chosen.index));
        self.sampling.extend(chosen.cloned());
    }

    /// Guesses how the chosen sequences go on, and asks the scheduler to run the guesses.
    ///
    /// # Errors
    /// What the drafter fails with.
    pub(crate) fn draft(
        &mut self,
        scheduler: &mut Scheduler,
        runner: &mut dyn StepRunner,
        beside: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        let Some(drafter) = self.drafter.as_mut().filter(|_| !self.candidates.is_empty()) else {
            return Ok(());
        };
        self.made.clear();
        let mut requests = Vec::with_capacity(self.candidates.len());
        for (chosen, sampling) in self.candidates.iter().zip(&self.sampling) {
            let tokens = scheduler.sequence(chosen.index).tokens();
            let (index, slot, n_drafts) = (chosen.index, chosen.slot, chosen.n_drafts);
            requests.push(DraftRequest { index, slot, tokens, n_drafts, sampling });
            self.made.push(std::mem::take(&mut self.sequences[index as usize].tokens));
        }
        let before = Instant::now();
        drafter.draft(&requests, runner, &mut self.made, beside)?;
        let n_made: usize = self.made.iter().map(Vec::len).sum();
        self.policy.observe_drafting(n_made as u32, before.elapsed());
        for (chosen, mut tokens) in self.candidates.iter().zip(self.made.drain(..)) {
            tokens.truncate(chosen.n_drafts as usize);
            scheduler.want_drafts(chosen.index, tokens.len() as u32);
            self.sequences[chosen.index as usize].tokens = tokens;
        }
        Ok(())
    }
}
