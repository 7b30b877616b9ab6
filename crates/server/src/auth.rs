//! Who is asking: API keys, and what a key may do.
//!
//! Keys are compared by their SHA-256 and never kept, logged or echoed. Not here: which endpoints
//! need a key (each handler asks for a [`Caller`]).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use fathom_protocol::{ApiError, ErrorCode, quoted};
use sha2::{Digest, Sha256};

use crate::app::App;
use crate::config::KeyConfig;
use crate::error::Refusal;

/// The configured keys. Without any, everybody may pass.
pub(crate) struct KeyRing {
    keys: Vec<Arc<Key>>,
}

/// One key and what it may do.
pub(crate) struct Key {
    hash: [u8; 32],
    models: Option<Vec<String>>,
    max_concurrency: usize,
    running: AtomicUsize,
    requests_per_minute: Option<u32>,
    window: Mutex<Window>,
}

/// Requests begun in the current minute.
struct Window {
    began: Option<Instant>,
    n_requests: u32,
}

const MINUTE: Duration = Duration::from_secs(60);

impl KeyRing {
    pub(crate) fn new(keys: &[KeyConfig]) -> Self {
        let key = |config: &KeyConfig| {
            Arc::new(Key {
                hash: Sha256::digest(&config.key).into(),
                models: config.models.clone(),
                max_concurrency: config.max_concurrency.unwrap_or(usize::MAX),
                running: AtomicUsize::new(0),
                requests_per_minute: config.requests_per_minute,
                window: Mutex::new(Window { began: None, n_requests: 0 }),
            })
        };
        Self { keys: keys.iter().map(key).collect() }
    }

    /// The key that the headers present; `None` if no keys are configured.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if self.keys.is_empty() {
            return Ok(Caller { key: None });
        }
        let Some(presented) = presented(headers) else {
            let message =
                "An API key is required: send `Authorization: Bearer KEY` or `x-api-key`.";
            return Err(ApiError::new(ErrorCode::MissingApiKey, message));
        };
        let hash: [u8; 32] = Sha256::digest(presented).into();
        // Every key is compared in full, so that time says nothing about which one came close.
        let mut found = None;
        for key in &self.keys {
            if equal(&key.hash, &hash) {
                found = Some(Arc::clone(key));
            }
        }
        match found {
            Some(key) => Ok(Caller { key: Some(key) }),
            None => {
                let message = format!("The API key {} is not valid.", ending(presented));
                Err(ApiError::new(ErrorCode::InvalidApiKey, message))
            }
        }
    }
}

/// The Bearer token, or else `x-api-key`. An empty credential is none.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
    });
    let bearer = bearer.filter(|token| !token.is_empty());
    bearer
        .or_else(|| headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii()))
        .filter(|key| !key.is_empty())
}

fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b));
    std::hint::black_box(difference) == 0
}

/// At most the last 4 characters of a key, and fewer of a short one.
fn ending(key: &[u8]) -> String {
    let shown = 4.min(key.len() / 3);
    let tail = String::from_utf8_lossy(&key[key.len() - shown..]);
    quoted(&format!("…{tail}"))
}

/// Whoever sent an authenticated request. As an extractor it answers 401.
#[derive(Clone)]
pub(crate) struct Caller {
    key: Option<Arc<Key>>,
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        Ok(app.keys.authenticate(&parts.headers)?)
    }
}

impl Caller {
    /// Whether the key may use the model with these ids.
    pub(crate) fn may_use(&self, ids: &[String]) -> Result<(), ApiError> {
        let allowed = self.key.as_ref().and_then(|key| key.models.as_ref());
        if allowed.is_none_or(|allowed| ids.iter().any(|id| allowed.contains(id))) {
            return Ok(());
        }
        let message = "This API key may not use this model.";
        Err(ApiError::at(ErrorCode::ModelNotPermitted, "model", message))
    }

