//! Runs steps: owns scheduler and ranks, samples, streams token events.
