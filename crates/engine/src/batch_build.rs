//! From a plan to what the runner reads: ids and offsets only.

use fathom_scheduler::{Scheduler, StepPlan, blocks_for};

use crate::runner::{SnapshotCopy, StepInput};
use crate::speculate::Speculation;

/// Fills `input` with the step that `plan` describes, reusing its memory.
pub(crate) fn build(
    scheduler: &Scheduler,
    speculation: &Speculation,
    plan: &StepPlan,
    input: &mut StepInput,
) {
    input.restores.clear();
    input.restores.extend(plan.restores.iter().map(|restore| SnapshotCopy {
        slot: restore.slot,
        snapshot: restore.snapshot,
        position: restore.position,
    }));
    input.batch.clear();
    for entry in &plan.entries {
        let sequence = scheduler.sequence(entry.index);
        let end = entry.position + entry.n_tokens;
        let known = &sequence.tokens()[entry.position as usize..(end - entry.n_drafts) as usize];
        let blocks = &sequence.blocks()[..blocks_for(end) as usize];
        input.batch.push(entry.slot, entry.position, known, blocks, entry.wants_logits);
        input.batch.extend_last(speculation.drafts(entry));
    }
    input.captures.clear();
    input.captures.extend(plan.captures.iter().map(|capture| SnapshotCopy {
        slot: capture.slot,
        snapshot: capture.snapshot,
        position: capture.position,
    }));
}