    /// Counts one request against the key's limits, until the [`Turn`] is dropped.
    pub(crate) fn begin(&self, now: Instant) -> Result<Turn, Refusal> {
        let Some(key) = &self.key else { return Ok(Turn { key: None }) };
        let admitted = key.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, |running| {
            (running < key.max_concurrency).then_some(running + 1)
        });
        if admitted.is_err() {
            let max = key.max_concurrency;
            let message = format!("This API key may run {max} requests at once.");
            return Err(ApiError::new(ErrorCode::ConcurrencyLimitExceeded, message).into());
        }
        let turn = Turn { key: Some(Arc::clone(key)) };
        key.count_request(now)?;
        Ok(turn)
    }
}

impl Key {
    fn count_request(&self, now: Instant) -> Result<(), Refusal> {
        let Some(max) = self.requests_per_minute else { return Ok(()) };
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = window.began.map(|began| now.saturating_duration_since(began));
        let left = elapsed.and_then(|elapsed| MINUTE.checked_sub(elapsed)).unwrap_or_default();
        if left.is_zero() {
            *window = Window { began: Some(now), n_requests: 0 };
        }
        if window.n_requests >= max {
            let message = format!("This API key may begin {max} requests per minute.");
            let error = ApiError::new(ErrorCode::RateLimitExceeded, message);
            return Err(Refusal { retry_after_s: left.as_secs() + 1, ..error.into() });
        }
        window.n_requests += 1;
        Ok(())
    }
}

/// A request that counts against its key's concurrency.
pub(crate) struct Turn {
    key: Option<Arc<Key>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            key.running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn ring(key: KeyConfig) -> KeyRing {
        KeyRing::new(&[KeyConfig { key: "other".into(), ..KeyConfig::default() }, key])
    }

    #[test]
    fn either_header_carries_the_key_and_bearer_wins() {
        let ring = ring(KeyConfig { key: "secret".into(), ..KeyConfig::default() });
        let code = |pairs: &[(&'static str, &str)]| {
            ring.authenticate(&headers(pairs)).err().map(|error| error.code.as_str())
        };
        assert_eq!(code(&[("authorization", "Bearer secret")]), None);
        assert_eq!(code(&[("authorization", "bearer  secret")]), None);
        assert_eq!(code(&[("x-api-key", "secret")]), None);
        assert_eq!(code(&[("authorization", "Bearer secret"), ("x-api-key", "wrong")]), None);
        let both = [("authorization", "Bearer wrong"), ("x-api-key", "secret")];
        assert_eq!(code(&both), Some("invalid_api_key"));
        assert_eq!(code(&[]), Some("missing_api_key"));
        assert_eq!(code(&[("authorization", "Bearer ")]), Some("missing_api_key"));
        assert_eq!(code(&[("authorization", "Basic secret")]), Some("missing_api_key"));
    }

    #[test]
    fn an_error_shows_no_more_than_the_end_of_a_key() {
        let ring = ring(KeyConfig { key: "secret".into(), ..KeyConfig::default() });
        let message = |key: &str| {
            let refused = ring.authenticate(&headers(&[("x-api-key", key)]));
            refused.err().unwrap().message
        };
        assert_eq!(message("sk-0123456789"), "The API key `…6789` is not valid.");
        assert_eq!(message("ab"), "The API key `…` is not valid.");
    }

    #[test]
    fn a_key_runs_so_many_requests_at_once_and_begins_so_many_per_minute() {
        let ring = ring(KeyConfig {
            key: "secret".into(),
            max_concurrency: Some(1),
            requests_per_minute: Some(2),
            ..KeyConfig::default()
        });
        let caller = ring.authenticate(&headers(&[("x-api-key", "secret")])).ok().unwrap();
        let now = Instant::now();
        let code = |at: Instant| caller.begin(at).err().map(|refusal| refusal.error.code.as_str());
        let first = caller.begin(now).ok().unwrap();
        assert_eq!(code(now), Some("concurrency_limit_exceeded"));
        drop(first);
        assert_eq!(code(now), None);
        assert_eq!(code(now + MINUTE / 2), Some("rate_limit_exceeded"));
        assert_eq!(caller.begin(now + MINUTE / 2).err().unwrap().retry_after_s, 31);
        assert_eq!(code(now + MINUTE), None);
    }
}
