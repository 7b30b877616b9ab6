// How 16 bytes of a row of weights and 16 bytes of a row of activations become operands of `mma.sync` m16n8k16,
// for the products of sm_80 (`skinny_gemm.cuh`, `tiled_gemm.cuh`).
//
// Rows of W are the A operand, tokens its N. A K block of 128 takes four steps. In each, lane (g, t) of a warp has
// eight consecutive values of W's rows g and g + 8 and of token g, and does two products with them. Which k these
// are follows from how the format packs 16 bytes, the same for both operands:
//   FP8   step 2 v + h: values 8 h ..+ 8 of the 16 at k = 64 v + 16 t     (expand_e4m3)
//   FP4   step s: values 8 s ..+ 8 of the 32 at k = 32 t                  (expand_e2m1, order {i, i + 4})
//   bf16  step s: the 8 values at k = 32 s + 8 t
#pragma once

#include "formats.cuh"

enum class Format { Fp8, Fp4, Bf16 };

constexpr u32 STEPS = 4;

// Vectors of 16 bytes that are a lane's share of a row's K block.
template <Format F>
constexpr u32 n_vectors = F == Format::Bf16 ? 4 : F == Format::Fp8 ? 2 : 1;
// Which of them a step takes, and its first value in the K block.
template <Format F>
INLINE u32 vector_of(u32 step) {
    return F == Format::Bf16 ? step : F == Format::Fp8 ? step / 2 : 0;
}
template <Format F>
INLINE u32 value_of(u32 step, u32 t) {
    if (F == Format::Fp8) return 64 * (step / 2) + 16 * t + 8 * (step % 2);
    return F == Format::Fp4 ? 32 * t + 8 * step : 32 * step + 8 * t;
}

// A step's values of one row, as bf16 pairs. `multiplier`: FP4, `fp4_multiplier` of their scale.
template <Format F>
INLINE void expand_step(const u32x4& packed, u32 step, u32 multiplier, u32 (&pairs)[4]) {
    if (F == Format::Fp8) {
        const u32 word = 2 * (step % 2);
        expand_e4m3(packed.v[word], pairs[0], pairs[1]);
        expand_e4m3(packed.v[word + 1], pairs[2], pairs[3]);
    } else if (F == Format::Fp4) {
        expand_e2m1(packed.v[step], multiplier, pairs);
    } else {
        UNROLL
        for (u32 i = 0; i < 4; ++i) pairs[i] = packed.v[i];
    }
}

// sum += the products of a step: 16 rows (g, g + 8) and 8 tokens; `x` has the token's eight values in order.
template <Format F>
INLINE void multiply_step(float (&sum)[4], const u32 (&low)[4], const u32 (&high)[4], const u32x4& x) {
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 first = F == Format::Fp4 ? byte_perm(x.v[i], x.v[i + 2], 0x5410) : x.v[2 * i];
        const u32 second = F == Format::Fp4 ? byte_perm(x.v[i], x.v[i + 2], 0x7632) : x.v[2 * i + 1];
        mma_bf16_16816(sum, low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1], first, second);
    }
}
