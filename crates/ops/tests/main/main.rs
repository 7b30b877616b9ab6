//! Behaviour of the CPU operators against outputs of the official code and of candle.
#![expect(clippy::unwrap_used, reason = "a failed look-up in a fixture fails the test")]

mod fixtures;
mod oracle;
mod units;
