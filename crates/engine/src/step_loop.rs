//! The engine's thread: commands in, steps, events out.
//!
//! One turn: read all commands, plan, build the batch, run it, sample, commit, draft. What a step gave
//! is reported while the next one runs, or at once if there is none. Nothing here waits for a reader,
//! and no lock is held across a step.
//!
//! Invariants:
//! - every request taken from the channel ends with one final event, by name or by dropping its
//!   sink;
//! - a panic in the runner or in a constraint ends the requests it concerns and nobody else.
//!
//! Not here: what runs (`scheduler`), how it runs ([`crate::runner`]), which token comes next
//! ([`crate::sample`]).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use fathom_core::{FinishReason, TokenId};
use fathom_scheduler::{
    ConfigError, End, Ended, Outcome, Phase, Scheduler, SequenceSpec, StepPlan, Work,
};

use crate::active::{Active, Outbox};
use crate::batch_build;
use crate::beside::BesideStep;
use crate::config::EngineConfig;
use crate::handle::{
    Command, EngineHandle, EngineLimits, EngineState, GenerateError, GenerateRequest, Shared,
    Submission, TokenEvent,
};
use crate::pace::Pace;
use crate::runner::{StepError, StepInput, StepOutput, StepRunner};
use crate::sample::ahead::MaskThreads;
use crate::sample::{RequestSampler, SampleScratch};
use crate::speculate::{DraftMethod, Drafter, Speculation};
use crate::stats::{CacheCounts, EngineStats, KvUsage, PhaseCounts};
use crate::tier::DirectoryError;
use crate::tier_copies::TierCopies;

// The scheduler knows no tensors and the operators no scheduler; here both sizes are in sight.
const _: () = assert!(fathom_ops::BLOCK_TOKENS == fathom_scheduler::BLOCK_TOKENS as usize);

/// How long to wait for a command when there is work that cannot run: only a bug gets there.
const STUCK: Duration = Duration::from_millis(20);

/// How long to wait for a load when nothing else can run, before looking for commands again.
const LOADING: Duration = Duration::from_millis(1);

/// An engine was not started.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum StartError {
    #[error("the engine's limits contradict each other")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    CacheDirectory(#[from] DirectoryError),
    #[error(
        "drafts of the MTP block were asked for, but the model has none or it was not loaded: choose \
         another draft method, or none"
    )]
    NoDraftModel,
    #[error("the engine's thread cannot be started")]
    Thread(#[source] std::io::Error),
}

impl EngineHandle {
    /// Starts an engine on a thread of its own. It warms up there; requests are taken at once.
    ///
    /// # Errors
    /// [`StartError`] if the limits cannot be obeyed, the cache directory cannot be used, or the
    /// system gives no thread.
    pub fn start(runner: Box<dyn StepRunner>, config: EngineConfig) -> Result<Self, StartError> {
        Self::start_with(runner, None, config)
    }

    /// As [`EngineHandle::start`], with guesses of `drafter` instead of those that the configuration
    /// names.
    ///
    /// # Errors
    /// As [`EngineHandle::start`].
    pub fn start_with_drafter(
        runner: Box<dyn StepRunner>,
        drafter: Box<dyn Drafter>,
        config: EngineConfig,
    ) -> Result<Self, StartError> {
        Self::start_with(runner, Some(drafter), config)
    }

    fn start_with(
        runner: Box<dyn StepRunner>,
        drafter: Option<Box<dyn Drafter>>,
        config: EngineConfig,
    ) -> Result<Self, StartError> {
        let method = config.speculation.method;
        if drafter.is_none() && method == DraftMethod::Mtp && !runner.has_draft_model() {
            return Err(StartError::NoDraftModel);
        }
        let speculation = Speculation::new(&config.speculation, drafter, runner.max_drafts());
        let capacity = runner.capacity();
        let mut config = config;
        let copies = TierCopies::open(&mut config, runner.as_ref())?;
        let limits = config.limits(capacity, copies.is_enabled())?;
        let engine_limits = EngineLimits {
            max_model_len: limits.max_model_len(),
            vocab_size: capacity.vocab_size,
            max_num_seqs: limits.max_num_seqs(),
            max_num_batched_tokens: limits.max_num_batched_tokens(),
            queue_len: limits.queue_len(),
            kv_tokens: u64::from(limits.n_blocks()) * u64::from(fathom_scheduler::BLOCK_TOKENS),
        };
        let (sender, commands) = mpsc::channel();
        let shared = Arc::new(Shared::new(engine_limits, EngineStats::default()));
        let pace = Pace::new(config.max_step_time, limits.max_num_batched_tokens());
        let mut scheduler = Scheduler::new(limits);
        copies.announce(&mut scheduler);
        let step_loop = StepLoop {
            pace,
            scheduler,
            speculation,
            copies,
            runner,
            eos: config.eos_token_ids,
            vocab_size: capacity.vocab_size as usize,
            commands,
            shared: Arc::clone(&shared),
            requests: Vec::new(),
            outbox: Outbox::default(),
            epoch: Instant::now(),
            deadline: None,
            is_stuck: false,
            plan: StepPlan::default(),
            input: Arc::default(),
            output: StepOutput::default(),
            outcomes: Vec::new(),
            ended: Vec::new(),
            scratch: SampleScratch::default(),
            mask_threads: MaskThreads::default(),
        };
        std::thread::Builder::new()
            .name("fathom-engine".to_owned())
            .spawn(move || run_thread(step_loop))
            .map_err(StartError::Thread)?;
        Ok(Self { commands: sender, shared })
    }
}

