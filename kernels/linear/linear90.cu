// linear90_*: FP8 linear layers on tensor cores in FP8, `out = x W^T`.
//
// Source   `fp8_gemm` (block scales 128 x 128, activations per 128) of the official release.
// Inputs   tiles of `linear_pack_fp8`    w_scales [ceil(n_rows / 128), ceil(k / 128)] f32
//          _8: x, token m's bf16 values begin at x + m x_stride; quantised on the way
//          _64, _128: tiles of `act_quant_tiles`
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
// Launch   384 threads. _8, _64 (tokens of a block): grid (C ceil(n_rows / 64), ceil(n_tokens / _)) in
//          clusters of C = 1, 2 or 4 (_c1, ...), which split K and add up in shared memory of their
//          first block: for matrices with few rows. _128: grid (ceil(n_rows / 128),
//          ceil(n_tokens / 128)), `n_segments` = 2 C of the form for few tokens: C belongs to the
//          matrix, so the order of addition is the same in all.
//          May start before the launch before it has ended: weights come first.
// Limit    memory for few tokens: every weight byte is read once per row of blocks.
// Arch     sm_90a.
// CPU twin `CpuLinear::matmul`: the same blocks of 128, within K f32 roundings, then 1 bf16 ulp.

#include "../include/pipeline90.cuh"

struct Linear {
    const u8* tiles;
    const float* w_scales;
    void* out;
    u32 n_rows, k, n_tokens, out_stride, is_f32;
};

// Sums of one row tile for tokens `first_token ..+ count`.
template <u32 N>
INLINE void store_tile(const Linear& l, u32 tile, u32 first_token, u32 count, const float (&sums)[N / 2]) {
    const u32 lane = lane_id(), row = tile * TILE_ROWS + warp_id() % 4 * 16 + lane / 4;
    UNROLL
    for (u32 i = 0; i < N / 2; ++i) {
        const u32 token = i / 4 * 8 + 2 * (lane % 4) + i % 2, at_row = row + i / 2 % 2 * 8;
        if (token >= count || at_row >= l.n_rows) continue;
        const u64 at = static_cast<u64>(first_token + token) * l.out_stride + at_row;
        if (l.is_f32) static_cast<float*>(l.out)[at] = sums[i];
        else static_cast<bf16*>(l.out)[at] = bf16_from_f32(sums[i]);
    }
}

// All blocks of the cluster have multiplied; the memory of their pipelines is free.
INLINE void meet() { cluster_arrive(), cluster_wait(); }

// The scales of a row tile.
INLINE const float* scales_of(const Linear& l, u32 tile, u32 n_blocks) {
    return l.w_scales + static_cast<u64>(tile / 2) * n_blocks;
}

// Share::K: a row tile, a segment of K for each of the 2 C groups of the cluster.
template <u32 N, u32 Stages, u32 Cluster>
INLINE void split(const Linear& l, const bf16* rows, u32 x_stride, const XTiles& x) {
    constexpr bool FROM_ROWS = N == 8;
    using P = Pipeline<Format::Fp8, Share::K, N, Stages>;
    static_assert((2 * Cluster - 1) * sizeof(float) * N / 2 * GROUP <= sizeof(P::w) + sizeof(P::x));
    P& s = shared<P>();
    const u32 rank = Cluster == 1 ? 0 : cluster_rank(), tile = blockIdx.x / Cluster;
    const u32 first_token = blockIdx.y * N, count = min_u32(N, l.n_tokens - first_token);
    const u32 n_blocks = ceil_div(l.k, K_BLOCK), per = per_segment(n_blocks, 2 * Cluster), warp = warp_id();
    const Work work = share_k(l.tiles + static_cast<u64>(tile) * n_blocks * FP8_TILE, FP8_TILE, n_blocks, per, 2 * rank);
    Ring<Stages> ring;
    pipeline_start(s, FROM_ROWS ? FILL_WARPS : 1);
    if (!FROM_ROWS) clear_x(s);
    dependency_trigger();
    if (warp < 4) {
        if (warp == 0 && elect()) {
            copy_weights<Format::Fp8, true>(s, ring, work);
        } else if (FROM_ROWS && warp > 0) {
            dependency_wait();
            if constexpr (FROM_ROWS)
                fill_x(s, ring, work, l.k, [&](u32 token) -> const bf16* {
                    return token < count ? rows + static_cast<u64>(first_token + token) * x_stride : nullptr;
                });
        } else if (!FROM_ROWS && warp == 1 && elect()) {
            dependency_wait();
            copy_x<Share::K>(s, ring, work, x, first_token, ceil_div(count, 8) * 8);
        }
        warp_sync();
        if (Cluster > 1) meet(), meet();
        return;
    }
    const u32 group = warp / 4 - 1;
    float sums[N / 2];
    multiply<Format::Fp8, Share::K, N>(s, ring, work, group, per, scales_of(l, tile, n_blocks), sums);
    if constexpr (Cluster == 1) {
        add_groups<N>(s, group, sums);
    } else {
        // Sums of segment i > 0 of the cluster's 2 C, at i - 1, in the first block's memory.
        float* exchange = reinterpret_cast<float*>(&s) + threadIdx.x % GROUP;
        const u32 segment = 2 * rank + group;
        meet();
        UNROLL
        for (u32 r = 0; r < N / 2; ++r)
            if (segment > 0) cluster_store(exchange + ((segment - 1) * (N / 2) + r) * GROUP, 0, sums[r]);
        meet();
        if (segment > 0) return;
        for (u32 i = 0; i + 1 < 2 * Cluster; ++i)
            UNROLL
            for (u32 r = 0; r < N / 2; ++r) sums[r] = add_rn(sums[r], exchange[(i * (N / 2) + r) * GROUP]);
    }
    if (rank > 0 || group > 0) return;
    dependency_wait();
    store_tile<N>(l, tile, first_token, count, sums);
}

