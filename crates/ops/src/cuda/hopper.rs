//! Launchers of the kernels for sm_90a: linear layers, and routed experts on tensor cores in FP8.
//!
//! Linear weights lie as in the checkpoint and are copied through tensor maps, experts in tiles, packed
//! on the device when they are loaded; activations of FP8 layers are rounded to the FP8
//! grid by the kernel that reads them, or by `act_quant_tiles` where there are many. Of few tokens, and where results must not depend on
//! their number, bf16 layers run the kernels of sm_80.
//!
//! Not here: what the kernels do (`kernels/linear/linear90.cu`, `kernels/moe/experts90.cu`).

use fathom_core::parallel::QUANT_BLOCK;

use super::device::Arg;
use super::draw::Values;
use super::experts::{DeviceExperts, ExpertLayout};
use super::linear::{DeviceLinear, Fp8Form, LinearData, Part, upload_part};
use super::memory::{Buffer, Place};
use super::moe::Groups;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceRouting, DeviceTensor, Element, u32_values};
use super::tensor_map::{MapElement, Swizzle, TensorMap, TensorMapSpec};
use crate::error::check_len;
use crate::weight::WeightData;
use crate::{Activations, OpError, WeightSource};

/// Threads of a block of every kernel here, and blocks that fill the largest Hopper card.
pub(super) const THREADS: u32 = 384;
const MAX_BLOCKS: usize = 132;
/// Rows of a tile, its bytes in FP8 and in FP4, and channels of a tile of gate and up.
pub(super) const TILE_ROWS: usize = 64;
const FP8_TILE: usize = 8192;
const FP4_TILE: usize = 4352;
const GATE_UP_CHANNELS: usize = 32;
/// Tokens of a block of the forms for few tokens.
pub(super) const FEW: usize = 8;

/// Shared memory of `Pipeline` (`kernels/include/pipeline90.cuh`): `parts` blocks of x in a slot.
/// `x_bytes` of a row of x.
const fn pipeline_bytes(
    tile: usize,
    parts: usize,
    tokens: usize,
    x_bytes: usize,
    slots: usize,
) -> u32 {
    let weights = (slots * 2 * tile).next_multiple_of(1024);
    let x = slots * parts * tokens * (x_bytes + 4);
    let sums = (3 - parts) * tokens / 2 * 128 * 4;
    (weights + x + sums + 16 * slots).next_multiple_of(1024) as u32
}
pub(super) const LINEAR_SHARED_8: u32 = pipeline_bytes(FP8_TILE, 2, FEW, 128, 6);
const LINEAR_SHARED_64: u32 = pipeline_bytes(FP8_TILE, 2, 64, 128, 4);
const LINEAR_SHARED_128: u32 = pipeline_bytes(FP8_TILE, 1, 128, 128, 4);
const EXPERTS_SHARED_8: u32 = pipeline_bytes(FP4_TILE, 2, FEW, 128, 8);
const EXPERTS_SHARED_128: u32 = pipeline_bytes(FP4_TILE, 1, 128, 128, 5);

/// The experts of a layer in the tiles of `moe_pack_fp4`, with whether they are wide.
#[derive(Debug, Clone)]
pub(crate) struct ExpertTiles {
    gate_up: (Buffer, bool),
    down: (Buffer, bool),
}

/// Rows of activations in the tiles of `act_quant_tiles`.
struct XTiles {
    codes: Buffer,
    scales: Buffer,
    rows: usize,
}

/// Blocks that share a row tile: by the matrix alone, so that the order of addition is too.
pub(super) fn cluster_of(n_tiles: usize) -> usize {
    match n_tiles {
        120.. => 1,
        60..120 => 2,
        _ => 4,
    }
}

/// Whether the experts are those that `experts90` takes.
pub(crate) fn are_fp4(experts: &[[WeightSource; 3]]) -> bool {
    experts.iter().flatten().all(|source| matches!(source.data, WeightData::Fp4 { .. }))
}

impl DeviceTensor {
    /// Whether the values are to be taken on the FP8 grid by whoever reads them.
    pub(crate) fn is_taken_on_grid(&self) -> bool {
        self.quantised.as_ref().is_some_and(|grid| grid.address() == self.values.address())
    }
}

