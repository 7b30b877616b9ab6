//! Attention: launchers of `attention` and `compress`.
//!
//! Not here: which entries a row attends to (`indexer`).

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};

use super::cache::{DeviceCache, LayerStores, StateStore};
use super::device::Arg;
use super::linear::Part;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::splits::{HEAD_TILE, Merge, divide, divide_tiles, most_partial};
use super::step::{DeviceStep, ENDED_HEADS};
use super::store::{Pending, check_compressor};
use super::tensor::{DeviceSelection, DeviceTensor, DeviceVector, Element};
use crate::error::check_len;
use crate::layer::{AttentionWeights, CompressorWeights};
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{Communicator, OpError};

/// Keys of a block of `attn_sparse`.
const KEY_BLOCK: usize = 64;
/// Shared memory of the form for sm_90a.
const SPARSE_SHARED_90: u32 = 211 * 1024;
/// Of `attn_sparse100`: three blocks of 64 keys, weights of two.
const SPARSE_SHARED_100: u32 = 209 * 1024;
/// Shared memory of `SparseShared` and `CompressShared`.
const SPARSE_SHARED: u32 = 16 * 520 * 2 + 64 * 520 * 2 + 16 * 72 * 2 + 2 * 4 * 16 * 4 + 4;
pub(super) const COMPRESS_SHARED: u32 = 512 * 4;
/// Bytes that the partial results of one attention launch may take.
const ATTENTION_WORKSPACE: usize = 256 << 20;

/// A weight or tensor that the layer's kind implies is absent.
fn absent(op: &'static str, arg: &'static str) -> OpError {
    OpError::Shape { op, arg, got: 0, expected: 1 }
}

fn check_rope(op: &'static str, rope: &DeviceVector) -> Result<(), OpError> {
    check_len(op, "frequencies", rope.len, 32)
}

impl AttentionOps for CudaOps {
    fn attn_project(
        &self,
        weights: &AttentionWeights<Self>,
        x: &DeviceTensor,
    ) -> Result<Projected<DeviceTensor>, OpError> {
        let input = self.linear_input(x)?;
        let pair = |compressor: &CompressorWeights<Self>| {
            [(compressor.wkv.clone(), Element::F32), (compressor.wgate.clone(), Element::F32)]
        };
        let mut matrices = Vec::new();
        matrices.extend(weights.compressor.iter().flat_map(pair));
        if let Some(indexer) = &weights.indexer {
            matrices.extend(pair(&indexer.compressor));
            matrices.push((indexer.weights_proj.clone(), Element::Bf16));
        }
        let (products, (qr, kv)) = self.memory.beside(
            || self.linear_each(&matrices, x),
            || {
                if let Some([qr, kv]) = self.pair90([&weights.wq_a, &weights.wkv], &input)? {
                    return Ok((qr, kv));
                }
                if let Some([qr, kv]) = self.pair80([&weights.wq_a, &weights.wkv], &input)? {
                    return Ok((qr, kv));
                }
                let qr = self.linear(&weights.wq_a, &input, Element::Bf16)?;
                Ok::<_, OpError>((qr, self.linear(&weights.wkv, &input, Element::Bf16)?))
            },
        )?;
        let mut products = products.into_iter();
        let mut next = || products.next().ok_or(absent("attn_project", "product"));
        let compressor = weights.compressor.as_ref().map(|_| Ok::<_, OpError>([next()?, next()?]));
        let compressor = compressor.transpose()?;
        let index =
            weights.indexer.as_ref().map(|_| Ok::<_, OpError>(([next()?, next()?], next()?)));
        let (index_compressor, index_weights) = index.transpose()?.unzip();
        Ok(Projected { qr, kv, compressor, index_compressor, index_weights })
    }

