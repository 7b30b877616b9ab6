// Dense layers on the pipeline of `pipeline90.cuh`: what `linear/linear90.cu`, `linear/linear90_bf16.cu`
// and `linear/queries90.cu` instantiate. Their headers say what goes in and comes out.
//
// Included by these only.
#pragma once

#include "pipeline90.cuh"

struct Linear {
    const float* w_scales;
    void* out;
    u32 n_rows, k, n_tokens, out_stride, is_f32;
    u32 group = 0; // its rows of W, columns of x and of out come after those of the groups before
};

// Where x is: rows of bf16, or tiles of `act_quant_tiles`, or a map of rows of bf16.
struct Input {
    const bf16* rows;
    u32 stride;
    XTiles tiles;
    const TensorMap* map;
};

// Sums of one row tile for tokens `first_token ..+ count`.
template <u32 N>
INLINE void store_tile(const Linear& l, u32 tile, u32 first_token, u32 count, const float (&sums)[N / 2]) {
    const u32 lane = lane_id(), row = tile * TILE_ROWS + warp_id() % 4 * 16 + lane / 4;
    UNROLL
    for (u32 i = 0; i < N / 2; ++i) {
        const u32 token = i / 4 * 8 + 2 * (lane % 4) + i % 2, at_row = row + i / 2 % 2 * 8;
        if (token >= count || at_row >= l.n_rows) continue;
        const u64 at = static_cast<u64>(first_token + token) * l.out_stride + l.group * l.n_rows + at_row;
        if (l.is_f32) static_cast<float*>(l.out)[at] = sums[i];
        else static_cast<bf16*>(l.out)[at] = bf16_from_f32(sums[i]);
    }
}

// All blocks of the cluster have multiplied; the memory of their pipelines is free.
INLINE void meet() { cluster_arrive(), cluster_wait(); }

// The scales of a row tile.
INLINE const float* scales_of(const Linear& l, u32 tile, u32 n_blocks) {
    return l.w_scales + static_cast<u64>(l.group * (l.n_rows / K_BLOCK) + tile / 2) * n_blocks;
}

// Warp 0: the tiles of `tile` (Share::Rows: and of the next) from the matrix.
template <Format F, Share S, bool Once, class P, class R>
INLINE void copy_matrix(P& s, R& ring, const Linear& l, const Work& work, const TensorMap& weights, u32 tile) {
    copy_weights<F>(s, ring, work, [&](u8* to, u32 group, u32 i, u64* full) {
        const u32 row = l.group * l.n_rows + (tile + (S == Share::Rows ? group : 0)) * TILE_ROWS;
        const u32 at[2] = {(of_group(work.first_block, group) + i) * k_block<F>, row};
        tensor_load<Once>(to, weights, at, full);
    });
}

// Share::K: row tile `tile`, a segment of K for each of the 2 C groups of the cluster.
template <Format F, u32 N, u32 Stages, u32 Cluster>
INLINE void split(const Linear& l, const TensorMap& weights, const Input& x, u32 tile) {
    constexpr bool FROM_ROWS = F == Format::Fp8 && N == 8;
    using P = Pipeline<F, Share::K, N, Stages>;
    static_assert((2 * Cluster - 1) * sizeof(float) * N / 2 * GROUP <= sizeof(P::w) + sizeof(P::x));
    P& s = shared<P>();
    const u32 rank = Cluster == 1 ? 0 : cluster_rank();
    const u32 first_token = blockIdx.y * N, count = min_u32(N, l.n_tokens - first_token);
    const u32 n_blocks = ceil_div(l.k, k_block<F>), per = per_segment(n_blocks, 2 * Cluster), warp = warp_id();
    const Work work = share_k(nullptr, 0, n_blocks, per, 2 * rank);
    Ring<Stages> ring;
    pipeline_start(s, FROM_ROWS ? FILL_WARPS : 1);
    if (F == Format::Fp8 && !FROM_ROWS) clear_x(s);
    dependency_trigger();
    if (warp < 4) {
        if (warp == 0 && elect()) {
            copy_matrix<F, Share::K, true>(s, ring, l, work, weights, tile);
        } else if (FROM_ROWS && warp > 0) {
            dependency_wait();
            const bf16* rows = after_wait(x.rows);
            if constexpr (FROM_ROWS)
                fill_x(s, ring, work, l.k, [&](u32 token) -> const bf16* {
                    return token < count ? rows + static_cast<u64>(first_token + token) * x.stride : nullptr;
                });
        } else if (!FROM_ROWS && warp == 1 && elect()) {
            dependency_wait();
            if constexpr (F == Format::Fp8) copy_x<Share::K>(s, ring, work, x.tiles, first_token, ceil_div(count, 8) * 8);
            else copy_x_panels<F, Share::K, N>(s, ring, work, *x.map, l.group * l.k, first_token);
        }
        warp_sync();
        if (Cluster > 1) meet(), meet();
        return;
    }
    const u32 group = warp / 4 - 1;
    float sums[N / 2];
    multiply<F, Share::K, N>(s, ring, work, group, per, scales_of(l, tile, n_blocks), sums);
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
template <Format F, u32 Stages>
INLINE void whole(const Linear& l, const TensorMap& weights, const Input& x, u32 n_segments) {
    using P = Pipeline<F, Share::Rows, 128, Stages>;
    P& s = shared<P>();
    const u32 first_token = blockIdx.y * 128, count = min_u32(128, l.n_tokens - first_token);
    const u32 n_blocks = ceil_div(l.k, k_block<F>), n_tiles = ceil_div(l.n_rows, TILE_ROWS), warp = warp_id();
    const Work work = share_rows(nullptr, 0, n_blocks, 2 * blockIdx.x, n_tiles);
    Ring<Stages> ring;
    pipeline_start(s, 1);
    if (F == Format::Fp8) clear_x(s);
    dependency_trigger();
    if (warp < 4) {
        give_up_registers<40>();
        if (warp == 0 && elect()) {
            copy_matrix<F, Share::Rows, false>(s, ring, l, work, weights, 2 * blockIdx.x);
        } else if (warp == 1 && elect()) {
            dependency_wait();
            if constexpr (F == Format::Fp8) copy_x<Share::Rows>(s, ring, work, x.tiles, first_token, ceil_div(count, 8) * 8);
            else copy_x_panels<F, Share::Rows, 128>(s, ring, work, *x.map, l.group * l.k, first_token);
        }
        return;
    }
    take_registers<232>();
    const u32 group = warp / 4 - 1, tile = 2 * blockIdx.x + group;
    const auto run = [&](auto n) {
        constexpr u32 N = decltype(n)::value;
        float sums[N / 2];
        multiply<F, Share::Rows, N, 128>(s, ring, work, group, per_segment(n_blocks, n_segments),
                                              scales_of(l, tile, n_blocks), sums);
        if (tile >= n_tiles) return;
        dependency_wait();
        store_tile<N>(l, tile, first_token, count, sums);
    };
    if (count <= 8) run(Constant<8>());
    else if (count <= 64) run(Constant<64>());
    else run(Constant<128>());
}
