//! Lower tiers of the prefix cache as the scheduler sees them: what they hold, what should go
//! there, and what is on its way back.
//!
//! Below the device's pools there may be host memory and a disk. The scheduler does not know which:
//! it is told which keys are available somewhere ([`Scheduler::set_lower`]), says what is worth
//! keeping ([`Scheduler::take_saves`]) or must be forgotten ([`Scheduler::take_drops`]), and asks
//! for what a waiting sequence could use ([`StepPlan::loads`](crate::StepPlan)). A load fills blocks
//! and a snapshot of the device pools while the sequence keeps waiting; once it has ended, the
//! ordinary look-up finds them. Only what was wanted becomes a cost: a load that fails, in part or
//! as a whole, leaves the sequence to compute more.
//!
//! Invariants:
//! - a load holds all blocks of its prefix, those that were there already and those it fills, until
//!   [`Scheduler::finish_load`]; nothing it fills is published before;
//! - a load belongs to no sequence: cancelling who asked for it changes nothing about it.
//!
//! Not here: where the bytes are, and moving them (the engine).

use std::collections::HashSet;

use crate::BLOCK_TOKENS;
use crate::keys::{BlockKey, ByHash};
use crate::plan::StepPlan;
use crate::prefix_cache::LookUp;
use crate::scheduler::Scheduler;
use crate::sequence::SequenceIndex;

/// Loads for one sequence between two starts of it. What was loaded may be evicted again before the
/// sequence starts; without a limit, a small cache might load for ever.
const MAX_LOADS: u32 = 2;

/// What a piece of cached state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateKind {
    /// The KV rows of `BLOCK_TOKENS` tokens.
    Block,
    /// What else is needed to go on at a block's end.
    Snapshot,
}

/// Name of a piece of cached state; equal names mean equal content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateKey {
    /// Block or snapshot.
    pub kind: StateKind,
    /// The prefix at whose end it is.
    pub key: BlockKey,
}

impl StateKey {
    pub(crate) const fn block(key: BlockKey) -> Self {
        Self { kind: StateKind::Block, key }
    }

    pub(crate) const fn snapshot(key: BlockKey) -> Self {
        Self { kind: StateKind::Snapshot, key }
    }
}

/// Why something should be copied to a lower tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveReason {
    /// It became reusable: a durable tier wants it now.
    Published,
    /// The device is about to reuse its memory: the last moment to copy it.
    Evicted,
}

/// State of the device pools that a lower tier may copy; its content is intact until the step that
/// is planned next has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Save {
    /// What it is.
    pub state: StateKey,
    /// Block or snapshot number on the device.
    pub id: u32,
    /// Why now.
    pub reason: SaveReason,
}

/// Names a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoadId(pub u64);

/// State to copy from a lower tier to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadItem {
    /// What it is.
    pub state: StateKey,
    /// Destination: block or snapshot number on the device.
    pub id: u32,
}

/// A prefix to bring back; to be answered with [`Scheduler::finish_load`], any number of steps later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Its name.
    pub id: LoadId,
    /// What is missing on the device; blocks in order of position, then the snapshot.
    pub items: Vec<LoadItem>,
}

/// A load that was asked for and has not ended.
#[derive(Debug)]
pub(crate) struct Loading {
    id: LoadId,
    /// Who waits for it.
    sequence: SequenceIndex,
    items: Vec<LoadItem>,
    /// All blocks of the prefix.
    pub(crate) blocks: Vec<u32>,
    /// The snapshot at the prefix's end if it was there already.
    pinned: Option<u32>,
    /// Hash of the first block's tokens without their scope.
    unscoped: u64,
}

/// The keys that lower tiers hold.
#[derive(Debug, Default)]
pub(crate) struct LowerKeys {
    blocks: HashSet<BlockKey, ByHash>,
    snapshots: HashSet<BlockKey, ByHash>,
}

impl LowerKeys {
    pub(crate) fn contains(&self, state: StateKey) -> bool {
        match state.kind {
            StateKind::Block => self.blocks.contains(&state.key),
            StateKind::Snapshot => self.snapshots.contains(&state.key),
        }
    }

    pub(crate) fn set(&mut self, state: StateKey, available: bool) {
        let keys = match state.kind {
            StateKind::Block => &mut self.blocks,
            StateKind::Snapshot => &mut self.snapshots,
        };
        if available {
            keys.insert(state.key);
        } else {
            keys.remove(&state.key);
        }
    }
}

