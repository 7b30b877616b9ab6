//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use fathom_protocol::openai::models::{Model, ModelList};
use serde::Serialize;

use crate::app::App;
use crate::auth::Caller;
use crate::error::Refusal;
use crate::registry::ModelEntry;

pub(crate) async fn list(State(app): State<Arc<App>>, _caller: Caller) -> Response {
    let entries = app.registry.loaded();
    let models = if app.config.models.list_aliases {
        let names = app.registry.names(&app.config.models);
        let named = names.iter().filter_map(|name| {
            let resolved = app.registry.resolve(name, &app.config.models).ok()?;
            Some(describe(&app, name, &resolved.model))
        });
        named.collect()
    } else {
        entries.iter().map(|entry| describe(&app, entry.canonical_id(), entry)).collect()
    };
    answer(&ModelList::new(models))
}

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    _caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let resolved = app.registry.resolve(&id, &app.config.models)?;
    Ok(answer(&describe(&app, &id, &resolved.model)))
}

fn describe(app: &App, id: &str, entry: &ModelEntry) -> Model {
    let max_model_len = entry.engine.limits().max_model_len;
    Model::new(id, entry.created, max_model_len, app.config.limits.max_output_tokens)
}

fn answer(body: &impl Serialize) -> Response {
    let json = serde_json::to_string(body).expect("model entries hold strings and numbers");
    ([(CONTENT_TYPE, "application/json")], json).into_response()
}
