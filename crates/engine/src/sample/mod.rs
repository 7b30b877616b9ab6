//! From logits to a token: one sampler per request.
//!
//! A sampler knows what its request has seen and what its grammar allows, and turns both into a
//! [`RowChoice`](fathom_ops::sample::RowChoice). What a choice gives is defined in
//! [`fathom_ops::sample`]; it is made here from logits, or by the runner where the logits are.
//!
//! Not here: when a sequence ends by length (`scheduler`), stop strings (text never gets here).

pub(crate) mod ahead;
pub mod mask;
pub mod pipeline;
pub mod seen;

pub use pipeline::{RequestSampler, SampleScratch, Sampled};
