//! Who may start: a waiting sequence that fits, and what it gets.
//!
//! A sequence fits if a slot is free and the blocks for all its known tokens can be had, shared
//! ones not counted twice. Its answer's blocks are taken as they are needed: reserving
//! `max_tokens` would leave most of the cache unused.
//!
//! Not here: whose turn it is (`queue`), making room (`preempt`).

use crate::lower::Admission;
use crate::plan::{Restore, StepPlan};
use crate::prefix_cache::LookUp;
use crate::scheduler::Scheduler;
use crate::sequence::{SequenceIndex, State};
use crate::{BLOCK_TOKENS, blocks_for};

impl Scheduler {
    /// What the sequence could share, or `None` if it does not fit now.
    pub(crate) fn fit(&mut self, index: SequenceIndex) -> Option<LookUp> {
        let lower = self.may_load(index);
        let sequence = &mut self.sequences[index as usize];
        let version = self.cache.version();
        if self.free_slots.is_empty() || sequence.blocked_at == version {
            return None;
        }
        let found = self.cache.look_up(sequence.root, &mut sequence.keys, &sequence.tokens, lower);
        let needed = blocks_for(sequence.len()) - found.n_present;
        let available = self.cache.pool().available() - found.n_idle;
        // Running sequences need a block each every BLOCK_TOKENS steps. Starting one that leaves
        // nothing for them would soon end in its preemption.
        let headroom = self.running.len() as u32 / 8;
        if needed + headroom > available {
            sequence.blocked_at = version;
            return None;
        }
        Some(found)
    }

    /// Starts or resumes a waiting sequence if it fits and all it can share is on the device.
    pub(crate) fn admit(&mut self, index: SequenceIndex, plan: &mut StepPlan) -> Admission {
        if self.sequences[index as usize].load.is_some() {
            return Admission::Loading;
        }
        let Some(found) = self.fit(index) else { return Admission::NoRoom };
        if found.must_load() {
            return self.start_load(index, found, plan);
        }
        let place = self.place(index);
        let sequence = &mut self.sequences[index as usize];
        self.queue.remove(sequence.account, place);
        let slot = self.free_slots.pop().expect("a sequence fits only if a slot is free");

        // Room for the whole life of the sequence, so that no decode step ever allocates.
        // Memory that is never written costs address space only.
        let max_len = sequence.max_len as usize;
        sequence.tokens.reserve_exact(max_len - sequence.tokens.len());
        let max_blocks = blocks_for(sequence.max_len) as usize;
        sequence.blocks.reserve_exact(max_blocks);
        sequence.keys.reserve_exact(max_blocks.saturating_sub(sequence.keys.len()));

        let snapshot = self.cache.acquire(found, &sequence.keys, &mut sequence.blocks);
        for _ in found.n_blocks..blocks_for(sequence.len()) {
            let block = self.cache.allocate().expect("a sequence fits only if its blocks do");
            sequence.blocks.push(block);
        }
        let position = found.n_blocks * BLOCK_TOKENS;
        if let Some(snapshot) = snapshot {
            plan.restores.push(Restore { snapshot, slot, position, index });
        }
        sequence.state = State::Prefill;
        sequence.slot = slot;
        sequence.n_computed = position;
        sequence.n_published = found.n_blocks;
        sequence.charged = sequence.charged.max(position);
        sequence.n_loads = 0;
        if !sequence.started {
            sequence.started = true;
            sequence.cached_tokens = position;
            self.n_queued -= 1;
            self.prompt_tokens += u64::from(sequence.n_prompt);
            self.cached_prompt_tokens += u64::from(position);
        }
        self.n_prefill += 1;
        let after = self.running.partition_point(|&i| {
            let other = &self.sequences[i as usize];
            (other.priority, other.arrival) < (place.priority, place.arrival)
        });
        self.running.insert(after, index);
        Admission::Started
    }
}
