//! Embedding, hyper-connections, norms, and the head: launchers of `embed`, `hc`, `norm`, `head`.

use fathom_core::model_config::{HC_MIX, HC_MULT};

use super::DeviceCache;
use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::DeviceStep;
use super::tensor::{Addends, DeviceTensor, Element};
use crate::error::check_len;
use crate::layer::{HcHead, HcSite, MtpInputWeights, Norm};
use crate::traits::{HcMix, HcPre, HeadOps, HyperConnectionOps};
use crate::{Batch, Communicator, OpError};

/// Channels of one block of the mixing products, in every copy. Fixed, so that the order of
/// additions depends on the width alone.
const SLICE: usize = 128;
/// Threads of a block there, and of the kernels that take a token per block.
const MIX_THREADS: u32 = 128;
const TOKEN_THREADS: u32 = 256;
/// Tokens of a block there.
const MIX_TOKENS: usize = 32;
/// The widest row those hold in registers.
const MAX_WIDTH: usize = 8192;
/// Shared memory of `MixShared`, `PreShared`, `NormShared`.
const MIX_SHARED: u32 = 4 * MIX_TOKENS as u32 * 25 * 4;
const PRE_SHARED: u32 = (8 + 25 + 4) * 4;
const NORM_SHARED: u32 = 8 * 4;

/// Refuses a width that the row kernels cannot hold.
fn check_width(op: &'static str, width: usize) -> Result<(), OpError> {
    if width.is_multiple_of(8) && (1..=MAX_WIDTH).contains(&width) {
        return Ok(());
    }
    Err(OpError::OutOfRange { op, what: "width (a multiple of 8)", got: width, limit: MAX_WIDTH })
}

/// What is still to be added to `y`, as kernels take it.
fn addend_args(y: &DeviceTensor) -> [Arg; 3] {
    match &y.addends {
        Some(Addends { parts, order, k }) => [parts.into(), order.into(), (*k as u32).into()],
        None => [Arg::NULL, Arg::NULL, 0_u32.into()],
    }
}

/// Sums over slices of the channels, as `hc_mix` leaves them.
struct Mixes {
    partial: Buffer,
    n_splits: usize,
}

