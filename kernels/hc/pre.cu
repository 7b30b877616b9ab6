// hc_pre, hc_head: from the mixing products to the normalised input of a sublayer (or of a head).
//
// Source   `hc_split_sinkhorn`, `Block.hc_pre`, `Transformer.hc_head`, `RMSNorm`, `act_quant`.
// Inputs   partial [n_tokens, n_splits, n_mix + 1] f32 of `hc_mix`    x [n_tokens, 4, width] bf16
//          base [24] (head: [4]) f32    scale [3] (head: [1]) f32    weight [width] f32
// Outputs  normed [n_tokens, width] bf16    quantised: the same on the FP8 grid, may be null
//          hc_pre only: post [n_tokens, 4] f32, comb [n_tokens, 4, 4] f32
// Launch   one block of 256 threads per token. Width is a multiple of 8, at most 8,192. One warp
//          runs Sinkhorn while the others collapse the copies: nothing here waits for `comb`.
// Limit    latency for few tokens; memory (8 width bytes read, 2 to 4 width written) for many.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::hc::split_sinkhorn` (1e-5 absolute), `rms_norm` (1 bf16 ulp).

#include "../include/rows.cuh"

constexpr u32 THREADS = 256, HC = 4, MAX_CHUNKS = 4;

struct PreShared {
    float sums[THREADS / WARP];
    float mixes[25];
    float pre[HC];
};

INLINE float sigmoid(float x) { return div_rn(1.0f, 1.0f + exp_f32(-x)); }

// One thread; the order of operations is the source's.
INLINE void sinkhorn(const float* mixes, float scale, const float* base, u32 n_iters, float eps,
                     float* comb) {
    float c[HC][HC];
    UNROLL
    for (u32 i = 0; i < HC; ++i) {
        float max = negative_infinity();
        UNROLL
        for (u32 j = 0; j < HC; ++j) {
            c[i][j] = add_rn(mul_rn(mixes[8 + HC * i + j], scale), base[8 + HC * i + j]);
            max = max_f32(max, c[i][j]);
        }
        float sum = 0.0f;
        UNROLL
        for (u32 j = 0; j < HC; ++j) {
            c[i][j] = exp_f32(c[i][j] - max);
            sum = add_rn(sum, c[i][j]);
        }
        UNROLL
        for (u32 j = 0; j < HC; ++j) c[i][j] = add_rn(div_rn(c[i][j], sum), eps);
    }
    // The softmax was the first row pass, so iteration 0 has only its column pass.
    for (u32 iter = 0; iter < n_iters; ++iter) {
        for (u32 i = 0; iter > 0 && i < HC; ++i) {
            const float s = c[i][0] + c[i][1] + c[i][2] + c[i][3] + eps;
            UNROLL
            for (u32 j = 0; j < HC; ++j) c[i][j] = div_rn(c[i][j], s);
        }
        UNROLL
        for (u32 j = 0; j < HC; ++j) {
            const float s = c[0][j] + c[1][j] + c[2][j] + c[3][j] + eps;
            UNROLL
            for (u32 i = 0; i < HC; ++i) c[i][j] = div_rn(c[i][j], s);
        }
    }
    UNROLL
    for (u32 i = 0; i < HC; ++i)
        UNROLL
        for (u32 j = 0; j < HC; ++j) comb[HC * i + j] = c[i][j];
}

template <bool Head>
INLINE void pre(const float* partial, const bf16* x, const float* base, const float* scale,
                const float* weight, bf16* normed, bf16* quantised, float* post, float* comb,
                u32 width, u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    constexpr u32 MIX = Head ? 4 : 24;
    PreShared& s = shared<PreShared>();
    const u32 token = blockIdx.x, t = threadIdx.x;
    dependency_trigger();
    if (t == 0) prefetch(weight, width * 4);
    dependency_wait();
    partial = after_wait(partial), x = after_wait(x);
    x += static_cast<u64>(token) * HC * width;
    if (t <= MIX) {
        float sum = 0.0f;
        for (u32 split = 0; split < n_splits; ++split)
            sum = add_rn(sum, partial[(token * n_splits + split) * (MIX + 1) + t]);
        s.mixes[t] = sum;
    }
    block_sync();
    const float mean = s.mixes[MIX] / static_cast<float>(HC * width);
    const float g = div_rn(1.0f, sqrt_rn(mean + mix_eps));
    block_sync();
    if (t < MIX) s.mixes[t] = mul_rn(s.mixes[t], g);
    block_sync();
    if (t < HC) {
        s.pre[t] = sigmoid(add_rn(mul_rn(s.mixes[t], scale[0]), base[t])) + hc_eps;
        if (!Head) {
            const float logit = add_rn(mul_rn(s.mixes[HC + t], scale[1]), base[HC + t]);
            post[token * HC + t] = 2.0f * sigmoid(logit);
        }
    }
    block_sync();

    float v[MAX_CHUNKS][8] = {};
    float squares = 0.0f;
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * THREADS + t) * PER_THREAD;
        if (i >= width) break;
        float copies[HC][8];
        UNROLL
        for (u32 j = 0; j < HC; ++j) load8(x + j * width + i, copies[j]);
        UNROLL
        for (u32 k = 0; k < 8; ++k) {
            float y = mul_rn(s.pre[0], copies[0][k]);
            UNROLL
            for (u32 j = 1; j < HC; ++j) y = add_rn(y, mul_rn(s.pre[j], copies[j][k]));
            v[chunk][k] = round_bf16(y);
            squares = fma_rn(v[chunk][k], v[chunk][k], squares);
        }
    }
    const float x_mean = block_sum(squares, s.sums) / static_cast<float>(width);
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
    // Last: no other thread waits for it, and the next boundary is the first to read it.
    if (!Head && t == THREADS - 1)
        sinkhorn(s.mixes, scale[2], base, n_iters, hc_eps, comb + token * HC * HC);
}

extern "C" __global__ void __launch_bounds__(THREADS) hc_pre(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ post, float* __restrict__ comb, u32 width,
    u32 n_splits, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    pre<false>(partial, x, base, scale, weight, normed, quantised, post, comb, width, n_splits,
               n_iters, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_pre)

extern "C" __global__ void __launch_bounds__(THREADS) hc_head(
    const float* __restrict__ partial, const bf16* __restrict__ x, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    u32 width, u32 n_splits, float hc_eps, float mix_eps, float norm_eps) {
    pre<true>(partial, x, base, scale, weight, normed, nullptr, nullptr, nullptr, width, n_splits,
              0, hc_eps, mix_eps, norm_eps);
}
EMU_KERNEL(hc_head)
