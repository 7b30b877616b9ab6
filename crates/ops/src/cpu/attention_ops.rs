//! The attention operators of the CPU backend, put together from projections, compressors, the
//! indexer and sparse attention.
//!
//! Source: `Attention.forward` and `Indexer.forward` of the official release.

use fathom_core::Group;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};

use crate::cpu::cache::{CpuCache, store_kv};
use crate::cpu::compress::Target;
use crate::cpu::gemm::{Job, run};
use crate::cpu::indexer::Selection;
use crate::cpu::norm::rms_norm;
use crate::cpu::rope::Rotation;
use crate::cpu::tensor::{HostTensor, for_each_row, round_tensor};
use crate::cpu::{CpuLinear, CpuOps};
use crate::error::check_len;
use crate::layer::AttentionWeights;
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{Batch, Communicator, OpError};

/// A weight or tensor that the layer's kind implies is absent.
fn absent(op: &'static str, arg: &'static str) -> OpError {
    OpError::Shape { op, arg, got: 0, expected: 1 }
}

/// A product to run together with others.
struct Product<'a> {
    linear: &'a CpuLinear,
    x: &'a HostTensor,
    out: HostTensor,
}

impl<'a> Product<'a> {
    fn new(linear: &'a CpuLinear, x: &'a HostTensor) -> Self {
        Self { linear, x, out: HostTensor::unset(x.rows, linear.n_rows()) }
    }
}

impl AttentionOps for CpuOps {
    fn attn_project(
        &self,
        weights: &AttentionWeights<Self>,
        x: &HostTensor,
    ) -> Result<Projected<HostTensor>, OpError> {
        let input = self.linear_input(x);
        let compressor = weights.compressor.as_ref();
        let indexer = weights.indexer.as_ref();
        let mut products =
            vec![Product::new(&weights.wq_a, &input), Product::new(&weights.wkv, &input)];
        for compressor in compressor.into_iter().chain(indexer.map(|i| &i.compressor)) {
            products.push(Product::new(&compressor.wkv, x));
            products.push(Product::new(&compressor.wgate, x));
        }
        products.extend(indexer.map(|indexer| Product::new(&indexer.weights_proj, x)));
        let mut jobs: Vec<Job<'_>> =
            products.iter_mut().map(|p| Job::new(p.linear, &p.x.data, &mut p.out.data)).collect();
        run(&mut jobs)?;

        // What linear layers put out is bf16; compressor projections stay f32.
        let mut outs = products.into_iter().map(|p| p.out);
        let is_bf16 = self.is_bf16();
        let mut next = |rounds: bool| {
            let mut out = outs.next().ok_or(absent("attn_project", "product"))?;
            if rounds && is_bf16 {
                round_tensor(&mut out);
            }
            Ok::<_, OpError>(out)
        };
        let (qr, kv) = (next(true)?, next(true)?);
        let mut pair = |wanted: bool| {
            if wanted { Ok(Some([next(false)?, next(false)?])) } else { Ok::<_, OpError>(None) }
        };
        let compressor = pair(compressor.is_some())?;
        let index_compressor = pair(indexer.is_some())?;
        let index_weights = if indexer.is_some() { Some(next(true)?) } else { None };
        Ok(Projected { qr, kv, compressor, index_compressor, index_weights })
    }

    fn attn_queries(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<HostTensor>,
        step: &Batch,
    ) -> Result<Queries<HostTensor>, OpError> {
        const OP: &str = "attn_queries";
        let qr = &projected.qr;
        let rows = step.step_rows(OP, "qr", qr.rows)?;
        qr.expect(OP, "qr", qr.rows, weights.q_norm.weight.len())?;
        let positions = step.positions();
        let positions: Vec<_> = (0..qr.rows).map(|row| positions[rows.row(row)]).collect();
        let is_bf16 = self.is_bf16();
        let mut normed = HostTensor::unset(qr.rows, qr.cols);
        for_each_row(&mut normed, |row, out| {
            let norm = &weights.q_norm;
            rms_norm(qr.row(row), &norm.weight, norm.eps, is_bf16, out);
        });
        let input = self.linear_input(&normed);
        let indexer = weights.indexer.as_ref();
        let mut q = HostTensor::unset(qr.rows, weights.wq_b.n_rows());
        let mut index = indexer.map(|i| HostTensor::unset(qr.rows, i.wq_b.n_rows()));
        let mut jobs = vec![Job::new(&weights.wq_b, &input.data, &mut q.data)];
        if let (Some(indexer), Some(index)) = (indexer, &mut index) {
            jobs.push(Job::new(&indexer.wq_b, &input.data, &mut index.data));
        }
        run(&mut jobs)?;
        for tensor in std::iter::once(&mut q).chain(&mut index) {
            if is_bf16 {
                round_tensor(tensor);
            }
        }
        let eps = Some(weights.q_norm.eps);
        self.finish_queries(&mut q, &positions, &weights.rope, eps, HEAD_DIM);
        if let Some(index) = &mut index {
            self.finish_queries(index, &positions, &weights.rope, None, INDEX_HEAD_DIM);
        }
        Ok(Queries { q, index })
    }

