//! The indexer's choice: which compressed entries a token attends to on a ratio-4 layer.
//!
//! Scores are f32 (the official code rounds them to bf16; the difference is listed in the model
//! specification); on equal scores the lower entry wins.
//!
//! Source: `Indexer.forward` of the official release.

use fathom_core::model_config::INDEX_HEAD_DIM;
use rayon::prelude::*;

use crate::cpu::cache::{CpuCache, unpack_key};
use crate::cpu::isa::{GROUP, Isa, LANES, Lanes, Level, Task};
use crate::cpu::tensor::HostTensor;
use crate::cpu::{CpuOps, in_parallel};
use crate::layer::IndexerWeights;
use crate::{Batch, OpError};

/// Chosen entries of each row, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub(crate) rows: Vec<Vec<u32>>,
}

/// Rows that share one pass over the keys.
const ROW_TILE: usize = 8;
/// Multiply-adds that are worth a thread of their own: about 20 us of one.
const PARALLEL_WORK: usize = 1024 * 1024;
/// Keys unpacked at a time.
const KEY_TILE: usize = 64;

/// `scores[key] = sum_h relu(q[h] . k[key]) * w[h]`, heads in order; the lanes of a product are added
/// as a tree.
struct Score<'a> {
    q: &'a [f32],
    weights: &'a [f32],
    keys: &'a [[f32; INDEX_HEAD_DIM]],
    scores: &'a mut [f32],
}

impl Task for Score<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { q, weights, keys, scores } = self;
        let (heads, _) = q.as_chunks::<INDEX_HEAD_DIM>();
        for (keys, scores) in keys.chunks(GROUP).zip(scores.chunks_mut(GROUP)) {
            // A last group is whole: what its surplus keys give is dropped.
            let mut four = [&keys[0]; GROUP];
            for (four, key) in four.iter_mut().zip(keys) {
                *four = key;
            }
            let mut totals = [0.0_f32; GROUP];
            for (head, weight) in heads.iter().zip(weights) {
                let mut lanes = [Lanes::ZERO; GROUP];
                for part in 0..I::PARTS {
                    let mut sums = [isa.zero(); GROUP];
                    for run in 0..INDEX_HEAD_DIM / LANES {
                        let q = isa.read(&head.as_chunks::<LANES>().0[run], part);
                        for i in 0..GROUP {
                            let key = isa.read(&four[i].as_chunks::<LANES>().0[run], part);
                            sums[i] = isa.fma(q, key, sums[i]);
                        }
                    }
                    for i in 0..GROUP {
                        isa.store(sums[i], &mut lanes[i], part);
                    }
                }
                let products = isa.sum(&lanes);
                for i in 0..GROUP {
                    totals[i] = products[i].max(0.0).mul_add(*weight, totals[i]);
                }
            }
            scores.copy_from_slice(&totals[..keys.len()]);
        }
    }
}

/// The `k` entries with the highest scores, ascending by number.
fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut entries: Vec<u32> = (0..scores.len() as u32).collect();
    if scores.len() > k {
        let rank = |entry: &u32| (scores[*entry as usize], std::cmp::Reverse(*entry));
        entries.select_nth_unstable_by(k - 1, |a, b| {
            let ((a, a_id), (b, b_id)) = (rank(a), rank(b));
            b.total_cmp(&a).then(b_id.cmp(&a_id))
        });
        entries.truncate(k);
        entries.sort_unstable();
    }
    entries
}

impl CpuOps {
    /// The entries of each row; see [`AttentionOps::index_select`](crate::AttentionOps).
    pub(crate) fn select(
        &self,
        weights: &IndexerWeights<Self>,
        queries: &HostTensor,
        head_weights: &HostTensor,
        batch: &Batch,
        cache: &CpuCache,
        layer: usize,
    ) -> Result<Selection, OpError> {
        const OP: &str = "index_select";
        let step_rows = batch.step_rows(OP, "queries", queries.rows)?;
        queries.expect(OP, "queries", queries.rows, weights.n_heads * INDEX_HEAD_DIM)?;
        head_weights.expect(OP, "weights", queries.rows, weights.n_heads)?;
        let kind = cache.layers[layer].kind;
        let mut rows = Vec::with_capacity(queries.rows);
        for sequence in &batch.sequences {
            let blocks = batch.blocks_of(sequence);
            let own = step_rows.of(sequence);
            let n_keys = kind.n_entries(sequence.positions().end);
            let work = own.len() * n_keys * weights.n_heads * INDEX_HEAD_DIM;
            let tiles = in_parallel(work, 0..own.len().div_ceil(ROW_TILE), |tile| {
                let first = own.start + tile * ROW_TILE;
                let n_rows = ROW_TILE.min(own.end - first);
                let candidates = |row: usize| {
                    let offset = step_rows.row(first + row) - sequence.row as usize;
                    kind.n_entries(sequence.position as usize + offset + 1)
                };
                let n_keys = candidates(n_rows - 1);
                if n_keys <= weights.top_k {
                    return (0..n_rows).map(|row| (0..candidates(row) as u32).collect()).collect();
                }
                // For each tile of keys, the scores of each row.
                let mut scores = vec![0.0; n_rows * n_keys];
                let score_keys = |(tile, scores): (usize, &mut [f32])| {
                    let (start, n) = (tile * KEY_TILE, scores.len() / n_rows);
                    let mut keys = [[0.0; INDEX_HEAD_DIM]; KEY_TILE];
                    for (offset, key) in keys[..n].iter_mut().enumerate() {
                        let stored = cache.key(layer, blocks, start + offset);
                        unpack_key(cache.spec.index_keys, stored, key);
                    }
                    for (row, scores) in scores.chunks_exact_mut(n).enumerate() {
                        let row = first + row;
                        let (q, weights) = (queries.row(row), head_weights.row(row));
                        Level::best().run(Score { q, weights, keys: &keys[..n], scores });
                    }
                };
                // A single row of a long context has all threads for itself.
                let tile_work = n_rows * KEY_TILE * weights.n_heads * INDEX_HEAD_DIM;
                scores
                    .par_chunks_mut(n_rows * KEY_TILE)
                    .with_min_len((PARALLEL_WORK / tile_work).max(1))
                    .enumerate()
                    .for_each(score_keys);
                let choose = |row: usize| -> Vec<u32> {
                    let tiles = scores.chunks(n_rows * KEY_TILE);
                    let own = tiles.flat_map(|tile| {
                        let n = tile.len() / n_rows;
                        &tile[row * n..(row + 1) * n]
                    });
                    let own: Vec<f32> = own.copied().take(candidates(row)).collect();
                    top_k(&own, weights.top_k)
                };
                (0..n_rows).map(choose).collect::<Vec<_>>()
            });
            rows.extend(tiles.into_iter().flatten());
        }
        Ok(Selection { rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_go_to_the_lower_entries() {
        assert_eq!(top_k(&[1.0, 3.0, 1.0, 2.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(top_k(&[0.0; 6], 2), [0, 1]);
    }

    #[test]
    fn no_more_candidates_than_wanted_means_all() {
        assert_eq!(top_k(&[5.0, -1.0], 2), [0, 1]);
        assert_eq!(top_k(&[], 4), [0_u32; 0]);
    }
}
