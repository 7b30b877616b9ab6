//! The `n` choices of one request while the engine runs them.
//!
//! [`Generation::next`] merges the choices' token events into one sequence of [`Update`]s. The
//! request's counts and times are noted in its [`Record`] when the generation is dropped, whatever
//! way it ended; dropping it before the end cancels every choice that still runs.
//!
//! Not here: what the client is sent (`openai`).

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use fathom_core::{FinishReason as Reason, TokenId, TokenLogprob};
use fathom_engine::{GenerateError, TokenEvent, TokenStream};
use fathom_protocol::openai::response::{FinishDetails, FinishReason, StopReason, Usage};

use crate::app::App;
use crate::auth::Turn;
use crate::metrics::Phase;
use crate::record::Record;
use crate::registry::ModelEntry;

/// Times between tokens are counted this many at once: all streams share the counters' lock.
const MAX_GAPS: usize = 32;

/// Reads one choice's tokens and says what is new.
pub(crate) trait Answer {
    /// Something new.
    type Piece;

    /// Takes the next token.
    fn push(&mut self, id: TokenId, logprob: Option<&TokenLogprob>) -> Vec<Self::Piece>;

    /// Whether nothing more is wanted, whatever the model would go on to say.
    fn is_enough(&self) -> bool;

    /// Tokens taken, those that are no text included.
    fn n_tokens(&self) -> u32;

    /// Tokens of reasoning among them.
    fn n_reasoning(&self) -> u32;

    /// Ends the answer. Returns the last pieces, how it ended, and how many of its tokens were
    /// reasoning.
    fn finish(self, reason: Reason) -> (Vec<Self::Piece>, Ending, u32);
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    pub(crate) finish_reason: FinishReason,
    pub(crate) stop_reason: Option<StopReason>,
    pub(crate) details: FinishDetails,
}

/// What happened to one choice.
pub(crate) struct Update<P> {
    /// Which choice.
    pub(crate) index: u32,
    /// What is new in its text.
    pub(crate) pieces: Vec<P>,
    /// Present on a choice's last update.
    pub(crate) ending: Option<Ending>,
}

/// One request's choices.
pub(crate) struct Generation<A: Answer> {
    app: Arc<App>,
    record: Arc<Record>,
    model: Arc<ModelEntry>,
    choices: Vec<Choice<A>>,
    /// Choices that answer one prompt; those of the first come first.
    n_per_prompt: usize,
    n_prompt: u32,
    n_cached: u32,
    n_completion: u64,
    n_reasoning: u64,
    failed: bool,
    /// Times between tokens that the metrics have not been told.
    gaps: Vec<Duration>,
    /// Counts against the key's limits as long as the generation lives.
    turn: Turn,
}

struct Choice<A> {
    stream: TokenStream,
    /// `None` once the choice has ended.
    answer: Option<A>,
    last_token: Option<Instant>,
}

/// What a generation is made of besides its choices.
pub(crate) struct Context {
    pub(crate) app: Arc<App>,
    pub(crate) record: Arc<Record>,
    pub(crate) model: Arc<ModelEntry>,
    pub(crate) turn: Turn,
    /// Tokens of all prompts.
    pub(crate) n_prompt: u32,
    /// Prompts that the choices answer.
    pub(crate) n_prompts: usize,
}

impl<A: Answer> Generation<A> {
    /// Follows accepted requests; each stream comes with what reads its answer.
    pub(crate) fn new(context: Context, choices: Vec<(TokenStream, A)>) -> Self {
        let Context { app, record, model, turn, n_prompt, n_prompts } = context;
        let choice = |(stream, answer)| Choice { stream, answer: Some(answer), last_token: None };
        Self {
            app,
            record,
            model,
            n_per_prompt: (choices.len() / n_prompts.max(1)).max(1),
            choices: choices.into_iter().map(choice).collect(),
            n_prompt,
            n_cached: 0,
            n_completion: 0,
            n_reasoning: 0,
            failed: false,
            gaps: Vec::new(),
            turn,
        }
    }

    /// The next thing that happens; `None` when every choice has ended.
    ///
    /// # Errors
    /// The engine's error when a choice fails, which is the end of the whole request.
    pub(crate) async fn next(&mut self) -> Result<Option<Update<A::Piece>>, GenerateError> {
        loop {
            let Some((index, event)) = self.event().await else { return Ok(None) };
            if let Some(update) = self.take(index, event)? {
                return Ok(Some(update));
            }
        }
    }

    /// As [`Generation::next`] if it would not wait; `None` if it would.
    pub(crate) fn next_ready(&mut self) -> Option<Result<Option<Update<A::Piece>>, GenerateError>> {
        loop {
            let mut running = self.choices.iter_mut().enumerate();
            let ready = running.find_map(|(index, choice)| {
                choice.answer.as_ref()?;
                Some((index, choice.stream.try_recv()?))
            });
            let Some((index, event)) = ready else {
                let all_ended = self.choices.iter().all(|choice| choice.answer.is_none());
                return all_ended.then_some(Ok(None));
            };
            match self.take(index, event) {
                Ok(Some(update)) => return Some(Ok(Some(update))),
                Ok(None) => {}
                Err(failure) => return Some(Err(failure)),
            }
        }
    }

