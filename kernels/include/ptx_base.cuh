// Device bodies: bit casts, arithmetic with a fixed rounding, loads, barriers, shuffles,
// programmatic launch, atomics.
//
// Twin: `host.cuh`. Included by `device.cuh` only.
#pragma once

INLINE u32 float_bits(float x) { return __float_as_uint(x); }
INLINE float bits_float(u32 x) { return __uint_as_float(x); }
INLINE u64 double_bits(double x) { return static_cast<u64>(__double_as_longlong(x)); }
INLINE double bits_double(u64 x) { return __longlong_as_double(static_cast<long long>(x)); }

// One rounding each, never contracted: for results whose bits are compared.
INLINE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
INLINE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
INLINE float sqrt_rn(float x) { return __fsqrt_rn(x); }
INLINE double mul_rn64(double a, double b) { return __dmul_rn(a, b); }
INLINE double add_rn64(double a, double b) { return __dadd_rn(a, b); }
INLINE double div_rn64(double a, double b) { return __ddiv_rn(a, b); }

// Full range and accuracy; slower than the approximations of the special function unit.
INLINE float exp_f32(float x) { return expf(x); }
INLINE float log1p_f32(float x) { return log1pf(x); }
INLINE void sincos_f32(float x, float& sin, float& cos) { sincosf(x, &sin, &cos); }
// 2^x with a relative error of 2^-22; 0 below the normal range.
INLINE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float max_f32(float a, float b) { return fmaxf(a, b); }
INLINE float min_f32(float a, float b) { return fminf(a, b); }
INLINE float abs_f32(float x) { return fabsf(x); }
INLINE u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
INLINE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

// Bytes of {a (0..3), b (4..7)} picked by the four nibbles of `selector`; with 8 added, eight times the byte's sign.
// (The compiler's own function leaves that bit out.)
INLINE u32 byte_perm(u32 a, u32 b, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}
INLINE u32 popcount(u32 x) { return __popc(x); }
INLINE u32 count_leading_zeros(u32 x) { return __clz(x); }

// Two floats to bf16, nearest even; `low` goes to the low half.
INLINE u32 pack_bf16x2(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
// Both halves a * b, one rounding each; subnormal values are kept.
INLINE u32 mul_bf16x2(u32 a, u32 b) {
    u32 out;
    // sm_80 has no multiplication of bf16 pairs; adding minus zero changes no product.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
    return out;
}

// 16 bytes that are read once: not kept in the first-level cache.
INLINE u32x4 load_stream16(const void* p) {
    u32x4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3])
                 : "l"(p));
    return x;
}

// The block's dynamic shared memory, seen as a `T` without constructors.
template <class T>
INLINE T& shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return *reinterpret_cast<T*>(dynamic_shared);
}
// Address of shared memory as instructions take it.
INLINE u32 smem_u32(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

INLINE void block_sync() { __syncthreads(); }
// The first `n_threads` to arrive at barrier `id` (1..15) wait for each other.
template <int Id>
INLINE void named_sync(u32 n_threads) {
    asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(n_threads) : "memory");
}
INLINE void warp_sync() { __syncwarp(); }

template <class T>
INLINE T shfl_xor(T value, u32 lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}
template <class T>
INLINE T shfl(T value, u32 lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
// The value of the lane `delta` below; lanes without one keep their own.
template <class T>
INLINE T shfl_up(T value, u32 delta) {
    return __shfl_up_sync(0xffffffffu, value, delta);
}
INLINE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Programmatic launch, for kernels that are `dependent` in the manifest; nothing before sm_90. A launch may
// begin when all blocks of the one before it have begun, and every block of it waits for that one's end:
// before it reads what is no weight, and before it stores.
INLINE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next launch begin: at once, since until its wait it touches nothing but weights.
INLINE void dependency_trigger() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// `p` as known only from here on. The compiler takes what a __restrict__ parameter points to for the same
// all through the kernel, and may load it before a wait.
template <class T>
INLINE T* after_wait(T* p) {
#if __CUDA_ARCH__ >= 900
    asm volatile("" : "+l"(p)::"memory");
#endif
    return p;
}
// Begins to bring `bytes` weights to the second-level cache; address and length are multiples of 16.
INLINE void prefetch(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

INLINE u32 atomic_add(u32* p, u32 x) { return atomicAdd(p, x); }
INLINE void atomic_add64(u64* p, u64 x) { atomicAdd(p, x); }
// The same in global memory, behind all stores that this thread has seen and before all its later loads: who
// finds the last count finds what all others stored.
INLINE u32 atomic_add_ordered(u32* p, u32 x) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}
