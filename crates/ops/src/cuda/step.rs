//! A batch as kernels read it: one block of words in device memory, written by one copy.
//!
//! | words | per | meaning |
//! |---|---|---|
//! | 1 | row | token |
//! | 1 | row | position |
//! | 1 | row | number of its sequence |
//! | 8 | sequence | slot, row, tokens, position, first block, blocks, two unused |
//! | 512 | step | zero before and after every launch: how many blocks of some part of it have ended |
//! | 1 | wanted row | its number |
//! | 3 | wanted row, unless all are | as per row: token, position, sequence |
//! | 1 | block of a sequence | block id |
//!
//! A step of one-token sequences has a [`Shape`] where addresses repeat: rows and context are rounded
//! up, so that few shapes occur and what was launched for one step serves every later one of its
//! shape. Rows beyond the batch repeat its first row; their sequence has no tokens, which tells
//! kernels to store nothing.

use std::sync::atomic::{AtomicU32, Ordering};

use fathom_core::LayerKind;

use super::device::Arg;
use super::memory::{Buffer, Memory, Place};
use super::tensor::u32_bytes;
use crate::cache_spec::{BLOCK_TOKENS, CacheSpec};
use crate::error::check_len;
use crate::{Batch, OpError};

/// Words of a sequence.
const SEQUENCE_WORDS: usize = 8;
/// Words in which launches count blocks, and which of them are whose: launches of one kind are never under way at
/// the same time.
const ENDED_WORDS: usize = 512;
/// Of the router.
pub(crate) const ENDED_ROUTER: usize = 0;
/// Of a boundary between sublayers.
pub(crate) const ENDED_BOUNDARY: usize = 1;
/// The first of a word per head (queries), or per tile of heads and token (attention), to the last.
pub(crate) const ENDED_HEADS: usize = 8;
pub(crate) const MAX_ENDED_HEADS: usize = ENDED_WORDS - ENDED_HEADS;
/// Numbers of rows that one-token steps are rounded up to.
pub(crate) const BUCKETS: [usize; 15] =
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256];
/// The shortest context that steps are rounded up to; each further one is four times as long.
const FIRST_CONTEXT: usize = 1024;

/// What decides which launches a step of one-token sequences makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    /// Positions that every sequence may have at most.
    pub(crate) context: usize,
    /// Whether there are blocks: launches that read some serve no step without.
    pub(crate) has_blocks: bool,
}

impl Shape {
    /// The shape `batch` is rounded up to, if there is one.
    fn of(batch: &Batch) -> Option<Self> {
        let n_tokens = batch.n_tokens();
        let is_decode = batch.sequences.len() == n_tokens && batch.wants_all_rows();
        let rows = BUCKETS.into_iter().find(|&rows| rows >= n_tokens)?;
        // Who sees the window alone launches the same for any context.
        let longest = max_context(batch).max(batch.min_context as usize);
        let context = rounded_up_context(if batch.has_blocks() { longest } else { 0 });
        let has_blocks = batch.has_blocks();
        (is_decode && n_tokens > 0).then_some(Self { rows, context, has_blocks })
    }

    /// The shape that `batch` is rounded up to over `memory`; only in arenas do addresses repeat.
    pub(crate) fn in_memory(memory: &Memory, batch: &Batch) -> Option<Self> {
        if memory.is_planned() { Self::of(batch) } else { None }
    }
}

/// Positions that steps of sequences of `n_positions` or fewer are rounded up to at most.
fn rounded_up_context(n_positions: usize) -> usize {
    let mut context = FIRST_CONTEXT;
    while context < n_positions {
        context *= 4;
    }
    context
}

/// Numbers of sequences and contexts of one-token steps that make one step of each shape, the shapes of
/// short contexts first; at most `limit`, with those of few sequences first among equal contexts.
pub(crate) fn shapes_up_to(
    n_slots: usize,
    max_context: usize,
    limit: usize,
) -> Vec<(usize, usize)> {
    let n_buckets = BUCKETS.iter().take_while(|&&rows| rows < n_slots).count() + 1;
    let sizes = BUCKETS.iter().take(n_buckets).map(|&rows| rows.min(n_slots));
    let contexts = std::iter::successors(Some(FIRST_CONTEXT), |context| Some(context * 4));
    let longest = rounded_up_context(max_context);
    contexts
        .take_while(|&context| context <= longest)
        .flat_map(|context| sizes.clone().map(move |size| (size, context)))
        .take(limit)
        .collect()
}

/// Rows that steps of `n_sequences` or fewer are rounded up to at most.
pub(crate) fn rounded_up(n_sequences: usize) -> usize {
    BUCKETS.into_iter().find(|&rows| rows >= n_sequences).unwrap_or(BUCKETS[BUCKETS.len() - 1])
}