    /// The next event of any choice that has not ended. Cancel safe.
    async fn event(&mut self) -> Option<(usize, TokenEvent)> {
        poll_fn(|cx| {
            let mut all_ended = true;
            for (index, choice) in self.choices.iter_mut().enumerate() {
                if choice.answer.is_none() {
                    continue;
                }
                match pin!(choice.stream.recv()).poll(cx) {
                    Poll::Ready(Some(event)) => return Poll::Ready(Some((index, event))),
                    // The engine promises a final event; without one it is gone.
                    Poll::Ready(None) => {
                        let message = "its stream ended without a final event".into();
                        let failed = TokenEvent::Failed(GenerateError::StepFailed { message });
                        return Poll::Ready(Some((index, failed)));
                    }
                    Poll::Pending => all_ended = false,
                }
            }
            if all_ended { Poll::Ready(None) } else { Poll::Pending }
        })
        .await
    }

    fn take(
        &mut self,
        index: usize,
        event: TokenEvent,
    ) -> Result<Option<Update<A::Piece>>, GenerateError> {
        let choice = &mut self.choices[index];
        let Some(answer) = &mut choice.answer else { return Ok(None) };
        let index = index as u32;
        match event {
            // Sampled while the cancellation was on its way: not asked for, and not counted.
            TokenEvent::Token { .. } if answer.is_enough() => Ok(None),
            TokenEvent::Token { id, logprob } => {
                let now = Instant::now();
                if let Some(last) = choice.last_token.replace(now) {
                    self.gaps.push(now.saturating_duration_since(last));
                    if self.gaps.len() == MAX_GAPS {
                        self.app.metrics.count_gaps(self.model.canonical_id(), &self.gaps);
                        self.gaps.clear();
                    }
                }
                let pieces = answer.push(id, logprob.as_ref());
                if answer.is_enough() {
                    choice.stream.cancel();
                }
                let update = Update { index, pieces, ending: None };
                Ok((!update.pieces.is_empty()).then_some(update))
            }
            TokenEvent::Finished { reason, usage } => {
                let answer = choice.answer.take().expect("checked above");
                if (index as usize).is_multiple_of(self.n_per_prompt) {
                    self.n_cached += usage.cached_tokens;
                }
                self.n_completion += u64::from(answer.n_tokens());
                let (pieces, ending, n_reasoning) = answer.finish(reason);
                self.n_reasoning += u64::from(n_reasoning);
                self.app.metrics.count_ending(self.model.canonical_id(), ending.details);
                let word = ending.finish_reason.as_str();
                self.record.note(|facts| facts.finish_reason = Some(word));
                Ok(Some(Update { index, pieces, ending: Some(ending) }))
            }
            TokenEvent::Failed(error) => {
                self.failed = true;
                self.record.note(|facts| facts.finish_reason = Some("error"));
                Err(error)
            }
        }
    }

    /// Ends all choices that still run, because the server cut them. Their answers so far stand.
    pub(crate) fn cut(&mut self) -> Vec<Update<A::Piece>> {
        let mut updates = Vec::new();
        for (index, choice) in self.choices.iter_mut().enumerate() {
            let Some(answer) = choice.answer.take() else { continue };
            self.n_completion += u64::from(answer.n_tokens());
            let (pieces, _, n_reasoning) = answer.finish(Reason::Length);
            self.n_reasoning += u64::from(n_reasoning);
            let finish_reason = FinishReason::InsufficientSystemResource;
            let details = FinishDetails::default();
            let ending = Ending { finish_reason, stop_reason: None, details };
            updates.push(Update { index: index as u32, pieces, ending: Some(ending) });
        }
        updates
    }

    /// Token counts of all choices so far; what came from the cache is known when they have ended.
    pub(crate) fn usage(&self) -> Usage {
        let (prompt, cached) = (self.n_prompt.into(), self.n_cached.into());
        let (mut n_completion, mut n_reasoning) = (self.n_completion, self.n_reasoning);
        for answer in self.choices.iter().filter_map(|choice| choice.answer.as_ref()) {
            n_completion += u64::from(answer.n_tokens());
            n_reasoning += u64::from(answer.n_reasoning());
        }
        Usage::new(prompt, cached, n_completion, n_reasoning)
    }
}

impl<A: Answer> Drop for Generation<A> {
    fn drop(&mut self) {
        self.app.metrics.count_gaps(self.model.canonical_id(), &self.gaps);
        let times = self.choices.first().map(|choice| choice.stream.times());
        let unfinished = self.choices.iter().find(|choice| choice.answer.is_some());
        if let Some(choice) = unfinished.filter(|_| !self.failed) {
            let phase = Phase::of(&choice.stream.times());
            self.app.metrics.count_cancelled(self.model.canonical_id(), phase);
            self.record.note(|facts| facts.finish_reason = Some("cancelled"));
        }
        // Of a choice that did not end, at least what was seen of it.
        let seen = self.choices.iter().filter_map(|choice| choice.answer.as_ref());
        let n_seen: u64 = seen.map(|answer| u64::from(answer.n_tokens())).sum();
        if !self.failed {
            let n_tokens = u64::from(self.n_prompt) + self.n_completion + n_seen;
            self.turn.charge(n_tokens, Instant::now());
        }
        self.record.note(|facts| {
            facts.times = times;
            facts.prompt_tokens = self.n_prompt.into();
            facts.cached_tokens = self.n_cached.into();
            facts.completion_tokens = self.n_completion + n_seen;
            facts.reasoning_tokens = self.n_reasoning;
        });
    }
}
