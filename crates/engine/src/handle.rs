//! The only door to the engine: submit tokens, receive token events.
//!
//! An [`EngineHandle`] is cheap to clone and safe to use from any thread or task. Text never crosses
//! it: prompts come in as token ids and answers leave as token ids.
//!
//! Invariants:
//! - a submission is either refused at once ([`SubmitError`]) or ends in exactly one final event
//!   ([`TokenEvent::Finished`] or [`TokenEvent::Failed`]) on its stream, also when a step panics,
//!   the queue times out or the engine shuts down;
//! - a slow reader never holds up the engine: a stream's events are bounded by the request's
//!   `max_tokens`, not by how fast they are read.
//!
//! Not here: the stream itself ([`crate::stream`]), the thread behind the door
//! ([`crate::step_loop`]).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use fathom_core::{
    ConstraintError, FinishReason, RequestId, SamplingParams, TokenConstraint, TokenId,
    TokenLogprob, Usage,
};
use tokio::sync::watch;

use crate::events::EventSink;
use crate::stats::EngineStats;
use crate::stream::{RequestClock, TokenStream};

/// One choice to generate: `n` choices of an HTTP request are `n` submissions.
pub struct GenerateRequest {
    /// The prompt's tokens; at least one, all below the vocabulary size.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen and when generation ends.
    pub sampling: SamplingParams,
    /// Lower values run earlier, as in vLLM; 0 is the default.
    pub priority: i32,
    /// Whom the request is charged to: no user starves another. `None` is one shared user.
    pub user: Option<String>,
    /// Requests share prefix-cache entries only if their salts are equal.
    pub cache_salt: Option<String>,
    /// Restricts which tokens may come next.
    pub constraint: Option<Box<dyn TokenConstraint>>,
}

impl GenerateRequest {
    /// A request with default priority, no user, no salt and no constraint.
    #[must_use]
    pub fn new(prompt: Vec<TokenId>, sampling: SamplingParams) -> Self {
        Self { prompt, sampling, priority: 0, user: None, cache_salt: None, constraint: None }
    }
}

impl std::fmt::Debug for GenerateRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Prompts are private: only their length is printed.
        f.debug_struct("GenerateRequest")
            .field("n_prompt", &self.prompt.len())
            .field("sampling", &self.sampling)
            .field("priority", &self.priority)
            .field("constrained", &self.constraint.is_some())
            .finish_non_exhaustive()
    }
}

/// What happens to an accepted request, in order; the last one is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// A token was sampled. The end-of-sequence or stop token that ends a request is one of them.
    Token {
        /// The sampled token.
        id: TokenId,
        /// Present if [`SamplingParams::logprobs`] asked for it.
        logprob: Option<TokenLogprob>,
    },
    /// The request ended as it should.
    Finished {
        /// Why no further token comes.
        reason: FinishReason,
        /// Final token counts.
        usage: Usage,
    },
    /// The request was accepted, but could not be completed.
    Failed(GenerateError),
}

impl TokenEvent {
    /// Whether this is the last event of its stream.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed(_))
    }
}

/// A request was refused; the engine knows nothing about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum SubmitError {
    #[error("{limit} requests are waiting already: try again later")]
    QueueFull { limit: usize },
    #[error("the engine is shutting down")]
    ShuttingDown,
    #[error("the engine has failed and needs a restart: {reason}")]
    Unhealthy { reason: String },
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    #[error("the prompt has {n_tokens} tokens, but prompt and answer share {max_model_len}")]
    PromptTooLong { n_tokens: usize, max_model_len: u32 },
    #[error("{what} names token {token}, but the vocabulary has {vocab_size}")]
    UnknownToken { what: &'static str, token: TokenId, vocab_size: u32 },
    #[error("max_tokens is 0: at least one token must be generated")]
    ZeroMaxTokens,
}

