//! Web pages of other origins: which may call the server, and what they may read of its answers.
//!
//! Off unless origins are configured: a browser then keeps pages of other origins away by itself.
//! Requests are never refused here; it is the browser that asks first and obeys.

use axum::body::Body;
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::Response;

/// Headers of an answer that pages may read besides the harmless ones.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "x-request-id, request-id, openai-processing-ms, x-ignored-params, retry-after",
);
/// Seconds that a browser may remember the answer to its question.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// The origin that a request names, if pages of it may call the server.
fn allowed(origins: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(ORIGIN)?;
    let any = origins.iter().any(|allowed| allowed == "*");
    let named = || origins.iter().any(|allowed| origin.as_bytes() == allowed.as_bytes());
    // Keys come in headers that the page sets itself, so `*` gives no page anybody's credentials.
    if any { Some(HeaderValue::from_static("*")) } else { named().then(|| origin.clone()) }
}

/// The answer to a browser that asks whether it may send a request.
pub(crate) fn preflight(
    origins: &[String],
    method: &Method,
    headers: &HeaderMap,
) -> Option<Response> {
    let asks = method == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if origins.is_empty() || !asks {
        return None;
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    if allowed(origins, headers).is_some() {
        let answer = response.headers_mut();
        let methods = HeaderValue::from_static("GET, HEAD, POST");
        answer.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        // SDKs send headers about themselves, and new ones with every version.
        if let Some(asked) = headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        answer.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    }
    Some(response)
}

/// Says on an answer who may read it. `request` are the headers of its request.
pub(crate) fn complete(origins: &[String], request: &HeaderMap, answer: &mut HeaderMap) {
    if origins.is_empty() {
        return;
    }
    answer.append(VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = allowed(origins, request) {
        answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
}
