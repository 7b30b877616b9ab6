//! Every operator DeepSeek-V4 needs, behind traits that a CPU and a CUDA backend implement.
//!
//! The model (`fathom-model`) is written once over [`Ops`]. [`cpu::CpuOps`] *defines* every
//! result; a device backend must agree with it within the tolerance of each operator.
//!
//! - [`traits`]: the operators, at the granularity of one fused device launch;
//! - [`layer`]: the weights of a layer as operators receive them, named as in the checkpoint;
//! - [`weight`]: a matrix as it lies in the checkpoint, before a backend prepares it;
//! - [`batch`], [`cache_spec`]: what one step runs, and the cache it runs over;
//! - [`row_formats`], [`cache_page`]: how its rows are stored, and how kernels want them laid out;
//! - [`sample`]: from logits to tokens;
//! - [`comm`]: collectives between ranks.
//!
//! Not here: the order in which layers call operators (`fathom-model`), files (`fathom-weights`).

pub mod batch;
pub mod cache_page;
pub mod cache_spec;
pub mod comm;
mod copies;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod layer;
pub mod row_formats;
pub mod sample;
pub mod traits;
pub mod weight;

pub use batch::{Batch, SequenceSlice};
pub use cache_spec::{BLOCK_TOKENS, CacheSpec};
pub use comm::{Communicator, LocalComm, Solo};
pub use error::OpError;
pub use row_formats::{FormatError, IndexKeyFormat, KvFormat, RowFormats};
pub use traits::{
    Activations, AttentionOps, Backend, Drawing, HeadOps, HyperConnectionOps, MoeOps, Ops,
    PassOutput,
};
pub use weight::{Scales, WeightData, WeightSource};
