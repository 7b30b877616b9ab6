//! The mixture of experts: launchers of `moe`.
//!
//! One rank only so far: slices of experts and foreign experts are refused.

use super::device::Arg;
use super::experts::{DeviceExperts, ExpertFormat, ExpertLayout};
use super::linear::GEMM_SHARED_8;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::DeviceStep;
use super::tensor::{DeviceRouting, DeviceTensor, Element};
use crate::error::check_len;
use crate::layer::{MoeWeights, Router};
use crate::traits::MoeOps;
use crate::{Communicator, OpError};

/// Tokens of one work item.
const ITEM_TOKENS: usize = 8;
/// Experts the grouping kernel has threads for, and its shared memory.
const GROUP_THREADS: usize = 512;
const GROUP_SHARED: u32 = 16 * (2 + 512) * 4;

/// Work items of a step, as `moe_group` makes them.
pub(crate) struct Groups {
    /// `[max_items, 3]` u32 and `[2]` u32.
    pub(crate) items: Buffer,
    pub(crate) n_items: Buffer,
    /// `[max_listed]` u32.
    pub(crate) pairs: Buffer,
    pub(crate) max_items: usize,
    pub(crate) max_listed: usize,
}

impl MoeOps for CudaOps {
    fn route(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<DeviceRouting, OpError> {
        const OP: &str = "route";
        check_len(OP, "tokens", step.n_rows, x.rows)?;
        let (k, n_experts) = (weights.top_k, weights.gate.rows);
        for (what, got, limit) in [("top_k", k, 32.min(n_experts)), ("expert", n_experts, 512)] {
            if got > limit {
                return Err(OpError::OutOfRange { op: OP, what, got, limit });
            }
        }
        let logits = self.linear(&weights.gate, x, Element::F32)?;
        let (ids, chosen) = (self.buffer(4 * x.rows * k)?, self.buffer(4 * x.rows * k)?);
        let (kernel, mut args) = match &weights.router {
            Router::Hash(table) => {
                check_len(OP, "tid2eid", table.k, k)?;
                step.check_tokens(OP, table.n_tokens)?;
                let args =
                    vec![Arg::from(&logits.values), (&table.ids).into(), (&step.tokens).into()];
                ("moe_route_hash", args)
            }
            Router::Score(bias) => {
                check_len(OP, "bias", bias.len, n_experts)?;
                ("moe_route_score", vec![Arg::from(&logits.values), (&bias.values).into()])
            }
        };
        args.extend([Arg::from(&ids), Arg::from(&chosen)]);
        args.extend([x.rows, n_experts, k].map(|n| Arg::U32(n as u32)));
        args.push(weights.routed_scaling_factor.into());
        // SAFETY: logits are [rows, n_experts] f32, both outputs [rows, k]; tokens are inside of
        // the table, whose ids were checked against the expert count with the checkpoint.
        unsafe {
            let grid = [x.rows.div_ceil(4), 1, 1];
            self.launch(Call { kernel, grid, threads: 128, shared_bytes: 0, args: &args })?;
        }
        Ok(DeviceRouting { rows: x.rows, k, ids, weights: chosen })
    }

    fn moe(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        routing: &DeviceRouting,
        comm: &dyn Communicator,
    ) -> Result<DeviceTensor, OpError> {
        let (input, limit) = self.moe_input(weights, x, comm)?;
        check_len("moe", "routing", routing.rows * routing.k, x.rows * weights.top_k)?;
        let shared = || self.shared_expert(weights, &input, limit);
        let routed = || self.routed_experts(&weights.experts, x, routing, limit);
        let (shared, parts) = self.memory.beside(shared, routed)?;
        self.combine(&parts, routing, &shared)
    }

    fn route_and_moe(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        step: &DeviceStep,
        comm: &dyn Communicator,
    ) -> Result<(DeviceRouting, DeviceTensor), OpError> {
        let (input, limit) = self.moe_input(weights, x, comm)?;
        let shared = || self.shared_expert(weights, &input, limit);
        let routed = || {
            let routing = self.route(weights, x, step)?;
            let parts = self.routed_experts(&weights.experts, x, &routing, limit)?;
            Ok::<_, OpError>((routing, parts))
        };
        let (shared, (routing, parts)) = self.memory.beside(shared, routed)?;
        let out = self.combine(&parts, &routing, &shared)?;
        Ok((routing, out))
    }
}

impl CudaOps {
    /// The input of the shared expert, and the bound of the activation.
    fn moe_input(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        comm: &dyn Communicator,
    ) -> Result<(DeviceTensor, f32), OpError> {
        const OP: &str = "moe";
        super::single_rank(OP, comm)?;
        let experts = &weights.experts;
        x.expect(OP, "x", x.rows, experts.width, Element::Bf16)?;
        check_len(OP, "experts on this rank", experts.n_experts, weights.gate.rows)?;
        if experts.n_experts > GROUP_THREADS {
            let (got, limit) = (experts.n_experts, GROUP_THREADS);
            return Err(OpError::OutOfRange { op: OP, what: "expert", got, limit });
        }
        Ok((self.linear_input(x)?, weights.swiglu_limit.unwrap_or(f32::INFINITY)))
    }