/// An accepted request could not be completed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum GenerateError {
    #[error("the request waited {waited:?} without being started: try again later")]
    QueueTimeout { waited: Duration },
    #[error("the model produced NaN or infinite logits at position {position}")]
    NonFiniteLogits { position: u32 },
    #[error("the constraint allows no token at position {position}")]
    NothingAllowed { position: u32 },
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    #[error("the step that ran this request failed: {message}")]
    StepFailed { message: String },
    #[error("the engine shut down before the request was complete")]
    ShuttingDown,
}

/// What the engine can take; constant for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Prompt and generated tokens of one request together.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Sequences that may run at once.
    pub max_num_seqs: u32,
    /// Tokens that one step may run through the model.
    pub max_num_batched_tokens: u32,
    /// Requests that may wait to be started.
    pub queue_len: usize,
    /// Tokens whose KV cache fits, all requests together.
    pub kv_tokens: u64,
}

/// Where the engine is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineState {
    /// Warming up; submissions are accepted and wait.
    Starting,
    /// Serving.
    Ready,
    /// Finishing what runs; submissions are refused.
    Draining,
    /// The step loop has ended after a shutdown.
    Stopped,
    /// The step loop has ended because it could not go on.
    Failed {
        /// What went wrong, for the operator.
        reason: String,
    },
}

/// A look at the engine's life signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Where the engine is in its life.
    pub state: EngineState,
    /// With work pending: how long ago the last sign of progress was. `None` when idle.
    pub stalled_for: Option<Duration>,
}

/// What handles send to the step loop.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Cancel(RequestId),
    Shutdown { deadline: Instant },
}

/// An accepted request on its way to the step loop.
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) request: GenerateRequest,
    pub(crate) events: EventSink,
    pub(crate) ticket: QueueTicket,
}

/// A place in the queue, given back when the request starts or ends, whichever way.
pub(crate) struct QueueTicket(Arc<Shared>);

