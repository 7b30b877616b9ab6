//! Choosing tokens where the logits are.
//!
//! A backend that can do so hands back a few bytes per row instead of a row of logits; what it cannot
//! choose for, it hands back as logits, row by row. The others hand back all logits.
//!
//! Not here: the kernels' launchers (`cuda::choose`).

use super::{Choice, RowChoice};
use crate::{Backend, OpError};

/// What a backend hands back of rows of logits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chosen {
    /// One per row, `None` where its logits are below; empty where all are.
    pub choices: Vec<Option<Choice>>,
    /// `[rows without a choice, vocab]` f32, in their order.
    pub logits: Vec<f32>,
}

/// What a host can do while a device works.
pub type Beside<'a> = dyn FnMut() + Send + 'a;

/// Choosing tokens on a device.
pub trait ChoiceOps: Backend {
    /// Whether [`choose_rows`](Self::choose_rows) chooses any. If not, nobody need say how.
    fn chooses_tokens(&self) -> bool {
        false
    }

    /// Whether operators return before the device is done, so that time passes until
    /// [`choose_rows`](Self::choose_rows) has what it waits for.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Tokens for the rows of `logits [n, V]` f32 that have a choice in `rows`, as
    /// [`choose_token`](super::choose_token) gives them; logits of the others, and of those that
    /// this backend cannot choose for. With no `rows` at all, logits of every row. Before waiting for
    /// the device it calls `beside`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if there is another number of rows or a mask has the wrong length;
    /// [`OpError`] if the device failed.
    fn choose_rows(
        &self,
        logits: &Self::Tensor,
        rows: &[Option<RowChoice<'_>>],
        beside: &mut Beside<'_>,
    ) -> Result<Chosen, OpError> {
        let _ = rows;
        beside();
        Ok(Chosen { choices: Vec::new(), logits: self.download(logits)? })
    }
}
