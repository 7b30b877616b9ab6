// rms_norm: `x * rsqrt(mean(x^2) + eps) * weight` per row, and the same on the FP8 grid.
//
// Source   `RMSNorm.forward` and `act_quant` of the official release.
// Inputs   x [n_rows, width] bf16    weight [width] f32
// Outputs  normed [n_rows, width] bf16
//          quantised [n_rows, width] bf16, `normed` on the FP8 grid of its blocks of 128; may be null
// Launch   one block of 256 threads per row; the row waits in registers between the two passes.
//          Width is a multiple of 8, at most 8,192.
// Limit    memory: 4 to 6 bytes per value.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::norm::rms_norm`, `quant::quantise_linear_input`; the sum of squares is taken
//          in another order: 1 bf16 ulp, and one FP8 step where that ulp crosses a tie.

#include "../include/rows.cuh"

constexpr u32 THREADS = 256, MAX_CHUNKS = 4;

struct NormShared {
    float sums[THREADS / WARP];
};

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const bf16* __restrict__ x, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, u32 width, float eps) {
    dependency_begin(x);
    NormShared& s = shared<NormShared>();
    const u64 row = static_cast<u64>(blockIdx.x) * width;
    float v[MAX_CHUNKS][8] = {};
    float squares = 0.0f;
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        const u32 i = (chunk * THREADS + threadIdx.x) * PER_THREAD;
        if (i < width) load8(x + row + i, v[chunk]);
        UNROLL
        for (u32 j = 0; j < 8; ++j) squares = fma_rn(v[chunk][j], v[chunk][j], squares);
    }
    const float mean = block_sum(squares, s.sums) / static_cast<float>(width);
    const float factor = div_rn(1.0f, sqrt_rn(mean + eps));
    UNROLL
    for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
        // A block of 128 values is 16 lanes: whole warps go on while any of their values exists.
        const u32 i = (chunk * THREADS + threadIdx.x) * PER_THREAD;
        if ((chunk * THREADS + warp_id() * WARP) * PER_THREAD >= width) break;
        if (i < width) {
            UNROLL
            for (u32 j = 0; j < 8; ++j) v[chunk][j] = mul_rn(mul_rn(v[chunk][j], factor), weight[i + j]);
            store8(normed + row + i, v[chunk]);
        }
        if (quantised == nullptr) continue;
        round8(v[chunk]);
        quantise_block128(v[chunk]);
        if (i < width) store8(quantised + row + i, v[chunk]);
    }
}
EMU_KERNEL(rms_norm)
