//! Embedding, hyper-connections, norms, and the head: launchers of `embed`, `hc`, `norm`, `head`.

use fathom_core::model_config::{HC_MIX, HC_MULT};

use super::DeviceCache;
use super::device::{Arg, Launch};
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::{DeviceStep, ENDED_BOUNDARY};
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
/// Threads of `hc_pre`: a warp runs Sinkhorn.
const PRE_THREADS: u32 = TOKEN_THREADS + 32;
/// Most tokens for which a boundary is one launch, where clusters of sixteen blocks can run; the blocks of
/// such a cluster, and its tokens. More tokens than these fill the GPU in two launches.
const FEW: usize = 32;
const CLUSTER: usize = 16;
const CLUSTER_TOKENS: usize = 8;
/// Shared memory of `MixShared`, `PreShared`, `NormShared`, `BoundaryShared` and `SliceWeights`.
const MIX_SHARED: u32 = 4 * MIX_TOKENS as u32 * 25 * 4;
const PRE_SHARED: u32 = (64 + 25 + 4) * 4;
/// Of `hc_boundary_1`: the first of these and a word.
const BOUNDARY_1_SHARED: u32 = MIX_SHARED + 4;
const NORM_SHARED: u32 = 8 * 4;
const BOUNDARY_SHARED: usize = 27_392;
const SLICE_SHARED: usize = (4 * 24 * 132 + 128) * 4;

/// Refuses a width that the row kernels cannot hold.
fn check_width(op: &'static str, width: usize) -> Result<(), OpError> {
    if width.is_multiple_of(8) && (1..=MAX_WIDTH).contains(&width) {
        return Ok(());
    }
    Err(OpError::OutOfRange { op, what: "width (a multiple of 8)", got: width, limit: MAX_WIDTH })
}

/// Refuses copies that are not `[_, 4 * width]`, and an `fn` that has not `n_mix` such rows.
fn check_mix(
    op: &'static str,
    x: &DeviceTensor,
    function: &super::DeviceLinear,
    n_mix: usize,
    width: usize,
) -> Result<(), OpError> {
    check_width(op, width)?;
    x.expect(op, "x", x.rows, HC_MULT * width, Element::Bf16)?;
    check_len(op, "rows of fn", function.rows, n_mix)?;
    check_len(op, "columns of fn", function.cols, HC_MULT * width)
}

/// What is still to be added to `y`, as kernels take it.
fn addend_args(y: &DeviceTensor) -> [Arg; 3] {
    match &y.addends {
        Some(Addends { parts, order, k }) => [parts.into(), order.into(), (*k as u32).into()],
        None => [Arg::NULL, Arg::NULL, 0_u32.into()],
    }
}

/// What `hc_pre` takes of weights, and where it puts its results.
fn next_args(next: &HcPre<DeviceTensor>, site: &HcSite<CudaOps>, norm: &Norm<CudaOps>) -> [Arg; 7] {
    [
        (&site.base.values).into(),
        (&site.scale.values).into(),
        (&norm.weight.values).into(),
        (&next.normed.values).into(),
        next.normed.quantised.as_ref().map_or(Arg::NULL, Arg::from),
        (&next.mix.post.values).into(),
        (&next.mix.comb.values).into(),
    ]
}

