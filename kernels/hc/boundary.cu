// hc_boundary_1: between two sublayers, for one token: `hc_post_mix` and `hc_pre` in one launch without clusters.
//
// Source   `Block.hc_post`, `Block.hc_pre`, `hc_split_sinkhorn`, `RMSNorm`, `act_quant`.
// Inputs   x, fn, y, parts, order, top_k, post, comb as of `hc_post_mix`; base, scale, weight as of `hc_pre`
//          ended [1] u32: zero, and zero again afterwards. Launches that may run at the same time have one each.
// Outputs  x_out, partial of `hc_post_mix`; normed, quantised, next_post, next_comb: those of `hc_pre`. Equal bits.
// Launch   grid ceil(width / 128), 288 threads: four warps multiply; the last block to end, by a count in memory,
//          runs `hc_pre` with all of them. For more tokens one block's work takes longer than a launch.
// Limit    fn, then latency.
// Arch     sm_80 and later; `boundary90.cu` where clusters of 16 blocks can run.
// CPU twin as of `hc_post_mix` and `hc_pre`.

#include "../include/hc_halves.cuh"

struct OneShared {
    union {
        MixShared mix; // where the halves expect them
        PreShared pre;
    };
    u32 is_last;
};

// `partial` and `x_out` are read where other blocks wrote them.
extern "C" __global__ void __launch_bounds__(PRE_THREADS + WARP, 1) hc_boundary_1(
    const bf16* __restrict__ x, const float* __restrict__ fn, float* partial, const bf16* __restrict__ y,
    const float* __restrict__ post, const float* __restrict__ comb, bf16* x_out, u32 width,
    const bf16* __restrict__ parts, const u32* __restrict__ order, u32 top_k, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ next_post, float* __restrict__ next_comb, u32 n_iters,
    float hc_eps, float mix_eps, float norm_eps, u32* ended) {
    OneShared& s = shared<OneShared>();
    dependency_trigger();
    if (threadIdx.x < MIX_THREADS) {
        mix<MIX, true>(x, fn, partial, {y, parts, order, top_k}, post, comb, x_out, width, 1);
    } else {
        if (threadIdx.x == MIX_THREADS && blockIdx.x == 0) prefetch(weight, width * 4);
        dependency_wait();
    }
    block_sync();
    if (threadIdx.x == 0) {
        const bool is_last = atomic_add_ordered(ended, 1) == gridDim.x - 1;
        if (is_last) *ended = 0;
        s.is_last = is_last;
    }
    block_sync();
    if (!s.is_last) return;
    pre<false>(0, partial, x_out, base, scale, weight, normed, quantised, next_post, next_comb, width, gridDim.x,
               n_iters, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_boundary_1)
