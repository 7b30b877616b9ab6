// The routed experts of a step on the skinny products of `skinny_gemm.cuh`: what `moe/experts.cu` and
// `moe/experts_fp8.cu` instantiate, and what `moe/experts_tiled.cu` shares with them. Their headers say what goes in
// and comes out.
//
// Included by these three only.
#pragma once

#include "skinny_gemm.cuh"

constexpr u32 ITEM = 3, TOKENS = 8, STAGES = 4;

struct Experts {
    const u32 *items, *n_items, *pairs;
    u32 channels, width;
};

// Expert `expert`'s matrix of a stack of [n_rows, k] ones; `Scale`: f32 per 128 x 128 (FP8) or E8M0 per
// 32 (FP4).
template <Format F, class Scale>
INLINE Weights expert_weights(const u8* data, const Scale* scales, u64 expert, u32 n_rows, u32 k) {
    const u64 size = static_cast<u64>(n_rows) * k;
    if constexpr (F == Format::Fp4) {
        return Weights{data + expert * size / 2, nullptr, scales + expert * size / 32, n_rows, k};
    } else {
        const u64 n_scales = static_cast<u64>(ceil_div(n_rows, K_BLOCK)) * ceil_div(k, K_BLOCK);
        return Weights{data + expert * size, scales + expert * n_scales, nullptr, n_rows, k};
    }
}

// The activation of a channel from its products with gate and up, not yet rounded.
INLINE float gated(float gate, float up, float limit) {
    const float g = min_f32(round_bf16(gate), limit);
    const float u = max_f32(min_f32(round_bf16(up), limit), -limit);
    return mul_rn(mul_rn(g, div_rn(1.0f, 1.0f + exp_f32(-g))), u);
}

template <Format F, class Scale>
INLINE void gate_up(const Experts& e, const u8* w1, const Scale* s1, const u8* w3, const Scale* s3, const bf16* x,
                    const float* weights, bf16* h, u32 top_k, float limit) {
    if (blockIdx.y >= e.n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = e.items + blockIdx.y * ITEM;
    const u32 *mine = e.pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * TILE_ROWS;
    // Row tile 0 is the gate's 16 channels, row tile 1 the same channels of up.
    const bool is_up = warp_id() % ROW_TILES;
    const Weights w = expert_weights<F>(is_up ? w3 : w1, is_up ? s3 : s1, item[0], e.channels, e.width);
    gemm<F, TOKENS, STAGES>(s, w, first_row, x, e.width, ~0u,
                            [&](u32 token) { return token < count ? mine[token] / top_k : ~0u; });
    for (u32 i = threadIdx.x; i < TOKENS * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % TILE_ROWS, token = i / TILE_ROWS;
        if (first_row + row >= e.channels || token >= count) continue;
        const float value = gated(gemm_sum(s, 0, row, token), gemm_sum(s, 1, row, token), limit);
        const u64 pair = mine[token];
        h[pair * e.channels + first_row + row] = bf16_from_f32(mul_rn(value, weights[pair]));
    }
}

// `Grid`: h is put on the FP8 grid first.
template <Format F, bool Grid, class Scale>
INLINE void down(const Experts& e, const u8* w2, const Scale* s2, const bf16* h, void* out, u32 is_f32) {
    if (blockIdx.y >= e.n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = e.items + blockIdx.y * ITEM;
    const u32 *mine = e.pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * ROW_TILES * TILE_ROWS, tile = warp_id() % ROW_TILES;
    const Weights w = expert_weights<F>(w2, s2, item[0], e.width, e.channels);
    if constexpr (Grid) {
        gemm_resident<F>(s, w, first_row + tile * TILE_ROWS, count, [&](bf16* to) {
            fill_on_grid(to, h, e.channels, e.channels, count, [&](u32 token) { return mine[token]; });
        });
    } else {
        gemm<F, TOKENS, STAGES>(s, w, first_row + tile * TILE_ROWS, h, e.channels, ~0u,
                                [&](u32 token) { return token < count ? mine[token] : ~0u; });
    }
    for (u32 i = threadIdx.x; i < TOKENS * ROW_TILES * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % (ROW_TILES * TILE_ROWS), token = i / (ROW_TILES * TILE_ROWS);
        if (first_row + row >= e.width || token >= count) continue;
        const float sum = gemm_sum(s, row / TILE_ROWS, row % TILE_ROWS, token);
        const u64 at = static_cast<u64>(mine[token]) * e.width + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = sum;
        else static_cast<bf16*>(out)[at] = bf16_from_f32(sum);
    }
}

#define EXPERTS_DOWN(format, grid, scale, down_name)                                                      \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) down_name(                              \
        const u8* __restrict__ w2, const scale* __restrict__ s2, const u32* __restrict__ items,           \
        const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ h,       \
        void* __restrict__ out, u32 width, u32 channels, u32 is_f32) {                                    \
        dependency_begin(items, n_items, pairs, h);                                                       \
        down<Format::format, grid>({items, n_items, pairs, channels, width}, w2, s2, h, out, is_f32);     \
    }                                                                                                     \
    EMU_KERNEL(down_name)
#define EXPERTS(format, scale, gate_up_name, down_name, down_grid_name)                                   \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) gate_up_name(                           \
        const u8* __restrict__ w1, const scale* __restrict__ s1, const u8* __restrict__ w3,               \
        const scale* __restrict__ s3, const u32* __restrict__ items, const u32* __restrict__ n_items,     \
        const u32* __restrict__ pairs, const bf16* __restrict__ x, const float* __restrict__ weights,     \
        bf16* __restrict__ h, u32 channels, u32 width, u32 top_k, float limit) {                          \
        dependency_begin(items, n_items, pairs, weights);                                                 \
        gate_up<Format::format>({items, n_items, pairs, channels, width}, w1, s1, w3, s3, x, weights, h, top_k, limit); \
    }                                                                                                     \
    EMU_KERNEL(gate_up_name)                                                                              \
    EXPERTS_DOWN(format, false, scale, down_name)                                                         \
    EXPERTS_DOWN(format, true, scale, down_grid_name)
