//! Who is asking: API keys, and what a key may do.
//!
//! Keys are compared by their SHA-256 and never kept, logged or echoed. [`Keys`] can be replaced
//! while requests run: those that have begun go on under the key they began with.
//!
//! Not here: which endpoints need a key (each handler asks for a [`Caller`]), limits (`key`).

mod key;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use fathom_protocol::{ApiError, ErrorCode, quoted};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::app::App;
use crate::config::{KeyConfig, ServerConfig};
use crate::error::Refusal;
use key::Key;

pub(crate) use key::Turn;

/// The API keys cannot be used as they are configured.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum KeysError {
    #[error("cannot read the keys file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("line {line} of the keys file {path} does not belong into a list of [[keys]]")]
    Parse { path: PathBuf, line: usize },
    #[error(
        "key number {index} of {place} needs either `key` or `sha256` (64 hexadecimal digits), not \
         both"
    )]
    Secret { index: usize, place: String },
}

/// The keys in force.
pub(crate) struct Keys {
    ring: RwLock<Arc<KeyRing>>,
}

impl Keys {
    /// The keys of the settings and of the file they name.
    pub(crate) fn load(config: &ServerConfig) -> Result<Self, KeysError> {
        let ring = KeyRing::load(config, &KeyRing::default())?;
        Ok(Self { ring: RwLock::new(Arc::new(ring)) })
    }

    /// Reads the file again. If that fails, the keys stay as they are. Returns the number of keys.
    pub(crate) fn reload(&self, config: &ServerConfig) -> Result<usize, KeysError> {
        let ring = KeyRing::load(config, &self.current())?;
        let n_keys = ring.keys.len();
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
        Ok(n_keys)
    }

    fn current(&self) -> Arc<KeyRing> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The key that the headers present; `None` inside if no keys are configured.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        self.current().authenticate(headers)
    }
}

/// Whether a key's secret is given, and in one form only.
pub(crate) fn has_one_secret(config: &KeyConfig) -> bool {
    key::hash_of(config).is_some()
}

/// Some keys.
#[derive(Default)]
struct KeyRing {
    keys: Vec<Arc<Key>>,
    /// Whether a key is needed. An empty file of keys lets nobody pass: whoever names one wants keys.
    required: bool,
}

/// A file of keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    keys: Vec<KeyConfig>,
}

impl KeyRing {
    fn load(config: &ServerConfig, before: &Self) -> Result<Self, KeysError> {
        let mut keys = Vec::new();
        add(&mut keys, &config.keys, "the settings", before)?;
        if let Some(path) = &config.server.keys_file {
            let file = read_file(path)?;
            add(&mut keys, &file.keys, &path.display().to_string(), before)?;
        }
        let required = !keys.is_empty() || config.server.keys_file.is_some();
        Ok(Self { keys, required })
    }

    fn find(&self, hash: &[u8; 32]) -> Option<&Arc<Key>> {
        // Every key is compared in full, so that time says nothing about which one came close.
        let mut found = None;
        for key in &self.keys {
            if equal(&key.hash, hash) {
                found = Some(key);
            }
        }
        found
    }

    fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if !self.required {
            return Ok(Caller { key: None });
        }
        let Some(presented) = presented(headers) else {
            let message =
                "An API key is required: send `Authorization: Bearer KEY` or `x-api-key`.";
            return Err(ApiError::new(ErrorCode::MissingApiKey, message));
        };
        match self.find(&Sha256::digest(presented).into()) {
            Some(key) => Ok(Caller { key: Some(Arc::clone(key)) }),
            None => {
                let message = format!("The API key {} is not valid.", ending(presented));
                Err(ApiError::new(ErrorCode::InvalidApiKey, message))
            }
        }
    }
}

fn read_file(path: &Path) -> Result<KeysFile, KeysError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| KeysError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| {
        // The parser's own message may repeat what stands there: a secret.
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        KeysError::Parse { path: path.to_owned(), line }
    })
}

fn add(
    keys: &mut Vec<Arc<Key>>,
    configs: &[KeyConfig],
    place: &str,
    before: &KeyRing,
) -> Result<(), KeysError> {
    for (index, config) in configs.iter().enumerate() {
        let hash = key::hash_of(config)
            .ok_or_else(|| KeysError::Secret { index, place: place.to_owned() })?;
        let known = before.find(&hash).map(|key| &**key);
        keys.push(Arc::new(Key::new(config, hash, known)));
    }
    Ok(())
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
        self.key.as_ref().map_or_else(|| Ok(Turn::free()), |key| key.begin(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn ring() -> Keys {
        let keys = vec![KeyConfig::plain("other"), KeyConfig::plain("secret")];
        Keys::load(&ServerConfig { keys, ..ServerConfig::default() }).unwrap()
    }

    #[test]
    fn either_header_carries_the_key_and_bearer_wins() {
        let ring = ring();
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
        let ring = ring();
        let message = |key: &str| {
            let refused = ring.authenticate(&headers(&[("x-api-key", key)]));
            refused.err().unwrap().message
        };
        assert_eq!(message("sk-0123456789"), "The API key `…6789` is not valid.");
        assert_eq!(message("ab"), "The API key `…` is not valid.");
    }

    #[test]
    fn a_file_of_keys_is_read_again_and_a_broken_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.toml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("[[keys]]\nkey = 'one'");
        let mut config =
            ServerConfig { keys: vec![KeyConfig::plain("zero")], ..Default::default() };
        config.server.keys_file = Some(path.clone());
        let keys = Keys::load(&config).unwrap();
        let passes = |key: &str| keys.authenticate(&headers(&[("x-api-key", key)])).is_ok();
        assert!(passes("zero") && passes("one") && !passes("two"));

        write("[[keys]]\nkey = 'two'\nmax_concurrency = 1\n[[keys]]\nkey = 'three'");
        assert_eq!(keys.reload(&config).unwrap(), 3);
        assert!(passes("zero") && !passes("one") && passes("two"));

        for (broken, place) in [
            ("[[keys]]\nkey = 'hidden'\nmax_concurency = 1", "line 3"),
            ("keys = 'hidden'", "line 1"),
            ("[[keys]]\nkey = 'hidden'\n[[keys]]", "number 1"),
        ] {
            write(broken);
            let text = keys.reload(&config).unwrap_err().to_string();
            assert!(text.contains("keys.toml") && text.contains(place), "{text}");
            assert!(!text.contains("hidden"), "{text}");
        }
        assert!(passes("two"));
        write("");
        config.keys.clear();
        assert_eq!(keys.reload(&config).unwrap(), 0);
        assert!(!passes("two") && !passes("zero"), "an empty file lets nobody pass");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(keys.reload(&config), Err(KeysError::Read { .. })));
    }
}
