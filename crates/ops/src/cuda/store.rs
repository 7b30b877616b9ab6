//! What a step of one-token sequences stores before attention, in one launch: KV rows, also into the
//! window, which attention reads only rows of that stay; entries, index keys and compressor states.
//!
//! Not here: the launches of other steps (`attention`), whose order matters.

use fathom_core::LayerKind;

use super::cache::{LayerStores, StateStore};
use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::DeviceStep;
use super::tensor::{DeviceTensor, Element};
use crate::OpError;
use crate::error::check_len;
use crate::layer::{AttentionWeights, CompressorWeights};
use crate::traits::Projected;

const OP: &str = "attn_store_step";
/// Arguments of one compressor.
const COMPRESSOR_ARGS: usize = 9;

/// Rows that enter the window.
#[derive(Debug)]
pub(crate) struct Pending {
    /// One per token of the step.
    pub(crate) rows: Buffer,
    /// Whether they are there already.
    pub(crate) is_in_window: bool,
}

/// Refuses a compressor whose weights, inputs or state do not fit.
pub(super) fn check_compressor(
    op: &'static str,
    weights: &CompressorWeights<CudaOps>,
    [u, s]: &[DeviceTensor; 2],
    rows: usize,
    kind: LayerKind,
    state: &StateStore,
) -> Result<(), OpError> {
    let width = kind.compressor_width() * weights.width;
    u.expect(op, "u", rows, width, Element::F32)?;
    s.expect(op, "s", rows, width, Element::F32)?;
    check_len(op, "ape", weights.ape.len, kind.ratio() * width)?;
    check_len(op, "norm", weights.norm.weight.len, weights.width)?;
    check_len(op, "state", state.width, width)
}

impl CudaOps {
    /// Stores the rows of `step`, each of a sequence of its own, as `pending` and `out` and in the
    /// stores of the layer. The caller has checked the KV row, its norm and the frequencies.
    pub(super) fn store_step(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<DeviceTensor>,
        step: &DeviceStep,
        (stores, ring): (&LayerStores, usize),
        (out, pending): (&DeviceTensor, &Buffer),
    ) -> Result<(), OpError> {
        let kind = stores.kind;
        let [positions, sequence_of, sequences] = step.row_args();
        let mut args = vec![
            (&projected.kv.values).into(),
            (&weights.kv_norm.weight.values).into(),
            (&weights.rope.values).into(),
            positions,
            sequence_of,
            sequences,
            (&step.blocks).into(),
            (&out.values).into(),
            pending.into(),
            (&stores.window).into(),
            (ring as u32).into(),
            weights.kv_norm.eps.into(),
            (kind.ratio() as u32).into(),
            (kind.compressor_width() as u32).into(),
        ];
        let indexer = weights.indexer.as_ref().map(|indexer| &indexer.compressor);
        let compressors = [
            (weights.compressor.as_ref(), &projected.compressor, &stores.entries, &stores.state),
            (indexer, &projected.index_compressor, &stores.keys, &stores.key_state),
        ];
        let mut n_parts = 1;
        for (compressor, inputs, store, state) in compressors {
            let Some(compressor) = compressor else {
                args.extend([Arg::NULL; COMPRESSOR_ARGS - 2]);
                args.extend([Arg::U32(0), Arg::F32(0.0)]);
                continue;
            };
            let arg = "compressor input";
            let inputs =
                inputs.as_ref().ok_or(OpError::Shape { op: OP, arg, got: 0, expected: 1 })?;
            check_compressor(OP, compressor, inputs, step.n_rows, kind, state)?;
            let [u, s] = inputs;
            let [ape, norm] = [&compressor.ape.values, &compressor.norm.weight.values];
            args.extend(
                [&u.values, &s.values, ape, norm, &state.u, &state.s, store].map(Arg::from),
            );
            args.extend([Arg::U32(state.rows as u32), Arg::F32(compressor.norm.eps)]);
            n_parts += 1;
        }
        // SAFETY: kv and `out` are [rows, 512] bf16, `pending` has a row for each; inputs of the
        // compressors are [rows, width] f32 and their states [n_slots, ring, width]; entries of all
        // positions of the step lie in the sequences' blocks, slots inside of the window store. An
        // indexer has a compressor beside it, so the grid ends with the last part there is.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [step.n_rows, n_parts, 1],
                threads: 128,
                shared_bytes: super::attention::COMPRESS_SHARED,
                args: &args,
            })
        }
    }
}
