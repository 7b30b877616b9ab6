//! What is on disk and where it goes: config.json, memory-mapped shards, and their checks.
//!
//! - [`config`]: `config.json` in all its spellings, checked, with a refusal for each relative of
//!   DeepSeek-V4 that is not supported;
//! - [`Checkpoint`]: a directory (or files inside the binary) opened without copying a tensor;
//! - [`expected`]: every tensor a config implies, exactly;
//! - [`verify`]: checks that read tensor bytes;
//! - [`report`]: what `fathom inspect` prints: layers, sizes, what would be refused.
//! - [`synthetic`]: random-weight checkpoints of any size.
//!
//! Invariant: what [`Checkpoint::open`] returns has every tensor of the model, each once, in the
//! format and shape the config implies, inside its file.
//!
//! Not here: devices, ranks, and what the tensors mean.

pub mod config;
pub mod dtype;
pub mod error;
pub mod expected;
pub mod names;
pub mod report;
pub mod shard;
pub mod synthetic;
pub mod verify;

mod check;
mod checkpoint;
mod files;
mod index;
mod view;

pub use checkpoint::{Checkpoint, EffortProfileHint};
pub use config::{ConfigError, GenerationConfig, ParsedConfig, parse_config, release_name};
pub use dtype::StoredDtype;
pub use error::LoadError;
pub use expected::{ExpectedTensor, Variant, expected_tensors};
pub use report::InspectReport;
pub use verify::check_scales;
pub use view::TensorView;
