//! The measurements: the steps of a case.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use fathom_core::LayerKind;
use fathom_model::{ModelError, NoProbe, Probe, Seen};
use fathom_ops::cuda::{CudaOps, DeviceCache, DeviceTensor};
use fathom_ops::{BLOCK_TOKENS, Backend, Batch, OpError, Solo};

use super::floors::{Run, spread};
use super::prepare::{Prepared, cache_spec};
use super::shape::{Case, SliceArgs, Work};

/// Steps before the timed ones; the first loads code, the second is recorded.
const WARM_UPS: usize = 5;
/// Layers of one kind that are timed at once.
const KIND_LAYERS: usize = 8;
/// Beyond this a hidden state has left what any trained model has.
const LARGEST_HIDDEN: f32 = 1e4;

/// By the name of a kind: the kind, median seconds of one layer, and the layers that were timed.
pub(super) type KindTimes = BTreeMap<&'static str, (LayerKind, f64, Vec<usize>)>;

/// A case's times, and what they are compared with.
#[derive(Debug)]
pub(super) struct Measured {
    /// Seconds of each timed step.
    pub(super) seconds: Vec<f64>,
    pub(super) runs: Vec<Run>,
    pub(super) n_logits: usize,
    /// Different experts that each layer's tokens chose.
    pub(super) distinct: Vec<f64>,
    pub(super) kinds: KindTimes,
    pub(super) largest_hidden: f32,
    pub(super) is_replayed: bool,
}

