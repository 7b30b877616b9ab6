//! The embedded model on a device: against the CPU, against the official code, against itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fathom_core::{Numerics, Rank, TokenId};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, NoProbe, Probe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::cuda::check::{Comparison, Poisoned};
use fathom_ops::cuda::{ArenaSizes, CudaOps, Device, Memory};
use fathom_ops::{Backend, Batch, CacheSpec, Ops, Solo};
use safetensors::SafeTensors;
use serde::Deserialize;

use super::sets::{Agreement, Sets};
use crate::gpu::Gpu;
use crate::gpu::plan::{Rehearsed, StepLimits};

/// A check of the whole model.
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) run: fn(&Gpu, bool) -> Result<Vec<Comparison>>,
}

/// All of them.
pub(super) const PARTS: [Part; 3] = [
    Part { name: "nano, device against CPU", run: against_cpu },
    Part { name: "nano, chunks and neighbours do not matter", run: invariance },
    Part { name: "nano, replayed steps", run: replays },
];

/// Layers of nano.
const N_LAYERS: usize = 4;

const OPTIONS: LoadOptions = LoadOptions { mtp: false };

fn load<O: Ops>(ops: O) -> Result<Transformer<O>> {
    let checkpoint = crate::embedded::checkpoint()?;
    Ok(Transformer::load(ops, &checkpoint, Rank::solo(), OPTIONS, &mut |_| {})?)
}

fn on_device(gpu: &Gpu) -> Result<Transformer<CudaOps>> {
    load(poisoned(gpu))
}

fn poisoned(gpu: &Gpu) -> CudaOps {
    let device: Arc<dyn Device> = Arc::new(Poisoned::new(Arc::clone(&gpu.device)));
    CudaOps::new(device, gpu.activations)
}

fn tokens(n: usize, step: u32) -> Vec<TokenId> {
    (0..n as u32).map(|i| 2 + (i * step + i * i % 61) % 1000).collect()
}

/// Logits of every row of `ids`, run in pieces of `chunk` tokens.
fn logits<O: Ops>(
    model: &Transformer<O>,
    ids: &[TokenId],
    chunk: usize,
    probe: &mut dyn Probe<O>,
) -> Result<Vec<Vec<f32>>> {
    let mut session = Session::new(model, &Solo, ids.len(), 0)?;
    let mut rows = Vec::with_capacity(ids.len());
    for piece in ids.chunks(chunk) {
        let output = session.run(piece, Rows::All, false, probe)?;
        let values = model.ops().download(&output.logits.context("no logits")?)?;
        rows.extend(values.chunks_exact(values.len() / piece.len()).map(<[f32]>::to_vec));
    }
    Ok(rows)
}

