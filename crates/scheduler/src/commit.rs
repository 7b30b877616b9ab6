//! After a step: tokens are appended, full blocks and snapshots published, sequences end.
//!
//! A rejected draft leaves no trace: what counts as computed ends before it, so that the next step
//! runs the same positions again, and nothing beyond what was accepted is published.
//!
//! Not here: sampling and why a token ends a sequence; the engine decides both.

use fathom_core::{FinishReason, TokenId};

use crate::BLOCK_TOKENS;
use crate::plan::{PlanEntry, StepPlan, Work};
use crate::scheduler::Scheduler;
use crate::sequence::{End, Rolling, SequenceIndex, State};

/// What a decoded token costs its user, in prefill tokens: it occupies a step as long as several.
const DECODE_COST: u32 = 2;

/// What became of one row of logits that was wanted and looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The sampled token; `None` if there is none because sampling failed.
    pub token: Option<TokenId>,
    /// Why the sequence ends with it, unless the scheduler finds its length reached.
    pub end: Option<End>,
    /// Whether the token is the draft that ran next, so that the next outcome is this entry's too.
    pub is_accepted_draft: bool,
}

impl Outcome {
    /// A token after which the sequence goes on.
    #[must_use]
    pub const fn token(token: TokenId) -> Self {
        Self { token: Some(token), end: None, is_accepted_draft: false }
    }

    /// A token that equals its draft: the row of logits after it is looked at, too.
    #[must_use]
    pub const fn accepted(token: TokenId) -> Self {
        Self { is_accepted_draft: true, ..Self::token(token) }
    }

    /// A token that ends the sequence.
    #[must_use]
    pub const fn last(token: TokenId, reason: FinishReason) -> Self {
        Self { end: Some(End::Finished(reason)), ..Self::token(token) }
    }

    /// No token: the sequence fails, and what it computed is not reused.
    #[must_use]
    pub const fn failed() -> Self {
        Self { token: None, end: Some(End::Failed), is_accepted_draft: false }
    }
}

/// For every entry that wanted logits, in plan order: the outcomes of its accepted drafts, then one
/// more. Rows after the first rejected draft have no outcome.
pub type Outcomes = [Outcome];

impl Scheduler {
    /// Applies the result of a step that ran `plan`.
    ///
    /// # Panics
    /// If `outcomes` does not have what [`Outcomes`] says.
    pub fn commit(&mut self, plan: &StepPlan, mut outcomes: &Outcomes) {
        for restore in &plan.restores {
            self.cache.unpin(restore.snapshot);
        }
        for entry in &plan.entries {
            let mut own: &Outcomes = &[];
            if entry.wants_logits {
                let n_accepted = outcomes.iter().take_while(|o| o.is_accepted_draft).count();
                assert!(n_accepted <= entry.n_drafts as usize, "only drafts are accepted");
                assert!(n_accepted < outcomes.len(), "an entry's last outcome is no draft");
                (own, outcomes) = outcomes.split_at(n_accepted + 1);
            }
            self.advance(entry, own);
        }
        assert!(outcomes.is_empty(), "no outcomes but of entries that wanted logits");
        for capture in &plan.captures {
            let sequence = &mut self.sequences[capture.index as usize];
            // Without a boundary the sequence failed, or a draft before the boundary was rejected.
            let Some(key) = sequence.boundary else {
                self.cache.unpin(capture.snapshot);
                continue;
            };
            let kept = self.cache.finish_capture(capture.snapshot, key);
            let alive = matches!(sequence.state, State::Prefill | State::Decode);
            if kept && capture.rolling && alive {
                let new = Rolling { snapshot: capture.snapshot, key };
                if let Some(old) = sequence.rolling.replace(new) {
                    self.cache.drop_snapshot(old.snapshot, old.key);
                }
            } else if kept {
                self.cache.offer_snapshot(capture.snapshot, key);
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

    fn advance(&mut self, entry: &PlanEntry, outcomes: &Outcomes) {
        let sequence = &mut self.sequences[entry.index as usize];
        sequence.in_flight = false;
        sequence.boundary = None;
        if let Some(Outcome { end: Some(End::Failed), .. }) = outcomes.last() {
            self.end(entry.index, End::Failed, true);
            return;
        }
        // Tokens sampled for a cancelled sequence were never asked for.
        let outcomes: &Outcomes = if sequence.cancelled { &[] } else { outcomes };
        let (last, accepted) = match outcomes.split_last() {
            Some((last, accepted)) => (Some(last), accepted),
            None => (None, outcomes),
        };
        sequence.tokens.extend(accepted.iter().filter_map(|outcome| outcome.token));
        let n_accepted = accepted.len() as u32;
        sequence.n_computed = entry.position + entry.n_tokens - entry.n_drafts + n_accepted;
        if entry.work == Work::Decode {
            sequence.charged = sequence.n_computed;
            // Users pay for tokens they get, not for guesses.
            self.queue.charge(sequence.account, DECODE_COST * (1 + n_accepted));
        }
        if sequence.n_computed / BLOCK_TOKENS > sequence.n_published {
            self.publish(entry.index);
        }
        let sequence = &mut self.sequences[entry.index as usize];
        let Some(outcome) = last else { return };
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
            if sequence.n_computed.is_multiple_of(BLOCK_TOKENS) {
                sequence.boundary = sequence.keys.get(n_full as usize - 1).copied();
            }
        }
        sequence.n_published = n_full;
    }
}
