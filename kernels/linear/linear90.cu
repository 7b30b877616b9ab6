// linear90_*: FP8 linear layers on tensor cores in FP8, `out = x W^T`.
//
// Source   `fp8_gemm` (block scales 128 x 128, activations per 128) of the official release.
// Inputs   weights: tensor map of [n_rows, k] E4M3, boxes of 64 rows x 128    w_scales [ceil(n_rows / 128), ceil(k / 128)] f32
//          _8: x, token m's bf16 values begin at x + m x_stride; quantised on the way
//          _64, _128: tiles of `act_quant_tiles`
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
// Launch   384 threads. _8, _64 (tokens of a block): grid (C ceil(n_rows / 64), ceil(n_tokens / _)) in
//          clusters of C = 1, 2 or 4 (_c1, ...), which split K and add up in shared memory of their
//          first block: for matrices with few rows. _128: grid (ceil(n_rows / 128),
//          ceil(n_tokens / 128)), `n_segments` = 2 C of the form for few tokens: C belongs to the
//          matrix, so the order of addition is the same in all.
//          _pair_8_c4: two matrices of one x, the tiles of the second behind those of the first.
//          May start before the launch before it has ended: weights come first.
// Limit    memory for few tokens: every weight byte is read once per row of blocks.
// Arch     sm_90a.
// CPU twin `CpuLinear::matmul`: the same blocks of 128, within K f32 roundings, then 1 bf16 ulp.

#include "../include/linear90.cuh"

#define LINEAR(name, cluster, body)                                                                    \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 1) cluster name(                    \
        const __grid_constant__ TensorMap weights, const float* __restrict__ w_scales,                 \
        [[maybe_unused]] const bf16* __restrict__ rows,                                                \
        const u8* __restrict__ codes, const float* __restrict__ x_scales, void* __restrict__ out,      \
        u32 n_rows, u32 k, [[maybe_unused]] u32 x_stride, u32 x_rows, u32 n_tokens, u32 out_stride,    \
        u32 is_f32, [[maybe_unused]] u32 n_segments) {                                                 \
        const Linear l = {w_scales, out, n_rows, k, n_tokens, out_stride, is_f32};                     \
        const Input x = {rows, x_stride, {codes, x_scales, x_rows}, nullptr};                          \
        body;                                                                                          \
    }
#define SPLIT(name, tokens, stages, c)                                                                 \
    LINEAR(name, __cluster_dims__(c), (split<Format::Fp8, tokens, stages, c>(l, weights, x, blockIdx.x / c))) \
    EMU_KERNEL(name, .cluster = c)

SPLIT(linear90_8_c1, 8, 6, 1)
SPLIT(linear90_8_c2, 8, 6, 2)
SPLIT(linear90_8_c4, 8, 6, 4)
SPLIT(linear90_64_c1, 64, 4, 1)
SPLIT(linear90_64_c2, 64, 4, 2)
SPLIT(linear90_64_c4, 64, 4, 4)
LINEAR(linear90_128, , (whole<Format::Fp8, 4>(l, weights, x, n_segments)))
EMU_KERNEL(linear90_128)

extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 1) __cluster_dims__(4) linear90_pair_8_c4(
    const __grid_constant__ TensorMap weights, const float* __restrict__ w_scales, bf16* __restrict__ out, u32 n_rows,
    const __grid_constant__ TensorMap other_weights, const float* __restrict__ other_scales,
    bf16* __restrict__ other_out, u32 other_rows, const bf16* __restrict__ rows, u32 k, u32 n_tokens) {
    const u32 tile = blockIdx.x / 4, n_tiles = ceil_div(n_rows, TILE_ROWS);
    const bool other = tile >= n_tiles;
    const u32 n = other ? other_rows : n_rows;
    const Linear l = {other ? other_scales : w_scales, other ? other_out : out, n, k, n_tokens, n, 0};
    split<Format::Fp8, 8, 6, 4>(l, other ? other_weights : weights, {rows, k, {}, nullptr}, other ? tile - n_tiles : tile);
}
EMU_KERNEL(linear90_pair_8_c4, .cluster = 4)
