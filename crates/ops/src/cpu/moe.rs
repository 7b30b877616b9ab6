//! The mixture of experts: routing, routed experts, shared expert.
//!
//! Rows are grouped by expert so that each expert's weights are read once per step; the sum over a
//! token's experts is taken in ascending expert id, as in the official code.
//!
//! Source: `Gate.forward`, `Expert.forward`, `MoE.forward` of the official release.

use fathom_core::Group;
use fathom_core::num::round_bf16;

use crate::cpu::gemm::{Job, run};
use crate::cpu::quant::quantise_linear_input;
use crate::cpu::simd::{sigmoid, simd_fn};
use crate::cpu::tensor::{HostTensor, for_each_row, round_to_bf16};
use crate::cpu::{CpuLinear, CpuOps, in_parallel};
use crate::error::check_len;
use crate::layer::{MoeWeights, Router};
use crate::traits::MoeOps;
use crate::{Batch, Communicator, OpError};

/// The routed experts of one layer on this rank.
#[derive(Debug, Clone)]
pub struct CpuExperts {
    pub(crate) first_id: usize,
    pub(crate) experts: Vec<ExpertWeights>,
}

/// One expert: gate, up, down.
#[derive(Debug, Clone)]
pub(crate) struct ExpertWeights {
    pub(crate) w1: CpuLinear,
    pub(crate) w3: CpuLinear,
    pub(crate) w2: CpuLinear,
}

/// `tid2eid`: the experts of every token id.
#[derive(Debug, Clone)]
pub struct ExpertTable {
    pub(crate) ids: std::sync::Arc<[u16]>,
    pub(crate) k: usize,
}

/// Chosen experts and weights, `[T, k]`, in the order chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    pub(crate) k: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

impl Routing {
    /// A routing that was decided elsewhere: `ids` and `weights` are `[T, k]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] unless both hold a whole number of rows.
    pub fn new(k: usize, ids: Vec<u32>, weights: Vec<f32>) -> Result<Self, OpError> {
        check_len("routing", "weights", weights.len(), ids.len())?;
        check_len("routing", "ids", ids.len() % k.max(1), 0)?;
        Ok(Self { k, ids, weights })
    }
}

/// `sqrt(softplus(x))`, with the identity above 20 as in PyTorch.
#[must_use]
pub fn sqrt_softplus(x: f32) -> f32 {
    let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
    softplus.sqrt()
}

/// The `k` highest values, descending; on equal values the lower index first.
fn top_k(values: &[f32], k: usize, chosen: &mut Vec<u32>) {
    let start = chosen.len();
    for _ in 0..k.min(values.len()) {
        let is_free = |id: u32| !chosen[start..].contains(&id);
        let best = (0..values.len() as u32).filter(|&id| is_free(id)).reduce(|best, id| {
            let (best_value, value) = (values[best as usize], values[id as usize]);
            if value.total_cmp(&best_value).is_gt() { id } else { best }
        });
        chosen.extend(best);
    }
}

simd_fn! {
    /// `gate = weight * silu(min(gate, limit)) * clamp(up, -limit, limit)`, in f32.
    fn swiglu(gate: &mut [f32], up: &[f32], weight: f32, limit: f32, is_bf16: bool) {
        for (gate, up) in gate.iter_mut().zip(up) {
            let (g, u) = if is_bf16 { (round_bf16(*gate), round_bf16(*up)) } else { (*gate, *up) };
            let (g, u) = (g.min(limit), u.clamp(-limit, limit));
            let a = g * sigmoid(g) * u * weight;
            *gate = if is_bf16 { round_bf16(a) } else { a };
        }
    }
}

/// Rows of a step grouped by expert.
struct Groups {
    /// Expert and its range in `rows`, ascending by id; experts without rows are left out.
    experts: Vec<(usize, std::ops::Range<usize>)>,
    /// Row of the step and routing weight.
    rows: Vec<(usize, f32)>,
}

impl Groups {
    fn new(routing: &Routing, local: std::ops::Range<usize>) -> Self {
        let mut rows_of = vec![Vec::new(); local.len()];
        for (index, (&id, &weight)) in routing.ids.iter().zip(&routing.weights).enumerate() {
            if let Some(rows) =
                (id as usize).checked_sub(local.start).and_then(|e| rows_of.get_mut(e))
            {
                rows.push((index / routing.k, weight));
            }
        }
        let mut groups = Self { experts: Vec::new(), rows: Vec::new() };
        for (expert, rows) in rows_of.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let start = groups.rows.len();
            groups.rows.extend(rows);
            groups.experts.push((expert, start..groups.rows.len()));
        }
        groups
    }
}

