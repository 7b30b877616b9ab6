//! What one step runs: tokens of several sequences, flat, with the cache places they use.
//!
//! Invariants (checked by [`Batch::validate`]):
//! - a slot appears at most once;
//! - rows of sequences are contiguous, in order, and cover every token;
//! - a sequence's blocks cover all positions up to its last token of this step.
//!
//! Not here: who is in the batch and why (`scheduler`).

use std::ops::Range;

use fathom_core::TokenId;

use crate::{BLOCK_TOKENS, OpError};

/// The tokens of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Input token of each row.
    pub tokens: Vec<TokenId>,
    /// The sequences, in row order.
    pub sequences: Vec<SequenceSlice>,
    /// Block ids of all sequences, back to back; see [`SequenceSlice::blocks`].
    pub blocks: Vec<u32>,
    /// Rows whose logits are wanted, strictly ascending.
    pub logit_rows: Vec<u32>,
    /// Positions that a device prepares for at least, where it rounds steps up to shapes: a warm-up asks
    /// for those of contexts that are not there yet. Results do not depend on it.
    pub min_context: u32,
}

/// One sequence's part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSlice {
    /// Cache slot with this sequence's window and compressor state.
    pub slot: u32,
    /// First row in the batch.
    pub row: u32,
    /// Rows, at least 1.
    pub n_tokens: u32,
    /// Position of the first row's token; everything before it is already in the cache.
    pub position: u32,
    /// This sequence's part of [`Batch::blocks`]: block `i` holds positions `256 i .. 256 (i + 1)`.
    pub blocks: Range<u32>,
}

impl SequenceSlice {
    /// Rows of this sequence in the batch.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        self.row as usize..(self.row + self.n_tokens) as usize
    }

    /// Positions of this sequence's tokens in this step.
    #[must_use]
    pub fn positions(&self) -> Range<usize> {
        self.position as usize..(self.position + self.n_tokens) as usize
    }
}

/// Rows of a batch that an operator works on, numbered in order: all, or those whose logits are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StepRows<'a> {
    /// Every row.
    All,
    /// [`Batch::logit_rows`].
    Wanted(&'a [u32]),
}

impl StepRows<'_> {
    /// The numbers of the rows of `sequence`.
    pub(crate) fn of(self, sequence: &SequenceSlice) -> Range<usize> {
        let rows = sequence.rows();
        match self {
            Self::All => rows,
            Self::Wanted(wanted) => {
                let number = |row| wanted.partition_point(|&wanted| (wanted as usize) < row);
                number(rows.start)..number(rows.end)
            }
        }
    }

    /// The row of the batch that has this number.
    pub(crate) fn row(self, number: usize) -> usize {
        match self {
            Self::All => number,
            Self::Wanted(wanted) => wanted[number] as usize,
        }
    }
}

impl Batch {
    /// A batch of one sequence: `tokens` from `position` on, logits of its last row.
    #[must_use]
    pub fn single(slot: u32, position: u32, tokens: &[TokenId], blocks: &[u32]) -> Self {
        let mut batch = Self::default();
        batch.push(slot, position, tokens, blocks, true);
        batch
    }

    /// Appends a sequence; `wants_logits` asks for the logits of its last row.
    pub fn push(
        &mut self,
        slot: u32,
        position: u32,
        tokens: &[TokenId],
        blocks: &[u32],
        wants_logits: bool,
    ) {
        let row = self.tokens.len() as u32;
        let first_block = self.blocks.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.blocks.extend_from_slice(blocks);
        self.sequences.push(SequenceSlice {
            slot,
            row,
            n_tokens: tokens.len() as u32,
            position,
            blocks: first_block..self.blocks.len() as u32,
        });
        if wants_logits {
            self.logit_rows.push(self.tokens.len() as u32 - 1);
        }
    }

    /// Appends tokens to the sequence that was pushed last, and asks for the logits of each. Its
    /// blocks must cover them.
    pub fn extend_last(&mut self, tokens: &[TokenId]) {
        let Some(last) = self.sequences.last_mut() else { return };
        last.n_tokens += tokens.len() as u32;
        let first = self.tokens.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.logit_rows.extend(first..self.tokens.len() as u32);
    }