impl QueueTicket {
    fn take(shared: &Arc<Shared>) -> Result<Self, SubmitError> {
        let limit = shared.limits.queue_len;
        let one_more = |n| (n < limit).then_some(n + 1);
        match shared.n_queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more) {
            Ok(_) => Ok(Self(Arc::clone(shared))),
            Err(_) => Err(SubmitError::QueueFull { limit }),
        }
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        self.0.n_queued.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What handles and the step loop share. No lock here is ever held across a step.
pub(crate) struct Shared {
    pub(crate) limits: EngineLimits,
    pub(crate) state: watch::Sender<EngineState>,
    pub(crate) stats: Mutex<EngineStats>,
    /// Requests accepted and not yet started: the queue whose length is limited.
    n_queued: AtomicUsize,
    next_id: AtomicU64,
    /// Milliseconds from `epoch` to the last progress, plus one; 0 while nothing is pending.
    progress_ms: AtomicU64,
    epoch: Instant,
}

impl Shared {
    pub(crate) fn new(limits: EngineLimits, stats: EngineStats) -> Self {
        Self {
            limits,
            state: watch::Sender::new(EngineState::Starting),
            stats: Mutex::new(stats),
            n_queued: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            progress_ms: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    /// Notes progress while work is pending, or that nothing is.
    pub(crate) fn note_progress(&self, now: Instant, pending: bool) {
        let elapsed = now.saturating_duration_since(self.epoch).as_millis();
        let ms = if pending { u64::try_from(elapsed).unwrap_or(u64::MAX - 1) + 1 } else { 0 };
        self.progress_ms.store(ms, Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> std::sync::MutexGuard<'_, EngineStats> {
        // Counters stay meaningful whatever panicked while they were being updated.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The only door to the engine. Clones share one engine; it stops when told to
/// ([`EngineHandle::shutdown`]) or when the last handle and stream are gone.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) shared: Arc<Shared>,
}

impl EngineHandle {
    /// Hands a request to the engine. Returns at once; tokens arrive on the stream.
    ///
    /// # Errors
    /// [`SubmitError`] if the request cannot be served at all, the queue is full, or the engine
    /// is no longer taking requests.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, SubmitError> {
        self.check(&request)?;
        let ticket = QueueTicket::take(&self.shared)?;
        let id = RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let clock = Arc::new(RequestClock::new(Instant::now()));
        let events = EventSink::new(sender, Arc::clone(&clock));
        let submission = Submission { id, request, events, ticket };
        if self.commands.send(Command::Submit(Box::new(submission))).is_err() {
            self.accepting()?;
            return Err(SubmitError::ShuttingDown);
        }
        Ok(TokenStream::new(id, receiver, clock, self.commands.clone()))
    }

    fn accepting(&self) -> Result<(), SubmitError> {
        match &*self.shared.state.borrow() {
            EngineState::Starting | EngineState::Ready => Ok(()),
            EngineState::Draining | EngineState::Stopped => Err(SubmitError::ShuttingDown),
            EngineState::Failed { reason } => {
                Err(SubmitError::Unhealthy { reason: reason.clone() })
            }
        }
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        self.accepting()?;
        let EngineLimits { max_model_len, vocab_size, .. } = self.shared.limits;
        let known = |what, tokens: &mut dyn Iterator<Item = TokenId>| match tokens
            .max()
            .filter(|&token| token >= vocab_size)
        {
            Some(token) => Err(SubmitError::UnknownToken { what, token, vocab_size }),
            None => Ok(()),
        };
        let n_tokens = request.prompt.len();
        if n_tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if n_tokens >= max_model_len as usize {
            return Err(SubmitError::PromptTooLong { n_tokens, max_model_len });
        }
        if request.sampling.max_tokens == 0 {
            return Err(SubmitError::ZeroMaxTokens);
        }
        known("the prompt", &mut request.prompt.iter().copied())?;
        known("logit_bias", &mut request.sampling.logit_bias.iter().map(|&(token, _)| token))
    }

    /// Counters and gauges, as of the last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.shared.stats().clone();
        // Fresher than the last step: it includes what the step loop has not yet received.
        stats.requests_waiting =
            stats.requests_preempted + self.shared.n_queued.load(Ordering::Relaxed) as u64;
        stats
    }

    /// What the engine can take.
    #[must_use]
    pub fn limits(&self) -> EngineLimits {
        self.shared.limits
    }

    /// The engine's life signs. Never blocks on a step.
    #[must_use]
    pub fn health(&self) -> Health {
        let state = self.shared.state.borrow().clone();
        let stalled_for = match self.shared.progress_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(self.shared.epoch.elapsed().saturating_sub(Duration::from_millis(ms - 1))),
        };
        Health { state, stalled_for }
    }

    /// Waits until the engine is past its warm-up, and returns where it is then.
    pub async fn started(&self) -> EngineState {
        self.wait_for(|state| *state != EngineState::Starting).await
    }

    /// Refuses new requests, lets running ones end for up to `drain`, fails the rest with
    /// [`GenerateError::ShuttingDown`], and returns when the step loop has ended.
    pub async fn shutdown(&self, drain: Duration) {
        self.begin_shutdown(drain);
        self.wait_for(|state| matches!(state, EngineState::Stopped | EngineState::Failed { .. }))
            .await;
    }

    /// As [`EngineHandle::shutdown`], without waiting for the end.
    pub fn begin_shutdown(&self, drain: Duration) {
        self.shared.state.send_if_modified(|state| {
            let running = matches!(state, EngineState::Starting | EngineState::Ready);
            if running {
                *state = EngineState::Draining;
            }
            running
        });
        // An engine that has ended already needs no command.
        let _ = self.commands.send(Command::Shutdown { deadline: Instant::now() + drain });
    }

    async fn wait_for(&self, done: impl FnMut(&EngineState) -> bool) -> EngineState {
        let mut state = self.shared.state.subscribe();
        let reached = state.wait_for(done).await;
        reached.expect("the sender lives in `shared`, which this handle keeps alive").clone()
    }
}
