// linear100_*: FP8 linear layers by block-scaled products, `out = x W^T`.
//
// Source   `fp8_gemm` (block scales 128 x 128, activations per 128) of the official release.
// Inputs   weights: tensor map of [n_rows, k] E4M3, boxes of 128 x 128; w_scales of
//          `linear_pack_scales100`: scales must be powers of two
//          codes, x_scales: tiles of `act_quant_tiles100`
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
// Launch   224 threads, grid (C ceil(n_rows / 128), ceil(n_tokens / _)) in clusters of C = 1, 2, 4 or 8
//          (_c1, ...), which split K: for matrices with few rows. _32, _128: tokens of a block. Each
//          block adds up a part of the tokens. C belongs to the matrix, so a token's bits do not
//          depend on how many there are.
//          May start before the launch before it has ended: weights come first.
// Limit    memory for few tokens: every weight byte is read once per row of blocks, and 3 % of scales.
// Arch     sm_100f. Unproven until a B200 ran it.
// CPU twin `CpuLinear::matmul`, within K f32 roundings, then 1 bf16 ulp.

#include "../include/linear100.cuh"

template <u32 N, u32 Stages, u32 Cluster>
INLINE void linear(const Linear& l, const TensorMap& weights, const u8* w_scales, const XTiles& x, u32 k) {
    Pipeline<Format::Fp8, N, Stages>& s = shared<Pipeline<Format::Fp8, N, Stages>>();
    const u32 tile = blockIdx.x / Cluster;
    const Work work = work_of<N, Cluster, 1>(l, w_scales, k, tile, 8);
    pipeline_start<Format::Fp8>(s);
    dependency_trigger();
    if (warp_id() >= STORE_WARPS) {
        feed<Format::Fp8>(
            s, work, x,
            [&](u8* to, u32 column, u64* full) {
                const u32 at[2] = {column, tile * TILE_ROWS};
                tensor_load<true>(to, weights, at, full);
            },
            [] { dependency_wait(); });
        let_others_add<Cluster>();
    } else {
        dependency_wait();
        store_sums<Cluster>(s, l, work, tile * TILE_ROWS);
    }
    pipeline_end(s);
}

#define LINEAR(name, tokens, stages, c)                                                                \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 2) __cluster_dims__(c) name(         \
        const __grid_constant__ TensorMap weights, const u8* __restrict__ w_scales,                    \
        const u8* __restrict__ codes, const u32* __restrict__ x_scales, void* __restrict__ out, u32 n_rows, \
        u32 k, u32 x_rows, u32 n_tokens, u32 out_stride, u32 is_f32) {                                 \
        linear<tokens, stages, c>({out, n_rows, n_tokens, out_stride, is_f32}, weights, w_scales,      \
                                  {codes, x_scales, x_rows}, k);                                       \
    }                                                                                                  \
    EMU_KERNEL(name, .cluster = c)

LINEAR(linear100_32_c1, 32, 5, 1)
LINEAR(linear100_32_c2, 32, 5, 2)
LINEAR(linear100_32_c4, 32, 5, 4)
LINEAR(linear100_32_c8, 32, 5, 8)
LINEAR(linear100_128_c1, 128, 3, 1)
LINEAR(linear100_128_c2, 128, 3, 2)
LINEAR(linear100_128_c4, 128, 3, 4)
LINEAR(linear100_128_c8, 128, 3, 8)