/// The largest position of the batch plus one.
fn max_context(batch: &Batch) -> usize {
    batch.sequences.iter().map(|s| s.positions().end).max().unwrap_or(0)
}

/// What kernels must know of rows that they work on: all of a step, or those whose logits are wanted.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) n: usize,
    pub(crate) tokens: Buffer,
    pub(crate) positions: Buffer,
    pub(crate) sequence_of: Buffer,
}

/// A batch in device memory.
#[derive(Debug)]
pub struct DeviceStep {
    /// The rows of the batch; the tensors of the step may have more.
    pub(crate) batch: Batch,
    /// Rows of every tensor.
    pub(crate) n_rows: usize,
    /// No position is higher.
    pub(crate) context: usize,
    pub(crate) shape: Option<Shape>,
    /// Of all rows.
    pub(crate) all: Rows,
    /// Of the rows whose logits are wanted, where these are not all.
    wanted: Option<Rows>,
    pub(crate) sequences: Buffer,
    pub(crate) blocks: Buffer,
    pub(crate) logit_rows: Buffer,
    /// Where launches count their blocks that have ended, each in words of its kind. For one launch of a kind at a
    /// time: those of the step are all on one side of a branch, and others, each of which waits, are between them.
    ended: Buffer,
    /// All of the above.
    pub(crate) block: Buffer,
    /// The highest slot and block of the batch.
    max_slot: u32,
    max_block: u32,
    /// Tokens from here on are refused by an operator of this step.
    token_limit: AtomicU32,
}

impl DeviceStep {
    /// Uploads `batch`; rounded up to a shape if it `may_grow` and there is one.
    ///
    /// # Errors
    /// [`OpError`] if the batch breaks an invariant of [`Batch`], or there is no room.
    pub(crate) fn new(memory: &Memory, batch: &Batch, may_grow: bool) -> Result<Self, OpError> {
        // Kernels trust rows, positions and block lists; ids are compared with the cache later.
        batch.validate_rows()?;
        let shape = if may_grow { Shape::in_memory(memory, batch) } else { None };
        let n_rows = shape.map_or(batch.n_tokens(), |shape| shape.rows);
        let n_sequences = shape.map_or(batch.sequences.len(), |shape| shape.rows);
        let context = shape.map_or_else(|| max_context(batch), |shape| shape.context);

        let mut words = Vec::with_capacity(3 * n_rows + SEQUENCE_WORDS * n_sequences);
        let n_repeated = n_rows - batch.n_tokens();
        let repeated = |first: u32| std::iter::repeat_n(first, n_repeated);
        let first = |values: &[u32]| values.first().copied().unwrap_or(0);
        words.extend_from_slice(&batch.tokens);
        words.extend(repeated(first(&batch.tokens)));
        let positions = batch.positions();
        words.extend(positions.iter().map(|&position| position as u32));
        words.extend(repeated(batch.sequences.first().map_or(0, |s| s.position)));
        for (index, sequence) in (0..).zip(&batch.sequences) {
            words.extend(std::iter::repeat_n(index, sequence.n_tokens as usize));
        }
        words.extend((batch.sequences.len() as u32..).take(n_repeated));
        let mut blocks = Vec::with_capacity(batch.blocks.len());
        let mut first_blocks = 0..0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            // No more than its positions need: then the room for a shape suffices.
            let end = sequence.positions().end;
            let needed = if batch.has_blocks() { end.div_ceil(BLOCK_TOKENS) } else { 0 };
            let own = blocks.len() as u32..(blocks.len() + needed) as u32;
            blocks.extend_from_slice(&batch.blocks_of(sequence)[..needed]);
            let (slot, row, n_tokens) = (sequence.slot, sequence.row, sequence.n_tokens);
            let n_blocks = needed as u32;
            words.extend([slot, row, n_tokens, sequence.position, own.start, n_blocks, 0, 0]);
            if index == 0 {
                first_blocks = own;
            }
        }
        if let Some(copied) = batch.sequences.first() {
            let (start, n) = (first_blocks.start, first_blocks.len() as u32);
            for row in (batch.n_tokens() as u32..).take(n_repeated) {
                words.extend([copied.slot, row, 0, copied.position, start, n, 0, 0]);
            }
        }
        words.extend([0; ENDED_WORDS]);
        words.extend_from_slice(&batch.logit_rows);
        words.extend(repeated(0));
        let n_wanted = batch.logit_rows.len() + n_repeated;
        let n_blocks = shape.map_or(blocks.len(), |s| s.rows * s.context.div_ceil(BLOCK_TOKENS));
        // A step that was rounded up wants all of its rows.
        let n_narrow = if batch.wants_all_rows() { 0 } else { batch.logit_rows.len() };
        if n_narrow > 0 {
            let wanted = || batch.logit_rows.iter().map(|&row| row as usize);
            words.extend(wanted().map(|row| batch.tokens[row]));
            words.extend(wanted().map(|row| positions[row] as u32));
            let mut owners = vec![0; n_rows];
            for (index, sequence) in (0..).zip(&batch.sequences) {
                owners[sequence.rows()].fill(index);
            }
            words.extend(wanted().map(|row| owners[row]));
        }
        words.extend(blocks);

