//! The CUDA backend: kernels of `kernels/`, launched through the driver, which is opened at run
//! time. The same binary runs on a machine without a driver and says so.
//!
//! - [`device`]: what the launchers need of a device.
//!
//! State: no kernel of this backend has run on a GPU yet; all of them run in the block emulator
//! (`kernels/emulator`) against the CPU operators.

pub mod device;

pub use device::{Arg, Buffer, Device, DeviceError, Launch};
