// moe_gate_up_fp8, moe_down_fp8: the routed experts of a step, for checkpoints whose experts are FP8.
//
// Source   `Expert.forward`, `fp8_gemm` of the official release.
// Inputs   w1, w3 [n_experts, channels, width] E4M3, with f32 scales per 128 x 128 of each expert
//          w2 [n_experts, width, channels] likewise
//          the rest as in `experts.cu`
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width], bf16 or f32
// Launch   as in `experts.cu`: grid (ceil(channels / 16) or ceil(width / 32), maximum number of
//          items), 256 threads. Widths are multiples of 16; an expert's rows are whole 128s or end in
//          a partial one.
// Limit    memory: each expert's bytes are read once per item, and an item holds up to 8 tokens.
// Arch     sm_80 and later.
// CPU twin `MoeOps::moe`, within K f32 roundings of the sum of magnitudes, then 1 bf16 ulp.

#include "../include/skinny_gemm.cuh"

constexpr u32 ITEM = 3, TOKENS = 8, STAGES = 4;

INLINE Weights expert_weights(const u8* data, const float* scales, u64 expert, u32 n_rows, u32 k) {
    const u64 n_scales = static_cast<u64>(ceil_div(n_rows, K_BLOCK)) * ceil_div(k, K_BLOCK);
    return Weights{data + expert * n_rows * k, scales + expert * n_scales, nullptr, n_rows, k};
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) moe_gate_up_fp8(
    const u8* __restrict__ w1, const float* __restrict__ s1, const u8* __restrict__ w3,
    const float* __restrict__ s3, const u32* __restrict__ items, const u32* __restrict__ n_items,
    const u32* __restrict__ pairs, const bf16* __restrict__ x, const float* __restrict__ weights,
    bf16* __restrict__ h, u32 channels, u32 width, u32 top_k, float limit) {
    if (blockIdx.y >= n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = items + blockIdx.y * ITEM;
    const u32 *mine = pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * TILE_ROWS;
    // Row tile 0 is the gate's 16 channels, row tile 1 the same channels of up.
    const bool is_up = warp_id() % ROW_TILES;
    const Weights w = expert_weights(is_up ? w3 : w1, is_up ? s3 : s1, item[0], channels, width);
    gemm<Format::Fp8, TOKENS, STAGES>(s, w, first_row, x, width, ~0u,
                                      [&](u32 token) { return token < count ? mine[token] / top_k : ~0u; });
    for (u32 i = threadIdx.x; i < TOKENS * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % TILE_ROWS, token = i / TILE_ROWS;
        if (first_row + row >= channels || token >= count) continue;
        const float g = min_f32(round_bf16(gemm_sum(s, 0, row, token)), limit);
        const float u = max_f32(min_f32(round_bf16(gemm_sum(s, 1, row, token)), limit), -limit);
        const float silu = mul_rn(g, div_rn(1.0f, 1.0f + exp_f32(-g)));
        const u64 pair = mine[token];
        h[pair * channels + first_row + row] = bf16_from_f32(mul_rn(mul_rn(silu, u), weights[pair]));
    }
}
EMU_KERNEL(moe_gate_up_fp8)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) moe_down_fp8(
    const u8* __restrict__ w2, const float* __restrict__ s2, const u32* __restrict__ items,
    const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ h,
    void* __restrict__ out, u32 width, u32 channels, u32 is_f32) {
    if (blockIdx.y >= n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = items + blockIdx.y * ITEM;
    const u32 *mine = pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * ROW_TILES * TILE_ROWS, tile = warp_id() % ROW_TILES;
    const Weights w = expert_weights(w2, s2, item[0], width, channels);
    gemm<Format::Fp8, TOKENS, STAGES>(s, w, first_row + tile * TILE_ROWS, h, channels, ~0u,
                                      [&](u32 token) { return token < count ? mine[token] : ~0u; });
    for (u32 i = threadIdx.x; i < TOKENS * ROW_TILES * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % (ROW_TILES * TILE_ROWS), token = i / (ROW_TILES * TILE_ROWS);
        if (first_row + row >= width || token >= count) continue;
        const float sum = gemm_sum(s, row / TILE_ROWS, row % TILE_ROWS, token);
        const u64 at = static_cast<u64>(mine[token]) * width + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = sum;
        else static_cast<bf16*>(out)[at] = bf16_from_f32(sum);
    }
}
EMU_KERNEL(moe_down_fp8)
