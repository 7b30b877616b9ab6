//! The mixture of experts: launchers of `moe`.
//!
//! One rank only so far: slices of experts and foreign experts are refused.

use super::blackwell::MANY;
use super::device::Arg;
use super::experts::{DeviceExperts, ExpertFormat, ExpertLayout};
use super::linear::{GEMM_ROWS, GEMM_SHARED_8, LinearData, TILED_ROWS, TILED_SHARED, TILED_TOKENS};
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::skinny::resident_bytes;
use super::step::{DeviceStep, ENDED_ROUTER};
use super::tensor::{Addends, DeviceRouting, DeviceTensor, Element};
use super::{blackwell, hopper};
use crate::error::check_len;
use crate::layer::{MoeWeights, Router};
use crate::traits::MoeOps;
use crate::{Activations, Communicator, OpError};

/// Tokens of one work item, where experts have few.
const ITEM_TOKENS: usize = 8;
/// Experts the grouping kernel has threads for, and its shared memory.
const GROUP_THREADS: usize = 512;
const GROUP_SHARED: u32 = 16 * (2 + 512) * 4;

/// Most tokens whose logits, routing and grouping are one launch, most columns of the gate there, its experts
/// of a block, its segments of columns, and its shared memory.
const FEW_ROUTED: usize = 16;
const MAX_GATE_COLUMNS: usize = 8192;
const GATE_ROWS: usize = 16;
const GATE_SEGMENTS: usize = 4;
const GATE_SHARED: u32 = GROUP_SHARED + 4;

/// Work items of a step, as `moe_group` makes them.
#[derive(Debug, Clone)]
pub(crate) struct Groups {
    /// `[max_items, 3]` u32 and `[2]` u32.
    pub(crate) items: Buffer,
    pub(crate) n_items: Buffer,
    /// `[max_listed]` u32.
    pub(crate) pairs: Buffer,
    pub(crate) max_items: usize,
    pub(crate) max_listed: usize,
}

impl Groups {
    fn args(&self) -> [Arg; 3] {
        [(&self.items).into(), (&self.n_items).into(), (&self.pairs).into()]
    }
}

/// Most tokens of an item, and what lists are filled up to a multiple of.
struct Grouping {
    item_tokens: usize,
    align: usize,
}

impl Grouping {
    fn args(&self, experts: &DeviceExperts) -> [Arg; 4] {
        let first = experts.first_id;
        [first, experts.n_experts, self.item_tokens, self.align].map(|n| Arg::U32(n as u32))
    }
}

/// Whether experts have more tokens on average than an item of few holds: `Rows` then takes kernels for many.
const fn has_many(experts: &DeviceExperts, n_pairs: usize) -> bool {
    n_pairs > ITEM_TOKENS * experts.n_experts
}