// Share::Rows: two row tiles, up to 128 tokens.
template <u32 Stages>
INLINE void whole(const Linear& l, const XTiles& x, u32 n_segments) {
    using P = Pipeline<Format::Fp8, Share::Rows, 128, Stages>;
    P& s = shared<P>();
    const u32 first_token = blockIdx.y * 128, count = min_u32(128, l.n_tokens - first_token);
    const u32 n_blocks = ceil_div(l.k, K_BLOCK), n_tiles = ceil_div(l.n_rows, TILE_ROWS), warp = warp_id();
    const Work work = share_rows(l.tiles, FP8_TILE, n_blocks, 2 * blockIdx.x, n_tiles);
    Ring<Stages> ring;
    pipeline_start(s, 1);
    clear_x(s);
    dependency_trigger();
    if (warp < 4) {
        give_up_registers<40>();
        if (warp == 0 && elect()) {
            copy_weights<Format::Fp8, false>(s, ring, work);
        } else if (warp == 1 && elect()) {
            dependency_wait();
            copy_x<Share::Rows>(s, ring, work, x, first_token, ceil_div(count, 8) * 8);
        }
        return;
    }
    take_registers<232>();
    const u32 group = warp / 4 - 1, tile = 2 * blockIdx.x + group;
    const auto run = [&](auto n) {
        constexpr u32 N = decltype(n)::value;
        float sums[N / 2];
        multiply<Format::Fp8, Share::Rows, N>(s, ring, work, group, per_segment(n_blocks, n_segments),
                                              scales_of(l, tile, n_blocks), sums);
        if (tile >= n_tiles) return;
        dependency_wait();
        store_tile<N>(l, tile, first_token, count, sums);
    };
    if (count <= 8) run(Constant<8>());
    else if (count <= 64) run(Constant<64>());
    else run(Constant<128>());
}

#define LINEAR(name, cluster, body)                                                                    \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 1) cluster name(                    \
        const u8* __restrict__ tiles, const float* __restrict__ w_scales,                               \
        [[maybe_unused]] const bf16* __restrict__ rows,                                                \
        const u8* __restrict__ codes, const float* __restrict__ x_scales, void* __restrict__ out,      \
        u32 n_rows, u32 k, [[maybe_unused]] u32 x_stride, u32 x_rows, u32 n_tokens, u32 out_stride,    \
        u32 is_f32, [[maybe_unused]] u32 n_segments) {                                                 \
        const Linear l = {tiles, w_scales, out, n_rows, k, n_tokens, out_stride, is_f32};              \
        const XTiles x = {codes, x_scales, x_rows};                                                    \
        body;                                                                                          \
    }
#define SPLIT(name, tokens, stages, c)                                                                 \
    LINEAR(name, __cluster_dims__(c), (split<tokens, stages, c>(l, rows, x_stride, x)))                \
    EMU_KERNEL(name, .cluster = c, .dependent = true)

SPLIT(linear90_8_c1, 8, 6, 1)
SPLIT(linear90_8_c2, 8, 6, 2)
SPLIT(linear90_8_c4, 8, 6, 4)
SPLIT(linear90_64_c1, 64, 4, 1)
SPLIT(linear90_64_c2, 64, 4, 2)
SPLIT(linear90_64_c4, 64, 4, 4)
LINEAR(linear90_128, , whole<4>(l, x, n_segments))
EMU_KERNEL(linear90_128, .dependent = true)
