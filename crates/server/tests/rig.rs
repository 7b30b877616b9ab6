//! A running server whose model answers with what the user told it to say.
//!
//! The text of the last user message is the answer, control tokens and all: a message
//! `hm</think>yes` makes a thinking model reason `hm` and answer `yes`. Four messages are special:
//! `FOREVER` and `SLOWLY` are answered without end, the latter with a pause before each token,
//! `PAUSE` with one long pause, and `NAN` with a broken step of that request.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fathom_chat::{EffortProfile, Special, Tokenizer};
use fathom_core::TokenId;
use fathom_engine::scripted::Reply;
use fathom_engine::{EngineConfig, EngineHandle, RunnerCapacity, ScriptedRunner, TierConfig};
use fathom_server::{BuildInfo, ModelEntry, Registry, Reloader, Server, ServerConfig};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::client::{Response, exchange};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = include_bytes!("../../../models/nano/tokenizer.json");
    Tokenizer::from_json(json).expect("the tokenizer of the tree is whole")
});

/// What the model knows by heart: a text prompt is continued with it.
pub(crate) const STORY: &str = "Once upon a time there was a 世界.";

/// The tokenizer of every model here.
pub(crate) fn tokenizer() -> &'static Tokenizer {
    &TOKENIZER
}

/// A running server; dropping it drains and stops it.
pub(crate) struct Rig {
    pub(crate) address: SocketAddr,
    pub(crate) registry: Registry,
    pub(crate) engine: EngineHandle,
    pub(crate) reloader: Reloader,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a rig is made of.
pub(crate) struct Options {
    pub(crate) config: ServerConfig,
    pub(crate) ids: Vec<&'static str>,
    pub(crate) max_model_len: u32,
    pub(crate) max_num_seqs: u32,
    pub(crate) queue_len: usize,
    pub(crate) queue_timeout: Duration,
    /// Whether models are installed at once.
    pub(crate) loaded: bool,
    /// What the model answers to its tokens so far.
    pub(crate) script: fn(&[TokenId]) -> Reply,
    /// Where prefixes and answers survive the rig.
    pub(crate) cache_dir: Option<PathBuf>,
    /// Keeps the one thread for blocking work busy until something comes.
    pub(crate) gate: Option<Receiver<()>>,
}

impl Default for Options {
    fn default() -> Self {
        let mut config = ServerConfig::default();
        config.server.port = 0;
        config.server.drain_s = 5;
        Self {
            config,
            ids: vec!["deepseek-v4-flash"],
            max_model_len: 4096,
            max_num_seqs: 8,
            queue_len: 64,
            queue_timeout: Duration::from_secs(600),
            loaded: true,
            script,
            cache_dir: None,
            gate: None,
        }
    }
}

impl Rig {
    pub(crate) fn start() -> Self {
        Self::with(Options::default())
    }

    /// A rig whose settings are the defaults after `change`.
    pub(crate) fn configured(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut options = Options::default();
        change(&mut options.config);
        Self::with(options)
    }