/// Euclidean distance relative to the length of `expected`; infinite where a value is no number.
fn rel_l2(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let sum: f64 =
        got.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let length: f64 = expected.iter().map(|x| square(f64::from(*x))).sum();
    let distance = (sum / length).sqrt();
    if distance.is_finite() && got.len() == expected.len() { distance } else { f64::INFINITY }
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// The limits of `models/nano/goldens/tolerances.json` for the bf16 mode: one ulp is amplified by
/// quantisation and top-k, in the official code too.
fn distances(what: &str, pairs: &[(Vec<f32>, Vec<f32>)]) -> Vec<Comparison> {
    let mut all: Vec<f64> = pairs.iter().map(|(got, expected)| rel_l2(got, expected)).collect();
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    let disagree = |(got, expected): &&(Vec<f32>, Vec<f32>)| argmax(got) != argmax(expected);
    let top1 = pairs.iter().filter(disagree).count() as f64 / pairs.len() as f64;
    let comparison = |part: &str, error, limit| Comparison {
        what: format!("{what}, {} rows: {part}", pairs.len()),
        error,
        limit,
    };
    vec![
        comparison("relL2 median", at(0.5), 0.11),
        comparison("relL2 maximum", at(1.0), 0.45),
        comparison("share of other likeliest tokens", top1, 0.18),
    ]
}

fn against_cpu(gpu: &Gpu, small: bool) -> Result<Vec<Comparison>> {
    let cpu = load(CpuOps::new(Numerics::Bf16).with_activations(gpu.activations))?;
    let device = on_device(gpu)?;
    let cases: &[(usize, usize)] =
        if small { &[(5, 3)] } else { &[(9, 5), (300, 128), (1000, 509), (2100, 1024)] };
    let mut found = Vec::new();
    for &(n, chunk) in cases {
        let ids = tokens(n, 37);
        let (mut chosen, mut wanted) = (Sets::default(), Sets::default());
        let got = logits(&device, &ids, chunk, &mut chosen)?;
        let expected = logits(&cpu, &ids, chunk, &mut wanted)?;
        let pairs: Vec<_> = got.into_iter().zip(expected).collect();
        found.extend(distances(&format!("logits of {n} tokens"), &pairs));
        let mut agreement = Agreement::default();
        agreement.runs(&chosen, &wanted);
        found.extend(agreement.comparisons(&format!("{n} tokens")));
    }
    Ok(found)
}

/// Share of rows whose bits differ.
fn differ(what: String, got: &[Vec<f32>], expected: &[Vec<f32>]) -> Comparison {
    let n = got.iter().zip(expected).filter(|(a, b)| a != b).count();
    let same = got.len() == expected.len();
    let error = if same { n as f64 / got.len().max(1) as f64 } else { f64::INFINITY };
    Comparison { what, error, limit: 0.0 }
}

fn invariance(gpu: &Gpu, small: bool) -> Result<Vec<Comparison>> {
    // Only in this mode are a token's bits promised not to depend on what else a step has.
    let model = load(poisoned(gpu).with_determinism(true))?;
    let (n, chunks): (usize, &[usize]) =
        if small { (4, &[3]) } else { (700, &[1, 3, 64, 257, 512]) };
    let ids = tokens(n, 41);
    let whole = logits(&model, &ids, n, &mut NoProbe)?;
    let mut found = Vec::new();
    for &chunk in chunks {
        let what = format!("{n} tokens in pieces of {chunk}");
        found.push(differ(what, &logits(&model, &ids, chunk, &mut NoProbe)?, &whole));
    }
    // The same sequence beside others: its logits are the first of each step.
    let spec = spec(&model, 8, n.div_ceil(256) * 8);
    let mut cache = model.new_cache(&spec)?;
    let piece = if small { 3 } else { 100 };
    let n_blocks = n.div_ceil(256) as u32;
    let mut got = Vec::new();
    for (index, tokens) in ids.chunks(piece).enumerate() {
        let mut batch = Batch::default();
        let position = (index * piece) as u32;
        for slot in 0..=(index as u32 * 3 % 7) {
            let blocks: Vec<u32> = (slot * n_blocks..(slot + 1) * n_blocks).collect();
            let own = if slot == 0 { tokens } else { &[17] };
            let at = if slot == 0 { position } else { 0 };
            batch.push(slot, at, own, &blocks, true);
        }
        let output = model.forward(&batch, &mut cache, &Solo, false, &mut NoProbe)?;
        let values = model.ops().download(&output.logits.context("no logits")?)?;
        let last = position as usize + tokens.len() - 1;
        got.push((values[..values.len() / batch.logit_rows.len()].to_vec(), last));
    }
    let expected: Vec<_> = got.iter().map(|&(_, last)| whole[last].clone()).collect();
    let got: Vec<_> = got.into_iter().map(|(row, _)| row).collect();
    found.push(differ(format!("{n} tokens beside other sequences"), &got, &expected));
    Ok(found)
}

fn spec<O: Ops>(model: &Transformer<O>, n_slots: usize, n_blocks: usize) -> CacheSpec {
    let (kv, index_keys) = CacheSpec::formats_for(Numerics::Bf16);
    CacheSpec {
        layers: model.cache_layers().to_vec(),
        n_slots,
        n_blocks,
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    }
}

/// Steps of one token per sequence over arenas, which are recorded and replayed, against the same
/// steps launched one by one.
fn replays(gpu: &Gpu, small: bool) -> Result<Vec<Comparison>> {
    let (n_seqs, n_steps) = if small { (1, 3) } else { (11, 300) };
    let n_blocks = (n_steps as usize).div_ceil(256);
    let limits = StepLimits {
        max_num_batched_tokens: 16,
        max_num_seqs: n_seqs,
        max_model_len: 512,
        max_drafts: 0,
        deterministic: false,
    };
    let checkpoint = crate::embedded::checkpoint()?;
    let rehearsed = Rehearsed::new(&checkpoint, gpu.kernels(), OPTIONS, limits)?;
    let spec = spec(rehearsed.model(), n_seqs, n_seqs * n_blocks);
    let sizes = ArenaSizes {
        weights: rehearsed.weight_bytes,
        cache: rehearsed.cache_bytes(&spec)?,
        workspace: rehearsed.workspace_bytes,
    };
    let run = |model: &Transformer<CudaOps>| -> Result<(Vec<Vec<f32>>, usize)> {
        let mut cache = model.new_cache(&spec)?;
        let mut rows = Vec::new();
        for position in 0..n_steps {
            // Sequences join one after the other, so that several shapes occur.
            let mut batch = Batch::default();
            for slot in 0..(n_seqs as u32).min(1 + position) {
                let blocks: Vec<u32> =
                    (0..n_blocks as u32).map(|block| slot * n_blocks as u32 + block).collect();
                let token = 2 + (position * 31 + slot * 97) % 1000;
                batch.push(slot, position - slot, &[token], &blocks, true);
            }
            let output = model.forward(&batch, &mut cache, &Solo, false, &mut NoProbe)?;
            let values = model.ops().download(&output.logits.context("no logits")?)?;
            rows.extend(values.chunks_exact(1024).map(<[f32]>::to_vec));
        }
        Ok((rows, model.ops().n_replays(&cache)))
    };
    let (launched, _) = run(&on_device(gpu)?)?;
    let memory = Memory::planned(Arc::clone(&gpu.device), sizes)?;
    let (replayed, n_replays) = run(&load(CudaOps::over(memory, gpu.activations))?)?;
    ensure!(n_replays > 0, "no step was replayed");
    let what = format!("{n_replays} of {n_steps} steps replayed");
    Ok(vec![differ(what, &replayed, &launched)])
}

#[derive(Deserialize)]
struct Manifest {
    cases: std::collections::BTreeMap<String, GoldenCase>,
}

#[derive(Deserialize)]
struct GoldenCase {
    ids: Vec<TokenId>,
    forced: Vec<TokenId>,
    sel_positions: Vec<usize>,
}

/// Prompts with forced answers, against what the official code computed for them.
pub(super) fn goldens(gpu: &Gpu, folder: &Path, small: bool) -> Result<Vec<Comparison>> {
    let read = |name: &str| {
        std::fs::read(folder.join(name))
            .with_context(|| format!("reading {}", folder.join(name).display()))
    };
    let manifest: Manifest = serde_json::from_slice(&read("nano_manifest.json")?)?;
    let bytes = read("nano_bf16.safetensors")?;
    let file = SafeTensors::deserialize(&bytes)?;
    let golden = |key: &str| -> Option<Vec<Vec<f32>>> {
        let view = file.tensor(key).ok()?;
        let values: Vec<f32> = match view.dtype() {
            safetensors::Dtype::F32 => {
                view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            _ => return None,
        };
        let cols = *view.shape().last()?;
        Some(values.chunks_exact(cols).map(<[f32]>::to_vec).collect())
    };
    let golden_sets = |key: &str| -> Vec<BTreeSet<u32>> {
        let Ok(view) = file.tensor(key) else { return Vec::new() };
        let words = view.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b));
        let ids: Vec<i32> = words.collect();
        let cols = view.shape().last().map_or(1, |cols| *cols).max(1);
        // Where there are fewer than k, -1 stands for the rest.
        let set = |row: &[i32]| row.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
        ids.chunks(cols).map(set).collect()
    };
    let model = on_device(gpu)?;
    let (mut pairs, mut agreement) = (Vec::new(), Agreement::default());
    for (name, case) in &manifest.cases {
        // What the emulator does in some seconds.
        if small && name != "p5" {
            continue;
        }
        let n_prompt = case.ids.len();
        let forced = if small { &case.forced[..1] } else { &case.forced };
        let mut session = Session::new(&model, &Solo, n_prompt + forced.len(), 0)?;
        let mut sets = Sets::default();
        let prompt = session.run(&case.ids, Rows::All, false, &mut sets)?;
        for layer in 0..N_LAYERS {
            let golden = |what: &str| golden_sets(&format!("{name}/prefill/layer{layer}/{what}"));
            agreement.experts(sets.experts.get(&layer), &golden("router_ids"));
            agreement.entries(sets.entries.get(&layer), &golden("index_topk"));
        }
        let values = model.ops().download(&prompt.logits.context("no logits")?)?;
        let width = values.len() / n_prompt;
        let row = |position: usize| values[position * width..(position + 1) * width].to_vec();
        if let Some(last) = golden(&format!("{name}/prefill/logits_last")) {
            pairs.extend(last.into_iter().map(|expected| (row(n_prompt - 1), expected)));
        }
        if let Some(selected) = golden(&format!("{name}/prefill/logits_sel")) {
            let rows = case.sel_positions.iter().map(|&position| row(position));
            pairs.extend(rows.zip(selected));
        }
        let decoded = golden(&format!("{name}/decode/logits")).unwrap_or_default();
        let mut sets = Sets::default();
        for (&token, expected) in forced.iter().zip(decoded) {
            let step = session.run(&[token], Rows::Last, false, &mut sets)?;
            pairs.push((model.ops().download(&step.logits.context("no logits")?)?, expected));
        }
        // Experts of a step are those of all layers, one after the other.
        let experts = golden_sets(&format!("{name}/decode/router_ids"));
        for layer in 0..N_LAYERS {
            let experts = experts.iter().skip(layer).step_by(N_LAYERS).take(forced.len()).cloned();
            agreement.experts(sets.experts.get(&layer), &experts.collect::<Vec<_>>());
            let mut entries = golden_sets(&format!("{name}/decode/layer{layer}/index_topk"));
            entries.truncate(forced.len());
            agreement.entries(sets.entries.get(&layer), &entries);
        }
    }
    ensure!(!pairs.is_empty(), "{} has no logits of these cases", folder.display());
    let mut found = distances("logits of the official code", &pairs);
    found.extend(agreement.comparisons("sets of the official code"));
    Ok(found)
}
