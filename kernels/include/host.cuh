// Host bodies: the wrappers of `ptx_*.cuh` for the emulator, thin calls into `kernels/emulator`.
//
// Registers are passed by reference on both sides, so a fragment layout is the same text. What
// concerns one thread is done here; what concerns a warp or the block goes to the emulator.
//
// Approximations of the special function unit are modelled as exact; tolerances say so.
#pragma once

#include <math.h>
#include <string.h>

#include "../emulator/emulator.h"

#define UNROLL
#define ROLLED
#define INLINE inline __attribute__((always_inline))
#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define threadIdx (emu::current->thread)
#define blockIdx (emu::current->block_id)
#define blockDim (emu::launch.block)
#define gridDim (emu::launch.grid)
#define EMU_KERNEL(name, ...) \
    static const emu::Kernel emu_kernel_##name(#name, [](void** p) { emu::invoke(&name, p); }, emu::sizes_of(&name), {__VA_ARGS__});

INLINE u32 float_bits(float x) { return __builtin_bit_cast(u32, x); }
INLINE float bits_float(u32 x) { return __builtin_bit_cast(float, x); }
INLINE u64 double_bits(double x) { return __builtin_bit_cast(u64, x); }
INLINE double bits_double(u64 x) { return __builtin_bit_cast(double, x); }

INLINE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
INLINE float mul_rn(float a, float b) { return a * b; }
INLINE float add_rn(float a, float b) { return a + b; }
INLINE float div_rn(float a, float b) { return a / b; }
INLINE float sqrt_rn(float x) { return sqrtf(x); }
INLINE double mul_rn64(double a, double b) { return a * b; }
INLINE double add_rn64(double a, double b) { return a + b; }
INLINE double div_rn64(double a, double b) { return a / b; }
INLINE float exp_f32(float x) { return expf(x); }
INLINE float log1p_f32(float x) { return log1pf(x); }
INLINE void sincos_f32(float x, float& sin, float& cos) { sin = sinf(x), cos = cosf(x); }
INLINE float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
INLINE float max_f32(float a, float b) { return fmaxf(a, b); }
INLINE float min_f32(float a, float b) { return fminf(a, b); }
INLINE float abs_f32(float x) { return fabsf(x); }
INLINE u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
INLINE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

INLINE u32 byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 pick = selector >> 4 * i & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (pick & 7)) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0; // replicate the sign
        out |= byte << 8 * i;
    }
    return out;
}
INLINE u32 popcount(u32 x) { return static_cast<u32>(__builtin_popcount(x)); }
INLINE u32 count_leading_zeros(u32 x) { return x ? static_cast<u32>(__builtin_clz(x)) : 32; }

INLINE u32 host_bf16(float x) {
    const u32 bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE u32 pack_bf16x2(float low, float high) { return host_bf16(high) << 16 | host_bf16(low); }
INLINE u32 mul_bf16x2(u32 a, u32 b) {
    // The product of two bf16 values is exact in f32 unless it is subnormal there; double covers it.
    const double low = static_cast<double>(bits_float(a << 16)) * bits_float(b << 16);
    const double high = static_cast<double>(bits_float(a & 0xffff0000u)) * bits_float(b & 0xffff0000u);
    return pack_bf16x2(static_cast<float>(low), static_cast<float>(high));
}

INLINE u32x4 load_stream16(const void* p) { return *static_cast<const u32x4*>(p); }

template <class T>
INLINE T& shared() {
    return *static_cast<T*>(emu::shared_memory(sizeof(T)));
}
INLINE u32 smem_u32(const void* p) { return emu::shared_address(p); }

INLINE void block_sync() { emu::barrier(0, 0); }
template <int Id>
INLINE void named_sync(u32 n_threads) {
    emu::barrier(Id, n_threads);
}
INLINE void warp_sync() { emu::warp_sync(); }

template <class T>
INLINE T shfl_to(T value, u32 lane) {
    static_assert(sizeof(T) == 4);
    return __builtin_bit_cast(T, emu::shuffle(__builtin_bit_cast(u32, value), lane));
}
template <class T>
INLINE T shfl_xor(T value, u32 lanes) {
    return shfl_to(value, (threadIdx.x % 32) ^ lanes);
}
template <class T>
INLINE T shfl(T value, u32 lane) {
    return shfl_to(value, lane % 32);
}
template <class T>
INLINE T shfl_up(T value, u32 delta) {
    const u32 lane = threadIdx.x % 32;
    return shfl_to(value, lane >= delta ? lane - delta : lane);
}
INLINE u32 ballot(bool predicate) { return emu::ballot(predicate); }

INLINE void dependency_wait() { emu::dependency_wait(); }
INLINE void dependency_trigger() {}
template <class T>
INLINE T* after_wait(T* p) {
    return p;
}
INLINE void prefetch(const void* p, u32 bytes) { emu::prefetch(p, bytes); }

INLINE u32 atomic_add(u32* p, u32 x) { return emu::atomic_add(p, x); }
INLINE void atomic_add64(u64* p, u64 x) { emu::atomic_add64(p, x); }
INLINE u32 atomic_add_ordered(u32* p, u32 x) { return emu::atomic_add(p, x); }

INLINE void cp_async16(void* destination, const void* source, bool valid) {
    emu::cp_async(destination, source, 16, valid);
}
INLINE void cp_async_commit() { emu::cp_async_commit(); }
template <int Pending>
INLINE void cp_async_wait() {
    emu::cp_async_wait(Pending);
}

INLINE void ldmatrix_x4(u32 (&r)[4], const void* row) { emu::ldmatrix(r, row, false); }
INLINE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { emu::ldmatrix(r, row, true); }
INLINE void mma_bf16_16816(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    emu::mma_bf16(d, a, b);
}

#include "host90.cuh"
#include "host100.cuh"
