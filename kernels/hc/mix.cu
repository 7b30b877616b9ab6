// hc_mix, hc_post_mix, hc_post: the products that mix the four copies, and what a sublayer adds.
//
// Source   `Block.hc_pre` (its matrix product), `Block.hc_post` of the official release.
// Inputs   x [n_tokens, 4, width] bf16    fn [n_mix, 4 width] f32, n_mix 24 or 4
//          y [n_tokens, width] bf16    post [n_tokens, 4] f32    comb [n_tokens, 4, 4] f32
// Outputs  partial [n_tokens, n_splits, n_mix + 1] f32: sums over a slice of the channels of
//          `fn x`, last the sum of squares of x
//          hc_post_mix, hc_post: x_out = bf16(post y + comb^T x); partial is of x_out
// Launch   grid (n_splits, n_tokens), 64 threads; a block owns `slice` channels of all four
//          copies. Width and slice are multiples of 8. The split depends on the width alone, never
//          on the number of tokens. `hc_pre` adds the slices in order.
// Limit    one token: fn (n_mix * 16 width bytes); many: x read once, x_out written once.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::hc`: x_out equal bits; mixes in another order of f32 additions, 1e-5 of the
//          sum of magnitudes.

#include "../include/rows.cuh"

constexpr u32 THREADS = 64, HC = 4;

struct MixShared {
    float sums[THREADS / WARP][25];
};

template <u32 Mix, bool Post>
INLINE void mix(const bf16* x, const float* fn, float* partial, const bf16* y, const float* post,
                const float* comb, bf16* x_out, u32 width, u32 slice) {
    const u32 token = blockIdx.y;
    x += static_cast<u64>(token) * HC * width;
    float sums[Mix + 1] = {};
    const u32 end = min_u32(width, (blockIdx.x + 1) * slice);
    for (u32 i = blockIdx.x * slice + threadIdx.x * PER_THREAD; i < end; i += THREADS * PER_THREAD) {
        float v[HC][8];
        UNROLL
        for (u32 j = 0; j < HC; ++j) load8(x + j * width + i, v[j]);
        if (Post) {
            float from[8], mixed[HC][8];
            load8(y + static_cast<u64>(token) * width + i, from);
            UNROLL
            for (u32 j = 0; j < HC; ++j) {
                const float p = post[token * HC + j];
                // `comb` is used transposed: its first index is the source copy.
                const float* c = comb + token * HC * HC + j;
                UNROLL
                for (u32 k = 0; k < 8; ++k) {
                    const float a = add_rn(mul_rn(c[0], v[0][k]), mul_rn(c[HC], v[1][k]));
                    const float b = add_rn(a, mul_rn(c[2 * HC], v[2][k]));
                    const float sum = add_rn(b, mul_rn(c[3 * HC], v[3][k]));
                    mixed[j][k] = round_bf16(add_rn(mul_rn(p, from[k]), sum));
                }
                store8(x_out + (static_cast<u64>(token) * HC + j) * width + i, mixed[j]);
            }
            UNROLL
            for (u32 j = 0; j < HC; ++j)
                UNROLL
                for (u32 k = 0; k < 8; ++k) v[j][k] = mixed[j][k];
        }
        UNROLL
        for (u32 j = 0; Mix != 0 && j < HC; ++j) {
            UNROLL
            for (u32 m = 0; m + 1 <= Mix; ++m) {
                const float* f = fn + static_cast<u64>(m) * HC * width + j * width + i;
                const f32x4 low = *reinterpret_cast<const f32x4*>(f);
                const f32x4 high = *reinterpret_cast<const f32x4*>(f + 4);
                UNROLL
                for (u32 k = 0; k < 4; ++k) sums[m] = fma_rn(low.v[k], v[j][k], sums[m]);
                UNROLL
                for (u32 k = 0; k < 4; ++k) sums[m] = fma_rn(high.v[k], v[j][k + 4], sums[m]);
            }
            UNROLL
            for (u32 k = 0; k < 8; ++k) sums[Mix] = fma_rn(v[j][k], v[j][k], sums[Mix]);
        }
    }
    if constexpr (Mix == 0) return;
    MixShared& s = shared<MixShared>();
    UNROLL
    for (u32 m = 0; m <= Mix; ++m) {
        const float sum = warp_sum(sums[m]);
        if (lane_id() == 0) s.sums[warp_id()][m] = sum;
    }
    block_sync();
    if (threadIdx.x <= Mix) {
        float sum = 0.0f;
        for (u32 warp = 0; warp < THREADS / WARP; ++warp) sum = add_rn(sum, s.sums[warp][threadIdx.x]);
        partial[(token * gridDim.x + blockIdx.x) * (Mix + 1) + threadIdx.x] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) hc_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 slice) {
    mix<24, false>(x, fn, partial, nullptr, nullptr, nullptr, nullptr, width, slice);
}
EMU_KERNEL(hc_mix)

// The same for a head's four mixes.
extern "C" __global__ void __launch_bounds__(THREADS) hc_mix_head(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 slice) {
    mix<4, false>(x, fn, partial, nullptr, nullptr, nullptr, nullptr, width, slice);
}
EMU_KERNEL(hc_mix_head)

extern "C" __global__ void __launch_bounds__(THREADS) hc_post_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    const bf16* __restrict__ y, const float* __restrict__ post, const float* __restrict__ comb,
    bf16* __restrict__ x_out, u32 width, u32 slice) {
    mix<24, true>(x, fn, partial, y, post, comb, x_out, width, slice);
}
EMU_KERNEL(hc_post_mix)

extern "C" __global__ void __launch_bounds__(THREADS) hc_post(
    const bf16* __restrict__ x, const bf16* __restrict__ y, const float* __restrict__ post,
    const float* __restrict__ comb, bf16* __restrict__ x_out, u32 width, u32 slice) {
    mix<0, true>(x, nullptr, nullptr, y, post, comb, x_out, width, slice);
}
EMU_KERNEL(hc_post)
