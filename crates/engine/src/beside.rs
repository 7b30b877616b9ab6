//! What the engine does while a device runs a step.
//!
//! How the next tokens are chosen is said when the model runs already: a grammar's mask may take
//! longer to make than there is time between two steps. Then what the step before gave is sent.
//!
//! Not here: masks made ready on other threads ([`crate::sample::ahead`]).

use std::panic::{AssertUnwindSafe, catch_unwind};

use fathom_core::TokenId;
use fathom_ops::sample::OwnedRowChoice;
use fathom_scheduler::StepPlan;

use crate::active::{Active, Outbox};
use crate::runner::HostWork;
use crate::speculate::Speculation;

/// The engine beside the step that runs `plan`.
pub(crate) struct BesideStep<'a> {
    pub(crate) plan: &'a StepPlan,
    /// Has the drafts of the plan. Not shared, for a drafter may not be.
    pub(crate) speculation: &'a mut Speculation,
    /// By the scheduler's sequence index.
    pub(crate) requests: &'a mut [Option<Active>],
    pub(crate) outbox: &'a mut Outbox,
    pub(crate) eos: &'a [TokenId],
    pub(crate) vocab_size: usize,
}

impl HostWork for BesideStep<'_> {
    fn choices(&mut self) -> Vec<Option<OwnedRowChoice>> {
        let n_rows = self.plan.entries.iter().map(|entry| entry.n_logits() as usize).sum();
        let mut choices = Vec::with_capacity(n_rows);
        for entry in self.plan.entries.iter().filter(|entry| entry.wants_logits) {
            let drafts = self.speculation.drafts(entry);
            let mut active = self.requests[entry.index as usize].as_mut();
            let choice = |n_before: usize| {
                let sampler = &mut active.as_mut()?.sampler;
                let last = entry.position + entry.n_tokens - entry.n_drafts;
                let (before, position) = (&drafts[..n_before], last + n_before as u32);
                let known = || sampler.choice_after(before, position, self.eos, self.vocab_size);
                // A panic happens again where the token is sampled, and is that request's.
                catch_unwind(AssertUnwindSafe(known)).unwrap_or(None)
            };
            choices.extend((0..=drafts.len()).map(choice));
        }
        choices
    }

    fn rest(&mut self) {
        self.outbox.send(self.requests);
    }
}
