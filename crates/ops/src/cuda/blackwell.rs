//! Launchers of the kernels for sm_100f: FP8 linear layers and routed experts as block-scaled products.
//!
//! Weights lie as in the checkpoint and are copied through tensor maps; their scales are put into the
//! order of tensor memory when they are loaded. Activations are rounded to the FP8 grid by
//! `act_quant_tiles100`. Weights these forms cannot take (scales that are no powers of two, widths that
//! are no multiples of 128) run the kernels of sm_80, as does a device that is asked for unquantised
//! activations.
//!
//! Not here: what the kernels do (`kernels/linear/linear100.cu`, `kernels/moe/experts100.cu`).

use fathom_core::parallel::QUANT_BLOCK;

use super::device::Arg;
use super::draw::Values;
use super::experts::{DeviceExperts, ExpertLayout};
use super::linear::{DeviceLinear, Fp8Form, LinearData, ScaledMap, upload_part};
use super::memory::{Buffer, Place};
use super::moe::Groups;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceRouting, DeviceTensor, Element};
use super::tensor_map::MapElement;
use crate::error::check_len;
use crate::weight::{Scales, WeightData};
use crate::{Activations, OpError, WeightSource};

/// Threads of a block of every product here.
pub(super) const THREADS: u32 = 224;
/// Rows of a tile, channels of a tile of gate and up, and how many of one matrix are side by side.
pub(super) const TILE_ROWS: usize = 128;
const GATE_UP_CHANNELS: usize = 64;
const HALF: usize = 16;
/// Bytes of the scales of a tile's block of 128 columns.
const SCALES: usize = 512;
/// Rows of scales of activations behind the last.
const X_SCALES_PAD: usize = 32;
/// Tokens of a block of the experts that round their input themselves.
const FEWEST: usize = 8;
/// Tokens of a block of the forms for few tokens and for many.
pub(super) const FEW: usize = 32;
pub(super) const MANY: usize = 128;

/// Shared memory of `Pipeline` (`kernels/include/pipeline100.cuh`).
const fn pipeline_bytes(tokens: usize, slots: usize) -> u32 {
    let slot = (TILE_ROWS + tokens) * QUANT_BLOCK + 2 * SCALES;
    (slots * (slot + 16) + 48).next_multiple_of(1024) as u32
}
const SHARED_FEWEST: u32 = pipeline_bytes(FEWEST, 6);
const SHARED_FEW: u32 = pipeline_bytes(FEW, 5);
const SHARED_MANY: u32 = pipeline_bytes(MANY, 3);

/// The FP4 experts of a layer, gate beside up; the codes are kept for the maps.
#[derive(Debug, Clone)]
pub(crate) struct ExpertMaps {
    gate_up: ScaledMap,
    down: ScaledMap,
    _codes: [Buffer; 2],
}

/// Rows of activations in the tiles of `act_quant_tiles100`.
struct XTiles {
    codes: Buffer,
    scales: Buffer,
    rows: usize,
}

/// Whether block-scaled products can take a matrix' scales.
pub(crate) fn has_e8m0_scales(source: &WeightSource) -> bool {
    matches!(&source.data, WeightData::Fp8 { scales: Scales::Ue8m0(_), .. })
}

/// Whether the experts are those that `experts100` takes: FP4, of one shape, in whole blocks.
pub(crate) fn can_map(experts: &[[WeightSource; 3]]) -> bool {
    let is_fp4 = |w: &WeightSource| matches!(w.data, WeightData::Fp4 { .. });
    let is_whole = |w: &WeightSource| {
        w.n_rows().is_multiple_of(QUANT_BLOCK) && w.n_cols().is_multiple_of(QUANT_BLOCK)
    };
    experts.iter().flatten().all(|w| is_fp4(w) && is_whole(w))
}

impl CudaOps {
    /// Whether the forms of this file are used.
    pub(crate) fn is_blackwell(&self) -> bool {
        self.memory.device().arch() == "sm_100f" && self.activations == Activations::Fp8Grid
    }

