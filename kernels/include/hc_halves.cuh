// The two halves of a boundary between sublayers: mixing products with what a sublayer leaves, and from their
// sums to the next input. `hc/mix.cu` and `hc/pre.cu` are a launch for each, `hc/boundary.cu` has both; their
// headers say what goes in and comes out.
#pragma once

#include "hc.cuh"

constexpr u32 MIX_THREADS = SLICE_WARPS * WARP;
// Tokens of a tile of the product, tiles of a block.
constexpr u32 TILE_TOKENS = 16, TILES = 2, MIX_TOKENS = TILE_TOKENS * TILES;

struct MixShared {
    float sums[SLICE_WARPS][MIX_TOKENS][MIX + 1];
};

template <u32 Mix, bool Post>
INLINE void mix(const bf16* x, const float* fn, float* partial, Output output, const float* post,
                const float* comb, bf16* x_out, u32 width, u32 n_tokens) {
    MixShared& s = shared<MixShared>();
    const u32 lane = lane_id(), g = lane / 4, quad = lane % 4, first_token = blockIdx.y * MIX_TOKENS;
    const u32 channel = blockIdx.x * SLICE + warp_id() * 32 + 8 * quad;
    // A row of this block's part of `fn` for each of the first threads.
    const u32 first_channel = blockIdx.x * SLICE, n_channels = min_u32(SLICE, width - first_channel);
    if (threadIdx.x < Mix * HC)
        prefetch(fn + static_cast<u64>(threadIdx.x) * width + first_channel, n_channels * 4);
    dependency_wait();
    x = after_wait(x), post = after_wait(post), comb = after_wait(comb), output.y = after_wait(output.y);
    output.parts = after_wait(output.parts), output.order = after_wait(output.order);
    u32x4 a[TILES][HC][2] = {};
    float squares[TILES][2] = {};
    UNROLL
    for (u32 tile = 0; tile < TILES; ++tile)
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            const u64 token = first_token + tile * TILE_TOKENS + g + 8 * r;
            if (token >= n_tokens || channel >= width) continue;
            float v[HC][8];
            UNROLL
            for (u32 j = 0; j < HC; ++j) load8(x + (token * HC + j) * width + channel, v[j]);
            if (Post) {
                float from[8];
                output.load(token, width, channel, from);
                add_output(from, post + token * HC, comb + token * HC * HC, v);
            }
            UNROLL
            for (u32 j = 0; j < HC; ++j) {
                a[tile][j][r] = pack8(v[j]);
                if (Post) *reinterpret_cast<u32x4*>(x_out + (token * HC + j) * width + channel) = a[tile][j][r];
                UNROLL
                for (u32 k = 0; k < 8; ++k) squares[tile][r] = fma_rn(v[j][k], v[j][k], squares[tile][r]);
            }
        }

    float d[TILES][ceil_div(Mix, 8)][4] = {};
    const u32 n_tiles = first_token + TILE_TOKENS < n_tokens ? 2 : 1;
    mix_products(a, n_tiles, [&](u32 row, u32 j, u32 step) {
        const float* from = fn + (static_cast<u64>(row) * HC + j) * width + channel + 4 * step;
        return row < Mix && channel < width ? *reinterpret_cast<const f32x4*>(from) : f32x4{};
    }, d);
    UNROLL
    for (u32 tile = 0; tile < TILES; ++tile)
        UNROLL
        for (u32 r = 0; r < 2; ++r)
            store_sums<Mix>(d[tile], r, squares[tile][r], s.sums[warp_id()][tile * TILE_TOKENS + g + 8 * r]);
    named_sync<2>(MIX_THREADS);
    for (u32 i = threadIdx.x; i < MIX_TOKENS * (Mix + 1); i += MIX_THREADS) {
        const u32 token = i / (Mix + 1), column = i % (Mix + 1);
        if (first_token + token >= n_tokens) break;
        float sum = s.sums[0][token][column];
        UNROLL
        for (u32 warp = 1; warp < SLICE_WARPS; ++warp) sum = add_rn(sum, s.sums[warp][token][column]);
        partial[(static_cast<u64>(first_token + token) * gridDim.x + blockIdx.x) * (Mix + 1) + column] = sum;
    }
}

