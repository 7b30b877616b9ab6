//! The Responses surface, its stateless subset: what clients send and what they get back.
//!
//! A [`ResponsesRequest`] is read by hand from JSON, in the order of checks of the HTTP contract, and
//! holds the same [`crate::openai::ChatRequest`] that the chat surface reads: from there on both mean
//! the same thing. Answers ([`response`]) and events ([`stream`]) are plain serde types.
//!
//! Not here: anything that a server would have to remember between requests, which is refused.

mod input;
mod request;
pub mod response;
pub mod stream;
mod tools;

pub use input::seal;
pub use request::{Echo, ResponsesRequest};
