//! The backend itself: a device, and the memory operations of [`Backend`].
//!
//! Numeric mode: `bf16` only, as served. Linear layers take their inputs on the FP8 grid (the
//! official semantics, exact in bf16 tensor cores) or, with [`Activations::Bf16`], as they are.

use std::sync::Arc;

use fathom_core::Numerics;

use super::cache::DeviceCache;
use super::device::{Arg, Device, Launch};
use super::experts::DeviceExperts;
use super::linear::DeviceLinear;
use super::memory::{Buffer, Memory, Place};
use super::replay::MAX_RECORDINGS;
use super::step::{DeviceStep, shapes_up_to};
use super::tensor::{
    DeviceExpertTable, DeviceRouting, DeviceSelection, DeviceTensor, DeviceVector, Element,
    bf16_bytes, bf16_values, f32_bytes, f32_values, u32_bytes, u32_values,
};
use crate::error::check_len;
use crate::traits::{Activations, Backend, Drawing, PassOutput};
use crate::{Batch, CacheSpec, OpError, WeightSource};

/// The operators on a CUDA device (or on the emulator of one).
#[derive(Debug, Clone)]
pub struct CudaOps {
    pub(crate) memory: Memory,
    pub(crate) activations: Activations,
    deterministic: bool,
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
    /// Operators on `device`, every buffer an allocation of its own. For tests and tools.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, activations: Activations) -> Self {
        Self::over(Memory::loose(device), activations)
    }

    /// Operators over `memory`.
    #[must_use]
    pub fn over(memory: Memory, activations: Activations) -> Self {
        Self { memory, activations, deterministic: false }
    }

    /// The same; with `deterministic`, only kernels whose results for a row depend neither on the
    /// batch, nor on how a prompt is cut, nor on how steps are rounded up.
    #[must_use]
    pub fn with_determinism(self, deterministic: bool) -> Self {
        Self { deterministic, ..self }
    }

    /// Whether faster kernels whose results depend on the batch must not be used: on sm_90a and sm_100f
    /// layers of bf16 activations add up in another order above 8 tokens, on sm_100f FP8 layers too.
    #[must_use]
    pub const fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// What inputs of FP8 and FP4 layers look like.
    #[must_use]
    pub const fn activations(&self) -> Activations {
        self.activations
    }

    /// Where buffers come from.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
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
        unsafe { self.memory.device().launch(launch) }.map_err(OpError::device)
    }

    /// Uninitialised `[rows, cols]`.
    pub(crate) fn tensor(
        &self,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<DeviceTensor, OpError> {
        let values = self.buffer(rows * cols * element.bytes())?;
        Ok(DeviceTensor { rows, cols, element, values, quantised: None, addends: None })
    }

    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer, OpError> {
        self.memory.buffer(Place::Workspace, bytes)
    }

    pub(crate) fn uploaded(&self, bytes: &[u8]) -> Result<Buffer, OpError> {
        self.memory.holding(Place::Workspace, bytes)
    }
}

