//! DeepSeek-V4's forward pass, written once over the operator traits, and its cache geometry.
//!
//! - [`transformer`], [`block`], [`attention`] (with [`compressor`] and [`indexer`]), [`moe`],
//!   [`hyper_connection`], [`head`], [`mtp`]: one file per class of `inference/model.py` of the
//!   official release, with its names, holding the weights and the order of the operators;
//! - [`load`], [`rope`]: from a checkpoint to those weights, for one rank;
//! - [`cache`]: how many bytes the cache takes and how many tokens a budget holds;
//! - [`probe`]: looking at what happens inside a pass;
//! - [`session`]: one sequence at a time, for tools and tests.
//!
//! Not here: what an operator computes (`fathom-ops`), who is in a batch (`fathom-scheduler`),
//! which token follows from logits (`fathom-engine`).

pub mod attention;
pub mod block;
pub mod cache;
pub mod compressor;
pub mod error;
pub mod head;
pub mod hyper_connection;
pub mod indexer;
pub mod load;
pub mod moe;
pub mod mtp;
pub mod probe;
pub mod rope;
pub mod session;
pub mod transformer;

pub use block::{Block, Outcome, Pass};
pub use cache::plan::{CacheRequest, MemoryPlan, PlanError};
pub use error::ModelError;
pub use load::{LoadOptions, LoadProgress};
pub use mtp::MtpBlock;
pub use probe::{NoProbe, Probe, Seen};
pub use session::Session;
pub use transformer::{StepOutput, Transformer};
