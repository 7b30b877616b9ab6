//! Runs steps: owns scheduler and ranks, samples, streams token events.
//!
//! [`EngineHandle`] is the only door: submit a [`GenerateRequest`], read a [`TokenStream`].

pub mod handle;
pub mod stats;
pub mod stream;

pub use handle::{
    EngineHandle, EngineLimits, EngineState, GenerateError, GenerateRequest, Health, SubmitError,
    TokenEvent,
};
pub use stats::EngineStats;
pub use stream::{RequestTimes, TokenStream};
