//! Request bodies: read within limits, then parsed.
//!
//! The order of checks is the contract's: declared size, media type, reading, JSON. A body that is
//! slow or too large costs nothing but its bytes so far. Not here: authentication, which every
//! handler asks for first.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use fathom_protocol::{ApiError, ErrorCode, Object, parse_object, quoted};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use crate::app::App;
use crate::compression::{Inflate, inflate};
use crate::config::LimitsConfig;
use crate::error::{self, Refusal};

/// Bodies beyond this are read on a thread for blocking work: a conversation of a million tokens would
/// hold up every other answer for tens of milliseconds.
const INLINE_BYTES: usize = 64 * 1024;

/// A body that is to be one JSON object, not parsed yet.
pub(crate) struct JsonBody(Vec<u8>);

impl JsonBody {
    /// Parses the body, and hands the object to `read`, which ends it. All of that happens on a
    /// thread for blocking work if the body is large, and here if it is not: a thread's turn takes
    /// longer than a short body.
    ///
    /// # Errors
    /// `invalid_json`, and what `read` refuses.
    pub(crate) async fn read<T: Send + 'static>(
        self,
        app: &Arc<App>,
        read: impl FnOnce(&App, Object) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Self(body) = self;
        if body.len() <= INLINE_BYTES {
            return read(app, parse_object(&body)?);
        }
        let app = Arc::clone(app);
        let done = tokio::task::spawn_blocking(move || {
            let object = parse_object(&body)?;
            drop(body);
            read(&app, object)
        });
        done.await.unwrap_or_else(|error| Err(error::internal(&error)))
    }
}

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        let limits = &app.config.limits;
        check_declared_size(request.headers(), limits)?;
        let is_compressed = check_media_type(request.headers(), app.config.server.accept_gzip)?;
        let body = read(request, limits).await?;
        Ok(Self(if is_compressed { decompress(body, limits).await? } else { body }))
    }
}

fn check_declared_size(headers: &HeaderMap, limits: &LimitsConfig) -> Result<(), ApiError> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    match declared.and_then(|value| value.parse::<u64>().ok()) {
        Some(declared) if declared > limits.max_body_bytes as u64 => Err(too_large(limits)),
        _ => Ok(()),
    }
}

fn too_large(limits: &LimitsConfig) -> ApiError {
    let max = limits.max_body_bytes;
    let message = format!("The request body is larger than the {max} bytes allowed.");
    ApiError::new(ErrorCode::RequestTooLarge, message)
}

/// Checks type and encoding; returns whether the body is compressed.
fn check_media_type(headers: &HeaderMap, accepts_gzip: bool) -> Result<bool, ApiError> {
    if let Some(value) = headers.get(CONTENT_TYPE)
        && !is_json(&String::from_utf8_lossy(value.as_bytes()))
    {
        let shown = quoted(&String::from_utf8_lossy(value.as_bytes()));
        let message =
            format!("The content type is {shown}, but must be application/json in UTF-8.");
        return Err(ApiError::new(ErrorCode::UnsupportedMediaType, message));
    }
    match headers.get(CONTENT_ENCODING) {
        None => Ok(false),
        Some(value) if value.as_bytes().eq_ignore_ascii_case(b"identity") => Ok(false),
        Some(value) if accepts_gzip && value.as_bytes().eq_ignore_ascii_case(b"gzip") => Ok(true),
        Some(value) => {
            let shown = quoted(&String::from_utf8_lossy(value.as_bytes()));
            let accepted = if accepts_gzip { "identity or gzip" } else { "identity" };
            let message = format!("The content encoding is {shown}, but must be {accepted}.");
            Err(ApiError::new(ErrorCode::UnsupportedContentEncoding, message))
        }
    }
}

/// Off the reactor: a body at the limit takes a good part of a second.
async fn decompress(body: Vec<u8>, limits: &LimitsConfig) -> Result<Vec<u8>, ApiError> {
    let max = limits.max_body_bytes;
    let inflated = tokio::task::spawn_blocking(move || inflate(&body, max)).await;
    inflated.map_err(|error| error::internal(&error))?.map_err(|why| match why {
        Inflate::TooLarge => too_large(limits),
        Inflate::Broken => {
            let message = "The request body is not the gzip that its content encoding says it is.";
            ApiError::new(ErrorCode::InvalidJson, message)
        }
    })
}

/// `application/json` or `application/*+json`, with no charset or UTF-8.
fn is_json(content_type: &str) -> bool {
    let mut parts = content_type.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default().to_ascii_lowercase();
    let json = essence == "application/json"
        || essence.strip_prefix("application/").is_some_and(|rest| rest.ends_with("+json"));
    json && parts.all(|parameter| match parameter.split_once('=') {
        Some((name, value)) if name.trim().eq_ignore_ascii_case("charset") => {
            value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
        }
        _ => true,
    })
}

async fn read(request: Request, limits: &LimitsConfig) -> Result<Vec<u8>, ApiError> {
    let mut body = request.into_body();
    let mut bytes = Vec::new();
    let last = Instant::now() + Duration::from_secs(limits.body_total_s);
    loop {
        let idle = Instant::now() + Duration::from_secs(limits.body_idle_s);
        let frame = match timeout_at(last.min(idle), body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(_))) => {
                // The client broke off; whatever is answered, nobody reads it.
                let message = "The request body ended before it was complete.";
                return Err(ApiError::new(ErrorCode::InvalidJson, message));
            }
            Err(_) => {
                let message = "The request body did not arrive in time.";
                return Err(ApiError::new(ErrorCode::RequestTimeout, message));
            }
        };
        // Trailers carry nothing we know.
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.max_body_bytes {
            return Err(too_large(limits));
        }
        bytes.extend_from_slice(&data);
    }
}

#[cfg(test)]
mod tests {
    use super::is_json;

    #[test]
    fn json_is_recognised_by_its_essence_and_charset() {
        for accepted in [
            "application/json",
            "Application/JSON; charset=UTF-8",
            "application/json;charset=\"utf-8\"; v=1",
            "application/vnd.api+json",
        ] {
            assert!(is_json(accepted), "{accepted}");
        }
        for refused in [
            "",
            "text/plain",
            "text/json",
            "application/jsonl",
            "application/x-www-form-urlencoded",
            "application/json; charset=latin-1",
        ] {
            assert!(!is_json(refused), "{refused}");
        }
    }
}
