// linear_fp8_*, linear_bf16_*: `out = x W^T` for up to 8 (_8) or 32 (_32) tokens per block row.
//
// Source   `fp8_gemm` (block scales 128 x 128) and `F.linear` of the official release.
// Inputs   data [n_rows, k] E4M3 or bf16    scales [ceil(n_rows / 128), ceil(k / 128)] f32 (FP8)
//          x: token m's values begin at x + m x_stride; bf16. For FP8 semantics with quantised
//          activations x holds values on the FP8 grid (exact in bf16): the result is then that of
//          E4M3 x E4M3 products; otherwise it is W8A16. `is_tiled`: data in the tiles of
//          `linear_pack_fp8` (sm_90a, for layers whose activations are not quantised).
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
// Launch   grid (ceil(n_rows / 32), ceil(n_tokens / Tokens)), 256 threads. k is a multiple of 16
//          (FP8) or 8 (bf16); scales of FP8 rows need n_rows in whole 128s or a last partial one.
// Limit    memory for few tokens: every weight byte is read once per block row of tokens.
// Arch     sm_80 and later; no FP8 arithmetic needed.
// CPU twin `CpuLinear::matmul`, within K f32 roundings of the sum of magnitudes (2^-21).

#include "../include/skinny_gemm.cuh"

template <Format F, u32 Tokens, u32 Stages>
INLINE void linear(const Weights& w, const bf16* x, void* out, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32) {
    auto& s = shared<GemmShared<Tokens, Stages>>();
    const u32 first_token = blockIdx.y * Tokens, first_row = blockIdx.x * ROW_TILES * TILE_ROWS;
    const u32 tile = warp_id() % ROW_TILES;
    gemm<F, Tokens, Stages>(s, w, first_row + tile * TILE_ROWS, x, x_stride, n_tokens,
                            [&](u32 token) { return first_token + token; });
    for (u32 i = threadIdx.x; i < Tokens * ROW_TILES * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % (ROW_TILES * TILE_ROWS), token = i / (ROW_TILES * TILE_ROWS);
        if (first_row + row >= w.n_rows || first_token + token >= n_tokens) continue;
        const float sum = gemm_sum(s, row / TILE_ROWS, row % TILE_ROWS, token);
        const u64 at = static_cast<u64>(first_token + token) * out_stride + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = sum;
        else static_cast<bf16*>(out)[at] = bf16_from_f32(sum);
    }
}

// Two blocks per SM are asked for where the compiler, left to itself, saves registers by spilling.
#define LINEAR_FP8(name, tokens, stages)                                                          \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) name(                           \
        const u8* __restrict__ data, const float* __restrict__ scales, const bf16* __restrict__ x, \
        void* __restrict__ out, u32 n_rows, u32 k, u32 x_stride, u32 n_tokens,        \
        u32 out_stride, u32 is_f32, u32 is_tiled) {                                               \
        const Weights w = {data, scales, nullptr, n_rows, k, is_tiled != 0};                                   \
        linear<Format::Fp8, tokens, stages>(w, x, out, x_stride, n_tokens, out_stride, is_f32);             \
    }                                                                                             \
    EMU_KERNEL(name)
#define LINEAR_BF16(name, tokens, stages)                                                         \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) name(                           \
        const u8* __restrict__ data, const bf16* __restrict__ x, void* __restrict__ out,          \
        u32 n_rows, u32 k, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32) {              \
        const Weights w = {data, nullptr, nullptr, n_rows, k};                                    \
        linear<Format::Bf16, tokens, stages>(w, x, out, x_stride, n_tokens, out_stride, is_f32);            \
    }                                                                                             \
    EMU_KERNEL(name)

LINEAR_FP8(linear_fp8_8, 8, 4)
LINEAR_FP8(linear_fp8_32, 32, 2)
LINEAR_BF16(linear_bf16_8, 8, 4)
LINEAR_BF16(linear_bf16_32, 32, 2)
