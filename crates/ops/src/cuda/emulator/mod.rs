//! A device without a GPU: the block emulator, a process that runs the kernel sources on the CPU.
//!
//! - [`build`]: the program, from `kernels/` and the system's C++ compiler;
//! - [`process`]: the device.
//!
//! For tests, `fathom device-check` and trying out the GPU path of the server; some thousand times
//! slower than a GPU. Not here: the emulator itself (`kernels/emulator`).

pub mod build;
pub mod process;

pub use process::{Emulator, MODES, Mode};
