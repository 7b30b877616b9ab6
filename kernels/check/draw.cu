// draw: values for tensors that nobody stored, so that a bench need not carry a checkpoint.
//
// Outputs  out [n_words] u32: by `kind`, from the word's number and `seed` alone:
//          0 random bits (two E2M1 codes a byte)       1 E4M3 codes of a clipped normal
//          2 bf16 of a clipped normal times `spread`   3 f32 of the same
//          4 E8M0 bytes, `largest` or one less         5 f32 powers of two, 2^(largest - 127) or half
//          6 KV rows of 584 bytes                      7 indexer keys of 68 bytes
// Launch   any grid of 256 threads; they stride over the words.
// Limit    memory: what is written.
// Arch     sm_80 and later.
// CPU twin none: a test looks at the codes, their spread and what two seeds share.

#include "../include/formats.cuh"

constexpr u32 THREADS = 256, KV_WORDS = 146, KEY_WORDS = 17;

// Every bit of the result depends on every bit of `x`.
INLINE u32 mixed(u32 x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// The sum of four bytes less its mean, over its deviation: within 3.5 of 0.
INLINE float normal(u32 bits) {
    const u32 sum = (bits & 255u) + (bits >> 8 & 255u) + (bits >> 16 & 255u) + (bits >> 24);
    return (static_cast<float>(sum) - 510.0f) / 147.8f;
}

INLINE u32 e4m3_word(u32 bits, float spread) {
    u32 codes = 0;
    UNROLL
    for (u32 i = 0; i < 4; ++i) codes |= e4m3_from_f32(normal(mixed(bits + i)) * spread) << 8 * i;
    return codes;
}

INLINE u32 bf16_word(u32 bits, float spread) {
    return pack_bf16x2(normal(bits) * spread, normal(mixed(bits + 1)) * spread);
}

// Four bytes, each `largest` or one less.
INLINE u32 exponent_word(u32 bits, u32 largest) {
    return largest * 0x01010101u - (bits & 0x01010101u);
}

extern "C" __global__ void __launch_bounds__(256) draw(
    u32* __restrict__ out, u32 n_words, u32 kind, u32 seed, float spread, u32 largest) {
    for (u64 at = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; at < n_words;
         at += static_cast<u64>(gridDim.x) * THREADS) {
        const u32 bits = mixed(static_cast<u32>(at) * 0x9e3779b9u + mixed(seed));
        u32 word = bits;
        if (kind == 1) word = e4m3_word(bits, spread);
        else if (kind == 2) word = bf16_word(bits, spread);
        else if (kind == 3) word = float_bits(normal(bits) * spread);
        else if (kind == 4) word = exponent_word(bits, largest);
        else if (kind == 5) word = (largest - (bits & 1u)) << 23;
        else if (kind == 6) {
            // 448 codes, 64 bf16 values, seven exponents and a byte of padding.
            const u32 part = static_cast<u32>(at % KV_WORDS);
            if (part < 112) word = e4m3_word(bits, 64.0f);
            else if (part < 144) word = bf16_word(bits, 1.0f);
            else word = exponent_word(bits, 121) & (part == 144 ? 0xffffffffu : 0x00ffffffu);
        } else if (kind == 7 && at % KEY_WORDS == KEY_WORDS - 1) word = exponent_word(bits, 126);
        out[at] = word;
    }
}
EMU_KERNEL(draw)
