//! Is the server alive, is it ready, which version is it.
//!
//! `/health` asks whether a restart would help; `/ready` whether requests should be sent here.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use fathom_engine::EngineState;
use serde_json::{Value, json};

use crate::app::App;
use crate::registry::Models;

pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    match trouble(&app) {
        None => answer(StatusCode::OK, &json!({"status": "ok"})),
        Some(what) => {
            answer(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "error", "message": what}))
        }
    }
}

pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    let not_ready = |status: &str, progress: f32| {
        let body = json!({"status": status, "progress": f64::from(progress)});
        answer(StatusCode::SERVICE_UNAVAILABLE, &body)
    };
    if trouble(&app).is_some() {
        return not_ready("error", 0.0);
    }
    if app.draining.is_cancelled() {
        return not_ready("draining", 1.0);
    }
    let models = match app.registry.state() {
        Models::Loading { progress } => return not_ready("loading", progress),
        Models::Failed { .. } => return not_ready("error", 0.0),
        Models::Loaded(models) => models,
    };
    for model in models.iter() {
        match model.engine.health().state {
            EngineState::Ready => {}
            EngineState::Starting => return not_ready("loading", 1.0),
            EngineState::Draining | EngineState::Stopped | EngineState::Failed { .. } => {
                return not_ready("draining", 1.0);
            }
        }
    }
    let ids: Vec<_> = models.iter().map(|model| model.canonical_id()).collect();
    answer(StatusCode::OK, &json!({"status": "ready", "models": ids}))
}

pub(crate) async fn version() -> Response {
    answer(StatusCode::OK, &json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Why the server cannot go on, if it cannot.
fn trouble(app: &App) -> Option<String> {
    let models = match app.registry.state() {
        Models::Loading { .. } => return None,
        Models::Failed { reason } => return Some(format!("loading failed: {reason}")),
        Models::Loaded(models) => models,
    };
    let watchdog = Duration::from_secs(app.config.server.watchdog_s);
    models.iter().find_map(|model| {
        let health = model.engine.health();
        let id = model.canonical_id();
        match (health.state, health.stalled_for) {
            (EngineState::Failed { reason }, _) => Some(format!("{id} failed: {reason}")),
            (_, Some(stalled)) if stalled > watchdog => {
                Some(format!("{id} has finished no step for {} s", stalled.as_secs()))
            }
            _ => None,
        }
    })
}

fn answer(status: StatusCode, body: &Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
