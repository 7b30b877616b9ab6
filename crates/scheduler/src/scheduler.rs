//! The scheduler's state and its calls: submit, cancel, plan, commit, and who ended.
//!
//! Order of calls: any number of [`Scheduler::submit`] and [`Scheduler::cancel`], then
//! [`Scheduler::plan`], then [`Scheduler::commit`] or [`Scheduler::abort`] of that plan. Every
//! accepted sequence appears exactly once in [`Scheduler::take_ended`].
//!
//! Invariants:
//! - `running` is sorted by (priority, arrival): the last one is the next victim of preemption;
//! - a sequence that is part of an uncommitted plan keeps its slot and blocks until the commit.
//!
//! Not here: admission, planning, preemption and commit, one module each.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use fathom_core::{FinishReason, RequestId, Usage};

use crate::budget::Limits;
use crate::lower::Loading;
use crate::plan::Candidate;
use crate::prefix_cache::{CacheStats, PrefixCache};
use crate::queue::{Place, Queue};
use crate::sequence::{End, Phase, Sequence, SequenceIndex, SequenceSpec, State};

/// A sequence that left the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The request.
    pub id: RequestId,
    /// Its number here, which a later submission may get.
    pub index: SequenceIndex,
    /// Why it ended.
    pub end: End,
    /// How far it had come.
    pub phase: Phase,
    /// Final token counts.
    pub usage: Usage,
}

/// A sequence was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum RefuseError {
    #[error("{limit} sequences are waiting already")]
    QueueFull { limit: usize },
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    #[error("the prompt has {n_tokens} tokens, but prompt and answer share {max_model_len}")]
    PromptTooLong { n_tokens: usize, max_model_len: u32 },
}

/// Gauges and counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SchedulerStats {
    /// Gauge: sequences that hold a slot.
    pub running: u32,
    /// Gauge: sequences never started.
    pub queued: u32,
    /// Gauge: sequences that lost their slot and wait to go on.
    pub preempted: u32,
    /// Times a running sequence lost its slot and blocks.
    pub preemptions: u64,
    /// Prompt tokens of sequences that were started.
    pub prompt_tokens: u64,
    /// Those of them that were skipped.
    pub cached_prompt_tokens: u64,
    /// KV blocks there are.
    pub blocks_total: u32,
    /// Gauge: blocks held by running sequences.
    pub blocks_used: u32,
    /// Gauge: blocks held by nobody and kept for reuse.
    pub blocks_cached: u32,
    /// Snapshots there are.
    pub snapshots_total: u32,
    /// Gauge: snapshots that hold something.
    pub snapshots_used: u32,
    /// Prefix-cache look-ups.
    pub cache: CacheStats,
}

/// Decides what the next step runs.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) limits: Limits,
    pub(crate) cache: PrefixCache,
    pub(crate) sequences: Vec<Sequence>,
    vacant: Vec<SequenceIndex>,
    by_id: HashMap<RequestId, SequenceIndex>,
    pub(crate) running: Vec<SequenceIndex>,
    pub(crate) free_slots: Vec<u32>,
    pub(crate) queue: Queue,
    /// Submissions in order, for timeouts; entries outlive what they name.
    deadlines: VecDeque<(RequestId, Duration)>,
    pub(crate) n_queued: usize,
    pub(crate) n_prefill: usize,
    next_arrival: u64,
    pub(crate) prefill_limit: u32,
    pub(crate) ended: Vec<Ended>,
    pub(crate) candidates: BinaryHeap<Reverse<Candidate>>,
    pub(crate) granted: Vec<SequenceIndex>,
    pub(crate) loading: Vec<Loading>,
    pub(crate) next_load: u64,
    pub(crate) preemptions: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_prompt_tokens: u64,
}