/// Cuts a tensor into consecutive row groups.
fn split_rows<'a>(
    tensor: &'a mut HostTensor,
    groups: &[(usize, std::ops::Range<usize>)],
) -> Vec<&'a mut [f32]> {
    let mut rest = &mut tensor.data[..];
    let mut parts = Vec::with_capacity(groups.len());
    for (_, rows) in groups {
        let (part, tail) = rest.split_at_mut(rows.len() * tensor.cols);
        parts.push(part);
        rest = tail;
    }
    parts
}

impl MoeOps for CpuOps {
    fn route(
        &self,
        weights: &MoeWeights<Self>,
        x: &HostTensor,
        step: &Batch,
    ) -> Result<Routing, OpError> {
        const OP: &str = "route";
        let rows = step.step_rows(OP, "x", x.rows)?;
        let (k, n_experts) = (weights.top_k, weights.gate.n_rows());
        let mut scores = HostTensor::unset(x.rows, n_experts);
        weights.gate.matmul(&x.data, &mut scores.data)?;
        for_each_row(&mut scores, |_, row| row.iter_mut().for_each(|s| *s = sqrt_softplus(*s)));
        let mut ids = Vec::with_capacity(x.rows * k);
        match &weights.router {
            Router::Hash(table) => {
                check_len(OP, "tid2eid", table.k, k)?;
                for token in (0..x.rows).map(|row| step.tokens[rows.row(row)]) {
                    let start = token as usize * k;
                    let (got, limit) = (token as usize, table.ids.len() / k);
                    let row = table.ids.get(start..start + k).ok_or(OpError::OutOfRange {
                        op: OP,
                        what: "token id",
                        got,
                        limit,
                    })?;
                    ids.extend(row.iter().map(|&id| u32::from(id)));
                }
            }
            Router::Score(bias) => {
                check_len(OP, "bias", bias.len(), n_experts)?;
                let chosen = in_parallel(x.rows * n_experts * k, 0..x.rows, |row| {
                    let biased: Vec<f32> =
                        scores.row(row).iter().zip(bias.iter()).map(|(s, b)| s + b).collect();
                    let mut chosen = Vec::with_capacity(k);
                    top_k(&biased, k, &mut chosen);
                    chosen
                });
                ids.extend(chosen.into_iter().flatten());
            }
        }
        let mut routing_weights = Vec::with_capacity(ids.len());
        for (row, ids) in ids.chunks_exact(k).enumerate() {
            let score = |id: &u32| scores.row(row)[*id as usize];
            let sum: f32 = ids.iter().map(score).sum();
            routing_weights
                .extend(ids.iter().map(|id| score(id) / sum * weights.routed_scaling_factor));
        }
        Ok(Routing { k, ids, weights: routing_weights })
    }

