//! Taking back slots and blocks from running sequences.
//!
//! The victim is always the last of the running list: the least urgent, then the youngest. It
//! loses slot and blocks, keeps its tokens and its place in the queue, and later runs its known
//! tokens again, from the longest prefix that is still cached. The most urgent and oldest sequence
//! is never a victim, and alone it always fits, so there is always progress.
//!
//! Not here: sequences that already are part of the current plan; they are never victims, because
//! decodes are planned in the order of the running list.

use crate::scheduler::Scheduler;
use crate::sequence::SequenceIndex;

impl Scheduler {
    /// Takes slot and blocks from a running sequence and lets it wait.
    pub(crate) fn preempt(&mut self, index: SequenceIndex) {
        debug_assert!(!self.sequences[index as usize].in_flight, "planned sequences are pinned");
        self.vacate(index, false);
        self.preemptions += 1;
        self.enqueue(index);
    }

    /// Preempts less urgent sequences while the most urgent waiting one does not fit.
    pub(crate) fn make_room_for_urgent(&mut self) {
        while let Some(&victim) = self.running.last() {
            let priority = self.sequences[victim as usize].priority;
            if self.queue.most_urgent().is_none_or(|waiting| waiting >= priority) {
                return;
            }
            let Some((_, place)) = self.queue.first() else { return };
            let loading = self.sequences[place.index as usize].load.is_some();
            if loading || self.fit(place.index).is_some() {
                return;
            }
            self.preempt(victim);
        }
    }

    /// Makes sure that the running sequence at `place` of the running list has a block for its
    /// next token, preempting from the end of the list. Returns false if it was itself the victim.
    pub(crate) fn extend_or_preempt(&mut self, place: usize) -> bool {
        let index = self.running[place];
        loop {
            if let Some(block) = self.cache.allocate() {
                self.sequences[index as usize].blocks.push(block);
                return true;
            }
            let victim = *self.running.last().expect("the sequence itself is running");
            self.preempt(victim);
            if victim == index {
                return false;
            }
        }
    }
}
