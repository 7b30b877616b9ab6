//! Refusals on their way out, and what the engine's errors mean to a client.
//!
//! A handler returns a [`Refusal`]; it travels inside the response until [`render`] writes it, in
//! the one place that knows the surface, the request id and the status overrides.

use axum::body::Body;
use axum::http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use fathom_engine::{GenerateError, SubmitError};
use fathom_protocol::{ApiError, ErrorCode, Surface};

use crate::config::CompatConfig;

/// A request that gets an error instead of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) error: ApiError,
    /// When to try again; only for statuses that clients retry.
    pub(crate) retry_after_s: u64,
    /// The methods that the path knows, on a 405.
    pub(crate) allow: Option<&'static str>,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { error, retry_after_s: 1, allow: None }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        response.extensions_mut().insert(self);
        response
    }
}

/// Writes the refusal that a response carries, if it carries one.
pub(crate) fn render(
    response: Response,
    surface: Surface,
    request_id: &str,
    compat: &CompatConfig,
) -> Response {
    let Some(refusal) = response.extensions().get::<Refusal>() else { return response };
    let error = &refusal.error;
    let status = match error.code {
        ErrorCode::ModelNotFound if surface == Surface::OpenAi => compat.unknown_model_status,
        code if code.is_invalid_parameter() => compat.invalid_parameter_status,
        _ => error.status(surface),
    };
    let mut written = Response::new(Body::from(error.to_json(surface, request_id)));
    *written.status_mut() = StatusCode::from_u16(status).expect("the table holds valid statuses");
    let headers = written.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    match status {
        401 => {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        405 => {
            let allow = refusal.allow.map(HeaderValue::from_static);
            // The router knows better if it answered itself.
            if let Some(allow) = allow.or_else(|| response.headers().get(ALLOW).cloned()) {
                headers.insert(ALLOW, allow);
            }
        }
        // The rest of the body is not read, so the connection cannot be used again.
        408 | 413 => {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        429 | 503 | 529 => {
            headers.insert(RETRY_AFTER, HeaderValue::from(refusal.retry_after_s.max(1)));
        }
        _ => {}
    }
    written
}

/// What a client is told when the engine refuses a request.
pub(crate) fn from_submit(error: &SubmitError, param: &str) -> ApiError {
    match error {
        SubmitError::QueueFull { .. } => {
            let message = "The server is busy and its queue is full: try again later.";
            ApiError::new(ErrorCode::QueueFull, message)
        }
        SubmitError::ShuttingDown => shutting_down(),
        SubmitError::PromptTooLong { n_tokens, max_model_len } => {
            context_length(param, *max_model_len, *n_tokens, None)
        }
        other => internal(other),
    }
}

/// What a client is told when an accepted request fails.
pub(crate) fn from_generate(error: &GenerateError) -> ApiError {
    match error {
        GenerateError::QueueTimeout { waited } => {
            let waited = waited.as_secs();
            let message =
                format!("The request waited {waited} s without being started: try again later.");
            ApiError::new(ErrorCode::QueueTimeout, message)
        }
        GenerateError::ShuttingDown => shutting_down(),
        other => internal(other),
    }
}

pub(crate) fn shutting_down() -> ApiError {
    ApiError::new(ErrorCode::ShuttingDown, "The server is shutting down.")
}

/// The prompt, or the prompt and the answer, do not fit.
pub(crate) fn context_length(
    param: &str,
    max_model_len: u32,
    n_prompt: usize,
    max_tokens: Option<u32>,
) -> ApiError {
    let asked = match max_tokens {
        Some(max_tokens) => {
            let total = n_prompt + max_tokens as usize;
            format!("{total} tokens ({n_prompt} in the prompt, {max_tokens} for the completion)")
        }
        None => format!("a prompt of {n_prompt} tokens, which leaves no room for a completion"),
    };
    let message =
        format!("The context length is {max_model_len} tokens, but the request asks for {asked}.");
    ApiError::at(ErrorCode::ContextLengthExceeded, param, message)
}

/// A failure whose cause is the operator's business: logged here, and kept from the client.
pub(crate) fn internal(cause: &dyn std::fmt::Display) -> ApiError {
    tracing::error!(%cause, "internal error");
    ApiError::new(ErrorCode::InternalError, "Internal error; the request id leads to its cause.")
}
