//! From logits to a token: one pipeline per request, stages in a fixed order.
//!
//! Repetition, frequency and presence penalties; logit bias; constraint mask; `min_tokens` mask;
//! temperature; top-k; top-p; min-p; draw. Log-probabilities are those of the raw logits.
//!
//! The draw takes the token whose scaled logit plus Gumbel noise is highest. The noise of a token
//! is a pure function of (seed, choice, position, token), so a request's tokens do not depend on
//! the batch, and a draft model that uses the same noise tends to pick the same token.
//!
//! Not here: when a sequence ends by length (`scheduler`), stop strings (text never gets here).

pub(crate) mod ahead;
pub mod logprobs;
pub mod mask;
pub mod penalties;
pub mod pipeline;
pub mod rng;
pub mod truncate;

pub use pipeline::{RequestSampler, SampleScratch, Sampled, guess};
