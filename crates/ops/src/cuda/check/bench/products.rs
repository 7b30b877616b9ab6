//! Products with weights: linear layers, projections of attention, router and experts.

use std::sync::Arc;

use fathom_core::LayerKind;
use fathom_core::parallel::ExpertShard;

use super::super::layers::{Shape as LayerShape, weights};
use super::Bench;
use super::shapes::{Operator, Shape, compressor_rows};
use crate::cuda::CudaOps;
use crate::cuda::linear::Part;
use crate::cuda::tensor::Element;
use crate::layer::{MoeWeights, Router, SharedExpert};
use crate::traits::{AttentionOps, HeadOps, MoeOps, Projected};
use crate::{Backend, OpError, Solo};

impl Bench<'_, '_> {
    pub(super) fn fp8_linear(
        &mut self,
        shapes: &[Shape],
        (n, k): (usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let source = self.random.fp8(n, k)?;
        let matrices = self.copies(n * k, || ops.load_linear(&source))?;
        for &shape in shapes {
            let x = self.drawn(shape.rows, k)?;
            self.time(shape, matrices.len(), &mut |copy| {
                ops.quantised_linear(&matrices[copy], &x).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn bf16_linear(
        &mut self,
        shapes: &[Shape],
        (n, k): (usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let source = self.random.bf16(n, k)?;
        let matrices = self.copies(2 * n * k, || ops.load_linear(&source))?;
        for &shape in shapes {
            let x = self.drawn(shape.rows, k)?;
            self.time(shape, matrices.len(), &mut |copy| {
                ops.logits(&matrices[copy], &x, &Solo).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn compressor_inputs(
        &mut self,
        shapes: &[Shape],
        (width, kind, index_heads): (usize, LayerKind, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let rows = compressor_rows(kind, index_heads);
        let bytes = 2 * width * rows.iter().sum::<usize>();
        let mut layers = Vec::new();
        for _ in 0..self.n_copies(bytes) {
            let mut matrices = Vec::new();
            for (number, &n) in rows.iter().enumerate() {
                let element = if number == 4 { Element::Bf16 } else { Element::F32 };
                matrices.push((ops.load_linear(&self.random.bf16(n, width)?)?, element));
            }
            layers.push(matrices);
        }
        for &shape in shapes {
            let x = self.drawn(shape.rows, width)?;
            self.time(shape, layers.len(), &mut |layer| {
                ops.linear_each(&layers[layer], &x).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn grouped_output(
        &mut self,
        shapes: &[Shape],
        (n_groups, rank, group_width): (usize, usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let source = self.random.fp8(n_groups * rank, group_width)?;
        let matrices = self.copies(n_groups * rank * group_width, || ops.load_linear(&source))?;
        for &shape in shapes {
            let o = self.drawn(shape.rows, n_groups * group_width)?;
            let z = ops.tensor(shape.rows, n_groups * rank, Element::Bf16)?;
            self.time(shape, matrices.len(), &mut |copy| {
                ops.linear_part(&matrices[copy], Part { n_rows: rank, n_groups }, &o, &z)
            })?;
        }
        Ok(())
    }

    pub(super) fn queries(
        &mut self,
        shapes: &[Shape],
        (rank, heads, index_heads): (usize, usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let kind = if index_heads == 0 { LayerKind::Hca } else { LayerKind::Csa };
        // What is not timed is small.
        let shape = LayerShape {
            width: 128,
            rank,
            heads,
            groups: 1,
            group_rank: 128,
            index_heads,
            top_k: 1,
        };
        let bytes = rank * (heads * 512 + index_heads * 128);
        let random = self.random.clone();
        let layers = self.copies(bytes, || weights(ops, random.clone(), kind, shape))?;
        for &shape in shapes {
            let projected = Projected {
                qr: self.drawn(shape.rows, rank)?,
                kv: self.drawn(1, 1)?,
                compressor: None,
                index_compressor: None,
                index_weights: None,
            };
            let step = self.tokens(shape.rows, 1)?;
            self.time(shape, layers.len(), &mut |layer| {
                ops.attn_queries(&layers[layer], &projected, &step).map(drop)
            })?;
        }
        Ok(())
    }

    /// A mixture of experts whose gate and shared expert can be others.
    fn mixture(
        &mut self,
        (width, channels): (usize, usize),
        (n_experts, top_k): (usize, usize),
        table_tokens: usize,
    ) -> Result<MoeWeights<CudaOps>, OpError> {
        let ops = self.ops;
        let random = &mut self.random;
        let (up, down) = (random.fp4(channels, width)?, random.fp4(width, channels)?);
        let all: Vec<_> = (0..n_experts).map(|_| [up.clone(), up.clone(), down.clone()]).collect();
        let router = if table_tokens == 0 {
            Router::Score(random.vector(ops, n_experts, 0.0)?)
        } else {
            let mut ids = Vec::with_capacity(table_tokens * top_k);
            for _ in 0..table_tokens {
                // Different ones.
                let first = random.below(n_experts);
                ids.extend((0..top_k).map(|n| ((first + n) % n_experts) as u16));
            }
            Router::Hash(ops.load_expert_table(&ids, top_k)?)
        };
        Ok(MoeWeights {
            gate: ops.load_linear(&random.bf16(n_experts, width)?)?,
            router,
            experts: ops.load_experts(&all, 0, n_experts)?,
            shard: ExpertShard { experts: 0..n_experts, channels: 0..channels },
            experts_are_slices: false,
            shared: self.shared(width, channels)?,
            top_k,
            routed_scaling_factor: 1.5,
            swiglu_limit: Some(10.0),
        })
    }

    fn shared(&mut self, width: usize, channels: usize) -> Result<SharedExpert<CudaOps>, OpError> {
        let ops = self.ops;
        Ok(SharedExpert {
            w1: ops.load_linear(&self.random.fp8(channels, width)?)?,
            w3: ops.load_linear(&self.random.fp8(channels, width)?)?,
            w2: ops.load_linear(&self.random.fp8(width, channels)?)?,
            is_slice: false,
        })
    }

    pub(super) fn router(
        &mut self,
        shapes: &[Shape],
        (width, n_experts, top_k): (usize, usize, usize),
        table_tokens: usize,
    ) -> Result<(), OpError> {
        let ops = self.ops;
        // Experts are only counted here.
        let one = self.mixture((width, 128), (n_experts, top_k), table_tokens)?;
        let source = self.random.bf16(n_experts, width)?;
        let gates = self.copies(2 * n_experts * width, || ops.load_linear(&source))?;
        let of = |gate| MoeWeights { gate, ..one.clone() };
        let mixtures: Vec<_> = gates.into_iter().map(of).collect();
        for &shape in shapes {
            let x = self.drawn(shape.rows, width)?;
            let step = self.tokens(shape.rows, table_tokens.max(1))?;
            self.time(shape, mixtures.len(), &mut |n| {
                ops.routed(&mixtures[n], &x, &step, Some(&mixtures[n].experts)).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn experts(&mut self, shapes: &[Shape]) -> Result<(), OpError> {
        let ops = self.ops;
        let Some(Operator::Experts { width, channels, n_experts, top_k }) =
            shapes.first().map(|shape| shape.operator)
        else {
            return Ok(());
        };
        let weights = Arc::new(self.mixture((width, channels), (n_experts, top_k), 0)?);
        for &shape in shapes {
            let rows = shape.rows;
            // Few tokens reach few experts: others each time.
            let n_inputs = if rows <= 8 { 16 } else { 2 };
            let step = self.tokens(rows, 1)?;
            let mut inputs = Vec::new();
            for _ in 0..n_inputs {
                let x = self.drawn(rows, width)?;
                // Grouped where the router of a model has done that.
                let routing = ops.routed(&weights, &x, &step, Some(&weights.experts))?;
                inputs.push((x, routing));
            }
            self.time(shape, n_inputs, &mut |input| {
                let (x, routing) = &inputs[input];
                ops.moe(&weights, x, routing, &Solo).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn shared_expert(
        &mut self,
        shapes: &[Shape],
        (width, channels): (usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let source = MoeWeights {
            shared: self.shared(width, channels)?,
            ..self.mixture((width, 128), (8, 1), 0)?
        };
        let mut mixtures = Vec::new();
        for _ in 0..self.n_copies(3 * width * channels) {
            mixtures.push(MoeWeights { shared: self.shared(width, channels)?, ..source.clone() });
        }
        for &shape in shapes {
            let x = self.drawn(shape.rows, width)?;
            self.time(shape, mixtures.len(), &mut |n| {
                let input = ops.linear_input(&x)?;
                ops.shared_expert(&mixtures[n], &input, 10.0).map(drop)
            })?;
        }
        Ok(())
    }
}
