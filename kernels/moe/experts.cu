// moe_gate_up_fp4, moe_down_fp4: the routed experts of a step, FP4 weights expanded in registers.
//
// Source   `Expert.forward`, `fp4_gemm` of the official release.
// Inputs   w1, w3 [n_experts, channels, width] E2M1, two per byte, with E8M0 exponents per 32
//          w2 [n_experts, width, channels] likewise
//          items [.., 3] u32 (expert, first, count) and pairs [..] u32 of `moe_group`: the pairs
//          `pairs[first .. first + count]` go through the item's expert; pair = token * top_k + slot
//          x [n_tokens, width] bf16    h [n_pairs, channels] bf16    weights [n_pairs] f32
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width], bf16 or f32
// Launch   grid (ceil(channels / 16) or ceil(width / 32), maximum number of items), 256 threads;
//          blocks beyond `n_items[0]` end at once, so one grid serves every routing.
//          Widths are multiples of 32. Exponents must be at most 128 (a factor of 2).
// Limit    memory: each expert's bytes are read once per item, and an item holds up to 8 tokens.
// Arch     sm_80 and later. Exact products: E2M1 times its scale is exact in bf16.
// CPU twin `MoeOps::moe`, within K f32 roundings of the sum of magnitudes, then 1 bf16 ulp.

#include "../include/skinny_gemm.cuh"

constexpr u32 ITEM = 3, TOKENS = 8, STAGES = 4;

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) moe_gate_up_fp4(
    const u8* __restrict__ w1, const u8* __restrict__ e1, const u8* __restrict__ w3,
    const u8* __restrict__ e3, const u32* __restrict__ items, const u32* __restrict__ n_items,
    const u32* __restrict__ pairs, const bf16* __restrict__ x, const float* __restrict__ weights,
    bf16* __restrict__ h, u32 channels, u32 width, u32 top_k, float limit) {
    if (blockIdx.y >= n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = items + blockIdx.y * ITEM;
    const u64 expert = item[0];
    const u32 *mine = pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * TILE_ROWS;
    // Row tile 0 is the gate's 16 channels, row tile 1 the same channels of up.
    const bool is_up = warp_id() % ROW_TILES;
    const u64 size = expert * channels * width;
    const Weights w = {(is_up ? w3 : w1) + size / 2, nullptr, (is_up ? e3 : e1) + size / 32, channels, width};
    gemm<Format::Fp4, TOKENS, STAGES>(s, w, first_row, x, width, ~0u,
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
EMU_KERNEL(moe_gate_up_fp4)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) moe_down_fp4(
    const u8* __restrict__ w2, const u8* __restrict__ e2, const u32* __restrict__ items,
    const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ h,
    void* __restrict__ out, u32 width, u32 channels, u32 is_f32) {
    if (blockIdx.y >= n_items[0]) return;
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32* item = items + blockIdx.y * ITEM;
    const u64 size = static_cast<u64>(item[0]) * channels * width;
    const u32 *mine = pairs + item[1], count = item[2];
    const u32 first_row = blockIdx.x * ROW_TILES * TILE_ROWS, tile = warp_id() % ROW_TILES;
    const Weights w = {w2 + size / 2, nullptr, e2 + size / 32, width, channels};
    gemm<Format::Fp4, TOKENS, STAGES>(s, w, first_row + tile * TILE_ROWS, h, channels, ~0u,
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
EMU_KERNEL(moe_down_fp4)
