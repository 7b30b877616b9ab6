//! A runner without a model: for tests, simulations and load tests of what is above the engine.
//!
//! [`ScriptedRunner`] keeps token ids in its KV blocks and a running hash in its slots and
//! snapshots, and reads them back the way a model would. A wrong block, slot or snapshot is
//! therefore noticed: the runner panics instead of answering. So is a sequence that takes back more
//! tokens than it may.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fathom_core::TokenId;
use fathom_ops::BLOCK_TOKENS;

use crate::runner::{
    RunnerCapacity, StateLayout, StateRef, StepError, StepInput, StepOutput, StepRunner,
};
use crate::speculate::MAX_DRAFTS;

/// Logit of the scripted token; all others are 0. At temperatures up to 2 it always wins.
const CHOSEN: f32 = 100.0;

/// What a script answers to the tokens so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// This token is as good as certain.
    Token(TokenId),
    /// Logits between 0 and 8 that are a hash of this number and the token: the draw decides.
    Spread(u32),
    /// The logits of this row are not numbers.
    NotANumber,
    /// The step fails; other sequences keep their state.
    FailStep,
    /// The device fails; all state is lost.
    LoseDevice,
}

/// Chooses the reply to prompt and answer so far. A script that panics is a step that panics.
pub type Script = Box<dyn FnMut(&[TokenId]) -> Reply + Send>;

/// What a slot holds: hashes of a sequence's tokens up to each of the last few.
#[derive(Debug, Clone)]
struct Slot {
    /// Number of the newest token.
    len: u32,
    /// Hash of the first `len` tokens last, and those before it.
    hashes: VecDeque<u64>,
}

impl Slot {
    fn new((hash, len): (u64, u32)) -> Self {
        Self { len, hashes: VecDeque::from([hash]) }
    }

    fn push(&mut self, token: TokenId) {
        let hash = self.hashes.back().copied().unwrap_or_default();
        self.hashes.push_back(mix(hash, token));
        self.len += 1;
        if self.hashes.len() > MAX_DRAFTS + 1 {
            self.hashes.pop_front();
        }
    }

    /// Goes back to the first `len` tokens.
    fn rewind(&mut self, len: u32) {
        if len == 0 {
            *self = Self::new((0, 0));
        }
        while self.len > len && self.hashes.len() > 1 {
            self.hashes.pop_back();
            self.len -= 1;
        }
    }

    /// Hash of the first `len` tokens.
    fn hash(&self, len: u32) -> Option<u64> {
        let back = self.len.checked_sub(len)? as usize;
        self.hashes.iter().rev().nth(back).copied()
    }
}

/// Runs a script instead of a model.
pub struct ScriptedRunner {
    capacity: RunnerCapacity,
    script: Script,
    step_time: Duration,
    slots: Vec<Slot>,
    snapshots: Vec<(u64, u32)>,
    blocks: Vec<TokenId>,
    sequence: Vec<TokenId>,
}

impl ScriptedRunner {
    /// A runner that answers with what `script` says.
    #[must_use]
    pub fn new(
        capacity: RunnerCapacity,
        script: impl FnMut(&[TokenId]) -> Reply + Send + 'static,
    ) -> Self {
        Self {
            capacity,
            script: Box::new(script),
            step_time: Duration::ZERO,
            slots: vec![Slot::new((0, 0)); capacity.n_slots as usize],
            snapshots: vec![(0, 0); capacity.n_snapshots as usize],
            blocks: vec![0; capacity.n_blocks as usize * BLOCK_TOKENS],
            sequence: Vec::new(),
        }
    }

    /// A runner whose next token is [`hashed_token`] of all tokens so far.
    #[must_use]
    pub fn hashed(capacity: RunnerCapacity) -> Self {
        Self::new(capacity, move |tokens| Reply::Token(hashed_token(tokens, capacity.vocab_size)))
    }

    /// Makes every step take at least this long.
    #[must_use]
    pub const fn with_step_time(mut self, step_time: Duration) -> Self {
        self.step_time = step_time;
        self
    }

