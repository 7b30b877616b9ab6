//! The boundary to the model: one call per step, whatever devices and ranks stand behind it.
//!
//! A runner owns the memory behind slots, blocks and snapshots; the engine only names them. It
//! keeps no opinion about requests: everything a step needs is in its [`StepInput`].
//!
//! Not here: the ranks that run the model (`rank`), a runner without a model ([`crate::scripted`]).

use std::sync::Arc;

use bytes::Bytes;
use fathom_core::{SamplingParams, TokenId};
use fathom_ops::Batch;
use fathom_ops::sample::{Beside, Choice, OwnedRowChoice};

/// What a runner has room for; constant for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerCapacity {
    /// Sequences that can hold state at once: slots are `0..n_slots`.
    pub n_slots: u32,
    /// KV blocks of 256 tokens: ids are `0..n_blocks`.
    pub n_blocks: u32,
    /// State snapshots: ids are `0..n_snapshots`; 0 switches prefix reuse off.
    pub n_snapshots: u32,
    /// Logits per row.
    pub vocab_size: u32,
    /// Longest sequence the model can run.
    pub max_model_len: u32,
}

/// A copy between a slot's state (window KV, compressor state) and a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotCopy {
    /// The sequence's slot.
    pub slot: u32,
    /// The snapshot.
    pub snapshot: u32,
    /// Tokens whose state it is, a multiple of 256.
    pub position: u32,
}

/// Everything one step does, in this order: restores, the batch, choices, captures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepInput {
    /// Snapshot to slot, before the batch.
    pub restores: Vec<SnapshotCopy>,
    /// The tokens to run.
    pub batch: Batch,
    /// Slot to snapshot, after the batch.
    pub captures: Vec<SnapshotCopy>,
}

/// What the host does while a device runs a step.
pub trait HostWork: Send {
    /// How the tokens after the wanted rows are chosen, one per row; `None` where only the engine can
    /// choose. Those of a row behind drafts take them for right. A runner that chooses asks once,
    /// when the device has everything that comes before.
    fn choices(&mut self) -> Vec<Option<OwnedRowChoice>>;

    /// All else that there is to do.
    fn rest(&mut self);
}

/// Nothing: all logits are wanted.
impl HostWork for () {
    fn choices(&mut self) -> Vec<Option<OwnedRowChoice>> {
        Vec::new()
    }

    fn rest(&mut self) {}
}

/// A sequence that a draft model should continue.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftInput {
    /// The sequence's slot.
    pub slot: u32,
    /// Position of `token`; all tokens before it, and no others, have run and were accepted.
    pub position: u32,
    /// The sequence's newest token.
    pub token: TokenId,
    /// Tokens wanted after it, at least 1 and at most [`StepRunner::max_drafts`].
    pub n_drafts: u32,
    /// How the request chooses tokens.
    pub sampling: Arc<SamplingParams>,
}

/// What a step leaves on the host, reused from step to step.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// What was chosen: one per entry of `batch.logit_rows`, in that order, `None` where the row is
    /// among `logits`. Empty if all are.
    pub choices: Vec<Option<Choice>>,
    /// `[n_rows, vocab_size]` f32: the rows without a choice, in that order.
    pub logits: Vec<f32>,
}

/// What became of a wanted row.
#[derive(Debug, PartialEq)]
pub enum OutputRow<'a> {
    /// The runner has chosen.
    Chosen(Choice),
    /// `[vocab_size]` to choose from.
    Logits(&'a mut [f32]),
}

impl StepOutput {
    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.choices.clear();
        self.logits.clear();
    }

    /// The wanted rows, in order; each can be taken once.
    pub fn rows(&mut self, vocab_size: usize) -> impl Iterator<Item = OutputRow<'_>> {
        let mut logits = self.logits.chunks_exact_mut(vocab_size);
        let n_rows = self.choices.len().max(logits.len());
        let mut choices = self.choices.iter_mut();
        (0..n_rows).map_while(move |_| match choices.next().and_then(Option::take) {
            Some(choice) => Some(OutputRow::Chosen(choice)),
            None => logits.next().map(OutputRow::Logits),
        })
    }
}