    pub(crate) fn with(mut options: Options) -> Self {
        options.config.cache.directory.clone_from(&options.cache_dir);
        let engine = engine(&options);
        let registry = Registry::default();
        if options.loaded {
            registry.install(vec![entry(&engine, &options.ids)]);
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let (bound, address) = std::sync::mpsc::channel();
        let (config, served, gate) = (options.config, registry.clone(), options.gate);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(if gate.is_some() { 1 } else { 16 })
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let server = Server::bind(config, served).await.unwrap();
                if let Some(gate) = gate {
                    tokio::task::spawn_blocking(move || gate.recv());
                }
                bound.send((server.local_addr(), server.reloader())).unwrap();
                server
                    .run(async {
                        let _ = stopped.await;
                    })
                    .await;
            });
        });
        let (address, reloader) = address.recv().unwrap();
        Self { address, registry, engine, reloader, stop: Some(stop), thread: Some(thread) }
    }

    /// Installs the model in a rig that started without.
    pub(crate) fn install(&self, ids: &[&'static str]) {
        self.registry.install(vec![entry(&self.engine, ids)]);
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        exchange(self.address, &format!("GET {path} HTTP/1.1"), b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.post_raw(path, "content-type: application/json", body.to_string().as_bytes())
    }

    /// Sends a body with these header lines.
    pub(crate) fn post_raw(&self, path: &str, headers: &str, body: &[u8]) -> Response {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\n{headers}\r\ncontent-length: {length}");
        exchange(self.address, &head, body)
    }

    pub(crate) fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    /// What the model answers when told to say `text`, without thinking.
    pub(crate) fn say(&self, text: &str, change: &Value) -> Response {
        self.chat(&saying(text, change))
    }

    /// The value of a metric's line that starts with `name`.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").body;
        let line = page.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until nothing is in flight; fails after 5 seconds.
    pub(crate) fn wait_until_idle(&self) {
        let began = Instant::now();
        while self.metric("fathom_requests_in_flight") > 0.0 {
            assert!(began.elapsed() < Duration::from_secs(5), "requests stay in flight");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the server to stop, without waiting for it.
    pub(crate) fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until the server has stopped.
    pub(crate) fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A failed test is told by its own panic.
            let _ = thread.join();
        }
    }
}

/// A non-thinking request to say `text`, with `change` laid over it.
pub(crate) fn saying(text: &str, change: &Value) -> Value {
    let mut body = json!({
        "model": "deepseek-v4-flash",
        "messages": [{"role": "user", "content": text}],
        "thinking": {"type": "disabled"},
    });
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

fn engine(options: &Options) -> EngineHandle {
    let capacity = RunnerCapacity {
        n_slots: 16,
        n_blocks: 512,
        n_snapshots: 64,
        vocab_size: u32::try_from(TOKENIZER.vocab_size()).unwrap(),
        max_model_len: options.max_model_len,
    };
    let config = EngineConfig {
        eos_token_ids: vec![TOKENIZER.special().eos()],
        max_num_seqs: options.max_num_seqs,
        queue_len: options.queue_len,
        queue_timeout: options.queue_timeout,
        isolate_users: options.config.cache.isolate_by_user,
        tiers: TierConfig { directory: options.cache_dir.clone(), ..TierConfig::default() },
        ..EngineConfig::default()
    };
    EngineHandle::start(Box::new(ScriptedRunner::new(capacity, options.script)), config).unwrap()
}

fn entry(engine: &EngineHandle, ids: &[&'static str]) -> ModelEntry {
    ModelEntry {
        ids: ids.iter().map(ToString::to_string).collect(),
        tokenizer: TOKENIZER.clone(),
        engine: engine.clone(),
        effort_profile: EffortProfile::Preview,
        fingerprint: "fp_0123abcd".into(),
        created: 1_735_000_000,
        build: BuildInfo {
            weights: "scripted".into(),
            dtype: "none".into(),
            parallel: "tp1ep1".into(),
        },
    }
}

/// The next token of the answer that the last user message spells out.
fn script(tokens: &[TokenId]) -> Reply {
    let special = TOKENIZER.special();
    let id = |which| special.get(which).unwrap();
    let Some(opened) = tokens.iter().rposition(|&t| t == id(Special::Assistant)) else {
        return continue_text(tokens);
    };
    let asked = tokens[..opened].iter().rposition(|&t| t == id(Special::User)).unwrap();
    // A message that was answered already ends where that answer begins.
    let asked = &tokens[asked + 1..opened];
    let wanted = asked.split(|&token| token == id(Special::Assistant)).next().unwrap_or_default();
    let wanted = TOKENIZER.decode(wanted);
    // The assistant's token is followed by the one that opens or closes its reasoning.
    let said = &tokens[opened + 2..];
    let endless = Reply::Token(TOKENIZER.encode_plain("a").unwrap()[0]);
    match wanted.as_str() {
        "FOREVER" => return endless,
        "SLOWLY" => {
            std::thread::sleep(Duration::from_millis(10));
            return endless;
        }
        "PAUSE" if said.is_empty() => std::thread::sleep(Duration::from_millis(1300)),
        "NAN" => return Reply::NotANumber,
        _ => {}
    }
    say_on(&wanted, said)
}

/// What comes in `wanted` after the tokens in `said`.
fn say_on(wanted: &str, said: &[TokenId]) -> Reply {
    let eos = TOKENIZER.special().eos();
    let whole = TOKENIZER.encode_with_special(wanted).unwrap();
    if whole.starts_with(said) {
        return Reply::Token(whole.get(said.len()).copied().unwrap_or(eos));
    }
    // A continued text may be cut where no token ends.
    let said = TOKENIZER.decode(said);
    let rest = wanted.strip_prefix(&said).unwrap_or_default();
    let next = TOKENIZER.encode_with_special(rest).unwrap().first().copied();
    Reply::Token(next.unwrap_or(eos))
}

/// What [`STORY`] says after the prompt; or, in a gap, what stands before and after it.
fn continue_text(tokens: &[TokenId]) -> Reply {
    let special = TOKENIZER.special();
    let place = |which| tokens.iter().position(|&t| Some(t) == special.get(which));
    if let (Some(hole), Some(end)) = (place(Special::FimHole), place(Special::FimEnd)) {
        let (before, after) = (&tokens[2..hole], &tokens[hole + 1..end]);
        let wanted = format!("[{}|{}]", TOKENIZER.decode(before), TOKENIZER.decode(after));
        return say_on(&wanted, &tokens[end + 1..]);
    }
    let bos = usize::from(tokens.first() == Some(&special.bos()));
    say_on(STORY, &tokens[bos..])
}

/// `text` with ids and times that differ between runs replaced.
pub(crate) fn normalised(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((at, marker)) = [
        "cmpl-",
        "call_",
        "msg_",
        "toolu_",
        "resp_",
        "rs_",
        "fc_",
        "\"created\":",
        "\"created_at\":",
    ]
    .into_iter()
    .filter_map(|marker| Some((rest.find(marker)?, marker)))
    .min()
    {
        let (before, after) = rest.split_at(at + marker.len());
        out.push_str(before);
        let end = after.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(after.len());
        out.push_str(if end >= 10 { "…" } else { &after[..end] });
        rest = &after[end..];
    }
    out + rest
}