impl CudaOps {
    /// `n_copies` copies of the embedding of each token.
    fn embed_copies(
        &self,
        table: &super::DeviceLinear,
        step: &DeviceStep,
        n_copies: usize,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "embed";
        let values = table.bf16(OP, "bf16 table")?;
        step.check_tokens(OP, table.rows)?;
        let out = self.tensor(step.n_rows, n_copies * table.cols, Element::Bf16)?;
        // SAFETY: every token names a row of the table, whose width is a multiple of 8 (checked
        // when it was loaded), and `out` has `n_copies` such rows per token.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [step.n_rows, 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    values.into(),
                    (&step.tokens).into(),
                    (&out.values).into(),
                    (table.cols as u32).into(),
                    (n_copies as u32).into(),
                ],
            })?;
        }
        Ok(out)
    }

    /// Norm of each row; with `quantises` the result is also put on the FP8 grid.
    pub(crate) fn rms_norm(
        &self,
        x: &DeviceTensor,
        norm: &Norm<Self>,
        quantises: bool,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "rms_norm";
        let width = norm.weight.len;
        check_width(OP, width)?;
        x.expect(OP, "x", x.rows, width, Element::Bf16)?;
        let mut out = self.tensor(x.rows, width, Element::Bf16)?;
        if quantises {
            out.quantised = Some(self.buffer(2 * x.rows * width)?);
        }
        // SAFETY: x and both outputs are [rows, width] bf16, the weight has `width` values.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [x.rows, 1, 1],
                threads: TOKEN_THREADS,
                shared_bytes: NORM_SHARED,
                args: &[
                    (&x.values).into(),
                    (&norm.weight.values).into(),
                    (&out.values).into(),
                    out.quantised.as_ref().map_or(Arg::NULL, Arg::from),
                    (width as u32).into(),
                    norm.eps.into(),
                ],
            })?;
        }
        Ok(out)
    }

    /// Mixing products of the copies `x`, of `n_mix` (24 or 4) rows.
    fn mixes(
        &self,
        x: &DeviceTensor,
        function: &super::DeviceLinear,
        n_mix: usize,
        width: usize,
    ) -> Result<Mixes, OpError> {
        const OP: &str = "hc_mix";
        check_width(OP, width)?;
        x.expect(OP, "x", x.rows, HC_MULT * width, Element::Bf16)?;
        check_len(OP, "rows of fn", function.rows, n_mix)?;
        check_len(OP, "columns of fn", function.cols, HC_MULT * width)?;
        let n_splits = width.div_ceil(SLICE);
        let partial = self.buffer(4 * x.rows * n_splits * (n_mix + 1))?;
        // SAFETY: x is [rows, 4 * width] bf16, fn [n_mix, 4 * width] f32, and `partial` has
        // n_mix + 1 sums per row and split; width is a multiple of 8.
        unsafe {
            self.launch(Call {
                kernel: if n_mix == HC_MIX { OP } else { "hc_mix_head" },
                grid: [n_splits, x.rows.div_ceil(MIX_TOKENS), 1],
                threads: MIX_THREADS,
                shared_bytes: MIX_SHARED,
                args: &[
                    (&x.values).into(),
                    function.f32(OP, "f32 fn")?.into(),
                    (&partial).into(),
                    (width as u32).into(),
                    (x.rows as u32).into(),
                ],
            })?;
        }
        Ok(Mixes { partial, n_splits })
    }

    /// From the mixing products to the sublayer's input.
    fn finish_pre(
        &self,
        mixes: &Mixes,
        x: &DeviceTensor,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        const OP: &str = "hc_pre";
        let width = norm.weight.len;
        check_len(OP, "base", site.base.len, HC_MIX)?;
        check_len(OP, "scale", site.scale.len, 3)?;
        let mut normed = self.tensor(x.rows, width, Element::Bf16)?;
        let quantised = self.buffer(2 * x.rows * width)?;
        let post = self.tensor(x.rows, HC_MULT, Element::F32)?;
        let comb = self.tensor(x.rows, HC_MULT * HC_MULT, Element::F32)?;
        // SAFETY: shapes as the kernel's header wants them; `mixes` was made from this x.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [x.rows, 1, 1],
                threads: TOKEN_THREADS,
                shared_bytes: PRE_SHARED,
                args: &[
                    (&mixes.partial).into(),
                    (&x.values).into(),
                    (&site.base.values).into(),
                    (&site.scale.values).into(),
                    (&norm.weight.values).into(),
                    (&normed.values).into(),
                    (&quantised).into(),
                    (&post.values).into(),
                    (&comb.values).into(),
                    (width as u32).into(),
                    (mixes.n_splits as u32).into(),
                    site.sinkhorn_iters.into(),
                    site.hc_eps.into(),
                    site.norm_eps.into(),
                    norm.eps.into(),
                ],
            })?;
        }
        normed.quantised = Some(quantised);
        Ok(HcPre { normed, mix: HcMix { post, comb } })
    }

    /// Checks what `hc_post` and `hc_boundary` share.
    fn check_post(
        &self,
        op: &'static str,
        x: &DeviceTensor,
        y: &DeviceTensor,
        mix: &HcMix<DeviceTensor>,
    ) -> Result<(), OpError> {
        check_width(op, y.cols)?;
        y.expect_sum(op, "y", y.rows, y.cols, Element::Bf16)?;
        x.expect(op, "x", y.rows, HC_MULT * y.cols, Element::Bf16)?;
        mix.post.expect(op, "post", y.rows, HC_MULT, Element::F32)?;
        mix.comb.expect(op, "comb", y.rows, HC_MULT * HC_MULT, Element::F32)
    }
}

impl HyperConnectionOps for CudaOps {
    fn embed(
        &self,
        embed: &super::DeviceLinear,
        step: &DeviceStep,
    ) -> Result<DeviceTensor, OpError> {
        self.embed_copies(embed, step, HC_MULT)
    }

    fn hc_pre(
        &self,
        x: &DeviceTensor,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        let mixes = self.mixes(x, &site.function, HC_MIX, norm.weight.len)?;
        self.finish_pre(&mixes, x, site, norm)
    }

