//! From a row of logits to a token: the definition, which every device follows to the bit.
//!
//! Stages, in this order: repetition, frequency and presence penalties; logit bias; mask; forbidden
//! tokens; temperature; top-k; top-p; min-p; draw. Log-probabilities are those of the raw logits.
//!
//! The draw takes the token whose scaled logit plus Gumbel noise is highest. The noise of a token
//! is a pure function of (seed, choice, position, token), so a request's tokens do not depend on
//! the batch, and a draft model that uses the same noise tends to pick the same token.
//!
//! What makes devices agree to the bit: logarithms and exponentials are a fixed sequence of rounded
//! operations ([`real`]), weights are integers, whose sums have no order, and equals go to the lower
//! token id.
//!
//! Not here: what a request has seen, what its grammar allows and when it ends (the engine).

mod device;
pub mod logprobs;
pub mod noise;
pub mod real;
mod shape;
mod truncate;

use std::sync::Arc;

use fathom_core::{SamplingParams, TokenId, TokenLogprob};

pub use self::device::{Beside, ChoiceOps, Chosen};
use self::logprobs::{highest, logprobs};
use self::noise::{MAX_GUMBEL, Noise};
pub use self::shape::penalises;
use self::truncate::{Candidates, truncate};

/// How the token after one row of logits is chosen.
#[derive(Debug, Clone, Copy)]
pub struct RowChoice<'a> {
    /// Temperature, filters, penalties, bias, seed. Stop tokens and lengths are not looked at.
    pub params: &'a SamplingParams,
    /// Position of the token to choose.
    pub position: u32,
    /// Tokens that penalties concern, each once, with how often they were generated.
    pub seen: &'a [(TokenId, u32)],
    /// One bit per token, set where it is allowed; all are without it.
    pub mask: Option<&'a [u32]>,
    /// Tokens that may not come now.
    pub forbidden: &'a [TokenId],
}

/// The same, for whoever chooses elsewhere or later.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedRowChoice {
    /// See [`RowChoice::params`].
    pub params: Arc<SamplingParams>,
    /// See [`RowChoice::position`].
    pub position: u32,
    /// See [`RowChoice::seen`].
    pub seen: Vec<(TokenId, u32)>,
    /// See [`RowChoice::mask`].
    pub mask: Option<Vec<u32>>,
    /// See [`RowChoice::forbidden`].
    pub forbidden: Vec<TokenId>,
}

impl OwnedRowChoice {
    /// What it holds.
    #[must_use]
    pub fn borrowed(&self) -> RowChoice<'_> {
        RowChoice {
            params: &self.params,
            position: self.position,
            seen: &self.seen,
            mask: self.mask.as_deref(),
            forbidden: &self.forbidden,
        }
    }
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// The token, and its log-probabilities if the parameters ask for them.
    Token(TokenId, Option<TokenLogprob>),
    /// A logit is NaN or infinite.
    NotFinite,
    /// Every token is forbidden.
    NothingAllowed,
}

/// Memory that is reused from row to row.
#[derive(Debug, Default)]
pub struct ChoiceScratch {
    raw: Vec<f32>,
    kept: Candidates,
}

/// Whether every logit is a number.
#[must_use]
pub fn is_finite(logits: &[f32]) -> bool {
    // No early exit: the loop then runs at memory speed.
    logits.iter().fold(true, |finite, logit| finite & logit.is_finite())
}

/// Chooses a token from `logits` (`[vocab_size]`, consumed).
pub fn choose_token(
    row: &RowChoice<'_>,
    logits: &mut [f32],
    scratch: &mut ChoiceScratch,
) -> Choice {
    if !is_finite(logits) {
        return Choice::NotFinite;
    }
    if row.params.logprobs.is_some() {
        scratch.raw.clear();
        scratch.raw.extend_from_slice(logits);
    }
    shape::shape(row, logits);
    let Some(token) = draw(row.params, logits, row.position, scratch) else {
        return Choice::NothingAllowed;
    };
    let reported = row.params.logprobs.map(|n_top| logprobs(&scratch.raw, token, n_top));
    Choice::Token(token, reported)
}

/// Temperature, filters and draw over shaped `logits`; `None` if every token is forbidden.
fn draw(
    params: &SamplingParams,
    logits: &[f32],
    position: u32,
    scratch: &mut ChoiceScratch,
) -> Option<TokenId> {
    let (likeliest, most) = argmax(logits)?;
    let &SamplingParams { temperature, top_p, top_k, seed, choice, .. } = params;
    // Temperatures too small to divide by are as good as zero; nothing is near an infinite logit.
    let is_greedy = temperature < f32::MIN_POSITIVE || top_p <= 0.0 || top_k == 1;
    if is_greedy || most == f32::INFINITY {
        return Some(likeliest);
    }
    let noise = Noise::new(seed, choice, position);
    let scale = 1.0 / f64::from(temperature);
    if truncate::is_on(params) {
        truncate(params, logits, most, &mut scratch.kept);
        let score = |&(token, logit): &(TokenId, f32)| {
            ((f64::from(logit) - f64::from(most)) * scale + noise.gumbel(token), token)
        };
        return scratch.kept.iter().map(score).reduce(better).map(|(_, token)| token);
    }
    Some(draw_from_all(logits, (likeliest, most), scale, &noise))
}

/// The higher score; of equals the lower token.
fn better(a: (f64, TokenId), b: (f64, TokenId)) -> (f64, TokenId) {
    if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a }
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
    // trained model's vocabulary is that unlikely, and noise is what costs time here. One step down
    // covers the rounding: nothing that could win is left out.
    let reach = |best: f64| (((best - MAX_GUMBEL) / scale + f64::from(most)) as f32).next_down();
    let mut least = reach(best.0);
    for (group, logits) in logits.chunks(4).enumerate() {
        if logits.iter().all(|&logit| logit < least) {
            continue;
        }
        let noise = noise.gumbel_group(group as u32);
        for (lane, (&logit, noise)) in logits.iter().zip(noise).enumerate() {
            let score = (f64::from(logit) - f64::from(most)) * scale + noise;
            let found = better(best, (score, 4 * group as u32 + lane as u32));
            if found.0 > best.0 {
                least = reach(found.0);
            }
            best = found;
        }
    }
    best.1
}