    /// Forgets all sequences and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
        self.blocks.clear();
        self.logit_rows.clear();
    }

    /// Position of each row's token.
    #[must_use]
    pub fn positions(&self) -> Vec<usize> {
        self.sequences.iter().flat_map(SequenceSlice::positions).collect()
    }

    /// Whether logits of every row are wanted, in order: then no row must be picked.
    #[must_use]
    pub fn wants_all_rows(&self) -> bool {
        self.logit_rows.iter().copied().eq(0..self.tokens.len() as u32)
    }

    /// The rows that a tensor `arg` of `n` rows is of.
    ///
    /// # Errors
    /// [`OpError::Shape`] if it has neither a row for each token nor one for each wanted row.
    pub(crate) fn step_rows(
        &self,
        op: &'static str,
        arg: &'static str,
        n: usize,
    ) -> Result<StepRows<'_>, OpError> {
        if n == self.n_tokens() {
            return Ok(StepRows::All);
        }
        if n == self.logit_rows.len() {
            return Ok(StepRows::Wanted(&self.logit_rows));
        }
        Err(OpError::Shape { op, arg, got: n, expected: self.n_tokens() })
    }

    /// Number of rows.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The block ids of `sequence`.
    #[must_use]
    pub fn blocks_of(&self, sequence: &SequenceSlice) -> &[u32] {
        &self.blocks[sequence.blocks.start as usize..sequence.blocks.end as usize]
    }

    /// Checks the invariants against a cache of `n_slots` slots and `n_blocks` blocks and a
    /// vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] or [`OpError::Shape`] naming the first value that breaks one.
    pub fn validate(
        &self,
        n_slots: usize,
        n_blocks: usize,
        vocab_size: usize,
    ) -> Result<(), OpError> {
        self.check(n_slots, n_blocks, vocab_size, true)
    }

    /// Checks the order of sequences and rows alone, of a batch with or without blocks.
    pub(crate) fn validate_rows(&self) -> Result<(), OpError> {
        self.check(usize::MAX, usize::MAX, usize::MAX, self.has_blocks())
    }

    /// Whether its sequences have blocks; those of a batch for layers that see nothing but their
    /// window need none.
    #[must_use]
    pub fn has_blocks(&self) -> bool {
        !self.blocks.is_empty()
    }

    fn check(
        &self,
        n_slots: usize,
        n_blocks: usize,
        vocab_size: usize,
        needs_blocks: bool,
    ) -> Result<(), OpError> {
        const OP: &str = "batch";
        let below = |what, got: u32, limit: usize| {
            let got = got as usize;
            if got < limit { Ok(()) } else { Err(OpError::OutOfRange { op: OP, what, got, limit }) }
        };
        let mut next_row = 0;
        for (index, sequence) in self.sequences.iter().enumerate() {
            below("slot", sequence.slot, n_slots)?;
            if self.sequences[..index].iter().any(|other| other.slot == sequence.slot) {
                let (got, limit) = (sequence.slot as usize, n_slots);
                return Err(OpError::OutOfRange { op: OP, what: "repeated slot", got, limit });
            }
            let (got, expected) = (sequence.row as usize, next_row);
            if got != expected || sequence.n_tokens == 0 {
                return Err(OpError::Shape { op: OP, arg: "rows", got, expected });
            }
            next_row += sequence.n_tokens as usize;
            let end = sequence.positions().end;
            let needed = if needs_blocks { end.div_ceil(BLOCK_TOKENS) } else { 0 };
            let (got, expected) = (sequence.blocks.len(), needed);
            if got < expected || sequence.blocks.end as usize > self.blocks.len() {
                return Err(OpError::Shape { op: OP, arg: "blocks", got, expected });
            }
        }
        let (got, expected) = (self.tokens.len(), next_row);
        if got != expected {
            return Err(OpError::Shape { op: OP, arg: "tokens", got, expected });
        }
        self.blocks.iter().try_for_each(|&block| below("block id", block, n_blocks))?;
        self.tokens.iter().try_for_each(|&token| below("token id", token, vocab_size))?;
        self.logit_rows.iter().try_for_each(|&row| below("logit row", row, next_row))?;
        match self.logit_rows.windows(2).find(|pair| pair[0] >= pair[1]) {
            Some(pair) => {
                let (got, limit) = (pair[0] as usize, pair[1] as usize);
                Err(OpError::OutOfRange {
                    op: OP,
                    what: "logit row before a later one",
                    got,
                    limit,
                })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_whose_logits_are_wanted_ascend() {
        let mut batch = Batch::single(0, 0, &[7, 8, 9], &[0]);
        for sound in [&[][..], &[0], &[0, 2], &[0, 1, 2]] {
            batch.logit_rows = sound.to_vec();
            assert!(batch.validate(1, 1, 10).is_ok(), "{sound:?}");
        }
        for wrong in [&[3][..], &[1, 0], &[1, 1], &[2, 1, 0]] {
            batch.logit_rows = wrong.to_vec();
            assert!(batch.validate(1, 1, 10).is_err(), "{wrong:?}");
        }
    }
}
