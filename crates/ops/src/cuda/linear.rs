//! Matrices in device memory, in the checkpoint's layout, and products with them.
//!
//! FP8 scales become f32 when loaded, so that both kinds of scale are one.

use fathom_core::num::Ue8m0;
use fathom_core::parallel::QUANT_BLOCK;

use super::device::Arg;
use super::draw::Values;
use super::memory::{Buffer, Memory, Place};
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceTensor, Element, f32_bytes};
use super::tensor_map::TensorMap;
use crate::weight::{Scales, WeightData};
use crate::{Activations, OpError, WeightSource};

/// A matrix prepared for products `y = W x`.
#[derive(Debug, Clone)]
pub struct DeviceLinear {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: LinearData,
}

/// Values of a matrix, row-major.
#[derive(Debug, Clone)]
pub(crate) enum LinearData {
    /// E4M3 codes and f32 scales per 128 x 128.
    Fp8 {
        codes: Buffer,
        scales: Buffer,
        form: Fp8Form,
    },
    Bf16(Buffer),
    F32(Buffer),
}

/// How FP8 codes lie in memory.
#[derive(Debug, Clone)]
pub(crate) enum Fp8Form {
    /// As in the checkpoint, like the others.
    Rows,
    /// The same, and every scale is known to be a power of two.
    RowsOfPowers,
    /// With a map of them.
    Mapped(Box<TensorMap>),
    /// With a map of them, and scales for block-scaled products.
    Scaled(Box<ScaledMap>),
}

impl Fp8Form {
    /// Whether every scale is known to be a power of two.
    pub(crate) const fn has_powers(&self) -> bool {
        matches!(self, Self::RowsOfPowers | Self::Scaled(_))
    }
}

/// What block-scaled products need beside the codes.
#[derive(Debug, Clone)]
pub(crate) struct ScaledMap {
    pub(crate) map: TensorMap,
    pub(crate) scales: Buffer,
}

/// Threads of a block of the skinny products, and the output rows it computes.
pub(super) const GEMM_THREADS: u32 = 256;
pub(super) const GEMM_ROWS: usize = 32;
/// Shared memory of the forms for 8 and for 32 tokens.
pub(crate) const GEMM_SHARED_8: u32 = 4 * 4 * 8 * 136 * 2;
const GEMM_SHARED_32: u32 = 2 * 4 * 32 * 136 * 2;

/// Rows and tokens of a block of the products for many tokens, and its shared memory.
pub(super) const TILED_ROWS: usize = 128;
pub(super) const TILED_TOKENS: usize = 64;
pub(super) const TILED_SHARED: u32 = 96 << 10;
/// Fewer such blocks leave multiprocessors idle: half of an A100's.
const MIN_TILED_BLOCKS: usize = 54;

/// The products of sm_80 by tokens of a block; all have the same bits.
#[derive(Clone, Copy)]
enum Form {
    Few,
    Some,
    Many,
}

impl Form {
    fn of(n_rows: usize, n_tokens: usize, n_groups: usize) -> Self {
        let n_tiled = n_rows.div_ceil(TILED_ROWS) * n_tokens.div_ceil(TILED_TOKENS) * n_groups;
        match n_tokens {
            ..=8 => Self::Few,
            33.. if n_tiled >= MIN_TILED_BLOCKS => Self::Many,
            _ => Self::Some,
        }
    }

