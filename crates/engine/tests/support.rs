//! Small engines and ways to drive them step by step.

use std::sync::mpsc;

use fathom_core::{FinishReason, SamplingParams, TokenId, Usage};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{
    EngineConfig, EngineHandle, GenerateError, GenerateRequest, RunnerCapacity, ScriptedRunner,
    TokenEvent, TokenStream,
};
use proptest::prelude::ProptestConfig;

pub(crate) const VOCABULARY: u32 = 97;
pub(crate) const EOS: TokenId = 1;

pub(crate) fn capacity() -> RunnerCapacity {
    RunnerCapacity {
        n_slots: 8,
        n_blocks: 64,
        n_snapshots: 16,
        vocab_size: VOCABULARY,
        max_model_len: 4096,
    }
}

/// As many cases as `PROPTEST_CASES` says, a few if it says nothing.
pub(crate) fn bounded(cases: u32) -> ProptestConfig {
    // Where the variable is set, the default has its value.
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { config.cases } else { cases };
    ProptestConfig { cases, ..config }
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig { eos_token_ids: vec![EOS], cache_seed: 3, ..EngineConfig::default() }
}

pub(crate) fn start(runner: ScriptedRunner) -> EngineHandle {
    EngineHandle::start(Box::new(runner), config()).unwrap()
}

/// An engine whose next token is a hash of all tokens so far.
pub(crate) fn hashed() -> EngineHandle {
    start(ScriptedRunner::hashed(capacity()))
}

/// Lets a test decide when a script goes on. Every row that is sampled costs one permit; a dropped
/// gate lets everything through.
pub(crate) struct Gate {
    permits: mpsc::Sender<()>,
    arrivals: mpsc::Receiver<()>,
}

impl Gate {
    /// A gate and the script side of it.
    pub(crate) fn new() -> (Self, impl FnMut() + Send) {
        let (permits, inbox) = mpsc::channel();
        let (outbox, arrivals) = mpsc::channel();
        let pass = move || {
            let _ = outbox.send(());
            let _ = inbox.recv();
        };
        (Self { permits, arrivals }, pass)
    }

    /// Waits until the script is at the gate.
    pub(crate) fn wait(&self) {
        self.arrivals.recv().unwrap();
    }

    /// Lets it through.
    pub(crate) fn open(&self) {
        self.permits.send(()).unwrap();
    }
}

/// An engine that stops at a gate before every sampled row, and answers by hash.
pub(crate) fn gated(config: EngineConfig) -> (EngineHandle, Gate) {
    let (gate, mut pass) = Gate::new();
    let runner = ScriptedRunner::new(capacity(), move |tokens| {
        pass();
        Reply::Token(hashed_token(tokens, VOCABULARY))
    });
    (EngineHandle::start(Box::new(runner), config).unwrap(), gate)
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ending {
    Finished(FinishReason, Usage),
    Failed(GenerateError),
}

/// All tokens of a stream, and how it ended.
pub(crate) fn read(mut stream: TokenStream) -> (Vec<TokenId>, Ending) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_recv().expect("a stream ends with a final event") {
            TokenEvent::Token { id, .. } => tokens.push(id),
            TokenEvent::Finished { reason, usage } => {
                assert_eq!(stream.blocking_recv(), None, "nothing follows the final event");
                return (tokens, Ending::Finished(reason, usage));
            }
            TokenEvent::Failed(error) => {
                assert_eq!(stream.blocking_recv(), None, "nothing follows the final event");
                return (tokens, Ending::Failed(error));
            }
        }
    }
}

pub(crate) fn prompt(family: u32, n: u32) -> Vec<TokenId> {
    (0..n).map(|i| (i * 7 + family * 31 + i * i % 13) % VOCABULARY).collect()
}

pub(crate) fn greedy(prompt: Vec<TokenId>, max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(max_tokens) };
    GenerateRequest::new(prompt, sampling)
}

/// What a hashed engine answers greedily, ignoring the end-of-sequence token.
pub(crate) fn hashed_answer(prompt: &[TokenId], n: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    for _ in 0..n {
        tokens.push(hashed_token(&tokens, VOCABULARY));
    }
    tokens.split_off(prompt.len())
}
