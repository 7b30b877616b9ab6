//! The mixture of experts of one block: gate, routed experts of this rank, shared expert.

use fathom_core::RouterKind;
use fathom_ops::layer::{MoeWeights, Router, SharedExpert};
use fathom_ops::{Ops, WeightSource};

use crate::load::Loader;
use crate::probe::Seen;
use crate::{ModelError, Pass};

/// `MoE` of the official code, with its `Gate` and `Expert`s.
#[derive(Debug)]
pub struct Moe<O: Ops> {
    /// Weights of this rank.
    pub weights: MoeWeights<O>,
}

impl<O: Ops> Moe<O> {
    /// Loads the mixture of experts of the block at `prefix`.
    pub(crate) fn load(
        loader: &Loader<'_, O>,
        prefix: &str,
        router: RouterKind,
    ) -> Result<Self, ModelError> {
        let (config, ops) = (loader.config(), loader.ops());
        let ffn = format!("{prefix}.ffn");
        let (n_experts, width) = (config.n_routed_experts, config.moe_intermediate_size);
        let shard = loader.rank().expert_shard(n_experts, width)?;
        let experts: Vec<[WeightSource; 3]> = shard
            .experts
            .clone()
            .map(|id| {
                let matrix = |name| loader.matrix(&format!("{ffn}.experts.{id}.{name}.weight"));
                Ok([
                    matrix("w1")?.slice_rows(shard.channels.clone())?,
                    matrix("w3")?.slice_rows(shard.channels.clone())?,
                    matrix("w2")?.slice_cols(shard.channels.clone())?,
                ])
            })
            .collect::<Result<_, ModelError>>()?;
        let router = match router {
            RouterKind::Hash => {
                let table = loader.expert_table(&format!("{ffn}.gate.tid2eid"))?;
                Router::Hash(ops.load_expert_table(&table, config.num_experts_per_tok)?)
            }
            RouterKind::Score => Router::Score(loader.vector(&format!("{ffn}.gate.bias"))?),
        };
        let weights = MoeWeights {
            gate: loader.linear(&format!("{ffn}.gate.weight"))?,
            router,
            experts: ops.load_experts(&experts, shard.experts.start, n_experts)?,
            experts_are_slices: shard.channels.len() < width,
            shard,
            shared: load_shared(loader, &format!("{ffn}.shared_experts"))?,
            top_k: config.num_experts_per_tok,
            routed_scaling_factor: config.routed_scaling_factor,
            swiglu_limit: config.swiglu_limit,
        };
        Ok(Self { weights })
    }

    /// Experts' output for `x [T, D]`, the normalised input.
    ///
    /// # Errors
    /// What the operators fail with.
    pub fn forward(
        &self,
        pass: &mut Pass<'_, O>,
        layer: usize,
        x: &O::Tensor,
    ) -> Result<O::Tensor, ModelError> {
        let (routing, out) = pass.ops.route_and_moe(&self.weights, x, pass.step, pass.comm)?;
        pass.see(layer, Seen::Routing(&routing))?;
        Ok(out)
    }
}

/// The shared expert: sliced over the TP group where its width divides into whole quantisation
/// blocks, else replicated.
fn load_shared<O: Ops>(
    loader: &Loader<'_, O>,
    prefix: &str,
) -> Result<SharedExpert<O>, ModelError> {
    let width = loader.config().moe_intermediate_size;
    let is_alone = loader.rank().config().tensor == 1;
    let slice = if is_alone { None } else { loader.rank().intermediate_shard(width) };
    let channels = slice.clone().unwrap_or(0..width);
    let matrix = |name| loader.matrix(&format!("{prefix}.{name}.weight"));
    let ops = loader.ops();
    Ok(SharedExpert {
        w1: ops.load_linear(&matrix("w1")?.slice_rows(channels.clone())?)?,
        w3: ops.load_linear(&matrix("w3")?.slice_rows(channels.clone())?)?,
        w2: ops.load_linear(&matrix("w2")?.slice_cols(channels)?)?,
        is_slice: slice.is_some(),
    })
}