/// The middle value.
pub(super) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((sorted.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or(0.0)
}

/// Runs a case.
///
/// # Errors
/// What a step fails with; a step that leaves numbers no model has; a decode step that is not replayed.
pub(super) fn case(prepared: &Prepared, case: Case, args: &SliceArgs) -> Result<Measured> {
    let model = &prepared.model;
    let ops = model.ops();
    let spec = cache_spec(model, &case);
    let mut cache = model.new_cache(&spec)?;
    ops.draw_cache(&cache)?;
    let (batch, runs) = batch(case, model.config().vocab_size);

    let mut watcher = Watcher { last: prepared.n_layers() - 1, ..Watcher::default() };
    let output = model.forward(&batch, &mut cache, &Solo, false, &mut watcher)?;
    let logits = ops.download(&output.logits.context("a step without logits")?)?;
    ensure!(logits.iter().all(|x| x.is_finite()), "logits are no numbers");
    let largest_hidden = watcher.largest;
    ensure!(
        largest_hidden < LARGEST_HIDDEN,
        "the copies reach {largest_hidden}, more than {LARGEST_HIDDEN}: drawn weights do not fit"
    );

    let is_decode = !super::is_prefill(case);
    let mut step = || -> Result<(), ModelError> {
        model.forward(&batch, &mut cache, &Solo, false, &mut NoProbe).map(drop)
    };
    let warm_ups = if prepared.is_emulator || args.quick { 3 } else { WARM_UPS };
    // A prefill chunk is long, and no recording has to be made.
    let (warm_ups, n) =
        if is_decode { (warm_ups, args.n_samples()) } else { (2, args.n_samples().div_ceil(3)) };
    (0..warm_ups).try_for_each(|_| step())?;
    let seconds = ops.stamped(n, &mut step)?;
    let n_replays = ops.n_replays(&cache);
    ensure!(
        !is_decode || n_replays >= n,
        "{n_replays} of {n} decode steps were replayed; the others were launched kernel by kernel"
    );
    let kinds = if is_decode && !args.quick {
        by_kind(prepared, &batch, &mut cache, args.n_samples())?
    } else {
        BTreeMap::new()
    };
    let (distinct, n_logits) = (watcher.distinct, batch.logit_rows.len());
    let is_replayed = is_decode;
    Ok(Measured { seconds, runs, n_logits, distinct, kinds, largest_hidden, is_replayed })
}

/// The batch of a case, with tokens that differ.
fn batch(case: Case, vocab_size: usize) -> (Batch, Vec<Run>) {
    let token = |index: usize| (index.wrapping_mul(7919) % vocab_size) as u32;
    let mut batch = Batch::default();
    let mut runs = Vec::new();
    match case.work {
        Work::Decode { batch: n, context } => {
            let mut first_block = 0;
            for (slot, length) in spread(context, n).into_iter().enumerate() {
                let blocks: Vec<u32> =
                    (first_block..).take(length.div_ceil(BLOCK_TOKENS)).collect();
                first_block += blocks.len() as u32;
                let position = length - 1;
                batch.push(slot as u32, position as u32, &[token(slot + 1)], &blocks, true);
                runs.push(Run { position, n_tokens: 1 });
            }
        }
        Work::Prefill { n_tokens, prefix } => {
            let blocks: Vec<u32> = (0..).take((prefix + n_tokens).div_ceil(BLOCK_TOKENS)).collect();
            let tokens: Vec<u32> = (1..=n_tokens).map(token).collect();
            batch.push(0, prefix as u32, &tokens, &blocks, true);
            runs.push(Run { position: prefix, n_tokens });
        }
    }
    (batch, runs)
}

/// Seconds of one layer of each kind: recorded layers of that kind alone, less what is not a layer.
fn by_kind(
    prepared: &Prepared,
    batch: &Batch,
    cache: &mut DeviceCache,
    n: usize,
) -> Result<KindTimes> {
    let model = &prepared.model;
    let ops = model.ops();
    let step = ops.prepare_step(batch)?;
    let mut median = |layers: &[usize]| -> Result<f64> {
        let seconds =
            ops.replayed(2, n, &mut || model.run_layers(layers, &step, cache, &Solo).map(drop))?;
        Ok(quantile(&seconds, 0.5))
    };
    let nothing = median(&[])?;
    let mut kinds = BTreeMap::new();
    for kind in [LayerKind::Window, LayerKind::Csa, LayerKind::Hca] {
        let is_of = |&layer: &usize| model.config().layer_kind(layer) == kind;
        let mut layers: Vec<usize> = (0..prepared.n_layers()).filter(is_of).collect();
        // Those behind the hash-routed ones, if there are enough.
        let n_spare = layers.len().saturating_sub(KIND_LAYERS);
        layers.drain(..n_spare);
        if !layers.is_empty() {
            let one = (median(&layers)? - nothing).max(0.0) / layers.len() as f64;
            kinds.insert(super::stages::kind_name(kind), (kind, one, layers));
        }
    }
    Ok(kinds)
}

/// Counts experts and looks at the size of the last layer's output.
#[derive(Debug, Default)]
struct Watcher {
    last: usize,
    distinct: Vec<f64>,
    largest: f32,
}

impl Probe<CudaOps> for Watcher {
    fn see(&mut self, ops: &CudaOps, layer: usize, seen: Seen<'_, CudaOps>) -> Result<(), OpError> {
        match seen {
            Seen::Routing(routing) => {
                let (mut ids, _) = ops.read_routing(routing)?;
                ids.sort_unstable();
                ids.dedup();
                self.distinct.push(ids.len() as f64);
            }
            Seen::BlockOut(x) if layer == self.last => self.largest = largest(ops, x)?,
            _ => {}
        }
        Ok(())
    }
}

/// The largest magnitude; infinite where a value is no number.
fn largest(ops: &CudaOps, x: &DeviceTensor) -> Result<f32, OpError> {
    let values = ops.download(x)?;
    Ok(values.iter().fold(
        0.0,
        |most: f32, x| {
            if x.is_finite() { most.max(x.abs()) } else { f32::INFINITY }
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.9), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn sequences_of_a_batch_have_blocks_of_their_own_and_end_apart() {
        let case = Case { work: Work::Decode { batch: 3, context: 1024 }, zipf: false };
        let (batch, runs) = batch(case, 1024);
        batch.validate(3, 3 + 4 + 5, 1024).unwrap();
        let positions: Vec<usize> = runs.iter().map(|run| run.position).collect();
        assert_eq!(positions, [767, 1023, 1279]);
        let mut blocks = batch.blocks.clone();
        blocks.dedup();
        assert_eq!(blocks, (0..12).collect::<Vec<u32>>());
    }
}
