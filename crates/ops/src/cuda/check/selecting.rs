//! The indexer's choice among the entries of a long context, against scores in f64.
//!
//! A chosen set is right if nothing in it scores less than the threshold and nothing outside more, but for
//! what rounding can do to a score: then any of them may be chosen.
//!
//! Not here: queries and keys as a layer makes them (`layers`).

use fathom_core::LayerKind;
use fathom_core::model_config::INDEX_HEAD_DIM;
use fathom_core::num::{Ue8m0, e2m1_to_f32, round_bf16};
use rayon::prelude::*;

use super::layers::{Shape, spec, weights};
use super::{Comparison, Report, Size};
use crate::cpu::quant::quantise_index;
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{Backend, Batch, CacheSpec, OpError};

/// Bytes of a key: 64 pairs of codes, 4 scales.
const KEY_BYTES: usize = 68;
/// Tokens of a step.
const ROWS: usize = 2;
/// What rounding does to a score, as a share of the sum of its terms' magnitudes.
const ROUNDING: f64 = 1e-6;

/// Candidates, index heads, and how many are to be chosen.
type Choice = (usize, usize, &'static [usize]);

/// Sets chosen for the last tokens of a sequence.
pub(super) fn selecting(report: &mut Report<'_>) -> Result<(), OpError> {
    let choices: &[Choice] = match report.size {
        // The second one is a cluster's, which only sm_90a has.
        Size::Small if report.ops.memory().device().arch() == "sm_90a" => {
            &[(700, 8, &[16, 512]), (16_390, 8, &[33])]
        }
        Size::Small => &[(700, 8, &[16, 512])],
        // A million tokens.
        Size::Real => &[(5000, 64, &[512, 1024]), (262_144, 64, &[512, 1024])],
    };
    choices.iter().try_for_each(|choice| select(report, *choice))
}

fn select(report: &mut Report<'_>, (n_entries, n_heads, top_ks): Choice) -> Result<(), OpError> {
    let (ops, kind) = (report.ops, LayerKind::Csa);
    let n_blocks = n_entries.div_ceil(CacheSpec::rows_per_block(kind));
    let keys: Vec<u8> = (0..n_blocks * CacheSpec::rows_per_block(kind) * KEY_BYTES)
        .map(|at| match at % KEY_BYTES {
            ..64 => report.random.bits() as u8,
            _ => 126 + (report.random.bits() % 3) as u8,
        })
        .collect();
    let cache = ops.new_cache(&spec(kind, n_blocks))?;
    cache.layers[0].keys.write(0, &keys)?;
    // Neither in order nor in reverse.
    let blocks: Vec<u32> = (0..n_blocks).map(|i| place_of(i, n_blocks) as u32).collect();
    let position = kind.ratio() * n_entries - ROWS;
    let step = ops.prepare_step(&Batch::single(1, position as u32, &[0; ROWS], &blocks))?;

    let mut q = report.random.values(ROWS * n_heads * INDEX_HEAD_DIM, 2.0);
    q.chunks_exact_mut(INDEX_HEAD_DIM).for_each(quantise_index);
    let w = report.random.values(ROWS * n_heads, 1.0);
    let index = Some(ops.upload(ROWS, n_heads * INDEX_HEAD_DIM, &q)?);
    let unused = ops.upload(ROWS, 1, &[0.0; ROWS])?;
    let queries = Queries { q: unused.clone(), index };
    let projected = Projected {
        qr: unused.clone(),
        kv: unused,
        compressor: None,
        index_compressor: None,
        index_weights: Some(ops.upload(ROWS, n_heads, &w)?),
    };
    let scale = (INDEX_HEAD_DIM as f32).powf(-0.5) * (n_heads as f32).powf(-0.5);
    let scores = |row: usize| -> Vec<(f64, f64)> {
        let q = &q[row * n_heads * INDEX_HEAD_DIM..(row + 1) * n_heads * INDEX_HEAD_DIM];
        let w = w[row * n_heads..(row + 1) * n_heads].iter().map(|w| round_bf16(w * scale));
        let w: Vec<f64> = w.map(f64::from).collect();
        let n = kind.n_entries(position + row + 1);
        let entry = |entry: usize| {
            let rows = CacheSpec::rows_per_block(kind);
            let at = blocks[entry / rows] as usize * rows + entry % rows;
            score(q, &w, &keys[at * KEY_BYTES..(at + 1) * KEY_BYTES])
        };
        (0..n).into_par_iter().map(entry).collect()
    };
    let scores: Vec<Vec<(f64, f64)>> = (0..ROWS).map(scores).collect();

    let shape = Shape {
        width: 128,
        rank: 128,
        heads: 1,
        groups: 1,
        group_rank: 128,
        index_heads: n_heads,
        top_k: 0,
    };
    let random = report.random.clone();
    for &top_k in top_ks {
        let weights = weights(ops, random.clone(), kind, Shape { top_k, ..shape })?;
        let selection = ops.index_select(&weights, &queries, &projected, &step, &cache, 0)?;
        let chosen = ops.read_selection(&selection)?;
        let wrong: usize =
            chosen.iter().zip(&scores).map(|(chosen, s)| n_wrong(chosen, s, top_k)).sum();
        report.found.push(Comparison {
            what: format!("{top_k} of {n_entries} entries, {n_heads} heads"),
            error: wrong as f64 / (ROWS * top_k) as f64,
            limit: 0.0,
        });
    }
    Ok(())
}

/// Where block `index` of `n` lies: each somewhere else.
const fn place_of(index: usize, n: usize) -> usize {
    let half = n.div_ceil(2);
    if index < half { n - 1 - index } else { index - half }
}

/// The score of a key, and the sum of its terms' magnitudes.
fn score(q: &[f32], w: &[f64], key: &[u8]) -> (f64, f64) {
    let value = |channel: usize| {
        let code = key[channel / 2] >> (4 * (channel % 2)) & 15;
        let scale = Ue8m0::from_exponent(i32::from(key[64 + channel / 32]) - 127);
        f64::from(e2m1_to_f32(code)) * f64::from(scale.to_f32())
    };
    let key: [f64; INDEX_HEAD_DIM] = std::array::from_fn(value);
    let terms = q.chunks_exact(INDEX_HEAD_DIM).zip(w).map(|(q, w)| {
        let product: f64 = q.iter().zip(&key).map(|(&q, k)| f64::from(q) * k).sum();
        product.max(0.0) * w
    });
    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
}

/// How many of `chosen` should not be there, and how many others should.
fn n_wrong(chosen: &[u32], scores: &[(f64, f64)], top_k: usize) -> usize {
    let wanted = top_k.min(scores.len());
    let is_known = chosen.windows(2).all(|pair| pair[0] < pair[1])
        && chosen.last().is_none_or(|&last| (last as usize) < scores.len());
    if !is_known || chosen.len() != wanted {
        return wanted;
    }
    let mut sorted: Vec<f64> = scores.iter().map(|score| score.0).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let threshold = sorted[wanted - 1];
    let mut is_chosen = vec![false; scores.len()];
    chosen.iter().for_each(|&entry| is_chosen[entry as usize] = true);
    let is_wrong = |&(&is_chosen, &(score, size)): &(&bool, &(f64, f64))| {
        let slack = 2.0 * ROUNDING * size;
        if is_chosen { score < threshold - slack } else { score > threshold + slack }
    };
    is_chosen.iter().zip(scores).filter(is_wrong).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_wrong_by_what_is_missing_and_what_took_its_place() {
        let scores: Vec<(f64, f64)> =
            [1.0, 5.0, 3.0, 3.0, 4.0].into_iter().map(|score| (score, 5.0)).collect();
        assert_eq!(n_wrong(&[1, 2, 4], &scores, 3), 0);
        // Of equals either.
        assert_eq!(n_wrong(&[1, 3, 4], &scores, 3), 0);
        assert_eq!(n_wrong(&[0, 1, 4], &scores, 3), 1);
        assert_eq!(n_wrong(&[0, 1, 2], &scores, 3), 2);
        // Too few, one twice, one that there is not.
        assert_eq!(n_wrong(&[1, 4], &scores, 3), 3);
        assert_eq!(n_wrong(&[1, 1, 4], &scores, 3), 3);
        assert_eq!(n_wrong(&[1, 4, 9], &scores, 3), 3);
    }

    #[test]
    fn blocks_are_shuffled_without_losing_one() {
        for n in [1, 2, 7, 258] {
            let mut places: Vec<usize> = (0..n).map(|index| place_of(index, n)).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..n));
        }
    }
}