    fn attn_queries(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<DeviceTensor>,
        step: &DeviceStep,
    ) -> Result<Queries<DeviceTensor>, OpError> {
        const OP: &str = "attn_finish_q";
        check_rope(OP, &weights.rope)?;
        let of = step.rows(OP, projected.qr.rows)?;
        if of.n == 0 {
            let none = |heads: usize, dim: usize| self.tensor(0, heads * dim, Element::Bf16);
            let index = weights.indexer.as_ref().map(|i| none(i.n_heads, INDEX_HEAD_DIM));
            return Ok(Queries { q: none(weights.n_heads, HEAD_DIM)?, index: index.transpose()? });
        }
        if let Some(queries) = self.queries90(weights, &projected.qr, step)? {
            return Ok(queries);
        }
        if let Some(queries) = self.queries80(weights, &projected.qr, step)? {
            return Ok(queries);
        }
        let normed = self.rms_norm(&projected.qr, &weights.q_norm, true)?;
        let input = self.linear_input(&normed)?;
        let q = self.linear(&weights.wq_b, &input, Element::Bf16)?;
        check_len(OP, "q", q.cols, weights.n_heads * HEAD_DIM)?;
        let n_heads = q.rows * weights.n_heads;
        // SAFETY: q is [rows, n_heads, 512] bf16, positions have a value per row, 32 frequencies.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n_heads.div_ceil(4), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&q.values).into(),
                    (&weights.rope.values).into(),
                    (&of.positions).into(),
                    (q.rows as u32).into(),
                    (weights.n_heads as u32).into(),
                    weights.q_norm.eps.into(),
                ],
            })?;
        }
        let Some(indexer) = &weights.indexer else { return Ok(Queries { q, index: None }) };
        let index = self.linear(&indexer.wq_b, &input, Element::Bf16)?;
        check_len(OP, "index q", index.cols, indexer.n_heads * INDEX_HEAD_DIM)?;
        let n_heads = index.rows * indexer.n_heads;
        // SAFETY: index q is [rows, n_heads, 128] bf16, the rest as above.
        unsafe {
            self.launch(Call {
                kernel: "attn_finish_index_q",
                grid: [n_heads.div_ceil(4), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&index.values).into(),
                    (&weights.rope.values).into(),
                    (&of.positions).into(),
                    (index.rows as u32).into(),
                    (indexer.n_heads as u32).into(),
                ],
            })?;
        }
        Ok(Queries { q, index: Some(index) })
    }

    fn attn_store(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<DeviceTensor>,
        step: &DeviceStep,
        cache: &mut DeviceCache,
        layer: usize,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "attn_store_kv";
        let n_tokens = step.n_rows;
        step.check_cache(OP, &cache.spec)?;
        step.check_blocks(OP, cache.layers[layer].kind)?;
        check_rope(OP, &weights.rope)?;
        projected.kv.expect(OP, "kv", n_tokens, HEAD_DIM, Element::Bf16)?;
        check_len(OP, "kv_norm", weights.kv_norm.weight.len, HEAD_DIM)?;
        let out = self.tensor(n_tokens, HEAD_DIM, Element::Bf16)?;
        let pending = self.buffer(n_tokens * cache.spec.kv.row_bytes())?;
        let ring = cache.spec.window_rows();
        let stores = &mut cache.layers[layer];
        if step.has_one_token_each() {
            self.store_step(weights, projected, step, (stores, ring), (&out, &pending))?;
            stores.pending = Some(Pending { rows: pending, is_in_window: true });
            return Ok(out);
        }
        // SAFETY: kv and out are [n_tokens, 512] bf16, `pending` has a row of 584 bytes per token.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [n_tokens.div_ceil(4), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    (&projected.kv.values).into(),
                    (&weights.kv_norm.weight.values).into(),
                    (&weights.rope.values).into(),
                    (&step.all.positions).into(),
                    (&out.values).into(),
                    (&pending).into(),
                    (n_tokens as u32).into(),
                    weights.kv_norm.eps.into(),
                ],
            })?;
        }
        stores.pending = Some(Pending { rows: pending, is_in_window: false });
        if let Some(compressor) = &weights.compressor {
            let us = projected.compressor.as_ref().ok_or(absent(OP, "compressor"))?;
            let to = ("compress_emit_kv", &stores.entries, &stores.state);
            self.compress(compressor, &weights.rope, us, step, stores.kind, to)?;
        }
        if let Some(indexer) = &weights.indexer {
            let us = projected.index_compressor.as_ref().ok_or(absent(OP, "index_compressor"))?;
            let to = ("compress_emit_keys", &stores.keys, &stores.key_state);
            self.compress(&indexer.compressor, &weights.rope, us, step, stores.kind, to)?;
        }
        Ok(out)
    }

    fn index_select(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<DeviceTensor>,
        projected: &Projected<DeviceTensor>,
        step: &DeviceStep,
        cache: &DeviceCache,
        layer: usize,
    ) -> Result<DeviceSelection, OpError> {
        step.check_blocks("index_scores", cache.layers[layer].kind)?;
        let indexer = weights.indexer.as_ref().ok_or(absent("index_scores", "indexer"))?;
        let q = queries.index.as_ref().ok_or(absent("index_scores", "queries"))?;
        let w = projected.index_weights.as_ref().ok_or(absent("index_scores", "index_weights"))?;
        self.select_entries(indexer, (q, w), step, &cache.layers[layer].keys)
    }

    fn attend(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<DeviceTensor>,
        kv: &DeviceTensor,
        selection: Option<&DeviceSelection>,
        step: &DeviceStep,
        cache: &mut DeviceCache,
        layer: usize,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "attn_sparse";
        let (rows, n_heads) = (step.rows(OP, queries.q.rows)?.n, weights.n_heads);
        queries.q.expect(OP, "q", rows, n_heads * HEAD_DIM, Element::Bf16)?;
        kv.expect(OP, "kv", step.n_rows, HEAD_DIM, Element::Bf16)?;
        step.check_blocks(OP, cache.layers[layer].kind)?;
        check_len(OP, "attn_sink", weights.attn_sink.len, n_heads)?;
        check_rope(OP, &weights.rope)?;
        let ring = cache.spec.window_rows();
        let stores = &mut cache.layers[layer];
        let pending = stores.pending.take().ok_or(absent(OP, "rows of this step"))?;
        let out = self.tensor(rows, n_heads * HEAD_DIM, Element::Bf16)?;
        self.attend_rows(weights, &queries.q, &pending, selection, step, stores, ring, &out)?;
        Ok(out)
    }

    fn attn_output(
        &self,
        weights: &AttentionWeights<Self>,
        o: &DeviceTensor,
        comm: &dyn Communicator,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "attn_output";
        super::single_rank(OP, comm)?;
        let (n_groups, rank) = (weights.n_groups, weights.wo_a.rows / weights.n_groups);
        let group_width = weights.wo_a.cols;
        o.expect(OP, "o", o.rows, n_groups * group_width, Element::Bf16)?;
        if o.rows == 0 {
            return self.tensor(0, weights.wo_b.rows, Element::Bf16);
        }
        let z = self.tensor(o.rows, n_groups * rank, Element::Bf16)?;
        let part = Part { n_rows: rank, n_groups };
        self.linear_part(&weights.wo_a, part, o, &z)?;
        self.quantised_linear(&weights.wo_b, &z)
    }
}

