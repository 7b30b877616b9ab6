//! Collectives between the ranks of one model.
//!
//! Sums are taken in rank order in f32 on every rank, so all ranks hold the same bits and a run
//! repeats exactly.
//!
//! Not here: device collectives over NCCL, which a CUDA backend brings.

mod local;

pub use local::LocalComm;

use std::fmt::Debug;

use fathom_core::{Group, Rank};

use crate::OpError;

/// What a rank can do together with the others. Every rank must call the same collectives in the
/// same order.
pub trait Communicator: Debug + Send + Sync {
    /// This rank's place.
    fn rank(&self) -> Rank;

    /// Replaces `values` on every rank of the group by the sum over its ranks, in rank order.
    ///
    /// # Errors
    /// [`OpError::RankLost`] if another rank of the group is gone.
    fn all_reduce_sum(&self, group: Group, values: &mut [f32]) -> Result<(), OpError>;

    /// Concatenates `values` of all ranks of the group, in rank order.
    ///
    /// # Errors
    /// [`OpError::RankLost`] if another rank of the group is gone.
    fn all_gather(&self, group: Group, values: &[f32]) -> Result<Vec<f32>, OpError>;
}

/// The only rank of an unsharded model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> Rank {
        Rank::solo()
    }

    fn all_reduce_sum(&self, _group: Group, _values: &mut [f32]) -> Result<(), OpError> {
        Ok(())
    }

    fn all_gather(&self, _group: Group, values: &[f32]) -> Result<Vec<f32>, OpError> {
        Ok(values.to_vec())
    }
}
