//! Which compressed entries a row attends to: launchers of `indexer`. Scores of all its candidates, then
//! the best of them, in runs of rows whose scores fit the workspace.

use fathom_core::LayerKind;
use fathom_core::model_config::INDEX_HEAD_DIM;

use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::DeviceStep;
use super::tensor::{DeviceSelection, DeviceTensor, Element};
use crate::OpError;
use crate::layer::IndexerWeights;

const OP: &str = "index_scores";
/// Candidates of a token from which on a cluster of eight blocks selects, not one block.
const ENTRIES_OF_A_BLOCK: usize = 16_384;
/// Shared memory of `ScoreShared` and `SelectShared`, and of their forms for sm_90a.
const SCORE_SHARED: u32 = 2 * 64 * 136 * 2 + 64 * 4;
const SELECT_SHARED: u32 = (256 + 2 + 2 * 16) * 4;
/// 64 queries and their weights.
const SCORE_SHARED_90: u32 = 17 * 1024;
const SELECT_SHARED_90: u32 = (256 + 2 * 8 * 256 + 256 + 16 + 3 + 32) * 4;
/// Bytes that the scores of one launch may take.
const SCORE_WORKSPACE: usize = 256 << 20;

/// Some rows of a step, and scores of every candidate of each: f32, `max_entries` per row.
pub(crate) struct Scored {
    pub(crate) scores: Buffer,
    /// The first row that the scores are of, and how many follow.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) max_entries: usize,
}

impl Scored {
    /// Room for the scores of the first of `n` rows of `step`, as many as are scored at once.
    pub(crate) fn new(ops: &CudaOps, step: &DeviceStep, n: usize) -> Result<Self, OpError> {
        let max_entries = LayerKind::Csa.n_entries(step.context);
        let most = n.max(1);
        let rows = (SCORE_WORKSPACE / (4 * max_entries.max(1))).clamp(1, most).min(65_535);
        let scores = ops.buffer(4 * rows * max_entries)?;
        Ok(Self { scores, first: 0, rows, max_entries })
    }

    /// The bytes of `buffer` that belong to the first row.
    fn from(&self, buffer: &Buffer, row_bytes: usize) -> Arg {
        Arg::Address(buffer.address() + (self.first * row_bytes) as u64)
    }
}

impl CudaOps {
    /// The entries that each row of the queries chooses by its index queries and head weights.
    pub(super) fn select_entries(
        &self,
        indexer: &IndexerWeights<Self>,
        (q, w): (&DeviceTensor, &DeviceTensor),
        step: &DeviceStep,
        keys: &Buffer,
    ) -> Result<DeviceSelection, OpError> {
        let (rows, top_k) = (step.rows(OP, q.rows)?.n, indexer.top_k);
        let mut run = Scored::new(self, step, rows)?;
        let (chosen, counts) = (self.buffer(4 * rows * top_k)?, self.buffer(4 * rows)?);
        let selection = DeviceSelection { rows, top_k, chosen, counts };
        let n_at_once = run.rows;
        for first in (0..rows).step_by(n_at_once) {
            run = Scored { first, rows: n_at_once.min(rows - first), ..run };
            self.index_scores(indexer, (q, w), step, keys, &run)?;
            self.index_top_k(step, &run, &selection)?;
        }
        Ok(selection)
    }

    /// Scores of the rows of `run` against `keys`.
    pub(crate) fn index_scores(
        &self,
        indexer: &IndexerWeights<Self>,
        (q, w): (&DeviceTensor, &DeviceTensor),
        step: &DeviceStep,
        keys: &Buffer,
        run: &Scored,
    ) -> Result<(), OpError> {
        let of = step.rows(OP, q.rows)?;
        let (rows, n_heads, top_k) = (of.n, indexer.n_heads, indexer.top_k);
        q.expect(OP, "queries", rows, n_heads * INDEX_HEAD_DIM, Element::Bf16)?;
        w.expect(OP, "weights", rows, n_heads, Element::Bf16)?;
        if !n_heads.is_multiple_of(8) || n_heads > 64 {
            let what = "index head (a multiple of 8)";
            return Err(OpError::OutOfRange { op: OP, what, got: n_heads, limit: 64 });
        }
        let scale = (INDEX_HEAD_DIM as f32).powf(-0.5) * (n_heads as f32).powf(-0.5);
        let (kernel, keys_of_a_block, shared_bytes) =
            if self.memory.device().arch() == "sm_90a" && n_heads == 64 {
                ("index_scores90", 256, SCORE_SHARED_90)
            } else {
                (OP, 64, SCORE_SHARED)
            };
        // SAFETY: q and w have a row per token, the addresses are of the run's first; keys of every
        // entry below (position + 1) / 4 lie in the sequence's blocks, which the batch covers; `scores`
        // has max_entries for each of the run's tokens.
        unsafe {
            self.launch(Call {
                kernel,
                grid: [run.max_entries.div_ceil(keys_of_a_block), run.rows, 1],
                threads: 128,
                shared_bytes,
                args: &[
                    run.from(&q.values, 2 * n_heads * INDEX_HEAD_DIM),
                    run.from(&w.values, 2 * n_heads),
                    keys.into(),
                    run.from(&of.positions, 4),
                    run.from(&of.sequence_of, 4),
                    (&step.sequences).into(),
                    (&step.blocks).into(),
                    (&run.scores).into(),
                    (n_heads as u32).into(),
                    (run.max_entries as u32).into(),
                    (top_k as u32).into(),
                    scale.into(),
                ],
            })
        }
    }

    /// The best of the scores of `run`, into its rows of `selection`.
    pub(crate) fn index_top_k(
        &self,
        step: &DeviceStep,
        run: &Scored,
        selection: &DeviceSelection,
    ) -> Result<(), OpError> {
        let of = step.rows("index_top_k", selection.rows)?;
        let top_k = selection.top_k;
        let is_long =
            self.memory.device().arch() == "sm_90a" && run.max_entries > ENTRIES_OF_A_BLOCK;
        let (kernel, blocks_per_row, shared_bytes) = if is_long {
            ("index_top_k90", 8, SELECT_SHARED_90)
        } else {
            ("index_top_k", 1, SELECT_SHARED)
        };
        // SAFETY: `scores` was written for every row with more than top_k candidates; the outputs have
        // top_k entries and a count per row.
        unsafe {
            self.launch(Call {
                kernel,
                grid: [blocks_per_row * run.rows, 1, 1],
                threads: 512,
                shared_bytes,
                args: &[
                    (&run.scores).into(),
                    run.from(&of.positions, 4),
                    run.from(&selection.chosen, 4 * top_k),
                    run.from(&selection.counts, 4),
                    (run.max_entries as u32).into(),
                    (top_k as u32).into(),
                ],
            })
        }
    }
}
