//! Behaviour of the engine, driven through its handle over scripted runners.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod beside;
mod chooser;
mod device;
mod device_mtp;
mod ending;
mod faults;
mod interleavings;
mod lives;
mod mtp;
mod nano;
mod prophet;
mod sampling;
mod serving;
mod simulation;
mod speculation;
mod support;
mod tiers;
