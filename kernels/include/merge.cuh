// Partial results of attention, added up: splits in their order, then the sink; a warp per head.
//
// Every form of attention ends in these operations in this order, so that its bits do not depend on
// who adds up: `attn_merge`, the blocks of a cluster, or the only block there is.
//
// Inputs   of a head's split: 512 f32 that are not normalised, and its maximum and denominator;
//          splits lie `stride` heads apart
// CPU twin `ops::cpu::attention`.
#pragma once

#include "kv_row.cuh"

// The head's output before its rotation, 16 channels per lane. Values of `AtOnce` splits are on their way
// together: one split after the other would wait for memory each time. Those of a split without keys
// (maximum -inf) were never written: the first one's, which has keys, stand for them with weight zero.
template <u32 AtOnce>
INLINE void merge_head(const float* acc, const float* stats, u32 stride, u32 n_splits, float sink,
                       float (&v)[KV_PER_LANE]) {
    const u32 lane = lane_id();
    // The sink takes part in the maximum, so one far above every score cannot overflow.
    float max = sink;
    for (u32 split = lane; split < n_splits; split += WARP)
        max = max_f32(max, stats[2 * static_cast<u64>(split) * stride]);
    max = warp_max(max);
    float denominator = exp_f32(sink - max);
    UNROLL
    for (u32 i = 0; i < KV_PER_LANE; ++i) v[i] = 0.0f;
    for (u32 first = 0; first < n_splits; first += WARP) {
        float own_weight = 0.0f, own_sum = 0.0f;
        if (first + lane < n_splits) {
            const float* own = stats + 2 * static_cast<u64>(first + lane) * stride;
            own_weight = exp_f32(own[0] - max), own_sum = own[1];
        }
        const u32 n = min_u32(WARP, n_splits - first);
        for (u32 next = 0; next < n; next += AtOnce) {
            float weight[AtOnce];
            f32x4 values[AtOnce][KV_PER_LANE / 4];
            UNROLL
            for (u32 s = 0; s < AtOnce; ++s) {
                weight[s] = shfl(own_weight, next + s);
                const u64 head = weight[s] == 0.0f ? 0 : static_cast<u64>(first + next + s) * stride;
                const f32x4* from = reinterpret_cast<const f32x4*>(acc + head * HEAD_DIM) + lane * (KV_PER_LANE / 4);
                UNROLL
                for (u32 i = 0; i < KV_PER_LANE / 4; ++i) values[s][i] = from[i];
            }
            UNROLL
            for (u32 s = 0; s < AtOnce; ++s) {
                denominator = fma_rn(shfl(own_sum, next + s), weight[s], denominator);
                UNROLL
                for (u32 i = 0; i < KV_PER_LANE; ++i) v[i] = fma_rn(values[s][i / 4].v[i % 4], weight[s], v[i]);
            }
        }
    }
    const float factor = div_rn(1.0f, denominator);
    UNROLL
    for (u32 i = 0; i < KV_PER_LANE; ++i) v[i] = round_bf16(mul_rn(v[i], factor));
}

// The same of one split for some of its channels, by any thread.
struct OneSplit {
    float weight, factor;

    INLINE float value(float x) const { return round_bf16(mul_rn(fma_rn(x, weight, 0.0f), factor)); }
};
INLINE OneSplit one_split(float max_score, float sum, float sink) {
    const float max = max_f32(sink, max_score), weight = exp_f32(max_score - max);
    return {weight, div_rn(1.0f, fma_rn(sum, weight, exp_f32(sink - max)))};
}
