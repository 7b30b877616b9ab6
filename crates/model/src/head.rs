//! From the four copies to logits: `hc_head`, final norm, output head.

use fathom_ops::layer::{HcHead, Norm};
use fathom_ops::{Communicator, OpError, Ops};

use crate::ModelError;
use crate::block::Outcome;
use crate::load::Loader;

/// The collapse of the copies and the norm after it; the model and each MTP block have their own.
/// The output head, which they share, is passed in.
#[derive(Debug)]
pub struct Head<O: Ops> {
    /// Mixing weights.
    pub hc_head: HcHead<O>,
    /// `norm`.
    pub norm: Norm<O>,
}

impl<O: Ops> Head<O> {
    /// Loads the head at `prefix`: empty for the model, `mtp.{i}.` for an MTP block.
    pub(crate) fn load(loader: &Loader<'_, O>, prefix: &str) -> Result<Self, ModelError> {
        let config = loader.config();
        let hc_head = HcHead {
            function: loader.linear(&format!("{prefix}hc_head_fn"))?,
            base: loader.vector(&format!("{prefix}hc_head_base"))?,
            scale: loader.vector(&format!("{prefix}hc_head_scale"))?,
            hc_eps: config.hc_eps,
            norm_eps: config.rms_norm_eps,
        };
        Ok(Self { hc_head, norm: loader.norm(&format!("{prefix}norm"))? })
    }

    /// f32 logits `[W, V]` of the rows that `step` wants, at least one; `x [.., 4 * D]` are the copies of
    /// the rows of `outcome`.
    ///
    /// # Errors
    /// What the operators fail with.
    pub fn logits(
        &self,
        ops: &O,
        head: &O::Linear,
        x: &O::Tensor,
        outcome: Outcome,
        step: &O::Step,
        comm: &dyn Communicator,
    ) -> Result<O::Tensor, OpError> {
        let selected = match outcome {
            Outcome::All => ops.wanted_rows(x, step)?,
            Outcome::Wanted => None,
        };
        let hidden = ops.hc_head(selected.as_ref().unwrap_or(x), &self.hc_head, &self.norm)?;
        ops.logits(head, &hidden, comm)
    }
}