    /// The kernel of `few, some, many`, rows and tokens of its blocks, and their shared memory.
    const fn pick(self, [few, some, many]: [&'static str; 3]) -> (&'static str, [usize; 2], u32) {
        match self {
            Self::Few => (few, [GEMM_ROWS, 8], GEMM_SHARED_8),
            Self::Some => (some, [GEMM_ROWS, 32], GEMM_SHARED_32),
            Self::Many => (many, [TILED_ROWS, TILED_TOKENS], TILED_SHARED),
        }
    }
}

/// Bytes of cut rows that are gathered on the host at a time.
const CUT_BYTES: usize = 4 << 20;

/// Writes the wanted part of row-major bytes, `bytes_of(cols)` per row, to `buffer` from `start` on.
/// Whole rows go straight from the mapped file; only rows that are cut pass through host memory, some
/// MiB at a time.
pub(crate) fn upload_part(
    buffer: &Buffer,
    start: usize,
    source: &WeightSource,
    data: &[u8],
    bytes_of: impl Fn(usize) -> usize,
) -> Result<(), OpError> {
    let stride = bytes_of(source.stored_cols);
    let range = bytes_of(source.cols.start)..bytes_of(source.cols.end);
    if range.len() == stride {
        return buffer.write(start, &data[source.rows.start * stride..source.rows.end * stride]);
    }
    let rows_at_once = (CUT_BYTES / range.len().max(1)).max(1);
    let mut at = start;
    let mut gathered = Vec::with_capacity(rows_at_once.min(source.n_rows()) * range.len());
    for first in source.rows.clone().step_by(rows_at_once) {
        gathered.clear();
        for row in first..source.rows.end.min(first + rows_at_once) {
            gathered.extend_from_slice(&data[row * stride..][range.clone()]);
        }
        buffer.write(at, &gathered)?;
        at += gathered.len();
    }
    Ok(())
}

fn refused(source: &WeightSource, reason: impl Into<String>) -> OpError {
    OpError::Weight { name: source.name.clone(), reason: reason.into() }
}

impl DeviceLinear {
    /// Uploads the wanted part of a matrix.
    ///
    /// # Errors
    /// [`OpError::Weight`] for FP4 (only experts have it), for FP8 scales that are no numbers and
    /// for widths the kernels cannot load; [`OpError::Device`] if there is no room.
    pub(crate) fn load(memory: &Memory, source: &WeightSource) -> Result<Self, OpError> {
        let (rows, cols) = (source.n_rows(), source.n_cols());
        let multiple = if matches!(source.data, WeightData::Fp8 { .. }) { 16 } else { 8 };
        if rows == 0 || !cols.is_multiple_of(multiple) {
            let reason = format!("[{rows}, {cols}]: columns must be a multiple of {multiple}");
            return Err(refused(source, reason));
        }
        let upload = |data: &[u8], value_bytes: usize, drawn: Values| {
            let bytes = rows * cols * value_bytes;
            let buffer = memory.buffer(Place::Weights, bytes)?;
            if memory.keeps_contents() {
                upload_part(&buffer, 0, source, data, |cols| cols * value_bytes)?;
            } else {
                memory.draw(&buffer, 0, bytes, drawn)?;
            }
            Ok::<_, OpError>(buffer)
        };
        let deviation = Values::deviation(source);
        let data = match &source.data {
            WeightData::Fp8 { codes, scales } => LinearData::Fp8 {
                codes: upload(codes, 1, Values::Fp8Codes)?,
                scales: upload_scales(memory, source, scales)?,
                form: Fp8Form::Rows,
            },
            WeightData::Bf16(values) => {
                LinearData::Bf16(upload(values, 2, Values::Bf16 { deviation })?)
            }
            WeightData::F32(values) => {
                LinearData::F32(upload(values, 4, Values::F32 { deviation })?)
            }
            WeightData::Fp4 { .. } => {
                return Err(refused(source, "FP4 outside of the routed experts"));
            }
        };
        Ok(Self { rows, cols, data })
    }

    /// The same FP8 matrix, whose scales are powers of two.
    pub(crate) fn with_powers(self) -> Self {
        let LinearData::Fp8 { codes, scales, form: Fp8Form::Rows } = self.data else { return self };
        Self { data: LinearData::Fp8 { codes, scales, form: Fp8Form::RowsOfPowers }, ..self }
    }

    /// The f32 values, for a matrix that must have them.
    pub(crate) fn f32(&self, op: &'static str, arg: &'static str) -> Result<&Buffer, OpError> {
        match &self.data {
            LinearData::F32(values) => Ok(values),
            _ => Err(OpError::Shape { op, arg, got: 0, expected: self.rows * self.cols }),
        }
    }

