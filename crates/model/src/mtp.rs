//! The MTP block: predicts the token after the next one from the model's last copies.
//!
//! At target position `t` it reads the copies `X_t` and the embedding of token `t + 1`; its logits
//! predict token `t + 2`. For a further draft it reads its own output copies at `t + 1`.
//! It shares the embedding and the output head with the model.
//!
//! Not here: which rows to run when, what to do with drafts (`fathom-engine`).

use fathom_core::{LayerKind, RouterKind};
use fathom_ops::Ops;
use fathom_ops::layer::MtpInputWeights;

use crate::block::{Block, Outcome, run_blocks};
use crate::head::Head;
use crate::load::Loader;
use crate::{ModelError, Pass};

/// `MTPBlock` of the official code.
#[derive(Debug)]
pub struct MtpBlock<O: Ops> {
    /// Index of its cache: main layers come first.
    pub layer: usize,
    /// `enorm`, `hnorm`, `e_proj`, `h_proj`.
    pub input: MtpInputWeights<O>,
    /// The block itself; the only element.
    pub block: [Block<O>; 1],
    /// Its own collapse and norm.
    pub head: Head<O>,
}

impl<O: Ops> MtpBlock<O> {
    /// Loads MTP block `index`.
    pub(crate) fn load(loader: &Loader<'_, O>, index: usize) -> Result<Self, ModelError> {
        let prefix = format!("mtp.{index}");
        let input = MtpInputWeights {
            enorm: loader.norm(&format!("{prefix}.enorm"))?,
            hnorm: loader.norm(&format!("{prefix}.hnorm"))?,
            e_proj: loader.linear(&format!("{prefix}.e_proj.weight"))?,
            h_proj: loader.linear(&format!("{prefix}.h_proj.weight"))?,
        };
        let layer = loader.config().num_hidden_layers + index;
        let kind: LayerKind = loader.config().layer_kind(layer);
        let block = Block::load(loader, &prefix, kind, RouterKind::Score)?;
        let head = Head::load(loader, &format!("{prefix}."))?;
        Ok(Self { layer, input, block: [block], head })
    }

    /// The block's output copies `[T, 4 * D]` from the copies `x [T, 4 * D]`; the tokens of the
    /// pass's step are each row's *next* tokens.
    ///
    /// # Errors
    /// What the operators or the probe fail with.
    pub fn forward(
        &self,
        pass: &mut Pass<'_, O>,
        embed: &O::Linear,
        x: &O::Tensor,
    ) -> Result<O::Tensor, ModelError> {
        let x0 = pass.ops.mtp_input(&self.input, embed, pass.step, x)?;
        run_blocks([(self.layer, &self.block[0])], pass, x0, Outcome::All)
    }
}
