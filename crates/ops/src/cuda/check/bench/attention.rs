//! Attention, selection and stores, over drawn cache rows.
//!
//! Sequences of a call have slots, blocks and chosen entries of their own, and calls rotate over
//! groups of sequences, so that rows come from memory as they do in a model with many layers.

use super::super::layers::{Shape as LayerShape, weights};
use super::super::random::Random;
use super::Bench;
use super::shapes::{Operator, Shape, compressor_rows};
use crate::cuda::cache::DeviceCache;
use crate::cuda::draw::Values;
use crate::cuda::indexer::Scored;
use crate::cuda::store::Pending;
use crate::cuda::tensor::{DeviceSelection, Element, u32_bytes};
use crate::cuda::{CudaOps, DeviceStep, DeviceTensor};
use crate::layer::{AttentionWeights, IndexerWeights};
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{BLOCK_TOKENS, Backend, Batch, CacheSpec, IndexKeyFormat, KvFormat, OpError};
use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};

/// Groups of sequences at most, and bytes of their cache if more than two are wanted.
const MAX_GROUPS: usize = 256;
const CACHE_BYTES: usize = 3 << 30;

/// How the rows of a call belong to sequences.
#[derive(Clone, Copy)]
enum Rows {
    /// The last token of a sequence each.
    Answers,
    /// The same, of sequences that end one token apart: groups of a compressor close in some.
    Spread,
    /// The last tokens of one sequence.
    Chunk,
}

/// Groups of `rows` tokens in sequences of `context` tokens each, and their cache.
struct Groups {
    cache: DeviceCache,
    steps: Vec<DeviceStep>,
}

impl Groups {
    fn new(
        bench: &Bench<'_, '_>,
        kind: LayerKind,
        (rows, form): (usize, Rows),
        context: usize,
        bytes: usize,
    ) -> Result<Self, OpError> {
        let ops = bench.ops;
        let blocks_each = context.div_ceil(BLOCK_TOKENS);
        let n_sequences = if matches!(form, Rows::Chunk) { 1 } else { rows };
        let mut spec = CacheSpec {
            layers: vec![kind],
            n_slots: n_sequences,
            n_blocks: n_sequences * blocks_each,
            n_snapshots: 0,
            spare_rows: 0,
            draft_width: 0,
            kv: KvFormat::Fp8,
            index_keys: IndexKeyFormat::Mxfp4,
        };
        let group_bytes = spec.n_slots * spec.slot_bytes() + spec.n_blocks * spec.block_bytes();
        let n = bench.n_copies(bytes).min(CACHE_BYTES / group_bytes).clamp(2, MAX_GROUPS);
        spec.n_slots *= n;
        spec.n_blocks *= n;
        let cache = ops.new_cache(&spec)?;
        ops.draw_cache(&cache)?;
        let step = |group: usize| {
            let mut batch = Batch::default();
            for sequence in 0..n_sequences {
                let slot = group * n_sequences + sequence;
                let first = (slot * blocks_each) as u32;
                let blocks: Vec<u32> = (first..).take(blocks_each).collect();
                let (position, n_tokens) = match form {
                    Rows::Answers => (context - 1, 1),
                    Rows::Spread => (context - 1 - sequence, 1),
                    Rows::Chunk => (context - rows, rows),
                };
                batch.push(slot as u32, position as u32, &vec![0; n_tokens], &blocks, true);
            }
            ops.prepare_exact_step(&batch)
        };
        let steps = (0..n).map(step).collect::<Result<_, _>>()?;
        Ok(Self { cache, steps })
    }
}

/// Index heads of a layer and what they are to choose.
struct Index {
    weights: IndexerWeights<CudaOps>,
    q: DeviceTensor,
    head_weights: DeviceTensor,
}

impl Bench<'_, '_> {
    /// A layer whose matrices are small: only what needs none of them is run.
    fn small_layer(
        &self,
        kind: LayerKind,
        heads: usize,
        (index_heads, top_k): (usize, usize),
    ) -> Result<AttentionWeights<CudaOps>, OpError> {
        let (width, rank, group_rank) = (128, 128, 128);
        let shape = LayerShape { width, rank, heads, groups: 1, group_rank, index_heads, top_k };
        weights(self.ops, self.random.clone(), kind, shape)
    }

    /// `attend`: the window and `top_k` chosen entries of each row.
    pub(super) fn attention(&mut self, shapes: &[Shape]) -> Result<(), OpError> {
        let ops = self.ops;
        for &shape in shapes {
            let Operator::Attention { n_heads, top_k, context, is_chunk } = shape.operator else {
                continue;
            };
            let rows = shape.rows;
            let layer = self.small_layer(LayerKind::Csa, n_heads, (64, top_k))?;
            let form = (rows, if is_chunk { Rows::Chunk } else { Rows::Answers });
            let (bytes, _) = shape.work();
            let Groups { mut cache, steps } =
                Groups::new(self, LayerKind::Csa, form, context, bytes as usize)?;
            let queries = Queries { q: self.drawn(rows, n_heads * HEAD_DIM)?, index: None };
            let kv = self.drawn(rows, HEAD_DIM)?;
            // What a row of a chunk may choose of ends before its own position.
            let n_entries = LayerKind::Csa.n_entries(context - if is_chunk { rows } else { 0 });
            let mut chosen_by_group = Vec::with_capacity(steps.len());
            for _ in &steps {
                let n = rows * top_k;
                let mut chosen = Vec::with_capacity(n);
                for _ in 0..rows {
                    chosen.extend(spread(&mut self.random, n_entries, top_k));
                }
                chosen_by_group.push(DeviceSelection {
                    rows,
                    top_k,
                    chosen: ops.uploaded(&u32_bytes(&chosen))?,
                    counts: ops.uploaded(&u32_bytes(&vec![top_k as u32; rows]))?,
                });
            }
            // The rows that a step of the model would have made; their values do not matter.
            let pending = ops.buffer(rows * cache.spec.kv.row_bytes())?;
            pending.fill(0x38)?;
            self.time(shape, steps.len(), &mut |group| {
                let rows = pending.clone();
                cache.layers[0].pending = Some(Pending { rows, is_in_window: !is_chunk });
                let chosen = Some(&chosen_by_group[group]);
                ops.attend(&layer, &queries, &kv, chosen, &steps[group], &mut cache, 0).map(drop)
            })?;
        }
        Ok(())
    }