    /// The parts of each pair of token and expert, `[n_pairs, width]` bf16.
    fn routed_experts(
        &self,
        experts: &DeviceExperts,
        x: &DeviceTensor,
        routing: &DeviceRouting,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        match &experts.layout {
            ExpertLayout::Rows(format, matrices) => {
                self.experts80(experts, (*format, matrices), x, routing, limit)
            }
            ExpertLayout::Tiles(tiles) => self.experts90(experts, tiles, x, routing, limit),
            ExpertLayout::Maps(maps) => self.experts100(experts, maps, x, routing, limit),
        }
    }

    /// The sum of a token's parts and the shared expert's.
    fn combine(
        &self,
        parts: &DeviceTensor,
        routing: &DeviceRouting,
        shared: &DeviceTensor,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "moe_combine";
        let width = shared.cols;
        parts.expect(OP, "parts", shared.rows * routing.k, width, Element::Bf16)?;
        check_len(OP, "routing", routing.rows, shared.rows)?;
        let out = self.tensor(shared.rows, width, Element::Bf16)?;
        // SAFETY: `parts` and ids have k rows per token, the shared part and `out` one.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [width.div_ceil(1024), shared.rows, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&parts.values).into(),
                    (&routing.ids).into(),
                    (&shared.values).into(),
                    (&out.values).into(),
                    (routing.k as u32).into(),
                    (width as u32).into(),
                ],
            })?;
        }
        Ok(out)
    }

    /// Tokens by expert, for items of up to `item_tokens`; each expert's list of pairs is filled up to
    /// a multiple of `align`.
    pub(crate) fn group_pairs(
        &self,
        experts: &DeviceExperts,
        routing: &DeviceRouting,
        item_tokens: usize,
        align: usize,
    ) -> Result<Groups, OpError> {
        let n_pairs = routing.rows * routing.k;
        // An expert's last item may be partial; there are no more of those than experts or pairs.
        let n_used = experts.n_experts.min(n_pairs);
        let max_items = n_pairs / item_tokens + n_used;
        let max_listed = (n_pairs + (align - 1) * n_used).next_multiple_of(align);
        let (items, n_items) = (self.buffer(12 * max_items)?, self.buffer(8)?);
        let pairs = self.buffer(4 * max_listed)?;
        // SAFETY: ids are [n_pairs]; the outputs hold the most items and listed pairs there can be.
        unsafe {
            self.launch(Call {
                kernel: "moe_group",
                grid: [1; 3],
                threads: GROUP_THREADS as u32,
                shared_bytes: GROUP_SHARED,
                args: &[
                    (&routing.ids).into(),
                    (&items).into(),
                    (&n_items).into(),
                    (&pairs).into(),
                    (n_pairs as u32).into(),
                    (experts.first_id as u32).into(),
                    (experts.n_experts as u32).into(),
                    (item_tokens as u32).into(),
                    (align as u32).into(),
                ],
            })?;
        }
        Ok(Groups { items, n_items, pairs, max_items, max_listed })
    }

    /// The experts' parts of each pair, `[n_pairs, width]` bf16; `x` as it is.
    fn experts80(
        &self,
        experts: &DeviceExperts,
        (format, matrices): (ExpertFormat, &[(Buffer, Buffer); 3]),
        x: &DeviceTensor,
        routing: &DeviceRouting,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        let (width, channels, k) = (experts.width, experts.channels, routing.k);
        let n_pairs = routing.rows * k;
        let Groups { items, n_items, pairs, max_items, .. } =
            self.group_pairs(experts, routing, ITEM_TOKENS, 1)?;
        let input = self.rounded_input(x)?;
        let [(w1, e1), (w3, e3), (w2, e2)] = matrices;
        let (gate_up, down) = match format {
            ExpertFormat::Fp4 => ("moe_gate_up_fp4", "moe_down_fp4"),
            ExpertFormat::Fp8 => ("moe_gate_up_fp8", "moe_down_fp8"),
        };
        let h = self.tensor(n_pairs, channels, Element::Bf16)?;
        // SAFETY: matrices are [n_experts, channels, width]; items name local experts and runs of
        // `pairs`; x has a row per token, h and the weights one per pair.
        unsafe {
            self.launch(Call {
                kernel: gate_up,
                grid: [channels.div_ceil(16), max_items, 1],
                threads: 256,
                shared_bytes: GEMM_SHARED_8,
                args: &[
                    w1.into(),
                    e1.into(),
                    w3.into(),
                    e3.into(),
                    (&items).into(),
                    (&n_items).into(),
                    (&pairs).into(),
                    (&input.values).into(),
                    (&routing.weights).into(),
                    (&h.values).into(),
                    (channels as u32).into(),
                    (width as u32).into(),
                    (k as u32).into(),
                    limit.into(),
                ],
            })?;
        }
        let h = self.rounded_input(&h)?;
        let parts = self.tensor(n_pairs, width, Element::Bf16)?;
        // SAFETY: w2 is [n_experts, width, channels]; h and `parts` have a row per pair.
        unsafe {
            self.launch(Call {
                kernel: down,
                grid: [width.div_ceil(32), max_items, 1],
                threads: 256,
                shared_bytes: GEMM_SHARED_8,
                args: &[
                    w2.into(),
                    e2.into(),
                    (&items).into(),
                    (&n_items).into(),
                    (&pairs).into(),
                    (&h.values).into(),
                    (&parts.values).into(),
                    (width as u32).into(),
                    (channels as u32).into(),
                    0_u32.into(),
                ],
            })?;
        }
        Ok(parts)
    }

    /// The shared expert of `input`, already on the FP8 grid.
    fn shared_expert(
        &self,
        weights: &MoeWeights<Self>,
        input: &DeviceTensor,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "swiglu";
        let gate = self.linear(&weights.shared.w1, input, Element::Bf16)?;
        let up = self.linear(&weights.shared.w3, input, Element::Bf16)?;
        up.expect(OP, "up", gate.rows, gate.cols, Element::Bf16)?;
        check_len(OP, "channels beyond a multiple of 8", gate.cols % 8, 0)?;
        let h = self.tensor(gate.rows, gate.cols, Element::Bf16)?;
        let n = gate.rows * gate.cols;
        // SAFETY: gate, up and h have n bf16 values each, n a multiple of 8.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n.div_ceil(1024), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&gate.values).into(),
                    (&up.values).into(),
                    (&h.values).into(),
                    (n as u32).into(),
                    limit.into(),
                ],
            })?;
        }
        self.quantised_linear(&weights.shared.w2, &h)
    }
}
