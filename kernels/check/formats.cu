// check_formats, check_expand: every number format conversion, on whatever is given.
//
// Not operators: they let a test run `formats.cuh` over all codes and all bf16 values, in the
// emulator and on a GPU, and compare with `core::num`.
//
// Launch   one thread per value (per eight codes for `check_expand`).
// Arch     sm_80 and later.

#include "../include/formats.cuh"

// For each `x` f32: the E4M3 code, the E2M1 code, bf16 bits, the FP8 and FP4 block scale of |x|.
extern "C" __global__ void __launch_bounds__(128) check_formats(
    const float* __restrict__ x, u8* __restrict__ e4m3, u8* __restrict__ e2m1,
    bf16* __restrict__ rounded, u8* __restrict__ fp8_scale, u8* __restrict__ fp4_scale, u32 n) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    e4m3[i] = static_cast<u8>(e4m3_from_f32(x[i]));
    e2m1[i] = static_cast<u8>(e2m1_from_f32(x[i]));
    rounded[i] = bf16_from_f32(x[i]);
    fp8_scale[i] = static_cast<u8>(fp8_block_scale(abs_f32(x[i])));
    fp4_scale[i] = static_cast<u8>(fp4_block_scale(abs_f32(x[i])));
}
EMU_KERNEL(check_formats)

// For each 4 bytes of `codes`: four E4M3 values, eight E2M1 values times the scale, in k order;
// and the values of the scalar conversions.
extern "C" __global__ void __launch_bounds__(128) check_expand(
    const u32* __restrict__ codes, u32 scale, float* __restrict__ e4m3, float* __restrict__ e2m1,
    float* __restrict__ e4m3_scalar, float* __restrict__ e2m1_scalar, u32 n) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 pairs[4];
    expand_e4m3(codes[i], pairs[0], pairs[1]);
    for (u32 j = 0; j < 2; ++j) {
        e4m3[4 * i + 2 * j] = bf16_low(pairs[j]);
        e4m3[4 * i + 2 * j + 1] = bf16_high(pairs[j]);
    }
    expand_e2m1(codes[i], fp4_multiplier(scale), pairs);
    for (u32 j = 0; j < 4; ++j) {
        e2m1[8 * i + j] = bf16_low(pairs[j]);
        e2m1[8 * i + j + 4] = bf16_high(pairs[j]);
        e4m3_scalar[4 * i + j] = e4m3_to_f32(codes[i] >> 8 * j & 255u);
    }
    for (u32 j = 0; j < 8; ++j) {
        e2m1_scalar[8 * i + j] = e2m1_to_f32(codes[i] >> 4 * j & 15u) * e8m0_to_f32(scale);
    }
}
EMU_KERNEL(check_expand)
