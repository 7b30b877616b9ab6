//! What `fathom inspect` tells: the model's facts, its layers, sizes by component, and what would
//! be refused and why.
//!
//! A report is made from a checkpoint, from a damaged one (as far as it can be read), or from
//! `config.json` alone, whose tensors are known exactly without any file. Bytes are those on disk
//! where the tensors are there, else those the config implies; for a sound checkpoint both agree.
//!
//! Not here: how it looks (`display`), how much memory serving takes.

mod display;
mod tensor_list;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use fathom_core::model_config::{HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, WINDOW};
use fathom_core::{ExpertFormat, LayerKind, ModelConfig, RouterKind};
use serde::Serialize;

use crate::checkpoint::{Checkpoint, examine, read_config};
use crate::config::{ParsedConfig, release_name};
use crate::dtype::StoredDtype;
use crate::error::LoadError;
use crate::expected::{Component, Place, TensorPattern, Variant, places, visit_tensors};
use crate::files::Files;

pub use tensor_list::tensor_list;

/// Everything `fathom inspect` knows about a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct InspectReport {
    /// Where the checkpoint lies.
    pub source: String,
    /// Whether `fathom serve` would load it (with its weights, where they are not there yet).
    pub accepted: bool,
    /// Why it would be refused; empty when accepted.
    pub refused: Vec<String>,
    /// What was assumed, ignored or repaired.
    pub notices: Vec<String>,
    /// Facts from `config.json`; `None` where it is refused.
    pub model: Option<ModelFacts>,
    /// What lies on disk; `None` without weights.
    pub weights: Option<WeightFacts>,
    /// Main layers, then MTP blocks.
    pub layers: Vec<LayerRow>,
    /// Sizes of the main model by component.
    pub components: Vec<ComponentRow>,
    /// Sums.
    pub totals: Totals,
    /// Tensors and bytes by stored format, MTP blocks included.
    pub dtypes: Vec<DtypeRow>,
}

/// A model's dimensions, as the card shows them.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "named as in config.json")]
pub struct ModelFacts {
    /// The published model of these dimensions, where it is one.
    pub release: Option<&'static str>,
    pub num_hidden_layers: usize,
    pub num_nextn_predict_layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub num_attention_heads: usize,
    pub head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub q_lora_rank: usize,
    pub o_groups: usize,
    pub o_lora_rank: usize,
    pub sliding_window: usize,
    pub index_n_heads: usize,
    pub index_head_dim: usize,
    pub index_topk: usize,
    pub n_routed_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_shared_experts: usize,
    pub moe_intermediate_size: usize,
    pub num_hash_layers: usize,
    pub routed_scaling_factor: f32,
    pub swiglu_limit: Option<f32>,
    pub hc_mult: usize,
    pub hc_sinkhorn_iters: u32,
    /// `fp4` or `fp8`.
    pub expert_dtype: &'static str,
    pub rope_theta: f64,
    pub compress_rope_theta: f64,
    pub yarn_factor: f64,
    pub original_max_position_embeddings: u32,
    pub bos_token_id: u32,
    pub eos_token_id: u32,
}

/// What lies on disk.
#[derive(Debug, Clone, Serialize)]
pub struct WeightFacts {
    /// Files with tensors.
    pub n_shards: usize,
    /// Tensors that are loaded.
    pub n_tensors: usize,
    /// Bytes of all tensors, ignored ones included.
    pub n_bytes: u64,
    /// Whether every value was read and checked.
    pub verified: bool,
}

/// One layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerRow {
    /// `0`, `1`, ... or `mtp 0`.
    pub layer: String,
    /// `window`, `CSA` or `HCA`.
    pub kind: &'static str,
    /// Tokens per compressed entry, 0 without compression.
    pub ratio: usize,
    /// `hash` or `score`.
    pub routing: &'static str,
    /// Bytes of all its tensors.
    pub bytes: u64,
    /// Bytes of its routed experts.
    pub routed_bytes: u64,
}

/// One component of the main model.
#[derive(Debug, Clone, Serialize)]
pub struct ComponentRow {
    /// Name of the component.
    pub component: &'static str,
    /// Bytes, scales included.
    pub bytes: u64,
    /// Parameters; scales and expert ids are none.
    pub params: u64,
}

/// Sums over components.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Tensors, MTP blocks included.
    pub n_tensors: u64,
    /// Bytes of the main model.
    pub main_bytes: u64,
    /// Parameters of the main model.
    pub main_params: u64,
    /// Bytes of the MTP blocks.
    pub mtp_bytes: u64,
    /// Parameters of the MTP blocks.
    pub mtp_params: u64,
    /// Bytes of everything.
    pub bytes: u64,
    /// Parameters of everything.
    pub params: u64,
    /// Parameters of the main model that one token uses: all but the embedding table, and
    /// `num_experts_per_tok` routed experts per layer.
    pub active_params: u64,
    /// Bytes of one routed expert of one layer.
    pub expert_bytes: u64,
}

