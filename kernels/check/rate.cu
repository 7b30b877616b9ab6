// rate_bf16: how fast the tensor cores multiply when nothing else is in their way.
//
// Not an operator: a ceiling for benches. Every warp multiplies fragments of normal values that stay
// in registers, into sums that depend on nothing else.
// Outputs  out [grid, threads / 32] f32: a value of every warp, so that nothing is left out
// Launch   any grid of 256 threads. A warp does 16 n_rounds products of 16 x 8 x 16.
// Arch     sm_80 and later. On sm_90a `rate90.cu` is faster, on sm_100f there are faster instructions.

#include "../include/device.cuh"

constexpr u32 THREADS = 256, CHAINS = 16;

INLINE u32 pair_of(u32 x) {
    x *= 0x9e3779b9u, x ^= x >> 15, x *= 0x846ca68bu;
    return pack_bf16x2(static_cast<float>(x & 255u) / 128.0f - 1.0f,
                       static_cast<float>(x >> 8 & 255u) / 128.0f - 1.0f);
}

extern "C" __global__ void __launch_bounds__(256) rate_bf16(float* __restrict__ out, u32 n_rounds) {
    const u32 first = (blockIdx.x * THREADS + threadIdx.x) * 8;
    u32 a[4], b[2];
    for (u32 i = 0; i < 4; ++i) a[i] = pair_of(first + i);
    for (u32 i = 0; i < 2; ++i) b[i] = pair_of(first + 4 + i);
    float d[CHAINS][4] = {};
    for (u32 round = 0; round < n_rounds; ++round) {
        UNROLL
        for (u32 i = 0; i < CHAINS; ++i) mma_bf16_16816(d[i], a[0], a[1], a[2], a[3], b[0], b[1]);
    }
    float sum = 0.0f;
    UNROLL
    for (u32 i = 0; i < CHAINS; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (lane_id() == 0) out[blockIdx.x * (THREADS / WARP) + warp_id()] = sum;
}
EMU_KERNEL(rate_bf16)
