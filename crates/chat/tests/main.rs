//! Behaviour of the chat crate, seen from outside.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod answers;
mod cuts;
mod goldens;
mod grammar;
mod grammar_walk;
mod prompts;
mod recall;
mod recipe;
mod strict;
mod strings;
mod support;
mod text;
mod turn_cache;
