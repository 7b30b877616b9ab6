//! The operators, at the granularity of one fused device launch.
//!
//! Shapes: `T` rows of a batch, `D` hidden size, `H` heads on this rank, `Q` query rank. In mode
//! `bf16` every tensor between operators holds bf16 values except where "f32" is said.
//!
//! Each row's result depends on that row and its sequence's cache only, never on the other rows of
//! the batch: that is what makes batching, chunking and preemption invisible in the tokens.

mod moe;

use std::fmt::Debug;

use fathom_core::Numerics;

pub use self::moe::MoeOps;
use crate::layer::{AttentionWeights, HcHead, HcSite, MtpInputWeights, Norm};
use crate::sample::ChoiceOps;
use crate::{Batch, CacheSpec, Communicator, OpError, WeightSource};

/// What the inputs of FP8 and FP4 layers look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activations {
    /// On the FP8 grid of their blocks of 128, as the official code has them.
    Fp8Grid,
    /// Unquantised bf16: strictly more precise, and what a GPU without FP8 prefers.
    Bf16,
}

/// Weights that a device draws instead of reading a checkpoint's: for benches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawing {
    /// Other seeds, other values.
    pub seed: u32,
    /// Whether tables of expert ids favour experts by Zipf's law (exponent 1) instead of equally.
    pub zipf: bool,
}

/// Tensors that a pass leaves behind.
#[derive(Debug)]
pub struct PassOutput<T> {
    /// f32 logits `[n, V]` of the wanted rows, in their order; `None` if none were wanted.
    pub logits: Option<T>,
    /// The four copies `[T, 4 * D]` before the head, if asked for.
    pub copies: Option<T>,
}

