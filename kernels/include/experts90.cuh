// The routed experts of a step on the pipeline of `pipeline90.cuh`: what `moe/experts90.cu` and
// `moe/experts90_wide.cu` instantiate. Their header says what goes in and comes out.
//
// Included by these two only.
#pragma once

#include "pipeline90.cuh"

constexpr u32 ITEM = 3, SEGMENTS = 2, CHANNELS_PER_TILE = 32;

struct Experts {
    const u8* tiles;
    const u32 *items, *n_items, *pairs;
    const float* weights; // gate_up
    bf16* out;
    u32 n_rows, k; // of a matrix: channels and width, or width and channels
    u32 top_k;
    float limit;
};

template <bool Down>
INLINE void store_item(const Experts& e, u32 tile, const u32* pairs, u32 count, u32 n, float (&sums)[4]) {
    const u32 lane = lane_id(), g = lane / 4, warp = warp_id() % 4;
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 token = 8 * n + 2 * (lane % 4) + i;
        if (token >= count) continue;
        const u64 pair = pairs[token];
        if (Down) {
            UNROLL
            for (u32 r = 0; r < 2; ++r) {
                const u32 row = tile * TILE_ROWS + warp * 16 + g + 8 * r;
                if (row < e.n_rows) e.out[pair * e.n_rows + row] = bf16_from_f32(sums[2 * r + i]);
            }
            continue;
        }
        // Row g of each 16 is a gate channel, row g + 8 its up channel.
        const u32 channel = tile * CHANNELS_PER_TILE + warp * 8 + g;
        if (channel >= e.n_rows) continue;
        const float gate = min_f32(round_bf16(sums[i]), e.limit);
        const float up = max_f32(min_f32(round_bf16(sums[2 + i]), e.limit), -e.limit);
        const float silu = mul_rn(gate, div_rn(1.0f, 1.0f + exp_f32(-gate)));
        e.out[pair * e.n_rows + channel] = bf16_from_f32(mul_rn(mul_rn(silu, up), e.weights[pair]));
    }
}

// The product of an item of up to N tokens, and its results.
template <bool Down, Format F, Share S, u32 N, class P, class R>
INLINE void run_item(P& s, R& ring, const Experts& e, const Work& work, u32 per, u32 tile, u32 n_tiles,
                     const u32* pairs, u32 count) {
    const u32 group = threadIdx.x / GROUP - 1;
    float sums[N / 2];
    multiply<F, S, N>(s, ring, work, group, per, nullptr, sums);
    if (S == Share::K) {
        add_groups<N>(s, group, sums);
        if (group == 1) return;
    } else {
        tile += group;
        if (tile >= n_tiles) return;
    }
    UNROLL
    for (u32 n = 0; n < N / 8; ++n) {
        float four[4] = {sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]};
        store_item<Down>(e, tile, pairs, count, n, four);
    }
}