/// A piece of the runner's cache memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateRef {
    /// A KV block.
    Block(u32),
    /// A snapshot.
    Snapshot(u32),
}

/// What [`StepRunner::read_state`] gives: constant for a runner's life, and the same for every runner
/// that can use what this one has read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// Bytes of a KV block.
    pub block_bytes: usize,
    /// Bytes of a snapshot.
    pub snapshot_bytes: usize,
    /// How the bytes are to be read: layers and row formats.
    pub format: String,
}

/// A step did not produce what was wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum StepError {
    /// The requests of the step are lost; slots and blocks of all others are intact.
    #[error("the step failed: {message}")]
    Step { message: String },
    /// Nothing in the runner's memory can be trusted until [`StepRunner::reset`].
    #[error("the device failed: {message}")]
    Device { message: String },
}

/// Runs steps. Used from one thread, one call at a time.
pub trait StepRunner: Send {
    /// What there is room for.
    fn capacity(&self) -> RunnerCapacity;

    /// Runs whatever makes the first request as fast as later ones. Called once, before any step.
    ///
    /// # Errors
    /// [`StepError`] if the model cannot run at all; the engine then does not start.
    fn warm_up(&mut self) -> Result<(), StepError> {
        Ok(())
    }

    /// Whether [`StepRunner::step_beside`] has time for something beside a step: a device runs it.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Runs one step and leaves the logits of the wanted rows in `output`. The input is shared so
    /// that ranks on other threads can read it without a copy.
    ///
    /// # Errors
    /// [`StepError`]; a panic counts as [`StepError::Device`].
    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError>;

    /// The same, but chooses tokens where `host` says how, and has the rest of its work done once,
    /// unless the step fails before: when the host has nothing else to do, which is while a device
    /// runs, and before the step if the host itself runs it.
    ///
    /// # Errors
    /// As [`StepRunner::step`].
    fn step_beside(
        &mut self,
        input: &Arc<StepInput>,
        output: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        host.rest();
        self.step(input, output)
    }

    /// Tokens at a sequence's end that may be run and then taken back, by running other tokens at
    /// their positions in a later step; 0 if none can.
    fn max_drafts(&self) -> u32 {
        0
    }

    /// Whether [`StepRunner::draft`] works.
    fn has_draft_model(&self) -> bool {
        false
    }

    /// Guesses how sequences go on: appends the guesses for `input[i]` to `drafts[i]`. Calls `beside`,
    /// as often as it likes, when it waits for a device.
    ///
    /// # Errors
    /// [`StepError`], which always counts as [`StepError::Device`].
    fn draft(
        &mut self,
        input: &Arc<Vec<DraftInput>>,
        drafts: &mut [Vec<TokenId>],
        beside: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        let _ = (input, drafts, beside);
        Err(StepError::Device { message: "this runner has no draft model".to_owned() })
    }

    /// The layout of cache state that can be copied to lower tiers and back; `None` if none can.
    fn state_layout(&self) -> Option<StateLayout> {
        None
    }

    /// Copies cache state to the host, appending one piece per item of `items` to `into`. Before the
    /// next step begins nothing that is read has changed; a device may queue all copies at once.
    ///
    /// # Errors
    /// [`StepError`], which always counts as [`StepError::Device`].
    fn read_state(&mut self, items: &[StateRef], into: &mut Vec<Bytes>) -> Result<(), StepError> {
        let _ = (items, into);
        Err(StepError::Device { message: "cache state cannot be read from this runner".to_owned() })
    }

    /// Copies what [`StepRunner::read_state`] gave, here or in another process, back: into memory
    /// that no running sequence uses, to be there when the next step begins.
    ///
    /// # Errors
    /// As [`StepRunner::read_state`].
    fn write_state(&mut self, items: &Arc<Vec<(StateRef, Bytes)>>) -> Result<(), StepError> {
        let _ = items;
        Err(StepError::Device {
            message: "cache state cannot be written to this runner".to_owned(),
        })
    }

    /// Makes the runner usable after [`StepError::Device`] or a panic. Slots, blocks and snapshots
    /// may hold anything afterwards.
    ///
    /// # Errors
    /// [`StepError`] if it cannot; the engine then stops.
    fn reset(&mut self) -> Result<(), StepError>;
}
