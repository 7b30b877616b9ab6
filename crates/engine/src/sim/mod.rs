//! Traffic against the real scheduler in virtual time: how a machine would serve it at its roofline.
//!
//! [`simulate`] drives [`Scheduler`] as the step loop does, with the same pacing of prefill, and lets
//! each step take what [`roofline`] says. Nothing computes and nothing waits: minutes of traffic take
//! well under a second, and the same call gives the same report everywhere, except for
//! [`Report::scheduler_s`].
//!
//! - [`trace`]: who asks what and when; [`roofline`]: what a step costs.
//!
//! Not here: tokens that mean anything, lower tiers, speculation.

pub mod roofline;
pub mod trace;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use fathom_core::{RequestId, TokenId};
use fathom_scheduler::{
    ConfigError, End, Limits, Outcome, Scheduler, SchedulerConfig, SequenceSpec, StepPlan,
};

use crate::pace::Pace;
use roofline::{Machine, StepWork};
use trace::Client;

/// What is simulated, beside the traffic.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Model and GPUs.
    pub machine: Machine,
    /// Sequences that may run at once.
    pub max_num_seqs: u32,
    /// Tokens that one step may run.
    pub max_num_batched_tokens: u32,
    /// As [`crate::EngineConfig::max_step_time`].
    pub max_step_time: Option<Duration>,
    /// Prompt and answer together.
    pub max_model_len: u32,
}

/// A simulation cannot begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
pub enum SimError {
    #[error(
        "{model} does not fit {n_gpus} x {gpu} beside {max_num_seqs} sequences: take more GPUs or \
         fewer sequences"
    )]
    NoRoom { model: &'static str, gpu: &'static str, n_gpus: u32, max_num_seqs: u32 },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("a prompt of {n_tokens} tokens is longer than a sequence may be ({max_model_len})")]
    TooLong { n_tokens: usize, max_model_len: u32 },
}

/// Percentiles of a number of times, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Percentiles {
    /// How many times there are.
    pub n: usize,
    /// Half are below.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// Ninety-nine of a hundred are below.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Percentiles {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_unstable_by(f64::total_cmp);
        let at = |fraction: f64| {
            let rank = (fraction * times.len() as f64).ceil() as usize;
            times.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Self { n: times.len(), p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// What the clients of one class saw.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassReport {
    /// Which.
    pub class: &'static str,
    /// Answers that were complete.
    pub answers: u64,
    /// From a turn's arrival to its first token.
    pub ttft: Percentiles,
    /// Between two tokens of an answer.
    pub tpot: Percentiles,
}

/// What a simulation saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Each class of the trace, in order of arrival.
    pub classes: Vec<ClassReport>,
    /// Virtual time until the last answer, in seconds.
    pub seconds: f64,
    /// Steps.
    pub steps: u64,
    /// Prompt tokens of all turns.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Tokens of all answers.
    pub answer_tokens: u64,
    /// Times a sequence lost its place.
    pub preemptions: u64,
    /// Turns that waited in vain.
    pub timeouts: u64,
    /// KV blocks there were.
    pub blocks: u32,
    /// Snapshots there were.
    pub snapshots: u32,
    /// Real time that planning and committing took, in seconds.
    pub scheduler_s: f64,
}

impl Report {
    /// Fraction of prompt tokens that were cached.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        self.cached_tokens as f64 / (self.prompt_tokens as f64).max(1.0)
    }

    /// What the clients of a class saw.
    #[must_use]
    pub fn class(&self, class: &str) -> Option<&ClassReport> {
        self.classes.iter().find(|report| report.class == class)
    }
}

/// A conversation under way.
struct Talk<'a> {
    client: &'a Client,
    class: usize,
    /// Turns that were begun.
    n_turns: usize,
    /// Everything said so far.
    tokens: Vec<TokenId>,
    asked: Duration,
    last_token: Option<Duration>,
}

#[derive(Default)]
struct Times {
    class: &'static str,
    answers: u64,
    ttft: Vec<f64>,
    tpot: Vec<f64>,
}

struct Simulation<'a> {
    scheduler: Scheduler,
    talks: Vec<Talk<'a>>,
    /// Which conversation a sequence belongs to, by the scheduler's index.
    of_sequence: Vec<usize>,
    /// Turns to come.
    coming: BinaryHeap<Reverse<(Duration, usize)>>,
    times: Vec<Times>,
    n_requests: u64,
    answer_tokens: u64,
    timeouts: u64,
}