fn run_thread(mut step_loop: StepLoop) {
    let shared = Arc::clone(&step_loop.shared);
    // The loop catches what runners and constraints do; this catches its own bugs, so that
    // `shutdown` and `health` tell the truth and no stream is left without an end.
    let result = catch_unwind(AssertUnwindSafe(|| {
        let result = step_loop.run();
        if let Err(error) = &result {
            step_loop.fail_everything(error);
        }
        // Sends what is missing: final events of requests still in the channel.
        drop(step_loop);
        result
    }));
    let state = match result {
        Ok(Ok(())) => EngineState::Stopped,
        Ok(Err(error)) => EngineState::Failed { reason: error.to_string() },
        Err(panic) => EngineState::Failed { reason: message_of(panic) },
    };
    if let EngineState::Failed { reason } = &state {
        tracing::error!(reason, "the engine has stopped");
    }
    shared.note_progress(Instant::now(), false);
    shared.state.send_replace(state);
}

struct StepLoop {
    // Dropped in this order: requests learn of their end before anything that may take its time.
    /// By the scheduler's sequence index.
    requests: Vec<Option<Active>>,
    outbox: Outbox,
    scheduler: Scheduler,
    speculation: Speculation,
    pace: Pace,
    copies: TierCopies,
    runner: Box<dyn StepRunner>,
    eos: Vec<TokenId>,
    vocab_size: usize,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    epoch: Instant,
    deadline: Option<Instant>,
    /// There is work, but the last plan was empty.
    is_stuck: bool,
    plan: StepPlan,
    input: Arc<StepInput>,
    output: StepOutput,
    outcomes: Vec<Outcome>,
    ended: Vec<Ended>,
    scratch: SampleScratch,
    mask_threads: MaskThreads,
}

impl StepLoop {
    fn run(&mut self) -> Result<(), StepError> {
        guard(|| self.runner.warm_up())?;
        count_scheduler(&mut self.shared.stats(), &self.scheduler, &self.copies);
        self.shared.state.send_if_modified(|state| {
            let starting = *state == EngineState::Starting;
            if starting {
                *state = EngineState::Ready;
            }
            starting
        });
        loop {
            if !self.receive()? {
                return Ok(());
            }
            self.bring_up()?;
            let started = Instant::now();
            self.scheduler.limit_prefill(self.pace.allowed());
            self.scheduler.plan(started - self.epoch, &mut self.plan);
            self.keep_ended(started, None);
            // Before the step, which may overwrite what is copied.
            if let Err(error) = self.copies.copy_down(&mut self.scheduler, self.runner.as_mut()) {
                self.fail_step(&error)?;
                continue;
            }
            self.copies.start_loads(&self.scheduler, &mut self.plan);
            self.is_stuck = self.plan.is_empty() && !self.scheduler.is_empty();
            if self.plan.is_empty() {
                self.outbox.send(&mut self.requests);
            } else {
                self.step(started)?;
            }
            self.shared.note_progress(Instant::now(), !self.scheduler.is_empty());
        }
    }

