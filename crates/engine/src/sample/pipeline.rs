//! The stages in their order, for one request.

use std::sync::Arc;

use fathom_core::{FinishReason, SamplingParams, TokenConstraint, TokenId, TokenLogprob};

use super::ahead::{HeldConstraint, MaskThreads};
use super::logprobs::{highest, logprobs};
use super::mask::{apply_constraint, forbid};
use super::penalties::{Penalties, add_bias};
use super::rng::{MAX_GUMBEL, Noise};
use super::truncate::{self, Candidates, truncate};
use crate::handle::GenerateError;

/// Memory that is reused from token to token and from request to request.
#[derive(Debug, Default)]
pub struct SampleScratch {
    raw: Vec<f32>,
    mask: Vec<u32>,
    kept: Candidates,
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
    penalties: Penalties,
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
        let penalties = Penalties::new(&params, prompt);
        let constraint = constraint.map(HeldConstraint::new);
        Self { params: Arc::new(params), penalties, constraint, n_generated: 0 }
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
        // No early exit: the loop then runs at memory speed.
        if !logits.iter().fold(true, |finite, logit| finite & logit.is_finite()) {
            return Err(GenerateError::NonFiniteLogits { position });
        }
        if self.params.logprobs.is_some() {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
        self.shape(logits, eos, scratch)?;
        let token = choose(&self.params, logits, position, scratch)
            .ok_or(GenerateError::NothingAllowed { position })?;

        let logprob = self.params.logprobs.map(|n_top| logprobs(&scratch.raw, token, n_top));
        self.n_generated += 1;
        self.penalties.note(token);
        let end = self.end(token, eos);
        if end.is_none()
            && let Some(constraint) = &mut self.constraint
        {
            constraint.get()?.commit(token)?;
        }
        Ok(Sampled { token, logprob, end })
    }

    /// Penalties, bias and masks.
    fn shape(
        &mut self,
        logits: &mut [f32],
        eos: &[TokenId],
        scratch: &mut SampleScratch,
    ) -> Result<(), GenerateError> {
        self.penalties.apply(logits);
        add_bias(&self.params.logit_bias, logits);
        let mut may_go_on = true;
        if let Some(constraint) = &mut self.constraint {
            let constraint = constraint.get()?;
            may_go_on = !constraint.is_finished();
            apply_constraint(constraint, eos, &mut scratch.mask, logits)?;
        }
        // A complete grammar wins over `min_tokens`: after it there is nothing else to say.
        if self.n_generated < self.params.min_tokens && may_go_on {
            forbid(&self.params.stop_token_ids, logits);
            if !self.params.ignore_eos {
                forbid(eos, logits);
            }
        }
        Ok(())
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

/// The token at `position` that a request with `params` would choose if a draft model's `logits`
/// (`[vocab_size]`, consumed) were the target's: with the same bias, filters and noise, but without
/// what depends on its history (penalties, constraint, `min_tokens`). `None` if there is none.
pub fn guess(
    params: &SamplingParams,
    logits: &mut [f32],
    position: u32,
    scratch: &mut SampleScratch,
) -> Option<TokenId> {
    add_bias(&params.logit_bias, logits);
    choose(params, logits, position, scratch)
}

/// Temperature, filters and draw; `None` if every token is forbidden.
fn choose(
    params: &SamplingParams,
    logits: &[f32],
    position: u32,
    scratch: &mut SampleScratch,
) -> Option<TokenId> {
    let (likeliest, most) = argmax(logits)?;
    let &SamplingParams { temperature, top_p, top_k, seed, choice, .. } = params;
    // Temperatures too small to divide by are as good as zero.
    if temperature < f32::MIN_POSITIVE || top_p <= 0.0 || top_k == 1 {
        return Some(likeliest);
    }
    let noise = Noise::new(seed, choice, position);
    let scale = 1.0 / f64::from(temperature);
    if truncate::is_on(params) {
        truncate(params, logits, most, &mut scratch.kept);
        let score = |&(token, logit): &(TokenId, f32)| {
            (f64::from(logit) - f64::from(most)) * scale + noise.gumbel(token)
        };
        let best = scratch.kept.iter().max_by(|a, b| score(a).total_cmp(&score(b)));
        return best.map(|&(token, _)| token);
    }
    Some(draw_from_all(logits, (likeliest, most), scale, &noise))
}

/// The highest logit and its token, the lowest id on ties; `None` if all are negative infinity.
fn argmax(logits: &[f32]) -> Option<(TokenId, f32)> {
    let most = highest(logits);
    let token = logits.iter().position(|&logit| logit == most)?;
    (most > f32::NEG_INFINITY).then_some((token as TokenId, most))
}

/// Draws from the whole vocabulary: the token with the highest scaled logit plus noise.
fn draw_from_all(
    logits: &[f32],
    (likeliest, most): (TokenId, f32),
    scale: f64,
    noise: &Noise,
) -> TokenId {
    let mut best = (noise.gumbel(likeliest), likeliest);
    // Noise is bounded, so a group far below the best so far cannot win and needs none. Most of a
    // trained model's vocabulary is that unlikely, and noise is what costs time here.
    let reach = |best: f64| ((best - MAX_GUMBEL) / scale + f64::from(most)) as f32;
    let mut least = reach(best.0);
    for (group, logits) in logits.chunks(4).enumerate() {
        if logits.iter().all(|&logit| logit < least) {
            continue;
        }
        let noise = noise.gumbel_group(group as u32);
        for (lane, (&logit, noise)) in logits.iter().zip(noise).enumerate() {
            let score = (f64::from(logit) - f64::from(most)) * scale + noise;
            if score > best.0 {
                best = (score, 4 * group as u32 + lane as u32);
                least = reach(score);
            }
        }
    }
    best.1
}
