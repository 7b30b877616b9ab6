// moe_gate_up_*_64, moe_down_*_64: the routed experts of many tokens, 64 of an expert per block.
//
// Source   `Expert.forward`, `fp4_gemm` and `fp8_gemm` of the official release.
// Inputs, outputs: as in `experts.cu` (FP4) and `experts_fp8.cu`, whose bits these have; items hold up to 64 tokens.
// Launch   grid (ceil(channels / 64) or ceil(width / 128), maximum number of items), 256 threads, `TILED_BYTES` of
//          shared memory; blocks beyond `n_items[0]` end at once.
// Limit    instructions, as in `linear/tiled.cu`. An expert's bytes are read once per item; the second item of an
//          expert follows its first, whose weights (12 MB for Flash, 33 MB for Pro) the L2 cache still holds for the
//          most part.
// Arch     sm_80 and later.
// CPU twin `MoeOps::moe`, within K f32 roundings of the sum of magnitudes, then 1 bf16 ulp.

#include "../include/experts80.cuh"
#include "../include/tiled_gemm.cuh"

constexpr u32 CHANNELS = TILED_ROWS / 2;

template <Format F, class Scale>
INLINE void gate_up_tiled(const Experts& e, const u8* w1, const Scale* s1, const u8* w3, const Scale* s3, const bf16* x,
                          const float* weights, bf16* h, u32 top_k, float limit) {
    if (blockIdx.y >= e.n_items[0]) return;
    auto& s = shared<TiledShared<F>>();
    const u32* item = e.items + blockIdx.y * ITEM;
    const u32 *mine = e.pairs + item[1], count = item[2], first_row = blockIdx.x * CHANNELS;
    const TwoMatrices w = {expert_weights<F>(w1, s1, item[0], e.channels, e.width),
                           expert_weights<F>(w3, s3, item[0], e.channels, e.width), first_row};
    tiled_gemm<F>(s, w, e.width, x, e.width, count, [&](u32 token) { return mine[token] / top_k; });
    for (u32 i = threadIdx.x; i < count * CHANNELS; i += GEMM_THREADS) {
        const u32 channel = i % CHANNELS, token = i / CHANNELS;
        if (first_row + channel >= e.channels) continue;
        const u32 at = channel / TILE_ROWS * 2 * TILE_ROWS + channel % TILE_ROWS;
        const float value = gated(s.sums[token][at], s.sums[token][at + TILE_ROWS], limit);
        const u64 pair = mine[token];
        h[pair * e.channels + first_row + channel] = bf16_from_f32(mul_rn(value, weights[pair]));
    }
}

template <Format F, class Scale>
INLINE void down_tiled(const Experts& e, const u8* w2, const Scale* s2, const bf16* h, void* out, u32 is_f32) {
    if (blockIdx.y >= e.n_items[0]) return;
    auto& s = shared<TiledShared<F>>();
    const u32* item = e.items + blockIdx.y * ITEM;
    const u32 *mine = e.pairs + item[1], count = item[2], first_row = blockIdx.x * TILED_ROWS;
    const OneMatrix w = {expert_weights<F>(w2, s2, item[0], e.width, e.channels), first_row};
    tiled_gemm<F>(s, w, e.channels, h, e.channels, count, [&](u32 token) { return mine[token]; });
    for (u32 i = threadIdx.x; i < count * TILED_ROWS; i += GEMM_THREADS) {
        const u32 row = i % TILED_ROWS, token = i / TILED_ROWS;
        if (first_row + row >= e.width) continue;
        const u64 at = static_cast<u64>(mine[token]) * e.width + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = s.sums[token][row];
        else static_cast<bf16*>(out)[at] = bf16_from_f32(s.sums[token][row]);
    }
}

#define EXPERTS_TILED(format, scale, gate_up_name, down_name)                                             \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) gate_up_name(                           \
        const u8* __restrict__ w1, const scale* __restrict__ s1, const u8* __restrict__ w3,               \
        const scale* __restrict__ s3, const u32* __restrict__ items, const u32* __restrict__ n_items,     \
        const u32* __restrict__ pairs, const bf16* __restrict__ x, const float* __restrict__ weights,     \
        bf16* __restrict__ h, u32 channels, u32 width, u32 top_k, float limit) {                          \
        dependency_begin(items, n_items, pairs, x, weights);                                              \
        gate_up_tiled<Format::format>({items, n_items, pairs, channels, width}, w1, s1, w3, s3, x,        \
                                      weights, h, top_k, limit);                                          \
    }                                                                                                     \
    EMU_KERNEL(gate_up_name)                                                                              \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) down_name(                              \
        const u8* __restrict__ w2, const scale* __restrict__ s2, const u32* __restrict__ items,           \
        const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ h,       \
        void* __restrict__ out, u32 width, u32 channels, u32 is_f32) {                                    \
        dependency_begin(items, n_items, pairs, h);                                                       \
        down_tiled<Format::format>({items, n_items, pairs, channels, width}, w2, s2, h, out, is_f32);     \
    }                                                                                                     \
    EMU_KERNEL(down_name)

EXPERTS_TILED(Fp4, u8, moe_gate_up_fp4_64, moe_down_fp4_64)
EXPERTS_TILED(Fp8, float, moe_gate_up_fp8_64, moe_down_fp8_64)