impl CudaOps {
    /// Whether the forms of this file are used.
    pub(crate) fn is_hopper(&self) -> bool {
        self.memory.device().arch() == "sm_90a" && self.activations == Activations::Fp8Grid
    }

    /// Whether layers of bf16 activations have a form for many tokens here. Their sums are ordered
    /// otherwise than those of few tokens.
    pub(crate) fn has_wgmma_bf16(&self) -> bool {
        self.memory.device().arch() == "sm_90a" && !self.is_deterministic()
    }

    /// The matrix with a map of its FP8 codes; others as they are.
    pub(crate) fn mapped_linear90(&self, linear: DeviceLinear) -> Result<DeviceLinear, OpError> {
        let LinearData::Fp8 { codes, scales, .. } = &linear.data else { return Ok(linear) };
        let (rows, cols) = (linear.rows, linear.cols);
        let box_dims = [QUANT_BLOCK as u32, TILE_ROWS as u32];
        let map = self.tensor_map(MapElement::U8, codes, &[cols, rows], &[cols], &box_dims)?;
        let form = Fp8Form::Mapped(Box::new(map));
        let data = LinearData::Fp8 { codes: codes.clone(), scales: scales.clone(), form };
        Ok(DeviceLinear { data, ..linear })
    }

    /// A map of a tensor with the 128-byte swizzle, innermost dimension first; `strides` in bytes.
    pub(crate) fn tensor_map(
        &self,
        element: MapElement,
        values: &Buffer,
        dims: &[usize],
        strides: &[usize],
        box_dims: &[u32],
    ) -> Result<TensorMap, OpError> {
        let longs = |values: &[usize]| values.iter().map(|&n| n as u64).collect::<Vec<_>>();
        let (dims, strides) = (longs(dims), longs(strides));
        let spec = TensorMapSpec {
            element,
            address: values.address(),
            dims: &dims,
            strides: &strides,
            box_dims,
            swizzle: Swizzle::B128,
        };
        self.memory.device().encode(&spec).map_err(OpError::device)
    }

    /// Rows of `x` as tiles: those that `pairs` lists (divided by `per_row`), or all.
    fn x_tiles(
        &self,
        x: &DeviceTensor,
        groups: Option<(&Groups, usize)>,
    ) -> Result<XTiles, OpError> {
        let rows = groups.map_or(x.rows.next_multiple_of(8), |(groups, _)| groups.max_listed);
        let n_blocks = x.cols.div_ceil(QUANT_BLOCK);
        let codes = self.buffer(n_blocks * rows * QUANT_BLOCK)?;
        let scales = self.buffer(n_blocks * rows * 4)?;
        let (pairs, n_items) = groups
            .map_or((Arg::NULL, Arg::NULL), |(g, _)| ((&g.pairs).into(), (&g.n_items).into()));
        let per_row = groups.map_or(1, |(_, per_row)| per_row);
        // SAFETY: x is [rows, cols] bf16, and listed pairs divided by `per_row` are rows of it; the
        // outputs have `rows` rows of whole blocks.
        unsafe {
            self.launch(Call {
                kernel: "act_quant_tiles",
                grid: [rows.div_ceil(16), n_blocks, 1],
                threads: 256,
                shared_bytes: 0,
                args: &[
                    (&x.values).into(),
                    pairs,
                    n_items,
                    (&codes).into(),
                    (&scales).into(),
                    (x.cols as u32).into(),
                    (x.rows as u32).into(),
                    (rows as u32).into(),
                    (per_row as u32).into(),
                ],
            })?;
        }
        Ok(XTiles { codes, scales, rows })
    }

