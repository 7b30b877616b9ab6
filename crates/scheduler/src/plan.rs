//! What a step is, and how it is put together: all decodes with their drafts, then prefill chunks.
//!
//! Decodes come first, so a long prompt never delays running answers by more than the step's token
//! budget. Drafts get half of what one token per decode leaves. What is left of the budget goes to prefill in turns of a quarter of it each: most
//! urgent first, then the user with the least service, then round by round the earliest arrival.
//! Chunks end on block boundaries where possible, and always where a snapshot is due.
//!
//! Not here: memory (`admit`, `preempt`), what happens with the result (`commit`).

use std::cmp::Reverse;
use std::time::Duration;

use fathom_core::RequestId;

use crate::BLOCK_TOKENS;
use crate::lower::{Admission, Load};
use crate::scheduler::Scheduler;
use crate::sequence::{SequenceIndex, State};

/// What a sequence does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Runs known tokens.
    Prefill,
    /// Runs the newest token, and guesses of those after it.
    Decode,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanEntry {
    /// The request.
    pub id: RequestId,
    /// Its number in the scheduler: its tokens and blocks are those of [`Scheduler::sequence`].
    pub index: SequenceIndex,
    /// State slot.
    pub slot: u32,
    /// Position of the first token to run; all before it are in the cache.
    pub position: u32,
    /// Tokens to run, at least 1, drafts included.
    pub n_tokens: u32,
    /// The last so many of them are not the sequence's yet: whoever asked for drafts has them.
    pub n_drafts: u32,
    /// Whether the logits of the last known token are needed, and of all drafts after it.
    pub wants_logits: bool,
    /// Prefill or decode.
    pub work: Work,
}

impl PlanEntry {
    /// Rows of logits that are needed.
    #[must_use]
    pub const fn n_logits(&self) -> u32 {
        if self.wants_logits { 1 + self.n_drafts } else { 0 }
    }
}

/// Before the step: the state of `slot` becomes that of `snapshot`, taken after `position` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restore {
    /// Source.
    pub snapshot: u32,
    /// Destination.
    pub slot: u32,
    /// Tokens that the snapshot covers; the slot's sequence runs from here.
    pub position: u32,
    /// The sequence in the slot.
    pub index: SequenceIndex,
}

/// After the step: `snapshot` becomes the state of `slot`, which has run `position` tokens. It is
/// kept only if the sequence then has these tokens: drafts among them may be rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capture {
    /// Source.
    pub slot: u32,
    /// Destination.
    pub snapshot: u32,
    /// Tokens that the snapshot covers, a multiple of `BLOCK_TOKENS`.
    pub position: u32,
    /// The sequence in the slot.
    pub index: SequenceIndex,
    /// Whether it replaces the previous snapshot that the sequence took of its own progress.
    pub(crate) rolling: bool,
}

/// What one step runs. Reuse one: planning a decode step then allocates nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// The sequences, decodes first. Each appears once.
    pub entries: Vec<PlanEntry>,
    /// To do before the step, in any order.
    pub restores: Vec<Restore>,
    /// To do after the step, in any order.
    pub captures: Vec<Capture>,
    /// Prefixes that waiting sequences want from lower tiers. They do not belong to the step: they
    /// may take any time, and a plan can consist of nothing else.
    pub loads: Vec<Load>,
}

impl StepPlan {
    /// Whether there is nothing to run.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Tokens that run.
    #[must_use]
    pub fn n_tokens(&self) -> u32 {
        self.entries.iter().map(|entry| entry.n_tokens).sum()
    }

    /// Those of the tokens that are prefill.
    #[must_use]
    pub fn n_prefill_tokens(&self) -> u32 {
        let prefill = self.entries.iter().filter(|entry| entry.work == Work::Prefill);
        prefill.map(|entry| entry.n_tokens).sum()
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.restores.clear();
        self.captures.clear();
        self.loads.clear();
    }
}

