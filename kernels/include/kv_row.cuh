// A row of 512 KV channels held by one warp, 16 channels per lane: norm, rotation, quantisation,
// and the 584 bytes of the cache; an index vector of 128, 4 channels per lane, likewise.
//
// Source   `RMSNorm`, `apply_rotary_emb`, `act_quant` (block 64), `rotate_activation`,
//          `fp4_act_quant` (block 32) of the official release.
// CPU twin `ops::cpu::{norm, rope, quant}`, `store_kv`, `store_key`.
#pragma once

#include "formats.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "step.cuh"

constexpr u32 KV_PER_LANE = HEAD_DIM / WARP, KEY_PER_LANE = INDEX_DIM / WARP;

// Rotates the pair (re, im) by an angle with this sine and cosine; rounds to bf16.
INLINE void turn(float& re, float& im, float sin, float cos) {
    const float x = re;
    re = round_bf16(add_rn(mul_rn(x, cos), -mul_rn(im, sin)));
    im = round_bf16(add_rn(mul_rn(x, sin), mul_rn(im, cos)));
}
INLINE void rotate(float& re, float& im, float angle, float direction) {
    float sin, cos;
    sincos_f32(angle, sin, cos);
    turn(re, im, mul_rn(sin, direction), cos);
}

// Norm with weight and bf16 rounding over all values of the warp.
template <u32 N>
INLINE void norm_row(float (&v)[N], const float* weight, float eps) {
    float squares = 0.0f;
    UNROLL
    for (u32 i = 0; i < N; ++i) squares = fma_rn(v[i], v[i], squares);
    const float mean = warp_sum(squares) / static_cast<float>(N * WARP);
    const float factor = div_rn(1.0f, sqrt_rn(mean + eps));
    UNROLL
    for (u32 i = 0; i < N; ++i)
        v[i] = round_bf16(mul_rn(mul_rn(v[i], factor), weight ? weight[lane_id() * N + i] : 1.0f));
}

// Rotation of the last 64 of the warp's channels.
template <u32 N>
INLINE void rope_row(float (&v)[N], const float* frequencies, u32 position, float direction) {
    const u32 first = lane_id() * N;
    if (first < N * WARP - ROPE_DIM) return;
    const u32 pair = (first - (N * WARP - ROPE_DIM)) / 2;
    UNROLL
    for (u32 i = 0; i < N / 2; ++i)
        rotate(v[2 * i], v[2 * i + 1], mul_rn(static_cast<float>(position), frequencies[pair + i]), direction);
}

// Writes the row; `v` (bf16 values) becomes what a later read of the row returns.
INLINE void store_kv_row(float (&v)[KV_PER_LANE], u8* row) {
    const u32 lane = lane_id();
    float amax = 0.0f;
    UNROLL
    for (u32 i = 0; i < KV_PER_LANE; ++i) amax = max_f32(amax, abs_f32(v[i]));
    const u32 scale = fp8_block_scale(group_max<64 / KV_PER_LANE>(amax));
    if (lane < NOPE_DIM / KV_PER_LANE) {
        u32 codes[KV_PER_LANE / 4] = {};
        UNROLL
        for (u32 i = 0; i < KV_PER_LANE; ++i) {
            const u32 code = e4m3_from_f32(v[i] * e8m0_inverse(scale));
            codes[i / 4] |= code << 8 * (i % 4);
            v[i] = e4m3_to_f32(code) * e8m0_to_f32(scale);
        }
        u32x2* out = reinterpret_cast<u32x2*>(row + lane * KV_PER_LANE);
        out[0] = u32x2{{codes[0], codes[1]}}, out[1] = u32x2{{codes[2], codes[3]}};
        if (lane % 4 == 0) row[NOPE_DIM + 2 * ROPE_DIM + lane / 4] = static_cast<u8>(scale);
    } else {
        u32x2* out = reinterpret_cast<u32x2*>(row + NOPE_DIM + (lane - 28) * 2 * KV_PER_LANE);
        UNROLL
        for (u32 i = 0; i < KV_PER_LANE / 4; ++i)
            out[i] = u32x2{{pack_bf16x2(v[4 * i], v[4 * i + 1]), pack_bf16x2(v[4 * i + 2], v[4 * i + 3])}};
        if (lane == WARP - 1) row[KV_ROW_BYTES - 1] = 0;
    }
}

