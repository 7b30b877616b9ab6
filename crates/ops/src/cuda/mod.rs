//! The CUDA backend: kernels of `kernels/`, launched through the driver, which is opened at run
//! time. The same binary runs on a machine without a driver and says so.
//!
//! - [`device`]: what the launchers need of a device, and device memory; [`driver`]: the GPU;
//! - [`source`], [`compile`], [`pack`]: where the machine code of kernels comes from;
//! - [`CudaOps`]: every operator as checks and launches (`hc`, `linear`, `attention`, `moe`; the forms
//!   for sm_90a in `hopper`), over tensors, matrices, experts, caches and steps in device memory.
//!
//! State: no kernel of this backend has run on a GPU yet; all of them run in the block emulator
//! (`kernels/emulator`) against the CPU operators. One rank only: a device has no collectives yet.

mod attention;
mod cache;
pub mod compile;
mod copies;
pub mod device;
pub mod driver;
mod experts;
mod hc;
mod hopper;
mod linear;
mod moe;
mod ops;
pub mod pack;
mod sample;
pub mod source;
mod step;
mod tensor;

pub use cache::DeviceCache;
pub use device::{Arg, Buffer, Device, DeviceError, Launch};
pub use driver::{DriverDevice, KernelSources};
pub use experts::DeviceExperts;
pub use linear::DeviceLinear;
pub use ops::{Activations, CudaOps};
pub use sample::RowSummary;
pub use step::DeviceStep;
pub use tensor::{
    DeviceExpertTable, DeviceRouting, DeviceSelection, DeviceTensor, DeviceVector, Element,
};

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