    /// Takes in all commands, waiting for one if there is nothing to run. False: stop.
    fn receive(&mut self) -> Result<bool, StepError> {
        loop {
            let command = if self.scheduler.is_empty() {
                self.outbox.send(&mut self.requests);
                // There may be no further step before which to do this.
                if let Err(error) = self.copies.copy_down(&mut self.scheduler, self.runner.as_mut())
                {
                    self.lose_device(&error)?;
                }
                if self.deadline.is_some() {
                    return Ok(false);
                }
                if self.copies.is_loading() {
                    self.commands.try_recv()
                } else {
                    self.note_stats();
                    self.commands.recv().map_err(|_| TryRecvError::Disconnected)
                }
            } else if self.copies.is_loading() {
                self.commands.try_recv()
            } else if self.is_stuck {
                self.commands.recv_timeout(STUCK).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(submission)) => self.submit(*submission),
                Ok(Command::Cancel(id)) => {
                    self.scheduler.cancel(id);
                    self.keep_ended(Instant::now(), None);
                }
                Ok(Command::Shutdown { deadline }) => {
                    // A second, more impatient order counts.
                    let earliest = self.deadline.map_or(deadline, |earlier| earlier.min(deadline));
                    self.deadline = Some(earliest);
                }
                Err(TryRecvError::Empty) => break,
                // No handle and no stream is left: nobody can see or ask for anything.
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.scheduler.fail_all();
            self.report_ended(Instant::now(), Some(&GenerateError::ShuttingDown));
            return Ok(false);
        }
        Ok(true)
    }