    fn attn_store(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<HostTensor>,
        step: &Batch,
        cache: &mut CpuCache,
        layer: usize,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "attn_store";
        projected.kv.expect(OP, "kv", step.n_tokens(), HEAD_DIM)?;
        let is_bf16 = self.is_bf16();
        let positions = step.positions();
        let (format, row_bytes) = (cache.spec.kv, cache.spec.kv.row_bytes());
        let mut kv = HostTensor::unset(step.n_tokens(), HEAD_DIM);
        for_each_row(&mut kv, |row, out| {
            let norm = &weights.kv_norm;
            rms_norm(projected.kv.row(row), &norm.weight, norm.eps, is_bf16, out);
            Rotation::at(positions[row], &weights.rope).apply(out, is_bf16);
        });
        let pending = &mut cache.layers[layer].pending;
        pending.resize(step.n_tokens() * row_bytes, 0);
        for (row, stored) in pending.chunks_exact_mut(row_bytes).enumerate() {
            store_kv(format, self.numerics.quantises(), kv.row_mut(row), stored);
        }
        if let Some(compressor) = &weights.compressor {
            let us = projected.compressor.as_ref().ok_or(absent(OP, "compressor"))?;
            self.compress(compressor, &weights.rope, us, step, cache, layer, Target::Entries)?;
        }
        if let Some(indexer) = &weights.indexer {
            let us = projected.index_compressor.as_ref().ok_or(absent(OP, "index_compressor"))?;
            let compressor = &indexer.compressor;
            self.compress(compressor, &weights.rope, us, step, cache, layer, Target::Keys)?;
        }
        Ok(kv)
    }

    fn index_select(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<HostTensor>,
        projected: &Projected<HostTensor>,
        step: &Batch,
        cache: &CpuCache,
        layer: usize,
    ) -> Result<Selection, OpError> {
        const OP: &str = "index_select";
        let indexer = weights.indexer.as_ref().ok_or(absent(OP, "indexer"))?;
        let q = queries.index.as_ref().ok_or(absent(OP, "queries"))?;
        let mut w = projected.index_weights.clone().ok_or(absent(OP, "index_weights"))?;
        let scale = (INDEX_HEAD_DIM as f32).powf(-0.5) * (indexer.n_heads as f32).powf(-0.5);
        w.data.iter_mut().for_each(|w| *w *= scale);
        if self.is_bf16() {
            round_tensor(&mut w);
        }
        self.select(indexer, q, &w, step, cache, layer)
    }

    fn attend(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<HostTensor>,
        kv: &HostTensor,
        selection: Option<&Selection>,
        step: &Batch,
        cache: &mut CpuCache,
        layer: usize,
    ) -> Result<HostTensor, OpError> {
        self.sparse_attention(weights, &queries.q, kv, selection, step, cache, layer)
    }

    fn attn_output(
        &self,
        weights: &AttentionWeights<Self>,
        o: &HostTensor,
        comm: &dyn Communicator,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "attn_output";
        let (n_groups, rank) = (weights.n_groups, weights.wo_a.n_rows() / weights.n_groups);
        let group_width = weights.wo_a.n_cols();
        check_len(OP, "o", o.cols, n_groups * group_width)?;
        let groups: Vec<CpuLinear> = (0..n_groups)
            .map(|group| weights.wo_a.slice_rows(group * rank..(group + 1) * rank))
            .collect::<Result<_, _>>()?;
        let mut outs: Vec<_> = groups.iter().map(|_| HostTensor::unset(o.rows, rank)).collect();
        let mut jobs = Vec::with_capacity(n_groups);
        for (group, (linear, out)) in groups.iter().zip(&mut outs).enumerate() {
            let first = group * group_width;
            jobs.push(Job::of_columns(linear, &o.data, o.cols, first, &mut out.data));
        }
        run(&mut jobs)?;
        let mut z = HostTensor::unset(o.rows, n_groups * rank);
        for_each_row(&mut z, |row, out| {
            for (out, group) in out.chunks_exact_mut(rank).zip(&outs) {
                out.copy_from_slice(group.row(row));
            }
        });
        if self.is_bf16() {
            round_tensor(&mut z);
        }
        let mut y = HostTensor::unset(o.rows, weights.wo_b.n_rows());
        weights.wo_b.matmul(&self.linear_input(&z).data, &mut y.data)?;
        comm.all_reduce_sum(Group::Tensor, &mut y.data)?;
        if self.is_bf16() {
            round_tensor(&mut y);
        }
        Ok(y)
    }
}
