//! The server itself, with a scripted runner for a model.
//!
//! Each request says which stream it is in its message; the script reads that from the prompt, notes
//! when it chose each token, and answers with words of a fixed text.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fathom_chat::{EffortProfile, Special, Tokenizer};
use fathom_core::TokenId;
use fathom_engine::scripted::Reply;
use fathom_engine::{EngineConfig, EngineHandle, RunnerCapacity, ScriptedRunner};
use fathom_server::{BuildInfo, ModelEntry, Registry, Server, ServerConfig};
use serde_json::json;
use tokio::sync::oneshot;

use super::readers::Readings;
use crate::{Load, REACTOR};

const TEXT: &str = "The server writes one event for each token, as soon as there is one, and a \
    reader sees the words of the answer one after the other, in the order of the model's choice. ";

/// When each token of each stream was chosen.
pub(crate) struct ReadyTimes {
    epoch: Instant,
    n_events: usize,
    /// Nanoseconds since the epoch, `[n_streams * n_events]`; 0 for what has not happened.
    at: Vec<AtomicU64>,
}

impl ReadyTimes {
    pub(crate) fn new(load: &Load) -> Self {
        let Load { n_streams, n_events, .. } = *load;
        let at = (0..n_streams * n_events).map(|_| AtomicU64::new(0)).collect();
        Self { epoch: Instant::now(), n_events, at }
    }

    pub(crate) fn note(&self, stream: usize, token: usize) {
        let now = self.epoch.elapsed().as_nanos() as u64;
        self.at[stream * self.n_events + token].store(now, Ordering::Relaxed);
    }

    /// How long ago a token was chosen; `None` for events that are no tokens.
    pub(crate) fn since(&self, stream: usize, token: usize) -> Option<Duration> {
        if token >= self.n_events {
            return None;
        }
        let at = self.at[stream * self.n_events + token].load(Ordering::Relaxed);
        (at > 0).then(|| self.epoch.elapsed().saturating_sub(Duration::from_nanos(at)))
    }
}

/// The request of one stream.
pub(crate) fn request_body(stream: usize, load: &Load) -> String {
    let body = json!({
        "model": "bench",
        "messages": [{"role": "user", "content": stream.to_string()}],
        "thinking": {"type": "disabled"},
        "temperature": 0,
        "max_tokens": load.n_events,
        "stream": true,
    });
    body.to_string()
}

/// Runs `read` against a server.
pub(crate) fn run(
    load: &Load,
    times: &Arc<ReadyTimes>,
    read: impl FnOnce(SocketAddr) -> Readings,
) -> Readings {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/nano/tokenizer.json");
    let json = std::fs::read(path).expect("the demo model's tokenizer");
    let tokenizer = Tokenizer::from_json(&json).expect("a tokenizer for V4");
    let engine = engine(load, &tokenizer, Arc::clone(times));
    let registry = Registry::default();
    registry.install(vec![ModelEntry {
        ids: vec!["bench".into()],
        tokenizer,
        engine,
        effort_profile: EffortProfile::Preview,
        fingerprint: "fp_0123abcd".into(),
        created: 1_735_000_000,
        build: BuildInfo::default(),
    }]);
    let mut config = ServerConfig::default();
    config.server.port = 0;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(REACTOR)
        .enable_all()
        .build()
        .expect("a runtime");
    let server = runtime.block_on(Server::bind(config, registry)).expect("a free port");
    let address = server.local_addr();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = runtime.spawn(server.run(async {
        // Either way it is time to stop.
        let _ = stopped.await;
    }));
    let readings = read(address);
    stop.send(()).expect("a server that still runs");
    runtime.block_on(serving).expect("a server that stops");
    readings
}

fn engine(load: &Load, tokenizer: &Tokenizer, times: Arc<ReadyTimes>) -> EngineHandle {
    let n_streams = load.n_streams as u32;
    let max_model_len = load.n_events as u32 + 64;
    let capacity = RunnerCapacity {
        n_slots: n_streams,
        n_blocks: n_streams * (max_model_len.div_ceil(256) + 1),
        n_snapshots: n_streams,
        vocab_size: tokenizer.vocab_size() as u32,
        max_model_len,
    };
    let config = EngineConfig {
        eos_token_ids: vec![tokenizer.special().eos()],
        max_num_seqs: n_streams,
        queue_len: load.n_streams,
        prefix_cache: false,
        max_step_time: None,
        ..EngineConfig::default()
    };
    let text = tokenizer.encode_plain(TEXT).expect("encodes");
    let assistant = tokenizer.special().get(Special::Assistant).expect("every tokenizer has it");
    let tokenizer = tokenizer.clone();
    let (load, mut n_begun) = (*load, 0);
    let script = move |tokens: &[TokenId]| {
        let opened = tokens.iter().position(|&token| token == assistant);
        let opened = opened.expect("a chat prompt opens an answer");
        // Beginning of sentence and user come before the number, and one token after the opener.
        let mut stream = 0;
        for &token in &tokens[2..opened] {
            for digit in tokenizer.token_bytes(token).unwrap_or_default() {
                stream = stream * 10 + usize::from(digit - b'0');
            }
        }
        let n_said = tokens.len() - opened - 2;
        n_begun += usize::from(n_said == 0);
        if n_begun < load.n_streams && stream == 0 {
            // However fast the load is: the first streams do not end before the last have begun.
            std::thread::sleep(Duration::from_millis(10));
        }
        times.note(stream, n_said);
        Reply::Token(text[(stream * 7 + n_said) % text.len()])
    };
    let runner = ScriptedRunner::new(capacity, script).with_step_time(load.tick);
    EngineHandle::start(Box::new(runner), config).expect("a configuration that fits")
}
