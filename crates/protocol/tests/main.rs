//! Behaviour of the wire types: what is accepted, what is refused and how, and what goes out.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod anthropic;
mod bad_requests;
mod bodies;
mod good_requests;
mod responses;
mod schemas;
