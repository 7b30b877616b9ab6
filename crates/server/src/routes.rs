//! Which path leads where.
//!
//! Every endpoint is served at several paths, so that each base URL a client may have works
//! unchanged. An endpoint is known by its template everywhere else: metrics, logs, traces and
//! `/openapi.json`. Not here: what endpoints do.

use std::sync::Arc;

use axum::Router;
use axum::extract::MatchedPath;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use axum::middleware;
use axum::routing::{MethodRouter, get, post};
use fathom_protocol::{ApiError, ErrorCode, Surface};

use crate::app::App;
use crate::error::Refusal;
use crate::{anthropic, health, metrics, observe, openai, openapi, responses};

/// An endpoint.
pub(crate) struct Endpoint {
    /// The canonical path: the label of metrics and logs.
    pub(crate) template: &'static str,
    /// All paths it is served at, as the router writes them.
    paths: &'static [&'static str],
    /// The methods it knows.
    pub(crate) methods: Methods,
}

/// Methods of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Methods {
    Get,
    Post,
}

impl Methods {
    /// The value of the `Allow` header.
    const fn allow(self) -> &'static str {
        match self {
            Self::Get => "GET,HEAD",
            Self::Post => "POST",
        }
    }
}

const fn posted(template: &'static str, paths: &'static [&'static str]) -> Endpoint {
    Endpoint { template, paths, methods: Methods::Post }
}

const fn got(template: &'static str, paths: &'static [&'static str]) -> Endpoint {
    Endpoint { template, paths, methods: Methods::Get }
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MESSAGES: &str = "/v1/messages";
const COUNT_TOKENS: &str = "/v1/messages/count_tokens";
const RESPONSES: &str = "/v1/responses";
const TOKENIZE: &str = "/tokenize";
const DETOKENIZE: &str = "/detokenize";
const MODELS: &str = "/v1/models";
const MODEL: &str = "/v1/models/{id}";
const HEALTH: &str = "/health";
const READY: &str = "/ready";
const VERSION: &str = "/version";
const METRICS: &str = "/metrics";
const OPENAPI: &str = "/openapi.json";

/// Every endpoint there is.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    posted(
        CHAT,
        &[CHAT, "/chat/completions", "/beta/chat/completions", "/beta/v1/chat/completions"],
    ),
    posted(
        COMPLETIONS,
        &[COMPLETIONS, "/completions", "/beta/completions", "/beta/v1/completions"],
    ),
    posted(RESPONSES, &[RESPONSES, "/responses", "/beta/responses", "/beta/v1/responses"]),
    posted(MESSAGES, &[MESSAGES, "/anthropic/v1/messages"]),
    posted(COUNT_TOKENS, &[COUNT_TOKENS, "/anthropic/v1/messages/count_tokens"]),
    posted(TOKENIZE, &[TOKENIZE, "/v1/tokenize"]),
    posted(DETOKENIZE, &[DETOKENIZE, "/v1/detokenize"]),
    got(MODELS, &[MODELS, "/models", "/beta/models", "/beta/v1/models", "/anthropic/v1/models"]),
    got(
        MODEL,
        &[
            "/v1/models/{*id}",
            "/models/{*id}",
            "/beta/models/{*id}",
            "/beta/v1/models/{*id}",
            "/anthropic/v1/models/{*id}",
        ],
    ),
    got(HEALTH, &[HEALTH]),
    got(READY, &[READY]),
    got(VERSION, &[VERSION]),
    got(METRICS, &[METRICS]),
    got(OPENAPI, &[OPENAPI]),
];

/// All routes, with the layer that completes every response.
pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for endpoint in ENDPOINTS {
        for path in endpoint.paths {
            router = router.route(path, handler(endpoint.template));
        }
    }
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe::observe))
        .with_state(app)
}

fn handler(template: &'static str) -> MethodRouter<Arc<App>> {
    match template {
        CHAT => post(openai::chat::create),
        COMPLETIONS => post(openai::completions::create),
        RESPONSES => post(responses::create),
        MESSAGES => post(anthropic::create),
        COUNT_TOKENS => post(anthropic::count_tokens),
        TOKENIZE => post(openai::tokenize::tokenize),
        DETOKENIZE => post(openai::tokenize::detokenize),
        MODELS => get(openai::models::list),
        MODEL => get(openai::models::get),
        HEALTH => get(health::health),
        READY => get(health::ready),
        VERSION => get(health::version),
        METRICS => get(metrics::scrape),
        OPENAPI => get(openapi::document),
        _ => MethodRouter::new(),
    }
}

async fn not_found() -> Refusal {
    ApiError::new(ErrorCode::NotFound, "There is nothing at this path.").into()
}

async fn method_not_allowed(path: MatchedPath) -> Refusal {
    let allow = endpoint(path.as_str()).map_or("", |endpoint| endpoint.methods.allow());
    let message = format!("This path does not know this method; it knows {allow}.");
    let error = ApiError::new(ErrorCode::MethodNotAllowed, message);
    Refusal { allow: Some(allow), ..error.into() }
}

/// The endpoint at a path of the router.
fn endpoint(path: &str) -> Option<&'static Endpoint> {
    ENDPOINTS.iter().find(|endpoint| endpoint.paths.contains(&path))
}

/// Whether requests to an endpoint ask the model for something.
pub(crate) fn is_posted(template: &str) -> bool {
    let mut endpoints = ENDPOINTS.iter().filter(|endpoint| endpoint.methods == Methods::Post);
    endpoints.any(|endpoint| endpoint.template == template)
}

/// The canonical path of a matched route.
pub(crate) fn template(path: &MatchedPath) -> &'static str {
    endpoint(path.as_str()).map_or("other", |endpoint| endpoint.template)
}

/// Which envelope errors on a path are written in.
pub(crate) fn surface(path: &str) -> Surface {
    let messages = path.trim_start_matches("/anthropic").starts_with(MESSAGES);
    if messages { Surface::Anthropic } else { Surface::OpenAi }
}

/// Whether a path is one of those where the hosted API enables its beta features.
pub(crate) fn is_beta(uri: &Uri) -> bool {
    uri.path().starts_with("/beta/")
}

/// Removes one trailing slash, which is accepted on every path.
pub(crate) fn without_trailing_slash<B>(
    mut request: axum::http::Request<B>,
) -> axum::http::Request<B> {
    let uri = request.uri();
    let Some(path) = uri.path().strip_suffix('/').filter(|path| !path.is_empty()) else {
        return request;
    };
    let shorter = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(shorter).ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    request
}
