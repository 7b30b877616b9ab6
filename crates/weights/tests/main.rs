//! Behaviour of the weights crate, one binary.

mod config;
mod copy;
mod damage;
mod hostile;
mod nano;
mod released;
mod report;
mod synthetic;
mod values;
mod variants;