/// Prefill tokens that a sequence gets before it is the next one's turn in the same step: a quarter
/// of what there is, so that a long prompt does not keep short ones waiting.
const fn turn_of(budget: u32) -> u32 {
    match budget / 4 {
        0..16 => 16,
        quarter @ 16..BLOCK_TOKENS => quarter,
        quarter => quarter - quarter % BLOCK_TOKENS,
    }
}

/// A sequence that could get prefill tokens, in order of whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    priority: i32,
    service: u64,
    /// Turns it had in this step.
    turns: u32,
    arrival: u64,
    index: SequenceIndex,
}

impl Scheduler {
    /// Decides what the next step runs. `now` is the time since any fixed instant; it only matters
    /// for queue timeouts. An empty plan means that there is nothing to do until the next
    /// submission or the end of a load, and must not be committed.
    pub fn plan(&mut self, now: Duration, plan: &mut StepPlan) {
        plan.clear();
        self.expire(now);
        self.make_room_for_urgent();
        let budget = self.limits.max_num_batched_tokens();
        let n_decode_tokens = self.plan_decodes(plan);
        self.plan_prefill(plan, (budget - n_decode_tokens).min(self.prefill_limit));
        for entry in &plan.entries {
            self.sequences[entry.index as usize].in_flight = true;
        }
    }

    /// Plans all decodes, the most urgent first, and returns the number of their tokens.
    fn plan_decodes(&mut self, plan: &mut StepPlan) -> u32 {
        let most_decodes = (self.running.len() - self.n_prefill) as u32;
        let mut for_drafts = (self.limits.max_num_batched_tokens() - most_decodes) / 2;
        let mut n_tokens = 0;
        let mut place = 0;
        // The list shrinks from its end while victims are taken from it.
        while place < self.running.len() {
            let index = self.running[place];
            let sequence = &self.sequences[index as usize];
            if sequence.state == State::Decode {
                let full = sequence.n_computed == sequence.blocks.len() as u32 * BLOCK_TOKENS;
                if full && !self.extend_or_preempt(place) {
                    break;
                }
                let sequence = &mut self.sequences[index as usize];
                let position = sequence.n_computed;
                let n_drafts = sequence.take_drafts(for_drafts);
                for_drafts -= n_drafts;
                n_tokens += 1 + n_drafts;
                plan.entries.push(PlanEntry {
                    id: sequence.id,
                    index,
                    slot: sequence.slot,
                    position,
                    n_tokens: 1 + n_drafts,
                    n_drafts,
                    wants_logits: true,
                    work: Work::Decode,
                });
                let end = position + 1 + n_drafts;
                if end.is_multiple_of(BLOCK_TOKENS) {
                    self.plan_capture(plan, index, end, true);
                }
            }
            place += 1;
        }
        n_tokens
    }

    /// Shares `budget` tokens among sequences with known tokens to run, starting waiting ones.
    fn plan_prefill(&mut self, plan: &mut StepPlan, mut budget: u32) {
        let mut admitting = !self.free_slots.is_empty() && self.queue.len() > 0;
        if budget == 0 || (self.n_prefill == 0 && !admitting) {
            return;
        }
        self.candidates.clear();
        self.granted.clear();
        for place in 0..self.running.len() {
            if self.sequences[self.running[place] as usize].state == State::Prefill {
                self.push_candidate(self.running[place], 0);
            }
        }
        if admitting {
            let heads = self.queue.heads();
            let new = heads.map(|(account, place)| Candidate {
                priority: place.priority,
                service: self.queue.service(account),
                turns: 0,
                arrival: place.arrival,
                index: place.index,
            });
            self.candidates.extend(new.map(Reverse));
        }

        let turn = turn_of(budget);
        while budget > 0 {
            let Some(Reverse(candidate)) = self.candidates.pop() else { break };
            let index = candidate.index;
            let account = self.sequences[index as usize].account;
            if candidate.service != self.queue.service(account) {
                // The user was served since this was pushed: it is someone else's turn, perhaps.
                self.push_candidate(index, candidate.turns);
                continue;
            }
            if self.sequences[index as usize].state == State::Waiting {
                if !admitting {
                    continue;
                }
                let next = self.queue.after(account, self.place(index));
                let admission = self.admit(index, plan);
                // Nobody overtakes a sequence that does not fit yet, or it might never start.
                admitting = admission != Admission::NoRoom && !self.free_slots.is_empty();
                if let Some(next) = next
                    && admitting
                {
                    self.push_candidate(next.index, 0);
                }
                if admission != Admission::Started {
                    continue;
                }
            }
            self.queue.serve(account);
            let granted = self.grant(index, turn.min(budget));
            budget -= granted;
            if granted > 0 {
                self.push_candidate(index, candidate.turns + 1);
            }
        }
        self.plan_chunks(plan);
    }

