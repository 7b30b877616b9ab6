//! One API key: what it may do, and what it has done.
//!
//! Use is counted in [`Use`], which a reload of the keys carries over: a key does not get a new
//! minute because an operator edited the file.
//!
//! Not here: finding the key that a request presents (the parent module).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fathom_protocol::{ApiError, ErrorCode};
use sha2::{Digest, Sha256};

use crate::config::KeyConfig;
use crate::error::Refusal;

const MINUTE: Duration = Duration::from_secs(60);

/// One key and what it may do.
pub(super) struct Key {
    pub(super) hash: [u8; 32],
    pub(super) models: Option<Vec<String>>,
    max_concurrency: usize,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u64>,
    token_balance: Option<u64>,
    used: Arc<Use>,
}

/// What was done under a key since the server started.
#[derive(Default)]
struct Use {
    running: AtomicUsize,
    n_tokens: AtomicU64,
    window: Mutex<Window>,
}

/// What began within the current minute.
#[derive(Default)]
struct Window {
    began: Option<Instant>,
    n_requests: u32,
    n_tokens: u64,
}

impl Window {
    /// Seconds until the window ends; a window that has ended is begun anew.
    fn left(&mut self, now: Instant) -> u64 {
        let elapsed = self.began.map(|began| now.saturating_duration_since(began));
        let left = elapsed.and_then(|elapsed| MINUTE.checked_sub(elapsed)).unwrap_or_default();
        if left.is_zero() {
            *self = Self { began: Some(now), n_requests: 0, n_tokens: 0 };
            return MINUTE.as_secs();
        }
        left.as_secs() + 1
    }
}

/// The SHA-256 of a key's secret, which the configuration gives in one of two forms.
pub(super) fn hash_of(config: &KeyConfig) -> Option<[u8; 32]> {
    match (&config.sha256, config.key.as_str()) {
        (None, "") => None,
        (None, secret) => Some(Sha256::digest(secret).into()),
        (Some(digits), "") => {
            let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
            let byte = |pair: &[u8; 2]| {
                let pair = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(pair, 16).ok().filter(|_| !pair.starts_with('+'))
            };
            let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
            bytes.filter(|_| rest.is_empty())?.try_into().ok()
        }
        (Some(_), _) => None,
    }
}

impl Key {
    /// The key that `config` describes, going on from what `before` has done.
    pub(super) fn new(config: &KeyConfig, hash: [u8; 32], before: Option<&Self>) -> Self {
        Self {
            hash,
            models: config.models.clone(),
            max_concurrency: config.max_concurrency.unwrap_or(usize::MAX),
            requests_per_minute: config.requests_per_minute,
            tokens_per_minute: config.tokens_per_minute,
            token_balance: config.token_balance,
            used: before.map(|key| Arc::clone(&key.used)).unwrap_or_default(),
        }
    }

    /// Counts one request against the limits, until the [`Turn`] is dropped.
    pub(super) fn begin(self: &Arc<Self>, now: Instant) -> Result<Turn, Refusal> {
        let spent = self.used.n_tokens.load(Ordering::Acquire);
        if self.token_balance.is_some_and(|balance| spent >= balance) {
            let message = "This API key has used all the tokens it may use.";
            return Err(ApiError::new(ErrorCode::InsufficientBalance, message).into());
        }
        let running = &self.used.running;
        let admitted = running.fetch_update(Ordering::AcqRel, Ordering::Acquire, |running| {
            (running < self.max_concurrency).then_some(running + 1)
        });
        if admitted.is_err() {
            let max = self.max_concurrency;
            let message = format!("This API key may run {max} requests at once.");
            return Err(ApiError::new(ErrorCode::ConcurrencyLimitExceeded, message).into());
        }
        let turn = Turn { key: Some(Arc::clone(self)) };
        self.count_request(now)?;
        Ok(turn)
    }

