//! Runs steps: owns scheduler and ranks, samples, streams token events.
//!
//! [`EngineHandle`] is the only door: submit a [`GenerateRequest`], read a [`TokenStream`].
//!
//! - [`handle`], [`stream`], [`stats`], [`config`]: what callers see;
//! - [`step_loop`]: the thread behind the door; `batch_build`, [`sample`], `events`, `pace`: its
//!   parts;
//! - [`runner`]: the boundary to the model; [`rank`]: the model behind it; [`scripted`]: a runner
//!   without one; [`sim`]: traffic in virtual time;
//! - [`speculate`]: tokens guessed ahead and verified;
//! - `tier`: lower tiers of the prefix cache; `tier_copies`: copying from and to the runner.

mod active;
mod batch_build;
mod beside;
pub mod config;
mod events;
pub mod handle;
mod pace;
pub mod rank;
pub mod runner;
pub mod sample;
pub mod scripted;
pub mod sim;
pub mod speculate;
pub mod stats;
pub mod step_loop;
pub mod stream;
mod tier;
mod tier_copies;

pub use config::EngineConfig;
pub use handle::{
    EngineHandle, EngineLimits, EngineState, GenerateError, GenerateRequest, Health, SubmitError,
    TokenEvent,
};
pub use rank::RankRunner;
pub use runner::{
    DraftInput, HostWork, OutputRow, RunnerCapacity, SnapshotCopy, StateLayout, StateRef,
    StepError, StepInput, StepOutput, StepRunner,
};
pub use scripted::ScriptedRunner;
pub use speculate::{DraftMethod, DraftRequest, Drafter, SpeculationConfig};
pub use stats::EngineStats;
pub use step_loop::StartError;
pub use stream::{RequestTimes, TokenStream};
pub use tier::{DirectoryError, TierConfig};
