// Rows of bf16 activations, eight values per thread, and quantisation of such a row in place.
//
// A thread's eight values are 16 consecutive bytes; blocks of 128 values that share an FP8 scale
// are 16 neighbouring lanes.
#pragma once

#include "formats.cuh"
#include "reduce.cuh"

constexpr u32 PER_THREAD = 8, LINEAR_BLOCK = 128;

INLINE void unpack8(const u32x4& packed, float (&v)[8]) {
    UNROLL
    for (u32 i = 0; i < 4; ++i) {
        v[2 * i] = bf16_low(packed.v[i]);
        v[2 * i + 1] = bf16_high(packed.v[i]);
    }
}
INLINE u32x4 pack8(const float (&v)[8]) {
    u32x4 packed;
    UNROLL
    for (u32 i = 0; i < 4; ++i) packed.v[i] = pack_bf16x2(v[2 * i], v[2 * i + 1]);
    return packed;
}
INLINE void load8(const bf16* p, float (&v)[8]) {
    const u32x4 packed = *reinterpret_cast<const u32x4*>(p);
    unpack8(packed, v);
}
INLINE void store8(bf16* p, const float (&v)[8]) { *reinterpret_cast<u32x4*>(p) = pack8(v); }
// Eight channels of a token's experts, routed ones added in the order of their ids and the shared one
// last; not yet rounded. `parts` is [n_tokens, top_k, width], `order` [n_tokens, top_k] of `moe_route`.
INLINE void load_combined8(const bf16* shared_part, const bf16* parts, const u32* order, u32 top_k, u64 token,
                           u32 width, u32 channel, float (&sum)[8]) {
    float part[8];
    UNROLL
    for (u32 i = 0; i < 8; ++i) sum[i] = 0.0f;
    for (u32 k = 0; k < top_k; ++k) {
        load8(parts + (token * top_k + order[token * top_k + k]) * width + channel, part);
        UNROLL
        for (u32 i = 0; i < 8; ++i) sum[i] = add_rn(sum[i], part[i]);
    }
    load8(shared_part + token * width + channel, part);
    UNROLL
    for (u32 i = 0; i < 8; ++i) sum[i] = add_rn(sum[i], part[i]);
}
INLINE void round8(float (&v)[8]) {
    UNROLL
    for (u32 i = 0; i < 8; ++i) v[i] = round_bf16(v[i]);
}

// Eight values of a block of 128 on their FP8 grid. Called by whole warps; lanes without values
// pass zeros. Returns the block's scale byte.
INLINE u32 quantise_block128(float (&v)[8]) {
    float amax = 0.0f;
    UNROLL
    for (u32 i = 0; i < 8; ++i) amax = max_f32(amax, abs_f32(v[i]));
    const u32 scale = fp8_block_scale(group_max<LINEAR_BLOCK / PER_THREAD>(amax));
    UNROLL
    for (u32 i = 0; i < 8; ++i) v[i] = on_e4m3_grid(v[i], scale);
    return scale;
}

// Eight values of a block of 128 (16 neighbouring lanes) to E4M3; returns the block's scale byte.
// From sm_89 on.
INLINE u32 quantise_codes(const u32x4& packed, u32x2& codes) {
    float v[8], amax = 0.0f;
    unpack8(packed, v);
    UNROLL
    for (u32 i = 0; i < 8; ++i) amax = max_f32(amax, abs_f32(v[i]));
    const u32 scale = fp8_block_scale(group_max<LINEAR_BLOCK / PER_THREAD>(amax));
    const float inverse = e8m0_inverse(scale);
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const float *from = v + 4 * i;
        codes.v[i] = pack_e4m3x2(from[0] * inverse, from[1] * inverse) |
                     pack_e4m3x2(from[2] * inverse, from[3] * inverse) << 16;
    }
    return scale;
}
