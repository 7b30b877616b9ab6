// hc_mix, hc_post_mix, hc_post: the products that mix the four copies, and what a sublayer adds.
//
// Source   `Block.hc_pre` (its matrix product), `Block.hc_post` of the official release.
// Inputs   x [n_tokens, 4, width] bf16    fn [n_mix, 4 width] f32, n_mix 24 or 4
//          y [n_tokens, width] bf16, or with top_k > 0 what is added to it: parts [n_tokens, top_k,
//          width] bf16 and order [n_tokens, top_k] u32 of `moe_route`    post [n_tokens, 4] f32    comb [n_tokens, 4, 4] f32
// Outputs  partial [n_tokens, n_splits, n_mix + 1] f32: sums over 128 channels of all four copies of
//          `fn x`, last the sum of squares of x
//          hc_post_mix, hc_post: x_out = bf16(post y + comb^T x); partial is of x_out
// Launch   mix: grid (n_splits = ceil(width / 128), ceil(n_tokens / 32)), 128 threads; a warp has 32
//          channels of all copies. hc_post: grid (ceil(width / 1024), n_tokens), 128 threads. Width is
//          a multiple of 8. Nothing depends on the number of tokens; `hc_pre` adds the splits in order.
//          On tensor cores: an f32 weight is the sum of three bf16 numbers, exactly, and x is bf16, so
//          every product is exact and only sums round.
// Limit    one token: fn (n_mix * 16 width bytes). Many: x read once, x_out written once, and fn read
//          from the second-level cache once per 32 tokens.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::hc`: x_out equal bits; mixes in another order of f32 additions, 1e-5 of the
//          sum of magnitudes.

#include "../include/hc.cuh"

constexpr u32 THREADS = SLICE_WARPS * WARP;
// Tokens of a tile of the product, tiles of a block.
constexpr u32 TILE_TOKENS = 16, TILES = 2, TOKENS = TILE_TOKENS * TILES;

struct MixShared {
    float sums[SLICE_WARPS][TOKENS][MIX + 1];
};

template <u32 Mix, bool Post>
INLINE void mix(const bf16* x, const float* fn, float* partial, Output output, const float* post,
                const float* comb, bf16* x_out, u32 width, u32 n_tokens) {
    MixShared& s = shared<MixShared>();
    const u32 lane = lane_id(), g = lane / 4, quad = lane % 4, first_token = blockIdx.y * TOKENS;
    const u32 channel = blockIdx.x * SLICE + warp_id() * 32 + 8 * quad;
    dependency_trigger();
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
    block_sync();
    for (u32 i = threadIdx.x; i < TOKENS * (Mix + 1); i += THREADS) {
        const u32 token = i / (Mix + 1), column = i % (Mix + 1);
        if (first_token + token >= n_tokens) break;
        float sum = s.sums[0][token][column];
        UNROLL
        for (u32 warp = 1; warp < SLICE_WARPS; ++warp) sum = add_rn(sum, s.sums[warp][token][column]);
        partial[(static_cast<u64>(first_token + token) * gridDim.x + blockIdx.x) * (Mix + 1) + column] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) hc_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 n_tokens) {
    mix<24, false>(x, fn, partial, {}, nullptr, nullptr, nullptr, width, n_tokens);
}
EMU_KERNEL(hc_mix)

// The same for a head's four mixes.
extern "C" __global__ void __launch_bounds__(THREADS) hc_mix_head(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 n_tokens) {
    mix<4, false>(x, fn, partial, {}, nullptr, nullptr, nullptr, width, n_tokens);
}
EMU_KERNEL(hc_mix_head)

extern "C" __global__ void __launch_bounds__(THREADS) hc_post_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    const bf16* __restrict__ y, const float* __restrict__ post, const float* __restrict__ comb,
    bf16* __restrict__ x_out, u32 width, u32 n_tokens, const bf16* __restrict__ parts,
    const u32* __restrict__ order, u32 top_k) {
    mix<24, true>(x, fn, partial, {y, parts, order, top_k}, post, comb, x_out, width, n_tokens);
}
EMU_KERNEL(hc_post_mix)

extern "C" __global__ void __launch_bounds__(THREADS) hc_post(
    const bf16* __restrict__ x, const bf16* __restrict__ y, const float* __restrict__ post,
    const float* __restrict__ comb, bf16* __restrict__ x_out, u32 width, const bf16* __restrict__ parts,
    const u32* __restrict__ order, u32 top_k) {
    dependency_begin(x, y, post, comb, parts, order);
    const u32 channel = (blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    const u64 token = blockIdx.y;
    if (channel >= width) return;
    float v[HC][8], from[8];
    UNROLL
    for (u32 j = 0; j < HC; ++j) load8(x + (token * HC + j) * width + channel, v[j]);
    Output{y, parts, order, top_k}.load(token, width, channel, from);
    add_output(from, post + token * HC, comb + token * HC * HC, v);
    UNROLL
    for (u32 j = 0; j < HC; ++j) store8(x_out + (token * HC + j) * width + channel, v[j]);
}
EMU_KERNEL(hc_post)
