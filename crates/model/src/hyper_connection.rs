//! Hyper-connection sites: where a sublayer reads from the four copies and writes back.
//!
//! A site is kept with the norm of its sublayer, because the end of one sublayer and the
//! beginning of the next (`hc_post`, `hc_pre`, norm) are one operator.

use fathom_ops::layer::{HcSite, Norm};
use fathom_ops::traits::{HcMix, HcPre};
use fathom_ops::{OpError, Ops};

use crate::ModelError;
use crate::load::Loader;

/// A site (`hc_attn_*` or `hc_ffn_*`) and the norm between it and its sublayer.
#[derive(Debug)]
pub struct Site<O: Ops> {
    /// Mixing weights.
    pub hc: HcSite<O>,
    /// `attn_norm` or `ffn_norm`.
    pub norm: Norm<O>,
}

impl<O: Ops> Site<O> {
    /// Loads the site `name` (`attn` or `ffn`) of the block at `prefix`.
    pub(crate) fn load(
        loader: &Loader<'_, O>,
        prefix: &str,
        name: &str,
    ) -> Result<Self, ModelError> {
        let config = loader.config();
        let hc = HcSite {
            function: loader.linear(&format!("{prefix}.hc_{name}_fn"))?,
            base: loader.vector(&format!("{prefix}.hc_{name}_base"))?,
            scale: loader.vector(&format!("{prefix}.hc_{name}_scale"))?,
            sinkhorn_iters: config.hc_sinkhorn_iters,
            hc_eps: config.hc_eps,
            norm_eps: config.rms_norm_eps,
        };
        Ok(Self { hc, norm: loader.norm(&format!("{prefix}.{name}_norm"))? })
    }

    /// The sublayer's input from the copies `x [T, 4 * D]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    pub fn enter(&self, ops: &O, x: &O::Tensor) -> Result<HcPre<O::Tensor>, OpError> {
        ops.hc_pre(x, &self.hc, &self.norm)
    }

    /// Adds the previous sublayer's output `y` back to `x`, then [`enter`](Self::enter)s.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    pub fn follow(
        &self,
        ops: &O,
        x: &mut O::Tensor,
        y: &O::Tensor,
        mix: &HcMix<O::Tensor>,
        step: &O::Step,
    ) -> Result<HcPre<O::Tensor>, OpError> {
        ops.hc_boundary(x, y, mix, (&self.hc, &self.norm), step)
    }
}
