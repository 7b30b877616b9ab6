//! Every tensor a checkpoint of a given config has: name, format, shape, and what it is for.
//!
//! The enumeration is exact: for the published configs it gives the published tensor counts, bytes
//! and format counts, so a loader may demand equality. It is made of [`TensorPattern`]s, where one
//! pattern stands for the same tensor of all routed experts of a layer: totals over the patterns
//! cost nothing, however many experts a config claims.
//!
//! Source: section 4 of the checkpoint specification (names and shapes of the published headers).
//!
//! Not here: comparing with what is on disk (`check`).

use std::fmt::{self, Write as _};
use std::ops::ControlFlow;

use fathom_core::model_config::{HC_MIX, HC_MULT, HEAD_DIM, INDEX_HEAD_DIM};
use fathom_core::{ExpertFormat, LayerKind, ModelConfig, RouterKind};

use crate::dtype::{StoredDtype, byte_len};

/// Rows and columns of an FP8 scale's block.
pub const FP8_BLOCK: usize = 128;
/// Inputs of a row that share an FP4 scale.
pub const FP4_GROUP: usize = 32;

/// Which of the two families of files a checkpoint belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// The releases: E8M0 scales everywhere, no copies of the embeddings in MTP blocks.
    Release,
    /// The -Base checkpoints: F32 scales of FP8 weights, embedding and head repeated per MTP block.
    Base,
}

impl Variant {
    /// The variant whose experts have the config's format.
    #[must_use]
    pub const fn of(config: &ModelConfig) -> Self {
        match config.expert_format {
            ExpertFormat::Fp4 => Self::Release,
            ExpertFormat::Fp8 => Self::Base,
        }
    }
}

/// The part of the model a tensor belongs to, as the size tables list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Component {
    /// `embed.weight`.
    Embed,
    /// `head.weight`.
    LmHead,
    /// Query, key-value and output projections with their norms and the sinks.
    Attention,
    /// Compressors of the attention layers.
    Compressor,
    /// Indexers with their own compressors.
    Indexer,
    /// Hyper-connection mixes, of the head too.
    HyperConnection,
    /// Router weights and biases.
    Gate,
    /// Expert ids per token of hash-routed layers.
    Tid2eid,
    /// Shared experts.
    SharedExperts,
    /// Norms of the residual stream.
    Norms,
    /// Routed experts.
    RoutedExperts,
    /// Projections that join the MTP block's two inputs.
    MtpProjection,
    /// Copies of embedding and head in MTP blocks of -Base checkpoints, never read.
    Duplicate,
}

impl Component {
    /// Every component, in the order of the tables.
    pub const ALL: [Self; 13] = [
        Self::Embed,
        Self::LmHead,
        Self::Attention,
        Self::Compressor,
        Self::Indexer,
        Self::HyperConnection,
        Self::Gate,
        Self::Tid2eid,
        Self::SharedExperts,
        Self::Norms,
        Self::RoutedExperts,
        Self::MtpProjection,
        Self::Duplicate,
    ];

    /// The name used in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::LmHead => "lm_head",
            Self::Attention => "attention core",
            Self::Compressor => "compressors",
            Self::Indexer => "indexers",
            Self::HyperConnection => "hyper-connections",
            Self::Gate => "router gates",
            Self::Tid2eid => "tid2eid",
            Self::SharedExperts => "shared experts",
            Self::Norms => "norms",
            Self::RoutedExperts => "routed experts",
            Self::MtpProjection => "mtp projections",
            Self::Duplicate => "mtp duplicates",
        }
    }
}

/// Where in the model a tensor sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Outside all blocks.
    Top,
    /// Main layer `l`: names begin with `layers.{l}.`.
    Layer(usize),
    /// MTP block `i`: names begin with `mtp.{i}.`.
    Mtp(usize),
}

impl Place {
    /// What the names of this place begin with.
    #[must_use]
    pub fn prefix(self) -> String {
        match self {
            Self::Top => String::new(),
            Self::Layer(l) => format!("layers.{l}."),
            Self::Mtp(i) => format!("mtp.{i}."),
        }
    }
}