/// Whether a waiting sequence could start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It runs now.
    Started,
    /// It waits for a load, which need not keep others waiting.
    Loading,
    /// It does not fit, and nobody may overtake it.
    NoRoom,
}

impl Scheduler {
    /// Says whether lower tiers hold `state`.
    pub fn set_lower(&mut self, state: StateKey, available: bool) {
        self.cache.lower_mut().set(state, available);
    }

    /// Moves what is worth copying to the end of `into`. To be called after every
    /// [`Scheduler::plan`], before its step begins, and before waiting for work.
    pub fn take_saves(&mut self, into: &mut Vec<Save>) {
        into.append(self.cache.saves_mut());
    }

    /// Moves what lower tiers must forget, because it may be wrong, to the end of `into`.
    pub fn take_drops(&mut self, into: &mut Vec<StateKey>) {
        into.append(self.cache.drops_mut());
    }

    /// The keys of the first `n_tokens` tokens of a sequence that has run them, block by block.
    #[must_use]
    pub fn prefix_keys(&self, index: SequenceIndex, n_tokens: u32) -> &[BlockKey] {
        let keys = &self.sequences[index as usize].keys;
        &keys[..keys.len().min((n_tokens / BLOCK_TOKENS) as usize)]
    }

    /// Ends a load: `arrived[i]` says whether item `i` is on the device now. Loads that are not
    /// known, or have ended, are ignored.
    pub fn finish_load(&mut self, id: LoadId, arrived: &[bool]) {
        let Some(place) = self.loading.iter().position(|loading| loading.id == id) else { return };
        let mut loading = self.loading.remove(place);
        for (item, &arrived) in loading.items.iter().zip(arrived) {
            match item.state.kind {
                StateKind::Block if arrived => {
                    let first = loading.blocks[0] == item.id;
                    let unscoped = first.then_some(loading.unscoped);
                    self.cache.publish_loaded(item.id, item.state.key, unscoped);
                }
                StateKind::Block => {}
                StateKind::Snapshot if arrived => {
                    self.cache.finish_capture(item.id, item.state.key);
                }
                StateKind::Snapshot => self.cache.unpin(item.id),
            }
        }
        if let Some(snapshot) = loading.pinned {
            self.cache.unpin(snapshot);
        }
        self.cache.release(&mut loading.blocks, false);
        let sequence = &mut self.sequences[loading.sequence as usize];
        if sequence.load == Some(id) {
            sequence.load = None;
        }
    }

    /// Number of loads that have not ended.
    #[must_use]
    pub fn n_loading(&self) -> usize {
        self.loading.len()
    }

    /// Whether lower tiers may be asked for a prefix of this sequence.
    pub(crate) fn may_load(&self, index: SequenceIndex) -> bool {
        self.sequences[index as usize].n_loads < MAX_LOADS
    }

    /// Asks for what `found` lacks on the device.
    pub(crate) fn start_load(
        &mut self,
        index: SequenceIndex,
        found: LookUp,
        plan: &mut StepPlan,
    ) -> Admission {
        // One load per free slot: more sequences could not start anyway.
        if self.loading.len() >= self.free_slots.len() {
            return Admission::Loading;
        }
        let sequence = &self.sequences[index as usize];
        let keys = &sequence.keys[..found.n_blocks as usize];
        let Some(missing) = self.cache.first_missing(keys) else { return Admission::Loading };
        // Somebody loads it already, as when several requests share a system prompt.
        if self.loading.iter().any(|loading| loading.items.iter().any(|i| i.state == missing)) {
            return Admission::Loading;
        }
        let Some(begun) = self.cache.begin_load(found, keys) else { return Admission::Loading };
        let id = LoadId(self.next_load);
        self.next_load += 1;
        self.loading.push(Loading {
            id,
            sequence: index,
            items: begun.items.clone(),
            blocks: begun.blocks,
            pinned: begun.pinned,
            unscoped: self.cache.unscoped(&sequence.tokens),
        });
        plan.loads.push(Load { id, items: begun.items });
        let sequence = &mut self.sequences[index as usize];
        sequence.load = Some(id);
        sequence.n_loads += 1;
        Admission::Loading
    }
}
