//! Bytes that must move and operations that must be done, counted from shapes as [`Operator`] says.

use fathom_core::LayerKind;
use fathom_core::model_config::{HC_MIX, HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, WINDOW};

use super::shapes::{Operator, Shape, compressor_rows};
use crate::{IndexKeyFormat, KvFormat};

const KV_ROW: usize = KvFormat::Fp8.row_bytes();
const KEY_ROW: usize = IndexKeyFormat::Mxfp4.row_bytes();

impl Shape {
    /// Bytes that must move, and multiplications and additions of the products.
    #[must_use]
    pub fn work(&self) -> (f64, f64) {
        let rows = self.rows;
        let (bytes, flops) = match self.operator {
            Operator::Fp8Linear { n, k, .. } => (n * k + 2 * rows * (n + k), 2 * rows * n * k),
            Operator::Bf16Linear { n, k, .. } => {
                (2 * n * k + rows * (4 * n + 2 * k), 2 * rows * n * k)
            }
            Operator::CompressorInputs { width, kind, index_heads } => {
                let all: usize = compressor_rows(kind, index_heads).iter().sum();
                let n_weights = if kind.has_indexer() { index_heads } else { 0 };
                let results = 4 * all - 2 * n_weights;
                (2 * all * width + rows * (2 * width + results), 2 * rows * all * width)
            }
            Operator::GroupedOutput { n_groups, rank, group_width } => {
                let weights = n_groups * rank * group_width;
                let of_a_row = 2 * n_groups * (group_width + rank);
                (weights + rows * of_a_row, 2 * rows * weights)
            }
            Operator::Queries { rank, n_heads, index_heads } => {
                let n = n_heads * HEAD_DIM + index_heads * INDEX_HEAD_DIM;
                (n * rank + 2 * rows * (rank + n), 2 * rows * n * rank)
            }
            Operator::Store { kind, is_chunk, .. } => (rows * stored_bytes(kind, is_chunk), 0),
            Operator::Router { width, n_experts, .. } => {
                (2 * n_experts * width + 2 * rows * width, 2 * rows * n_experts * width)
            }
            Operator::Experts { width, channels, n_experts, top_k } => {
                // Uniform routing: how many different experts `rows` tokens reach.
                let missed = 1.0 - top_k as f64 / n_experts as f64;
                let hit = n_experts as f64 * (1.0 - missed.powi(rows as i32));
                let expert_bytes = 3 * width * channels * 17 / 32;
                let rest = 3 * width * channels + 4 * rows * width;
                let flops = 2 * rows * (top_k + 1) * 3 * width * channels;
                return (hit * expert_bytes as f64 + rest as f64, flops as f64);
            }
            Operator::SharedExpert { width, channels } => {
                let weights = 3 * width * channels;
                (weights + 4 * rows * width, 2 * rows * weights)
            }
            Operator::Boundary { width } => {
                let function = HC_MIX * HC_MULT * width;
                let of_a_row = 2 * width * (2 * HC_MULT + 1 + 2);
                (rows * of_a_row + 4 * function, 2 * rows * function)
            }
            Operator::Attention { n_heads, top_k, context, is_chunk } => {
                let keys = WINDOW + top_k;
                // Keys and values are the same rows. A chunk's own rows are in the window's place.
                let n_read = if is_chunk {
                    WINDOW + rows + LayerKind::Csa.n_entries(context)
                } else {
                    rows * keys
                };
                let of_a_row = 4 * n_heads * HEAD_DIM;
                (KV_ROW * n_read + rows * of_a_row, rows * 4 * n_heads * HEAD_DIM * keys)
            }
            Operator::IndexScores { n_heads, context, .. } => {
                let (bytes, flops) = scored(n_heads, context);
                (rows * (bytes + 4 * LayerKind::Csa.n_entries(context)), rows * flops)
            }
            Operator::IndexTopK { top_k, context } => {
                (rows * (4 * LayerKind::Csa.n_entries(context) + 4 * top_k), 0)
            }
            Operator::IndexSelect { n_heads, top_k, context } => {
                let (bytes, flops) = scored(n_heads, context);
                (rows * (bytes + 4 * top_k), rows * flops)
            }
            Operator::Embed { width, .. } => (2 * rows * width * (1 + HC_MULT), 0),
            Operator::HeadNorm { width } => {
                let function = HC_MULT * HC_MULT * width;
                (4 * function + 2 * rows * width * (HC_MULT + 1), 2 * rows * function)
            }
            Operator::MtpInput { width, .. } => {
                let matrices = 2 * width * width;
                let of_a_row = 2 * width * (1 + 2 * HC_MULT);
                (matrices + rows * of_a_row, 2 * rows * width * width * (1 + HC_MULT))
            }
            Operator::Choose { vocab, .. } => (4 * rows * vocab, 0),
        };
        (bytes as f64, flops as f64)
    }
}

