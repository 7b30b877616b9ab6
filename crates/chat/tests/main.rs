//! Behaviour of the chat crate, seen from outside.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod goldens;
mod prompts;
mod strings;
mod support;
mod text;