    /// `x W^T` for the matrix `w` with this map of its codes. The caller has checked the shapes.
    pub(crate) fn linear90(
        &self,
        w: &DeviceLinear,
        map: &TensorMap,
        scales: &Buffer,
        x: &DeviceTensor,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        const OP: &str = "linear90";
        let (n_rows, k, rows) = (w.rows, w.cols, out.rows);
        check_len(OP, "columns of x", x.cols, k)?;
        let n_tiles = n_rows.div_ceil(TILE_ROWS);
        let cluster = cluster_of(n_tiles);
        let tiles = if rows > FEW { Some(self.x_tiles(x, None)?) } else { None };
        let whole = n_tiles.div_ceil(2) * rows.div_ceil(128);
        let (kernel, grid, shared_bytes) = match (tiles.is_some(), cluster) {
            (true, _) if 4 * whole >= 3 * MAX_BLOCKS => {
                ("linear90_128", [n_tiles.div_ceil(2), rows.div_ceil(128), 1], LINEAR_SHARED_128)
            }
            (true, cluster) => {
                let kernel = ["linear90_64_c1", "linear90_64_c2", "linear90_64_c4"][cluster / 2];
                (kernel, [cluster * n_tiles, rows.div_ceil(64), 1], LINEAR_SHARED_64)
            }
            (false, cluster) => {
                let kernel = ["linear90_8_c1", "linear90_8_c2", "linear90_8_c4"][cluster / 2];
                (kernel, [cluster * n_tiles, 1, 1], LINEAR_SHARED_8)
            }
        };
        let (x_codes, x_scales) = tiles
            .as_ref()
            .map_or((Arg::NULL, Arg::NULL), |x| ((&x.codes).into(), (&x.scales).into()));
        let x_rows = tiles.as_ref().map_or(0, |x| x.rows);
        let is_f32 = u32::from(out.element == Element::F32);
        let sizes = [n_rows, k, x.cols, x_rows, rows, out.cols].map(|n| Arg::U32(n as u32));
        let mut args = vec![
            Arg::Map(*map),
            scales.into(),
            (&x.values).into(),
            x_codes,
            x_scales,
            (&out.values).into(),
        ];
        args.extend(sizes);
        args.extend([Arg::U32(is_f32), Arg::U32(2 * cluster as u32)]);
        // SAFETY: the caller's checks; kernels guard ragged tokens, rows and k themselves.
        unsafe { self.launch(Call { kernel, grid, threads: THREADS, shared_bytes, args: &args }) }
    }

    /// Groups of rows of `W` times groups of columns of a bf16 `x` (see [`Part`]) for many tokens: a bf16
    /// matrix, or with `scales` the codes of an FP8 one. The caller has checked the shapes.
    pub(crate) fn linear90_bf16(
        &self,
        w: &DeviceLinear,
        (values, scales): (&Buffer, Option<&Buffer>),
        part: Part,
        x: &DeviceTensor,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        let Part { n_rows, n_groups } = part;
        let (k, rows, n_tiles) = (w.cols, out.rows, n_rows.div_ceil(TILE_ROWS));
        let cluster = cluster_of(n_groups * n_tiles);
        let whole = n_groups * n_tiles.div_ceil(2) * rows.div_ceil(128);
        let is_whole = 4 * whole >= 3 * MAX_BLOCKS;
        let tokens = if is_whole { 128 } else { 64 };
        let (kernels, x_bytes, slots, element, box_cols) = match scales {
            None => (
                [
                    "linear90_bf16_64_c1",
                    "linear90_bf16_64_c2",
                    "linear90_bf16_64_c4",
                    "linear90_bf16_128",
                ],
                128,
                [5, 4],
                MapElement::Bf16,
                64,
            ),
            Some(_) => (
                ["linear90_wo_64_c1", "linear90_wo_64_c2", "linear90_wo_64_c4", "linear90_wo_128"],
                256,
                [3, 3],
                MapElement::U8,
                128,
            ),
        };
        let row_bytes = |cols: usize| cols * element.bits() as usize / 8;
        let w_map =
            self.tensor_map(element, values, &[k, w.rows], &[row_bytes(k)], &[box_cols, 64])?;
        let (x_dims, x_stride) = ([x.cols, x.rows], [2 * x.cols]);
        let x_map =
            self.tensor_map(MapElement::Bf16, &x.values, &x_dims, &x_stride, &[64, tokens as u32])?;
        let scales = scales.map_or(Arg::NULL, Arg::from);
        let mut args = vec![Arg::Map(w_map), scales, Arg::Map(x_map), (&out.values).into()];
        args.extend([n_rows, k, rows, out.cols].map(|n| Arg::U32(n as u32)));
        args.push(Arg::U32(u32::from(out.element == Element::F32)));
        args.push(Arg::U32(2 * cluster as u32));
        let blocks = if is_whole { n_tiles.div_ceil(2) } else { cluster * n_tiles };
        let parts = if is_whole { 1 } else { 2 };
        // SAFETY: the caller's checks; copies end with the tensors of their maps, and kernels guard
        // ragged tokens and rows themselves.
        unsafe {
            self.launch(Call {
                kernel: kernels[if is_whole { 3 } else { cluster / 2 }],
                grid: [blocks, rows.div_ceil(tokens), n_groups],
                threads: THREADS,
                shared_bytes: pipeline_bytes(
                    FP8_TILE,
                    parts,
                    tokens,
                    x_bytes,
                    slots[usize::from(is_whole)],
                ),
                args: &args,
            })
        }
    }

