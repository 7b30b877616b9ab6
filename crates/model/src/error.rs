//! Why a model cannot be loaded or a step cannot be run.

use fathom_core::ParallelError;
use fathom_ops::OpError;
use fathom_weights::{LoadError, StoredDtype};

/// A model cannot be loaded, or a step failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ModelError {
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    #[error("the model cannot be split over the ranks")]
    Parallel(#[from] ParallelError),
    #[error(transparent)]
    Op(#[from] OpError),
    #[error("`{name}` is {found}, expected {expected}")]
    WrongDtype { name: String, found: StoredDtype, expected: &'static str },
    #[error("`{name}` has {found} dimensions, expected {expected}")]
    WrongRank { name: String, found: usize, expected: usize },
    #[error("the checkpoint has no MTP block, or the model was loaded without it")]
    NoMtp,
    #[error("{n_tokens} tokens were given, but the session holds {limit}: open a longer one")]
    SessionFull { n_tokens: usize, limit: usize },
}
