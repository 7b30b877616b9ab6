// What every kernel includes: plain types, bit casts, and one of two sets of bodies.
//
// The same kernel text is compiled by NVRTC for a GPU (bodies: inline PTX, `ptx_*.cuh`) and by the
// system's C++ compiler for the emulator (bodies: `host.cuh`). Kernel files therefore hold no asm,
// no CUDA intrinsic and no `__shared__`: everything that is not plain C++ is a wrapper of one of
// these headers, and a wrapper means on both sides what the PTX manual says.
//
// No CUDA header and no header of the standard library is included on the device side.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// 8 and 16 bytes that are loaded and stored at once.
struct alignas(8) u32x2 {
    u32 v[2];
};
struct alignas(16) u32x4 {
    u32 v[4];
};
struct alignas(16) f32x4 {
    float v[4];
};

// A bfloat16 as it lies in memory.
struct bf16 {
    u16 bits;
};

// A tensor map as the driver encodes it; opaque to kernels.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

constexpr u32 WARP = 32;

// A number as a type, to pass a template argument to a lambda.
template <u32 N>
struct Constant {
    static constexpr u32 value = N;
};

#if defined(__CUDACC_RTC__)
#define INLINE __device__ __forceinline__
// Makes a kernel known to the emulator, with its `emu::Options`; means nothing to the GPU.
#define EMU_KERNEL(name, ...)
// Before a loop of constant length whose body indexes registers.
#define UNROLL _Pragma("unroll")
// Before one that unrolled would take more registers than there are.
#define ROLLED _Pragma("unroll 1")
#include "ptx_base.cuh"
#include "ptx_async80.cuh"
#include "ptx_mma80.cuh"
#include "ptx_async90.cuh"
#include "ptx_wgmma90.cuh"
#include "ptx_tensor100.cuh"
#else
#include "host.cuh"
#endif

constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// Below every number.
INLINE float negative_infinity() { return bits_float(0xff800000u); }

// The first line of a dependent kernel that fetches no weights early; it is given the pointers to what is
// no weight.
template <class... Pointer>
INLINE void dependency_begin(Pointer&... inputs) {
    dependency_trigger(), dependency_wait();
    ((inputs = after_wait(inputs)), ...);
}

INLINE u32 lane_id() { return threadIdx.x % WARP; }
INLINE u32 warp_id() { return threadIdx.x / WARP; }
