//! After a step: tokens are appended, full blocks and snapshots published, sequences end.
//!
//! Not here: sampling and why a token ends a sequence; the engine decides both.

use fathom_core::{FinishReason, TokenId};

use crate::BLOCK_TOKENS;
use crate::plan::{PlanEntry, StepPlan, Work};
use crate::scheduler::Scheduler;
use crate::sequence::{End, Rolling, SequenceIndex, State};

/// What a decoded token costs its user, in prefill tokens: it occupies a step as long as several.
const DECODE_COST: u32 = 2;

/// What became of one entry that wanted logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The sampled token; `None` if there is none because sampling failed.
    pub token: Option<TokenId>,
    /// Why the sequence ends with it, unless the scheduler finds its length reached.
    pub end: Option<End>,
}

impl Outcome {
    /// A token after which the sequence goes on.
    #[must_use]
    pub const fn token(token: TokenId) -> Self {
        Self { token: Some(token), end: None }
    }

    /// A token that ends the sequence.
    #[must_use]
    pub const fn last(token: TokenId, reason: FinishReason) -> Self {
        Self { token: Some(token), end: Some(End::Finished(reason)) }
    }

    /// No token: the sequence fails, and what it computed is not reused.
    #[must_use]
    pub const fn failed() -> Self {
        Self { token: None, end: Some(End::Failed) }
    }
}

/// One outcome per entry that wanted logits, in plan order.
pub type Outcomes = [Outcome];

impl Scheduler {
    /// Applies the result of a step that ran `plan`.
    ///
    /// # Panics
    /// If `outcomes` does not have one item per entry that wanted logits.
    pub fn commit(&mut self, plan: &StepPlan, outcomes: &Outcomes) {
        let mut outcomes = outcomes.iter();
        for restore in &plan.restores {
            self.cache.unpin(restore.snapshot);
        }
        for entry in &plan.entries {
            let outcome = entry
                .wants_logits
                .then(|| *outcomes.next().expect("one outcome per entry that wanted logits"));
            self.advance(entry, outcome);
        }
        assert!(outcomes.next().is_none(), "one outcome per entry that wanted logits");
        for capture in &plan.captures {
            let sequence = &mut self.sequences[capture.index as usize];
            if sequence.failed {
                self.cache.unpin(capture.snapshot);
                continue;
            }
            let kept = self.cache.finish_capture(capture.snapshot, capture.key);
            let alive = matches!(sequence.state, State::Prefill | State::Decode);
            if kept && capture.rolling && alive {
                let new = Rolling { snapshot: capture.snapshot, key: capture.key };
                if let Some(old) = sequence.rolling.replace(new) {
                    self.cache.drop_snapshot(old.snapshot, old.key);
                }
            } else if kept {
                self.cache.offer_snapshot(capture.snapshot, capture.key);
            }
        }
        for entry in &plan.entries {
            if std::mem::take(&mut self.sequences[entry.index as usize].cancelled) {
                self.end(entry.index, End::Finished(FinishReason::Cancelled), false);
            }
        }
    }

    /// Ends every sequence of a plan whose step failed; nothing it computed is kept.
    pub fn abort(&mut self, plan: &StepPlan) {
        for restore in &plan.restores {
            self.cache.unpin(restore.snapshot);
        }
        for capture in &plan.captures {
            self.cache.unpin(capture.snapshot);
        }
        for entry in &plan.entries {
            self.end(entry.index, End::Failed, true);
        }
    }

    fn advance(&mut self, entry: &PlanEntry, outcome: Option<Outcome>) {
        let sequence = &mut self.sequences[entry.index as usize];
        sequence.in_flight = false;
        if let Some(Outcome { end: Some(End::Failed), .. }) = outcome {
            self.end(entry.index, End::Failed, true);
            return;
        }
        sequence.n_computed = entry.position + entry.n_tokens;
        if entry.work == Work::Decode {
            sequence.charged = sequence.n_computed;
            self.queue.charge(sequence.account, DECODE_COST);
        }
        if sequence.n_computed / BLOCK_TOKENS > sequence.n_published {
            self.publish(entry.index);
        }
        let sequence = &mut self.sequences[entry.index as usize];
        // A token sampled for a cancelled sequence was never asked for.
        let Some(outcome) = outcome.filter(|_| !sequence.cancelled) else { return };
        if sequence.state == State::Prefill {
            sequence.state = State::Decode;
            self.n_prefill -= 1;
        }
        sequence.tokens.extend(outcome.token);
        let full = sequence.len() >= sequence.max_len;
        let length = full.then_some(End::Finished(FinishReason::Length));
        if let Some(end) = outcome.end.or(length) {
            self.end(entry.index, end, false);
        }
    }

    /// Publishes the blocks that were completed.
    fn publish(&mut self, index: SequenceIndex) {
        let sequence = &mut self.sequences[index as usize];
        let n_full = sequence.n_computed / BLOCK_TOKENS;
        if self.cache.is_enabled() {
            self.cache.extend_keys(sequence.root, &mut sequence.keys, &sequence.tokens, n_full);
            for block in sequence.n_published..n_full {
                let (id, key) = (sequence.blocks[block as usize], sequence.keys[block as usize]);
                self.cache.publish(id, block, key, &sequence.tokens);
            }
        }
        sequence.n_published = n_full;
    }
}