impl CudaOps {
    /// Attention of all rows, in runs of rows whose partial results fit the workspace.
    #[expect(clippy::too_many_arguments, reason = "one fused launch reads all of these")]
    fn attend_rows(
        &self,
        weights: &AttentionWeights<Self>,
        q: &DeviceTensor,
        pending: &Pending,
        selection: Option<&DeviceSelection>,
        step: &DeviceStep,
        stores: &LayerStores,
        ring: usize,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        const OP: &str = "attn_sparse";
        let (rows, n_heads) = (q.rows, weights.n_heads);
        if rows == 0 {
            // Nobody looks at an output; what the step stored still enters the window.
            if !pending.is_in_window {
                self.commit_window(&pending.rows, step, stores, ring)?;
            }
            return Ok(());
        }
        let context = step.context;
        let (ratio, max_entries, chosen, counts) = match (stores.kind, selection) {
            (LayerKind::Window, _) => (0, 0, Arg::NULL, Arg::NULL),
            (LayerKind::Hca, _) => (128, stores.kind.n_entries(context), Arg::NULL, Arg::NULL),
            (LayerKind::Csa, Some(selection)) => {
                check_len(OP, "selection", selection.rows, rows)?;
                let most = selection.top_k.min(stores.kind.n_entries(context));
                (4, most, (&selection.chosen).into(), (&selection.counts).into())
            }
            (LayerKind::Csa, None) => return Err(absent(OP, "selection")),
        };
        let top_k = selection.map_or(0, |selection| selection.top_k);
        let key_blocks = WINDOW.min(context).div_ceil(KEY_BLOCK) + max_entries.div_ceil(KEY_BLOCK);
        let arch = self.memory.device().arch();
        let is_deterministic = self.is_deterministic();
        let in_tiles_of_64 =
            || divide(arch, is_deterministic, rows * n_heads.div_ceil(64), key_blocks);
        let in_tiles = || divide_tiles(arch, is_deterministic, (rows, n_heads), key_blocks);
        let ((division, head_tile), threads, shared_bytes, kernel) = match arch {
            "sm_90a" => ((in_tiles_of_64(), 64), 384, SPARSE_SHARED_90, "attn_sparse90"),
            // Few tokens: no launch that adds up what blocks of 64 heads left.
            "sm_100f" if !self.is_skinny_blackwell(rows) || in_tiles().0.merge != Merge::Last => {
                ((in_tiles_of_64(), 64), 416, SPARSE_SHARED_100, "attn_sparse100")
            }
            _ => (in_tiles(), 128, SPARSE_SHARED, OP),
        };
        let n_splits = division.n_splits(key_blocks);
        let kernel = match division.merge {
            Merge::Launch | Merge::Last => kernel,
            Merge::Cluster(1) => "attn_sparse90_c1",
            Merge::Cluster(2) => "attn_sparse90_c2",
            Merge::Cluster(4) => "attn_sparse90_c4",
            Merge::Cluster(_) => "attn_sparse90_c8",
        };
        let row_floats = division.n_partial(key_blocks) * n_heads * (HEAD_DIM + 2);
        let run = (ATTENTION_WORKSPACE / (4 * row_floats).max(1)).clamp(1, rows.max(1)).min(65_535);
        // More rows in longer splits may need less: never less than any shorter ones would.
        let n_parts = run * division.n_partial(key_blocks) * n_heads;
        let n_parts = n_parts.max(most_partial(arch) * head_tile.max(HEAD_TILE));
        let acc = self.buffer(4 * n_parts * HEAD_DIM)?;
        let stats = self.buffer(4 * n_parts * 2)?;
        let [positions, sequence_of, sequences] = step.args_of(step.rows(OP, rows)?);
        let args = |first: usize| {
            let mut args: Vec<Arg> =
                [&q.values, &stores.window, &pending.rows, &stores.entries].map(Arg::from).into();
            args.extend([chosen, counts, positions, sequence_of, sequences]);
            args.extend([&step.blocks, &acc, &stats].map(Arg::from));
            if kernel != "attn_sparse100" {
                let finishing = [&weights.attn_sink.values, &weights.rope.values, &out.values];
                args.extend(finishing.map(Arg::from));
            }
            if kernel == OP {
                let is_last = division.merge == Merge::Last;
                args.push(if is_last { step.ended(ENDED_HEADS) } else { Arg::NULL });
                args.push(Arg::U32(head_tile as u32));
            }
            let sizes = [first, n_heads, ring, ratio, top_k, division.split_blocks];
            args.extend(sizes.map(|n| Arg::U32(n as u32)));
            args
        };
        for first in (0..rows).step_by(run) {
            let n = run.min(rows - first);
            let grid = [n_splits, n_heads.div_ceil(head_tile), n];
            // SAFETY: q is [rows, n_heads, 512] bf16; window, pending rows and entries hold every
            // key that positions, blocks and selection of the step name; `acc` and `stats` have
            // room for `run` rows of all splits and heads, or none are written; `out` is
            // [rows, n_heads, 512] bf16. A cluster's blocks are the splits of its tile; tiles that count have a
            // word each, and no launch beside this one counts there.
            unsafe {
                self.launch(Call { kernel, grid, threads, shared_bytes, args: &args(first) })?;
            }
            if division.merge != Merge::Launch {
                continue;
            }
            let merge = || {
                // SAFETY: the partial results of these rows are in `acc` and `stats`; `out` is
                // [rows, n_heads, 512] bf16.
                unsafe {
                    self.launch(Call {
                        kernel: "attn_merge",
                        grid: [(n * n_heads).div_ceil(4), 1, 1],
                        threads: 128,
                        shared_bytes: 0,
                        args: &[
                            (&acc).into(),
                            (&stats).into(),
                            (&weights.attn_sink.values).into(),
                            (&weights.rope.values).into(),
                            positions,
                            (&out.values).into(),
                            (first as u32).into(),
                            (n as u32).into(),
                            (n_heads as u32).into(),
                            (n_splits as u32).into(),
                        ],
                    })
                }
            };
            if first + n < rows || pending.is_in_window {
                merge()?;
            } else {
                // The window is read no more.
                let commit = || self.commit_window(&pending.rows, step, stores, ring);
                self.memory.beside(commit, merge)?;
            }
        }
        if division.merge != Merge::Launch && !pending.is_in_window {
            return self.commit_window(&pending.rows, step, stores, ring);
        }
        Ok(())
    }