/// One tensor that must be in the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// The release's name.
    pub name: String,
    /// Format; a scale of FP8 weights may be E8M0 or F32, whatever stands here.
    pub dtype: StoredDtype,
    /// Stored shape: for packed FP4 the last axis counts bytes.
    pub shape: Vec<usize>,
    /// What it is for.
    pub component: Component,
    /// Where it sits.
    pub place: Place,
    /// Whether it scales FP8 weights, and so may be E8M0 or F32.
    pub is_fp8_scale: bool,
}

/// The same tensor of one place: once, or once per routed expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPattern {
    /// Name after the place's prefix; `{e}` stands for the routed expert.
    pub name: String,
    /// Format.
    pub dtype: StoredDtype,
    /// Stored shape.
    pub shape: Vec<usize>,
    /// What it is for.
    pub component: Component,
    /// How many tensors the pattern stands for.
    pub count: usize,
    /// Whether it scales FP8 weights.
    pub is_fp8_scale: bool,
}

impl TensorPattern {
    /// Whether the loader takes these tensors in format `dtype`.
    #[must_use]
    pub fn accepts(&self, dtype: StoredDtype) -> bool {
        let either = [StoredDtype::F8E8M0, StoredDtype::F32];
        dtype == self.dtype || (self.is_fp8_scale && either.contains(&dtype))
    }

    /// Bytes of all tensors of the pattern.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let one = byte_len(self.dtype, &self.shape).expect("ModelConfig bounds every product");
        one * self.count as u64
    }

    /// Model parameters in all tensors of the pattern; scales and expert ids are none.
    #[must_use]
    pub fn params(&self) -> u64 {
        let elements = self.shape.iter().map(|&n| n as u64).product::<u64>() * self.count as u64;
        let is_scale = self.name.ends_with(".scale");
        match self.dtype {
            StoredDtype::I8 => 2 * elements,
            StoredDtype::F8E8M0 | StoredDtype::I64 => 0,
            _ if is_scale || self.component == Component::Duplicate => 0,
            _ => elements,
        }
    }
}

impl fmt::Display for TensorPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<42} {:<7} {:?}", self.name, self.dtype, self.shape)
    }
}

/// Collects the patterns of one place.
struct Patterns {
    list: Vec<TensorPattern>,
    variant: Variant,
    component: Component,
}

impl Patterns {
    fn push(&mut self, name: &str, dtype: StoredDtype, shape: &[usize]) {
        self.list.push(TensorPattern {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            component: self.component,
            count: 1,
            is_fp8_scale: false,
        });
    }

    fn bf16(&mut self, name: &str, shape: &[usize]) {
        self.push(name, StoredDtype::BF16, shape);
    }

    fn f32(&mut self, name: &str, shape: &[usize]) {
        self.push(name, StoredDtype::F32, shape);
    }

    /// An FP8 weight [out, inputs] and its scale, one per 128x128 block.
    fn fp8_pair(&mut self, name: &str, out: usize, inputs: usize) {
        let scale = match self.variant {
            Variant::Release => StoredDtype::F8E8M0,
            Variant::Base => StoredDtype::F32,
        };
        self.push(&format!("{name}.weight"), StoredDtype::F8E4M3, &[out, inputs]);
        let blocks = [out.div_ceil(FP8_BLOCK), inputs.div_ceil(FP8_BLOCK)];
        self.push(&format!("{name}.scale"), scale, &blocks);
        self.list.last_mut().expect("just pushed").is_fp8_scale = true;
    }

    /// A routed expert's weight [out, inputs] and its scale, for all experts.
    fn expert_pair(&mut self, name: &str, out: usize, inputs: usize, config: &ModelConfig) {
        let before = self.list.len();
        match config.expert_format {
            ExpertFormat::Fp8 => self.fp8_pair(name, out, inputs),
            ExpertFormat::Fp4 => {
                self.push(&format!("{name}.weight"), StoredDtype::I8, &[out, inputs / 2]);
                let groups = [out, inputs / FP4_GROUP];
                self.push(&format!("{name}.scale"), StoredDtype::F8E8M0, &groups);
            }
        }
        for pattern in &mut self.list[before..] {
            pattern.count = config.n_routed_experts;
        }
    }

