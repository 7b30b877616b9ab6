//! A device and an engine small enough to check everything.
//!
//! The model's next token is a hash of every cache row of the sequence and of its slot's state, so
//! a wrong block, a stale slot, a skipped or repeated token or a wrong snapshot changes the answer.

use std::collections::HashMap;
use std::time::Duration;

use fathom_core::{FinishReason, RequestId, TokenId, Usage};
use fathom_scheduler::{
    BLOCK_TOKENS, End, Ended, Limits, Outcome, Scheduler, SchedulerConfig, SequenceSpec, StepPlan,
};

use crate::lower_tier::Lower;

pub(crate) const EOS: TokenId = 49;

fn mix(state: u64, value: u64) -> u64 {
    (state ^ value.wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .wrapping_mul(0xD6E8_FEB8_6659_FD93)
        .rotate_left(29)
}

fn next_token(rows: impl Iterator<Item = u64>, state: u64) -> TokenId {
    let value = mix(rows.fold(1, mix), state) >> 20;
    // One token in 400 ends an answer: many answers end early, some are long.
    if value.is_multiple_of(400) { EOS } else { (value / 400) as TokenId % EOS }
}

/// What the scheduler's plans run on.
pub(crate) struct Device {
    /// State and length per slot.
    slots: Vec<(u64, u32)>,
    pub(crate) snapshots: Vec<(u64, u32)>,
    pub(crate) rows: Vec<u64>,
}

impl Device {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            slots: vec![(0, 0); limits.max_num_seqs() as usize],
            snapshots: vec![(0, 0); limits.n_snapshots() as usize],
            rows: vec![0; (limits.n_blocks() * BLOCK_TOKENS) as usize],
        }
    }

    /// Runs a plan; returns the sampled tokens in the order of the entries that want logits. What
    /// it computes for request `corrupted` is garbage.
    pub(crate) fn run(
        &mut self,
        scheduler: &Scheduler,
        plan: &StepPlan,
        corrupted: Option<RequestId>,
    ) -> Vec<TokenId> {
        let mut sampled = Vec::new();
        for restore in &plan.restores {
            let snapshot = self.snapshots[restore.snapshot as usize];
            assert_eq!(snapshot.1, restore.position, "a snapshot covers what the plan says");
            self.slots[restore.slot as usize] = snapshot;
        }
        for entry in &plan.entries {
            let sequence = scheduler.sequence(entry.index);
            let (mut state, len) = self.slots[entry.slot as usize];
            if entry.position == 0 {
                state = 0;
            } else {
                assert_eq!(len, entry.position, "a slot holds what came before");
            }
            let end = entry.position + entry.n_tokens;
            let blocks = sequence.blocks();
            let place = |position: u32| {
                let block = blocks[(position / BLOCK_TOKENS) as usize];
                (block * BLOCK_TOKENS + position % BLOCK_TOKENS) as usize
            };
            for position in entry.position..end {
                let token = sequence.tokens()[position as usize];
                state = mix(state, u64::from(token) + 1);
                state ^= u64::from(corrupted == Some(entry.id));
                self.rows[place(position)] = state;
            }
            self.slots[entry.slot as usize] = (state, end);
            if entry.wants_logits {
                assert_eq!(end as usize, sequence.tokens().len());
                let rows = (0..end).map(|position| self.rows[place(position)]);
                sampled.push(next_token(rows, state));
            }
        }
        for capture in &plan.captures {
            let slot = self.slots[capture.slot as usize];
            assert_eq!(slot.1, capture.position, "a snapshot is taken where the plan says");
            self.snapshots[capture.snapshot as usize] = slot;
        }
        sampled
    }
}

