//! Behaviour of the CPU operators against outputs of the official code.

mod fixtures;
mod units;