    /// The bf16 values, likewise.
    pub(crate) fn bf16(&self, op: &'static str, arg: &'static str) -> Result<&Buffer, OpError> {
        match &self.data {
            LinearData::Bf16(values) => Ok(values),
            _ => Err(OpError::Shape { op, arg, got: 0, expected: self.rows * self.cols }),
        }
    }
}

/// Scales of the wanted blocks, uploaded.
fn upload_scales(
    memory: &Memory,
    source: &WeightSource,
    scales: &Scales,
) -> Result<Buffer, OpError> {
    let n_blocks = |n: usize| n.div_ceil(QUANT_BLOCK);
    let n = n_blocks(source.n_rows()) * n_blocks(source.n_cols());
    let buffer = memory.buffer(Place::Weights, 4 * n)?;
    if memory.keeps_contents() {
        buffer.write(0, &f32_bytes(&block_scales(source, scales)?))?;
    } else {
        memory.draw(&buffer, 0, 4 * n, Values::fp8_scales(source.n_cols()))?;
    }
    Ok(buffer)
}

/// Scales of the wanted blocks as f32, row-major.
pub(crate) fn block_scales(source: &WeightSource, scales: &Scales) -> Result<Vec<f32>, OpError> {
    let stride = source.stored_cols.div_ceil(QUANT_BLOCK);
    let blocks =
        |range: &std::ops::Range<usize>| range.start / QUANT_BLOCK..range.end.div_ceil(QUANT_BLOCK);
    let mut out = Vec::new();
    for row in blocks(&source.rows) {
        for column in blocks(&source.cols) {
            let index = row * stride + column;
            out.push(match scales {
                Scales::Ue8m0(bytes) => Ue8m0::from_byte(bytes[index])
                    .ok_or_else(|| refused(source, "a scale is NaN"))?
                    .to_f32(),
                Scales::F32(bytes) => {
                    let bytes = &bytes[4 * index..4 * index + 4];
                    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
                }
            });
        }
    }
    Ok(out)
}

/// Rows of `W` and columns of `x` and `out` that a product uses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Rows of W from its first on, of each group: group `g` has the rows from `g n_rows` on and the
    /// columns of x from `g cols` on. Several groups have whole 128s of rows.
    pub(crate) n_rows: usize,
    pub(crate) n_groups: usize,
}

impl CudaOps {
    /// `x` as an FP8 or FP4 layer sees it: `[rows, cols]` bf16 on the FP8 grid, or unchanged; on
    /// sm_90a and (but for few tokens) sm_100f marked, for their kernels to round it.
    pub(crate) fn linear_input(&self, x: &DeviceTensor) -> Result<DeviceTensor, OpError> {
        if self.is_hopper() || self.is_blackwell() && !self.is_skinny_blackwell(x.rows) {
            return Ok(DeviceTensor { quantised: Some(x.values.clone()), ..x.clone() });
        }
        self.rounded_input(x)
    }

