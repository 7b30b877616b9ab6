//! The OpenAI surface: endpoints, lowering requests to the engine, raising answers back.

pub(crate) mod chat;
mod logprobs;
mod lower;
pub(crate) mod models;
pub(crate) mod raise;
