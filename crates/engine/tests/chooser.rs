//! A runner that chooses tokens where the engine says how, as a device does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fathom_engine::{
    HostWork, RunnerCapacity, ScriptedRunner, StepError, StepInput, StepOutput, StepRunner,
};
use fathom_ops::sample::{ChoiceScratch, choose_token};

use crate::support::VOCABULARY;

/// Chooses for two rows of three and leaves the others, as a device leaves rows that it cannot
/// choose for.
pub(crate) struct Chooser {
    runner: ScriptedRunner,
    scratch: ChoiceScratch,
    n_chosen: Arc<AtomicU64>,
}

impl Chooser {
    /// Counts the rows that it chooses for in `n_chosen`.
    pub(crate) fn new(runner: ScriptedRunner, n_chosen: &Arc<AtomicU64>) -> Self {
        Self { runner, scratch: ChoiceScratch::default(), n_chosen: Arc::clone(n_chosen) }
    }
}

impl StepRunner for Chooser {
    fn capacity(&self) -> RunnerCapacity {
        self.runner.capacity()
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError> {
        self.runner.step(input, output)
    }

    /// As a device: the host is asked, and does the rest, when the model's work is under way.
    fn step_beside(
        &mut self,
        input: &Arc<StepInput>,
        output: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        self.step(input, output)?;
        let choices = host.choices();
        assert_eq!(choices.len(), input.batch.logit_rows.len(), "a choice per wanted row");
        let mut left = Vec::new();
        let rows = output.logits.chunks_exact_mut(VOCABULARY as usize);
        for (index, (logits, choice)) in rows.zip(&choices).enumerate() {
            let choice = choice.as_ref().filter(|_| index % 3 != 2).map(|choice| {
                self.n_chosen.fetch_add(1, Ordering::Relaxed);
                choose_token(&choice.borrowed(), logits, &mut self.scratch)
            });
            if choice.is_none() {
                left.extend_from_slice(logits);
            }
            output.choices.push(choice);
        }
        output.logits = left;
        host.rest();
        Ok(())
    }

    fn max_drafts(&self) -> u32 {
        self.runner.max_drafts()
    }

    fn reset(&mut self) -> Result<(), StepError> {
        self.runner.reset()
    }
}
