//! The server over loopback TCP, in front of an engine whose tokens are scripted.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod agents;
mod answers;
mod bad_requests;
mod bodies;
mod browsers;
mod client;
mod completions;
mod constrained;
mod coverage;
mod disconnects;
mod endpoints;
mod keys;
mod load;
mod logs;
mod messages;
mod operations;
mod replay;
mod responses;
mod rig;
mod rows;
mod settings;
mod shutdown;
mod streams;
mod tls;
mod tokenize;
mod traces;
mod transport;
mod types;