/// Memory and types of one device.
pub trait Backend: Debug + Send + Sync + 'static {
    /// Activations, `[rows, cols]`.
    type Tensor: Debug + Clone + Send + Sync;
    /// A matrix prepared for products `y = W x`.
    type Linear: Debug + Clone + Send + Sync;
    /// The routed experts of one layer on this rank.
    type Experts: Debug + Clone + Send + Sync;
    /// A small f32 vector (norm weights, biases, sinks, frequencies).
    type Vector: Debug + Clone + Send + Sync;
    /// A table of expert ids per token id.
    type ExpertTable: Debug + Clone + Send + Sync;
    /// All cache stores of one rank.
    type Cache: Debug + Send;
    /// A batch as the device reads it.
    type Step: Debug + Send;
    /// Chosen experts and weights of each row.
    type Routing: Debug + Send;
    /// Chosen compressed entries of each row.
    type Selection: Debug + Send;

    /// The numeric mode this backend computes in.
    fn numerics(&self) -> Numerics;

    /// Whether what is loaded can be used. Only a rehearsal, which asks how much memory a model will
    /// take, says no; then nobody need read tensors to load them.
    fn keeps_values(&self) -> bool {
        true
    }

    /// How matrices are drawn that are not read, on a backend that does so; whoever loads a model
    /// draws vectors and tables to match.
    fn drawing(&self) -> Option<Drawing> {
        None
    }

    /// Runs `work`, which calls this backend's operators, where the backend computes: whoever runs
    /// a whole step inside gets there once instead of once per operator. `work` must not wait for
    /// another rank, which may need the same threads.
    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R
    where
        Self: Sized,
    {
        work()
    }

    /// Prepares a matrix.
    ///
    /// # Errors
    /// [`OpError::Weight`] if the backend cannot represent it.
    fn load_linear(&self, source: &WeightSource) -> Result<Self::Linear, OpError>;

    /// Prepares routed experts: `[w1, w3, w2]` of each expert of this rank, in id order. `n_total`
    /// is the number of experts over all ranks.
    ///
    /// # Errors
    /// [`OpError::Weight`] if the backend cannot represent one.
    fn load_experts(
        &self,
        experts: &[[WeightSource; 3]],
        first_id: usize,
        n_total: usize,
    ) -> Result<Self::Experts, OpError>;

    /// Uploads a vector.
    ///
    /// # Errors
    /// [`OpError`] if the device cannot hold it.
    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, OpError>;

    /// Uploads `tid2eid`, row-major `[V, k]`.
    ///
    /// # Errors
    /// [`OpError`] if the device cannot hold it.
    fn load_expert_table(&self, ids: &[u16], k: usize) -> Result<Self::ExpertTable, OpError>;

    /// Allocates all cache stores.
    ///
    /// # Errors
    /// [`OpError`] if the device cannot hold them.
    fn new_cache(&self, spec: &CacheSpec) -> Result<Self::Cache, OpError>;

    /// Uploads a batch's metadata, for [`run_pass`](Self::run_pass): tensors of the step may have more
    /// rows than the batch.
    ///
    /// # Errors
    /// [`OpError`] if the device cannot hold it.
    fn prepare_step(&self, batch: &Batch) -> Result<Self::Step, OpError>;

    /// The same for operators that are called one by one: tensors have a row per token.
    ///
    /// # Errors
    /// As [`prepare_step`](Self::prepare_step).
    fn prepare_exact_step(&self, batch: &Batch) -> Result<Self::Step, OpError> {
        self.prepare_step(batch)
    }

    /// [`prepare_step`](Self::prepare_step) for a pass that begins with `x [T, ..]` instead of
    /// embeddings: the step, and `x` with as many rows as tensors of the step have, where a pass over
    /// `cache` that is repeated finds it. It is the pass's until the next call.
    ///
    /// # Errors
    /// As [`prepare_step`](Self::prepare_step).
    fn prepare_step_over(
        &self,
        batch: &Batch,
        x: Self::Tensor,
        cache: &mut Self::Cache,
    ) -> Result<(Self::Step, Self::Tensor), OpError> {
        let _ = cache;
        Ok((self.prepare_exact_step(batch)?, x))
    }

    /// Whether operators after [`attn_store`](AttentionOps::attn_store) also take tensors with a row for
    /// each of [`Batch::logit_rows`] instead of each token: then nothing else of the last block is
    /// computed.
    fn takes_wanted_rows(&self) -> bool {
        false
    }

    /// Runs the operators of `side` and of `main`, neither of which uses what the other makes: at the
    /// same time where the backend can, else in this order.
    ///
    /// # Errors
    /// What either fails with, or the device.
    fn beside<A, B, E: From<OpError>>(
        &self,
        side: impl FnOnce() -> Result<A, E>,
        main: impl FnOnce() -> Result<B, E>,
    ) -> Result<(A, B), E>
    where
        Self: Sized,
    {
        Ok((side()?, main()?))
    }

    /// Runs `pass`, which calls operators over `step` and `cache` and nothing else, or does on the
    /// device what it did for an earlier step of the same shape. `name` tells the passes over one
    /// cache apart; one name always means the same operators over the same weights.
    ///
    /// # Errors
    /// What the pass fails with, or the device.
    fn run_pass<E: From<OpError>>(
        &self,
        name: &'static str,
        step: &Self::Step,
        cache: &mut Self::Cache,
        mut pass: impl FnMut(&mut Self::Cache) -> Result<PassOutput<Self::Tensor>, E>,
    ) -> Result<PassOutput<Self::Tensor>, E>
    where
        Self: Sized,
    {
        let _ = (name, step);
        pass(cache)
    }

    /// Numbers of one-token sequences and contexts ([`Batch::min_context`]) that a step should run with,
    /// in this order, before the first request comes, so that no request waits for what a device prepares
    /// once per shape.
    fn warm_up_steps(&self, n_slots: usize, max_context: usize) -> Vec<(usize, usize)> {
        let _ = (n_slots, max_context);
        vec![(1, 0)]
    }

    /// Uploads `[rows, cols]` values.
    ///
    /// # Errors
    /// [`OpError::Shape`] if `values` is not `rows * cols` long.
    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Self::Tensor, OpError>;

    /// Reads a tensor back, row-major.
    ///
    /// # Errors
    /// [`OpError`] if the device failed.
    fn download(&self, tensor: &Self::Tensor) -> Result<Vec<f32>, OpError>;

    /// Shape of a tensor.
    fn shape(&self, tensor: &Self::Tensor) -> (usize, usize);

    /// The rows of `tensor [T, ..]` whose logits `step` wants, in that order; `None` where that is
    /// all of them.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] naming the first row that does not exist.
    fn wanted_rows(
        &self,
        tensor: &Self::Tensor,
        step: &Self::Step,
    ) -> Result<Option<Self::Tensor>, OpError>;

    /// The rows `rows` of `tensor`, in that order.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] naming the first row that does not exist.
    fn select_rows(&self, tensor: &Self::Tensor, rows: &[u32]) -> Result<Self::Tensor, OpError>;

    /// Expert ids and weights of each row, row-major `[T, k]`, ids in the order chosen.
    ///
    /// # Errors
    /// [`OpError`] if the device failed.
    fn read_routing(&self, routing: &Self::Routing) -> Result<(Vec<u32>, Vec<f32>), OpError>;

    /// Entry numbers chosen for each row, ascending.
    ///
    /// # Errors
    /// [`OpError`] if the device failed.
    fn read_selection(&self, selection: &Self::Selection) -> Result<Vec<Vec<u32>>, OpError>;

    /// Keeps what `slot` needs to go on at `position`, a positive multiple of 128 that the slot has
    /// just reached, in snapshot `snapshot`. The slot's blocks are not part of it.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if slot or snapshot do not exist or the position is no such multiple.
    fn capture(
        &self,
        cache: &mut Self::Cache,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError>;

    /// The reverse of [`capture`](Self::capture), into any slot.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if slot or snapshot do not exist or the position is no multiple.
    fn restore(
        &self,
        cache: &mut Self::Cache,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError>;

    /// Bytes of block `block` over all layers, [`CacheSpec::block_bytes`] long: what a lower cache
    /// tier keeps.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if there is no such block.
    fn read_block(&self, cache: &Self::Cache, block: u32) -> Result<Vec<u8>, OpError>;

    /// The reverse of [`read_block`](Self::read_block).
    ///
    /// # Errors
    /// [`OpError`] if there is no such block or `bytes` has the wrong length.
    fn write_block(&self, cache: &mut Self::Cache, block: u32, bytes: &[u8])
    -> Result<(), OpError>;

    /// Bytes of snapshot `snapshot`, [`CacheSpec::snapshot_bytes`] long.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if there is no such snapshot.
    fn read_snapshot(&self, cache: &Self::Cache, snapshot: u32) -> Result<Vec<u8>, OpError>;

    /// The reverse of [`read_snapshot`](Self::read_snapshot).
    ///
    /// # Errors
    /// [`OpError`] if there is no such snapshot or `bytes` has the wrong length.
    fn write_snapshot(
        &self,
        cache: &mut Self::Cache,
        snapshot: u32,
        bytes: &[u8],
    ) -> Result<(), OpError>;

    /// Compressed entry `entry` of layer `layer` in `slot`'s sequence, whose blocks are `blocks`:
    /// 512 channels of compressed KV and, on ratio-4 layers, 128 channels of the indexer key.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if the layer has no such entry.
    fn read_entry(
        &self,
        cache: &Self::Cache,
        layer: usize,
        blocks: &[u32],
        entry: usize,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), OpError>;
}

/// How a site mixes the copies: `post [T, 4]` and `comb [T, 4, 4]`, f32.
#[derive(Debug, Clone)]
pub struct HcMix<T> {
    /// Weight of the sublayer's output in each copy.
    pub post: T,
    /// `comb[i][j]`: share of source copy `i` in destination copy `j`.
    pub comb: T,
}

/// What a site hands to its sublayer.
#[derive(Debug, Clone)]
pub struct HcPre<T> {
    /// Normalised input of the sublayer, `[T, D]`.
    pub normed: T,
    /// Needed again when the sublayer is done.
    pub mix: HcMix<T>,
}

/// Embedding, hyper-connections and norms. `x` is the four copies, `[T, 4 * D]`, copy-major.
pub trait HyperConnectionOps: Backend {
    /// `x[t] = four copies of embed[token of row t]`. Source: `Transformer.forward`.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] for a token id outside the table.
    fn embed(&self, embed: &Self::Linear, step: &Self::Step) -> Result<Self::Tensor, OpError>;

    /// Mixes the copies into one stream, normalises it. Source: `Block.hc_pre`, `RMSNorm`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn hc_pre(
        &self,
        x: &Self::Tensor,
        site: &HcSite<Self>,
        norm: &Norm<Self>,
    ) -> Result<HcPre<Self::Tensor>, OpError>
    where
        Self: Sized;

    /// Adds a sublayer's output `y` back: `x'[j] = post[j] y + sum_i comb[i][j] x[i]`.
    /// Source: `Block.hc_post`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn hc_post(
        &self,
        x: &Self::Tensor,
        y: &Self::Tensor,
        mix: &HcMix<Self::Tensor>,
    ) -> Result<Self::Tensor, OpError>;

    /// [`hc_post`](Self::hc_post) of one sublayer of `step`, then [`hc_pre`](Self::hc_pre) of the next: the
    /// boundary that a device runs as one launch.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn hc_boundary(
        &self,
        x: &mut Self::Tensor,
        y: &Self::Tensor,
        mix: &HcMix<Self::Tensor>,
        (site, norm): (&HcSite<Self>, &Norm<Self>),
        _step: &Self::Step,
    ) -> Result<HcPre<Self::Tensor>, OpError>
    where
        Self: Sized,
    {
        *x = self.hc_post(x, y, mix)?;
        self.hc_pre(x, site, norm)
    }
}