    /// Packs `[w1, w3, w2]` of each expert.
    pub(crate) fn tiled_experts(
        &self,
        experts: &[[WeightSource; 3]],
        first_id: usize,
    ) -> Result<DeviceExperts, OpError> {
        let shape = |w: &WeightSource| (w.n_rows(), w.n_cols());
        let (channels, width) = experts.first().map_or((0, 0), |[w1, ..]| shape(w1));
        for [w1, w3, w2] in experts {
            for (source, expected) in
                [(w1, (channels, width)), (w3, (channels, width)), (w2, (width, channels))]
            {
                if shape(source) != expected || !expected.1.is_multiple_of(32) {
                    let got = shape(source);
                    let reason = format!("is {got:?}, expected {expected:?}, columns in 32s");
                    return Err(OpError::Weight { name: source.name.clone(), reason });
                }
            }
        }
        let gate_up = experts.iter().map(|[w1, w3, _]| (w1, Some(w3))).collect::<Vec<_>>();
        let down = experts.iter().map(|[_, _, w2]| (w2, None)).collect::<Vec<_>>();
        let gate_up_tiles = channels.div_ceil(GATE_UP_CHANNELS);
        let layout = ExpertLayout::Tiles(ExpertTiles {
            gate_up: self.packed(&gate_up, gate_up_tiles)?,
            down: self.packed(&down, width.div_ceil(TILE_ROWS))?,
        });
        Ok(DeviceExperts { first_id, n_experts: experts.len(), channels, width, layout })
    }

    /// One matrix (or gate and up) of all experts in `n_tiles` row tiles each; whether it is wide.
    fn packed(
        &self,
        matrices: &[(&WeightSource, Option<&WeightSource>)],
        n_tiles: usize,
    ) -> Result<(Buffer, bool), OpError> {
        let (rows, k) = matrices.first().map_or((0, 0), |(w, _)| (w.n_rows(), w.n_cols()));
        let n_blocks = k.div_ceil(QUANT_BLOCK);
        let bytes = n_tiles * n_blocks * FP4_TILE;
        let tiles = self.memory.buffer(Place::Weights, matrices.len() * bytes)?;
        let n_wide = self.uploaded(&[0; 4])?;
        let parts = |source: &WeightSource| {
            let WeightData::Fp4 { codes, scales } = &source.data else {
                let reason = "the CUDA backend takes FP4 experts only".to_owned();
                return Err(OpError::Weight { name: source.name.clone(), reason });
            };
            // Packed from a copy that is gone afterwards.
            let copy = |data: &[u8], values_per_byte: usize, drawn: Values| {
                let bytes = source.n_rows() * source.n_cols() / values_per_byte;
                let buffer = self.buffer(bytes)?;
                if self.memory.keeps_contents() {
                    upload_part(&buffer, 0, source, data, |cols| cols / values_per_byte)?;
                } else {
                    self.memory.draw(&buffer, 0, bytes, drawn)?;
                }
                Ok::<_, OpError>(buffer)
            };
            let exponents = Values::fp4_exponents(source.n_cols());
            Ok((copy(codes, 2, Values::Fp4Codes)?, copy(scales, 32, exponents)?))
        };
        let pack = |wide: bool| {
            for (index, (matrix, up)) in matrices.iter().enumerate() {
                let (codes, exponents) = parts(matrix)?;
                let up = up.map(parts).transpose()?;
                let (up_codes, up_exponents) =
                    up.as_ref().map_or((Arg::NULL, Arg::NULL), |(c, e)| (c.into(), e.into()));
                // SAFETY: codes and exponents are those of [rows, k], up's too; the expert's tiles
                // begin at its place.
                unsafe {
                    self.launch(Call {
                        kernel: "moe_pack_fp4",
                        grid: [n_blocks, n_tiles, 1],
                        threads: 128,
                        shared_bytes: 0,
                        args: &[
                            (&codes).into(),
                            (&exponents).into(),
                            up_codes,
                            up_exponents,
                            Arg::Address(tiles.address() + (index * bytes) as u64),
                            (&n_wide).into(),
                            (rows as u32).into(),
                            (k as u32).into(),
                            u32::from(wide).into(),
                        ],
                    })?;
                }
            }
            Ok(())
        };
        pack(false)?;
        let is_wide = u32_values(&n_wide.read(0, 4)?)[0] != 0;
        if is_wide {
            pack(true)?;
        }
        Ok((tiles, is_wide))
    }

