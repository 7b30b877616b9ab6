//! Which path leads where.
//!
//! Every endpoint is served at several paths, so that each base URL a client may have works
//! unchanged. A path is known by its template everywhere else. Not here: what endpoints do.

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
use crate::{anthropic, health, metrics, observe, openai};

const CHAT: [&str; 4] = [
    "/v1/chat/completions",
    "/chat/completions",
    "/beta/chat/completions",
    "/beta/v1/chat/completions",
];
const COMPLETIONS: [&str; 4] =
    ["/v1/completions", "/completions", "/beta/completions", "/beta/v1/completions"];
const TOKENIZE: [&str; 2] = ["/tokenize", "/v1/tokenize"];
const DETOKENIZE: [&str; 2] = ["/detokenize", "/v1/detokenize"];
const MESSAGES: [&str; 2] = ["/v1/messages", "/anthropic/v1/messages"];
const COUNT_TOKENS: [&str; 2] =
    ["/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"];
const MODELS: [&str; 5] =
    ["/v1/models", "/models", "/beta/models", "/beta/v1/models", "/anthropic/v1/models"];

/// All routes, with the layer that completes every response.
pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for path in CHAT {
        router = router.route(path, post(openai::chat::create));
    }
    for path in COMPLETIONS {
        router = router.route(path, post(openai::completions::create));
    }
    for path in TOKENIZE {
        router = router.route(path, post(openai::tokenize::tokenize));
    }
    for path in DETOKENIZE {
        router = router.route(path, post(openai::tokenize::detokenize));
    }
    for path in MESSAGES {
        router = router.route(path, post(anthropic::create));
    }
    for path in COUNT_TOKENS {
        router = router.route(path, post(anthropic::count_tokens));
    }
    for path in MODELS {
        router = router.route(path, get(openai::models::list));
        let one: MethodRouter<Arc<App>> = get(openai::models::get);
        router = router.route(&format!("{path}/{{*id}}"), one);
    }
    router
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics::scrape))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe::observe))
        .with_state(app)
}

async fn not_found() -> Refusal {
    ApiError::new(ErrorCode::NotFound, "There is nothing at this path.").into()
}

async fn method_not_allowed(path: MatchedPath) -> Refusal {
    let posted =
        [CHAT[0], COMPLETIONS[0], MESSAGES[0], COUNT_TOKENS[0], TOKENIZE[0], DETOKENIZE[0]];
    let allow = if posted.contains(&template(&path)) { "POST" } else { "GET,HEAD" };
    let message = format!("This path does not know this method; it knows {allow}.");
    let error = ApiError::new(ErrorCode::MethodNotAllowed, message);
    Refusal { allow: Some(allow), ..error.into() }
}

/// The canonical path of a matched route: the label of metrics and logs.
pub(crate) fn template(path: &MatchedPath) -> &'static str {
    let path = path.as_str();
    if CHAT.contains(&path) {
        CHAT[0]
    } else if COMPLETIONS.contains(&path) {
        COMPLETIONS[0]
    } else if TOKENIZE.contains(&path) {
        TOKENIZE[0]
    } else if DETOKENIZE.contains(&path) {
        DETOKENIZE[0]
    } else if MESSAGES.contains(&path) {
        MESSAGES[0]
    } else if COUNT_TOKENS.contains(&path) {
        COUNT_TOKENS[0]
    } else if MODELS.contains(&path) {
        MODELS[0]
    } else if path.ends_with("/models/{*id}") {
        "/v1/models/{id}"
    } else {
        ["/health", "/ready", "/version", "/metrics"]
            .into_iter()
            .find(|known| *known == path)
            .unwrap_or("other")
    }
}

/// Which envelope errors on a path are written in.
pub(crate) fn surface(path: &str) -> Surface {
    let messages = path.trim_start_matches("/anthropic").starts_with("/v1/messages");
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
