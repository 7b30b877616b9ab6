// Hyper-connections: what the kernels of `hc/` share, so that one order of operations serves all of them.
//
// Sums over a token's channels: each slice of 128 by itself, four runs of 32 in order; the slices of a
// group in order; then 16 groups in pairs, pairs of pairs and so on. A group is as many slices as it takes
// for 16 to hold the width.
#pragma once

#include "rows.cuh"

constexpr u32 HC = 4, MIX = 24, SLICE = 128, SLICE_WARPS = 4, GROUPS = 16;

constexpr u32 slices_per_group(u32 width) { return ceil_div(ceil_div(width, SLICE), GROUPS); }

// Of the groups in a lane each (lanes 16 and up: of another sum).
INLINE float sum_of_groups(float x) {
    for (u32 lanes = 1; lanes < GROUPS; lanes *= 2) x = add_rn(x, shfl_xor(x, lanes));
    return x;
}
// The same of groups that are `stride` floats apart.
INLINE float sum_of_groups(const float* groups, u32 stride) {
    float x[GROUPS];
    UNROLL
    for (u32 i = 0; i < GROUPS; ++i) x[i] = groups[i * stride];
    UNROLL
    for (u32 step = 1; step < GROUPS; step *= 2)
        UNROLL
        for (u32 i = 0; i < GROUPS; i += 2 * step) x[i] = add_rn(x[i], x[i + step]);
    return x[0];
}

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

// d[tile][8 rows of fn] += fn x over a warp's 32 channels of all copies, for the first `n_tiles` tiles of 16
// tokens. a[tile][copy][r] are eight channels of token g + 8 r, from 8 (lane % 4) on: two words of each of two
// products. Which k a register stands for follows from that, and `fn(row, copy, step)`, four floats from channel
// 8 (lane % 4) + 4 step on, is taken the same way.
template <u32 Tiles, u32 RowTiles, class Fn>
INLINE void mix_products(const u32x4 (&a)[Tiles][HC][2], u32 n_tiles, const Fn& fn, float (&d)[Tiles][RowTiles][4]) {
    UNROLL
    for (u32 j = 0; j < HC; ++j)
        UNROLL
        for (u32 step = 0; step < 2; ++step)
            UNROLL
            for (u32 n = 0; n < RowTiles; ++n) {
                u32 parts[3][2];
                split3(fn(8 * n + lane_id() / 4, j, step), parts);
                UNROLL
                for (u32 tile = 0; tile < Tiles; ++tile) {
                    if (tile >= n_tiles) break; // the same for all threads
                    const u32x4(&rows)[2] = a[tile][j];
                    // The smallest part first.
                    UNROLL
                    for (u32 part = 3; part-- > 0;)
                        mma_bf16_16816(d[tile][n], rows[0].v[2 * step], rows[1].v[2 * step], rows[0].v[2 * step + 1],
                                       rows[1].v[2 * step + 1], parts[part][0], parts[part][1]);
                }
            }
}

// A warp's sums for the token g + 8 r of a tile, to `out`: the rows of fn, then the squares.
template <u32 Mix>
INLINE void store_sums(const float (&d)[ceil_div(Mix, 8)][4], u32 r, float squares, float* out) {
    const u32 quad = lane_id() % 4;
    UNROLL
    for (u32 n = 0; n < ceil_div(Mix, 8); ++n)
        UNROLL
        for (u32 i = 0; i < 2; ++i)
            if (8 * n + 2 * quad + i < Mix) out[8 * n + 2 * quad + i] = d[n][2 * r + i];
    squares = add_rn(squares, shfl_xor(squares, 1));
    squares = add_rn(squares, shfl_xor(squares, 2));
    if (quad == 0) out[Mix] = squares;
}

// What the mixing products are multiplied by: `squares` is the sum over all copies.
INLINE float mix_factor(float squares, u32 width, float eps) {
    return div_rn(1.0f, sqrt_rn(add_rn(div_rn(squares, static_cast<float>(HC * width)), eps)));
}

INLINE float sigmoid(float x) { return div_rn(1.0f, 1.0f + exp_f32(-x)); }
// From the mixing product number `j`: the weight of copy j of the input, and of the output in copy j - 4.
INLINE float pre_of(float mix, const float* scale, const float* base, u32 j, float eps) {
    return sigmoid(add_rn(mul_rn(mix, scale[0]), base[j])) + eps;
}
INLINE float post_of(float mix, const float* scale, const float* base, u32 j) {
    return 2.0f * sigmoid(add_rn(mul_rn(mix, scale[1]), base[j]));
}

// Eight channels of the input of a sublayer, rounded; adds their squares to `squares` in order.
INLINE void collapse(const float* pre, const float (&copies)[HC][8], float (&v)[8], float& squares) {
    UNROLL
    for (u32 k = 0; k < 8; ++k) {
        float y = mul_rn(pre[0], copies[0][k]);
        UNROLL
        for (u32 j = 1; j < HC; ++j) y = add_rn(y, mul_rn(pre[j], copies[j][k]));
        v[k] = round_bf16(y);
        squares = fma_rn(v[k], v[k], squares);
    }
}

// One warp: from mixing product 8 + 4 i + j in lane 4 i + j (and 16 lanes on) to `comb`[i][j] there. The order of
// operations is the source's.
INLINE float sinkhorn(float mix, float scale, float base, u32 n_iters, float eps) {
    const u32 lane = lane_id();
    // Element k of this lane's row, of its column.
    const auto in_row = [&](float x, u32 k) { return shfl(x, (lane & ~3u) | k); };
    const auto in_column = [&](float x, u32 k) { return shfl(x, (lane & ~12u) | 4 * k); };
    float c = add_rn(mul_rn(mix, scale), base);
    float max = negative_infinity(), sum = 0.0f;
    UNROLL
    for (u32 k = 0; k < HC; ++k) max = max_f32(max, in_row(c, k));
    c = exp_f32(c - max);
    UNROLL
    for (u32 k = 0; k < HC; ++k) sum = add_rn(sum, in_row(c, k));
    c = add_rn(div_rn(c, sum), eps);
    const auto divided = [&](float a, float b, float d, float e) {
        return div_rn(c, add_rn(add_rn(add_rn(add_rn(a, b), d), e), eps));
    };
    // The softmax was the first row pass, so iteration 0 has only its column pass.
    for (u32 iter = 0; iter < n_iters; ++iter) {
        if (iter > 0) c = divided(in_row(c, 0), in_row(c, 1), in_row(c, 2), in_row(c, 3));
        c = divided(in_column(c, 0), in_column(c, 1), in_column(c, 2), in_column(c, 3));
    }
    return c;
}
