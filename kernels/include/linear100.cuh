// Dense layers on the pipeline of `pipeline100.cuh`: what `linear/linear100.cu` and
// `linear/linear100_bf16.cu` instantiate. Their headers say what goes in and comes out.
//
// K is cut into segments, fixed by the matrices: each is one chain of products in tensor memory, and they
// are added in order. The blocks of a cluster have a segment each and add up a part of the tokens each, or
// one block has all of them side by side in tensor memory: the same bits.
//
// Included by these only.
#pragma once

#include "pipeline100.cuh"

struct Linear {
    void* out;
    u32 n_rows, n_tokens, out_stride, is_f32;
    u32 group = 0; // its rows of W, columns of x and of out come after those of the groups before
};

INLINE void store(const Linear& l, u32 row, u32 token, float sum) {
    if (row >= l.n_rows || token >= l.n_tokens) return;
    const u64 at = static_cast<u64>(token) * l.out_stride + l.group * l.n_rows + row;
    if (l.is_f32) static_cast<float*>(l.out)[at] = sum;
    else static_cast<bf16*>(l.out)[at] = bf16_from_f32(sum);
}

// All blocks of the cluster are here.
INLINE void meet() { cluster_arrive(), cluster_wait(); }

// The part of a row tile's product that falls to this block. `tile`: of all groups' tiles. `unit`: of what
// tokens are a multiple.
template <u32 N, u32 Cluster, u32 Segments>
INLINE Work work_of(const Linear& l, const u8* w_scales, u32 k, u32 tile, u32 unit) {
    static_assert(Cluster == 1 || Segments == 1);
    const u32 rank = Cluster == 1 ? 0 : cluster_rank();
    const u32 n_all = ceil_div(k, K_BLOCK), per = ceil_div(n_all, Cluster * Segments), start = min_u32(rank * per, n_all);
    const u32 first = blockIdx.y * N, n = ceil_div(min_u32(N, l.n_tokens - first), unit) * unit;
    return {w_scales + static_cast<u64>(tile) * n_all * SCALES, first, n, start, min_u32(per * Segments, n_all - start), per};
}

// Warps 4 to 6 have fed the pipeline.
template <u32 Cluster>
INLINE void let_others_add() {
    if (Cluster > 1) meet(), meet();
}

// Warps 0 to 3, behind `dependency_wait`: the sums of rows from `first_row` on.
template <u32 Cluster, class P>
INLINE void store_sums(P& s, const Linear& l, const Work& work, u32 first_row) {
    constexpr u32 N = P::TOKENS;
    // Sums of a part of the tokens, from each block of the cluster.
    constexpr u32 PART = ceil_div(N, Cluster);
    const u32 row = threadIdx.x % TILE_ROWS, at_row = first_row + row;
    if constexpr (Cluster == 1) {
        for_sums(s, work, [&](u32 token, const float (&v)[8]) {
            UNROLL
            for (u32 i = 0; i < 8; ++i) store(l, at_row, work.first + token + i, v[i]);
        });
    } else {
        static_assert(Cluster * PART * TILE_ROWS * sizeof(float) <= sizeof(P::w) + sizeof(P::x));
        const u32 rank = cluster_rank(), part = ceil_div(work.n, Cluster);
        float* exchange = reinterpret_cast<float*>(s.w);
        // The memory of the pipelines is free once all have multiplied.
        mbarrier_wait(&s.done, 0);
        meet();
        for_sums(s, work, [&](u32 token, const float (&v)[8]) {
            UNROLL
            for (u32 i = 0; i < 8; ++i)
                cluster_store(exchange + (rank * PART + (token + i) % part) * TILE_ROWS + row, (token + i) / part, v[i]);
        });
        meet();
        for (u32 i = 0; i < min_u32(part, work.n - min_u32(work.n, rank * part)); ++i) {
            float sum = exchange[i * TILE_ROWS + row];
            for (u32 segment = 1; segment < Cluster; ++segment)
                sum = add_rn(sum, exchange[(segment * PART + i) * TILE_ROWS + row]);
            store(l, at_row, work.first + rank * part + i, sum);
        }
    }
}