constexpr u32 PRE_THREADS = 256, PRE_WARPS = PRE_THREADS / WARP, MAX_CHUNKS = 4, MAX_SLICES = MAX_CHUNKS * PRE_THREADS * PER_THREAD / SLICE;

struct PreShared {
    float squares[MAX_SLICES];
    float mixes[MIX + 1];
    float pre[HC];
};

// The sums over all splits, two by each warp at a time.
INLINE void add_splits(const float* partial, u32 n_mix, u32 n_splits, float* mixes) {
    const u32 group = lane_id() % GROUPS, per = ceil_div(n_splits, GROUPS);
    const u32 end = min_u32(n_splits, (group + 1) * per);
    for (u32 first = 2 * warp_id(); first <= n_mix; first += 2 * PRE_WARPS) {
        const u32 column = first + lane_id() / GROUPS;
        float sum = 0.0f;
        for (u32 split = group * per; split < end && column <= n_mix; ++split)
            sum = add_rn(sum, partial[split * (n_mix + 1) + column]);
        sum = sum_of_groups(sum);
        if (group == 0 && column <= n_mix) mixes[column] = sum;
    }
}

template <bool Head>
INLINE void pre(u32 token, const float* partial, const bf16* x, const float* base, const float* scale,
                const float* weight, bf16* normed, bf16* quantised, float* post, float* comb,
                u32 width, u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    constexpr u32 N_MIX = Head ? HC : MIX;
    PreShared& s = shared<PreShared>();
    const u32 t = threadIdx.x, lane = lane_id();
    x += static_cast<u64>(token) * HC * width;
    if (t < PRE_THREADS) add_splits(partial + static_cast<u64>(token) * n_splits * (N_MIX + 1), N_MIX, n_splits, s.mixes);
    block_sync();
    const float g = mix_factor(s.mixes[N_MIX], width, mix_eps);
    if (!Head && t >= PRE_THREADS) {
        if (lane < HC) post[token * HC + lane] = post_of(mul_rn(s.mixes[HC + lane], g), scale, base, HC + lane);
        const u32 element = lane % (HC * HC);
        const float c = sinkhorn(mul_rn(s.mixes[8 + element], g), scale[2], base[8 + element], n_iters, hc_eps);
        if (lane < HC * HC) comb[token * HC * HC + lane] = c;
        return;
    }
    if (t < HC) s.pre[t] = pre_of(mul_rn(s.mixes[t], g), scale, base, t, hc_eps);
    named_sync<1>(PRE_THREADS);

    float v[MAX_CHUNKS][8] = {};
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * PRE_THREADS + t) * PER_THREAD;
        if ((chunk * PRE_THREADS + warp_id() * WARP) * PER_THREAD >= width) break; // the same for the warp
        float squares = 0.0f;
        if (i < width) {
            float copies[HC][8];
            UNROLL
            for (u32 j = 0; j < HC; ++j) load8(x + j * width + i, copies[j]);
            collapse(s.pre, copies, v[chunk], squares);
        }
        UNROLL
        for (u32 lanes = 1; lanes < SLICE / PER_THREAD; lanes *= 2) squares = add_rn(squares, shfl_xor(squares, lanes));
        if (i % SLICE == 0) s.squares[i / SLICE] = squares;
    }
    named_sync<1>(PRE_THREADS);
    const u32 n_slices = ceil_div(width, SLICE), per = ceil_div(n_slices, GROUPS), group = lane % GROUPS;
    float squares = 0.0f;
    for (u32 slice = group * per; slice < min_u32(n_slices, (group + 1) * per); ++slice)
        squares = add_rn(squares, s.squares[slice]);
    const float x_mean = sum_of_groups(squares) / static_cast<float>(width);
    const float factor = div_rn(1.0f, sqrt_rn(x_mean + norm_eps));
    const u64 row = static_cast<u64>(token) * width;
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * PRE_THREADS + t) * PER_THREAD;
        if ((chunk * PRE_THREADS + warp_id() * WARP) * PER_THREAD >= width) break;
        if (i < width) {
            UNROLL
            for (u32 k = 0; k < 8; ++k) v[chunk][k] = mul_rn(mul_rn(v[chunk][k], factor), weight[i + k]);
            store8(normed + row + i, v[chunk]);
        }
        if (quantised == nullptr) continue;
        round8(v[chunk]);
        quantise_block128(v[chunk]);
        if (i < width) store8(quantised + row + i, v[chunk]);
    }
}