impl MoeOps for CudaOps {
    fn route(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<DeviceRouting, OpError> {
        self.routed(weights, x, step, None)
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
        self.added(&self.unfinished(parts, routing, shared)?)
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
            let routing = self.routed(weights, x, step, Some(&weights.experts))?;
            let parts = self.routed_experts(&weights.experts, x, &routing, limit)?;
            Ok::<_, OpError>((routing, parts))
        };
        let (shared, (routing, parts)) = self.memory.beside(shared, routed)?;
        // Who reads the sum adds it up.
        let out = self.unfinished(parts, &routing, shared)?;
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

    /// The shared expert's output, to which the parts of each token are to be added.
    fn unfinished(
        &self,
        parts: DeviceTensor,
        routing: &DeviceRouting,
        shared: DeviceTensor,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "moe";
        let k = routing.k;
        parts.expect(OP, "parts", shared.rows * k, shared.cols, Element::Bf16)?;
        check_len(OP, "routing", routing.rows, shared.rows)?;
        let addends = Some(Addends { parts: parts.values, order: routing.order.clone(), k });
        Ok(DeviceTensor { addends, quantised: None, ..shared })
    }

    /// `tensor` with what was still to be added to it.
    pub(crate) fn added(&self, tensor: &DeviceTensor) -> Result<DeviceTensor, OpError> {
        const OP: &str = "moe_combine";
        let Some(Addends { parts, order, k }) = &tensor.addends else { return Ok(tensor.clone()) };
        let (rows, width) = (tensor.rows, tensor.cols);
        let out = self.tensor(rows, width, Element::Bf16)?;
        // SAFETY: `parts` and `order` have k rows per token, the tensor and `out` one.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [width.div_ceil(1024), rows, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    parts.into(),
                    order.into(),
                    (&tensor.values).into(),
                    (&out.values).into(),
                    (*k as u32).into(),
                    (width as u32).into(),
                ],
            })?;
        }
        Ok(out)
    }

    /// Experts and weights for each row; with `experts`, few rows are grouped for them at once.
    pub(crate) fn routed(
        &self,
        weights: &MoeWeights<Self>,
        x: &DeviceTensor,
        step: &DeviceStep,
        experts: Option<&DeviceExperts>,
    ) -> Result<DeviceRouting, OpError> {
        const OP: &str = "route";
        let tokens = &step.rows(OP, x.rows)?.tokens;
        let gate = &weights.gate;
        let (rows, k, n_experts) = (x.rows, weights.top_k, gate.rows);
        for (what, got, limit) in [("top_k", k, 32.min(n_experts)), ("expert", n_experts, 512)] {
            if got > limit {
                return Err(OpError::OutOfRange { op: OP, what, got, limit });
            }
        }
        let [ids, chosen, order] =
            [self.buffer(4 * rows * k)?, self.buffer(4 * rows * k)?, self.buffer(4 * rows * k)?];
        let (mut choice, by_hash) = match &weights.router {
            Router::Hash(table) => {
                check_len(OP, "tid2eid", table.k, k)?;
                step.check_tokens(OP, table.n_tokens)?;
                (vec![Arg::from(&table.ids), tokens.into()], true)
            }
            Router::Score(bias) => {
                check_len(OP, "bias", bias.len, n_experts)?;
                (vec![Arg::from(&bias.values)], false)
            }
        };
        choice.extend([Arg::from(&ids), Arg::from(&order), Arg::from(&chosen)]);
        choice.extend([rows, n_experts, k].map(|n| Arg::U32(n as u32)));
        choice.push(weights.routed_scaling_factor.into());
        let are_few = rows <= FEW_ROUTED && gate.cols <= MAX_GATE_COLUMNS;
        if let (Some(experts), LinearData::Bf16(values), true) = (experts, &gate.data, are_few) {
            x.expect(OP, "x", rows, gate.cols, Element::Bf16)?;
            let groups = self.room_for_groups(experts, rows * k, rows)?;
            let sums = self.tensor(rows, GATE_SEGMENTS * n_experts, Element::F32)?;
            let mut args = vec![Arg::from(values), (&x.values).into(), (&sums.values).into()];
            args.extend([step.ended(ENDED_ROUTER), Arg::U32(gate.cols as u32)]);
            args.extend(choice);
            args.extend(groups.args());
            args.extend(self.grouping(experts, rows * k, rows).args(experts));
            // SAFETY: the gate is [n_experts, cols] bf16, x has its columns, a multiple of 8 as loading
            // checked, and sums has a value per segment; the outputs and lists as below. No launch beside
            // this one counts in the router's word.
            unsafe {
                self.launch(Call {
                    kernel: if by_hash { "moe_gate_hash" } else { "moe_gate_score" },
                    grid: [n_experts.div_ceil(GATE_ROWS), GATE_SEGMENTS, 1],
                    threads: GROUP_THREADS as u32,
                    shared_bytes: GATE_SHARED,
                    args: &args,
                })?;
            }
            let groups = Some(groups);
            return Ok(DeviceRouting { rows, k, ids, weights: chosen, order, groups });
        }
        let logits = self.linear(gate, x, Element::F32)?;
        let args: Vec<Arg> = std::iter::once(Arg::from(&logits.values)).chain(choice).collect();
        // SAFETY: logits are [rows, n_experts] f32, the outputs [rows, k]; tokens are inside of the
        // table, whose ids were checked against the expert count with the checkpoint; lists hold the
        // most items and pairs there can be.
        unsafe {
            self.launch(Call {
                kernel: if by_hash { "moe_route_hash" } else { "moe_route_score" },
                grid: [rows.div_ceil(4), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &args,
            })?;
        }
        Ok(DeviceRouting { rows, k, ids, weights: chosen, order, groups: None })
    }

    /// How pairs are grouped for `experts`.
    fn grouping(&self, experts: &DeviceExperts, n_pairs: usize, n_tokens: usize) -> Grouping {
        // An expert is chosen at most once by a token.
        let tile = |few: usize| if n_tokens <= few { few } else { MANY };
        match &experts.layout {
            // Both have the same bits.
            ExpertLayout::Rows(..) if has_many(experts, n_pairs) => {
                Grouping { item_tokens: TILED_TOKENS, align: 1 }
            }
            ExpertLayout::Rows(..) => Grouping { item_tokens: ITEM_TOKENS, align: 1 },
            ExpertLayout::Tiles(_) => Grouping { item_tokens: tile(hopper::FEW), align: 8 },
            ExpertLayout::Maps(_) => Grouping { item_tokens: tile(blackwell::FEW), align: 8 },
        }
    }

    /// Memory for the lists of `n_pairs` pairs of `n_tokens` tokens.
    fn room_for_groups(
        &self,
        experts: &DeviceExperts,
        n_pairs: usize,
        n_tokens: usize,
    ) -> Result<Groups, OpError> {
        let Grouping { item_tokens, align } = self.grouping(experts, n_pairs, n_tokens);
        // An expert's last item may be partial; there are no more of those than experts or pairs.
        let n_used = experts.n_experts.min(n_pairs);
        let max_items = n_pairs / item_tokens + n_used;
        let max_listed = (n_pairs + (align - 1) * n_used).next_multiple_of(align);
        let (items, n_items) = (self.buffer(12 * max_items)?, self.buffer(8)?);
        let pairs = self.buffer(4 * max_listed)?;
        Ok(Groups { items, n_items, pairs, max_items, max_listed })
    }

    /// Tokens by expert, in items of as many as its kernels take; each expert's list of pairs is filled
    /// up to a multiple of what they need.
    pub(crate) fn grouped(
        &self,
        experts: &DeviceExperts,
        routing: &DeviceRouting,
    ) -> Result<Groups, OpError> {
        if let Some(groups) = &routing.groups {
            return Ok(groups.clone());
        }
        let n_pairs = routing.rows * routing.k;
        let groups = self.room_for_groups(experts, n_pairs, routing.rows)?;
        let mut args = vec![Arg::from(&routing.ids)];
        args.extend(groups.args());
        args.push((n_pairs as u32).into());
        args.extend(self.grouping(experts, n_pairs, routing.rows).args(experts));
        // SAFETY: ids are [n_pairs]; the outputs hold the most items and listed pairs there can be.
        unsafe {
            self.launch(Call {
                kernel: "moe_group",
                grid: [1; 3],
                threads: GROUP_THREADS as u32,
                shared_bytes: GROUP_SHARED,
                args: &args,
            })?;
        }
        Ok(groups)
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
        let Groups { items, n_items, pairs, max_items, .. } = self.grouped(experts, routing)?;
        let input = self.rounded_input(x)?;
        let [(w1, e1), (w3, e3), (w2, e2)] = matrices;
        let many = has_many(experts, n_pairs);
        let (gate_up, down, down_grid) = match (format, many) {
            (ExpertFormat::Fp4, false) => ("moe_gate_up_fp4", "moe_down_fp4", "moe_down_fp4_grid"),
            (ExpertFormat::Fp8, false) => ("moe_gate_up_fp8", "moe_down_fp8", "moe_down_fp8_grid"),
            (ExpertFormat::Fp4, true) => ("moe_gate_up_fp4_64", "moe_down_fp4_64", ""),
            (ExpertFormat::Fp8, true) => ("moe_gate_up_fp8_64", "moe_down_fp8_64", ""),
        };
        let (rows, shared) =
            if many { (TILED_ROWS, TILED_SHARED) } else { (GEMM_ROWS, GEMM_SHARED_8) };
        let h = self.tensor(n_pairs, channels, Element::Bf16)?;
        // SAFETY: matrices are [n_experts, channels, width]; items name local experts and runs of
        // `pairs`; x has a row per token, h and the weights one per pair.
        unsafe {
            self.launch(Call {
                kernel: gate_up,
                grid: [channels.div_ceil(rows / 2), max_items, 1],
                threads: 256,
                shared_bytes: shared,
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
        // Of few tokens each block rounds its own: those of an item, or all pairs if they are fewer.
        let is_few = routing.rows <= ITEM_TOKENS && self.activations == Activations::Fp8Grid;
        let (h, down, shared_bytes) = match resident_bytes(n_pairs.min(ITEM_TOKENS), channels) {
            Some(bytes) if is_few => (h, down_grid, bytes),
            _ => (self.rounded_input(&h)?, down, shared),
        };
        let parts = self.tensor(n_pairs, width, Element::Bf16)?;
        // SAFETY: w2 is [n_experts, width, channels]; h and `parts` have a row per pair.
        unsafe {
            self.launch(Call {
                kernel: down,
                grid: [width.div_ceil(rows), max_items, 1],
                threads: 256,
                shared_bytes,
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
    pub(crate) fn shared_expert(
        &self,
        weights: &MoeWeights<Self>,
        input: &DeviceTensor,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "swiglu";
        let matrices = [&weights.shared.w1, &weights.shared.w3];
        if let Some(h) = self.gate_up80(matrices, input, limit)? {
            return self.quantised_linear(&weights.shared.w2, &h);
        }
        let [gate, up] = match self.pair90(matrices, input)? {
            Some(both) => both,
            None => {
                let product = |w| self.linear(w, input, Element::Bf16);
                [product(matrices[0])?, product(matrices[1])?]
            }
        };
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