/// Bytes of the keys and queries of one row's scores, and operations.
const fn scored(n_heads: usize, context: usize) -> (usize, usize) {
    let entries = LayerKind::Csa.n_entries(context);
    let queries = 2 * n_heads * INDEX_HEAD_DIM;
    (KEY_ROW * entries + queries, 2 * n_heads * INDEX_HEAD_DIM * entries)
}

/// Bytes that storing one row moves.
fn stored_bytes(kind: LayerKind, is_chunk: bool) -> usize {
    let window = if is_chunk { 0 } else { KV_ROW };
    let own = 2 * 2 * HEAD_DIM + KV_ROW + window;
    // Two f32 inputs, read, written and read again.
    let compressor = |width: usize| 3 * 2 * 4 * kind.compressor_width() * width;
    match kind {
        LayerKind::Window => own,
        LayerKind::Hca => own + compressor(HEAD_DIM) + KV_ROW / kind.ratio(),
        LayerKind::Csa => {
            let entry = (KV_ROW + KEY_ROW) / kind.ratio();
            own + compressor(HEAD_DIM) + compressor(INDEX_HEAD_DIM) + entry
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shapes::{shapes, small_shapes};
    use super::*;

    #[test]
    fn work_is_that_of_the_designs_table() {
        let work = |name: &str| {
            let shape = shapes().into_iter().find(|shape| shape.name() == name);
            shape.unwrap_or_else(|| panic!("there is no {name}")).work()
        };
        assert_eq!(work("FP8 wq_a and wkv [1536, 4096] x 1"), (6_302_720.0, 12_582_912.0));
        assert_eq!(work("attention, 64 heads, 640 keys x 1"), (504_832.0, 83_886_080.0));
        let index = work("index, 512 of 262144 x 8");
        assert_eq!(index, (8.0 * (262_144.0 * 68.0 + 18_432.0), 8.0 * 4_294_967_296.0));
        // Megabytes and billions of operations. The table takes bf16 results and FP8 inputs throughout.
        let close = |name: &str, bytes: f64, flops: f64| {
            let got = work(name);
            let (got_mb, got_gf) = (got.0 / 1e6, got.1 / 1e9);
            assert!((got_mb / bytes - 1.0).abs() < 0.01, "{name}: {got_mb} MB");
            assert!((got_gf - flops).abs() <= 0.006 * flops, "{name}: {got_gf} G");
        };
        close("bf16 compressor inputs, ratio 4, width 4096, x 1", 21.51, 0.0215);
        close("bf16 compressor inputs, ratio 4, width 4096, x 4096", 97.52, 88.0);
        close("wo_a, 8 of [1024, 4096], x 128", 44.04, 8.59);
        close("shared expert [2048, 4096] x 128", 27.26, 6.44);
        close("router, 256 of width 4096, x 1", 2.11, 0.0021);
        close("router, 256 of width 4096, x 4096", 35.65, 8.59);
        // There without the shared expert, which has 25 MB and 206 G operations.
        close("experts, 256 of width 4096, x 4096", 3514.8, 1443.0);
        close("scores, 64 heads, 8192 x 128", 77.5, 17.2);
        close("top-k, 512 of 262144 x 8", 8.4, 0.0);
        // Scattered rows of 584 bytes, and 2,048 of norm, in and out.
        close("store, window x 128", 0.412, 0.0);
        // And two compressors: six times their f32 inputs, a fourth of an entry and its key.
        close("store, ratio 4 x 1", 0.034_099, 0.0);
        close("store, ratio 128 x 1", 0.015_508, 0.0);
        close("likeliest token of 129280 x 32", 16.55, 0.0);
    }

    #[test]
    fn everything_has_a_name_of_its_own_and_bytes_to_move() {
        for shapes in [shapes(), small_shapes()] {
            let names: std::collections::BTreeSet<_> = shapes.iter().map(Shape::name).collect();
            assert_eq!(names.len(), shapes.len());
            assert!(shapes.iter().all(|shape| shape.work().0 > 0.0));
        }
        let kinds = |shapes: Vec<Shape>| -> std::collections::BTreeSet<&str> {
            shapes.iter().map(|shape| shape.operator.kind()).collect()
        };
        assert_eq!(kinds(shapes()), kinds(small_shapes()));
    }
}
