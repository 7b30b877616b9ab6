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

#include "../include/rows.cuh"

constexpr u32 THREADS = 128, WARPS = THREADS / WARP, HC = 4, SLICE = 128;
// Tokens of a tile of the product, tiles of a block.
constexpr u32 TILE_TOKENS = 16, TILES = 2, TOKENS = TILE_TOKENS * TILES;

struct MixShared {
    float sums[WARPS][TOKENS][25];
};

// Eight channels of the four copies of a token after a sublayer's output `from`.
INLINE void add_output(const float (&from)[8], const float* post, const float* comb, float (&v)[HC][8]) {
    float mixed[HC][8];
    UNROLL
    for (u32 j = 0; j < HC; ++j) {
        const float p = post[j];
        // `comb` is used transposed: its first index is the source copy.
        const float* c = comb + j;
        UNROLL
        for (u32 k = 0; k < 8; ++k) {
            const float a = add_rn(mul_rn(c[0], v[0][k]), mul_rn(c[HC], v[1][k]));
            const float b = add_rn(a, mul_rn(c[2 * HC], v[2][k]));
            const float sum = add_rn(b, mul_rn(c[3 * HC], v[3][k]));
            mixed[j][k] = round_bf16(add_rn(mul_rn(p, from[k]), sum));
        }
    }
    UNROLL
    for (u32 j = 0; j < HC; ++j)
        UNROLL
        for (u32 k = 0; k < 8; ++k) v[j][k] = mixed[j][k];
}

// Four floats as the sum of three bf16 pairs of registers each: exact.
INLINE void split3(const f32x4& f, u32 (&parts)[3][2]) {
    float rest[4] = {f.v[0], f.v[1], f.v[2], f.v[3]};
    UNROLL
    for (u32 part = 0; part < 3; ++part)
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const u32 pair = pack_bf16x2(rest[2 * i], rest[2 * i + 1]);
            parts[part][i] = pair;
            rest[2 * i] = add_rn(rest[2 * i], -bf16_low(pair));
            rest[2 * i + 1] = add_rn(rest[2 * i + 1], -bf16_high(pair));
        }
}

// What a sublayer leaves: its output, or the experts' that make it up.
struct Output {
    const bf16 *y, *parts;
    const u32* order;
    u32 top_k; // 0: y is all

    INLINE void load(u64 token, u32 width, u32 channel, float (&v)[8]) const {
        if (top_k == 0) return load8(y + token * width + channel, v);
        load_combined8(y, parts, order, top_k, token, width, channel, v);
        round8(v);
    }
};

template <u32 Mix, bool Post>
INLINE void mix(const bf16* x, const float* fn, float* partial, Output output, const float* post,
                const float* comb, bf16* x_out, u32 width, u32 n_tokens) {
    MixShared& s = shared<MixShared>();
    const u32 lane = lane_id(), g = lane / 4, quad = lane % 4, first_token = blockIdx.y * TOKENS;
    // A lane's eight channels are two words of each of two products: which k a register stands for
    // follows from that, and `fn` is taken the same way.
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

    constexpr u32 ROW_TILES = ceil_div(Mix, 8);
    float d[TILES][ROW_TILES][4] = {};
    UNROLL
    for (u32 j = 0; j < HC; ++j)
        UNROLL
        for (u32 step = 0; step < 2; ++step)
            UNROLL
            for (u32 n = 0; n < ROW_TILES; ++n) {
                const u32 row = 8 * n + g;
                f32x4 f = {};
                if (row < Mix && channel < width)
                    f = *reinterpret_cast<const f32x4*>(fn + (static_cast<u64>(row) * HC + j) * width + channel + 4 * step);
                u32 parts[3][2];
                split3(f, parts);
                UNROLL
                for (u32 tile = 0; tile < TILES; ++tile) {
                    if (first_token + tile * TILE_TOKENS >= n_tokens) break; // the same for all threads
                    const u32x4(&rows)[2] = a[tile][j];
                    // The smallest part first.
                    UNROLL
                    for (u32 part = 3; part-- > 0;)
                        mma_bf16_16816(d[tile][n], rows[0].v[2 * step], rows[1].v[2 * step], rows[0].v[2 * step + 1],
                                       rows[1].v[2 * step + 1], parts[part][0], parts[part][1]);
                }
            }

    UNROLL
    for (u32 tile = 0; tile < TILES; ++tile)
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float(&out)[25] = s.sums[warp_id()][tile * TILE_TOKENS + g + 8 * r];
            UNROLL
            for (u32 n = 0; n < ROW_TILES; ++n)
                UNROLL
                for (u32 i = 0; i < 2; ++i)
                    if (8 * n + 2 * quad + i < Mix) out[8 * n + 2 * quad + i] = d[tile][n][2 * r + i];
            float sum = squares[tile][r];
            sum = add_rn(sum, shfl_xor(sum, 1));
            sum = add_rn(sum, shfl_xor(sum, 2));
            if (quad == 0) out[Mix] = sum;
        }
    block_sync();
    for (u32 i = threadIdx.x; i < TOKENS * (Mix + 1); i += THREADS) {
        const u32 token = i / (Mix + 1), column = i % (Mix + 1);
        if (first_token + token >= n_tokens) break;
        float sum = s.sums[0][token][column];
        UNROLL
        for (u32 warp = 1; warp < WARPS; ++warp) sum = add_rn(sum, s.sums[warp][token][column]);
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