    fn row(&mut self, tokens_end: usize, blocks: &[u32]) -> Reply {
        self.sequence.clear();
        for (index, &block) in blocks.iter().enumerate() {
            let len = (tokens_end - index * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let start = block as usize * BLOCK_TOKENS;
            self.sequence.extend_from_slice(&self.blocks[start..start + len]);
            if len < BLOCK_TOKENS {
                break;
            }
        }
        (self.script)(&self.sequence)
    }
}

/// A token that depends on every token so far and their order.
#[must_use]
pub fn hashed_token(tokens: &[TokenId], vocab_size: u32) -> TokenId {
    let hash = tokens.iter().fold(0, |hash, &token| mix(hash, token));
    ((u64::from((hash >> 32) as u32) * u64::from(vocab_size)) >> 32) as TokenId
}

fn mix(hash: u64, token: TokenId) -> u64 {
    let mixed = (hash ^ (u64::from(token) + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(31)
}

impl StepRunner for ScriptedRunner {
    fn capacity(&self) -> RunnerCapacity {
        self.capacity
    }

    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError> {
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time);
        }
        let RunnerCapacity { n_slots, n_blocks, vocab_size, .. } = self.capacity;
        let batch = &input.batch;
        batch
            .validate(n_slots as usize, n_blocks as usize, vocab_size as usize)
            .map_err(|error| StepError::Step { message: error.to_string() })?;
        for copy in &input.restores {
            let snapshot = self.snapshots[copy.snapshot as usize];
            assert_eq!(snapshot.1, copy.position, "snapshot {} is another one", copy.snapshot);
            self.slots[copy.slot as usize] = Slot::new(snapshot);
        }
        for sequence in &batch.sequences {
            let slot = &mut self.slots[sequence.slot as usize];
            slot.rewind(sequence.position);
            assert_eq!(slot.len, sequence.position, "slot {} holds another state", sequence.slot);
            let blocks = batch.blocks_of(sequence);
            for (position, &token) in sequence.positions().zip(&batch.tokens[sequence.rows()]) {
                slot.push(token);
                let block = blocks[position / BLOCK_TOKENS] as usize;
                self.blocks[block * BLOCK_TOKENS + position % BLOCK_TOKENS] = token;
            }
        }

        let vocab_size = vocab_size as usize;
        output.clear();
        output.logits.resize(batch.logit_rows.len() * vocab_size, 0.0);
        let mut sequences = batch.sequences.iter().peekable();
        for (index, &row) in batch.logit_rows.iter().enumerate() {
            while sequences.next_if(|of| of.rows().end <= row as usize).is_some() {}
            let sequence = sequences.peek().expect("every row belongs to a sequence");
            let end = sequence.positions().start + row as usize + 1 - sequence.rows().start;
            let reply = self.row(end, batch.blocks_of(sequence));
            let hash = self.sequence.iter().fold(0, |hash, &token| mix(hash, token));
            let slot = &self.slots[sequence.slot as usize];
            assert_eq!(Some(hash), slot.hash(end as u32), "blocks and slot disagree");
            let logits = &mut output.logits[index * vocab_size..(index + 1) * vocab_size];
            match reply {
                Reply::Token(token) => match logits.get_mut(token as usize) {
                    Some(logit) => *logit = CHOSEN,
                    None => panic!("the script answers with token {token} of {vocab_size}"),
                },
                Reply::Spread(seed) => {
                    for (token, logit) in (0..).zip(logits) {
                        let bits = mix(u64::from(seed), token) >> 40;
                        *logit = bits as f32 / (1 << 21) as f32;
                    }
                }
                Reply::NotANumber => logits[0] = f32::NAN,
                Reply::FailStep => {
                    return Err(StepError::Step { message: "the script said so".to_owned() });
                }
                Reply::LoseDevice => {
                    return Err(StepError::Device { message: "the script said so".to_owned() });
                }
            }
        }
        for copy in &input.captures {
            let hash = self.slots[copy.slot as usize].hash(copy.position);
            let hash = hash.expect("a slot is captured where it is or was a few tokens ago");
            self.snapshots[copy.snapshot as usize] = (hash, copy.position);
        }
        Ok(())
    }

    fn max_drafts(&self) -> u32 {
        MAX_DRAFTS as u32
    }

    fn state_layout(&self) -> Option<StateLayout> {
        Some(StateLayout {
            block_bytes: BLOCK_TOKENS * size_of::<TokenId>(),
            snapshot_bytes: size_of::<u64>() + size_of::<u32>(),
            format: "tokens".to_owned(),
        })
    }

    fn read_state(&mut self, items: &[StateRef], into: &mut Vec<Bytes>) -> Result<(), StepError> {
        into.extend(items.iter().map(|item| match *item {
            StateRef::Block(block) => {
                let tokens = &self.blocks[block as usize * BLOCK_TOKENS..][..BLOCK_TOKENS];
                tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Bytes>()
            }
            StateRef::Snapshot(snapshot) => {
                let (hash, len) = self.snapshots[snapshot as usize];
                [&hash.to_le_bytes()[..], &len.to_le_bytes()].concat().into()
            }
        }));
        Ok(())
    }

    fn write_state(&mut self, items: &Arc<Vec<(StateRef, Bytes)>>) -> Result<(), StepError> {
        for (item, bytes) in &**items {
            match *item {
                StateRef::Block(block) => {
                    let tokens = &mut self.blocks[block as usize * BLOCK_TOKENS..][..BLOCK_TOKENS];
                    for (token, bytes) in tokens.iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *token = TokenId::from_le_bytes(*bytes);
                    }
                }
                StateRef::Snapshot(snapshot) => {
                    let state = bytes.split_first_chunk::<8>().zip(bytes.last_chunk::<4>());
                    let ((hash, _), len) = state.expect("a snapshot has 12 bytes");
                    let state = (u64::from_le_bytes(*hash), u32::from_le_bytes(*len));
                    self.snapshots[snapshot as usize] = state;
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), StepError> {
        self.slots.fill(Slot::new((u64::MAX, u32::MAX)));
        self.snapshots.fill((u64::MAX, u32::MAX));
        self.blocks.fill(TokenId::MAX);
        Ok(())
    }
}