    /// The compressor of `kind` under `name`, with entries of `width` channels.
    fn compressor(&mut self, name: &str, kind: LayerKind, width: usize, hidden: usize) {
        let columns = kind.compressor_width() * width;
        self.f32(&format!("{name}.ape"), &[kind.ratio(), columns]);
        self.bf16(&format!("{name}.wkv.weight"), &[columns, hidden]);
        self.bf16(&format!("{name}.wgate.weight"), &[columns, hidden]);
        self.bf16(&format!("{name}.norm.weight"), &[width]);
    }
}

/// The tensors of one place of a model.
#[must_use]
pub fn patterns_of(config: &ModelConfig, variant: Variant, place: Place) -> Vec<TensorPattern> {
    let mut p = Patterns { list: Vec::new(), variant, component: Component::Embed };
    match place {
        Place::Top => top(&mut p, config),
        Place::Layer(l) => block(&mut p, config, l),
        Place::Mtp(i) => {
            block(&mut p, config, config.num_hidden_layers + i);
            mtp(&mut p, config);
        }
    }
    p.list
}

fn top(p: &mut Patterns, config: &ModelConfig) {
    let (v, d) = (config.vocab_size, config.hidden_size);
    p.bf16("embed.weight", &[v, d]);
    p.component = Component::LmHead;
    p.bf16("head.weight", &[v, d]);
    p.component = Component::Norms;
    p.bf16("norm.weight", &[d]);
    hc_head(p, d);
}

fn hc_head(p: &mut Patterns, d: usize) {
    p.component = Component::HyperConnection;
    p.f32("hc_head_fn", &[HC_MULT, HC_MULT * d]);
    p.f32("hc_head_base", &[HC_MULT]);
    p.f32("hc_head_scale", &[1]);
}

/// Main layer `l`, or MTP block `l - L`.
fn block(p: &mut Patterns, config: &ModelConfig, l: usize) {
    let d = config.hidden_size;
    p.component = Component::Norms;
    p.bf16("attn_norm.weight", &[d]);
    p.bf16("ffn_norm.weight", &[d]);
    p.component = Component::HyperConnection;
    for site in ["attn", "ffn"] {
        p.f32(&format!("hc_{site}_fn"), &[HC_MIX, HC_MULT * d]);
        p.f32(&format!("hc_{site}_base"), &[HC_MIX]);
        p.f32(&format!("hc_{site}_scale"), &[3]);
    }
    attention(p, config, config.layer_kind(l));
    ffn(p, config, config.router_kind(l));
}

fn attention(p: &mut Patterns, config: &ModelConfig, kind: LayerKind) {
    let (d, q, heads) = (config.hidden_size, config.q_lora_rank, config.num_attention_heads);
    let (groups, rank) = (config.o_groups, config.o_lora_rank);
    p.component = Component::Attention;
    p.fp8_pair("attn.wq_a", q, d);
    p.bf16("attn.q_norm.weight", &[q]);
    p.fp8_pair("attn.wq_b", HEAD_DIM * heads, q);
    p.fp8_pair("attn.wkv", HEAD_DIM, d);
    p.bf16("attn.kv_norm.weight", &[HEAD_DIM]);
    p.fp8_pair("attn.wo_a", groups * rank, HEAD_DIM * heads / groups);
    p.fp8_pair("attn.wo_b", d, groups * rank);
    p.f32("attn.attn_sink", &[heads]);
    if kind == LayerKind::Window {
        return;
    }
    p.component = Component::Compressor;
    p.compressor("attn.compressor", kind, HEAD_DIM, d);
    if kind.has_indexer() {
        p.component = Component::Indexer;
        p.fp8_pair("attn.indexer.wq_b", INDEX_HEAD_DIM * config.index_n_heads, q);
        p.bf16("attn.indexer.weights_proj.weight", &[config.index_n_heads, d]);
        p.compressor("attn.indexer.compressor", kind, INDEX_HEAD_DIM, d);
    }
}

