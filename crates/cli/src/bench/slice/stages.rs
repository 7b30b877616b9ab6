//! How many launches one layer of a decode step makes, from what a step records, and how many of them
//! wait for each other: at some 1.5 us each these are a floor of their own for few tokens. The target
//! is twelve. Some may overlap with the launch before them, where the device lets them.

use anyhow::Result;
use fathom_core::{LayerKind, ModelConfig, Rank};
use fathom_model::{LoadOptions, Transformer};
use fathom_ops::cuda::overlap::{self, Level};
use fathom_ops::cuda::rehearsal::{Noted, Rehearsal};
use fathom_ops::cuda::{CudaOps, Device};
use fathom_ops::{Activations, BLOCK_TOKENS, Backend, Batch, CacheSpec, Solo};
use serde_json::{Value, json};

use super::prepare::{hollow, truncated};

/// Dependent launches that a layer may make.
pub(super) const TARGET: usize = 12;

/// As tables call a kind.
pub(super) const fn kind_name(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Window => "window",
        LayerKind::Csa => "ratio-4",
        LayerKind::Hca => "ratio-128",
    }
}

/// What a layer launches.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layer {
    kind: LayerKind,
    /// In the order in which they are launched.
    kernels: Vec<&'static str>,
    /// How many of them wait for each other.
    n_dependent: usize,
    /// How many may begin before the launch before them has ended.
    n_overlapping: usize,
}

/// Launches of a layer of every kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stages(Vec<Layer>);

impl Stages {
    pub(super) fn line(&self) -> String {
        let part = |layer: &Layer| {
            let Layer { kind, kernels, n_dependent, n_overlapping } = layer;
            let (kind, n) = (kind_name(*kind), kernels.len());
            format!("{kind} {n_dependent} of {n}, {n_overlapping} may overlap")
        };
        let parts: Vec<String> = self.0.iter().map(part).collect();
        format!("dependent launches per layer: {} (target {TARGET})", parts.join("; "))
    }

    pub(super) fn json(&self) -> Value {
        let kinds = self.0.iter().map(|layer| {
            let value = json!({
                "dependent": layer.n_dependent,
                "overlapping": layer.n_overlapping,
                "kernels": layer.kernels,
            });
            (kind_name(layer.kind).to_owned(), value)
        });
        json!({ "target": TARGET, "kinds": kinds.collect::<serde_json::Map<_, _>>() })
    }
}

/// Records layers of every kind of `config` with the kernels of a device.
///
/// # Errors
/// What the model is refused for.
pub(super) fn per_layer(
    config: &ModelConfig,
    (arch, activations): (&'static str, Activations),
) -> Result<Stages> {
    let kinds = &config.layer_kinds[..config.num_hidden_layers];
    // The last layer of a kind among the first ones routes by score, as most do.
    let n_layers = (config.num_hash_layers + 2).min(kinds.len());
    let device = Rehearsal::recording(arch);
    let ops = CudaOps::over(Rehearsal::arenas(&device), activations);
    let checkpoint = hollow(&truncated(config, n_layers, false))?;
    let options = LoadOptions { mtp: false };
    let model = Transformer::load(ops, &checkpoint, Rank::solo(), options, &mut |_| {})?;
    let (kv, index_keys) = CacheSpec::formats_for(model.ops().numerics());
    let context = 1024;
    let n_blocks = context / BLOCK_TOKENS;
    let spec = CacheSpec {
        layers: model.cache_layers().to_vec(),
        n_slots: 1,
        n_blocks,
        n_snapshots: 0,
        spare_rows: 0,
        draft_width: 0,
        kv,
        index_keys,
    };
    let mut cache = model.new_cache(&spec)?;
    let blocks: Vec<u32> = (0..n_blocks as u32).collect();
    let mut batch = Batch::default();
    batch.push(0, context as u32 - 1, &[0], &blocks, true);
    let step = model.ops().prepare_step(&batch)?;
    let mut recorded = |layers: &[usize]| -> Result<Vec<Noted>> {
        device.begin_record()?;
        model.run_layers(layers, &step, &mut cache, &Solo)?;
        device.end_record()?;
        Ok(device.recorded())
    };
    let mut stages = Vec::new();
    for kind in [LayerKind::Csa, LayerKind::Hca, LayerKind::Window] {
        let Some(layer) = (0..n_layers).rev().find(|&layer| kinds[layer] == kind) else { continue };
        // A layer among others: what a second one of its kind adds, after its own beginning.
        let once = recorded(&[layer])?;
        let twice = recorded(&[layer, layer])?;
        let kernels = |noted: &[Noted]| {
            let kernel = |one: &Noted| match one {
                Noted::Launch(kernel) => Some(*kernel),
                _ => None,
            };
            noted.iter().filter_map(kernel).collect::<Vec<_>>()
        };
        let level = if overlap::is_possible(arch) { Level::Runs } else { Level::Off };
        let overlapping = |noted: &[Noted]| Noted::n_overlapping(noted, level);
        let (first, both) = (kernels(&once), kernels(&twice));
        let begin = first.len() - 1;
        stages.push(Layer {
            kind,
            kernels: both[begin..begin + both.len() - first.len()].to_vec(),
            n_dependent: Noted::n_dependent(&twice) - Noted::n_dependent(&once),
            n_overlapping: overlapping(&twice) - overlapping(&once),
        });
    }
    Ok(Stages(stages))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(arch: &'static str, activations: Activations) -> Vec<Layer> {
        let flash = super::super::shape::model("flash").unwrap();
        per_layer(&flash, (arch, activations)).unwrap().0
    }

    /// Dependent launches, all, and those that may overlap, by kind.
    fn counts(
        arch: &'static str,
        activations: Activations,
    ) -> Vec<(LayerKind, usize, usize, usize)> {
        let count = |layer: &Layer| {
            (layer.kind, layer.n_dependent, layer.kernels.len(), layer.n_overlapping)
        };
        stages(arch, activations).iter().map(count).collect()
    }

    /// Every launch less is a line of `benches/NOTES.md`; one more needs a reason.
    #[test]
    fn a_layer_of_flash_makes_as_many_launches_as_the_notes_say() {
        use Activations::{Bf16, Fp8Grid};
        type Counts = (usize, usize, usize);
        let expected = |csa: Counts, hca: Counts, window: Counts| {
            vec![
                (LayerKind::Csa, csa.0, csa.1, csa.2),
                (LayerKind::Hca, hca.0, hca.1, hca.2),
                (LayerKind::Window, window.0, window.1, window.2),
            ]
        };
        assert_eq!(counts("sm_90a", Fp8Grid), expected((12, 17, 9), (10, 15, 7), (10, 14, 7)));
        // sm_80 and sm_89 have no launches that overlap. A100's inputs of FP8 layers stay bf16.
        let old = || expected((12, 16, 0), (10, 14, 0), (10, 13, 0));
        assert_eq!(counts("sm_80", Bf16), old());
        assert_eq!(counts("sm_80", Fp8Grid), old());
        assert_eq!(counts("sm_89", Fp8Grid), old());
        assert_eq!(counts("sm_120", Fp8Grid), expected((12, 16, 8), (10, 14, 6), (10, 13, 6)));
        assert_eq!(counts("sm_100f", Fp8Grid), expected((12, 16, 8), (10, 14, 6), (10, 13, 6)));
    }
}
