//! One block: attention and mixture of experts, each between two hyper-connection sites.

use fathom_core::{LayerKind, RouterKind};
use fathom_ops::traits::{HcMix, HcPre};
use fathom_ops::{Communicator, OpError, Ops};

use crate::attention::Attention;
use crate::hyper_connection::Site;
use crate::load::Loader;
use crate::moe::Moe;
use crate::{ModelError, Probe, Seen};

/// What every layer of one pass works with.
pub struct Pass<'a, O: Ops> {
    /// The device.
    pub ops: &'a O,
    /// The rows: tokens, and where they stand in their sequences.
    pub step: &'a O::Step,
    /// All cache stores of this rank.
    pub cache: &'a mut O::Cache,
    /// The other ranks.
    pub comm: &'a dyn Communicator,
    /// Who watches.
    pub probe: &'a mut dyn Probe<O>,
}

impl<O: Ops> Pass<'_, O> {
    /// Shows the probe what `layer` produced.
    ///
    /// # Errors
    /// What the probe fails with.
    pub fn see(&mut self, layer: usize, seen: Seen<'_, O>) -> Result<(), OpError> {
        self.probe.see(self.ops, layer, seen)
    }

    /// The rows of `tensor [T, ..]` whose logits are wanted.
    ///
    /// # Errors
    /// What the operator fails with.
    pub fn wanted(&self, tensor: O::Tensor) -> Result<O::Tensor, OpError> {
        Ok(self.ops.wanted_rows(&tensor, self.step)?.unwrap_or(tensor))
    }
}

/// `Block` of the official code.
#[derive(Debug)]
pub struct Block<O: Ops> {
    /// Site and norm before attention.
    pub hc_attn: Site<O>,
    /// Attention.
    pub attn: Attention<O>,
    /// Site and norm before the mixture of experts.
    pub hc_ffn: Site<O>,
    /// Mixture of experts.
    pub ffn: Moe<O>,
}

impl<O: Ops> Block<O> {
    /// Loads the block at `prefix` (`layers.{l}` or `mtp.{i}`).
    pub(crate) fn load(
        loader: &Loader<'_, O>,
        prefix: &str,
        kind: LayerKind,
        router: RouterKind,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            hc_attn: Site::load(loader, prefix, "attn")?,
            attn: Attention::load(loader, prefix, kind)?,
            hc_ffn: Site::load(loader, prefix, "ffn")?,
            ffn: Moe::load(loader, prefix, router)?,
        })
    }

    /// Runs both sublayers from the attention input `pre`. The second sublayer's output is
    /// returned, not yet added to `x`: that is one operator with the next block's beginning.
    fn forward(
        &self,
        pass: &mut Pass<'_, O>,
        layer: usize,
        x: &mut O::Tensor,
        pre: &HcPre<O::Tensor>,
    ) -> Result<(O::Tensor, HcMix<O::Tensor>), ModelError> {
        pass.see(layer, Seen::AttnIn(&pre.normed))?;
        let y = self.attn.forward(pass, layer, &pre.normed, Outcome::All)?;
        pass.see(layer, Seen::AttnOut(&y))?;

        let pre = self.hc_ffn.follow(pass.ops, x, &y, &pre.mix, pass.step)?;
        pass.see(layer, Seen::FfnIn(&pre.normed))?;
        let y = self.ffn.forward(pass, layer, &pre.normed)?;
        pass.see(layer, Seen::FfnOut(&y))?;
        Ok((y, pre.mix))
    }

    /// [`forward`](Self::forward) of the last block: what follows the cache rows, for the rows whose
    /// logits are wanted alone. Their copies `[W, 4 * D]`.
    fn finish(
        &self,
        pass: &mut Pass<'_, O>,
        layer: usize,
        x: O::Tensor,
        pre: HcPre<O::Tensor>,
    ) -> Result<O::Tensor, ModelError> {
        let y = self.attn.forward(pass, layer, &pre.normed, Outcome::Wanted)?;
        let mut x = pass.wanted(x)?;
        if pass.ops.shape(&x).0 == 0 {
            return Ok(x);
        }
        let HcMix { post, comb } = pre.mix;
        let mix = HcMix { post: pass.wanted(post)?, comb: pass.wanted(comb)? };
        let pre = self.hc_ffn.follow(pass.ops, &mut x, &y, &mix, pass.step)?;
        let y = self.ffn.forward(pass, layer, &pre.normed)?;
        Ok(pass.ops.hc_post(&x, &y, &pre.mix)?)
    }
}

/// Rows that anybody looks at after the last block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All.
    All,
    /// Those whose logits are wanted; there may be none.
    Wanted,
}

/// Runs `blocks`, each with the number of its layer, over the copies `x [T, 4 * D]`: the copies of the
/// rows of `outcome`. Every row of the step enters the cache of every block.
///
/// # Errors
/// What the operators or the probe fail with.
pub fn run_blocks<'b, O: Ops>(
    blocks: impl IntoIterator<Item = (usize, &'b Block<O>)>,
    pass: &mut Pass<'_, O>,
    mut x: O::Tensor,
    outcome: Outcome,
) -> Result<O::Tensor, ModelError> {
    let mut blocks = blocks.into_iter().peekable();
    let Some((_, first)) = blocks.peek() else { return Ok(x) };
    let mut pre = first.hc_attn.enter(pass.ops, &x)?;
    while let Some((layer, block)) = blocks.next() {
        if outcome == Outcome::Wanted && blocks.peek().is_none() {
            return block.finish(pass, layer, x, pre);
        }
        let (y, mix) = block.forward(pass, layer, &mut x, &pre)?;
        if let Some((_, next)) = blocks.peek() {
            pre = next.hc_attn.follow(pass.ops, &mut x, &y, &mix, pass.step)?;
        } else {
            x = pass.ops.hc_post(&x, &y, &mix)?;
        }
        pass.see(layer, Seen::BlockOut(&x))?;
    }
    Ok(x)
}
