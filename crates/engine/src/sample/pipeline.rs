//! The choices of one request, one after the other.
//!
//! Not here: the arithmetic of a choice ([`fathom_ops::sample`]).

use std::sync::Arc;

use fathom_core::{FinishReason, SamplingParams, TokenConstraint, TokenId, TokenLogprob};
use fathom_ops::sample::{Choice, ChoiceScratch, OwnedRowChoice, RowChoice, choose_token};

use super::ahead::{HeldConstraint, MaskThreads};
use super::mask::fill_mask;
use super::seen::Seen;
use crate::handle::GenerateError;
use crate::runner::OutputRow;

/// Memory that is reused from token to token and from request to request.
#[derive(Debug, Default)]
pub struct SampleScratch {
    mask: Vec<u32>,
    forbidden: Vec<TokenId>,
    choice: ChoiceScratch,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log-probabilities, if the request asked for them.
    pub logprob: Option<TokenLogprob>,
    /// Why the request ends with it, if it does.
    pub end: Option<FinishReason>,
}

/// How one request chooses its tokens.
pub struct RequestSampler {
    params: Arc<SamplingParams>,
    seen: Seen,
    constraint: Option<HeldConstraint>,
    n_generated: u32,
}

impl RequestSampler {
    /// The sampler of a request with this prompt.
    #[must_use]
    pub fn new(
        params: SamplingParams,
        prompt: &[TokenId],
        constraint: Option<Box<dyn TokenConstraint>>,
    ) -> Self {
        let seen = Seen::new(&params, prompt);
        let constraint = constraint.map(HeldConstraint::new);
        Self { params: Arc::new(params), seen, constraint, n_generated: 0 }
    }

    /// The request's parameters.
    #[must_use]
    pub const fn params(&self) -> &Arc<SamplingParams> {
        &self.params
    }

    /// Has the constraint's next mask made ready on another thread, if there is one that takes
    /// work.
    pub(crate) fn prepare(&mut self, threads: &mut MaskThreads) {
        if let Some(constraint) = &mut self.constraint {
            constraint.prepare(threads);
        }
    }

    /// Chooses the token at `position` of the sequence from `logits` (`[vocab_size]`, consumed).
    /// `eos` are the model's end-of-sequence tokens.
    ///
    /// # Errors
    /// [`GenerateError`] if the logits are not finite, the constraint fails, or nothing is allowed.
    /// The request cannot go on then.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        position: u32,
        eos: &[TokenId],
        scratch: &mut SampleScratch,
    ) -> Result<Sampled, GenerateError> {
        let SampleScratch { mask, forbidden, choice } = scratch;
        let is_masked = self.restrict(&[], eos, logits.len(), mask, forbidden)?;
        let row = RowChoice {
            params: &self.params,
            position,
            seen: self.seen.counts(),
            mask: is_masked.then_some(mask.as_slice()),
            forbidden,
        };
        let chosen = choose_token(&row, logits, choice);
        self.take(chosen, position, eos)
    }

    /// Takes what the runner made of the row before `position`: a choice, or logits to choose from.
    ///
    /// # Errors
    /// As [`RequestSampler::sample`].
    pub fn sample_row(
        &mut self,
        row: OutputRow<'_>,
        position: u32,
        eos: &[TokenId],
        scratch: &mut SampleScratch,
    ) -> Result<Sampled, GenerateError> {
        match row {
            OutputRow::Logits(logits) => self.sample(logits, position, eos, scratch),
            OutputRow::Chosen(choice) => self.take(choice, position, eos),
        }
    }

    /// How the token at `position` is to be chosen if `drafts` are the tokens before it that are not
    /// sampled yet; `None` if that cannot be known, or not without an error, ahead.
    pub fn choice_after(
        &mut self,
        drafts: &[TokenId],
        position: u32,
        eos: &[TokenId],
        vocab_size: usize,
    ) -> Option<OwnedRowChoice> {
        if self.constraint.is_some() && !drafts.is_empty() {
            // A grammar knows what follows tokens that it was given, not those that it may be.
            return None;
        }
        let (mut mask, mut forbidden) = (Vec::new(), Vec::new());
        let is_masked = self.restrict(drafts, eos, vocab_size, &mut mask, &mut forbidden).ok()?;
        Some(OwnedRowChoice {
            params: Arc::clone(&self.params),
            position,
            seen: self.seen.counts_after(drafts),
            mask: is_masked.then_some(mask),
            forbidden,
        })
    }

    /// What may not come after `drafts`: fills `forbidden` and, if there is a constraint, `mask`.
    /// Whether there is one.
    fn restrict(
        &mut self,
        drafts: &[TokenId],
        eos: &[TokenId],
        vocab_size: usize,
        mask: &mut Vec<u32>,
        forbidden: &mut Vec<TokenId>,
    ) -> Result<bool, GenerateError> {
        let mut may_go_on = true;
        if let Some(constraint) = &mut self.constraint {
            let constraint = constraint.get()?;
            may_go_on = !constraint.is_finished();
            fill_mask(constraint, eos, vocab_size, mask)?;
        }
        forbidden.clear();
        // A complete grammar wins over `min_tokens`: after it there is nothing else to say.
        if self.n_generated + (drafts.len() as u32) < self.params.min_tokens && may_go_on {
            forbidden.extend_from_slice(&self.params.stop_token_ids);
            if !self.params.ignore_eos {
                forbidden.extend_from_slice(eos);
            }
        }
        Ok(self.constraint.is_some())
    }

    /// Goes on with what was chosen for `position`.
    fn take(
        &mut self,
        choice: Choice,
        position: u32,
        eos: &[TokenId],
    ) -> Result<Sampled, GenerateError> {
        let (token, logprob) = match choice {
            Choice::Token(token, logprob) => (token, logprob),
            Choice::NotFinite => return Err(GenerateError::NonFiniteLogits { position }),
            Choice::NothingAllowed => return Err(GenerateError::NothingAllowed { position }),
        };
        self.n_generated += 1;
        self.seen.note(token);
        let end = self.end(token, eos);
        if end.is_none()
            && let Some(constraint) = &mut self.constraint
        {
            constraint.get()?.commit(token)?;
        }
        Ok(Sampled { token, logprob, end })
    }

    fn end(&self, token: TokenId, eos: &[TokenId]) -> Option<FinishReason> {
        if !self.params.ignore_eos && eos.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.params.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else {
            None
        }
    }
}