    fn count_request(&self, now: Instant) -> Result<(), Refusal> {
        let mut window = self.used.window.lock().unwrap_or_else(PoisonError::into_inner);
        let retry_after_s = window.left(now);
        let refuse = |message: String| {
            let error = ApiError::new(ErrorCode::RateLimitExceeded, message);
            Err(Refusal { retry_after_s, ..error.into() })
        };
        if let Some(max) = self.requests_per_minute.filter(|&max| window.n_requests >= max) {
            return refuse(format!("This API key may begin {max} requests per minute."));
        }
        if let Some(max) = self.tokens_per_minute.filter(|&max| window.n_tokens >= max) {
            return refuse(format!("This API key may use {max} tokens per minute."));
        }
        window.n_requests += 1;
        Ok(())
    }
}

/// A request that counts against its key's concurrency.
pub(crate) struct Turn {
    key: Option<Arc<Key>>,
}

impl Turn {
    /// A request that nobody limits.
    pub(super) const fn free() -> Self {
        Self { key: None }
    }

    /// Counts what the request has used. What fails is not counted: nobody pays for an error.
    pub(crate) fn charge(&self, n_tokens: u64, now: Instant) {
        let Some(key) = &self.key else { return };
        key.used.n_tokens.fetch_add(n_tokens, Ordering::AcqRel);
        let mut window = key.used.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.left(now);
        window.n_tokens += n_tokens;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            key.used.running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(config: KeyConfig) -> Arc<Key> {
        Arc::new(Key::new(&config, [0; 32], None))
    }

    fn code(key: &Arc<Key>, at: Instant) -> Option<&'static str> {
        key.begin(at).err().map(|refusal| refusal.error.code.as_str())
    }

    #[test]
    fn a_key_runs_so_many_requests_at_once_and_begins_so_many_per_minute() {
        let key = key(KeyConfig {
            max_concurrency: Some(1),
            requests_per_minute: Some(2),
            ..KeyConfig::default()
        });
        let now = Instant::now();
        let first = key.begin(now).ok().unwrap();
        assert_eq!(code(&key, now), Some("concurrency_limit_exceeded"));
        drop(first);
        assert_eq!(code(&key, now), None);
        assert_eq!(code(&key, now + MINUTE / 2), Some("rate_limit_exceeded"));
        assert_eq!(key.begin(now + MINUTE / 2).err().unwrap().retry_after_s, 31);
        assert_eq!(code(&key, now + MINUTE), None);
    }

    #[test]
    fn tokens_are_limited_per_minute_and_in_all() {
        let key = key(KeyConfig {
            tokens_per_minute: Some(100),
            token_balance: Some(250),
            ..KeyConfig::default()
        });
        let now = Instant::now();
        for minute in 0..2 {
            let at = now + MINUTE * minute;
            let turn = key.begin(at).ok().unwrap();
            turn.charge(120, at);
            assert_eq!(code(&key, at), Some("rate_limit_exceeded"));
        }
        let at = now + MINUTE * 2;
        key.begin(at).ok().unwrap().charge(10, at);
        assert_eq!(code(&key, at), Some("insufficient_balance"));
        assert_eq!(code(&key, at + MINUTE), Some("insufficient_balance"));
    }

    #[test]
    fn a_reload_changes_limits_and_forgets_nothing() {
        let before = key(KeyConfig::default());
        let now = Instant::now();
        let turn = before.begin(now).ok().unwrap();
        let config = KeyConfig { max_concurrency: Some(1), ..KeyConfig::default() };
        let after = Arc::new(Key::new(&config, [0; 32], Some(&before)));
        assert_eq!(code(&after, now), Some("concurrency_limit_exceeded"));
        drop(turn);
        assert_eq!(code(&after, now), None);
    }

    #[test]
    fn a_secret_is_given_in_one_form() {
        let digits = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
        let hashed = |key: &str, sha256: Option<&str>| {
            let sha256 = sha256.map(str::to_owned);
            hash_of(&KeyConfig { key: key.into(), sha256, ..KeyConfig::default() })
        };
        assert!(hashed("secret", None).is_some());
        assert_eq!(hashed("secret", None), hashed("", Some(digits)));
        assert_eq!(hashed("", None), None);
        assert_eq!(hashed("secret", Some(digits)), None);
        for wrong in [&digits[1..], &digits[2..], &digits.replace('2', "g"), "+b"] {
            assert_eq!(hashed("", Some(wrong)), None, "{wrong}");
        }
    }
}