impl CudaOps {
    /// The rows `rows` of `tensor`; `list` holds the same numbers in device memory.
    fn pick_rows(
        &self,
        tensor: &DeviceTensor,
        rows: &[u32],
        list: &Buffer,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "select_rows";
        tensor.expect(OP, "x", tensor.rows, tensor.cols, tensor.element)?;
        let limit = tensor.rows;
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= limit) {
            return Err(OpError::OutOfRange { op: OP, what: "row", got: row as usize, limit });
        }
        let row_bytes = tensor.cols * tensor.element.bytes();
        check_len(OP, "bytes of a row beyond whole words", row_bytes % 4, 0)?;
        let out = self.tensor(rows.len(), tensor.cols, tensor.element)?;
        // SAFETY: every listed row exists, and `out` has one row of the same width for each.
        unsafe {
            self.launch(Call {
                kernel: "gather_rows",
                grid: [rows.len(), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&tensor.values).into(),
                    list.into(),
                    (&out.values).into(),
                    (row_bytes as u32 / 4).into(),
                ],
            })?;
        }
        Ok(out)
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
        self.expect_sum(op, arg, rows, cols, element)?;
        check_len(op, "parts to add first", self.addends.as_ref().map_or(0, |parts| parts.k), 0)
    }

    /// The same, and takes one to which something is still to be added.
    pub(crate) fn expect_sum(
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

    fn keeps_values(&self) -> bool {
        self.memory.keeps_contents()
    }

    fn drawing(&self) -> Option<Drawing> {
        self.memory.draws().map(|draws| draws.drawing)
    }

    fn load_linear(&self, source: &WeightSource) -> Result<DeviceLinear, OpError> {
        let linear = DeviceLinear::load(&self.memory, source)?;
        if self.is_hopper() {
            self.mapped_linear90(linear)
        } else if self.is_blackwell() && super::blackwell::has_e8m0_scales(source) {
            self.mapped_linear(linear)
        } else if super::blackwell::has_e8m0_scales(source) {
            Ok(linear.with_powers())
        } else {
            Ok(linear)
        }
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
        if self.is_blackwell() && super::blackwell::can_map(experts) {
            return self.mapped_experts(experts, first_id);
        }
        DeviceExperts::load(&self.memory, experts, first_id)
    }

    fn load_vector(&self, values: &[f32]) -> Result<DeviceVector, OpError> {
        let stored = self.memory.holding(Place::Weights, &f32_bytes(values))?;
        Ok(DeviceVector { len: values.len(), values: stored })
    }

    fn load_expert_table(&self, ids: &[u16], k: usize) -> Result<DeviceExpertTable, OpError> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let stored = self.memory.holding(Place::Weights, &bytes)?;
        Ok(DeviceExpertTable { n_tokens: ids.len() / k.max(1), k, ids: stored })
    }

    fn new_cache(&self, spec: &CacheSpec) -> Result<DeviceCache, OpError> {
        DeviceCache::new(&self.memory, spec)
    }

    fn prepare_step(&self, batch: &Batch) -> Result<DeviceStep, OpError> {
        DeviceStep::new(&self.memory, batch, true)
    }

    fn prepare_exact_step(&self, batch: &Batch) -> Result<DeviceStep, OpError> {
        DeviceStep::new(&self.memory, batch, false)
    }

    fn prepare_step_over(
        &self,
        batch: &Batch,
        x: DeviceTensor,
        cache: &mut DeviceCache,
    ) -> Result<(DeviceStep, DeviceTensor), OpError> {
        match self.stage_copies(batch, &x, cache)? {
            Some(staged) => {
                // Recorded launches find the step's block where nothing else is in the workspace.
                drop(x);
                Ok((self.prepare_step(batch)?, staged))
            }
            None => Ok((self.prepare_exact_step(batch)?, x)),
        }
    }

    fn beside<A, B, E: From<OpError>>(
        &self,
        side: impl FnOnce() -> Result<A, E>,
        main: impl FnOnce() -> Result<B, E>,
    ) -> Result<(A, B), E> {
        self.memory.beside(side, main)
    }

    fn run_pass<E: From<OpError>>(
        &self,
        name: &'static str,
        step: &DeviceStep,
        cache: &mut DeviceCache,
        pass: impl FnMut(&mut DeviceCache) -> Result<PassOutput<DeviceTensor>, E>,
    ) -> Result<PassOutput<DeviceTensor>, E> {
        self.run_or_replay(name, step, cache, pass)
    }

    /// Each shape twice: the first loads code, the second is recorded.
    fn warm_up_steps(&self, n_slots: usize, max_context: usize) -> Vec<(usize, usize)> {
        // Half of the recordings: passes that draft are recorded, too, and the longest contexts wait for
        // the first request that has one.
        let shapes = shapes_up_to(n_slots, max_context, MAX_RECORDINGS / 2);
        shapes.into_iter().flat_map(|shape| [shape, shape]).collect()
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<DeviceTensor, OpError> {
        check_len("upload", "values", values.len(), rows * cols)?;
        let values = self.uploaded(&bf16_bytes(values))?;
        let (quantised, addends) = (None, None);
        Ok(DeviceTensor { rows, cols, element: Element::Bf16, values, quantised, addends })
    }

    fn download(&self, tensor: &DeviceTensor) -> Result<Vec<f32>, OpError> {
        if tensor.addends.is_some() {
            return self.download(&self.added(tensor)?);
        }
        let bytes = tensor.values.read(0, tensor.rows * tensor.cols * tensor.element.bytes())?;
        Ok(match tensor.element {
            Element::Bf16 => bf16_values(&bytes),
            Element::F32 => f32_values(&bytes),
        })
    }

    fn shape(&self, tensor: &DeviceTensor) -> (usize, usize) {
        (tensor.rows, tensor.cols)
    }

    fn takes_wanted_rows(&self) -> bool {
        true
    }

    fn wanted_rows(
        &self,
        tensor: &DeviceTensor,
        step: &DeviceStep,
    ) -> Result<Option<DeviceTensor>, OpError> {
        let batch = &step.batch;
        check_len("wanted_rows", "tensor", tensor.rows, step.n_rows)?;
        if batch.wants_all_rows() {
            return Ok(None);
        }
        self.pick_rows(tensor, &batch.logit_rows, &step.logit_rows).map(Some)
    }

    fn select_rows(&self, tensor: &DeviceTensor, rows: &[u32]) -> Result<DeviceTensor, OpError> {
        self.pick_rows(tensor, rows, &self.uploaded(&u32_bytes(rows))?)
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
        self.capture_state(cache, slot, position, snapshot)
    }

    fn restore(
        &self,
        cache: &mut DeviceCache,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError> {
        self.restore_state(cache, snapshot, slot, position)
    }

    fn read_block(&self, cache: &DeviceCache, block: u32) -> Result<Vec<u8>, OpError> {
        self.block_bytes(cache, block)
    }

    fn write_block(
        &self,
        cache: &mut DeviceCache,
        block: u32,
        bytes: &[u8],
    ) -> Result<(), OpError> {
        self.set_block_bytes(cache, block, bytes)
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