    /// `attn_store`: KV rows, and what compressors keep.
    pub(super) fn store(&mut self, shapes: &[Shape]) -> Result<(), OpError> {
        let ops = self.ops;
        for &shape in shapes {
            let Operator::Store { kind, is_chunk, context } = shape.operator else { continue };
            let rows = shape.rows;
            let layer = self.small_layer(kind, 1, (8, 1))?;
            let form = (rows, if is_chunk { Rows::Chunk } else { Rows::Spread });
            let (bytes, _) = shape.work();
            let Groups { mut cache, steps } =
                Groups::new(self, kind, form, context, bytes as usize)?;
            let mut inputs = Vec::new();
            if kind != LayerKind::Window {
                // Keys and gates of each compressor; head weights are not stored.
                for &width in compressor_rows(kind, 8).iter().take(4) {
                    let input = ops.tensor(rows, width, Element::F32)?;
                    let deviation = Values::F32 { deviation: 1.0 };
                    ops.memory().draw(&input.values, 0, 4 * rows * width, deviation)?;
                    inputs.push(input);
                }
            }
            let pair =
                |first: usize| Some([inputs.get(first)?.clone(), inputs.get(first + 1)?.clone()]);
            let projected = Projected {
                qr: self.drawn(1, 1)?,
                kv: self.drawn(rows, HEAD_DIM)?,
                compressor: pair(0),
                index_compressor: pair(2),
                index_weights: None,
            };
            self.time(shape, steps.len(), &mut |group| {
                ops.attn_store(&layer, &projected, &steps[group], &mut cache, 0).map(drop)
            })?;
        }
        Ok(())
    }

    fn index(&self, rows: usize, n_heads: usize, top_k: usize) -> Result<Index, OpError> {
        let op = "bench";
        let layer = self.small_layer(LayerKind::Csa, 1, (n_heads, top_k))?;
        let arg = "indexer";
        Ok(Index {
            weights: layer.indexer.ok_or(OpError::Shape { op, arg, got: 0, expected: 1 })?,
            q: self.drawn(rows, n_heads * INDEX_HEAD_DIM)?,
            head_weights: self.drawn(rows, n_heads)?,
        })
    }

    /// Scores and selection of one token per sequence, together and apart.
    pub(super) fn selection(&mut self, shapes: &[Shape]) -> Result<(), OpError> {
        let ops = self.ops;
        for &shape in shapes {
            let rows = shape.rows;
            let (Operator::IndexScores { n_heads, top_k, context }
            | Operator::IndexSelect { n_heads, top_k, context }) = shape.operator
            else {
                self.top_k(shape)?;
                continue;
            };
            let scores_alone = matches!(shape.operator, Operator::IndexScores { .. });
            let Index { weights, q, head_weights } = self.index(rows, n_heads, top_k)?;
            let (bytes, _) = shape.work();
            let form = (rows, Rows::Answers);
            let Groups { cache, steps } =
                Groups::new(self, LayerKind::Csa, form, context, bytes as usize)?;
            let keys = &cache.layers[0].keys;
            let input = (&q, &head_weights);
            if scores_alone {
                let run = Scored::new(ops, &steps[0], rows)?;
                self.time(shape, steps.len(), &mut |group| {
                    ops.index_scores(&weights, input, &steps[group], keys, &run)
                })?;
            } else {
                self.time(shape, steps.len(), &mut |group| {
                    ops.select_entries(&weights, input, &steps[group], keys).map(drop)
                })?;
            }
        }
        Ok(())
    }

    /// The best of scores that lie where the launch before would have left them.
    fn top_k(&mut self, shape: Shape) -> Result<(), OpError> {
        let ops = self.ops;
        let Operator::IndexTopK { top_k, context } = shape.operator else { return Ok(()) };
        let rows = shape.rows;
        let mut batch = Batch::default();
        for slot in 0..rows as u32 {
            batch.push(slot, context as u32 - 1, &[0], &[], true);
        }
        let step = ops.prepare_exact_step(&batch)?;
        let run = Scored::new(ops, &step, rows)?;
        let deviation = Values::F32 { deviation: 1.0 };
        ops.memory().draw(&run.scores, 0, 4 * run.rows * run.max_entries, deviation)?;
        let (chosen, counts) = (ops.buffer(4 * rows * top_k)?, ops.buffer(4 * rows)?);
        let selection = DeviceSelection { rows, top_k, chosen, counts };
        self.time(shape, 1, &mut |_| ops.index_top_k(&step, &run, &selection))
    }
}

/// `n` different numbers below `limit`, ascending: one of each of `n` equal parts.
fn spread(random: &mut Random, limit: usize, n: usize) -> impl Iterator<Item = u32> {
    let part = (limit / n).max(1);
    (0..n).map(move |index| ((index * part + random.below(part)) % limit.max(1)) as u32)
}
