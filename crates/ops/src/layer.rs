//! The weights of one layer as operators receive them.
//!
//! Field names are the checkpoint's. A backend chooses how it stores a matrix
//! ([`Backend::Linear`]) or a layer's experts ([`Backend::Experts`]) when they are loaded, so it
//! may concatenate or repack as its kernels like.

use fathom_core::{LayerKind, parallel::ExpertShard};

use crate::traits::Backend;

/// One hyper-connection site (attention or FFN): `hc_{attn,ffn}_{fn,base,scale}`.
#[derive(Debug, Clone)]
pub struct HcSite<B: Backend> {
    /// `[24, 4 * D]` f32.
    pub function: B::Linear,
    /// `[24]`.
    pub base: B::Vector,
    /// `[3]`: factors of pre, post and comb.
    pub scale: B::Vector,
    /// Column passes of the Sinkhorn normalisation.
    pub sinkhorn_iters: u32,
    /// Keeps sums away from zero.
    pub hc_eps: f32,
    /// Epsilon of the norm inside the site.
    pub norm_eps: f32,
}

/// The collapse of the copies before a head: `hc_head_{fn,base,scale}`.
#[derive(Debug, Clone)]
pub struct HcHead<B: Backend> {
    /// `[4, 4 * D]` f32.
    pub function: B::Linear,
    /// `[4]`.
    pub base: B::Vector,
    /// `[1]`.
    pub scale: B::Vector,
    /// Added to every mixing weight.
    pub hc_eps: f32,
    /// Epsilon of the norm inside.
    pub norm_eps: f32,
}

/// An RMS norm's weight with its epsilon.
#[derive(Debug, Clone)]
pub struct Norm<B: Backend> {
    /// One factor per channel.
    pub weight: B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

/// Attention of one layer on one rank (heads and groups are this rank's).
#[derive(Debug, Clone)]
pub struct AttentionWeights<B: Backend> {
    /// Which compressed entries the layer sees.
    pub kind: LayerKind,
    /// Heads on this rank.
    pub n_heads: usize,
    /// Output groups on this rank.
    pub n_groups: usize,
    /// `[Q, D]`.
    pub wq_a: B::Linear,
    /// `[Q]`.
    pub q_norm: Norm<B>,
    /// `[n_heads * 512, Q]`.
    pub wq_b: B::Linear,
    /// `[512, D]`.
    pub wkv: B::Linear,
    /// `[512]`.
    pub kv_norm: Norm<B>,
    /// `[n_groups * R, H * 512 / G]`; used unquantised on its input.
    pub wo_a: B::Linear,
    /// `[D, n_groups * R]`; a partial sum on each TP rank.
    pub wo_b: B::Linear,
    /// `[n_heads]`.
    pub attn_sink: B::Vector,
    /// `[32]` rotary frequencies of this layer, in radians per position.
    pub rope: B::Vector,
    /// Present where `kind` compresses.
    pub compressor: Option<CompressorWeights<B>>,
    /// Present on ratio-4 layers.
    pub indexer: Option<IndexerWeights<B>>,
}

/// A compressor of entry width `c` (512 for attention, 128 for the indexer).
#[derive(Debug, Clone)]
pub struct CompressorWeights<B: Backend> {
    /// Width `c` of an entry.
    pub width: usize,
    /// `[coff * c, D]`; coff is 2 where groups overlap (ratio 4), else 1.
    pub wkv: B::Linear,
    /// `[coff * c, D]`.
    pub wgate: B::Linear,
    /// `[ratio * coff * c]`, row-major `[ratio, coff * c]`.
    pub ape: B::Vector,
    /// `[c]`.
    pub norm: Norm<B>,
}

/// The indexer of a ratio-4 layer; replicated on every TP rank.
#[derive(Debug, Clone)]
pub struct IndexerWeights<B: Backend> {
    /// Index heads.
    pub n_heads: usize,
    /// Entries to choose at most.
    pub top_k: usize,
    /// `[n_heads * 128, Q]`.
    pub wq_b: B::Linear,
    /// `[n_heads, D]` bf16.
    pub weights_proj: B::Linear,
    /// Compressor of the keys.
    pub compressor: CompressorWeights<B>,
}

/// How a layer picks experts.
#[derive(Debug, Clone)]
pub enum Router<B: Backend> {
    /// `tid2eid [V, k]`.
    Hash(B::ExpertTable),
    /// `gate.bias [E]`, for the choice only.
    Score(B::Vector),
}

/// A SwiGLU feed-forward network with FP8 weights.
#[derive(Debug, Clone)]
pub struct SharedExpert<B: Backend> {
    /// `[I, D]`, gate.
    pub w1: B::Linear,
    /// `[I, D]`, up.
    pub w3: B::Linear,
    /// `[D, I]`, down.
    pub w2: B::Linear,
    /// Whether this rank holds a slice of `I` (a partial sum) or the whole (replicated).
    pub is_slice: bool,
}

/// The mixture of experts of one layer on one rank.
#[derive(Debug, Clone)]
pub struct MoeWeights<B: Backend> {
    /// `[E, D]` bf16.
    pub gate: B::Linear,
    /// How experts are chosen.
    pub router: Router<B>,
    /// Routed experts on this rank.
    pub experts: B::Experts,
    /// Which experts and channels those are.
    pub shard: ExpertShard,
    /// Whether the channels are a slice of the intermediate width, so that outputs are partial.
    pub experts_are_slices: bool,
    /// The shared expert.
    pub shared: SharedExpert<B>,
    /// Experts per token.
    pub top_k: usize,
    /// Factor on the normalised weights.
    pub routed_scaling_factor: f32,
    /// Clamp inside SwiGLU.
    pub swiglu_limit: Option<f32>,
}

/// The input side of an MTP block: `enorm`, `hnorm`, `e_proj`, `h_proj`.
#[derive(Debug, Clone)]
pub struct MtpInputWeights<B: Backend> {
    /// Norm of the token embedding.
    pub enorm: Norm<B>,
    /// Norm of each hyper-connection copy.
    pub hnorm: Norm<B>,
    /// `[D, D]`.
    pub e_proj: B::Linear,
    /// `[D, D]`.
    pub h_proj: B::Linear,
}
