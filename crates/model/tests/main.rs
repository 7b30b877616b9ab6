//! What the model promises, on the nano checkpoint: goldens of the official code, independence of
//! batch and chunking, equality over ranks.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod golden;
mod goldens;
mod invariance;
mod modules;
mod parallel;
mod rules;
mod variants;
