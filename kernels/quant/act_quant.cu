// act_quant: activations on the FP8 grid of their blocks of 128, as bf16 values or as codes.
//
// Source   `act_quant` of the official release.
// Inputs   x [n_rows, width] bf16
// Outputs  act_quant_grid: out [n_rows, width] bf16, code times scale (exact in bf16)
//          act_quant: codes [n_rows, width] E4M3, scales [n_rows, ceil(width / 128)] E8M0
// Launch   grid (ceil(width / 2048), n_rows), 256 threads of 8 values. Width is a multiple of 8.
// Limit    memory: 3 to 4 bytes per value. Hot operators quantise in their prologue instead.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::quant::quantise_linear_input`; equal bits.

#include "../include/rows.cuh"

constexpr u32 THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) act_quant_grid(
    const bf16* __restrict__ x, bf16* __restrict__ out, u32 width) {
    dependency_begin(x);
    const u32 i = (blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    const u64 at = static_cast<u64>(blockIdx.y) * width + i;
    float v[8] = {};
    if (i < width) load8(x + at, v);
    quantise_block128(v);
    if (i < width) store8(out + at, v);
}
EMU_KERNEL(act_quant_grid)

extern "C" __global__ void __launch_bounds__(THREADS) act_quant(
    const bf16* __restrict__ x, u8* __restrict__ codes, u8* __restrict__ scales, u32 width) {
    dependency_begin(x);
    const u32 i = (blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    const u64 at = static_cast<u64>(blockIdx.y) * width + i;
    float v[8] = {};
    if (i < width) load8(x + at, v);
    float amax = 0.0f;
    UNROLL
    for (u32 j = 0; j < 8; ++j) amax = max_f32(amax, abs_f32(v[j]));
    const u32 scale = fp8_block_scale(group_max<LINEAR_BLOCK / PER_THREAD>(amax));
    if (i >= width) return;
    u32x2 packed = {};
    UNROLL
    for (u32 j = 0; j < 8; ++j) {
        packed.v[j / 4] |= e4m3_from_f32(v[j] * e8m0_inverse(scale)) << 8 * (j % 4);
    }
    *reinterpret_cast<u32x2*>(codes + at) = packed;
    if (i % LINEAR_BLOCK == 0) {
        scales[blockIdx.y * ceil_div(width, LINEAR_BLOCK) + i / LINEAR_BLOCK] = static_cast<u8>(scale);
    }
}
EMU_KERNEL(act_quant)