    fn push_candidate(&mut self, index: SequenceIndex, turns: u32) {
        let sequence = &self.sequences[index as usize];
        self.candidates.push(Reverse(Candidate {
            priority: sequence.priority,
            service: self.queue.service(sequence.account),
            turns,
            arrival: sequence.arrival,
            index,
        }));
    }

    /// Grants up to `most` further prefill tokens and charges those not run before.
    fn grant(&mut self, index: SequenceIndex, most: u32) -> u32 {
        let interval = self.snapshot_interval();
        let sequence = &mut self.sequences[index as usize];
        let from = sequence.n_computed + sequence.granted;
        let granted = most.min(sequence.chunk_limit(interval) - from);
        if granted > 0 {
            if sequence.granted == 0 {
                self.granted.push(index);
            }
            sequence.granted += granted;
            let charge = (from + granted).saturating_sub(from.max(sequence.charged));
            self.queue.charge(sequence.account, charge);
        }
        granted
    }

    /// Turns what was granted into chunks.
    fn plan_chunks(&mut self, plan: &mut StepPlan) {
        let interval = self.snapshot_interval();
        for granted in 0..self.granted.len() {
            let index = self.granted[granted];
            let sequence = &mut self.sequences[index as usize];
            let position = sequence.n_computed;
            let granted_end = position + std::mem::take(&mut sequence.granted);
            let aligned = granted_end - granted_end % BLOCK_TOKENS;
            // The budget cut this chunk short: better to end it on a block boundary.
            let cut_short = granted_end < sequence.chunk_limit(interval);
            let end = if cut_short && aligned > position { aligned } else { granted_end };
            let refund = granted_end.saturating_sub(end.max(sequence.charged));
            self.queue.refund(sequence.account, refund);
            sequence.charged = sequence.charged.max(end);
            let is_last = end == sequence.len();
            plan.entries.push(PlanEntry {
                id: sequence.id,
                index,
                slot: sequence.slot,
                position,
                n_tokens: end - position,
                n_drafts: 0,
                wants_logits: is_last,
                work: Work::Prefill,
            });
            let due = end == sequence.last_shared_boundary()
                || interval.is_some_and(|interval| end.is_multiple_of(interval));
            if end.is_multiple_of(BLOCK_TOKENS) && (due || is_last) {
                self.plan_capture(plan, index, end, !due);
            }
        }
    }

    fn snapshot_interval(&self) -> Option<u32> {
        self.cache.is_enabled().then(|| self.limits.snapshot_interval())
    }

    /// Plans a snapshot of the sequence after `position` tokens, the last of which may be drafts.
    fn plan_capture(
        &mut self,
        plan: &mut StepPlan,
        index: SequenceIndex,
        position: u32,
        rolling: bool,
    ) {
        if !self.cache.is_enabled() {
            return;
        }
        let sequence = &mut self.sequences[index as usize];
        let snapshot = if position > sequence.len() {
            // Which prefix it will be is not known yet, and so not whether it has a snapshot.
            self.cache.take_snapshot()
        } else {
            let n_blocks = position / BLOCK_TOKENS;
            self.cache.extend_keys(sequence.root, &mut sequence.keys, &sequence.tokens, n_blocks);
            self.cache.begin_capture(sequence.keys[n_blocks as usize - 1])
        };
        if let Some(snapshot) = snapshot {
            let slot = sequence.slot;
            plan.captures.push(Capture { slot, snapshot, position, index, rolling });
        }
    }
}
