//! The Messages surface: what Anthropic clients send and what they get back.
//!
//! A [`MessagesRequest`] is read by hand from JSON, in the order of checks of the HTTP contract, and
//! holds the same [`crate::openai::ChatRequest`] that the chat surface reads: from there on both mean
//! the same thing. Responses ([`response`]) and events ([`stream`]) are plain serde types.
//!
//! Not here: model names ([`crate::openai::model_name`] reads them, the server maps them).

mod message;
mod request;
pub mod response;
pub mod stream;
mod tools;

pub use request::{MessagesRequest, Purpose};