        let sequence_words = SEQUENCE_WORDS * n_sequences;
        let [all, narrow] = [[n_rows; 3], [n_narrow; 3]].map(|counts| counts.iter().sum::<usize>());
        let n_words = all + sequence_words + ENDED_WORDS + n_wanted + narrow + n_blocks.max(1);
        let block = memory.buffer(Place::Workspace, 4 * n_words)?;
        block.write(0, &u32_bytes(&words))?;
        let mut at = 0;
        let mut next = |count: usize| {
            let part = block.part(4 * at, 4 * count);
            at += count;
            part
        };
        let rows = |n: usize, next: &mut dyn FnMut(usize) -> Result<Buffer, OpError>| {
            Ok::<_, OpError>(Rows {
                n,
                tokens: next(n)?,
                positions: next(n)?,
                sequence_of: next(n)?,
            })
        };
        Ok(Self {
            all: rows(n_rows, &mut next)?,
            sequences: next(sequence_words)?,
            ended: next(ENDED_WORDS)?,
            logit_rows: next(n_wanted)?,
            wanted: (!batch.wants_all_rows()).then(|| rows(n_narrow, &mut next)).transpose()?,
            blocks: next(n_blocks.max(1))?,
            batch: batch.clone(),
            n_rows,
            context,
            shape,
            block,
            max_slot: batch.sequences.iter().map(|sequence| sequence.slot).max().unwrap_or(0),
            max_block: batch.blocks.iter().copied().max().unwrap_or(0),
            token_limit: AtomicU32::new(u32::MAX),
        })
    }

    /// Whether every row is the only one of its sequence: then no row needs what another stores.
    pub(crate) fn has_one_token_each(&self) -> bool {
        self.batch.sequences.len() == self.batch.n_tokens()
    }

    /// The words from `first` on in which a launch counts blocks.
    pub(crate) fn ended(&self, first: usize) -> Arg {
        Arg::Address(self.ended.address() + 4 * first as u64)
    }

    /// What is known of the rows of a tensor of `n`: of all rows, or of those whose logits are wanted.
    pub(crate) fn rows(&self, op: &'static str, n: usize) -> Result<&Rows, OpError> {
        match &self.wanted {
            Some(wanted) if wanted.n == n => Ok(wanted),
            _ => check_len(op, "rows", n, self.all.n).map(|()| &self.all),
        }
    }

    /// Positions, sequence numbers and sequences, as most kernels take them.
    pub(crate) fn row_args(&self) -> [Arg; 3] {
        self.args_of(&self.all)
    }

    /// The same of these rows.
    pub(crate) fn args_of(&self, rows: &Rows) -> [Arg; 3] {
        [Arg::from(&rows.positions), Arg::from(&rows.sequence_of), Arg::from(&self.sequences)]
    }

    /// Refuses a step with a token that a table of `limit` rows does not have.
    pub(crate) fn check_tokens(&self, op: &'static str, limit: usize) -> Result<(), OpError> {
        self.token_limit.fetch_min(u32::try_from(limit).unwrap_or(u32::MAX), Ordering::Relaxed);
        match self.batch.tokens.iter().find(|&&token| token as usize >= limit) {
            None => Ok(()),
            Some(&token) => {
                Err(OpError::OutOfRange { op, what: "token id", got: token as usize, limit })
            }
        }
    }

    /// The smallest limit that [`check_tokens`](Self::check_tokens) was asked for.
    pub(crate) fn token_limit(&self) -> u32 {
        self.token_limit.load(Ordering::Relaxed)
    }

    /// Refuses a step without blocks, for a layer that reads them.
    pub(crate) fn check_blocks(&self, op: &'static str, kind: LayerKind) -> Result<(), OpError> {
        if kind == LayerKind::Window || self.batch.has_blocks() {
            return Ok(());
        }
        Err(OpError::Shape { op, arg: "blocks", got: 0, expected: 1 })
    }

    /// Refuses a step that names slots or blocks a cache of `spec` does not have.
    pub(crate) fn check_cache(&self, op: &'static str, spec: &CacheSpec) -> Result<(), OpError> {
        let ids = [("slot", self.max_slot, spec.n_slots), ("block", self.max_block, spec.n_blocks)];
        for (what, got, limit) in ids {
            let got = got as usize;
            if got >= limit {
                return Err(OpError::OutOfRange { op, what, got, limit });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::Rehearsal;
    use super::*;

    fn decode(positions: &[u32]) -> Batch {
        let mut batch = Batch::default();
        for (slot, &position) in (0..).zip(positions) {
            let blocks: Vec<u32> = (0..=position / 256).collect();
            batch.push(slot, position, &[7 + slot], &blocks, true);
        }
        batch
    }

    fn shape(batch: &Batch) -> Option<(usize, usize)> {
        Shape::of(batch).map(|shape| (shape.rows, shape.context))
    }

    #[test]
    fn one_token_steps_are_rounded_up_and_no_others() {
        assert_eq!(shape(&decode(&[5])), Some((1, 1024)));
        assert_eq!(shape(&decode(&[5, 1023, 9])), Some((4, 1024)));
        assert_eq!(shape(&decode(&[5, 1024, 9, 2, 1])), Some((8, 4096)));
        assert_eq!(shape(&decode(&[0; 257])), None);
        assert_eq!(shape(&Batch::single(0, 4, &[1, 2], &[0])), None);
        let mut unwanted = decode(&[5, 6]);
        unwanted.logit_rows.pop();
        assert_eq!(shape(&unwanted), None);
        let mut prepared = decode(&[5]);
        prepared.min_context = 4000;
        assert_eq!(shape(&prepared), Some((1, 4096)));
    }

    #[test]
    fn a_warm_up_meets_every_shape_that_steps_of_its_slots_and_contexts_have() {
        for (n_slots, max_context) in [(1, 100), (5, 1024), (8, 5000), (40, 1025), (256, 40_000)] {
            let steps = shapes_up_to(n_slots, max_context, usize::MAX);
            let warmed: Vec<_> = steps
                .iter()
                .map(|&(n, context)| {
                    let mut batch = decode(&vec![0; n]);
                    batch.min_context = context as u32;
                    shape(&batch)
                })
                .collect();
            for n in 1..=n_slots {
                for last in [0, 1023, 1024, 4096, 16_384, 39_999] {
                    if last >= max_context {
                        continue;
                    }
                    let mut positions = vec![0; n];
                    positions[n - 1] = last as u32;
                    let wanted = shape(&decode(&positions));
                    assert!(warmed.contains(&wanted), "{n} of {n_slots} at {last}");
                }
            }
            let different: std::collections::HashSet<_> = warmed.iter().collect();
            assert_eq!(different.len(), warmed.len(), "{n_slots} slots");
        }
        let few = shapes_up_to(256, 1 << 20, 16);
        assert_eq!((few.len(), few[14], few[15]), (16, (256, 1024), (1, 4096)));
    }

    #[test]
    fn steps_of_one_shape_take_the_same_memory_however_long_their_block_lists_are() {
        let memory = Rehearsal::memory("sm_80");
        let layout = |batch: &Batch| {
            let step = DeviceStep::new(&memory, batch, true).unwrap();
            [&step.all.tokens, &step.sequences, &step.blocks, &step.block]
                .map(|buffer| (buffer.address(), buffer.len()))
        };
        let short = layout(&decode(&[0, 0, 0]));
        assert_eq!(short, layout(&decode(&[1000, 1023, 700])));
        assert_ne!(short, layout(&decode(&[1024, 0, 0])));
    }

    #[test]
    fn a_step_without_blocks_is_for_layers_that_see_their_window_alone() {
        let memory = Rehearsal::memory("sm_80");
        let mut batch = Batch::default();
        batch.push(1, 700, &[3, 4], &[], true);
        let step = DeviceStep::new(&memory, &batch, true).unwrap();
        assert!(step.check_blocks("test", LayerKind::Window).is_ok());
        assert!(step.check_blocks("test", LayerKind::Csa).is_err());
        assert!(step.check_blocks("test", LayerKind::Hca).is_err());
        // Blocks for some positions and not for others are a mistake.
        batch.push(2, 700, &[3], &[0], true);
        assert!(DeviceStep::new(&memory, &batch, true).is_err());
    }

    #[test]
    fn a_step_over_a_cache_without_its_slots_or_blocks_is_refused() {
        let memory = Rehearsal::memory("sm_80");
        let step = DeviceStep::new(&memory, &decode(&[300, 0]), true).unwrap();
        let spec = |n_slots, n_blocks| CacheSpec {
            layers: Vec::new(),
            n_slots,
            n_blocks,
            n_snapshots: 0,
            spare_rows: 0,
            draft_width: 0,
            kv: crate::KvFormat::Fp8,
            index_keys: crate::IndexKeyFormat::Mxfp4,
        };
        assert!(step.check_cache("test", &spec(2, 2)).is_ok());
        assert!(step.check_cache("test", &spec(1, 2)).is_err());
        assert!(step.check_cache("test", &spec(2, 1)).is_err());
        assert!(step.check_tokens("test", 9).is_ok());
        assert!(step.check_tokens("test", 8).is_err());
        assert_eq!(step.token_limit(), 8);
    }
}