    /// The matrix with a map of its FP8 codes; others as they are. Scales are powers of two.
    pub(crate) fn mapped_linear(&self, linear: DeviceLinear) -> Result<DeviceLinear, OpError> {
        let LinearData::Fp8 { codes, scales, .. } = &linear.data else { return Ok(linear) };
        let (rows, cols) = (linear.rows, linear.cols);
        let (n_tiles, n_blocks) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(QUANT_BLOCK));
        let packed = self.memory.buffer(Place::Weights, n_tiles * n_blocks * SCALES)?;
        // SAFETY: `scales` has one for each tile and block, `packed` 512 bytes.
        unsafe {
            self.launch(Call {
                kernel: "linear_pack_scales100",
                grid: [n_blocks, n_tiles, 1],
                threads: TILE_ROWS as u32,
                shared_bytes: 0,
                args: &[scales.into(), (&packed).into()],
            })?;
        }
        // Products may start before a launch before them has ended, and read scales at once.
        packed.read(0, 1)?;
        let map = self.tensor_map(
            MapElement::U8,
            codes,
            &[cols, rows],
            &[cols],
            &[128, TILE_ROWS as u32],
        )?;
        let form = Fp8Form::Scaled(Box::new(ScaledMap { map, scales: packed }));
        let data = LinearData::Fp8 { codes: codes.clone(), scales: scales.clone(), form };
        Ok(DeviceLinear { data, ..linear })
    }

    /// Rows of `x` as tiles: those that `pairs` lists (divided by `per_row`), or all.
    fn x_tiles100(
        &self,
        x: &DeviceTensor,
        groups: Option<(&Groups, usize)>,
    ) -> Result<XTiles, OpError> {
        let rows = groups.map_or(x.rows.next_multiple_of(8), |(groups, _)| groups.max_listed);
        let n_blocks = x.cols.div_ceil(QUANT_BLOCK);
        let codes = self.buffer(n_blocks * rows * QUANT_BLOCK)?;
        let scales = self.buffer(n_blocks * (rows + X_SCALES_PAD) * 16)?;
        let (pairs, n_items) = groups
            .map_or((Arg::NULL, Arg::NULL), |(g, _)| ((&g.pairs).into(), (&g.n_items).into()));
        let per_row = groups.map_or(1, |(_, per_row)| per_row);
        // SAFETY: x is [rows, cols] bf16, and listed pairs divided by `per_row` are rows of it; the
        // outputs have `rows` rows of whole blocks.
        unsafe {
            self.launch(Call {
                kernel: "act_quant_tiles100",
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

    /// The first `n_rows` rows of `x W^T` for the matrix `w`. The caller has checked the shapes.
    pub(crate) fn linear100(
        &self,
        w: &DeviceLinear,
        mapped: &ScaledMap,
        n_rows: usize,
        x: &DeviceTensor,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        check_len("linear100", "columns of x", x.cols, w.cols)?;
        let n_tiles = n_rows.div_ceil(TILE_ROWS);
        // Blocks that share a row tile: by the matrix alone, so that the order of addition is too.
        let split = match w.rows.div_ceil(TILE_ROWS) {
            120.. => 0,
            60..120 => 1,
            30..60 => 2,
            _ => 3,
        };
        let (kernels, tokens, shared_bytes) = if out.rows <= FEW {
            let few = ["linear100_32_c1", "linear100_32_c2", "linear100_32_c4", "linear100_32_c8"];
            (few, FEW, SHARED_FEW)
        } else {
            let many =
                ["linear100_128_c1", "linear100_128_c2", "linear100_128_c4", "linear100_128_c8"];
            (many, MANY, SHARED_MANY)
        };
        let x = self.x_tiles100(x, None)?;
        let sizes = [n_rows, w.cols, x.rows, out.rows, out.cols].map(|n| Arg::U32(n as u32));
        let mut args = vec![
            Arg::Map(mapped.map),
            (&mapped.scales).into(),
            (&x.codes).into(),
            (&x.scales).into(),
            (&out.values).into(),
        ];
        args.extend(sizes);
        args.push(Arg::U32(u32::from(out.element == Element::F32)));
        let grid = [n_tiles << split, out.rows.div_ceil(tokens), 1];
        // SAFETY: the caller's checks; the map and the scales are those of `w`; kernels guard ragged
        // tokens and rows themselves, and copies end with the tensor.
        unsafe {
            self.launch(Call {
                kernel: kernels[split],
                grid,
                threads: THREADS,
                shared_bytes,
                args: &args,
            })
        }
    }

    /// Uploads `[w1, w3, w2]` of each expert, for which [`can_map`] holds.
    pub(crate) fn mapped_experts(
        &self,
        experts: &[[WeightSource; 3]],
        first_id: usize,
    ) -> Result<DeviceExperts, OpError> {
        let (channels, width) =
            experts.first().map_or((0, 0), |[w1, ..]| (w1.n_rows(), w1.n_cols()));
        for [w1, w3, w2] in experts {
            for (source, expected) in
                [(w1, (channels, width)), (w3, (channels, width)), (w2, (width, channels))]
            {
                let got = (source.n_rows(), source.n_cols());
                if got != expected {
                    let reason = format!("is {got:?}, expected {expected:?}");
                    return Err(OpError::Weight { name: source.name.clone(), reason });
                }
            }
        }
        let n_experts = experts.len();
        let gate_up = experts.iter().map(|[w1, w3, _]| (w1, Some(w3))).collect::<Vec<_>>();
        let down = experts.iter().map(|[_, _, w2]| (w2, None)).collect::<Vec<_>>();
        let (gate_up_codes, gate_up_scales) =
            self.mapped_matrices(&gate_up, channels.div_ceil(GATE_UP_CHANNELS))?;
        let (down_codes, down_scales) = self.mapped_matrices(&down, width.div_ceil(TILE_ROWS))?;
        // (column, row of 16, gate or up, sixteen, expert)
        let row = width / 2;
        let gate_up_map = self.tensor_map(
            MapElement::Padded4,
            &gate_up_codes,
            &[width, HALF, 2, channels / HALF, n_experts],
            &[row, channels * row, HALF * row, 2 * channels * row],
            &[128, HALF as u32, 2, (GATE_UP_CHANNELS / HALF) as u32, 1],
        )?;
        let row = channels / 2;
        let down_map = self.tensor_map(
            MapElement::Padded4,
            &down_codes,
            &[channels, width, n_experts],
            &[row, width * row],
            &[128, TILE_ROWS as u32, 1],
        )?;
        let layout = ExpertLayout::Maps(Box::new(ExpertMaps {
            gate_up: ScaledMap { map: gate_up_map, scales: gate_up_scales },
            down: ScaledMap { map: down_map, scales: down_scales },
            _codes: [gate_up_codes, down_codes],
        }));
        Ok(DeviceExperts { first_id, n_experts, channels, width, layout })
    }

    /// Codes of one matrix (or gate and up) of all experts, and scales in `n_tiles` row tiles each.
    fn mapped_matrices(
        &self,
        matrices: &[(&WeightSource, Option<&WeightSource>)],
        n_tiles: usize,
    ) -> Result<(Buffer, Buffer), OpError> {
        let Some((first, first_up)) = matrices.first() else {
            return Ok((
                self.memory.buffer(Place::Weights, 1)?,
                self.memory.buffer(Place::Weights, 1)?,
            ));
        };
        let (rows, k) = (first.n_rows(), first.n_cols());
        let n_blocks = k / QUANT_BLOCK;
        let (code_bytes, scale_bytes) = (rows * k / 2, n_tiles * n_blocks * SCALES);
        let n_parts = 1 + usize::from(first_up.is_some());
        let codes = self.memory.buffer(Place::Weights, matrices.len() * n_parts * code_bytes)?;
        let scales = self.memory.buffer(Place::Weights, matrices.len() * scale_bytes)?;
        let upload = |source: &WeightSource, at: usize| {
            let WeightData::Fp4 { codes: data, scales: exponents } = &source.data else {
                let reason = "is not FP4, as the other experts are".to_owned();
                return Err(OpError::Weight { name: source.name.clone(), reason });
            };
            // Put into order from a copy that is gone afterwards.
            let copy = self.buffer(rows * k / 32)?;
            if self.memory.keeps_contents() {
                upload_part(&codes, at, source, data, |cols| cols / 2)?;
                upload_part(&copy, 0, source, exponents, |cols| cols / 32)?;
            } else {
                self.memory.draw(&codes, at, code_bytes, Values::Fp4Codes)?;
                self.memory.draw(&copy, 0, rows * k / 32, Values::fp4_exponents(k))?;
            }
            Ok(copy)
        };
        for (index, (matrix, up)) in matrices.iter().enumerate() {
            let at = index * n_parts * code_bytes;
            let exponents = upload(matrix, at)?;
            let up = up.map(|up| upload(up, at + code_bytes)).transpose()?;
            // SAFETY: exponents are those of [rows, k], up's too; the expert's scales begin at their
            // place.
            unsafe {
                self.launch(Call {
                    kernel: "moe_pack_scales100",
                    grid: [n_blocks, n_tiles, 1],
                    threads: TILE_ROWS as u32,
                    shared_bytes: 0,
                    args: &[
                        (&exponents).into(),
                        up.as_ref().map_or(Arg::NULL, Arg::from),
                        Arg::Address(scales.address() + (index * scale_bytes) as u64),
                        (rows as u32).into(),
                        (k as u32).into(),
                    ],
                })?;
            }
        }
        Ok((codes, scales))
    }

    /// The experts' parts of each pair, `[n_pairs, width]` bf16; `x` as it is.
    pub(crate) fn experts100(
        &self,
        experts: &DeviceExperts,
        maps: &ExpertMaps,
        x: &DeviceTensor,
        routing: &DeviceRouting,
        limit: f32,
    ) -> Result<DeviceTensor, OpError> {
        let (width, channels, k) = (experts.width, experts.channels, routing.k);
        let n_pairs = routing.rows * k;
        let groups = self.grouped(experts, routing)?;
        let forms = [(FEWEST, SHARED_FEWEST), (FEW, SHARED_FEW), (usize::MAX, SHARED_MANY)];
        let form = forms.iter().position(|&(most, _)| routing.rows <= most).unwrap_or(2);
        let shared_bytes = forms[form].1;
        let run = |kernels: [&'static str; 3],
                   mapped: &ScaledMap,
                   n_tiles: usize,
                   (x, per_row): (&DeviceTensor, Option<usize>),
                   rest: &[Arg]| {
            let mut args = vec![Arg::Map(mapped.map), (&mapped.scales).into()];
            args.extend([&groups.items, &groups.n_items, &groups.pairs].map(Arg::from));
            let tiles;
            if form == 0 {
                args.push((&x.values).into());
                args.extend(per_row.map(|n| Arg::U32(n as u32)));
            } else {
                tiles = self.x_tiles100(x, Some((&groups, per_row.unwrap_or(1))))?;
                args.extend([&tiles.codes, &tiles.scales].map(Arg::from));
                args.push((tiles.rows as u32).into());
            }
            args.extend_from_slice(rest);
            // SAFETY: maps and scales are those of all experts; items name local experts and runs of
            // `pairs`; x has a row per listed pair (or `per_row` pairs) and the results one per pair.
            unsafe {
                self.launch(Call {
                    kernel: kernels[form],
                    grid: [n_tiles, groups.max_items, 1],
                    threads: THREADS,
                    shared_bytes,
                    args: &args,
                })
            }
        };
        let h = self.tensor(n_pairs, channels, Element::Bf16)?;
        let rest = [
            (&routing.weights).into(),
            (&h.values).into(),
            (channels as u32).into(),
            (width as u32).into(),
            limit.into(),
        ];
        let kernels = ["moe_gate_up100_8", "moe_gate_up100_32", "moe_gate_up100_128"];
        run(kernels, &maps.gate_up, channels.div_ceil(GATE_UP_CHANNELS), (x, Some(k)), &rest)?;
        let parts = self.tensor(n_pairs, width, Element::Bf16)?;
        let rest = [(&parts.values).into(), (width as u32).into(), (channels as u32).into()];
        let kernels = ["moe_down100_8", "moe_down100_32", "moe_down100_128"];
        run(kernels, &maps.down, width.div_ceil(TILE_ROWS), (&h, None), &rest)?;
        Ok(parts)
    }
}
