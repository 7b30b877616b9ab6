//! Looking inside a pass: what the goldens record per layer.
//!
//! A probe is shown references to tensors that exist anyway; nothing is computed or copied unless
//! the probe itself reads one back.

use fathom_ops::{OpError, Ops};

/// Something a layer produced.
#[derive(Debug)]
pub enum Seen<'a, O: Ops> {
    /// Normalised input of attention, `[T, D]`.
    AttnIn(&'a O::Tensor),
    /// Entries the indexer chose for each row (ratio-4 layers).
    Selection(&'a O::Selection),
    /// Output of attention before the hyper-connection, `[T, D]`.
    AttnOut(&'a O::Tensor),
    /// Normalised input of the mixture of experts, `[T, D]`.
    FfnIn(&'a O::Tensor),
    /// Experts and weights of each row.
    Routing(&'a O::Routing),
    /// Output of the mixture of experts before the hyper-connection, `[T, D]`.
    FfnOut(&'a O::Tensor),
    /// The four copies after the block, `[T, 4 * D]`.
    BlockOut(&'a O::Tensor),
}

/// Watches a pass.
pub trait Probe<O: Ops> {
    /// Called once per event, in the order of computation. `layer` counts main layers, then MTP
    /// blocks.
    ///
    /// # Errors
    /// What reading a tensor back fails with; the pass then ends with that error.
    fn see(&mut self, ops: &O, layer: usize, seen: Seen<'_, O>) -> Result<(), OpError>;

    /// Whether anything is looked at. If not, a device may repeat an earlier pass instead of running
    /// operator by operator.
    fn watches(&self) -> bool {
        true
    }
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProbe;

impl<O: Ops> Probe<O> for NoProbe {
    fn see(&mut self, _ops: &O, _layer: usize, _seen: Seen<'_, O>) -> Result<(), OpError> {
        Ok(())
    }

    fn watches(&self) -> bool {
        false
    }
}