    fn moe(
        &self,
        weights: &MoeWeights<Self>,
        x: &HostTensor,
        routing: &Routing,
        comm: &dyn Communicator,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "moe";
        check_len(OP, "routing", routing.ids.len(), x.rows * weights.top_k)?;
        let (rank, is_bf16) = (comm.rank(), self.is_bf16());
        let width = x.cols;
        let first = weights.experts.first_id;
        let groups = Groups::new(routing, first..first + weights.experts.experts.len());
        let shared_is_slice = weights.shared.is_slice && rank.config().tensor > 1;
        // A slice of the shared expert exists once per EP group; one group contributes it.
        let computes_shared = !shared_is_slice || rank.expert() == 0;
        let shared_rows = if computes_shared { x.rows } else { 0 };

        let input = self.linear_input(x);
        let mut gathered = HostTensor::unset(groups.rows.len(), width);
        for_each_row(&mut gathered, |index, out| {
            out.copy_from_slice(input.row(groups.rows[index].0));
        });
        let channels = weights.experts.experts.first().map_or(0, |expert| expert.w1.n_rows());
        let mut gate = HostTensor::unset(groups.rows.len(), channels);
        let mut up = HostTensor::unset(groups.rows.len(), channels);
        let mut shared_gate = HostTensor::unset(shared_rows, weights.shared.w1.n_rows());
        let mut shared_up = HostTensor::unset(shared_rows, weights.shared.w3.n_rows());
        {
            let mut jobs = Vec::with_capacity(2 * groups.experts.len() + 2);
            let outs = split_rows(&mut gate, &groups.experts)
                .into_iter()
                .zip(split_rows(&mut up, &groups.experts));
            for ((expert, rows), (gate, up)) in groups.experts.iter().zip(outs) {
                let expert = &weights.experts.experts[*expert];
                let x = &gathered.data[rows.start * width..rows.end * width];
                jobs.push(Job::new(&expert.w1, x, gate));
                jobs.push(Job::new(&expert.w3, x, up));
            }
            if computes_shared {
                let x = &input.data;
                jobs.push(Job::new(&weights.shared.w1, x, &mut shared_gate.data));
                jobs.push(Job::new(&weights.shared.w3, x, &mut shared_up.data));
            }
            run(&mut jobs)?;
        }

        let limit = weights.swiglu_limit.unwrap_or(f32::INFINITY);
        let quantises = self.quantises_inputs();
        for_each_row(&mut gate, |row, gate| {
            swiglu(gate, up.row(row), groups.rows[row].1, limit, is_bf16);
            if quantises {
                quantise_linear_input(gate);
            }
        });
        for_each_row(&mut shared_gate, |row, gate| {
            swiglu(gate, shared_up.row(row), 1.0, limit, is_bf16);
            if quantises {
                quantise_linear_input(gate);
            }
        });

        let mut down = HostTensor::unset(groups.rows.len(), width);
        let mut shared_down = HostTensor::unset(shared_rows, width);
        {
            let mut jobs = Vec::with_capacity(groups.experts.len() + 1);
            let outs = split_rows(&mut down, &groups.experts);
            for ((expert, rows), out) in groups.experts.iter().zip(outs) {
                let x = &gate.data[rows.start * channels..rows.end * channels];
                jobs.push(Job::new(&weights.experts.experts[*expert].w2, x, out));
            }
            if computes_shared {
                let (x, out) = (&shared_gate.data, &mut shared_down.data);
                jobs.push(Job::new(&weights.shared.w2, x, out));
            }
            run(&mut jobs)?;
        }

        // Rows of `down` are in ascending expert id, so this is the official order per token.
        let mut places = vec![Vec::new(); x.rows];
        for (index, (row, _)) in groups.rows.iter().enumerate() {
            places[*row].push(index);
        }
        let mut sum = HostTensor::zeros(x.rows, width);
        // Slices of one expert on several ranks are partial sums: rounding must wait for the total.
        let rounds_parts = is_bf16 && !weights.experts_are_slices;
        for_each_row(&mut sum, |row, sum| {
            for &index in &places[row] {
                add(sum, down.row(index), rounds_parts);
            }
        });
        if shared_is_slice && computes_shared {
            for_each_row(&mut sum, |row, sum| add(sum, shared_down.row(row), false));
        }
        comm.all_reduce_sum(Group::World, &mut sum.data)?;
        for_each_row(&mut sum, |row, sum| {
            if !shared_is_slice {
                add(sum, shared_down.row(row), is_bf16);
            }
            if is_bf16 {
                round_to_bf16(sum);
            }
        });
        Ok(sum)
    }
}

simd_fn! {
    /// `sum += part`, `part` rounded to bf16 before if wanted.
    fn add(sum: &mut [f32], part: &[f32], rounds: bool) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += if rounds { round_bf16(*part) } else { *part };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_choose_the_lower_expert_first() {
        let mut chosen = vec![9];
        top_k(&[0.5, 2.0, 2.0, -1.0], 3, &mut chosen);
        assert_eq!(chosen, [9, 1, 2, 0]);
    }

    #[test]
    fn groups_are_ascending_by_expert_and_leave_out_foreign_experts() {
        let routing = Routing { k: 2, ids: vec![3, 1, 1, 0], weights: vec![0.1, 0.2, 0.3, 0.4] };
        let groups = Groups::new(&routing, 1..4);
        assert_eq!(groups.experts, [(0, 0..2), (2, 2..3)]);
        assert_eq!(groups.rows, [(0, 0.2), (1, 0.3), (0, 0.1)]);
    }

    #[test]
    fn swiglu_clamps_the_gate_from_above_and_up_on_both_sides() {
        let (mut gate, up) = ([-20.0, 3.0, 3.0], [1.0, 9.0, -9.0]);
        swiglu(&mut gate, &up, 2.0, 2.5, false);
        let silu = |x: f32| x / (1.0 + (-x).exp());
        for (got, expected) in
            gate.iter().zip([2.0 * silu(-20.0), 5.0 * silu(2.5), -5.0 * silu(2.5)])
        {
            assert!((got - expected).abs() < 1e-5, "{got} {expected}");
        }
    }
}
