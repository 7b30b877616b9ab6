//! Behaviour of the scheduler, driven by a model engine that checks what it is told to read.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod drafts;
mod fairness;
mod interleavings;
mod known_bugs;
mod loading;
mod lower_tier;
mod model_engine;
mod planning;
mod prefix_reuse;
