//! What all requests share: settings, models, keys, counters, and the stream of identifiers.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fathom_chat::TurnCache;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::{Keys, KeysError};
use crate::config::ServerConfig;
use crate::metrics::Metrics;
use crate::recall::AnswerMemory;
use crate::registry::Registry;
use crate::telemetry::Tracer;
use crate::tls::Tls;

/// Memory for turns of conversations and their token ids: what some fifteen conversations of a
/// million tokens take.
const TURN_CACHE_BYTES: usize = 128 << 20;

/// The server's shared state.
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) registry: Registry,
    pub(crate) keys: Keys,
    pub(crate) tls: Option<Tls>,
    pub(crate) metrics: Metrics,
    pub(crate) tracer: Option<Tracer>,
    /// Turns of conversations that were tokenised before.
    pub(crate) turns: TurnCache,
    /// Answers that clients may send back.
    pub(crate) answers: Arc<AnswerMemory>,
    /// Tasks that write event streams; shutdown waits for them.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when a shutdown was asked for: new requests are refused from then on.
    pub(crate) draining: CancellationToken,
    pub(crate) random: Random,
}

impl App {
    pub(crate) fn new(
        config: ServerConfig,
        registry: Registry,
        tls: Option<Tls>,
        tracer: Option<Tracer>,
    ) -> Result<Self, KeysError> {
        Ok(Self {
            tls,
            tracer,
            keys: Keys::load(&config)?,
            answers: AnswerMemory::open(
                config.cache.remember_answers_mb as usize * (1 << 20),
                config.cache.directory.as_deref(),
            ),
            config,
            registry,
            metrics: Metrics::default(),
            turns: TurnCache::new(TURN_CACHE_BYTES),
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            random: Random::default(),
        })
    }
}

/// Numbers that nobody can predict and that do not repeat: ids, and seeds where none was given.
///
/// A counter hashed under keys that the system drew at start. Not for secrets.
#[derive(Default)]
pub(crate) struct Random {
    keys: [RandomState; 2],
    counter: AtomicU64,
}

impl Random {
    pub(crate) fn draw(&self) -> u64 {
        self.keys[0].hash_one(self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// 32 hexadecimal digits.
    pub(crate) fn id(&self) -> String {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{:016x}", self.keys[0].hash_one(number), self.keys[1].hash_one(number))
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
