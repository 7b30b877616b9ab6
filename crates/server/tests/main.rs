//! The server over loopback TCP, in front of an engine whose tokens are scripted.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod answers;
mod bad_requests;
mod client;
mod completions;
mod disconnects;
mod logs;
mod messages;
mod operations;
mod rig;
mod rows;
mod shutdown;
mod streams;
mod tokenize;
mod transport;
