//! Behaviour of the weights crate, one binary.

mod nano;
mod released;
mod report;