fn ffn(p: &mut Patterns, config: &ModelConfig, router: RouterKind) {
    let (d, i) = (config.hidden_size, config.moe_intermediate_size);
    p.component = Component::Gate;
    p.bf16("ffn.gate.weight", &[config.n_routed_experts, d]);
    match router {
        RouterKind::Score => p.f32("ffn.gate.bias", &[config.n_routed_experts]),
        RouterKind::Hash => {
            p.component = Component::Tid2eid;
            let shape = [config.vocab_size, config.num_experts_per_tok];
            p.push("ffn.gate.tid2eid", StoredDtype::I64, &shape);
        }
    }
    p.component = Component::SharedExperts;
    p.fp8_pair("ffn.shared_experts.w1", i, d);
    p.fp8_pair("ffn.shared_experts.w2", d, i);
    p.fp8_pair("ffn.shared_experts.w3", i, d);
    p.component = Component::RoutedExperts;
    p.expert_pair("ffn.experts.{e}.w1", i, d, config);
    p.expert_pair("ffn.experts.{e}.w2", d, i, config);
    p.expert_pair("ffn.experts.{e}.w3", i, d, config);
}

/// What an MTP block has beyond a layer.
fn mtp(p: &mut Patterns, config: &ModelConfig) {
    let (v, d) = (config.vocab_size, config.hidden_size);
    p.component = Component::MtpProjection;
    p.fp8_pair("e_proj", d, d);
    p.fp8_pair("h_proj", d, d);
    p.component = Component::Norms;
    p.bf16("enorm.weight", &[d]);
    p.bf16("hnorm.weight", &[d]);
    p.bf16("norm.weight", &[d]);
    hc_head(p, d);
    if p.variant == Variant::Base {
        p.component = Component::Duplicate;
        p.bf16("emb.tok_emb.weight", &[v, d]);
        p.bf16("head.weight", &[v, d]);
    }
}

/// Every place of a model: outside, main layers, loaded MTP blocks.
pub fn places(config: &ModelConfig) -> impl Iterator<Item = Place> + use<> {
    let (layers, mtp) = (config.num_hidden_layers, config.num_nextn_predict_layers);
    std::iter::once(Place::Top).chain((0..layers).map(Place::Layer)).chain((0..mtp).map(Place::Mtp))
}

/// Calls `visit` with place, pattern and full name of every tensor of `config`, until it breaks.
///
/// Nothing is kept between calls, so a config that claims millions of tensors costs no memory.
pub(crate) fn visit_tensors(
    config: &ModelConfig,
    variant: Variant,
    mut visit: impl FnMut(Place, &TensorPattern, &str) -> ControlFlow<()>,
) {
    let mut name = String::new();
    for place in places(config) {
        let prefix = place.prefix();
        for pattern in patterns_of(config, variant, place) {
            let (head, tail) = pattern.name.split_once("{e}").unwrap_or((&pattern.name, ""));
            for e in 0..pattern.count {
                name.clear();
                name.push_str(&prefix);
                name.push_str(head);
                if head.len() < pattern.name.len() {
                    write!(name, "{e}").expect("writing to a String cannot fail");
                    name.push_str(tail);
                }
                if visit(place, &pattern, &name).is_break() {
                    return;
                }
            }
        }
    }
}

/// Every tensor of a checkpoint of `config`, place by place.
#[must_use]
pub fn expected_tensors(config: &ModelConfig, variant: Variant) -> Vec<ExpectedTensor> {
    let mut out = Vec::new();
    visit_tensors(config, variant, |place, pattern, name| {
        out.push(ExpectedTensor {
            name: name.to_owned(),
            dtype: pattern.dtype,
            shape: pattern.shape.clone(),
            component: pattern.component,
            place,
            is_fp8_scale: pattern.is_fp8_scale,
        });
        ControlFlow::Continue(())
    });
    out
}

/// How many tensors a checkpoint of `config` has; costs nothing, unlike listing them.
#[must_use]
pub fn expected_count(config: &ModelConfig, variant: Variant) -> u64 {
    places(config)
        .flat_map(|place| patterns_of(config, variant, place))
        .map(|pattern| pattern.count as u64)
        .sum()
}
