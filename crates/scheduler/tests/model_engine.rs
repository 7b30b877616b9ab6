//! A device and an engine small enough to check everything.
//!
//! The model's next token is a hash of every cache row of the sequence and of its slot's state, so
//! a wrong block, a stale slot, a skipped or repeated token or a wrong snapshot changes the answer.

use std::collections::HashMap;
use std::time::Duration;

use fathom_core::{FinishReason, RequestId, TokenId, Usage};
use fathom_scheduler::{
    BLOCK_TOKENS, End, Ended, Limits, Outcome, Scheduler, SchedulerConfig, SequenceIndex,
    SequenceSpec, StepPlan,
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

/// Draft tokens by sequence.
pub(crate) type Drafts = HashMap<SequenceIndex, Vec<TokenId>>;

/// Tokens that a slot can take back, as the ring buffers of a real one.
const MAX_REJECTED: u32 = 4;

/// What the scheduler's plans run on.
pub(crate) struct Device {
    slots: Vec<Slot>,
    pub(crate) snapshots: Vec<(u64, u32)>,
    pub(crate) rows: Vec<u64>,
}

/// The state of one sequence after its last few tokens.
#[derive(Clone)]
struct Slot {
    /// Tokens before the first state.
    base: u32,
    /// After `base`, `base + 1`, ... tokens.
    states: Vec<u64>,
}

impl Slot {
    fn new((state, base): (u64, u32)) -> Self {
        Self { base, states: vec![state] }
    }

    fn len(&self) -> u32 {
        self.base + self.states.len() as u32 - 1
    }

    /// The state after `position` tokens, to go on from there.
    fn rewind(&mut self, position: u32) -> u64 {
        if position == 0 {
            *self = Self::new((0, 0));
        }
        let (from, to) = (self.len(), position);
        assert!(to <= from && from - to <= MAX_REJECTED, "a slot at {from} cannot go on at {to}");
        self.states.truncate((position - self.base) as usize + 1);
        self.states[self.states.len() - 1]
    }
}

impl Device {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            slots: vec![Slot::new((0, 0)); limits.max_num_seqs() as usize],
            snapshots: vec![(0, 0); limits.n_snapshots() as usize],
            rows: vec![0; (limits.n_blocks() * BLOCK_TOKENS) as usize],
        }
    }

    /// Runs a plan; returns the next token after each row that is wanted, for every entry that wants
    /// logits. What it computes for request `corrupted` is garbage.
    pub(crate) fn run(
        &mut self,
        scheduler: &Scheduler,
        plan: &StepPlan,
        drafts: &Drafts,
        corrupted: Option<RequestId>,
    ) -> Vec<Vec<TokenId>> {
        let mut sampled = Vec::new();
        for restore in &plan.restores {
            let snapshot = self.snapshots[restore.snapshot as usize];
            assert_eq!(snapshot.1, restore.position, "a snapshot covers what the plan says");
            self.slots[restore.slot as usize] = Slot::new(snapshot);
        }
        for entry in &plan.entries {
            let sequence = scheduler.sequence(entry.index);
            let slot = &mut self.slots[entry.slot as usize];
            let mut state = slot.rewind(entry.position);
            let end = entry.position + entry.n_tokens;
            let blocks = sequence.blocks();
            let place = |position: u32| {
                let block = blocks[(position / BLOCK_TOKENS) as usize];
                (block * BLOCK_TOKENS + position % BLOCK_TOKENS) as usize
            };
            let known = &sequence.tokens()[entry.position as usize..];
            let drafts = match entry.n_drafts as usize {
                0 => &[],
                n => &drafts[&entry.index][..n],
            };
            let tokens = known.iter().chain(drafts).take(entry.n_tokens as usize);
            let mut next = Vec::new();
            for (position, &token) in (entry.position..).zip(tokens) {
                state = mix(state, u64::from(token) + 1);
                state ^= u64::from(corrupted == Some(entry.id));
                self.rows[place(position)] = state;
                slot.states.push(state);
                if entry.wants_logits && position + 1 >= sequence.tokens().len() as u32 {
                    let rows = (0..=position).map(|position| self.rows[place(position)]);
                    next.push(next_token(rows, state));
                }
            }
            assert_eq!(slot.len(), end);
            if entry.wants_logits {
                assert_eq!(next.len() as u32, entry.n_logits());
                sampled.push(next);
            }
        }
        for capture in &plan.captures {
            let slot = &self.slots[capture.slot as usize];
            assert_eq!(slot.len(), capture.position, "a snapshot is taken where the plan says");
            let state = slot.states[slot.states.len() - 1];
            self.snapshots[capture.snapshot as usize] = (state, capture.position);
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
    /// Drafts asked for at most, and how many in eight of them are wrong.
    pub(crate) drafting: (u32, u64),
    pub(crate) drafts: Drafts,
    pub(crate) n_accepted: u64,
    indices: HashMap<RequestId, SequenceIndex>,
    pub(crate) requests: HashMap<RequestId, Request>,
    expected: HashMap<RequestId, Vec<TokenId>>,
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
            drafting: (0, 0),
            drafts: Drafts::new(),
            n_accepted: 0,
            indices: HashMap::new(),
            requests: HashMap::new(),
            expected: HashMap::new(),
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
        let index = self.scheduler.submit(spec, self.now).unwrap();
        self.indices.insert(id, index);
        let max_len = self.max_len(&request);
        self.expected.insert(id, alone(&request.prompt, max_len));
        self.requests.insert(id, request);
        self.output.insert(id, Vec::new());
        id
    }

    fn max_len(&self, request: &Request) -> u32 {
        let max_model_len = self.scheduler.limits().max_model_len();
        (request.prompt.len() as u32).saturating_add(request.max_tokens).min(max_model_len)
    }

    /// Asks for drafts: of each sequence what will come, with mistakes here and there.
    fn draft(&mut self) {
        let (most, wrong) = self.drafting;
        for (&id, &index) in &self.indices {
            let n_known = self.scheduler.sequence(index).tokens().len();
            let n_answered = n_known - self.requests[&id].prompt.len();
            let random = |salt| mix(mix(id.0, n_known as u64), salt) >> 40;
            let future = self.expected[&id].iter().skip(n_answered).copied();
            let drafts = future.chain(std::iter::repeat(0)).enumerate().map(|(draft, token)| {
                if random(draft as u64) % 8 < wrong { (token + 1) % EOS } else { token }
            });
            let n_drafts = (random(99) % (u64::from(most) + 1)) as u32;
            self.drafts.insert(index, drafts.take(n_drafts as usize).collect());
            self.scheduler.want_drafts(index, n_drafts);
        }
    }

    /// Plans a step; false if there is nothing to run.
    pub(crate) fn plan(&mut self) -> bool {
        if self.drafting.0 > 0 {
            self.draft();
        }
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
        let sampled = self.device.run(&self.scheduler, &self.plan, &self.drafts, corrupted);
        let wanted = self.plan.entries.iter().filter(|entry| entry.wants_logits);
        let mut outcomes = Vec::new();
        for (entry, next) in wanted.zip(&sampled) {
            if corrupted == Some(entry.id) {
                outcomes.push(Outcome::failed());
                continue;
            }
            let drafts = self.drafts.get(&entry.index).map_or(&[][..], Vec::as_slice);
            for (row, &token) in next.iter().enumerate() {
                self.output.get_mut(&entry.id).unwrap().push(token);
                let is_draft = row < entry.n_drafts as usize && drafts[row] == token;
                outcomes.push(outcome(token, is_draft));
                if !outcomes[outcomes.len() - 1].is_accepted_draft {
                    break;
                }
                self.n_accepted += 1;
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
            self.indices.remove(&ended.id);
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
            let max_len = self.max_len(request);
            let expected = &self.expected[id];
            match ended.end {
                End::Finished(FinishReason::Eos) => {
                    assert_eq!(output, expected, "request {id}");
                    assert_eq!(expected.last(), Some(&EOS));
                }
                End::Finished(FinishReason::Length) => {
                    assert_eq!(output, expected, "request {id}");
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

fn outcome(token: TokenId, is_draft: bool) -> Outcome {
    match token {
        EOS => Outcome::last(token, FinishReason::Eos),
        _ if is_draft => Outcome::accepted(token),
        _ => Outcome::token(token),
    }
}
