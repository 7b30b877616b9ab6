// queries90: queries of attention and of the indexer from the low-rank vector, in one launch: norm and
// rounding before the products, what attention and the indexer want of a head after them.
//
// Source   `Attention.forward`, `Indexer.forward` of the official release (q_norm, wq_b, norms of heads,
//          rotary embedding; the indexer's wq_b, `rotate_activation`, `fp4_act_quant`).
// Inputs   weights: tensor maps of [n_heads 512, k] and [n_index_heads 128, k] E4M3, boxes of 64 rows x
//          128, with scales per 128 x 128; qr [n_tokens, k] bf16; norm [k] f32
//          frequencies [32] f32    positions [n_tokens] u32
// Outputs  q [n_tokens, n_heads, 512], index_q [n_tokens, n_index_heads, 128] bf16, as `attn_finish_q` and
//          `attn_finish_index_q` leave them
// Launch   grid 8 n_heads + 2 n_index_heads, 384 threads, in clusters of 8: a head of 512 channels or four
//          of 128; n_index_heads in fours. A block multiplies a tile of 64 channels for all tokens and
//          sends each block of the cluster a token's; block t finishes token t. Up to 8 tokens.
//          May start before the launch before it has ended: weights come first.
// Limit    memory: every weight byte is read once.
// Arch     sm_90a.
// CPU twin `CpuOps::attn_queries`. Equal bits to `rms_norm`, `linear90_8_c1` and the two kernels named above.

#include "../include/kv_row.cuh"
#include "../include/linear90.cuh"

constexpr u32 BLOCKS = 8, TOKENS = 8;
static_assert(BLOCKS * TILE_ROWS == HEAD_DIM && BLOCKS == TOKENS);

// Token `token` of this cluster's channels lies in `values`; by the first warps of a group.
INLINE void finish(const float* values, bool is_index, u32 head, u32 n_heads, u32 token, const float* frequencies,
                   const u32* positions, float eps, bf16* out) {
    const u32 warp = warp_id() % 4, lane = lane_id();
    if (is_index) {
        float v[KEY_PER_LANE];
        UNROLL
        for (u32 i = 0; i < KEY_PER_LANE; ++i) v[i] = values[warp * INDEX_DIM + lane * KEY_PER_LANE + i];
        finish_index_query(v, frequencies, positions[token]);
        store_index_query(v, out + (static_cast<u64>(token) * n_heads + head + warp) * INDEX_DIM);
    } else if (warp == 0) {
        float v[KV_PER_LANE];
        UNROLL
        for (u32 i = 0; i < KV_PER_LANE; ++i) v[i] = values[lane * KV_PER_LANE + i];
        norm_row(v, nullptr, eps);
        rope_row(v, frequencies, positions[token], 1.0f);
        store_row(v, out + (static_cast<u64>(token) * n_heads + head) * HEAD_DIM);
    }
}

extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 1) __cluster_dims__(8) queries90(
    const __grid_constant__ TensorMap weights, const float* __restrict__ w_scales, bf16* __restrict__ q, u32 n_heads,
    const __grid_constant__ TensorMap index_weights, const float* __restrict__ index_scales,
    bf16* __restrict__ index_q, u32 n_index_heads, const bf16* __restrict__ qr, const float* __restrict__ norm, float eps,
    const float* __restrict__ frequencies, const u32* __restrict__ positions, u32 k, u32 n_tokens) {
    using P = Pipeline<Format::Fp8, Share::K, TOKENS, 6>;
    P& s = shared<P>();
    const bool is_index = blockIdx.x >= BLOCKS * n_heads;
    const u32 tile = is_index ? blockIdx.x - BLOCKS * n_heads : blockIdx.x, rank = cluster_rank(), warp = warp_id();
    const Linear l = {is_index ? index_scales : w_scales, nullptr, 0, k, n_tokens, 0, 0};
    const u32 n_blocks = ceil_div(k, K_BLOCK), per = per_segment(n_blocks, 2);
    const Work work = share_k(nullptr, 0, n_blocks, per, 0);
    Ring<P::STAGES> ring;
    pipeline_start(s, FILL_WARPS);
    dependency_trigger();
    if (warp < 4) {
        if (warp == 0 && elect()) {
            copy_matrix<Format::Fp8, Share::K, true>(s, ring, l, work, is_index ? index_weights : weights, tile);
        } else if (warp > 0) {
            if (threadIdx.x == WARP) prefetch(norm, k * 4);
            dependency_wait();
            const bf16* rows = after_wait(qr);
            const auto row_of = [&](u32 token) -> const bf16* {
                return token < n_tokens ? rows + static_cast<u64>(token) * k : nullptr;
            };
            fill_x(s, ring, work, k, row_of, {norm, eps});
        }
        warp_sync();
        meet(), meet();
        return;
    }
    const u32 group = warp / 4 - 1;
    float sums[TOKENS / 2];
    multiply<Format::Fp8, Share::K, TOKENS>(s, ring, work, group, per, scales_of(l, tile, n_blocks), sums);
    add_groups<TOKENS>(s, group, sums);
    // The cluster's channels of this block's token, in the memory of its pipeline.
    float* values = reinterpret_cast<float*>(&s);
    const u32 row = warp % 4 * 16 + lane_id() / 4;
    meet();
    UNROLL
    for (u32 i = 0; i < TOKENS / 2; ++i) {
        const u32 token = 2 * (lane_id() % 4) + i % 2;
        if (group == 0) cluster_store(values + rank * TILE_ROWS + row + i / 2 * 8, token, round_bf16(sums[i]));
    }
    meet();
    if (group > 0 || rank >= n_tokens) return;
    dependency_wait();
    const u32* at = after_wait(positions);
    if (is_index) finish(values, true, tile / BLOCKS * 4, n_index_heads, rank, frequencies, at, eps, index_q);
    else finish(values, false, tile / BLOCKS, n_heads, rank, frequencies, at, eps, q);
}
EMU_KERNEL(queries90, .cluster = 8)
