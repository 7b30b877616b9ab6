// hc_pre, hc_head: from the mixing products to the normalised input of a sublayer (or of a head).
//
// Source   `hc_split_sinkhorn`, `Block.hc_pre`, `Transformer.hc_head`, `RMSNorm`, `act_quant`.
// Inputs   partial [n_tokens, n_splits, n_mix + 1] f32 of `hc_mix`    x [n_tokens, 4, width] bf16
//          base [24] (head: [4]) f32    scale [3] (head: [1]) f32    weight [width] f32
// Outputs  normed [n_tokens, width] bf16    quantised: the same on the FP8 grid, may be null
//          hc_pre only: post [n_tokens, 4] f32, comb [n_tokens, 4, 4] f32
// Launch   one block of 256 threads per token, and for hc_pre a warp more, which runs Sinkhorn while the
//          others collapse the copies: nothing here waits for `comb`. Width is a multiple of 8, at most
//          8,192. Sums in the order of `include/hc.cuh`.
// Limit    latency for few tokens; memory (8 width bytes read, 2 to 4 width written) for many.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::hc::split_sinkhorn` (1e-5 absolute), `rms_norm` (1 bf16 ulp).

#include "../include/hc_halves.cuh"

extern "C" __global__ void __launch_bounds__(PRE_THREADS + WARP, 1) hc_pre(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ post, float* __restrict__ comb, u32 width,
    u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    dependency_trigger();
    if (threadIdx.x == 0) prefetch(weight, width * 4);
    dependency_wait();
    partial = after_wait(partial), x = after_wait(x);
    pre<false>(blockIdx.x, partial, x, base, scale, weight, normed, quantised, post, comb, width, n_splits,
               n_iters, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_pre)

extern "C" __global__ void __launch_bounds__(PRE_THREADS, 1) hc_head(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    u32 width, u32 n_splits, float hc_eps, float mix_eps, float norm_eps) {
    dependency_trigger();
    if (threadIdx.x == 0) prefetch(weight, width * 4);
    dependency_wait();
    partial = after_wait(partial), x = after_wait(x);
    pre<true>(blockIdx.x, partial, x, base, scale, weight, normed, nullptr, nullptr, nullptr, width, n_splits,
              0, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_head)
