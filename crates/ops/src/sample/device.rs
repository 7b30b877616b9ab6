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

/// Choosing tokens on a device.
pub trait ChoiceOps: Backend {
    /// Whether [`choose_rows`](Self::choose_rows) chooses any. If not, nobody need say how.
    fn chooses_tokens(&self) -> bool {
        false
    }

    /// Tokens for the rows of `logits [n, V]` f32 that have a choice in `rows`, as
    /// [`choose_token`](super::choose_token) gives them; logits of the others, and of those that
    /// this backend cannot choose for. With no `rows` at all, logits of every row.
    ///
    /// # Errors
    /// [`OpError::Shape`] if there is another number of rows or a mask has the wrong length;
    /// [`OpError`] if the device failed.
    fn choose_rows(
        &self,
        logits: &Self::Tensor,
        rows: &[Option<RowChoice<'_>>],
    ) -> Result<Chosen, OpError> {
        let _ = rows;
        Ok(Chosen { choices: Vec::new(), logits: self.download(logits)? })
    }
}