/// Everything attention projects from its input in one go.
#[derive(Debug, Clone)]
pub struct Projected<T> {
    /// `[T, Q]`, not yet normalised.
    pub qr: T,
    /// `[T, 512]`, not yet normalised.
    pub kv: T,
    /// `u` and `s` (without `ape`) of the attention compressor, `[T, coff * 512]` f32.
    pub compressor: Option<[T; 2]>,
    /// `u` and `s` of the indexer's compressor, `[T, 256]` f32.
    pub index_compressor: Option<[T; 2]>,
    /// `[T, n_index_heads]`, not yet scaled.
    pub index_weights: Option<T>,
}

/// Queries of attention and of the indexer.
#[derive(Debug, Clone)]
pub struct Queries<T> {
    /// `[T, H * 512]`: normed per head, rotated.
    pub q: T,
    /// `[T, n_index_heads * 128]`: rotated, Hadamard-transformed, on the FP4 grid if quantised.
    pub index: Option<T>,
}

/// Attention over the window and the compressed entries.
///
/// `layer` is the index in [`CacheSpec::layers`].
pub trait AttentionOps: Backend {
    /// The projections of the attention input `x [T, D]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn attn_project(
        &self,
        weights: &AttentionWeights<Self>,
        x: &Self::Tensor,
    ) -> Result<Projected<Self::Tensor>, OpError>
    where
        Self: Sized;

    /// Queries from `projected.qr`. Source: `Attention.forward`, `Indexer.forward`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn attn_queries(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<Self::Tensor>,
        step: &Self::Step,
    ) -> Result<Queries<Self::Tensor>, OpError>
    where
        Self: Sized;

    /// Norms, rotates and quantises this step's KV rows and returns them (`[T, 512]`); emits every
    /// compressed entry and indexer key completed by this step into the blocks, and advances the
    /// compressor state. Source: `Attention.forward`, `Compressor.forward`.
    ///
    /// The window ring is *not* written yet: [`attend`](Self::attend) still reads what the rows of
    /// a long chunk would overwrite.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn attn_store(
        &self,
        weights: &AttentionWeights<Self>,
        projected: &Projected<Self::Tensor>,
        step: &Self::Step,
        cache: &mut Self::Cache,
        layer: usize,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;

    /// The compressed entries each row attends to on a ratio-4 layer. Source: `Indexer.forward`.
    ///
    /// Row at position `t` chooses `min(top_k, (t + 1) / 4)` of the entries `j < (t + 1) / 4` by
    /// score; on equal scores the lower number wins.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit or the layer has no indexer.
    fn index_select(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<Self::Tensor>,
        projected: &Projected<Self::Tensor>,
        step: &Self::Step,
        cache: &Self::Cache,
        layer: usize,
    ) -> Result<Self::Selection, OpError>
    where
        Self: Sized;

    /// Sparse attention with sinks; then writes this step's KV rows into the window rings. The
    /// result `[T, H * 512]` is rotated back to position 0. Source: `sparse_attn`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    #[expect(clippy::too_many_arguments, reason = "one fused launch reads all of these")]
    fn attend(
        &self,
        weights: &AttentionWeights<Self>,
        queries: &Queries<Self::Tensor>,
        kv: &Self::Tensor,
        selection: Option<&Self::Selection>,
        step: &Self::Step,
        cache: &mut Self::Cache,
        layer: usize,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;

    /// Grouped output projection `wo_b(wo_a[g] o[g])`, summed over the TP group.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit; [`OpError::RankLost`] if a rank is gone.
    fn attn_output(
        &self,
        weights: &AttentionWeights<Self>,
        o: &Self::Tensor,
        comm: &dyn Communicator,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;
}

/// The output side and the input side of the MTP block.
pub trait HeadOps: Backend {
    /// Collapses the copies and normalises: `rms(hc_head(x), norm)`, `[T, D]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit.
    fn hc_head(
        &self,
        x: &Self::Tensor,
        head: &HcHead<Self>,
        norm: &Norm<Self>,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;

    /// f32 logits `[T, V]`; `head` holds this rank's rows of the vocabulary, gathered over the TP
    /// group.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit; [`OpError::RankLost`] if a rank is gone.
    fn logits(
        &self,
        head: &Self::Linear,
        x: &Self::Tensor,
        comm: &dyn Communicator,
    ) -> Result<Self::Tensor, OpError>;

    /// Keeps the copies `x [T, 4 * D]` of the rows of `batch`, of each sequence the last
    /// [`CacheSpec::copies_rows`], by slot and position: an MTP block reads them when it knows the
    /// next token, which may be steps later.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit, or the cache keeps none.
    fn keep_copies(
        &self,
        batch: &Batch,
        x: &Self::Tensor,
        cache: &mut Self::Cache,
    ) -> Result<(), OpError>;

    /// The copies `[R, 4 * D]` of the rows of `rows`, whose tokens are ignored: from `current`, a
    /// batch with its copies that are not kept yet, where the row is in it, else as kept.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit, or the cache keeps none.
    fn kept_copies(
        &self,
        rows: &Batch,
        current: Option<(&Batch, &Self::Tensor)>,
        cache: &Self::Cache,
    ) -> Result<Self::Tensor, OpError>;

    /// The four copies an MTP block starts from:
    /// `x0[j] = e_proj(rms(embed(next), enorm)) + h_proj(rms(x[j], hnorm))`. The tokens of `step` are
    /// each row's next token.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the shapes do not fit; [`OpError::OutOfRange`] for a bad token id.
    fn mtp_input(
        &self,
        weights: &MtpInputWeights<Self>,
        embed: &Self::Linear,
        step: &Self::Step,
        x: &Self::Tensor,
    ) -> Result<Self::Tensor, OpError>
    where
        Self: Sized;
}

/// All operators of DeepSeek-V4.
pub trait Ops: HyperConnectionOps + AttentionOps + MoeOps + HeadOps + ChoiceOps {}

impl<B: HyperConnectionOps + AttentionOps + MoeOps + HeadOps + ChoiceOps> Ops for B {}