/// The tokens a request gets when it runs alone, without any scheduler.
pub(crate) fn alone(prompt: &[TokenId], max_len: u32) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    let (mut state, mut rows) = (0, Vec::new());
    while (tokens.len() as u32) < max_len {
        for &token in &tokens[rows.len()..] {
            state = mix(state, u64::from(token) + 1);
            rows.push(state);
        }
        let token = next_token(rows.iter().copied(), state);
        tokens.push(token);
        if token == EOS {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// A request as tests describe it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_tokens: u32,
    pub(crate) priority: i32,
    pub(crate) user: Option<String>,
    pub(crate) salt: Option<String>,
}

impl Request {
    pub(crate) fn new(prompt: Vec<TokenId>, max_tokens: u32) -> Self {
        Self { prompt, max_tokens, priority: 0, user: None, salt: None }
    }

    pub(crate) fn of(self, user: &str) -> Self {
        Self { user: Some(user.to_owned()), ..self }
    }

    pub(crate) fn at(self, priority: i32) -> Self {
        Self { priority, ..self }
    }
}

/// `n` prompt tokens; equal `family`s share every prefix.
pub(crate) fn prompt(family: u32, n: u32) -> Vec<TokenId> {
    (0..n).map(|i| (i * 7 + family * 13 + i * i % 11) % EOS).collect()
}

/// Scheduler and device together, with a record of what came out.
pub(crate) struct Engine {
    pub(crate) scheduler: Scheduler,
    pub(crate) device: Device,
    pub(crate) lower: Option<Lower>,
    pub(crate) plan: StepPlan,
    pub(crate) now: Duration,
    pub(crate) requests: HashMap<RequestId, Request>,
    pub(crate) output: HashMap<RequestId, Vec<TokenId>>,
    pub(crate) ended: HashMap<RequestId, Ended>,
    pub(crate) n_steps: u64,
}

impl Engine {
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        let limits = Limits::try_from(config).unwrap();
        Self {
            device: Device::new(&limits),
            scheduler: Scheduler::new(limits),
            lower: None,
            plan: StepPlan::default(),
            now: Duration::ZERO,
            requests: HashMap::new(),
            output: HashMap::new(),
            ended: HashMap::new(),
            n_steps: 0,
        }
    }

    /// A new scheduler and device, as after a restart; everything must have ended.
    pub(crate) fn restart(&mut self) {
        assert!(self.scheduler.is_empty());
        let limits = self.scheduler.limits().clone();
        self.device = Device::new(&limits);
        self.scheduler = Scheduler::new(limits);
        if let Some(lower) = &self.lower {
            lower.announce(&mut self.scheduler);
        }
    }

    pub(crate) fn submit(&mut self, request: Request) -> RequestId {
        let id = RequestId(self.requests.len() as u64 + 1);
        let spec = SequenceSpec {
            id,
            prompt: request.prompt.clone(),
            max_tokens: request.max_tokens,
            priority: request.priority,
            user: request.user.as_deref(),
            cache_salt: request.salt.as_deref(),
        };
        self.scheduler.submit(spec, self.now).unwrap();
        self.requests.insert(id, request);
        self.output.insert(id, Vec::new());
        id
    }

    /// Plans a step; false if there is nothing to run.
    pub(crate) fn plan(&mut self) -> bool {
        self.scheduler.plan(self.now, &mut self.plan);
        self.collect();
        self.scheduler.audit().unwrap();
        let budget = self.scheduler.limits().max_num_batched_tokens();
        assert!(self.plan.n_tokens() <= budget, "a step stays within its budget");
        if let Some(lower) = &mut self.lower {
            lower.copy_down(&mut self.scheduler, &self.device, &self.plan);
        }
        !self.plan.is_empty()
    }

    /// Ends loads that are due, or all; returns whether there were any.
    pub(crate) fn finish_loads(&mut self, all: bool) -> bool {
        let Some(lower) = &mut self.lower else { return false };
        let ended = lower.finish_loads(&mut self.scheduler, &mut self.device, all);
        self.scheduler.audit().unwrap();
        ended
    }

    /// Runs the planned step and commits it.
    pub(crate) fn run(&mut self) {
        self.run_corrupting(None);
    }

    /// As `run`, with garbage and then a failed sampling for one of the sequences.
    pub(crate) fn run_corrupting(&mut self, corrupted: Option<RequestId>) {
        let sampled = self.device.run(&self.scheduler, &self.plan, corrupted);
        let wanted = self.plan.entries.iter().filter(|entry| entry.wants_logits);
        let mut outcomes = Vec::new();
        for (entry, &token) in wanted.zip(&sampled) {
            if corrupted == Some(entry.id) {
                outcomes.push(Outcome::failed());
            } else {
                self.output.get_mut(&entry.id).unwrap().push(token);
                outcomes.push(outcome(token));
            }
        }
        self.scheduler.commit(&self.plan, &outcomes);
        self.n_steps += 1;
        self.collect();
        self.scheduler.audit().unwrap();
    }

    pub(crate) fn step(&mut self) -> bool {
        let more = self.plan();
        if more {
            self.run();
        }
        self.finish_loads(!more) || more
    }

    /// Runs until nothing is left to do.
    pub(crate) fn finish(&mut self) {
        // Every step runs at least one token, and all work there can be is bounded.
        for _ in 0..200_000 {
            if !self.step() {
                assert!(self.scheduler.is_empty(), "an idle scheduler has nobody waiting");
                return;
            }
        }
        panic!("the scheduler does not come to an end");
    }

    pub(crate) fn collect(&mut self) {
        let mut ended = Vec::new();
        self.scheduler.take_ended(&mut ended);
        for ended in ended {
            let previous = self.ended.insert(ended.id, ended);
            assert_eq!(previous, None, "a sequence ends once");
        }
    }

    pub(crate) fn usage(&self, id: RequestId) -> Usage {
        self.ended[&id].usage
    }

    /// Compares every request with its run alone.
    pub(crate) fn check_answers(&self) {
        for (id, request) in &self.requests {
            let ended = self.ended.get(id).expect("every sequence ends");
            let output = &self.output[id];
            let usage = ended.usage;
            let max_len = (request.prompt.len() as u32 + request.max_tokens)
                .min(self.scheduler.limits().max_model_len());
            let expected = alone(&request.prompt, max_len);
            match ended.end {
                End::Finished(FinishReason::Eos) => {
                    assert_eq!(*output, expected, "request {id}");
                    assert_eq!(expected.last(), Some(&EOS));
                }
                End::Finished(FinishReason::Length) => {
                    assert_eq!(*output, expected, "request {id}");
                    assert_eq!(request.prompt.len() + output.len(), max_len as usize);
                }
                // The last token of a sequence cancelled or failed in flight is not delivered.
                _ => assert!(expected.starts_with(&output[..usage.completion_tokens as usize])),
            }
            assert_eq!(usage.prompt_tokens as usize, request.prompt.len());
            assert!(usage.completion_tokens as usize <= output.len());
            assert!(usage.cached_tokens < usage.prompt_tokens.max(1));
            assert!(usage.cached_tokens.is_multiple_of(BLOCK_TOKENS));
        }
    }

    /// Checks that nothing is held once nothing runs.
    pub(crate) fn check_nothing_held(&self) {
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.queued, stats.preempted, stats.blocks_used), (0, 0, 0, 0));
        assert_eq!(self.scheduler.n_loading(), 0);
        assert!(stats.blocks_cached <= stats.blocks_total);
    }
}

fn outcome(token: TokenId) -> Outcome {
    if token == EOS { Outcome::last(token, FinishReason::Eos) } else { Outcome::token(token) }
}