    fn hc_post(
        &self,
        x: &DeviceTensor,
        y: &DeviceTensor,
        mix: &HcMix<DeviceTensor>,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "hc_post";
        self.check_post(OP, x, y, mix)?;
        let out = self.tensor(x.rows, x.cols, Element::Bf16)?;
        let [parts, order, k] = addend_args(y);
        // SAFETY: `check_post` checked every shape; `out` has that of x; addends have y's rows.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [y.cols.div_ceil(1024), x.rows, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&x.values).into(),
                    (&y.values).into(),
                    (&mix.post.values).into(),
                    (&mix.comb.values).into(),
                    (&out.values).into(),
                    (y.cols as u32).into(),
                    parts,
                    order,
                    k,
                ],
            })?;
        }
        Ok(out)
    }

    fn hc_boundary(
        &self,
        x: &mut DeviceTensor,
        y: &DeviceTensor,
        mix: &HcMix<DeviceTensor>,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        const OP: &str = "hc_post_mix";
        self.check_post(OP, x, y, mix)?;
        let (width, function) = (y.cols, &site.function);
        check_len(OP, "norm weight", norm.weight.len, width)?;
        check_len(OP, "rows of fn", function.rows, HC_MIX)?;
        check_len(OP, "columns of fn", function.cols, HC_MULT * width)?;
        let n_splits = width.div_ceil(SLICE);
        let partial = self.buffer(4 * x.rows * n_splits * (HC_MIX + 1))?;
        let out = self.tensor(x.rows, x.cols, Element::Bf16)?;
        let [parts, order, k] = addend_args(y);
        // SAFETY: as for `hc_mix` and `hc_post`, whose checks are all above.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n_splits, x.rows.div_ceil(MIX_TOKENS), 1],
                threads: MIX_THREADS,
                shared_bytes: MIX_SHARED,
                args: &[
                    (&x.values).into(),
                    function.f32(OP, "f32 fn")?.into(),
                    (&partial).into(),
                    (&y.values).into(),
                    (&mix.post.values).into(),
                    (&mix.comb.values).into(),
                    (&out.values).into(),
                    (width as u32).into(),
                    (x.rows as u32).into(),
                    parts,
                    order,
                    k,
                ],
            })?;
        }
        *x = out;
        self.finish_pre(&Mixes { partial, n_splits }, x, site, norm)
    }
}

impl HeadOps for CudaOps {
    fn hc_head(
        &self,
        x: &DeviceTensor,
        head: &HcHead<Self>,
        norm: &Norm<Self>,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "hc_head";
        let width = norm.weight.len;
        check_len(OP, "base", head.base.len, HC_MULT)?;
        check_len(OP, "scale", head.scale.len, 1)?;
        let mixes = self.mixes(x, &head.function, HC_MULT, width)?;
        let out = self.tensor(x.rows, width, Element::Bf16)?;
        // SAFETY: shapes as the kernel's header wants them; `mixes` was made from this x.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [x.rows, 1, 1],
                threads: TOKEN_THREADS,
                shared_bytes: PRE_SHARED,
                args: &[
                    (&mixes.partial).into(),
                    (&x.values).into(),
                    (&head.base.values).into(),
                    (&head.scale.values).into(),
                    (&norm.weight.values).into(),
                    (&out.values).into(),
                    (width as u32).into(),
                    (mixes.n_splits as u32).into(),
                    head.hc_eps.into(),
                    head.norm_eps.into(),
                    norm.eps.into(),
                ],
            })?;
        }
        Ok(out)
    }

    fn logits(
        &self,
        head: &super::DeviceLinear,
        x: &DeviceTensor,
        comm: &dyn Communicator,
    ) -> Result<DeviceTensor, OpError> {
        super::single_rank("logits", comm)?;
        self.linear(head, x, Element::F32)
    }

    fn keep_copies(
        &self,
        batch: &Batch,
        x: &DeviceTensor,
        cache: &mut DeviceCache,
    ) -> Result<(), OpError> {
        self.store_copies(batch, x, cache)
    }

    fn kept_copies(
        &self,
        rows: &Batch,
        current: Option<(&Batch, &DeviceTensor)>,
        cache: &DeviceCache,
    ) -> Result<DeviceTensor, OpError> {
        self.load_copies(rows, current, cache)
    }

    fn mtp_input(
        &self,
        weights: &MtpInputWeights<Self>,
        embed: &super::DeviceLinear,
        step: &DeviceStep,
        x: &DeviceTensor,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "add_copies";
        let width = embed.cols;
        x.expect(OP, "x", step.n_rows, HC_MULT * width, Element::Bf16)?;
        let embedded = self.embed_copies(embed, step, 1)?;
        let embedded = self.rms_norm(&embedded, &weights.enorm, true)?;
        // Every copy of every row is normalised and projected on its own: [T * 4, D].
        let copies =
            DeviceTensor { rows: HC_MULT * x.rows, cols: width, quantised: None, ..x.clone() };
        let copies = self.rms_norm(&copies, &weights.hnorm, true)?;
        let from_embedding = self.quantised_linear(&weights.e_proj, &embedded)?;
        let out = self.quantised_linear(&weights.h_proj, &copies)?;
        from_embedding.expect(OP, "e", x.rows, width, Element::Bf16)?;
        out.expect(OP, "h", HC_MULT * x.rows, width, Element::Bf16)?;
        // SAFETY: e is [rows, width], h [4 * rows, width], both bf16.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [width.div_ceil(1024), out.rows, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&from_embedding.values).into(),
                    (&out.values).into(),
                    (width as u32).into(),
                ],
            })?;
        }
        Ok(DeviceTensor { rows: x.rows, cols: HC_MULT * width, ..out })
    }
}