// 512 bf16 values of a row.
INLINE void load_row(const bf16* row, float (&v)[KV_PER_LANE]) {
    float low[8], high[8];
    load8(row + lane_id() * KV_PER_LANE, low);
    load8(row + lane_id() * KV_PER_LANE + 8, high);
    UNROLL
    for (u32 i = 0; i < 8; ++i) v[i] = low[i], v[i + 8] = high[i];
}
INLINE void store_row(const float (&v)[KV_PER_LANE], bf16* row) {
    float low[8], high[8];
    UNROLL
    for (u32 i = 0; i < 8; ++i) low[i] = v[i], high[i] = v[i + 8];
    store8(row + lane_id() * KV_PER_LANE, low);
    store8(row + lane_id() * KV_PER_LANE + 8, high);
}

// Row `row` of kv, not yet normalised, to `kv_out` as a later read returns it and to `stored` as it will lie
// in the window.
INLINE void finish_kv_row(const bf16* kv, const float* weight, const float* frequencies, u32 position, u32 row,
                          bf16* kv_out, u8* stored, float eps) {
    const u64 at = static_cast<u64>(row) * HEAD_DIM;
    float v[KV_PER_LANE];
    load_row(kv + at, v);
    norm_row(v, weight, eps);
    rope_row(v, frequencies, position, 1.0f);
    store_kv_row(v, stored);
    store_row(v, kv_out + at);
}

// Walsh-Hadamard transform of the warp's 128 values in natural order, times 128^-0.5, to bf16.
INLINE void hadamard_row(float (&v)[KEY_PER_LANE]) {
    UNROLL
    for (u32 half = 1; half < KEY_PER_LANE; half *= 2)
        UNROLL
        for (u32 i = 0; i < KEY_PER_LANE; ++i)
            if (!(i & half)) {
                const float a = v[i], b = v[i + half];
                v[i] = add_rn(a, b), v[i + half] = add_rn(a, -b);
            }
    UNROLL
    for (u32 lanes = 1; lanes < WARP; lanes *= 2)
        UNROLL
        for (u32 i = 0; i < KEY_PER_LANE; ++i) {
            const float other = shfl_xor(v[i], lanes);
            v[i] = lane_id() & lanes ? add_rn(other, -v[i]) : add_rn(v[i], other);
        }
    const float scale = div_rn(1.0f, sqrt_rn(static_cast<float>(INDEX_DIM)));
    UNROLL
    for (u32 i = 0; i < KEY_PER_LANE; ++i) v[i] = round_bf16(mul_rn(v[i], scale));
}

// The scale byte of the lane's block of 32 channels.
INLINE u32 key_scale(const float (&v)[KEY_PER_LANE]) {
    float amax = 0.0f;
    UNROLL
    for (u32 i = 0; i < KEY_PER_LANE; ++i) amax = max_f32(amax, abs_f32(v[i]));
    return fp4_block_scale(group_max<32 / KEY_PER_LANE>(amax));
}

INLINE void store_key_row(const float (&v)[KEY_PER_LANE], u8* row) {
    const u32 lane = lane_id(), scale = key_scale(v);
    u32 codes = 0;
    UNROLL
    for (u32 i = 0; i < KEY_PER_LANE; ++i) codes |= e2m1_from_f32(v[i] * e8m0_inverse(scale)) << 4 * i;
    reinterpret_cast<u16*>(row)[lane] = static_cast<u16>(codes);
    if (lane % 8 == 0) row[INDEX_DIM / 2 + lane / 8] = static_cast<u8>(scale);
}

// A head of the indexer's query: rotation, Hadamard, values on the FP4 grid.
INLINE void finish_index_query(float (&v)[KEY_PER_LANE], const float* frequencies, u32 position) {
    rope_row(v, frequencies, position, 1.0f);
    hadamard_row(v);
    const u32 scale = key_scale(v);
    UNROLL
    for (u32 i = 0; i < KEY_PER_LANE; ++i) v[i] = on_e2m1_grid(v[i], scale);
}
INLINE void store_index_query(const float (&v)[KEY_PER_LANE], bf16* head) {
    reinterpret_cast<u32x2*>(head)[lane_id()] = u32x2{{pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3])}};
}
