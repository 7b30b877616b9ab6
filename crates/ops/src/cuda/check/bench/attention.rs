//! Attention and selection at decode, over drawn cache rows.
//!
//! Sequences of a call have slots, blocks and chosen entries of their own, and calls rotate over
//! groups of sequences, so that rows come from memory as they do in a model with many layers.

use super::super::layers::{Shape as LayerShape, weights};
use super::super::random::Random;
use super::{Bench, Operator, Shape};
use crate::cuda::cache::DeviceCache;
use crate::cuda::store::Pending;
use crate::cuda::tensor::{DeviceSelection, u32_bytes};
use crate::cuda::{CudaOps, DeviceStep, DeviceTensor};
use crate::layer::AttentionWeights;
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{BLOCK_TOKENS, Backend, Batch, CacheSpec, IndexKeyFormat, KvFormat, OpError};
use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};

/// Bytes of cache rows over which calls rotate, and their groups of sequences at most.
const ROTATED_BYTES: usize = 160 << 20;
const MAX_GROUPS: usize = 256;

/// A layer whose matrices are small: only its attention is run.
fn layer(
    ops: &CudaOps,
    random: &Random,
    n_heads: usize,
    top_k: usize,
) -> Result<AttentionWeights<CudaOps>, OpError> {
    let shape = LayerShape {
        width: 128,
        rank: 128,
        heads: n_heads,
        groups: 1,
        group_rank: 128,
        index_heads: 64,
        top_k,
    };
    weights(ops, random.clone(), LayerKind::Csa, shape)
}

/// Groups of `rows` sequences of `context` tokens each, and their cache.
struct Groups {
    cache: DeviceCache,
    steps: Vec<DeviceStep>,
}

impl Groups {
    fn new(
        ops: &CudaOps,
        rows: usize,
        context: usize,
        bytes_of_a_row: usize,
    ) -> Result<Self, OpError> {
        let n = ROTATED_BYTES.div_ceil(rows * bytes_of_a_row).clamp(2, MAX_GROUPS);
        let blocks_each = context.div_ceil(BLOCK_TOKENS);
        let spec = CacheSpec {
            layers: vec![LayerKind::Csa],
            n_slots: n * rows,
            n_blocks: n * rows * blocks_each,
            n_snapshots: 0,
            spare_rows: 0,
            draft_width: 0,
            kv: KvFormat::Fp8,
            index_keys: IndexKeyFormat::Mxfp4,
        };
        let cache = ops.new_cache(&spec)?;
        ops.draw_cache(&cache)?;
        let step = |group: usize| {
            let mut batch = Batch::default();
            for slot in group * rows..(group + 1) * rows {
                let first = (slot * blocks_each) as u32;
                let blocks: Vec<u32> = (first..).take(blocks_each).collect();
                batch.push(slot as u32, (context - 1) as u32, &[0], &blocks, true);
            }
            ops.prepare_exact_step(&batch)
        };
        let steps = (0..n).map(step).collect::<Result<_, _>>()?;
        Ok(Self { cache, steps })
    }
}

/// `attend` of one token per sequence: the window and `top_k` chosen entries each.
pub(super) fn attention(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    shapes: &[Shape],
) -> Result<(), OpError> {
    let ops = bench.ops;
    for &shape in shapes {
        let Operator::Attention { n_heads, top_k, context } = shape.operator else { continue };
        let rows = shape.rows;
        let weights = layer(ops, random, n_heads, top_k)?;
        let (bytes, _) = shape.work();
        let Groups { mut cache, steps } = Groups::new(ops, rows, context, bytes as usize / rows)?;
        let q = ops.upload(rows, n_heads * HEAD_DIM, &random.values(rows * n_heads * 512, 1.0))?;
        let queries = Queries { q, index: None };
        let kv = ops.upload(rows, HEAD_DIM, &random.values(rows * HEAD_DIM, 1.0))?;
        let n_entries = LayerKind::Csa.n_entries(context);
        let mut chosen_by_group = Vec::with_capacity(steps.len());
        for _ in &steps {
            let mut chosen = Vec::with_capacity(rows * top_k);
            for _ in 0..rows {
                chosen.extend(random.some_of(n_entries, top_k).iter().map(|&entry| entry as u32));
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
        bench.time(shape, steps.len(), &mut |group| {
            let rows = pending.clone();
            cache.layers[0].pending = Some(Pending { rows, is_in_window: true });
            let chosen = Some(&chosen_by_group[group]);
            ops.attend(&weights, &queries, &kv, chosen, &steps[group], &mut cache, 0).map(drop)
        })?;
    }
    Ok(())
}

/// `index_select` of one token per sequence: scores of all entries, and the best of them.
pub(super) fn selection(
    bench: &mut Bench<'_, '_>,
    random: &mut Random,
    shapes: &[Shape],
) -> Result<(), OpError> {
    let ops = bench.ops;
    for &shape in shapes {
        let Operator::IndexSelect { n_heads, top_k, context } = shape.operator else { continue };
        let rows = shape.rows;
        let weights = layer(ops, random, 1, top_k)?;
        let (bytes, _) = shape.work();
        let Groups { cache, steps } = Groups::new(ops, rows, context, bytes as usize / rows)?;
        let width = n_heads * INDEX_HEAD_DIM;
        let nothing = |cols| ops.upload(rows, cols, &vec![0.0; rows * cols]);
        let queries = Queries {
            q: nothing(HEAD_DIM)?,
            index: Some(ops.upload(rows, width, &random.values(rows * width, 1.0))?),
        };
        let head_weights = ops.upload(rows, n_heads, &random.values(rows * n_heads, 1.0))?;
        let projected: Projected<DeviceTensor> = Projected {
            qr: nothing(128)?,
            kv: nothing(HEAD_DIM)?,
            compressor: None,
            index_compressor: None,
            index_weights: Some(head_weights),
        };
        bench.time(shape, steps.len(), &mut |group| {
            let step = &steps[group];
            ops.index_select(&weights, &queries, &projected, step, &cache, 0).map(drop)
        })?;
    }
    Ok(())
}
