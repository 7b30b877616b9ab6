//! The CUDA kernels and their launchers, run thread by thread on the CPU, against the CPU operators.
//!
//! The sources of `kernels/` are compiled with the system's C++ compiler into one program
//! (`process`). Without a compiler every test here prints a line and passes.
#![expect(clippy::unwrap_used, reason = "a device that fails ends the test")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod attention;
mod attention100;
mod bench;
mod blackwell;
mod blackwell_bf16;
mod branches;
mod compare;
mod copies;
mod device_check;
mod draw;
mod driver;
mod few_tokens;
mod formats;
mod hopper;
mod hyper_connection;
mod messages;
mod moe;
mod planted;
mod planted100;
mod planted90;
mod process;
mod queries;
mod sample;
mod sanitized;
mod splits;
mod tiled;
mod weights;
