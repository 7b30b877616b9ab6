//! The OpenAI surface: endpoints, lowering requests to the engine, raising answers back.
//!
//! Endpoints: [`chat`], [`completions`], [`models`], [`tokenize`]. On the way in, `lower` settles
//! what a chat request means, `constrain` what its answer must keep to, and `run` hands prompts to the engine; on the way out, `raise` and
//! `text` read tokens, `logprobs` pairs them with text, and `deliver` sends the answer. The Messages
//! surface ([`crate::anthropic`]) goes the same way with its own JSON at both ends.

pub(crate) mod chat;
pub(crate) mod completions;
mod constrain;
pub(crate) mod deliver;
mod logprobs;
mod loops;
pub(crate) mod lower;
pub(crate) mod models;
pub(crate) mod raise;
mod run;
mod text;
pub(crate) mod tokenize;

use std::sync::Arc;

use fathom_protocol::ApiError;

use crate::app::App;
use crate::auth::Caller;
use crate::error;
use crate::record::Record;
use crate::registry::Resolved;

/// Text beyond which a prompt is made on a thread for blocking work: under a millisecond's worth.
const INLINE_BYTES: usize = 8 * 1024;

/// The model that a client means by `name`, if it may use it.
pub(crate) fn resolve(
    app: &App,
    record: &Record,
    caller: &Caller,
    name: &str,
) -> Result<Resolved, ApiError> {
    let resolved = app.registry.resolve(name, &app.config.models)?;
    record.note(|facts| facts.model = Some(resolved.model.canonical_id().to_owned()));
    caller.may_use(&resolved.model.ids)?;
    Ok(resolved)
}

/// Does work on `n_bytes` of text without holding up the reactor if they are many.
pub(crate) async fn off_the_reactor<T: Send + 'static>(
    app: &Arc<App>,
    n_bytes: usize,
    work: impl FnOnce(Arc<App>) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let app = Arc::clone(app);
    if n_bytes <= INLINE_BYTES {
        return work(app);
    }
    let done = tokio::task::spawn_blocking(move || work(app)).await;
    done.unwrap_or_else(|error| Err(error::internal(&error)))
}