/// One stored format.
#[derive(Debug, Clone, Serialize)]
pub struct DtypeRow {
    /// The safetensors name.
    pub dtype: &'static str,
    /// How many tensors have it.
    pub n_tensors: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl InspectReport {
    /// Looks at the directory `dir`; with `verify`, reads every value of a sound checkpoint.
    ///
    /// # Errors
    /// [`LoadError`] only where there is nothing to report on: no directory, no `config.json`.
    /// Whatever else is wrong is in [`InspectReport::refused`].
    pub fn of_dir(dir: &Path, verify: bool) -> Result<Self, LoadError> {
        let files = Files::dir(dir)?;
        let source = dir.display().to_string();
        let parsed = match read_config(&files) {
            Ok(parsed) => parsed,
            Err(error @ LoadError::Config { .. }) => return Ok(Self::refusal(source, &error)),
            Err(error) => return Err(error),
        };
        match examine(files) {
            Ok(examined) => {
                let mut report = Self::of_checkpoint(&examined.checkpoint, source);
                report.refuse(examined.problems.iter());
                if verify && report.accepted {
                    report.refuse(examined.checkpoint.verify().err().iter());
                    if let Some(weights) = &mut report.weights {
                        weights.verified = true;
                    }
                }
                Ok(report)
            }
            Err(error) => {
                let mut report = Self::of_config(&parsed, source);
                if !matches!(error, LoadError::NoWeights { .. }) {
                    report.refuse(std::iter::once(&error));
                }
                Ok(report)
            }
        }
    }

    /// The report of a config without weights.
    #[must_use]
    pub fn of_config(parsed: &ParsedConfig, source: String) -> Self {
        let config = &parsed.config;
        let variant = Variant::of(config);
        let mut tally = Tally::default();
        for place in places(config) {
            for pattern in crate::expected::patterns_of(config, variant, place) {
                let n = pattern.count as u64;
                tally.add(place, &pattern, n, pattern.dtype, pattern.bytes(), pattern.params());
            }
        }
        tally.report(parsed, source, None)
    }

    /// The report of an opened checkpoint.
    #[must_use]
    pub fn of_checkpoint(checkpoint: &Checkpoint, source: String) -> Self {
        let parsed = checkpoint.parsed_config();
        let config = &parsed.config;
        let mut tally = Tally::default();
        visit_tensors(config, Variant::of(config), |place, pattern, name| {
            if let Some((dtype, bytes)) = checkpoint.stored(name) {
                let params = pattern.params() / pattern.count as u64;
                tally.add(place, pattern, 1, dtype, bytes, params);
            }
            ControlFlow::Continue(())
        });
        let weights = WeightFacts {
            n_shards: checkpoint.n_shards(),
            n_tensors: checkpoint.n_tensors(),
            n_bytes: checkpoint.n_bytes(),
            verified: false,
        };
        tally.report(parsed, source, Some(weights))
    }

    /// The report of a config that is refused.
    fn refusal(source: String, error: &LoadError) -> Self {
        let mut report = Self {
            source,
            accepted: true,
            refused: Vec::new(),
            notices: Vec::new(),
            model: None,
            weights: None,
            layers: Vec::new(),
            components: Vec::new(),
            totals: Totals::default(),
            dtypes: Vec::new(),
        };
        report.refuse(std::iter::once(error));
        report
    }

    fn refuse<'a>(&mut self, errors: impl Iterator<Item = &'a LoadError>) {
        self.refused.extend(errors.map(with_causes));
        self.accepted = self.refused.is_empty();
    }
}

/// An error with its causes, on one line.
fn with_causes(error: &LoadError) -> String {
    let mut out = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        out.push_str(": ");
        out.push_str(&inner.to_string());
        cause = inner.source();
    }
    out
}

/// Sums while the tensors go by.
#[derive(Default)]
struct Tally {
    /// Bytes, and those of routed experts, per layer.
    layers: BTreeMap<Place, (u64, u64)>,
    /// Bytes and parameters per component of the main model.
    components: BTreeMap<Component, (u64, u64)>,
    /// Tensors and bytes per format.
    dtypes: BTreeMap<StoredDtype, (u64, u64)>,
    totals: Totals,
}

