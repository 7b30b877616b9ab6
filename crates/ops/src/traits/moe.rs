//! Operators of the mixture of experts.
//!
//! Not here: which experts a rank holds (`layer::MoeWeights`).

use super::Backend;
use crate::layer::MoeWeights;
use crate::{Communicator, OpError};

/// The mixture of experts.
pub trait MoeOps: Backend {
    /// Chooses experts and weights for each row; hash layers choose by the row's token. Source:
    /// `Gate.forward`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn route(
        &self,
        weights: &MoeWeights<Self>,
        x: &Self::Tensor,
        step: &Self::Step,
    ) -> Result<Self::Routing, OpError>
    where
        Self: Sized;

    /// Routed experts of all ranks plus the shared expert, `[T, D]`. Source: `MoE.forward`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit; [`OpError::RankLost`] if a rank is gone.
    fn moe(
        &self,
        weights: &MoeWeights<Self>,
        x: &Self::Tensor,
        routing: &Self::Routing,
        comm: &dyn Communicator,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;

    /// [`route`](Self::route), then [`moe`](Self::moe) by it; returns both results. The shared expert
    /// waits for no routing, so a device may run it beside.
    ///
    /// # Errors
    /// What the two fail with.
    fn route_and_moe(
        &self,
        weights: &MoeWeights<Self>,
        x: &Self::Tensor,
        step: &Self::Step,
        comm: &dyn Communicator,
    ) -> Result<(Self::Routing, Self::Tensor), OpError>
    where
        Self: Sized,
    {
        let routing = self.route(weights, x, step)?;
        let out = self.moe(weights, x, &routing, comm)?;
        Ok((routing, out))
    }
}