    /// Brings what has arrived from lower tiers to the device.
    fn bring_up(&mut self) -> Result<(), StepError> {
        let idle = self.is_stuck || self.scheduler.is_empty();
        let timeout = if idle && self.copies.is_loading() { LOADING } else { Duration::ZERO };
        let (scheduler, runner) = (&mut self.scheduler, self.runner.as_mut());
        match self.copies.bring_up(timeout, scheduler, runner) {
            Ok(()) => Ok(()),
            Err(error) => self.lose_device(&error),
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { id, request, mut events, ticket } = submission;
        let GenerateRequest { prompt, sampling, priority, user, cache_salt, constraint } = request;
        let now = Instant::now();
        if self.scheduler.is_empty() {
            self.shared.note_progress(now, true);
        }
        let max_tokens = sampling.max_tokens;
        let sampler = RequestSampler::new(sampling, &prompt, constraint);
        let spec = SequenceSpec {
            id,
            prompt,
            max_tokens,
            priority,
            user: user.as_deref(),
            cache_salt: cache_salt.as_deref(),
        };
        match self.scheduler.submit(spec, now - self.epoch) {
            Ok(index) => {
                let index = index as usize;
                if index >= self.requests.len() {
                    self.requests.resize_with(index + 1, || None);
                }
                self.requests[index] = Some(Active::new(sampler, events, ticket));
                self.shared.stats().requests_accepted += 1;
            }
            Err(error) => {
                // The handle checks the same limits first.
                let message = error.to_string();
                events.send(TokenEvent::Failed(GenerateError::StepFailed { message }), now);
            }
        }
    }

    fn step(&mut self, started: Instant) -> Result<(), StepError> {
        for entry in &self.plan.entries {
            if let Some(active) = &mut self.requests[entry.index as usize] {
                active.start(started);
                if entry.wants_logits {
                    active.sampler.prepare(&mut self.mask_threads);
                }
            }
        }
        // Ranks may still hold the previous input; then this makes a new one.
        if Arc::get_mut(&mut self.input).is_none() {
            self.input = Arc::default();
        }
        let input = Arc::get_mut(&mut self.input).expect("nobody else has a new input");
        batch_build::build(&self.scheduler, &self.speculation, &self.plan, input);

        let before = Instant::now();
        let mut beside = BesideStep {
            plan: &self.plan,
            speculation: &mut self.speculation,
            requests: &mut self.requests,
            outbox: &mut self.outbox,
            eos: &self.eos,
            vocab_size: self.vocab_size,
        };
        let (runner, output) = (self.runner.as_mut(), &mut self.output);
        let result = guard(|| runner.step_beside(&self.input, output, &mut beside));
        let model = before.elapsed();
        // A step that failed early had nothing beside it.
        self.outbox.send(&mut self.requests);
        if let Err(error) = result {
            return self.fail_step(&error);
        }
        let n_sampled = self.sample();
        self.scheduler.commit(&self.plan, &self.outcomes);
        self.pace.observe(self.plan.n_tokens(), self.plan.n_prefill_tokens(), started.elapsed());
        let took = started.elapsed();
        self.count_step(n_sampled, took, model);
        self.keep_ended(Instant::now(), None);
        if !self.runner.runs_ahead() {
            self.outbox.send(&mut self.requests);
        }
        let sampling = |index| {
            let active = self.requests.get(index as usize).and_then(Option::as_ref);
            active.map(|active| active.sampler.params())
        };
        self.speculation.choose(&self.plan, took, &self.scheduler, sampling);
        let (outbox, requests) = (&mut self.outbox, &mut self.requests);
        let (scheduler, runner) = (&mut self.scheduler, self.runner.as_mut());
        let mut beside = || outbox.send(requests);
        match guard(|| self.speculation.draft(scheduler, runner, &mut beside)) {
            Ok(()) => Ok(()),
            Err(error) => self.lose_device(&error),
        }
    }

    /// Samples the wanted rows and keeps their tokens to be sent: of an entry with drafts as long as a token
    /// equals the draft that ran next. Returns the number of tokens.
    fn sample(&mut self) -> u64 {
        let now = Instant::now();
        self.outcomes.clear();
        let mut n_sampled = 0;
        let mut rows = self.output.rows(self.vocab_size);
        for entry in self.plan.entries.iter().filter(|entry| entry.wants_logits) {
            let active = self.requests[entry.index as usize]
                .as_mut()
                .expect("a planned sequence has a request");
            let drafts = self.speculation.drafts(entry);
            let mut n_accepted = 0;
            let mut rows = rows.by_ref().take(1 + drafts.len());
            loop {
                let row = rows.next().expect("a runner returns one row per wanted row");
                let position = entry.position + entry.n_tokens - entry.n_drafts + n_accepted as u32;
                let sampled = catch_unwind(AssertUnwindSafe(|| {
                    active.sampler.sample_row(row, position, &self.eos, &mut self.scratch)
                }));
                let sampled = sampled.unwrap_or_else(|panic| {
                    Err(fathom_core::ConstraintError(message_of(panic)).into())
                });
                let sampled = match sampled {
                    Ok(sampled) => sampled,
                    Err(error) => {
                        active.failure = Some(error);
                        self.outcomes.push(Outcome::failed());
                        break;
                    }
                };
                let (id, logprob) = (sampled.token, sampled.logprob);
                self.outbox.keep(entry.index, active, TokenEvent::Token { id, logprob }, now);
                n_sampled += 1;
                let is_draft = drafts.get(n_accepted) == Some(&id);
                n_accepted += usize::from(is_draft);
                let end = sampled.end.map(End::Finished);
                let is_accepted_draft = is_draft && end.is_none();
                self.outcomes.push(Outcome { token: Some(id), end, is_accepted_draft });
                if !is_accepted_draft {
                    break;
                }
            }
            // Rows after a rejected draft are those of another text.
            rows.for_each(drop);
            self.speculation.note(entry, n_accepted);
        }
        n_sampled
    }

    /// Ends the requests of a failed step. Returns the error if the engine cannot go on.
    fn fail_step(&mut self, error: &StepError) -> Result<(), StepError> {
        tracing::error!(%error, n_requests = self.plan.entries.len(), "a step failed");
        self.shared.stats().failed_steps += 1;
        let cause = GenerateError::StepFailed { message: error.to_string() };
        self.scheduler.abort(&self.plan);
        if matches!(error, StepError::Step { .. }) {
            self.report_ended(Instant::now(), Some(&cause));
            return Ok(());
        }
        self.lose_device(error)
    }

    /// Ends the requests that hold device state, and makes the device usable again.
    fn lose_device(&mut self, error: &StepError) -> Result<(), StepError> {
        let cause = GenerateError::StepFailed { message: error.to_string() };
        self.scheduler.fail_running();
        // A reset may wait for ranks.
        self.report_ended(Instant::now(), Some(&cause));
        guard(|| self.runner.reset())
    }

    /// Ends all requests: the engine stops because of `error`.
    fn fail_everything(&mut self, error: &StepError) {
        self.scheduler.fail_all();
        let cause = GenerateError::StepFailed { message: error.to_string() };
        self.report_ended(Instant::now(), Some(&cause));
    }

    /// As [`StepLoop::keep_ended`], and sends everything: what follows may take its time.
    fn report_ended(&mut self, now: Instant, cause: Option<&GenerateError>) {
        self.keep_ended(now, cause);
        self.outbox.send(&mut self.requests);
    }

    /// Keeps the final events of the sequences that left the scheduler, to be sent. Those that failed
    /// without a reason of their own did so because of `cause`.
    fn keep_ended(&mut self, now: Instant, cause: Option<&GenerateError>) {
        self.scheduler.take_ended(&mut self.ended);
        if self.ended.is_empty() {
            return;
        }
        let mut stats = self.shared.stats();
        for ended in self.ended.drain(..) {
            let Some(mut active) = self.requests[ended.index as usize].take() else { continue };
            self.speculation.end(ended.index);
            let counts = &mut stats.ended;
            let event = match ended.end {
                End::Finished(reason) => {
                    match reason {
                        FinishReason::Eos | FinishReason::StopToken(_) => counts.stop += 1,
                        FinishReason::Length => counts.length += 1,
                        FinishReason::Cancelled => {
                            *phase(&mut counts.cancelled, ended.phase) += 1;
                        }
                    }
                    TokenEvent::Finished { reason, usage: ended.usage }
                }
                End::QueueTimeout { waited } => {
                    counts.queue_timeout += 1;
                    TokenEvent::Failed(GenerateError::QueueTimeout { waited })
                }
                End::Failed => {
                    let failure = active.failure.take().or_else(|| cause.cloned());
                    let error = failure.unwrap_or(GenerateError::ShuttingDown);
                    match error {
                        GenerateError::NonFiniteLogits { .. } => counts.non_finite_logits += 1,
                        GenerateError::Constraint(_) | GenerateError::NothingAllowed { .. } => {
                            counts.constraint += 1;
                        }
                        GenerateError::ShuttingDown => counts.shutdown += 1,
                        _ => counts.step_failed += 1,
                    }
                    TokenEvent::Failed(error)
                }
            };
            self.outbox.end(active, event, now);
        }
        count_scheduler(&mut stats, &self.scheduler, &self.copies);
    }

    fn note_stats(&self) {
        count_scheduler(&mut self.shared.stats(), &self.scheduler, &self.copies);
    }

    fn count_step(&self, n_sampled: u64, step: Duration, model: Duration) {
        let mut stats = self.shared.stats();
        stats.observe_step(step, model);
        stats.completion_tokens += n_sampled;
        stats.drafts = self.speculation.counts();
        let entries = || self.plan.entries.iter();
        let decodes = entries().filter(|entry| entry.work == Work::Decode).count();
        if decodes > 0 {
            let n_tokens = self.plan.n_tokens() - self.plan.n_prefill_tokens();
            stats.decode_tokens.observe(n_tokens.into());
            stats.decode_requests.observe(decodes as f64);
        }
        if decodes < self.plan.entries.len() {
            stats.prefill_tokens.observe(self.plan.n_prefill_tokens().into());
            stats.prefill_requests.observe((self.plan.entries.len() - decodes) as f64);
        }
        count_scheduler(&mut stats, &self.scheduler, &self.copies);
    }
}

fn phase(counts: &mut PhaseCounts, phase: Phase) -> &mut u64 {
    match phase {
        Phase::Queued => &mut counts.queued,
        Phase::Prefill => &mut counts.prefill,
        Phase::Decode => &mut counts.decode,
    }
}

fn count_scheduler(stats: &mut EngineStats, scheduler: &Scheduler, copies: &TierCopies) {
    stats.tiers = copies.counts();
    let now = scheduler.stats();
    stats.requests_running = now.running.into();
    stats.requests_preempted = now.preempted.into();
    stats.preemptions = now.preemptions;
    stats.prompt_tokens = now.prompt_tokens;
    stats.cached_prompt_tokens = now.cached_prompt_tokens;
    stats.kv = KvUsage {
        blocks_total: now.blocks_total.into(),
        blocks_used: now.blocks_used.into(),
        blocks_cached: now.blocks_cached.into(),
        snapshots_total: now.snapshots_total.into(),
        snapshots_used: now.snapshots_used.into(),
    };
    stats.cache = CacheCounts {
        lookups: now.cache.lookups,
        hits: now.cache.hits,
        hit_tokens: now.cache.hit_tokens,
        miss_short: now.cache.miss_short,
        miss_no_block: now.cache.miss_no_block,
        miss_evicted: now.cache.miss_evicted,
        miss_salt: now.cache.miss_salt,
        miss_no_snapshot: now.cache.miss_no_snapshot,
    };
}

/// Runs code that may panic; a panic means that the device's memory cannot be trusted.
pub(crate) fn guard(run: impl FnOnce() -> Result<(), StepError>) -> Result<(), StepError> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(StepError::Device { message: message_of(panic) }))
}

fn message_of(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}
