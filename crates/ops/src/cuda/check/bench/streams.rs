//! What is done to a token's copies: both ends of the model, the boundary between sublayers, and the
//! choice of a token.

use fathom_core::SamplingParams;
use fathom_core::model_config::{HC_MIX, HC_MULT};

use super::Bench;
use super::shapes::Shape;
use crate::OpError;
use crate::cuda::CudaOps;
use crate::cuda::draw::Values;
use crate::cuda::tensor::Element;
use crate::layer::{HcHead, HcSite, MtpInputWeights};
use crate::sample::RowChoice;
use crate::traits::{HcMix, HeadOps, HyperConnectionOps};
use crate::{Backend, Batch};

impl Bench<'_, '_> {
    pub(super) fn boundary(&mut self, shapes: &[Shape], width: usize) -> Result<(), OpError> {
        let ops = self.ops;
        let random = &mut self.random;
        let site = HcSite {
            function: ops.load_linear(&random.f32(HC_MIX, HC_MULT * width)?)?,
            base: random.vector(ops, HC_MIX, 0.0)?,
            scale: random.vector(ops, 3, 1.0)?,
            sinkhorn_iters: 20,
            hc_eps: 1e-6,
            norm_eps: 1e-6,
        };
        let norm = random.norm(ops, width)?;
        for &shape in shapes {
            let rows = shape.rows;
            let x = self.drawn(rows, HC_MULT * width)?;
            let y = self.drawn(rows, width)?;
            let HcMix { post, comb } = ops.hc_pre(&x, &site, &norm)?.mix;
            let mix = HcMix { post, comb };
            let step = self.tokens(rows, 1)?;
            self.time(shape, 1, &mut |_| {
                let mut copies = x.clone();
                ops.hc_boundary(&mut copies, &y, &mix, (&site, &norm), &step).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn embed(
        &mut self,
        shapes: &[Shape],
        (width, vocab): (usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let table = ops.load_linear(&self.random.bf16(vocab, width)?)?;
        for &shape in shapes {
            let steps = (0..4).map(|_| self.tokens(shape.rows, vocab));
            let steps = steps.collect::<Result<Vec<_>, _>>()?;
            self.time(shape, steps.len(), &mut |n| ops.embed(&table, &steps[n]).map(drop))?;
        }
        Ok(())
    }

    pub(super) fn head_norm(&mut self, shapes: &[Shape], width: usize) -> Result<(), OpError> {
        let ops = self.ops;
        let random = &mut self.random;
        let head = HcHead {
            function: ops.load_linear(&random.f32(HC_MULT, HC_MULT * width)?)?,
            base: random.vector(ops, HC_MULT, 0.0)?,
            scale: random.vector(ops, 1, 1.0)?,
            hc_eps: 1e-6,
            norm_eps: 1e-6,
        };
        let norm = random.norm(ops, width)?;
        for &shape in shapes {
            let x = self.drawn(shape.rows, HC_MULT * width)?;
            self.time(shape, 1, &mut |_| ops.hc_head(&x, &head, &norm).map(drop))?;
        }
        Ok(())
    }

    pub(super) fn mtp_input(
        &mut self,
        shapes: &[Shape],
        (width, vocab): (usize, usize),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let table = ops.load_linear(&self.random.bf16(vocab, width)?)?;
        let source = self.random.fp8(width, width)?;
        let mut blocks = Vec::new();
        for _ in 0..self.n_copies(2 * width * width) {
            blocks.push(MtpInputWeights::<CudaOps> {
                enorm: self.random.norm(ops, width)?,
                hnorm: self.random.norm(ops, width)?,
                e_proj: ops.load_linear(&source)?,
                h_proj: ops.load_linear(&source)?,
            });
        }
        for &shape in shapes {
            let x = self.drawn(shape.rows, HC_MULT * width)?;
            let step = self.tokens(shape.rows, vocab)?;
            self.time(shape, blocks.len(), &mut |n| {
                ops.mtp_input(&blocks[n], &table, &step, &x).map(drop)
            })?;
        }
        Ok(())
    }

    pub(super) fn choose(
        &mut self,
        shapes: &[Shape],
        (vocab, is_drawn): (usize, bool),
    ) -> Result<(), OpError> {
        let ops = self.ops;
        let params = if is_drawn {
            SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, ..SamplingParams::sampled(1, 7) }
        } else {
            SamplingParams::greedy(1)
        };
        for &shape in shapes {
            // They were just made, so they may lie in the second-level cache.
            let logits = ops.tensor(shape.rows, vocab, Element::F32)?;
            let deviation = Values::F32 { deviation: 2.0 };
            ops.memory().draw(&logits.values, 0, 4 * shape.rows * vocab, deviation)?;
            let row = |position| {
                let params = &params;
                RowChoice { params, position, seen: &[], mask: None, forbidden: &[] }
            };
            let rows: Vec<_> = (0..shape.rows as u32).map(row).collect();
            let prepared = ops.prepare_choices(vocab, &rows)?;
            self.time(shape, 1, &mut |_| ops.launch_choices(&logits, &prepared))?;
        }
        Ok(())
    }

    /// A step of `rows` tokens of one sequence, random ones below `vocab`.
    pub(super) fn tokens(
        &mut self,
        rows: usize,
        vocab: usize,
    ) -> Result<crate::cuda::DeviceStep, OpError> {
        let tokens: Vec<u32> = (0..rows).map(|_| self.random.below(vocab) as u32).collect();
        self.ops.prepare_exact_step(&Batch::single(0, 0, &tokens, &[]))
    }
}
