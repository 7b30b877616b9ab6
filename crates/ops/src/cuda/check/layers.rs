//! Attention of one layer over several steps, on both sides.
//!
//! Every operator of the device gets the CPU's inputs, so that a difference shows where it arises.
//! Caches begin with the same random bytes, through the same door as lower cache tiers.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, WINDOW};
use rayon::prelude::*;

use super::parts::cpu;
use super::plain::Keys;
use super::random::Random;
use super::{BF16_STEP, Report, Size, exact};
use crate::cpu::{CpuOps, HostTensor, unpack_rows};
use crate::cuda::{CudaOps, DeviceTensor};
use crate::layer::{AttentionWeights, CompressorWeights, IndexerWeights};
use crate::traits::{AttentionOps, Projected, Queries};
use crate::{Backend, Batch, CacheSpec, IndexKeyFormat, KvFormat, OpError, Solo};

/// Dimensions of a layer.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) width: usize,
    pub(super) rank: usize,
    pub(super) heads: usize,
    pub(super) groups: usize,
    /// Rank of one output group.
    pub(super) group_rank: usize,
    pub(super) index_heads: usize,
    pub(super) top_k: usize,
}

const SMALL: Shape = Shape {
    width: 256,
    rank: 128,
    heads: 5,
    groups: 1,
    group_rank: 128,
    index_heads: 8,
    top_k: 16,
};
const FLASH: Shape = Shape {
    width: 4096,
    rank: 1024,
    heads: 64,
    groups: 8,
    group_rank: 1024,
    index_heads: 64,
    top_k: 512,
};

const PRO: Shape = Shape {
    width: 7168,
    rank: 1536,
    heads: 128,
    groups: 16,
    group_rank: 1024,
    index_heads: 64,
    top_k: 1024,
};

pub(super) fn spec(kind: LayerKind, n_blocks: usize) -> CacheSpec {
    CacheSpec {
        layers: vec![kind],
        n_slots: 3,
        n_blocks,
        n_snapshots: 1,
        spare_rows: 3,
        draft_width: 0,
        kv: KvFormat::Fp8,
        index_keys: IndexKeyFormat::Mxfp4,
    }
}

fn compressor<B: Backend>(
    ops: &B,
    random: &mut Random,
    kind: LayerKind,
    (entry, width): (usize, usize),
) -> Result<CompressorWeights<B>, OpError> {
    let rows = kind.compressor_width() * entry;
    Ok(CompressorWeights {
        width: entry,
        wkv: ops.load_linear(&random.bf16(rows, width)?)?,
        wgate: ops.load_linear(&random.bf16(rows, width)?)?,
        ape: random.vector(ops, kind.ratio() * rows, 0.0)?,
        norm: random.norm(ops, entry)?,
    })
}

pub(super) fn weights<B: Backend>(
    ops: &B,
    mut random: Random,
    kind: LayerKind,
    shape: Shape,
) -> Result<AttentionWeights<B>, OpError> {
    let Shape { width, rank, heads, groups, group_rank, index_heads, top_k } = shape;
    let random = &mut random;
    let frequencies: Vec<f32> = (0..32).map(|i| 10_000_f32.powf(-2.0 * i as f32 / 64.0)).collect();
    let compresses = kind != LayerKind::Window;
    Ok(AttentionWeights {
        kind,
        n_heads: heads,
        n_groups: groups,
        wq_a: ops.load_linear(&random.fp8(rank, width)?)?,
        q_norm: random.norm(ops, rank)?,
        wq_b: ops.load_linear(&random.fp8(heads * HEAD_DIM, rank)?)?,
        wkv: ops.load_linear(&random.fp8(HEAD_DIM, width)?)?,
        kv_norm: random.norm(ops, HEAD_DIM)?,
        wo_a: ops.load_linear(&random.fp8(groups * group_rank, heads * HEAD_DIM / groups)?)?,
        wo_b: ops.load_linear(&random.fp8(width, groups * group_rank)?)?,
        attn_sink: random.vector(ops, heads, 0.0)?,
        rope: ops.load_vector(&frequencies)?,
        compressor: compresses
            .then(|| compressor(ops, random, kind, (HEAD_DIM, width)))
            .transpose()?,
        indexer: if kind.has_indexer() {
            Some(IndexerWeights {
                n_heads: index_heads,
                top_k,
                wq_b: ops.load_linear(&random.fp8(index_heads * 128, rank)?)?,
                weights_proj: ops.load_linear(&random.bf16(index_heads, width)?)?,
                compressor: compressor(ops, random, kind, (128, width))?,
            })
        } else {
            None
        },
    })
}

