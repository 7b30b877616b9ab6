//! A full check of the scheduler's books, for tests and simulations.
//!
//! Recomputes from the sequences what the pools and lists must say. Too slow for every step of a
//! server; cheap enough for every step of a test.

use crate::scheduler::Scheduler;
use crate::sequence::State;
use crate::{BLOCK_TOKENS, blocks_for};

impl Scheduler {
    /// Checks every invariant that ties sequences, queue, slots and blocks together.
    ///
    /// # Errors
    /// A sentence about the first contradiction.
    pub fn audit(&self) -> Result<(), String> {
        self.audit_blocks()?;
        self.audit_running()?;
        let waiting = self.sequences.iter().filter(|s| s.state == State::Waiting);
        let (n_waiting, n_new) = (waiting.clone().count(), waiting.filter(|s| !s.started).count());
        if (self.queue.len(), self.n_queued) != (n_waiting, n_new) {
            return Err(format!(
                "{n_waiting} sequences wait, {n_new} of them new, but the queue counts {} and {}",
                self.queue.len(),
                self.n_queued
            ));
        }
        Ok(())
    }

    fn audit_blocks(&self) -> Result<(), String> {
        let pool = self.cache.pool();
        let mut references = vec![0; pool.n_blocks() as usize];
        let loading = self.loading.iter().flat_map(|loading| &loading.blocks);
        for block in self.sequences.iter().flat_map(|s| &s.blocks).chain(loading) {
            references[*block as usize] += 1;
        }
        let mut n_unreferenced = 0;
        for (block, &expected) in references.iter().enumerate() {
            let block = block as u32;
            let got = pool.references(block);
            if got != expected {
                return Err(format!(
                    "block {block} counts {got} references, tables hold {expected}"
                ));
            }
            if pool.is_idle(block) && (got > 0 || !self.cache.is_published(block)) {
                return Err(format!("idle block {block} is referenced or not published"));
            }
            n_unreferenced += u32::from(got == 0);
        }
        if pool.available() != n_unreferenced {
            return Err(format!(
                "{n_unreferenced} blocks are unreferenced, {} are available",
                pool.available()
            ));
        }
        Ok(())
    }

    fn audit_running(&self) -> Result<(), String> {
        let mut slots = self.free_slots.clone();
        let mut previous = None;
        for &index in &self.running {
            let sequence = &self.sequences[index as usize];
            let id = sequence.id;
            if !matches!(sequence.state, State::Prefill | State::Decode) {
                return Err(format!("request {id} runs in state {:?}", sequence.state));
            }
            let order = (sequence.priority, sequence.arrival);
            if previous.is_some_and(|previous| previous >= order) {
                return Err(format!("request {id} is out of order in the running list"));
            }
            previous = Some(order);
            if sequence.n_computed >= sequence.len() {
                return Err(format!("request {id} has no token left to run"));
            }
            let n_blocks = sequence.blocks.len() as u32;
            if n_blocks < blocks_for(sequence.n_computed) || n_blocks > blocks_for(sequence.len()) {
                return Err(format!(
                    "request {id} holds {n_blocks} blocks of {BLOCK_TOKENS} for {} of {} tokens",
                    sequence.n_computed,
                    sequence.len()
                ));
            }
            slots.push(sequence.slot);
        }
        slots.sort_unstable();
        if slots.iter().copied().ne(0..self.limits.max_num_seqs()) {
            return Err("slots are lost or given twice".to_owned());
        }
        Ok(())
    }
}
