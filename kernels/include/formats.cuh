// Number formats, bit for bit: E4M3, E2M1, E8M0 and bf16, and their expansion to bf16 pairs.
//
// One source for the GPU and for the host; checked there against `core::num` on every code and on
// every bf16 input. Every architecture runs these integer forms: sm_80 has no FP8 conversions.
//
// Names: `x_from_f32` rounds to nearest, ties to even, and saturates, as `core::num` does.
#pragma once

#include "device.cuh"

INLINE float bf16_to_f32(bf16 x) { return bits_float(static_cast<u32>(x.bits) << 16); }
INLINE float bf16_low(u32 pair) { return bits_float(pair << 16); }
INLINE float bf16_high(u32 pair) { return bits_float(pair & 0xffff0000u); }
INLINE bf16 bf16_from_f32(float x) {
    bf16 out;
    out.bits = static_cast<u16>(pack_bf16x2(x, 0.0f));
    return out;
}
// The nearest bf16 value, as f32.
INLINE float round_bf16(float x) { return bf16_low(pack_bf16x2(x, 0.0f)); }

INLINE float e4m3_to_f32(u32 code) {
    // Exponent and mantissa sit 20 bits lower than in f32; the product is exact and makes
    // subnormal codes normal. 0x7f and 0xff are NaN.
    const u32 magnitude = code & 0x7fu;
    const u32 bits = (code & 0x80u) << 24 | (magnitude == 0x7fu ? 0x7fc00000u : magnitude << 20);
    return bits_float(bits) * 0x1p120f;
}
INLINE u32 e4m3_from_f32(float x) {
    const u32 sign = float_bits(x) >> 24 & 0x80u;
    const u32 a = float_bits(x) & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7fu;         // NaN
    if (a >= 0x43e00000u) return sign | 0x7eu; // 448 and above
    // Below 2^-6 the grid is uniform with step 2^-9: adding 2^14 lets the addition round.
    const u32 code = a < 0x3c800000u ? float_bits(add_rn(bits_float(a), 16384.0f)) - 0x46800000u
                                     : ((a + 0x7ffffu + (a >> 20 & 1u)) >> 20) - 0x3c0u;
    return sign | code;
}

INLINE float e2m1_to_f32(u32 code) {
    // Exponent (2 bits) and mantissa (1 bit) at the place of f32's, then times 2^126: exact.
    return bits_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}
INLINE u32 e2m1_from_f32(float x) {
    const u32 sign = float_bits(x) >> 28 & 8u;
    const u32 a = float_bits(x) & 0x7fffffffu;
    if (a >= 0x40c00000u) return sign | 7u; // 6 and above, NaN
    const u32 code = a < 0x3f800000u ? float_bits(add_rn(bits_float(a), 4194304.0f)) - 0x4a800000u
                                     : ((a + 0x1fffffu + (a >> 22 & 1u)) >> 22) - 0xfcu;
    return sign | code;
}

// 2^(byte - 127), bytes 0..254; byte 0 is the subnormal 2^-127.
INLINE float e8m0_to_f32(u32 byte) {
    return bits_float(byte == 0 ? 0x00400000u : byte << 23);
}
// The E8M0 byte of the smallest power of two not below a positive normal `x`.
INLINE u32 e8m0_ceil(float x) {
    const u32 bits = float_bits(x);
    return (bits >> 23 & 255u) + ((bits & 0x7fffffu) != 0);
}
// 2^-e of a scale 2^e, for scales of quantisation blocks, which never leave the normal range.
INLINE float e8m0_inverse(u32 byte) { return bits_float((254u - byte) << 23); }

// The scale of an FP8 (FP4) block whose largest magnitude is `amax`.
INLINE u32 fp8_block_scale(float amax) {
    return e8m0_ceil(mul_rn(max_f32(amax, 1e-4f), 1.0f / 448.0f));
}
INLINE u32 fp4_block_scale(float amax) {
    return e8m0_ceil(mul_rn(max_f32(amax, 0x1.8p-124f), 1.0f / 6.0f));
}
// The value of `x` after a round trip through the block's format.
INLINE float on_e4m3_grid(float x, u32 scale) {
    return e4m3_to_f32(e4m3_from_f32(x * e8m0_inverse(scale))) * e8m0_to_f32(scale);
}
INLINE float on_e2m1_grid(float x, u32 scale) {
    return e2m1_to_f32(e2m1_from_f32(x * e8m0_inverse(scale))) * e8m0_to_f32(scale);
}

// Four E4M3 codes (k, k+1, k+2, k+3) to two bf16 pairs {k, k+1} and {k+2, k+3}, exact. NaN codes
// are not expected: the loader refuses them.
INLINE void expand_e4m3(u32 codes, u32& first, u32& second) {
    const u32 w = byte_perm(codes, 0, 0x3120);
    const u32 odd = (w & 0x80008000u) | (w >> 4 & 0x07f007f0u);
    const u32 even = (w << 8 & 0x80008000u) | (w << 4 & 0x07f007f0u);
    first = mul_bf16x2(even, 0x7b807b80u); // times 2^120
    second = mul_bf16x2(odd, 0x7b807b80u);
}

// Eight E2M1 codes (nibble i = k + i) to four bf16 pairs {k+i, k+i+4}, times a scale.
// `multiplier` is bf16 2^(126 + e) in both halves: `fp4_multiplier` of the E8M0 byte of 2^e.
INLINE void expand_e2m1(u32 codes, u32 multiplier, u32 (&pairs)[4]) {
    pairs[0] = mul_bf16x2((codes << 12 & 0x80008000u) | (codes << 6 & 0x01c001c0u), multiplier);
    pairs[1] = mul_bf16x2((codes << 8 & 0x80008000u) | (codes << 2 & 0x01c001c0u), multiplier);
    pairs[2] = mul_bf16x2((codes << 4 & 0x80008000u) | (codes >> 2 & 0x01c001c0u), multiplier);
    pairs[3] = mul_bf16x2((codes & 0x80008000u) | (codes >> 6 & 0x01c001c0u), multiplier);
}
// bf16 2^(126 + e) for the E8M0 byte of 2^e, e <= 1 (the loader refuses larger ones).
INLINE u32 fp4_multiplier(u32 byte) {
    const u32 exponent = byte + 126;
    return (exponent << 7) * 0x00010001u;
}