// `rows` is x or h in bf16 (N = 8), else `x` its tiles.
template <bool Down, Format F, Share S, u32 N, u32 Stages>
INLINE void experts(Experts e, const bf16* rows, const XTiles& x) {
    using P = Pipeline<F, S, N, Stages>;
    P& s = shared<P>();
    dependency_trigger();
    pipeline_start(s, S == Share::K ? FILL_WARPS : 1);
    if (S == Share::Rows) clear_x(s);
    // Which weights are read is decided by a launch before.
    dependency_wait();
    e.items = after_wait(e.items), e.n_items = after_wait(e.n_items), e.pairs = after_wait(e.pairs);
    e.weights = after_wait(e.weights), rows = after_wait(rows);
    const u32 n_blocks = ceil_div(e.k, K_BLOCK), per = per_segment(n_blocks, SEGMENTS);
    const u32 n_tiles = ceil_div(e.n_rows, Down ? TILE_ROWS : CHANNELS_PER_TILE);
    const u32 n_units = S == Share::K ? n_tiles : ceil_div(n_tiles, 2);
    const u32 n_work = e.n_items[0] * n_units;
    const u64 expert_bytes = static_cast<u64>(n_tiles) * n_blocks * tile_bytes<F>;
    const u32 warp = warp_id();
    Ring<Stages> ring;
    // Each role has a loop of its own, so that the compiler can count its registers alone.
    const auto for_each_item = [&](const auto& role) {
        for (u32 at = blockIdx.x; at < n_work; at += gridDim.x) {
            const u32* item = e.items + at / n_units * ITEM;
            const u32 tile = at % n_units * (S == Share::K ? 1 : 2);
            const u8* tiles = e.tiles + item[0] * expert_bytes;
            const Work work = S == Share::K
                                  ? share_k(tiles + static_cast<u64>(tile) * n_blocks * tile_bytes<F>,
                                            tile_bytes<F>, n_blocks, per, 0)
                                  : share_rows(tiles, tile_bytes<F>, n_blocks, tile, n_tiles);
            role(work, tile, item[1], item[2]);
        }
    };
    if (warp < 4) {
        if (S == Share::Rows) give_up_registers<40>();
        if (warp == 0 && elect()) {
            for_each_item([&](const Work& work, u32, u32, u32) {
                copy_weights<F>(s, ring, work, [&](u8* to, u32 group, u32 i, u64* full) {
                    bulk_load<true>(to, of_group(work.tiles, group) + static_cast<u64>(i) * tile_bytes<F>, tile_bytes<F>, full);
                });
            });
        } else if (S == Share::K && warp > 0) {
            for_each_item([&](const Work& work, u32, u32 first, u32 count) {
                fill_x(s, ring, work, e.k, [&](u32 token) -> const bf16* {
                    if (token >= count) return nullptr;
                    const u32 pair = e.pairs[first + token];
                    return rows + static_cast<u64>(Down ? pair : pair / e.top_k) * e.k;
                });
            });
        } else if (S == Share::Rows && warp == 1 && elect()) {
            for_each_item([&](const Work& work, u32, u32 first, u32 count) {
                copy_x<S>(s, ring, work, x, first, ceil_div(count, 8) * 8);
            });
        }
        return;
    }
    if (S == Share::Rows) take_registers<232>();
    for_each_item([&](const Work& work, u32 tile, u32 first, u32 count) {
        const auto run = [&](auto n) {
            run_item<Down, F, S, decltype(n)::value>(s, ring, e, work, per, tile, n_tiles, e.pairs + first, count);
        };
        if constexpr (N == 8) {
            run(Constant<8>());
        } else {
            if (count <= 8) run(Constant<8>());
            else if (count <= 32) run(Constant<32>());
            else if (count <= 64) run(Constant<64>());
            else run(Constant<128>());
        }
    });
}

// `per_sm`: blocks that must fit on a multiprocessor, for a launch that begins beside the one before it.
#define GATE_UP(name, per_sm, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, per_sm) name(                      \
        const u8* __restrict__ tiles, const u32* __restrict__ items, const u32* __restrict__ n_items, \
        const u32* __restrict__ pairs, const bf16* __restrict__ rows, const u8* __restrict__ codes,   \
        const float* __restrict__ scales, u32 x_rows, const float* __restrict__ weights,              \
        bf16* __restrict__ h, u32 channels, u32 width, u32 top_k, float limit) {                      \
        experts<false, __VA_ARGS__>(                                                                  \
            {tiles, items, n_items, pairs, weights, h, channels, width, top_k, limit}, rows,          \
            {codes, scales, x_rows});                                                                 \
    }                                                                                                 \
    EMU_KERNEL(name)
#define DOWN(name, per_sm, ...)                                                                       \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, per_sm) name(                      \
        const u8* __restrict__ tiles, const u32* __restrict__ items, const u32* __restrict__ n_items, \
        const u32* __restrict__ pairs, const bf16* __restrict__ rows, const u8* __restrict__ codes,   \
        const float* __restrict__ scales, u32 x_rows, bf16* __restrict__ out, u32 width,              \
        u32 channels) {                                                                               \
        experts<true, __VA_ARGS__>({tiles, items, n_items, pairs, nullptr, out, width, channels, 1, 0.0f}, \
                                   rows, {codes, scales, x_rows});                                    \
    }                                                                                                 \
    EMU_KERNEL(name)
