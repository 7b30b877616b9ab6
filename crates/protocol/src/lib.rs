//! The JSON that crosses the network: requests, responses, errors and SSE frames.
//!
//! - [`json`] turns a body into one bounded JSON object;
//! - [`openai`], [`anthropic`] and [`responses`] read requests from it and hold responses and stream
//!   events;
//! - [`dialect`] knows what each surface calls the fields that all have;
//! - [`error`] is the one table of errors and their envelopes; [`sse`] frames events;
//! - [`schema`] judges the JSON Schemas that requests carry.
//!
//! Every failure to read a request names a code and a field. Not here: HTTP, tokens, prompts.

pub mod anthropic;
pub mod dialect;
pub mod error;
mod fields;
mod flat_tools;
pub mod json;
pub mod openai;
pub mod responses;
pub mod schema;
pub mod sse;

pub use dialect::Dialect;
pub use error::{ApiError, ErrorCode, Surface, quoted};
pub use json::{Object, parse_object};