struct Side<B: Backend> {
    ops: B,
    weights: AttentionWeights<B>,
    cache: B::Cache,
}

impl<B: Backend> Side<B> {
    fn new(
        ops: B,
        random: Random,
        kind: LayerKind,
        shape: Shape,
        n_blocks: usize,
    ) -> Result<Self, OpError> {
        let weights = weights(&ops, random, kind, shape)?;
        let cache = ops.new_cache(&spec(kind, n_blocks))?;
        Ok(Self { ops, weights, cache })
    }
}

struct Pair {
    cpu: Side<CpuOps>,
    device: Side<CudaOps>,
    width: usize,
    /// Window rows of the device by slot and position.
    window: BTreeMap<(u32, usize), Vec<f32>>,
}

impl Pair {
    fn to_device(&self, tensor: &HostTensor) -> Result<DeviceTensor, OpError> {
        self.device.ops.upload(tensor.rows, tensor.cols, &tensor.data)
    }

    /// Fills all blocks and the state of slot 1 at `position` with the same random bytes.
    fn fill(&mut self, random: &mut Random, position: u32, n_blocks: usize) -> Result<(), OpError> {
        let spec = spec(self.cpu.weights.kind, n_blocks);
        let kv_rows = |random: &mut Random, n: usize| {
            let mut bytes = Vec::with_capacity(n * spec.kv.row_bytes());
            for _ in 0..n {
                // E4M3 codes without NaN, bf16 of magnitude about 1, exponents around 2^-3.
                bytes.extend((0..448).map(|_| {
                    let bits = random.bits();
                    (bits & 0x80) as u8 | ((bits >> 8) as u8 % 0x60)
                }));
                let rope = random.values(64, 2.0);
                bytes.extend(rope.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()));
                bytes.extend((0..7).map(|_| 123 + (random.bits() % 3) as u8));
                bytes.push(0);
            }
            bytes
        };
        let rows = CacheSpec::rows_per_block(self.cpu.weights.kind);
        for block in 0..n_blocks as u32 {
            let mut bytes = kv_rows(random, rows);
            if self.cpu.weights.kind.has_indexer() {
                for _ in 0..rows {
                    bytes.extend((0..64).map(|_| random.bits() as u8));
                    bytes.extend((0..4).map(|_| 126 + (random.bits() % 3) as u8));
                }
            }
            self.cpu.ops.write_block(&mut self.cpu.cache, block, &bytes)?;
            self.device.ops.write_block(&mut self.device.cache, block, &bytes)?;
        }
        let mut snapshot = kv_rows(random, 128);
        let n_state = (spec.snapshot_bytes() - snapshot.len()) / 4;
        let state = random.values(n_state, 1.0);
        snapshot.extend(state.iter().flat_map(|x| x.to_le_bytes()));
        self.cpu.ops.write_snapshot(&mut self.cpu.cache, 0, &snapshot)?;
        self.device.ops.write_snapshot(&mut self.device.cache, 0, &snapshot)?;
        self.cpu.ops.restore(&mut self.cpu.cache, 0, 1, position)?;
        self.device.ops.restore(&mut self.device.cache, 0, 1, position)?;
        for position in position as usize - WINDOW..position as usize {
            let row = unpack_rows(&spec, self.cpu.cache.window_row(0, 1, position), None).0;
            self.window.insert((1, position), row);
        }
        Ok(())
    }

    /// The rows that the device attends to in a step: `stored` are those of the step itself, `chosen` the
    /// entries of each.
    fn keys(
        &mut self,
        batch: &Batch,
        chosen: Option<&[Vec<u32>]>,
        stored: &[f32],
    ) -> Result<Keys, OpError> {
        let kind = self.cpu.weights.kind;
        let mut keys = Keys::default();
        for sequence in &batch.sequences {
            for (row, position) in sequence.rows().zip(sequence.positions()) {
                let values = stored[row * HEAD_DIM..(row + 1) * HEAD_DIM].to_vec();
                self.window.insert((sequence.slot, position), values);
            }
            // Where a window row's or an entry's values are.
            let (mut of_window, mut of_entry) = (BTreeMap::new(), BTreeMap::new());
            for (row, position) in sequence.rows().zip(sequence.positions()) {
                let mut list = Vec::new();
                for at in (position + 1).saturating_sub(WINDOW)..=position {
                    if let Some(values) = self.window.get(&(sequence.slot, at)) {
                        list.push(*of_window.entry(at).or_insert_with(|| keys.push(values)));
                    }
                }
                let all = 0..kind.n_entries(position + 1) as u32;
                for entry in chosen.map_or_else(|| all.collect(), |chosen| chosen[row].clone()) {
                    let place = match of_entry.entry(entry) {
                        Entry::Occupied(place) => *place.get(),
                        Entry::Vacant(place) => {
                            let (cache, blocks) = (&self.device.cache, batch.blocks_of(sequence));
                            let entry = entry as usize;
                            let read = self.device.ops.read_entry(cache, 0, blocks, entry)?;
                            *place.insert(keys.push(&read.0))
                        }
                    };
                    list.push(place);
                }
                keys.lists.push(list);
                keys.positions.push(position);
            }
        }
        Ok(keys)
    }

    /// Attention `o` of a step over what [`Self::keys`] says against that of a plain kernel, and some heads in
    /// f64. Each sequence for itself: over few keys outputs are larger.
    fn compare_attention(
        &mut self,
        report: &mut Report<'_>,
        batch: &Batch,
        q: &HostTensor,
        (chosen, stored): (Option<&[Vec<u32>]>, &[f32]),
        (o, cpu_o): (&[f32], Option<&[f32]>),
    ) -> Result<(), OpError> {
        let keys = &self.keys(batch, chosen, stored)?;
        let weights = &self.cpu.weights;
        let (kind, n_heads) = (weights.kind, weights.n_heads);
        let (heads_q, _) = q.data.as_chunks::<HEAD_DIM>();
        let all = if super::plain::is_affordable(report.size, 4 * q.rows) {
            let (sinks, rope) = (&weights.attn_sink, &weights.rope);
            Some(super::plain::attend(report, &q.data, keys, sinks, rope)?)
        } else {
            None
        };
        for sequence in &batch.sequences {
            let own = sequence.rows().start * n_heads..sequence.rows().end * n_heads;
            let what = format!(
                "{kind:?} o [{} tokens from {}, width {}]",
                sequence.n_tokens, sequence.position, self.width
            );
            let n = exact::n_outputs(report.size) / batch.sequences.len();
            let heads: Vec<usize> =
                report.random.some_of(own.len(), n).iter().map(|head| own.start + head).collect();
            let attend = |&head: &usize| {
                let row = head / n_heads;
                let keys_of_row: Vec<&[f32]> = keys.of(row).collect();
                let sink = weights.attn_sink[head % n_heads];
                let position = keys.positions[row];
                exact::attend(&heads_q[head], sink, &keys_of_row, position, &weights.rope)
            };
            let expected: Vec<Vec<f32>> = heads.par_iter().map(attend).collect();
            let got = super::pick(o, HEAD_DIM, &heads);
            let in_f64 = format!("{what}, {} heads in f64", heads.len());
            report.close(in_f64, &got, &expected.concat(), exact::ATTENDED);
            let own = own.start * HEAD_DIM..own.end * HEAD_DIM;
            if let Some(all) = &all {
                if let Some(cpu_o) = cpu_o {
                    let (got, cpu_o) = (&all[own.clone()], &cpu_o[own.clone()]);
                    report.close(format!("{what}, the plain kernel"), got, cpu_o, 2.0 * BF16_STEP);
                }
                let all_outputs = format!("{what}, all outputs as the plain kernel's");
                report.close(all_outputs, &o[own.clone()], &all[own], exact::ATTENDED);
            }
        }
        Ok(())
    }

    /// Entries of a sequence in `blocks`, and their keys.
    fn compare_entries(
        &self,
        report: &mut Report<'_>,
        blocks: &[u32],
        entries: std::ops::Range<usize>,
    ) -> Result<(), OpError> {
        let kind = self.cpu.weights.kind;
        for entry in entries {
            let (expected, key) = self.cpu.ops.read_entry(&self.cpu.cache, 0, blocks, entry)?;
            let (got, got_key) =
                self.device.ops.read_entry(&self.device.cache, 0, blocks, entry)?;
            report.close(format!("{kind:?} entry {entry}"), &got, &expected, 1.0 / 16.0);
            if let (Some(got), Some(expected)) = (got_key, key) {
                // A norm that rounds otherwise may move a value to the next point of the FP4 grid.
                report.mostly_equal(format!("{kind:?} key {entry}"), &got, &expected, 0.07);
            }
        }
        Ok(())
    }

    /// Stores a new sequence of 128 tokens, which completes entries of every kind, and nothing else.
    fn store_a_group(&mut self, report: &mut Report<'_>, block: u32) -> Result<(), OpError> {
        let batch = Batch::single(0, 0, &[0; 128], &[block]);
        let x = report.random.values(128 * self.width, 2.0);
        let (cpu, device) = (&mut self.cpu, &mut self.device);
        let (cpu_step, step) = (cpu.ops.prepare_step(&batch)?, device.ops.prepare_step(&batch)?);
        let cpu_x = cpu.ops.upload(128, self.width, &x)?;
        let device_x = device.ops.upload(128, self.width, &x)?;
        let expected = cpu.ops.attn_project(&cpu.weights, &cpu_x)?;
        let got = device.ops.attn_project(&device.weights, &device_x)?;
        cpu.ops.attn_store(&cpu.weights, &expected, &cpu_step, &mut cpu.cache, 0)?;
        device.ops.attn_store(&device.weights, &got, &step, &mut device.cache, 0)?;
        let n = cpu.weights.kind.n_entries(128);
        self.compare_entries(report, &[block], 0..n)
    }

    /// Runs a step on both sides and compares every operator.
    fn step(&mut self, report: &mut Report<'_>, batch: &Batch) -> Result<(), OpError> {
        let (cpu, device) = (self.cpu.ops, self.device.ops.clone());
        let n_tokens = batch.n_tokens();
        let kind = self.cpu.weights.kind;
        let width = self.width;
        let what = |part: &str| format!("{kind:?} {part} [{n_tokens} tokens, width {width}]");
        let x = report.random.values(n_tokens * self.width, 2.0);
        let (cpu_step, step) = (cpu.prepare_step(batch)?, device.prepare_step(batch)?);
        let cpu_x = cpu.upload(n_tokens, self.width, &x)?;
        let device_x = device.upload(n_tokens, self.width, &x)?;
        let compare =
            |report: &mut Report<'_>, part, got: &DeviceTensor, expected: &HostTensor, limit| {
                report.close(what(part), &device.download(got)?, &expected.data, limit);
                Ok::<_, OpError>(())
            };

        let expected = cpu.attn_project(&self.cpu.weights, &cpu_x)?;
        let got = device.attn_project(&self.device.weights, &device_x)?;
        compare(report, "qr", &got.qr, &expected.qr, BF16_STEP)?;
        compare(report, "kv", &got.kv, &expected.kv, BF16_STEP)?;
        let inputs = [
            (&got.compressor, &expected.compressor),
            (&got.index_compressor, &expected.index_compressor),
        ];
        for (got, expected) in inputs {
            for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                compare(report, "compressor input", got, expected, 2e-5)?;
            }
        }
        // f32 compressor inputs cannot be uploaded; the device goes on with its own.
        let projected = Projected {
            qr: self.to_device(&expected.qr)?,
            kv: self.to_device(&expected.kv)?,
            index_weights: expected
                .index_weights
                .as_ref()
                .map(|w| self.to_device(w))
                .transpose()?,
            compressor: got.compressor,
            index_compressor: got.index_compressor,
        };
        let queries = cpu.attn_queries(&self.cpu.weights, &expected, &cpu_step)?;
        let got = device.attn_queries(&self.device.weights, &projected, &step)?;
        compare(report, "q", &got.q, &queries.q, 2.0 * BF16_STEP)?;
        if let (Some(got), Some(expected)) = (&got.index, &queries.index) {
            // A sum in another order may move a value to the next point of the FP4 grid.
            let got = device.download(got)?;
            report.mostly_equal(what("index q"), &got, &expected.data, 0.02);
        }
        let device_queries = Queries {
            q: self.to_device(&queries.q)?,
            index: queries.index.as_ref().map(|q| self.to_device(q)).transpose()?,
        };

        let (cpu_side, device_side) = (&mut self.cpu, &mut self.device);
        let kv = cpu.attn_store(&cpu_side.weights, &expected, &cpu_step, &mut cpu_side.cache, 0)?;
        let got = device.attn_store(
            &device_side.weights,
            &projected,
            &step,
            &mut device_side.cache,
            0,
        )?;
        compare(report, "stored kv", &got, &kv, 1.0 / 16.0)?;
        let stored = device.download(&got)?;
        let mut selection = None;
        let mut is_same = true;
        if cpu_side.weights.indexer.is_some() {
            let expected = cpu.index_select(
                &cpu_side.weights,
                &queries,
                &expected,
                &cpu_step,
                &cpu_side.cache,
                0,
            )?;
            let got = device.index_select(
                &device_side.weights,
                &device_queries,
                &projected,
                &step,
                &device_side.cache,
                0,
            )?;
            let (got_rows, rows) = (device.read_selection(&got)?, cpu.read_selection(&expected)?);
            let missing = |(got, wanted): (&Vec<u32>, &Vec<u32>)| {
                wanted.iter().filter(|entry| got.binary_search(entry).is_err()).count()
            };
            let n_missing: usize = got_rows.iter().zip(&rows).map(missing).sum();
            let n_wanted: usize = rows.iter().map(Vec::len).sum();
            // Scores that agree to 2^-20 may change places at the threshold.
            let share = n_missing as f64 / n_wanted.max(1) as f64;
            let what = what("selection");
            report.found.push(super::Comparison { what, error: share, limit: 0.02 });
            is_same = got_rows == rows;
            selection = Some((expected, got, got_rows));
        }
        let o = cpu.attend(
            &cpu_side.weights,
            &queries,
            &kv,
            selection.as_ref().map(|s| &s.0),
            &cpu_step,
            &mut cpu_side.cache,
            0,
        )?;
        let got = device.attend(
            &device_side.weights,
            &device_queries,
            &device_side.ops.upload(kv.rows, kv.cols, &kv.data)?,
            selection.as_ref().map(|s| &s.1),
            &step,
            &mut device_side.cache,
            0,
        )?;
        if is_same {
            compare(report, "o", &got, &o, 2.0 * BF16_STEP)?;
        }
        let got = device.download(&got)?;
        // Over the entries that the device chose; the CPU's result is of its own.
        let read = (selection.as_ref().map(|s| &*s.2), &*stored);
        let outputs = (&*got, is_same.then_some(&*o.data));
        self.compare_attention(report, batch, &queries.q, read, outputs)?;
        let y = cpu.attn_output(&self.cpu.weights, &o, &Solo)?;
        let got = device.attn_output(&self.device.weights, &self.to_device(&o)?, &Solo)?;
        compare(report, "y", &got, &y, BF16_STEP)
    }
}

