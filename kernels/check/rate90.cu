// rate90_e4m3: how fast the tensor cores of sm_90a multiply FP8 values, as `rate.cu`.
//
// Each of two warpgroups multiplies its registers (64 x 32) with one matrix in shared memory
// (32 x 128) again and again. The values are codes of random bits below 2 in magnitude: zeros would
// draw less power and run faster.
// Outputs  out [grid, 2] f32: a value of every warpgroup
// Launch   any grid of 256 threads with 16 KB of shared memory. A warpgroup does 4 n_rounds products
//          of 64 x 128 x 32.
// Arch     sm_90a.

#include "../include/swizzle.cuh"

constexpr u32 THREADS = 256, GROUP = 128, COLUMNS = 128;

struct RateShared {
    alignas(1024) u32 b[COLUMNS * SWIZZLE_ROW / 4];
};

INLINE u32 codes_of(u32 x) {
    x *= 0x9e3779b9u, x ^= x >> 15, x *= 0x846ca68bu;
    return (x ^ x >> 16) & 0xbfbfbfbfu;
}

extern "C" __global__ void __launch_bounds__(256) rate90_e4m3(float* __restrict__ out, u32 n_rounds) {
    RateShared& s = shared<RateShared>();
    for (u32 i = threadIdx.x; i < COLUMNS * SWIZZLE_ROW / 4; i += THREADS) s.b[i] = codes_of(i + blockIdx.x);
    fence_proxy_async();
    block_sync();
    u32 a[4];
    for (u32 i = 0; i < 4; ++i) a[i] = codes_of(threadIdx.x * 4 + i);
    float d[COLUMNS / 2] = {};
    const u64 b = matrix_k_major(s.b);
    for (u32 round = 0; round < n_rounds; ++round) {
        wgmma_fence();
        UNROLL
        for (u32 step = 0; step < 4; ++step) wgmma_e4m3<COLUMNS>(d, a, b + 2 * step, true);
        wgmma_commit();
        wgmma_wait<0>(d);
    }
    float sum = 0.0f;
    UNROLL
    for (u32 i = 0; i < COLUMNS / 2; ++i) sum += d[i];
    if (threadIdx.x % GROUP == 0) out[blockIdx.x * 2 + threadIdx.x / GROUP] = sum;
}
EMU_KERNEL(rate90_e4m3)
