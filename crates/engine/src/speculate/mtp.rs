//! Drafts of the model's MTP block.
//!
//! The block reads the target's own copies of the last row and the token sampled after it, and so
//! must run where the model runs: this only says for which sequences. Every draft is chosen from the
//! block's logits as the request would choose from the target's, with the noise of the draft's
//! position, so that at any temperature the two agree as often as their distributions allow.
//!
//! Not here: the block's rows and its window ([`crate::rank`]), penalties and constraints, which the
//! target alone applies.

use std::sync::Arc;

use fathom_core::TokenId;
use fathom_ops::sample::Beside;

use super::{DraftRequest, Drafter};
use crate::runner::{DraftInput, StepError, StepRunner};

/// Asks the runner's draft model.
#[derive(Debug, Default)]
pub struct MtpDrafter {
    input: Arc<Vec<DraftInput>>,
}

impl Drafter for MtpDrafter {
    fn draft(
        &mut self,
        requests: &[DraftRequest<'_>],
        runner: &mut dyn StepRunner,
        drafts: &mut [Vec<TokenId>],
        beside: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        // Ranks may still hold the previous input; then this makes a new one.
        if Arc::get_mut(&mut self.input).is_none() {
            self.input = Arc::default();
        }
        let input = Arc::get_mut(&mut self.input).expect("nobody else has a new input");
        input.clear();
        for request in requests {
            let (Some(&token), position) = (request.tokens.last(), request.tokens.len() - 1) else {
                continue;
            };
            input.push(DraftInput {
                slot: request.slot,
                position: position as u32,
                token,
                n_drafts: request.n_drafts,
                sampling: Arc::clone(request.sampling),
            });
        }
        runner.draft(&self.input, drafts, beside)
    }
}
