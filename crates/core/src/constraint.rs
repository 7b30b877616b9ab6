//! Constrained decoding as the engine sees it: which tokens are allowed next.

use crate::TokenId;

/// A grammar's state along one sequence.
///
/// Implementations live above the engine (`chat::grammar`); the engine only asks for masks and
/// reports what was sampled.
pub trait TokenConstraint: Send {
    /// Does ahead what the next [`Self::fill_mask`] will need. The engine may call it on another
    /// thread while the model runs; a failure shows when the mask is asked for.
    fn prepare(&mut self) {}

    /// Whether [`Self::prepare`] would do enough to be worth another thread.
    fn needs_preparation(&self) -> bool {
        false
    }

    /// Clears the bit of every token that may not come next. `mask` has one bit per vocabulary
    /// entry, least significant bit first, and comes in with all bits set.
    ///
    /// # Errors
    /// [`ConstraintError`] if the grammar cannot say; the request then fails with its message.
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError>;

    /// Advances by the token that was sampled.
    ///
    /// # Errors
    /// [`ConstraintError`] if the token was not allowed.
    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError>;

    /// Whether nothing but the end-of-sequence token may follow.
    fn is_finished(&self) -> bool;
}

/// A constraint could not be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("constraint: {0}")]
pub struct ConstraintError(pub String);