/// Replays a trace.
///
/// # Errors
/// [`SimError`] if the model, or the longest prompt, does not fit.
pub fn simulate(config: &SimConfig, clients: &[Client]) -> Result<Report, SimError> {
    let Machine { model, gpu, n_gpus, .. } = config.machine;
    let max_num_seqs = config.max_num_seqs;
    let (n_blocks, n_snapshots) = config.machine.room(max_num_seqs).ok_or(SimError::NoRoom {
        model: model.name,
        gpu: gpu.name,
        n_gpus,
        max_num_seqs,
    })?;
    let limits = Limits::try_from(SchedulerConfig {
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_num_seqs,
        ..SchedulerConfig::new(config.max_model_len, n_blocks, n_snapshots)
    })?;
    let mut simulation = Simulation::new(Scheduler::new(limits), clients);
    let mut pace = Pace::new(config.max_step_time, config.max_num_batched_tokens);
    let mut plan = StepPlan::default();
    let (mut now, mut steps, mut scheduler_s) = (Duration::ZERO, 0, 0.0);
    loop {
        simulation.submit_until(now)?;
        let began = Instant::now();
        simulation.scheduler.limit_prefill(pace.allowed());
        simulation.scheduler.plan(now, &mut plan);
        scheduler_s += began.elapsed().as_secs_f64();
        if plan.is_empty() {
            simulation.end_turns(now);
            let Some(Reverse((next, _))) = simulation.coming.peek() else { break };
            now = now.max(*next);
            continue;
        }
        let work = StepWork::of(&model, &plan);
        let took = Duration::from_secs_f64(config.machine.step_seconds(&work));
        now += took;
        steps += 1;
        let outcomes = simulation.sample(&plan, now);
        let began = Instant::now();
        simulation.scheduler.commit(&plan, &outcomes);
        scheduler_s += began.elapsed().as_secs_f64();
        pace.observe(plan.n_tokens(), plan.n_prefill_tokens(), took);
        simulation.end_turns(now);
    }
    let stats = simulation.scheduler.stats();
    let class = |times: Times| ClassReport {
        class: times.class,
        answers: times.answers,
        ttft: Percentiles::of(times.ttft),
        tpot: Percentiles::of(times.tpot),
    };
    Ok(Report {
        classes: simulation.times.into_iter().map(class).collect(),
        seconds: now.as_secs_f64(),
        steps,
        prompt_tokens: stats.prompt_tokens,
        cached_tokens: stats.cached_prompt_tokens,
        answer_tokens: simulation.answer_tokens,
        preemptions: stats.preemptions,
        timeouts: simulation.timeouts,
        blocks: n_blocks,
        snapshots: n_snapshots,
        scheduler_s,
    })
}

impl<'a> Simulation<'a> {
    fn new(scheduler: Scheduler, clients: &'a [Client]) -> Self {
        let mut times: Vec<Times> = Vec::new();
        let mut talks = Vec::with_capacity(clients.len());
        for client in clients {
            let known = times.iter().position(|times| times.class == client.class);
            let class = known.unwrap_or_else(|| {
                times.push(Times { class: client.class, ..Times::default() });
                times.len() - 1
            });
            let (family, n_shared) = client.shared;
            let tokens = (0..n_shared).map(|n| token(u64::from(family), n.into())).collect();
            talks.push(Talk {
                client,
                class,
                n_turns: 0,
                tokens,
                asked: Duration::ZERO,
                last_token: None,
            });
        }
        let coming = clients.iter().enumerate().map(|(id, client)| Reverse((client.arrives, id)));
        Self {
            scheduler,
            talks,
            of_sequence: Vec::new(),
            coming: coming.collect(),
            times,
            n_requests: 0,
            answer_tokens: 0,
            timeouts: 0,
        }
    }

    /// Submits the turns that have arrived.
    fn submit_until(&mut self, now: Duration) -> Result<(), SimError> {
        while let Some(&Reverse((at, id))) = self.coming.peek()
            && at <= now
        {
            self.coming.pop();
            let talk = &mut self.talks[id];
            let turn = talk.client.turns[talk.n_turns];
            talk.n_turns += 1;
            let said = talk.tokens.len() as u64;
            // Families of shared prompts are small numbers: nothing else begins like them.
            let source = 1_000_000 + id as u64;
            talk.tokens.extend((0..turn.n_new).map(|n| token(source, said + u64::from(n))));
            (talk.asked, talk.last_token) = (at, None);
            self.n_requests += 1;
            let spec = SequenceSpec {
                id: RequestId(self.n_requests),
                prompt: talk.tokens.clone(),
                max_tokens: turn.n_answer,
                priority: 0,
                user: None,
                cache_salt: None,
            };
            let n_tokens = talk.tokens.len();
            let max_model_len = self.scheduler.limits().max_model_len();
            let refused = |_| SimError::TooLong { n_tokens, max_model_len };
            let index = self.scheduler.submit(spec, at).map_err(refused)? as usize;
            if index >= self.of_sequence.len() {
                self.of_sequence.resize(index + 1, 0);
            }
            self.of_sequence[index] = id;
        }
        Ok(())
    }

    /// Answers every row of a step that ends at `now`.
    fn sample(&mut self, plan: &StepPlan, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for entry in plan.entries.iter().filter(|entry| entry.wants_logits) {
            let id = self.of_sequence[entry.index as usize];
            let talk = &mut self.talks[id];
            let times = &mut self.times[talk.class];
            match talk.last_token.replace(now) {
                None => times.ttft.push((now - talk.asked).as_secs_f64()),
                Some(last) => times.tpot.push((now - last).as_secs_f64()),
            }
            let sampled = token(2_000_000 + id as u64, talk.tokens.len() as u64);
            talk.tokens.push(sampled);
            self.answer_tokens += 1;
            outcomes.push(Outcome::token(sampled));
        }
        outcomes
    }

    /// Lets the clients of ended turns go on.
    fn end_turns(&mut self, now: Duration) {
        let mut ended = Vec::new();
        self.scheduler.take_ended(&mut ended);
        for ended in ended {
            let id = self.of_sequence[ended.index as usize];
            let talk = &self.talks[id];
            if matches!(ended.end, End::Finished(_)) {
                self.times[talk.class].answers += 1;
            } else {
                self.timeouts += 1;
            }
            if talk.n_turns < talk.client.turns.len() {
                let pause = talk.client.turns[talk.n_turns - 1].pause;
                self.coming.push(Reverse((now + pause, id)));
            }
        }
    }
}

/// A token that depends on who says it and where.
fn token(source: u64, position: u64) -> TokenId {
    (scramble(source << 32 ^ position) % 129_000) as TokenId
}

/// The finalizer of splitmix64.
const fn scramble(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}
