//! Around every request: its id, its record, its errors, and the net under panics.
//!
//! Not here: what the request asks for, and the record's contents ([`crate::record`]).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use fathom_protocol::{ApiError, ErrorCode};
use futures_util::FutureExt;

use crate::app::App;
use crate::error::{self, Refusal};
use crate::record::Record;
use crate::routes;
use crate::telemetry::TraceContext;
use crate::{compression, cors};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Most header fields of a request, and most bytes of their names and values.
const MAX_HEADERS: usize = 100;
const MAX_HEADER_BYTES: usize = 64 * 1024;

/// Runs a request and completes its response.
pub(crate) async fn observe(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = adopted_id(request.headers()).unwrap_or_else(|| app.random.id());
    let surface = routes::surface(request.uri().path());
    let endpoint = request.extensions().get::<MatchedPath>().map(|path| routes::template(path));
    let trace = TraceContext::of(request.headers(), || app.random.draw());
    let record = Arc::new(Record::new(Arc::clone(&app), id, trace));
    record.note(|facts| facts.endpoint = endpoint);
    request.extensions_mut().insert(Arc::clone(&record));

    let config = &app.config.server;
    let preflight = cors::preflight(&config.cors_origins, request.method(), request.headers());
    let origin = (!config.cors_origins.is_empty()).then(|| request.headers().clone());
    let wants_gzip = config.compress && compression::is_accepted(request.headers());
    let response = match check_headers(request.headers()) {
        Ok(()) if preflight.is_some() => preflight.unwrap_or_default(),
        // A panic costs its own request only. Shared state stays usable: every lock in this crate
        // recovers from poisoning, and none is held across an await.
        Ok(()) => AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|_| {
            Refusal::from(error::internal(&"a handler panicked")).into_response()
        }),
        Err(refused) => Refusal::from(refused).into_response(),
    };
    let mut response = error::render(response, surface, &record.id, &app.config.compat);
    if wants_gzip {
        response = compression::deflate(response).await;
    }
    if let Some(request) = origin {
        cors::complete(&config.cors_origins, &request, response.headers_mut());
    }
    let id = HeaderValue::from_str(&record.id).expect("adopted and drawn ids are ASCII");
    response.headers_mut().insert(X_REQUEST_ID, id.clone());
    response.headers_mut().insert(REQUEST_ID, id);
    record.note(|facts| facts.status = Some(response.status().as_u16()));
    response
}

/// The client's own id, if it is one.
fn adopted_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(X_REQUEST_ID)?.to_str().ok()?;
    let fits = (1..=128).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    fits.then(|| id.to_owned())
}

fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if headers.len() <= MAX_HEADERS && bytes <= MAX_HEADER_BYTES {
        return Ok(());
    }
    let message = format!(
        "The request has more than {MAX_HEADERS} header fields or {MAX_HEADER_BYTES} bytes of them."
    );
    Err(ApiError::new(ErrorCode::HeadersTooLarge, message))
}
