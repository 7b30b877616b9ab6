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

#include "../include/hc_halves.cuh"

extern "C" __global__ void __launch_bounds__(MIX_THREADS) hc_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 n_tokens) {
    dependency_trigger();
    mix<24, false>(x, fn, partial, {}, nullptr, nullptr, nullptr, width, n_tokens);
}
EMU_KERNEL(hc_mix)

// The same for a head's four mixes.
extern "C" __global__ void __launch_bounds__(MIX_THREADS) hc_mix_head(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    u32 width, u32 n_tokens) {
    dependency_trigger();
    mix<4, false>(x, fn, partial, {}, nullptr, nullptr, nullptr, width, n_tokens);
}
EMU_KERNEL(hc_mix_head)

extern "C" __global__ void __launch_bounds__(MIX_THREADS) hc_post_mix(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* __restrict__ partial,
    const bf16* __restrict__ y, const float* __restrict__ post, const float* __restrict__ comb,
    bf16* __restrict__ x_out, u32 width, u32 n_tokens, const bf16* __restrict__ parts,
    const u32* __restrict__ order, u32 top_k) {
    dependency_trigger();
    mix<24, true>(x, fn, partial, {y, parts, order, top_k}, post, comb, x_out, width, n_tokens);
}
EMU_KERNEL(hc_post_mix)

extern "C" __global__ void __launch_bounds__(MIX_THREADS) hc_post(
    const bf16* __restrict__ x, const bf16* __restrict__ y, const float* __restrict__ post,
    const float* __restrict__ comb, bf16* __restrict__ x_out, u32 width, const bf16* __restrict__ parts,
    const u32* __restrict__ order, u32 top_k) {
    dependency_begin(x, y, post, comb, parts, order);
    const u32 channel = (blockIdx.x * MIX_THREADS + threadIdx.x) * PER_THREAD;
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