    /// The experts' parts of each pair, `[n_pairs, width]` bf16; `x` as it is.
    pub(crate) fn experts90(
        &self,
        experts: &DeviceExperts,
        tiles: &ExpertTiles,
        x: &DeviceTensor,
        routing: &DeviceRouting,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        let (width, channels, k) = (experts.width, experts.channels, routing.k);
        let n_pairs = routing.rows * k;
        let is_few = routing.rows <= FEW;
        let groups = self.grouped(experts, routing)?;
        let shared_bytes = if is_few { EXPERTS_SHARED_8 } else { EXPERTS_SHARED_128 };
        let run = |kernels: [&'static str; 4],
                   (matrix, is_wide): &(Buffer, bool),
                   n_tiles: usize,
                   x: &DeviceTensor,
                   per_row,
                   rest: &[Arg]| {
            let x_tiles =
                if is_few { None } else { Some(self.x_tiles(x, Some((&groups, per_row)))?) };
            let n_units = if is_few { n_tiles } else { n_tiles.div_ceil(2) };
            let (codes, scales) = x_tiles
                .as_ref()
                .map_or((Arg::NULL, Arg::NULL), |x| ((&x.codes).into(), (&x.scales).into()));
            let mut args = vec![
                matrix.into(),
                (&groups.items).into(),
                (&groups.n_items).into(),
                (&groups.pairs).into(),
                (&x.values).into(),
                codes,
                scales,
                (x_tiles.as_ref().map_or(0, |x| x.rows) as u32).into(),
            ];
            args.extend_from_slice(rest);
            // SAFETY: tiles are those of all experts; items name local experts and runs of `pairs`;
            // x has a row per token (or per pair) and the results one per pair.
            unsafe {
                self.launch(Call {
                    kernel: kernels[usize::from(!is_few) + 2 * usize::from(*is_wide)],
                    grid: [(groups.max_items * n_units).min(MAX_BLOCKS), 1, 1],
                    threads: THREADS,
                    shared_bytes,
                    args: &args,
                })
            }
        };
        let h = self.tensor(n_pairs, channels, Element::Bf16)?;
        let kernels = [
            "moe_gate_up90_8",
            "moe_gate_up90_128",
            "moe_gate_up90_8_wide",
            "moe_gate_up90_128_wide",
        ];
        let rest = [
            (&routing.weights).into(),
            (&h.values).into(),
            (channels as u32).into(),
            (width as u32).into(),
            (k as u32).into(),
            limit.into(),
        ];
        run(kernels, &tiles.gate_up, channels.div_ceil(GATE_UP_CHANNELS), x, k, &rest)?;
        let parts = self.tensor(n_pairs, width, Element::Bf16)?;
        let kernels =
            ["moe_down90_8", "moe_down90_128", "moe_down90_8_wide", "moe_down90_128_wide"];
        let rest = [(&parts.values).into(), (width as u32).into(), (channels as u32).into()];
        run(kernels, &tiles.down, width.div_ceil(TILE_ROWS), &h, 1, &rest)?;
        Ok(parts)
    }
}
