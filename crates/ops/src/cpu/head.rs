//! The output head and the input side of the MTP block.
//!
//! Source: `ParallelHead.forward`, `MTPBlock.forward` of the official release.

use fathom_core::Group;
use fathom_core::model_config::HC_MULT;
use fathom_core::num::round_bf16;

use crate::copies::{CopiesAt, locate};
use crate::cpu::norm::rms_norm;
use crate::cpu::tensor::{HostTensor, for_each_row};
use crate::cpu::{CpuCache, CpuLinear, CpuOps};
use crate::error::check_len;
use crate::layer::{HcHead, MtpInputWeights, Norm};
use crate::traits::HeadOps;
use crate::{Batch, Communicator, OpError};

/// The host samples: what would choose here has the logits already.
impl crate::sample::ChoiceOps for CpuOps {}

impl HeadOps for CpuOps {
    fn hc_head(
        &self,
        x: &HostTensor,
        head: &HcHead<Self>,
        norm: &Norm<Self>,
    ) -> Result<HostTensor, OpError> {
        self.collapse_for_head(x, head, norm)
    }

    fn logits(
        &self,
        head: &CpuLinear,
        x: &HostTensor,
        comm: &dyn Communicator,
    ) -> Result<HostTensor, OpError> {
        let mut local = HostTensor::unset(x.rows, head.n_rows());
        head.matmul(&x.data, &mut local.data)?;
        let n_ranks = comm.rank().config().tensor;
        if n_ranks == 1 {
            return Ok(local);
        }
        let parts = comm.all_gather(Group::Tensor, &local.data)?;
        check_len("logits", "gathered", parts.len(), n_ranks * local.data.len())?;
        let mut logits = HostTensor::unset(x.rows, n_ranks * local.cols);
        for row in 0..x.rows {
            for (rank, out) in logits.row_mut(row).chunks_exact_mut(local.cols).enumerate() {
                let start = (rank * x.rows + row) * local.cols;
                out.copy_from_slice(&parts[start..start + local.cols]);
            }
        }
        Ok(logits)
    }

    fn keep_copies(
        &self,
        batch: &Batch,
        x: &HostTensor,
        cache: &mut CpuCache,
    ) -> Result<(), OpError> {
        const OP: &str = "keep_copies";
        x.expect(OP, "x", batch.n_tokens(), cache.spec.draft_width)?;
        for sequence in &batch.sequences {
            let keep = sequence.rows().len().min(cache.spec.copies_rows());
            for (row, position) in sequence.rows().zip(sequence.positions()).rev().take(keep) {
                cache.keep_copies(sequence.slot as usize, position, x.row(row));
            }
        }
        Ok(())
    }

    fn kept_copies(
        &self,
        rows: &Batch,
        current: Option<(&Batch, &HostTensor)>,
        cache: &CpuCache,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "kept_copies";
        let width = cache.spec.draft_width;
        if let Some((batch, x)) = current {
            x.expect(OP, "x", batch.n_tokens(), width)?;
        }
        let mut out = HostTensor::unset(rows.n_tokens(), width);
        let places = locate(rows, current.map(|(batch, _)| batch));
        for (out, place) in out.data.chunks_exact_mut(width.max(1)).zip(places) {
            match place {
                CopiesAt::Kept { slot, position } => cache.kept_copies(slot, position, out),
                CopiesAt::Row(row) => {
                    let (_, x) = current.expect("only a current batch has rows to be found in");
                    out.copy_from_slice(x.row(row));
                }
            }
        }
        Ok(out)
    }

    fn mtp_input(
        &self,
        weights: &MtpInputWeights<Self>,
        embed: &CpuLinear,
        step: &Batch,
        x: &HostTensor,
    ) -> Result<HostTensor, OpError> {
        const OP: &str = "mtp_input";
        let width = embed.n_cols();
        x.expect(OP, "x", step.n_tokens(), HC_MULT * width)?;
        let is_bf16 = self.is_bf16();
        let mut embedded = HostTensor::unset(x.rows, width);
        for (row, &token) in step.tokens.iter().enumerate() {
            let (got, limit) = (token as usize, embed.n_rows());
            if got >= limit {
                return Err(OpError::OutOfRange { op: OP, what: "token id", got, limit });
            }
            let mut values = vec![0.0; width];
            embed.row(got, &mut values);
            let norm = &weights.enorm;
            rms_norm(&values, &norm.weight, norm.eps, is_bf16, embedded.row_mut(row));
        }
        // Every copy of every row is normalised and projected on its own: [T * 4, D].
        let mut copies = HostTensor::unset(x.rows * HC_MULT, width);
        for_each_row(&mut copies, |row, out| {
            let copy = &x.data[row * width..(row + 1) * width];
            rms_norm(copy, &weights.hnorm.weight, weights.hnorm.eps, is_bf16, out);
        });
        let from_embedding = self.quantised_linear(&weights.e_proj, &embedded)?;
        let mut out = self.quantised_linear(&weights.h_proj, &copies)?;
        for_each_row(&mut out, |row, out| {
            for (out, e) in out.iter_mut().zip(from_embedding.row(row / HC_MULT)) {
                let sum = e + *out;
                *out = if is_bf16 { round_bf16(sum) } else { sum };
            }
        });
        HostTensor::from_vec(x.rows, HC_MULT * width, out.data)
    }
}