/// A layer's shape, and the sequence that goes on in it: position, blocks, tokens of its chunk.
type Sequence = (Shape, u32, usize, usize);

fn attention(report: &mut Report<'_>, kind: LayerKind) -> Result<(), OpError> {
    let sequences: &[Sequence] = match report.size {
        Size::Small => &[(SMALL, 128, 2, 3)],
        // Beyond 4 * top_k positions entries compete. Pro's matrices are three times as large: few tokens.
        Size::Real => &[(FLASH, 4096, 24, 48), (PRO, 8192, 40, 16)],
    };
    sequences.iter().try_for_each(|sequence| layer(report, kind, *sequence))
}

fn layer(
    report: &mut Report<'_>,
    kind: LayerKind,
    (shape, position, n_blocks, chunk): Sequence,
) -> Result<(), OpError> {
    let (cpu, random) = (cpu(report), report.random.clone());
    report.random.bits();
    let mut pair = Pair {
        cpu: Side::new(cpu, random.clone(), kind, shape, n_blocks)?,
        device: Side::new(report.ops.clone(), random, kind, shape, n_blocks)?,
        width: shape.width,
        window: BTreeMap::new(),
    };
    let mut filler = report.random.clone();
    report.random.bits();
    pair.fill(&mut filler, position, n_blocks - 1)?;
    let blocks: Vec<u32> = (0..n_blocks as u32 - 1).collect();
    let last = [n_blocks as u32 - 1];
    // A chunk that goes on, with a new sequence beside it; then one token of each.
    let mut batch = Batch::default();
    batch.push(1, position, &vec![0; chunk], &blocks, true);
    batch.push(2, 0, &[0; 5], &last, true);
    pair.step(report, &batch)?;
    let mut batch = Batch::default();
    batch.push(2, 5, &[0], &last, true);
    batch.push(1, position + chunk as u32, &[0], &blocks, true);
    pair.step(report, &batch)?;
    let (before, after) = (position as usize, position as usize + chunk + 1);
    pair.compare_entries(report, &blocks, kind.n_entries(before)..kind.n_entries(after))?;
    pair.compare_entries(report, &last, 0..kind.n_entries(6))?;
    pair.store_a_group(report, last[0])
}

/// A layer without compression.
pub(super) fn window(report: &mut Report<'_>) -> Result<(), OpError> {
    attention(report, LayerKind::Window)
}

/// A layer with overlapping groups of 4 and an indexer.
pub(super) fn csa(report: &mut Report<'_>) -> Result<(), OpError> {
    attention(report, LayerKind::Csa)
}

/// A layer with groups of 128.
pub(super) fn hca(report: &mut Report<'_>) -> Result<(), OpError> {
    attention(report, LayerKind::Hca)
}
