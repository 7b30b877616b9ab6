//! Behaviour of the engine, driven through its handle over scripted runners.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod ending;
mod faults;
mod interleavings;
mod nano;
mod sampling;
mod serving;
mod support;
mod tiers;