impl Tally {
    fn add(
        &mut self,
        place: Place,
        pattern: &TensorPattern,
        n_tensors: u64,
        dtype: StoredDtype,
        bytes: u64,
        params: u64,
    ) {
        let layer = self.layers.entry(place).or_default();
        layer.0 += bytes;
        if pattern.component == Component::RoutedExperts {
            layer.1 += bytes;
        }
        let format = self.dtypes.entry(dtype).or_default();
        format.0 += n_tensors;
        format.1 += bytes;
        let totals = &mut self.totals;
        totals.n_tensors += n_tensors;
        totals.bytes += bytes;
        totals.params += params;
        if matches!(place, Place::Mtp(_)) {
            totals.mtp_bytes += bytes;
            totals.mtp_params += params;
        } else {
            totals.main_bytes += bytes;
            totals.main_params += params;
            let component = self.components.entry(pattern.component).or_default();
            component.0 += bytes;
            component.1 += params;
        }
    }

    fn report(
        self,
        parsed: &ParsedConfig,
        source: String,
        weights: Option<WeightFacts>,
    ) -> InspectReport {
        let config = &parsed.config;
        let params = |component| self.components.get(&component).map_or(0, |(_, params)| *params);
        let n_experts = config.n_routed_experts as u64;
        let routed = params(Component::RoutedExperts);
        let active_routed = routed / n_experts * config.num_experts_per_tok as u64;
        let resident = self.totals.main_params - params(Component::Embed) - routed;
        let first = self.layers.get(&Place::Layer(0)).map_or(0, |(_, routed)| *routed);
        let totals = Totals {
            active_params: resident + active_routed,
            expert_bytes: first / n_experts,
            ..self.totals
        };
        let layers = self
            .layers
            .iter()
            .filter_map(|(place, (bytes, routed_bytes))| {
                let (layer, id) = match *place {
                    Place::Top => return None,
                    Place::Layer(l) => (l.to_string(), l),
                    Place::Mtp(i) => (format!("mtp {i}"), config.num_hidden_layers + i),
                };
                let kind = config.layer_kind(id);
                Some(LayerRow {
                    layer,
                    kind: kind_name(kind),
                    ratio: kind.ratio(),
                    routing: match config.router_kind(id) {
                        RouterKind::Hash => "hash",
                        RouterKind::Score => "score",
                    },
                    bytes: *bytes,
                    routed_bytes: *routed_bytes,
                })
            })
            .collect();
        let component = |(component, (bytes, params)): (&Component, &(u64, u64))| ComponentRow {
            component: component.name(),
            bytes: *bytes,
            params: *params,
        };
        let dtype = |(dtype, (n_tensors, bytes)): (&StoredDtype, &(u64, u64))| DtypeRow {
            dtype: dtype.name(),
            n_tensors: *n_tensors,
            bytes: *bytes,
        };
        InspectReport {
            source,
            accepted: true,
            refused: Vec::new(),
            notices: parsed.notices.clone(),
            model: Some(facts(config)),
            weights,
            layers,
            components: self.components.iter().map(component).collect(),
            totals,
            dtypes: self.dtypes.iter().map(dtype).collect(),
        }
    }
}

const fn kind_name(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Window => "window",
        LayerKind::Csa => "CSA",
        LayerKind::Hca => "HCA",
    }
}

fn facts(config: &ModelConfig) -> ModelFacts {
    ModelFacts {
        release: release_name(config),
        num_hidden_layers: config.num_hidden_layers,
        num_nextn_predict_layers: config.num_nextn_predict_layers,
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        num_attention_heads: config.num_attention_heads,
        head_dim: HEAD_DIM,
        qk_rope_head_dim: ROPE_DIM,
        q_lora_rank: config.q_lora_rank,
        o_groups: config.o_groups,
        o_lora_rank: config.o_lora_rank,
        sliding_window: WINDOW,
        index_n_heads: config.index_n_heads,
        index_head_dim: INDEX_HEAD_DIM,
        index_topk: config.index_topk,
        n_routed_experts: config.n_routed_experts,
        num_experts_per_tok: config.num_experts_per_tok,
        n_shared_experts: 1,
        moe_intermediate_size: config.moe_intermediate_size,
        num_hash_layers: config.num_hash_layers,
        routed_scaling_factor: config.routed_scaling_factor,
        swiglu_limit: config.swiglu_limit,
        hc_mult: HC_MULT,
        hc_sinkhorn_iters: config.hc_sinkhorn_iters,
        expert_dtype: match config.expert_format {
            ExpertFormat::Fp4 => "fp4",
            ExpertFormat::Fp8 => "fp8",
        },
        rope_theta: config.rope_theta,
        compress_rope_theta: config.compress_rope_theta,
        yarn_factor: config.yarn.factor,
        original_max_position_embeddings: config.yarn.original_max_position_embeddings,
        bos_token_id: config.bos_token_id,
        eos_token_id: config.eos_token_id,
    }
}