impl Scheduler {
    /// An empty scheduler.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let n_slots = limits.max_num_seqs();
        Self {
            cache: PrefixCache::new(&limits),
            sequences: Vec::new(),
            vacant: Vec::new(),
            by_id: HashMap::new(),
            running: Vec::with_capacity(n_slots as usize),
            free_slots: (0..n_slots).rev().collect(),
            queue: Queue::default(),
            deadlines: VecDeque::new(),
            n_queued: 0,
            n_prefill: 0,
            next_arrival: 0,
            prefill_limit: u32::MAX,
            ended: Vec::new(),
            candidates: BinaryHeap::new(),
            granted: Vec::new(),
            loading: Vec::new(),
            next_load: 1,
            preemptions: 0,
            prompt_tokens: 0,
            cached_prompt_tokens: 0,
            limits,
        }
    }

    /// The limits it obeys.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Accepts a sequence; it waits until a plan starts it.
    ///
    /// # Errors
    /// [`RefuseError`] if the queue is full or the prompt can never run.
    pub fn submit(
        &mut self,
        spec: SequenceSpec<'_>,
        now: Duration,
    ) -> Result<SequenceIndex, RefuseError> {
        let limit = self.limits.queue_len();
        if self.n_queued >= limit {
            return Err(RefuseError::QueueFull { limit });
        }
        let (n_tokens, max_model_len) = (spec.prompt.len(), self.limits.max_model_len());
        if n_tokens == 0 {
            return Err(RefuseError::EmptyPrompt);
        }
        if n_tokens >= max_model_len as usize {
            return Err(RefuseError::PromptTooLong { n_tokens, max_model_len });
        }
        let n_prompt = n_tokens as u32;
        let account = self.queue.join(spec.user);
        let sequence = Sequence {
            id: spec.id,
            state: State::Waiting,
            priority: spec.priority,
            arrival: self.next_arrival,
            account,
            tokens: spec.prompt,
            n_prompt,
            max_len: n_prompt.saturating_add(spec.max_tokens.max(1)).min(max_model_len),
            n_computed: 0,
            slot: 0,
            blocks: Vec::new(),
            root: self.cache.root(spec.cache_salt, spec.user),
            keys: Vec::new(),
            n_published: 0,
            rolling: None,
            cached_tokens: 0,
            started: false,
            charged: 0,
            granted: 0,
            n_drafts: 0,
            boundary: None,
            in_flight: false,
            cancelled: false,
            blocked_at: 0,
            load: None,
            n_loads: 0,
        };
        self.next_arrival += 1;
        let index = match self.vacant.pop() {
            Some(index) => {
                self.sequences[index as usize] = sequence;
                index
            }
            None => {
                self.sequences.push(sequence);
                self.sequences.len() as u32 - 1
            }
        };
        self.by_id.insert(spec.id, index);
        self.deadlines.push_back((spec.id, now));
        self.n_queued += 1;
        self.enqueue(index);
        Ok(index)
    }

    /// Ends a sequence in whatever state it is; one that is part of an uncommitted plan ends with
    /// its commit. Unknown ids are ignored: the sequence may just have ended.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(&index) = self.by_id.get(&id) {
            let sequence = &mut self.sequences[index as usize];
            if sequence.in_flight {
                sequence.cancelled = true;
            } else {
                self.end(index, End::Finished(FinishReason::Cancelled), false);
            }
        }
    }

    /// Limits the prefill tokens of the following steps, within their budget; at least 1.
    pub fn limit_prefill(&mut self, n_tokens: u32) {
        self.prefill_limit = n_tokens.max(1);
    }

    /// Asks for `n_drafts` guessed tokens to be verified in the next decode step of a sequence; it
    /// may run fewer of them ([`PlanEntry::n_drafts`](crate::PlanEntry)). Ignored if the sequence
    /// does not decode, and forgotten if it loses its slot.
    pub fn want_drafts(&mut self, index: SequenceIndex, n_drafts: u32) {
        let sequence = &mut self.sequences[index as usize];
        if sequence.state == State::Decode {
            sequence.n_drafts = n_drafts;
        }
    }

    /// A sequence that was submitted and has not ended.
    #[must_use]
    pub fn sequence(&self, index: SequenceIndex) -> &Sequence {
        &self.sequences[index as usize]
    }

    /// Whether nothing waits and nothing runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Number of sequences that were submitted and have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Moves the sequences that ended since the last call to the end of `into`.
    pub fn take_ended(&mut self, into: &mut Vec<Ended>) {
        into.append(&mut self.ended);
    }

    /// Ends all sequences as failed, also those of an uncommitted plan.
    pub fn fail_all(&mut self) {
        for index in 0..self.sequences.len() as u32 {
            self.end(index, End::Failed, true);
        }
    }

    /// Ends all sequences that hold device state as failed and forgets everything cached: to be
    /// called when the device's memory can no longer be trusted. Waiting sequences stay.
    pub fn fail_running(&mut self) {
        while let Some(&index) = self.running.last() {
            self.end(index, End::Failed, true);
        }
        self.cache.clear();
    }

    /// Gauges and counters.
    #[must_use]
    pub fn stats(&self) -> SchedulerStats {
        let (pool, snapshots) = (self.cache.pool(), self.cache.snapshots());
        SchedulerStats {
            running: self.running.len() as u32,
            queued: self.n_queued as u32,
            preempted: (self.queue.len() - self.n_queued) as u32,
            preemptions: self.preemptions,
            prompt_tokens: self.prompt_tokens,
            cached_prompt_tokens: self.cached_prompt_tokens,
            blocks_total: pool.n_blocks(),
            blocks_used: pool.n_blocks() - pool.available(),
            blocks_cached: pool.n_idle(),
            snapshots_total: snapshots.n_snapshots(),
            snapshots_used: snapshots.n_used(),
            cache: self.cache.stats(),
        }
    }

    pub(crate) fn place(&self, index: SequenceIndex) -> Place {
        let Sequence { priority, arrival, .. } = self.sequences[index as usize];
        Place { priority, arrival, index }
    }

    /// Puts a sequence that holds nothing into the queue.
    pub(crate) fn enqueue(&mut self, index: SequenceIndex) {
        let place = self.place(index);
        self.queue.push(self.sequences[index as usize].account, place);
    }

    /// Ends sequences that were never started within the queue timeout.
    pub(crate) fn expire(&mut self, now: Duration) {
        let timeout = self.limits.queue_timeout();
        while let Some(&(id, arrived_at)) = self.deadlines.front() {
            let waited = now.saturating_sub(arrived_at);
            let waiting = self.by_id.get(&id).copied().filter(|&index| {
                let sequence = &self.sequences[index as usize];
                sequence.state == State::Waiting && !sequence.started
            });
            match waiting {
                Some(index) if waited > timeout => {
                    self.end(index, End::QueueTimeout { waited }, false);
                }
                Some(_) => break,
                None => {}
            }
            self.deadlines.pop_front();
        }
    }

    /// Takes slot and blocks from a running sequence. With `discard`, its blocks are not reused.
    pub(crate) fn vacate(&mut self, index: SequenceIndex, discard: bool) {
        let place = self.place(index);
        let position = self.running.binary_search_by_key(&(place.priority, place.arrival), |&i| {
            let other = &self.sequences[i as usize];
            (other.priority, other.arrival)
        });
        self.running.remove(position.expect("a sequence with a slot is in the running list"));
        let sequence = &mut self.sequences[index as usize];
        self.n_prefill -= usize::from(sequence.state == State::Prefill);
        self.free_slots.push(sequence.slot);
        // A snapshot that the sequence would have replaced is worth a copy only now.
        if let Some(rolling) = sequence.rolling.take()
            && !discard
        {
            self.cache.offer_snapshot(rolling.snapshot, rolling.key);
        }
        self.cache.release(&mut sequence.blocks, discard);
        sequence.state = State::Waiting;
        sequence.n_computed = 0;
        sequence.n_published = 0;
        sequence.n_drafts = 0;
        sequence.in_flight = false;
    }

    /// Removes a sequence and reports why. Does nothing to an entry that is unused.
    pub(crate) fn end(&mut self, index: SequenceIndex, end: End, discard: bool) {
        let sequence = &self.sequences[index as usize];
        let (account, place) = (sequence.account, self.place(index));
        if sequence.state == State::Vacant {
            return;
        }
        let phase = sequence.phase();
        match sequence.state {
            State::Vacant | State::Waiting => self.queue.remove(account, place),
            State::Prefill | State::Decode => self.vacate(index, discard),
        }
        let sequence = &mut self.sequences[index as usize];
        self.n_queued -= usize::from(!sequence.started);
        self.queue.leave(sequence.account);
        self.by_id.remove(&sequence.id);
        self.ended.push(Ended {
            id: sequence.id,
            index,
            end,
            phase,
            usage: Usage {
                prompt_tokens: sequence.n_prompt,
                cached_tokens: sequence.cached_tokens,
                completion_tokens: sequence.n_generated(),
            },
        });
        // Give the memory back: the entry may stay unused for long.
        sequence.state = State::Vacant;
        sequence.tokens = Vec::new();
        sequence.blocks = Vec::new();
        sequence.keys = Vec::new();
        self.vacant.push(index);
    }
}
