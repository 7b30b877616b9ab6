//! Rows of the MTP block: which are right, which must be run, and the drafts that follow from them.
//!
//! Row `t` of the block is made of the model's copies `X_t` and token `t + 1`, so it can be run when
//! that token is known: for all but the last token of a chunk at once, for the last one a step later.
//! The block has one layer that sees 128 rows back, and nobody looks at its rows before there is
//! something to draft or to keep. Therefore rows wait, with their copies in the cache's ring, and are
//! run together
//! - as the first pass of a draft: they are then the context of its logits;
//! - when the ring would lose their copies, or a snapshot is taken at the end of the step.
//!
//! Further passes of a draft run the block on its own output. What they write is provisional: the next
//! exact row of the same position replaces it before any exact row reads it.
//!
//! Invariants:
//! - rows before `n_right` are those of the sequence's tokens, as far as its window reaches back;
//! - copies and tokens of all rows from `n_right` on are kept;
//! - nothing here depends on the batch: all ranks come to the same drafts.
//!
//! Not here: how many drafts are wanted and what becomes of them ([`crate::speculate`]).

use std::sync::Arc;

use fathom_core::model_config::WINDOW;
use fathom_core::{SamplingParams, TokenId};
use fathom_model::{ModelError, NoProbe, Transformer};
use fathom_ops::sample::{Beside, Choice, ChoiceScratch, Chosen, RowChoice, choose_token};
use fathom_ops::{Batch, CacheSpec, Communicator, Ops, SequenceSlice};

use crate::runner::{DraftInput, OutputRow, SnapshotCopy, StepOutput};

/// One rank's view of the MTP block's rows in all slots.
#[derive(Debug)]
pub(super) struct DraftRows {
    /// Copies that the cache keeps per slot.
    n_kept: usize,
    /// By slot.
    n_right: Vec<u32>,
    /// The last tokens that ran, `[n_slots][n_kept]`, by position.
    tokens: Vec<TokenId>,
    /// Rows to run, and each one's next token.
    rows: Batch,
    next: Vec<TokenId>,
    scratch: ChoiceScratch,
}

impl DraftRows {
    /// Rows in a cache of `spec`; `None` if no block drafts in it.
    pub(super) fn new(spec: &CacheSpec) -> Option<Self> {
        let n_kept = spec.copies_rows();
        (spec.draft_width > 0).then(|| Self {
            n_kept,
            n_right: vec![0; spec.n_slots],
            tokens: vec![0; spec.n_slots * n_kept],
            rows: Batch::default(),
            next: Vec::new(),
            scratch: ChoiceScratch::default(),
        })
    }

    fn token_mut(&mut self, slot: u32, position: u32) -> &mut TokenId {
        &mut self.tokens[slot as usize * self.n_kept + position as usize % self.n_kept]
    }

    /// `slot` got a snapshot at `position`: all rows but the last one are right.
    pub(super) fn restore(&mut self, slot: u32, position: u32) {
        self.n_right[slot as usize] = position.saturating_sub(1);
    }

    /// The sequence in `slot` goes on at `position` with `token`: later rows are void, and so is the
    /// row before it if it was made of another token, a rejected draft.
    fn settle(&mut self, slot: u32, position: u32, token: TokenId) {
        let is_same = *self.token_mut(slot, position) == token;
        let most = if is_same { position } else { position.saturating_sub(1) };
        let n_right = &mut self.n_right[slot as usize];
        *n_right = most.min(*n_right);
    }

    /// Adds the rows `first..last` of `slot` to those to run. `token_at` gives the tokens that are
    /// not kept yet.
    fn add(
        &mut self,
        slot: u32,
        first: u32,
        last: u32,
        wants_logits: bool,
        token_at: impl Fn(u32) -> Option<TokenId>,
    ) {
        let start = self.next.len();
        for position in first + 1..=last {
            let token = token_at(position).unwrap_or_else(|| *self.token_mut(slot, position));
            self.next.push(token);
        }
        // The block sees its window only: it has no blocks.
        self.rows.push(slot, first, &self.next[start..], &[], wants_logits);
        self.n_right[slot as usize] = last;
    }

