//! The backend itself: a device, and the memory operations of [`Backend`].
//!
//! Numeric mode: `bf16` only, as served. Linear layers take their inputs on the FP8 grid (the
//! official semantics, exact in bf16 tensor cores) or, with [`Activations::Bf16`], as they are.

use std::sync::Arc;

use fathom_core::Numerics;

use super::cache::DeviceCache;
use super::device::{Arg, Buffer, Device, Launch};
use super::experts::DeviceExperts;
use super::linear::DeviceLinear;
use super::step::DeviceStep;
use super::tensor::{
    DeviceExpertTable, DeviceRouting, DeviceSelection, DeviceTensor, DeviceVector, Element,
    bf16_bytes, bf16_values, f32_bytes, f32_values, u32_bytes, u32_values,
};
use crate::error::check_len;
use crate::traits::Backend;
use crate::{Batch, CacheSpec, OpError, WeightSource};

/// What the inputs of FP8 and FP4 layers look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// On the FP8 grid of their blocks of 128, as the official code has them.
    Fp8Grid,
    /// Unquantised bf16: strictly more precise, and what a GPU without FP8 prefers.
    Bf16,
}

/// The operators on a CUDA device (or on the emulator of one).
#[derive(Debug, Clone)]
pub struct CudaOps {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) activations: Activations,
}

/// A launch under construction: shape and arguments.
pub(crate) struct Call<'a> {
    pub(crate) kernel: &'static str,
    pub(crate) grid: [usize; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    pub(crate) args: &'a [Arg],
}

impl CudaOps {
    /// Operators on `device`.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, activations: Activations) -> Self {
        Self { device, activations }
    }

    /// Launches a kernel; a grid without blocks launches nothing.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(crate) unsafe fn launch(&self, call: Call<'_>) -> Result<(), OpError> {
        if call.grid.contains(&0) {
            return Ok(());
        }
        let mut grid = [1; 3];
        for (axis, (out, got)) in grid.iter_mut().zip(call.grid).enumerate() {
            let limit = if axis == 0 { i32::MAX as usize } else { 65_535 };
            if got > limit {
                return Err(OpError::OutOfRange { op: call.kernel, what: "grid", got, limit });
            }
            *out = got as u32;
        }
        let launch = Launch {
            kernel: call.kernel,
            grid,
            block: [call.threads, 1, 1],
            shared_bytes: call.shared_bytes,
            args: call.args,
        };
        // SAFETY: the caller's promise is the one asked for here.
        unsafe { self.device.launch(launch) }.map_err(OpError::device)
    }

    /// Uninitialised `[rows, cols]`.
    pub(crate) fn tensor(
        &self,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<DeviceTensor, OpError> {
        let values = self.buffer(rows * cols * element.bytes())?;
        Ok(DeviceTensor { rows, cols, element, values, quantised: None })
    }

    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer, OpError> {
        Buffer::new(&self.device, bytes)
    }

    pub(crate) fn uploaded(&self, bytes: &[u8]) -> Result<Buffer, OpError> {
        Buffer::from_bytes(&self.device, bytes)
    }
}

impl DeviceTensor {
    /// Refuses a tensor that is not `[rows, cols]` of `element`.
    pub(crate) fn expect(
        &self,
        op: &'static str,
        arg: &'static str,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<(), OpError> {
        check_len(op, arg, self.rows, rows)?;
        check_len(op, arg, self.cols, cols)?;
        check_len(op, arg, self.element.bytes(), element.bytes())
    }
}

impl Backend for CudaOps {
    type Tensor = DeviceTensor;
    type Linear = DeviceLinear;
    type Experts = DeviceExperts;
    type Vector = DeviceVector;
    type ExpertTable = DeviceExpertTable;
    type Cache = DeviceCache;
    type Step = DeviceStep;
    type Routing = DeviceRouting;
    type Selection = DeviceSelection;

    fn numerics(&self) -> Numerics {
        Numerics::Bf16
    }

    fn load_linear(&self, source: &WeightSource) -> Result<DeviceLinear, OpError> {
        let linear = DeviceLinear::load(&self.device, source)?;
        if self.is_hopper() { self.tiled_linear(linear) } else { Ok(linear) }
    }

    fn load_experts(
        &self,
        experts: &[[WeightSource; 3]],
        first_id: usize,
        _n_total: usize,
    ) -> Result<DeviceExperts, OpError> {
        if self.is_hopper() && super::hopper::are_fp4(experts) {
            return self.tiled_experts(experts, first_id);
        }
        DeviceExperts::load(&self.device, experts, first_id)
    }

