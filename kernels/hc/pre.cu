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

#include "../include/hc.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP, MAX_CHUNKS = 4, MAX_SLICES = MAX_CHUNKS * THREADS * PER_THREAD / SLICE;

struct PreShared {
    float squares[MAX_SLICES];
    float mixes[MIX + 1];
    float pre[HC];
};

// The sums over all splits, two by each warp at a time.
INLINE void add_splits(const float* partial, u32 n_mix, u32 n_splits, float* mixes) {
    const u32 group = lane_id() % GROUPS, per = ceil_div(n_splits, GROUPS);
    const u32 end = min_u32(n_splits, (group + 1) * per);
    for (u32 first = 2 * warp_id(); first <= n_mix; first += 2 * WARPS) {
        const u32 column = first + lane_id() / GROUPS;
        float sum = 0.0f;
        for (u32 split = group * per; split < end && column <= n_mix; ++split)
            sum = add_rn(sum, partial[split * (n_mix + 1) + column]);
        sum = sum_of_groups(sum);
        if (group == 0 && column <= n_mix) mixes[column] = sum;
    }
}

template <bool Head>
INLINE void pre(const float* partial, const bf16* x, const float* base, const float* scale,
                const float* weight, bf16* normed, bf16* quantised, float* post, float* comb,
                u32 width, u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    constexpr u32 N_MIX = Head ? HC : MIX;
    PreShared& s = shared<PreShared>();
    const u32 token = blockIdx.x, t = threadIdx.x, lane = lane_id();
    dependency_trigger();
    if (t == 0) prefetch(weight, width * 4);
    dependency_wait();
    partial = after_wait(partial), x = after_wait(x);
    x += static_cast<u64>(token) * HC * width;
    if (t < THREADS) add_splits(partial + static_cast<u64>(token) * n_splits * (N_MIX + 1), N_MIX, n_splits, s.mixes);
    block_sync();
    const float g = mix_factor(s.mixes[N_MIX], width, mix_eps);
    if (!Head && t >= THREADS) {
        if (lane < HC) post[token * HC + lane] = post_of(mul_rn(s.mixes[HC + lane], g), scale, base, HC + lane);
        const u32 element = lane % (HC * HC);
        const float c = sinkhorn(mul_rn(s.mixes[8 + element], g), scale[2], base[8 + element], n_iters, hc_eps);
        if (lane < HC * HC) comb[token * HC * HC + lane] = c;
        return;
    }
    if (t < HC) s.pre[t] = pre_of(mul_rn(s.mixes[t], g), scale, base, t, hc_eps);
    named_sync<1>(THREADS);

    float v[MAX_CHUNKS][8] = {};
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * THREADS + t) * PER_THREAD;
        if ((chunk * THREADS + warp_id() * WARP) * PER_THREAD >= width) break; // the same for the warp
        float squares = 0.0f;
        if (i < width) {
            float copies[HC][8];
            UNROLL
            for (u32 j = 0; j < HC; ++j) load8(x + j * width + i, copies[j]);
            collapse(s.pre, copies, v[chunk], squares);
        }
        UNROLL
        for (u32 lanes = 1; lanes < SLICE / PER_THREAD; lanes *= 2) squares = add_rn(squares, shfl_xor(squares, lanes));
        if (i % SLICE == 0) s.squares[i / SLICE] = squares;
    }
    named_sync<1>(THREADS);
    const u32 n_slices = ceil_div(width, SLICE), per = ceil_div(n_slices, GROUPS), group = lane % GROUPS;
    float squares = 0.0f;
    for (u32 slice = group * per; slice < min_u32(n_slices, (group + 1) * per); ++slice)
        squares = add_rn(squares, s.squares[slice]);
    const float x_mean = sum_of_groups(squares) / static_cast<float>(width);
    const float factor = div_rn(1.0f, sqrt_rn(x_mean + norm_eps));
    const u64 row = static_cast<u64>(token) * width;
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * THREADS + t) * PER_THREAD;
        if ((chunk * THREADS + warp_id() * WARP) * PER_THREAD >= width) break;
        if (i < width) {
            UNROLL
            for (u32 k = 0; k < 8; ++k) v[chunk][k] = mul_rn(mul_rn(v[chunk][k], factor), weight[i + k]);
            store8(normed + row + i, v[chunk]);
        }
        if (quantised == nullptr) continue;
        round8(v[chunk]);
        quantise_block128(v[chunk]);
        if (i < width) store8(quantised + row + i, v[chunk]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + WARP, 1) hc_pre(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ post, float* __restrict__ comb, u32 width,
    u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    pre<false>(partial, x, base, scale, weight, normed, quantised, post, comb, width, n_splits,
               n_iters, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_pre)

extern "C" __global__ void __launch_bounds__(THREADS, 1) hc_head(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    u32 width, u32 n_splits, float hc_eps, float mix_eps, float norm_eps) {
    pre<true>(partial, x, base, scale, weight, normed, nullptr, nullptr, nullptr, width, n_splits,
              0, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_head)
