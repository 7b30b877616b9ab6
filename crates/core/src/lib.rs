//! The nouns and number formats that every Fathom crate shares.
//!
//! - [`num`]: FP8 E4M3, FP4 E2M1 and E8M0 scales, with the rounding rules of the official kernels;
//! - [`model_config`]: what `config.json` means, checked;
//! - [`sampling`], [`usage`], [`ids`], [`constraint`]: what a request asks for and what it gets;
//! - [`json_schema`]: the keywords that more than one crate looks for in schemas;
//! - [`numerics`], [`parallel`]: how the model is computed, and on how many ranks.
//!
//! Not here: IO, threads, tensors, JSON. Those live in the crates above this one.

pub mod constraint;
pub mod ids;
pub mod json_schema;
pub mod model_config;
pub mod num;
pub mod numerics;
pub mod parallel;
pub mod sampling;
pub mod usage;

pub use constraint::{ConstraintError, TokenConstraint};
pub use ids::{RequestId, TokenId};
pub use model_config::{ExpertFormat, LayerKind, ModelConfig, RouterKind, YarnConfig};
pub use numerics::Numerics;
pub use parallel::{Group, ParallelConfig, ParallelError, Rank};
pub use sampling::{SamplingParams, TokenLogprob};
pub use usage::{FinishReason, Usage};