    fn load_vector(&self, values: &[f32]) -> Result<DeviceVector, OpError> {
        Ok(DeviceVector { len: values.len(), values: self.uploaded(&f32_bytes(values))? })
    }

    fn load_expert_table(&self, ids: &[u16], k: usize) -> Result<DeviceExpertTable, OpError> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        Ok(DeviceExpertTable { n_tokens: ids.len() / k.max(1), k, ids: self.uploaded(&bytes)? })
    }

    fn new_cache(&self, spec: &CacheSpec) -> Result<DeviceCache, OpError> {
        DeviceCache::new(&self.device, spec)
    }

    fn prepare_step(&self, batch: &Batch) -> Result<DeviceStep, OpError> {
        DeviceStep::new(&self.device, batch)
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<DeviceTensor, OpError> {
        check_len("upload", "values", values.len(), rows * cols)?;
        let values = self.uploaded(&bf16_bytes(values))?;
        Ok(DeviceTensor { rows, cols, element: Element::Bf16, values, quantised: None })
    }

    fn download(&self, tensor: &DeviceTensor) -> Result<Vec<f32>, OpError> {
        let bytes = tensor.values.read(0, tensor.rows * tensor.cols * tensor.element.bytes())?;
        Ok(match tensor.element {
            Element::Bf16 => bf16_values(&bytes),
            Element::F32 => f32_values(&bytes),
        })
    }

    fn shape(&self, tensor: &DeviceTensor) -> (usize, usize) {
        (tensor.rows, tensor.cols)
    }

    fn select_rows(&self, tensor: &DeviceTensor, rows: &[u32]) -> Result<DeviceTensor, OpError> {
        const OP: &str = "select_rows";
        let limit = tensor.rows;
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= limit) {
            return Err(OpError::OutOfRange { op: OP, what: "row", got: row as usize, limit });
        }
        let row_bytes = tensor.cols * tensor.element.bytes();
        check_len(OP, "bytes of a row beyond whole words", row_bytes % 4, 0)?;
        let out = self.tensor(rows.len(), tensor.cols, tensor.element)?;
        let list = self.uploaded(&u32_bytes(rows))?;
        // SAFETY: every listed row exists, and `out` has one row of the same width for each.
        unsafe {
            self.launch(Call {
                kernel: "gather_rows",
                grid: [rows.len(), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&tensor.values).into(),
                    (&list).into(),
                    (&out.values).into(),
                    (row_bytes as u32 / 4).into(),
                ],
            })?;
        }
        Ok(out)
    }

    fn read_routing(&self, routing: &DeviceRouting) -> Result<(Vec<u32>, Vec<f32>), OpError> {
        let bytes = 4 * routing.rows * routing.k;
        let ids = u32_values(&routing.ids.read(0, bytes)?);
        Ok((ids, f32_values(&routing.weights.read(0, bytes)?)))
    }

    fn read_selection(&self, selection: &DeviceSelection) -> Result<Vec<Vec<u32>>, OpError> {
        let counts = u32_values(&selection.counts.read(0, 4 * selection.rows)?);
        let row = |(row, count): (usize, u32)| {
            let start = 4 * row * selection.top_k;
            Ok(u32_values(&selection.chosen.read(start, 4 * count as usize)?))
        };
        counts.into_iter().enumerate().map(row).collect()
    }

    fn capture(
        &self,
        cache: &mut DeviceCache,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError> {
        cache.capture(slot, position, snapshot)
    }

    fn restore(
        &self,
        cache: &mut DeviceCache,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError> {
        cache.restore(snapshot, slot, position)
    }

    fn read_block(&self, cache: &DeviceCache, block: u32) -> Result<Vec<u8>, OpError> {
        cache.read_block(block)
    }

    fn write_block(
        &self,
        cache: &mut DeviceCache,
        block: u32,
        bytes: &[u8],
    ) -> Result<(), OpError> {
        cache.write_block(block, bytes)
    }

    fn read_snapshot(&self, cache: &DeviceCache, snapshot: u32) -> Result<Vec<u8>, OpError> {
        cache.read_snapshot(snapshot)
    }

    fn write_snapshot(
        &self,
        cache: &mut DeviceCache,
        snapshot: u32,
        bytes: &[u8],
    ) -> Result<(), OpError> {
        cache.write_snapshot(snapshot, bytes)
    }

    fn read_entry(
        &self,
        cache: &DeviceCache,
        layer: usize,
        blocks: &[u32],
        entry: usize,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), OpError> {
        cache.read_entry(layer, blocks, entry)
    }
}
