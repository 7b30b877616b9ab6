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

#include "../include/pipeline100.cuh"

struct Linear {
    void* out;
    u32 n_rows, n_tokens, out_stride, is_f32;
};

INLINE void store(const Linear& l, u32 row, u32 token, float sum) {
    if (row >= l.n_rows || token >= l.n_tokens) return;
    const u64 at = static_cast<u64>(token) * l.out_stride + row;
    if (l.is_f32) static_cast<float*>(l.out)[at] = sum;
    else static_cast<bf16*>(l.out)[at] = bf16_from_f32(sum);
}

// All blocks of the cluster are here.
INLINE void meet() { cluster_arrive(), cluster_wait(); }

template <u32 N, u32 Stages, u32 Cluster>
INLINE void linear(const Linear& l, const TensorMap& weights, const u8* w_scales, const XTiles& x, u32 k) {
    using P = Pipeline<N, Stages>;
    // Sums of a part of the tokens, from each block of the cluster.
    constexpr u32 PART = ceil_div(N, Cluster);
    static_assert(Cluster * PART * TILE_ROWS * sizeof(float) <= sizeof(P::w) + sizeof(P::x));
    P& s = shared<P>();
    const u32 rank = Cluster == 1 ? 0 : cluster_rank(), tile = blockIdx.x / Cluster;
    const u32 n_all = ceil_div(k, K_BLOCK), per = ceil_div(n_all, Cluster), start = min_u32(rank * per, n_all);
    const u32 first = blockIdx.y * N, n = ceil_div(min_u32(N, l.n_tokens - first), 8) * 8;
    const Work work = {w_scales + static_cast<u64>(tile) * n_all * SCALES, first, n, start, min_u32(per, n_all - start)};
    pipeline_start(s);
    dependency_trigger();
    const u32 row = threadIdx.x % TILE_ROWS, at_row = tile * TILE_ROWS + row, part = ceil_div(n, Cluster);
    float* exchange = reinterpret_cast<float*>(&s);
    if (warp_id() >= STORE_WARPS) {
        feed<Format::Fp8>(
            s, work, x,
            [&](u8* to, u32 column, u64* full) {
                const u32 at[2] = {column, tile * TILE_ROWS};
                tensor_load<true>(to, weights, at, full);
            },
            [] { dependency_wait(); });
        if (Cluster > 1) meet(), meet();
    } else if constexpr (Cluster == 1) {
        dependency_wait();
        for_sums(s, work, [&](u32 token, const float (&v)[8]) {
            UNROLL
            for (u32 i = 0; i < 8; ++i) store(l, at_row, first + token + i, v[i]);
        });
    } else {
        dependency_wait();
        // The memory of the pipelines is free once all have multiplied.
        mbarrier_wait(&s.done, 0);
        meet();
        for_sums(s, work, [&](u32 token, const float (&v)[8]) {
            UNROLL
            for (u32 i = 0; i < 8; ++i)
                cluster_store(exchange + (rank * PART + (token + i) % part) * TILE_ROWS + row, (token + i) / part, v[i]);
        });
        meet();
        for (u32 i = 0; i < min_u32(part, n - min_u32(n, rank * part)); ++i) {
            float sum = exchange[i * TILE_ROWS + row];
            for (u32 segment = 1; segment < Cluster; ++segment)
                sum = add_rn(sum, exchange[(segment * PART + i) * TILE_ROWS + row]);
            store(l, at_row, first + rank * part + i, sum);
        }
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
