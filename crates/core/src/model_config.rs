//! What a checkpoint's `config.json` means, after every check.
//!
//! Field names follow `config.json`; see `weights::config` for the parser, the alternative
//! spellings and the refusals. Values a kernel may specialise on are constants here.

/// Channels of one attention head, of one KV row and of one compressed entry.
pub const HEAD_DIM: usize = 512;
/// Trailing channels of a head that carry the rotary embedding.
pub const ROPE_DIM: usize = 64;
/// Leading channels of a head without rotary embedding; quantised to FP8 in the cache.
pub const NOPE_DIM: usize = HEAD_DIM - ROPE_DIM;
/// Channels of one index head and of one indexer key.
pub const INDEX_HEAD_DIM: usize = 128;
/// Positions a window layer sees, the token itself included.
pub const WINDOW: usize = 128;
/// Copies of the residual stream.
pub const HC_MULT: usize = 4;
/// Values that one hyper-connection site mixes per token: pre, post and comb.
pub const HC_MIX: usize = (2 + HC_MULT) * HC_MULT;

/// Which compressed entries a layer attends to beside its window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Ratio 0: the window alone.
    Window,
    /// Ratio 4: overlapping groups of 4 tokens, the best of them chosen by an indexer (CSA).
    Csa,
    /// Ratio 128: groups of 128 tokens, all of them visible (HCA).
    Hca,
}

impl LayerKind {
    /// The kind written as `ratio` in `compress_ratios`.
    #[must_use]
    pub const fn from_ratio(ratio: u64) -> Option<Self> {
        match ratio {
            0 => Some(Self::Window),
            4 => Some(Self::Csa),
            128 => Some(Self::Hca),
            _ => None,
        }
    }

    /// Tokens per compressed entry; 0 without compression.
    #[must_use]
    pub const fn ratio(self) -> usize {
        match self {
            Self::Window => 0,
            Self::Csa => 4,
            Self::Hca => 128,
        }
    }

    /// Width of the compressor's projections in units of the entry width: 2 where groups overlap.
    #[must_use]
    pub const fn compressor_width(self) -> usize {
        match self {
            Self::Window => 0,
            Self::Csa => 2,
            Self::Hca => 1,
        }
    }

    /// Compressed entries that exist once `n_tokens` tokens are processed.
    #[must_use]
    pub const fn n_entries(self, n_tokens: usize) -> usize {
        match self {
            Self::Window => 0,
            Self::Csa => n_tokens / 4,
            Self::Hca => n_tokens / 128,
        }
    }

    /// Whether the layer has an indexer.
    #[must_use]
    pub const fn has_indexer(self) -> bool {
        matches!(self, Self::Csa)
    }
}

/// How a layer picks its routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouterKind {
    /// By token id, through the table `tid2eid`.
    Hash,
    /// By score, with a bias that only affects the choice.
    Score,
}

/// Format of the routed experts' weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertFormat {
    /// Two E2M1 codes per byte, one E8M0 scale per 32 inputs of a row (the releases).
    Fp4,
    /// E4M3 with one scale per 128x128 block (the -Base checkpoints).
    Fp8,
}

/// YaRN scaling of the rotary frequencies; applies to layers with compression only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnConfig {
    /// Context extension factor.
    pub factor: f64,
    /// Context length before extension.
    pub original_max_position_embeddings: u32,
    /// Rotations above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f64,
}

/// A DeepSeek-V4 model's dimensions, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// V: vocabulary size.
    pub vocab_size: usize,
    /// D: width of one residual stream.
    pub hidden_size: usize,
    /// L: main layers.
    pub num_hidden_layers: usize,
    /// MTP blocks that are loaded: 0 or 1.
    pub num_nextn_predict_layers: usize,
    /// H: attention heads.
    pub num_attention_heads: usize,
    /// Q: rank of the query projection.
    pub q_lora_rank: usize,
    /// G: groups of the output projection.
    pub o_groups: usize,
    /// R: rank of the output projection per group.
    pub o_lora_rank: usize,
    /// Kind of each layer; one entry per main layer, then one per MTP block.
    pub layer_kinds: Vec<LayerKind>,
    /// Rotary base of layers without compression.
    pub rope_theta: f64,
    /// Rotary base of layers with compression.
    pub compress_rope_theta: f64,
    /// YaRN parameters of layers with compression.
    pub yarn: YarnConfig,
    /// Index heads of a ratio-4 layer.
    pub index_n_heads: usize,
    /// Compressed entries a ratio-4 layer attends to at most.
    pub index_topk: usize,
    /// E: routed experts per layer.
    pub n_routed_experts: usize,
    /// k: routed experts per token.
    pub num_experts_per_tok: usize,
    /// I: intermediate width of routed and shared experts.
    pub moe_intermediate_size: usize,
    /// Leading main layers that route by token id.
    pub num_hash_layers: usize,
    /// Factor on the normalised routing weights.
    pub routed_scaling_factor: f32,
    /// Clamp inside SwiGLU; `None` for no clamp.
    pub swiglu_limit: Option<f32>,
    /// Row and column passes of Sinkhorn normalisation.
    pub hc_sinkhorn_iters: u32,
    /// Keeps hyper-connection sums away from zero.
    pub hc_eps: f32,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Format of the routed experts.
    pub expert_format: ExpertFormat,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
    /// Token that begins every prompt.
    pub bos_token_id: u32,
    /// Token that ends every answer.
    pub eos_token_id: u32,
}

impl ModelConfig {
    /// Kind of main layer `layer`, or of MTP block `layer - L`.
    #[must_use]
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.layer_kinds[layer]
    }

    /// How layer `layer` routes; MTP blocks (`layer >= L`) route by score.
    #[must_use]
    pub const fn router_kind(&self, layer: usize) -> RouterKind {
        if layer < self.num_hash_layers { RouterKind::Hash } else { RouterKind::Score }
    }

    /// Layers with weights and a window cache: main layers, then MTP blocks.
    #[must_use]
    pub const fn n_blocks(&self) -> usize {
        self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// Width of all attention heads together: `H * 512`.
    #[must_use]
    pub const fn attention_width(&self) -> usize {
        self.num_attention_heads * HEAD_DIM
    }
}