    /// The same with the values themselves on the grid, on every architecture.
    pub(crate) fn rounded_input(&self, x: &DeviceTensor) -> Result<DeviceTensor, OpError> {
        const OP: &str = "act_quant_grid";
        x.expect(OP, "x", x.rows, x.cols, Element::Bf16)?;
        if self.activations == Activations::Bf16 {
            return Ok(x.clone());
        }
        if let Some(quantised) = x.quantised.as_ref().filter(|_| !x.is_taken_on_grid()) {
            return Ok(DeviceTensor { values: quantised.clone(), quantised: None, ..x.clone() });
        }
        if !x.cols.is_multiple_of(8) {
            return Err(OpError::Shape { op: OP, arg: "x", got: x.cols, expected: x.cols / 8 * 8 });
        }
        let out = self.tensor(x.rows, x.cols, Element::Bf16)?;
        // SAFETY: both tensors are [rows, cols] bf16 and cols is a multiple of 8.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [x.cols.div_ceil(2048), x.rows, 1],
                threads: 256,
                shared_bytes: 0,
                args: &[(&x.values).into(), (&out.values).into(), (x.cols as u32).into()],
            })?;
        }
        Ok(out)
    }

    /// `x W^T` as `element`, of the input as it is.
    pub(crate) fn linear(
        &self,
        w: &DeviceLinear,
        x: &DeviceTensor,
        element: Element,
    ) -> Result<DeviceTensor, OpError> {
        let out = self.tensor(x.rows, w.rows, element)?;
        x.expect("linear", "x", x.rows, w.cols, Element::Bf16)?;
        let part = Part { n_rows: w.rows, n_groups: 1 };
        self.linear_part(w, part, x, &out)?;
        Ok(out)
    }

    /// `x W^T` of up to five matrices, in one launch if all of them are bf16.
    pub(crate) fn linear_each(
        &self,
        matrices: &[(DeviceLinear, Element)],
        x: &DeviceTensor,
    ) -> Result<Vec<DeviceTensor>, OpError> {
        const OP: &str = "linear_bf16_each";
        const MAX: usize = 5;
        let data = |(w, _): &(DeviceLinear, Element)| match &w.data {
            LinearData::Bf16(values) => Some(values.clone()),
            _ => None,
        };
        let Some(values) = matrices.iter().map(data).collect::<Option<Vec<_>>>() else {
            return matrices.iter().map(|(w, element)| self.linear(w, x, *element)).collect();
        };
        if x.rows > 8 && self.has_wgmma_bf16() {
            return matrices.iter().map(|(w, element)| self.linear(w, x, *element)).collect();
        }
        if matrices.len() > MAX {
            let got = matrices.len();
            return Err(OpError::OutOfRange { op: OP, what: "matrix", got, limit: MAX });
        }
        if x.rows > 8 && self.has_tensor_bf16() {
            return self.linear100_each(matrices, x);
        }
        let mut args = vec![Arg::from(&x.values)];
        args.extend([x.cols, x.rows].map(|n| Arg::U32(n as u32)));
        let form = Form::of(matrices.iter().map(|(w, _)| w.rows).sum(), x.rows, 1);
        let kernels = ["linear_bf16_each_8", "linear_bf16_each_32", "linear_bf16_each_64"];
        let (kernel, [rows, tokens], shared_bytes) = form.pick(kernels);
        let (mut outs, mut n_blocks) = (Vec::new(), 0);
        for ((w, element), values) in matrices.iter().zip(&values) {
            x.expect(OP, "x", x.rows, w.cols, Element::Bf16)?;
            let out = self.tensor(x.rows, w.rows, *element)?;
            n_blocks += w.rows.div_ceil(rows);
            args.extend([Arg::from(values), Arg::from(&out.values)]);
            args.extend([w.rows as u32, u32::from(*element == Element::F32)].map(Arg::U32));
            outs.push(out);
        }
        for _ in matrices.len()..MAX {
            args.extend([Arg::NULL, Arg::NULL, Arg::U32(0), Arg::U32(0)]);
        }
        // SAFETY: every matrix is [rows, cols] bf16 with x's columns, a multiple of 8 as loading
        // checked, and has an output of its own.
        unsafe {
            self.launch(Call {
                kernel,
                grid: [n_blocks, x.rows.div_ceil(tokens), 1],
                threads: GEMM_THREADS,
                shared_bytes,
                args: &args,
            })?;
        }
        Ok(outs)
    }

    /// The same for an FP8 layer: quantised input, bf16 output.
    pub(crate) fn quantised_linear(
        &self,
        w: &DeviceLinear,
        x: &DeviceTensor,
    ) -> Result<DeviceTensor, OpError> {
        match self.linear_on_grid(w, x)? {
            Some(out) => Ok(out),
            None => self.linear(w, &self.linear_input(x)?, Element::Bf16),
        }
    }

    /// Groups of rows of `W` times groups of columns of `x`, into groups of columns of `out`.
    pub(crate) fn linear_part(
        &self,
        w: &DeviceLinear,
        part: Part,
        x: &DeviceTensor,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        const OP: &str = "linear";
        let Part { n_rows, n_groups } = part;
        let fits = |arg, got: usize, limit: usize| {
            if got <= limit {
                Ok(())
            } else {
                Err(OpError::OutOfRange { op: OP, what: arg, got, limit })
            }
        };
        x.expect(OP, "x", out.rows, x.cols, Element::Bf16)?;
        fits("row of W", n_groups * n_rows, w.rows)?;
        fits("column of x", n_groups * w.cols, x.cols)?;
        fits("column of out", n_groups * n_rows, out.cols)?;
        // Vector loads begin at multiples of 8 values.
        fits("misaligned column", x.cols % 8, 0)?;
        fits("misaligned row", if n_groups > 1 { n_rows % QUANT_BLOCK } else { 0 }, 0)?;
        let is_f32 = u32::from(out.element == Element::F32);
        let sizes = [n_rows, w.cols, x.cols, out.rows, out.cols].map(|n| Arg::U32(n as u32));
        if out.rows > 8 && self.has_wgmma_bf16() {
            match &w.data {
                LinearData::Fp8 { codes, scales, .. } if !x.is_taken_on_grid() => {
                    return self.linear90_bf16(w, (codes, Some(scales)), part, x, out);
                }
                LinearData::Bf16(values) => {
                    return self.linear90_bf16(w, (values, None), part, x, out);
                }
                _ => {}
            }
        }
        if out.rows > 8 && self.has_tensor_bf16() {
            match &w.data {
                LinearData::Fp8 { codes, scales, form }
                    if !x.is_taken_on_grid() && form.has_powers() =>
                {
                    return self.linear100_wo(w, (codes, scales), part, x, out);
                }
                LinearData::Bf16(values) => {
                    return self.linear100_bf16(&[(w, values, out)], part, x);
                }
                _ => {}
            }
        }
        let (kernels, mut args) = match &w.data {
            LinearData::Fp8 { codes, scales, form } => {
                if x.is_taken_on_grid() {
                    fits("group of an FP8 layer", n_groups, 1)?;
                    return match form {
                        Fp8Form::Mapped(map) => self.linear90(w, map, scales, x, out),
                        Fp8Form::Scaled(mapped) => self.linear100(w, mapped, n_rows, x, out),
                        Fp8Form::Rows | Fp8Form::RowsOfPowers => {
                            self.linear_part(w, part, &self.rounded_input(x)?, out)
                        }
                    };
                }
                (
                    ["linear_fp8_8", "linear_fp8_32", "linear_fp8_64"],
                    vec![codes.into(), scales.into(), (&x.values).into(), (&out.values).into()],
                )
            }
            LinearData::Bf16(values) => {
                let kernels = ["linear_bf16_8", "linear_bf16_32", "linear_bf16_64"];
                (kernels, vec![values.into(), (&x.values).into(), (&out.values).into()])
            }
            LinearData::F32(_) => {
                return Err(OpError::Shape { op: OP, arg: "f32 matrix", got: 4, expected: 2 });
            }
        };
        args.extend(sizes);
        args.push(Arg::U32(is_f32));
        let form = Form::of(n_rows, out.rows, n_groups);
        let (kernel, [rows, tokens], shared_bytes) = form.pick(kernels);
        // SAFETY: the groups' rows of W, columns of x and columns of out lie inside of their buffers
        // (checked above); kernels guard ragged tokens, rows and k themselves.
        unsafe {
            self.launch(Call {
                kernel,
                grid: [n_rows.div_ceil(rows), out.rows.div_ceil(tokens), n_groups],
                threads: GEMM_THREADS,
                shared_bytes,
                args: &args,
            })
        }
    }
}