/// The numbers of a boundary.
fn site_args(site: &HcSite<CudaOps>, norm: &Norm<CudaOps>) -> [Arg; 4] {
    let HcSite { sinkhorn_iters, hc_eps, norm_eps, .. } = *site;
    [sinkhorn_iters.into(), hc_eps.into(), norm_eps.into(), norm.eps.into()]
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
                    (&step.all.tokens).into(),
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
        check_mix(OP, x, function, n_mix, width)?;
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

    /// Room for a sublayer's input of `rows` rows, and for how its output is to be mixed.
    fn next_input(
        &self,
        rows: usize,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        const OP: &str = "hc_pre";
        check_len(OP, "base", site.base.len, HC_MIX)?;
        check_len(OP, "scale", site.scale.len, 3)?;
        let width = norm.weight.len;
        let mut normed = self.tensor(rows, width, Element::Bf16)?;
        normed.quantised = Some(self.buffer(2 * rows * width)?);
        let post = self.tensor(rows, HC_MULT, Element::F32)?;
        let comb = self.tensor(rows, HC_MULT * HC_MULT, Element::F32)?;
        Ok(HcPre { normed, mix: HcMix { post, comb } })
    }

    /// From the mixing products to the sublayer's input.
    fn finish_pre(
        &self,
        mixes: &Mixes,
        x: &DeviceTensor,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        let width = norm.weight.len;
        let next = self.next_input(x.rows, site, norm)?;
        let mut args = vec![Arg::from(&mixes.partial), (&x.values).into()];
        args.extend(next_args(&next, site, norm));
        args.extend([width, mixes.n_splits].map(|n| Arg::U32(n as u32)));
        args.extend(site_args(site, norm));
        // SAFETY: shapes as the kernel's header wants them; `mixes` was made from this x.
        unsafe {
            self.launch(Call {
                kernel: "hc_pre",
                grid: [x.rows, 1, 1],
                threads: PRE_THREADS,
                shared_bytes: PRE_SHARED,
                args: &args,
            })?;
        }
        Ok(next)
    }

    /// A launch of `kernel` that makes a sublayer's input of `rows` rows by itself, if one can.
    fn whole_boundary(
        &self,
        kernel: &'static str,
        rows: usize,
        width: usize,
    ) -> Result<Option<Call<'static>>, OpError> {
        if rows > FEW {
            return Ok(None);
        }
        let per_block = width.div_ceil(SLICE).div_ceil(CLUSTER);
        let threads = (per_block * SLICE + 32) as u32;
        let shared_bytes = (BOUNDARY_SHARED + per_block * SLICE_SHARED) as u32;
        let grid = [CLUSTER, rows.div_ceil(CLUSTER_TOKENS), 1];
        let block = [threads, 1, 1];
        let launch =
            Launch { kernel, grid: [CLUSTER as u32, 1, 1], block, shared_bytes, args: &[] };
        let has_room = self.memory.device().has_room_for(&launch).map_err(OpError::device)?;
        Ok(has_room.then_some(Call { kernel, grid, threads, shared_bytes, args: &[] }))
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
        let width = norm.weight.len;
        let Some(call) = self.whole_boundary("hc_begin", x.rows, width)? else {
            let mixes = self.mixes(x, &site.function, HC_MIX, width)?;
            return self.finish_pre(&mixes, x, site, norm);
        };
        check_mix(call.kernel, x, &site.function, HC_MIX, width)?;
        let next = self.next_input(x.rows, site, norm)?;
        let function = site.function.f32(call.kernel, "f32 fn")?;
        let mut args = vec![Arg::from(&x.values), function.into()];
        args.extend(next_args(&next, site, norm));
        args.extend([width, x.rows].map(|n| Arg::U32(n as u32)));
        args.extend(site_args(site, norm));
        // SAFETY: x is [rows, 4 * width] bf16, fn [24, 4 * width] f32 and `next` has x's rows; width is a
        // multiple of 8.
        unsafe { self.launch(Call { args: &args, ..call })? };
        Ok(next)
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
        (site, norm): (&HcSite<Self>, &Norm<Self>),
        step: &DeviceStep,
    ) -> Result<HcPre<DeviceTensor>, OpError> {
        const OP: &str = "hc_post_mix";
        self.check_post(OP, x, y, mix)?;
        let width = y.cols;
        check_len(OP, "norm weight", norm.weight.len, width)?;
        check_mix(OP, x, &site.function, HC_MIX, width)?;
        let function = site.function.f32(OP, "f32 fn")?;
        let out = self.tensor(x.rows, x.cols, Element::Bf16)?;
        let (before, addends) = ([&mix.post, &mix.comb], addend_args(y));
        let before = before.map(|tensor| Arg::from(&tensor.values));
        let sizes = [width, x.rows].map(|n| Arg::U32(n as u32));
        if let Some(call) = self.whole_boundary("hc_boundary", x.rows, width)? {
            let next = self.next_input(x.rows, site, norm)?;
            let mut args = vec![Arg::from(&x.values), function.into(), (&y.values).into()];
            args.extend(before);
            args.push((&out.values).into());
            args.extend(addends);
            args.extend(next_args(&next, site, norm));
            args.extend(sizes);
            args.extend(site_args(site, norm));
            // SAFETY: as below, and `next` has x's rows.
            unsafe { self.launch(Call { args: &args, ..call })? };
            *x = out;
            return Ok(next);
        }
        let n_splits = width.div_ceil(SLICE);
        let partial = self.buffer(4 * x.rows * n_splits * (HC_MIX + 1))?;
        let mut args = vec![Arg::from(&x.values), function.into(), (&partial).into()];
        args.push((&y.values).into());
        args.extend(before);
        args.push((&out.values).into());
        if x.rows == 1 {
            let next = self.next_input(1, site, norm)?;
            args.push(Arg::U32(width as u32));
            args.extend(addends);
            args.extend(next_args(&next, site, norm));
            args.extend(site_args(site, norm));
            args.push(step.ended(ENDED_BOUNDARY));
            // SAFETY: as below, and `next` has a row; boundaries wait for each other, so no other counts in
            // the step's word for them.
            unsafe {
                self.launch(Call {
                    kernel: "hc_boundary_1",
                    grid: [n_splits, 1, 1],
                    threads: PRE_THREADS,
                    shared_bytes: BOUNDARY_1_SHARED,
                    args: &args,
                })?;
            }
            *x = out;
            return Ok(next);
        }
        args.extend(sizes);
        args.extend(addends);
        // SAFETY: as for `hc_mix` and `hc_post`, whose checks are all above.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n_splits, x.rows.div_ceil(MIX_TOKENS), 1],
                threads: MIX_THREADS,
                shared_bytes: MIX_SHARED,
                args: &args,
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
