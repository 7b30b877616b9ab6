//! What the model promises, on the nano checkpoint: goldens of the official code, independence of
//! batch and chunking, equality over ranks.

mod golden;
mod goldens;
mod invariance;
mod modules;
mod parallel;
mod variants;
