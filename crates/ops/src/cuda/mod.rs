//! The CUDA backend: kernels of `kernels/`, launched through the driver, which is opened at run
//! time. The same binary runs on a machine without a driver and says so.
//!
//! - [`device`]: what the launchers need of a device; [`driver`] (with [`gpu`], [`overlap`], [`event`], `cluster`, `recordings`): the GPU;
//!   [`emulator`]: a process that runs kernels on the CPU; [`rehearsal`]: none, to see what memory will
//!   be needed;
//! - [`memory`]: arenas and buffers; `pool`: what the driver keeps of buffers given back;
//! - [`code`], with [`source`], [`compile`], [`pack`]: where the machine code of kernels comes from;
//! - [`CudaOps`]: every operator as checks and launches (`hc`, `linear`, `attention`, `indexer`, `store`, `moe`; the forms
//!   for sm_90a in `hopper` and `hopper_attention`, for sm_100f in `blackwell` and `blackwell_bf16`), over tensors, matrices, experts, caches and steps in device memory;
//!   `splits`: how attention is divided; `choose`: tokens; `replay`: steps as one call.
//!
//! State: no kernel of this backend has run on a GPU yet; all of them run in the block emulator
//! (`kernels/emulator`) against the CPU operators. One rank only: a device has no collectives yet.

mod attention;
mod blackwell;
mod blackwell_bf16;
mod cache;
pub mod check;
mod choose;
mod cluster;
pub mod code;
pub mod compile;
mod copies;
pub mod device;
mod draw;
pub mod driver;
pub mod emulator;
pub mod event;
mod experts;
pub mod gpu;
mod hc;
mod hopper;
mod hopper_attention;
mod indexer;
mod linear;
pub mod memory;
mod moe;
mod ops;
pub mod overlap;
pub mod pack;
mod pool;
mod recordings;
pub mod rehearsal;
mod replay;
mod sample;
mod skinny;
pub mod source;
mod splits;
mod staging;
mod step;
mod store;
mod tensor;
pub mod tensor_map;
mod timing;

pub use cache::DeviceCache;
pub use choose::MAX_TOP;
pub use code::{KernelSources, Origin};
pub use device::{Arg, Device, DeviceError, Launch, MemoryInfo, Stamp};
pub use driver::DriverDevice;
pub use experts::DeviceExperts;
pub use gpu::GpuFacts;
pub use linear::DeviceLinear;
pub use memory::{ArenaSizes, Buffer, Memory, Place};
pub use ops::CudaOps;
pub use sample::RowSummary;
pub use step::DeviceStep;
pub use tensor::{
    DeviceExpertTable, DeviceRouting, DeviceSelection, DeviceTensor, DeviceVector, Element,
};
pub use tensor_map::{MapElement, Swizzle, TensorMap, TensorMapSpec};
pub use timing::{Effort, Timed};

pub use crate::Activations;
use crate::{Communicator, OpError};

/// Refuses an operator that would have to add up parts of several ranks.
fn single_rank(op: &'static str, comm: &dyn Communicator) -> Result<(), OpError> {
    let config = comm.rank().config();
    let n_ranks = config.tensor * config.expert;
    if n_ranks == 1 {
        return Ok(());
    }
    let what = "rank (a device has no collectives yet)";
    Err(OpError::OutOfRange { op, what, got: n_ranks, limit: 1 })
}
