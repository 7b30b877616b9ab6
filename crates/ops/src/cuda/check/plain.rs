//! Plain kernels: a thread per output, weights as in the checkpoint. At real sizes, where the CPU would take hours,
//! all outputs of the real kernels are compared with theirs; at small ones they are compared with the
//! CPU's.
//!
//! Not here: what the results may differ by (the cases).

use fathom_core::model_config::HEAD_DIM;

use super::exact::{self, Expert, Site};
use super::hyper::Results;
use super::{Report, Size};
use crate::cuda::device::Arg;
use crate::cuda::memory::Buffer;
use crate::cuda::ops::{Call, CudaOps};
use crate::cuda::tensor::{f32_bytes, f32_values, u32_bytes};
use crate::{Activations, OpError, Scales, WeightData, WeightSource};

/// `FORMAT_..` of the kernels.
const BF16: u32 = 0;
const FP8: u32 = 1;
const FP8_F32: u32 = 2;
const FP4: u32 = 3;
const F32: u32 = 4;

/// Whether `rows` are few enough for plain kernels where an emulator runs them.
pub(super) const fn is_affordable(size: Size, rows: usize) -> bool {
    matches!(size, Size::Real) || rows <= 9
}

/// A launch of `kernel` over `n` outputs of each of `rows` rows.
///
/// # Safety
/// As [`Device::launch`](crate::cuda::Device::launch).
unsafe fn launch(
    ops: &CudaOps,
    kernel: &'static str,
    (n, rows): (usize, usize),
    args: &[Arg],
) -> Result<(), OpError> {
    let grid = [n.div_ceil(128), rows, 1];
    // SAFETY: the caller's promise is the one asked for.
    unsafe { ops.launch(Call { kernel, grid, threads: 128, shared_bytes: 0, args }) }
}

fn values(ops: &CudaOps, values: &[f32]) -> Result<Buffer, OpError> {
    ops.uploaded(&f32_bytes(values))
}

/// Matrices of one shape and format, back to back.
struct Matrices {
    codes: Buffer,
    scales: Buffer,
    format: u32,
    n: usize,
    k: usize,
}

impl Matrices {
    fn new<'a>(
        ops: &CudaOps,
        sources: impl Iterator<Item = &'a WeightSource>,
    ) -> Result<Self, OpError> {
        let (mut all_codes, mut all_scales) = (Vec::new(), Vec::new());
        let (mut format, mut n, mut k) = (BF16, 0, 0);
        for source in sources {
            (n, k) = (source.n_rows(), source.n_cols());
            let (codes, scales): (&[u8], &[u8]) = match &source.data {
                WeightData::Fp8 { codes, scales: Scales::Ue8m0(scales) } => {
                    format = FP8;
                    (codes, scales)
                }
                WeightData::Fp8 { codes, scales: Scales::F32(scales) } => {
                    format = FP8_F32;
                    (codes, scales)
                }
                WeightData::Fp4 { codes, scales } => {
                    format = FP4;
                    (codes, scales)
                }
                WeightData::Bf16(bytes) => (bytes, &[]),
                WeightData::F32(bytes) => {
                    format = F32;
                    (bytes, &[])
                }
            };
            all_codes.extend_from_slice(codes);
            all_scales.extend_from_slice(scales);
        }
        // No buffer is empty.
        all_scales.extend([0; 4]);
        let (codes, scales) = (ops.uploaded(&all_codes)?, ops.uploaded(&all_scales)?);
        Ok(Self { codes, scales, format, n, k })
    }

    /// `[rows, n]`: row `i` of the result is that of row `i / rows_per_x` of `x` with matrix `chosen[i]`.
    fn product(
        &self,
        ops: &CudaOps,
        x: &Buffer,
        chosen: Option<&Buffer>,
        (rows, rows_per_x): (usize, usize),
    ) -> Result<Buffer, OpError> {
        let out = ops.buffer(4 * rows * self.n)?;
        let args = [
            x.into(),
            chosen.map_or(Arg::NULL, Arg::from),
            (&self.codes).into(),
            (&self.scales).into(),
            (&out).into(),
            (self.n as u32).into(),
            (self.k as u32).into(),
            self.format.into(),
            (rows_per_x as u32).into(),
        ];
        // SAFETY: x is [rows / rows_per_x, k] f32, `chosen` names matrices that there are, `out` is
        // [rows, n] f32.
        unsafe { launch(ops, "plain_product", (self.n, rows), &args)? };
        Ok(out)
    }
}

