// Sums and maxima over a warp and over a block, in one fixed order.
//
// Warp: a butterfly, so every lane holds the same bits. Block: warps' results added in warp order
// by every thread.
#pragma once

#include "device.cuh"

INLINE float warp_sum(float x) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) x = add_rn(x, shfl_xor(x, lanes));
    return x;
}
INLINE float warp_max(float x) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) x = max_f32(x, shfl_xor(x, lanes));
    return x;
}
// The same over aligned groups of `Lanes` lanes.
template <u32 Lanes>
INLINE float group_max(float x) {
    for (u32 lanes = Lanes / 2; lanes > 0; lanes /= 2) x = max_f32(x, shfl_xor(x, lanes));
    return x;
}

// Sum over the block; `scratch` holds a float per warp. Ends with a barrier, so that `scratch` can
// be used again at once.
INLINE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    block_sync();
    float sum = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / WARP; ++warp) sum = add_rn(sum, scratch[warp]);
    block_sync();
    return sum;
}