    /// Writes the rows of this step into the window, over the oldest.
    fn commit_window(
        &self,
        pending: &Buffer,
        step: &DeviceStep,
        stores: &LayerStores,
        ring: usize,
    ) -> Result<(), OpError> {
        let [positions, sequence_of, sequences] = step.row_args();
        // SAFETY: `pending` has a row per token; slots are inside of the window store.
        unsafe {
            self.launch(Call {
                kernel: "attn_commit_window",
                grid: [step.n_rows, 1, 1],
                threads: 96,
                shared_bytes: 0,
                args: &[
                    pending.into(),
                    (&stores.window).into(),
                    positions,
                    sequence_of,
                    sequences,
                    (ring as u32).into(),
                ],
            })
        }
    }

    /// Emits the entries (or keys) that this step completes into `to`, then advances the state.
    fn compress(
        &self,
        weights: &CompressorWeights<Self>,
        rope: &DeviceVector,
        us: &[DeviceTensor; 2],
        step: &DeviceStep,
        kind: LayerKind,
        (kernel, store, state): (&'static str, &Buffer, &StateStore),
    ) -> Result<(), OpError> {
        let rows = step.n_rows;
        let (ratio, coff) = (kind.ratio(), kind.compressor_width());
        let width = coff * weights.width;
        check_compressor(kernel, weights, us, rows, kind, state)?;
        let [u, s] = us;
        let [positions, sequence_of, sequences] = step.row_args();
        let (u, s, ape) = (&u.values, &s.values, &weights.ape.values);
        // SAFETY: u and s are [rows, width] f32, the state [n_slots, ring, width]; entries of all
        // positions of the step lie in the sequences' blocks.
        unsafe {
            self.launch(Call {
                kernel,
                grid: [rows, 1, 1],
                threads: 128,
                shared_bytes: COMPRESS_SHARED,
                args: &[
                    u.into(),
                    s.into(),
                    ape.into(),
                    (&state.u).into(),
                    (&state.s).into(),
                    (&weights.norm.weight.values).into(),
                    (&rope.values).into(),
                    positions,
                    sequence_of,
                    sequences,
                    (&step.blocks).into(),
                    store.into(),
                    (ratio as u32).into(),
                    (coff as u32).into(),
                    (state.rows as u32).into(),
                    weights.norm.eps.into(),
                ],
            })?;
            self.launch(Call {
                kernel: "compress_state",
                grid: [rows, 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    u.into(),
                    s.into(),
                    ape.into(),
                    (&state.u).into(),
                    (&state.s).into(),
                    positions,
                    sequence_of,
                    sequences,
                    (width as u32).into(),
                    (ratio as u32).into(),
                    (state.rows as u32).into(),
                ],
            })
        }
    }
}
