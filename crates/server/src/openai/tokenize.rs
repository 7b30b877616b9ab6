//! `POST /tokenize` and `POST /detokenize`: what a text or a conversation costs, without running it.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use fathom_protocol::openai::tokenize::{Detokenized, TokenizeRequest, Tokenized, read_detokenize};
use fathom_protocol::{ApiError, ErrorCode, Object};
use serde::Serialize;

use super::lower::Plan;
use super::{off_the_reactor, resolve};
use crate::app::App;
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::error::{self, Refusal};
use crate::record::Record;
use crate::registry::Resolved;

pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let read = move |app: &App, mut body: Object| {
        let resolved = resolve_or_default(app, &record, &caller, &mut body)?;
        let rules = app.config.rules(resolved.model.vocab_size());
        let request = TokenizeRequest::read(&body, &rules)?;
        Ok((resolved, request))
    };
    let (resolved, request) = body.read(&app, read).await?;
    let tokenizer = resolved.model.tokenizer.clone();
    let max_model_len = resolved.model.engine.limits().max_model_len;
    let (tokens, token_strs) = match request {
        TokenizeRequest::Text { prompt, parse_special, token_strs } => {
            let n_bytes = prompt.len();
            let tokenizer = tokenizer.clone();
            let encode = move |_| {
                let encoded = if parse_special {
                    tokenizer.encode_with_special(&prompt)
                } else {
                    tokenizer.encode_plain(&prompt)
                };
                encoded.map_err(|error| error::internal(&error))
            };
            (off_the_reactor(&app, n_bytes, encode).await?, token_strs)
        }
        TokenizeRequest::Chat { request, token_strs } => {
            let plan = Plan::new(*request, &resolved, &app.config)?;
            let n_bytes = plan.n_bytes();
            let ids = move |app: Arc<App>| plan.token_ids(&app);
            (off_the_reactor(&app, n_bytes, ids).await?, token_strs)
        }
    };
    let texts = || tokens.iter().map(|&id| tokenizer.decode(&[id])).collect();
    let token_strs = token_strs.then(texts);
    answer(&Tokenized { count: tokens.len(), max_model_len, tokens, token_strs })
}

pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let read = move |app: &App, mut body: Object| {
        let model = resolve_or_default(app, &record, &caller, &mut body)?.model;
        let ids = read_detokenize(&body, &app.config.rules(model.vocab_size()))?;
        Ok(model.tokenizer.decode(&ids))
    };
    answer(&Detokenized { prompt: body.read(&app, read).await? })
}

/// The model that the body names, or the first one that is loaded; its name is filled in.
fn resolve_or_default(
    app: &App,
    record: &Record,
    caller: &Caller,
    body: &mut Object,
) -> Result<Resolved, ApiError> {
    if body.get("model").is_none_or(serde_json::Value::is_null) {
        let first = app.registry.loaded().first().map(|model| model.canonical_id().to_owned());
        let message = "The model is still loading: try again later.";
        let first = first.ok_or_else(|| ApiError::new(ErrorCode::ModelLoading, message))?;
        body.insert("model".into(), first.into());
    }
    resolve(app, record, caller, fathom_protocol::openai::model_name(body)?)
}

fn answer(body: &impl Serialize) -> Result<Response, Refusal> {
    let json = serde_json::to_string(body).map_err(|error| error::internal(&error))?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}