    /// After the model ran `batch`, whose copies are `x`: keeps what the block will need, and runs
    /// the rows that cannot wait. `captures` are about to be taken.
    pub(super) fn follow<O: Ops>(
        &mut self,
        model: &Transformer<O>,
        batch: &Batch,
        x: &O::Tensor,
        captures: &[SnapshotCopy],
        cache: &mut O::Cache,
        comm: &dyn Communicator,
    ) -> Result<(), ModelError> {
        let end_of = |of: &SequenceSlice| of.position + of.n_tokens;
        let mut must_run = !captures.is_empty();
        for of in &batch.sequences {
            self.settle(of.slot, of.position, batch.tokens[of.row as usize]);
            let n_waiting = end_of(of) - self.n_right[of.slot as usize];
            must_run |= n_waiting as usize > self.n_kept;
        }
        self.rows.clear();
        self.next.clear();
        for of in batch.sequences.iter().filter(|_| must_run) {
            let (n_right, end) = (self.n_right[of.slot as usize], end_of(of));
            let must = (end - n_right) as usize > self.n_kept
                || captures.iter().any(|capture| capture.slot == of.slot);
            // Rows of drafts may be void soon; if others have to run, only certain ones join them.
            let last = if must { end - 1 } else { of.position };
            let first = n_right.max(end.saturating_sub(WINDOW as u32));
            if first < last {
                self.add(of.slot, first, last, false, |position| {
                    let offset = position.checked_sub(of.position)?;
                    Some(batch.tokens[(of.row + offset) as usize])
                });
            }
        }
        if self.rows.n_tokens() > 0 {
            let copies = model.ops().kept_copies(&self.rows, Some((batch, x)), cache)?;
            let (rows, next) = (&self.rows, &self.next);
            model.draft(rows, next, copies, cache, comm, false, &mut NoProbe)?;
        }
        for of in &batch.sequences {
            let keep = (of.n_tokens as usize).min(self.n_kept);
            for (row, position) in of.rows().zip(of.positions()).rev().take(keep) {
                *self.token_mut(of.slot, position as u32) = batch.tokens[row];
            }
        }
        Ok(model.ops().keep_copies(batch, x, cache)?)
    }

    /// Drafts for each of `input`. Calls `beside` before it waits for a device.
    pub(super) fn draft<O: Ops>(
        &mut self,
        model: &Transformer<O>,
        input: &[DraftInput],
        cache: &mut O::Cache,
        comm: &dyn Communicator,
        beside: &mut Beside<'_>,
    ) -> Result<Vec<Vec<TokenId>>, ModelError> {
        let ops = model.ops();
        self.rows.clear();
        self.next.clear();
        for of in input {
            self.settle(of.slot, of.position, of.token);
            // The last row runs in any case: its logits are wanted.
            let n_right = self.n_right[of.slot as usize].min(of.position.saturating_sub(1));
            let first = n_right.max(of.position.saturating_sub(WINDOW as u32));
            *self.token_mut(of.slot, of.position) = of.token;
            self.add(of.slot, first, of.position, true, |_| None);
        }
        let sampling: Vec<_> = input.iter().map(|of| for_drafts(&of.sampling)).collect();
        let mut drafts = vec![Vec::new(); input.len()];
        let mut drafting: Vec<usize> = (0..input.len()).collect();
        let mut x = ops.kept_copies(&self.rows, None, cache)?;
        while !drafting.is_empty() {
            let goes_on =
                |draft: &usize| drafts[*draft].len() + 1 < input[*draft].n_drafts as usize;
            let wants_copies = drafting.iter().any(goes_on);
            let (rows, next) = (&self.rows, &self.next);
            let output = model.draft(rows, next, x, cache, comm, wants_copies, &mut NoProbe)?;
            let (Some(logits), last_rows) = (output.logits, rows.logit_rows.clone()) else { break };
            let vocab_size = ops.shape(&logits).1;
            let choice = |&index: &usize| RowChoice {
                params: &sampling[index],
                position: input[index].position + drafts[index].len() as u32 + 1,
                seen: &[],
                mask: None,
                forbidden: &[],
            };
            let wanted: Vec<_> = drafting.iter().map(choice).collect();
            let asked: Vec<_> = wanted.iter().copied().map(Some).collect();
            let Chosen { choices, logits } = ops.choose_rows(&logits, &asked, beside)?;
            let mut left = StepOutput { choices, logits };
            self.rows.clear();
            self.next.clear();
            let mut source_rows = Vec::new();
            let chosen = left.rows(vocab_size).zip(wanted).zip(last_rows);
            for (((left, choice), row), index) in chosen.zip(std::mem::take(&mut drafting)) {
                let (of, draft) = (&input[index], &mut drafts[index]);
                let chosen = match left {
                    OutputRow::Chosen(chosen) => chosen,
                    OutputRow::Logits(logits) => choose_token(&choice, logits, &mut self.scratch),
                };
                let Choice::Token(token, _) = chosen else { continue };
                draft.push(token);
                if draft.len() < of.n_drafts as usize {
                    drafting.push(index);
                    source_rows.push(row);
                    self.next.push(token);
                    self.rows.push(of.slot, choice.position - 1, &[token], &[], true);
                }
            }
            let Some(copies) = output.copies.filter(|_| !drafting.is_empty()) else { break };
            x = ops.select_rows(&copies, &source_rows)?;
        }
        Ok(drafts)
    }
}

/// How drafts of a request are chosen: as its tokens, with the same bias, filters and noise, and
/// without reports. What depends on its history (penalties, constraint, `min_tokens`) is left out.
fn for_drafts(params: &Arc<SamplingParams>) -> Arc<SamplingParams> {
    match params.logprobs {
        None => Arc::clone(params),
        Some(_) => Arc::new(SamplingParams { logprobs: None, ..(**params).clone() }),
    }
}