/// Puts `n` values on the FP8 grid if layers take them so.
fn quantise(ops: &CudaOps, x: &Buffer, n: usize) -> Result<(), OpError> {
    if ops.activations() != Activations::Fp8Grid {
        return Ok(());
    }
    let n_blocks = n / 128;
    // SAFETY: n f32 values, in whole blocks of 128.
    unsafe { launch(ops, "plain_grid", (n_blocks, 1), &[x.into(), (n_blocks as u32).into()]) }
}

fn read(buffer: &Buffer, n: usize) -> Result<Vec<f32>, OpError> {
    Ok(f32_values(&buffer.read(0, 4 * n)?))
}

/// `x W^T`, all of it; `is_layer` if the input is that of an FP8 layer.
pub(super) fn product(
    report: &Report<'_>,
    source: &WeightSource,
    x: &[f32],
    is_layer: bool,
) -> Result<Vec<f32>, OpError> {
    let ops = report.ops;
    let matrices = Matrices::new(ops, std::iter::once(source))?;
    let (rows, input) = (x.len() / matrices.k, values(ops, x)?);
    if is_layer {
        quantise(ops, &input, x.len())?;
    }
    read(&matrices.product(ops, &input, None, (rows, 1))?, rows * matrices.n)
}

/// A mixture of experts for all rows of `x`, for the experts `ids` with their routing weights, `[rows, k]`.
pub(super) fn mixture(
    report: &Report<'_>,
    (experts, shared): (&[Expert], &Expert),
    x: &[f32],
    (ids, weights): (&[u32], &[f32]),
    limit: f32,
) -> Result<Vec<f32>, OpError> {
    let (ops, width) = (report.ops, shared[0].n_cols());
    let rows = x.len() / width;
    let k = ids.len() / rows;
    // The parts of a row are added in the order of their ids.
    let mut pairs: Vec<(u32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
    pairs.chunks_mut(k).for_each(|row| row.sort_by_key(|pair| pair.0));
    let (ids, weights): (Vec<u32>, Vec<f32>) = pairs.into_iter().unzip();
    let (ids, weights) = (ops.uploaded(&u32_bytes(&ids))?, values(ops, &weights)?);
    let input = values(ops, x)?;
    quantise(ops, &input, x.len())?;
    let down = |sources: [Matrices; 3], chosen: Option<(&Buffer, &Buffer)>, rows_per_x: usize| {
        let [gate, up, down] = sources;
        let n_rows = rows * rows_per_x;
        let (matrix, weights) = chosen.unzip();
        let hidden = gate.product(ops, &input, matrix, (n_rows, rows_per_x))?;
        let up = up.product(ops, &input, matrix, (n_rows, rows_per_x))?;
        let n = n_rows * gate.n;
        let args = [
            (&hidden).into(),
            (&up).into(),
            weights.map_or(Arg::NULL, Arg::from),
            (gate.n as u32).into(),
            (n as u32).into(),
            limit.into(),
        ];
        // SAFETY: both are [n_rows, channels] f32, there is a weight for each row.
        unsafe { launch(ops, "plain_gate", (n, 1), &args)? };
        quantise(ops, &hidden, n)?;
        down.product(ops, &hidden, matrix, (n_rows, 1))
    };
    let all = |part: usize| Matrices::new(ops, experts.iter().map(|expert| &expert[part]));
    let parts = down([all(0)?, all(1)?, all(2)?], Some((&ids, &weights)), k)?;
    let one = |part: usize| Matrices::new(ops, std::iter::once(&shared[part]));
    let shared = down([one(0)?, one(1)?, one(2)?], None, 1)?;
    let out = ops.buffer(4 * x.len())?;
    let args = [
        (&parts).into(),
        (&shared).into(),
        (&out).into(),
        (width as u32).into(),
        (k as u32).into(),
        (x.len() as u32).into(),
    ];
    // SAFETY: `parts` is [rows, k, width] f32, the others are [rows, width].
    unsafe { launch(ops, "plain_sum", (x.len(), 1), &args)? };
    read(&out, x.len())
}

/// Copies of the residual stream, and numbers that a site mixes them by.
const COPIES: usize = 4;
const MIXES: usize = 24;

/// A site's mixes `[rows, 24]` and the normalised sublayer input `[rows, width]` of the copies `x`.
fn site(ops: &CudaOps, site: &Site<'_>, x: &Buffer, rows: usize) -> Result<[Buffer; 2], OpError> {
    let (width, n) = (site.norm.len(), site.base.len());
    let size = |n: usize| Arg::U32(n as u32);
    let factor_of = |x: &Buffer, cols: usize| {
        let out = ops.buffer(4 * rows)?;
        let args = [x.into(), (&out).into(), size(cols), size(rows)];
        // SAFETY: x is [rows, cols] f32, there is a factor for each row.
        unsafe { launch(ops, "plain_factor", (rows, 1), &args)? };
        Ok::<_, OpError>(out)
    };
    let matrices = Matrices::new(ops, std::iter::once(site.function))?;
    let products = matrices.product(ops, x, None, (rows, 1))?;
    let factors = factor_of(x, COPIES * width)?;
    let (base, scale) = (values(ops, site.base)?, values(ops, site.scale)?);
    let mix = ops.buffer(4 * rows * MIXES)?;
    let named = [&products, &factors, &base, &scale, &mix].map(Arg::from);
    // SAFETY: the products are [rows, n], the mixes [rows, 24] f32; base and scale are the site's.
    unsafe { launch(ops, "plain_mix", (rows, 1), &[&named[..], &[size(n), size(rows)]].concat())? };
    let (out, n) = (ops.buffer(4 * rows * width)?, rows * width);
    let args = [x.into(), (&mix).into(), (&out).into(), size(width), size(n)];
    // SAFETY: x is [rows, 4, width] f32, `out` [rows, width].
    unsafe { launch(ops, "plain_collapse", (n, 1), &args)? };
    let (factors, norm) = (factor_of(&out, width)?, values(ops, site.norm)?);
    let args = [(&out).into(), (&factors).into(), (&norm).into(), size(width), size(n)];
    // SAFETY: `out` is [rows, width] f32, with a factor for each row and a weight for each channel.
    unsafe { launch(ops, "plain_scale", (n, 1), &args)? };
    Ok([mix, out])
}

/// Results of hyper-connections over the copies `x [rows, 4, width]` and a sublayer's output `y`.
pub(super) fn hyper_connections(
    report: &Report<'_>,
    [first, second, head]: [Site<'_>; 3],
    x: &[f32],
    y: &[f32],
) -> Result<Results, OpError> {
    let (ops, width) = (report.ops, first.norm.len());
    let (rows, n) = (y.len() / width, x.len());
    let (x, y) = (values(ops, x)?, values(ops, y)?);
    let [mix, normed] = site(ops, &first, &x, rows)?;
    let copies = ops.buffer(4 * n)?;
    let named = [&x, &y, &mix, &copies].map(Arg::from);
    let sizes = [Arg::U32(width as u32), Arg::U32(n as u32)];
    // SAFETY: x and `copies` are [rows, 4, width] f32, y is [rows, width], the mixes [rows, 24].
    unsafe { launch(ops, "plain_post", (n, 1), &[&named[..], &sizes].concat())? };
    let [next_mix, next] = site(ops, &second, &copies, rows)?;
    let [_, collapsed] = site(ops, &head, &x, rows)?;
    let mix = read(&mix, rows * MIXES)?;
    let part = |mix: &[f32], part: std::ops::Range<usize>| -> Vec<f32> {
        mix.chunks_exact(MIXES).flat_map(|row| &row[part.clone()]).copied().collect()
    };
    let (copies, all) = (read(&copies, n)?, rows * width);
    Ok(vec![
        ("hc_pre normed", read(&normed, all)?, width),
        ("hc_pre post", part(&mix, 4..8), 4),
        ("hc_pre comb", part(&mix, 8..MIXES), 16),
        ("hc_post", copies.clone(), COPIES * width),
        ("boundary x", copies, COPIES * width),
        ("boundary normed", read(&next, all)?, width),
        ("boundary comb", part(&read(&next_mix, rows * MIXES)?, 8..MIXES), 16),
        ("hc_head", read(&collapsed, all)?, width),
    ])
}

/// What attention reads: keys `[n_keys, 512]`, and of each row which of them, with its position.
#[derive(Default)]
pub(super) struct Keys {
    keys: Vec<f32>,
    pub(super) lists: Vec<Vec<u32>>,
    pub(super) positions: Vec<usize>,
}

impl Keys {
    /// Adds a key; its number.
    pub(super) fn push(&mut self, key: &[f32]) -> u32 {
        self.keys.extend_from_slice(key);
        (self.keys.len() / HEAD_DIM) as u32 - 1
    }

    /// The keys of a row.
    pub(super) fn of(&self, row: usize) -> impl Iterator<Item = &[f32]> {
        let key = |&key: &u32| &self.keys[key as usize * HEAD_DIM..(key as usize + 1) * HEAD_DIM];
        self.lists[row].iter().map(key)
    }
}

/// Attention of all rows and heads, `[rows, n_heads, 512]`, rotated back.
pub(super) fn attend(
    report: &Report<'_>,
    q: &[f32],
    read_keys: &Keys,
    sinks: &[f32],
    frequencies: &[f32],
) -> Result<Vec<f32>, OpError> {
    let (ops, n_heads, n_rows) = (report.ops, sinks.len(), q.len() / HEAD_DIM);
    let most = read_keys.lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut list = vec![u32::MAX; read_keys.lists.len() * most];
    for (row, own) in list.chunks_exact_mut(most).zip(&read_keys.lists) {
        row[..own.len()].copy_from_slice(own);
    }
    let (list, sink) = (ops.uploaded(&u32_bytes(&list))?, values(ops, sinks)?);
    let (q, keys) = (values(ops, q)?, values(ops, &read_keys.keys)?);
    let (scores, out) = (ops.buffer(4 * n_rows * most)?, ops.buffer(4 * n_rows * HEAD_DIM)?);
    let sizes = [Arg::U32(n_heads as u32), Arg::U32(most as u32)];
    let named = [&q, &keys, &list, &scores].map(Arg::from);
    // SAFETY: q is [n_rows, 512] f32, the lists name keys that there are, `scores` has one for each.
    unsafe { launch(ops, "plain_scores", (most, n_rows), &[&named[..], &sizes].concat())? };
    let named = [&scores, &keys, &list, &sink, &out].map(Arg::from);
    // SAFETY: the scores of all keys of the lists were written above; `out` is [n_rows, 512] f32.
    unsafe { launch(ops, "plain_attend", (HEAD_DIM, n_rows), &[&named[..], &sizes].concat())? };
    let mut out = read(&out, n_rows * HEAD_DIM)?;
    for (head, values) in out.chunks_exact_mut(HEAD_DIM).enumerate() {
        exact::rotate_back(values, read_keys.positions[head / n_heads], frequencies);
    }
    Ok(out)
}
