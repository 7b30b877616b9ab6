// Device bodies: products of a warpgroup, `wgmma` (sm_90a).
//
// d[64][N] (+)= A[64][K] B[K][N] by four warps, K = 32 bytes of a row. Fragments (warp w, lane l,
// g = l / 4, t = l % 4):
//   D  d[4 j + i]: row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2
//   A  E4M3 a[r]: row 16 w + g + 8 (r % 2), k = 4 t .. + 3 + 16 (r / 2)
//      bf16 a[r]: row 16 w + g + 8 (r % 2), k = 2 t .. + 1 + 8 (r / 2)
// Matrices in shared memory have the 128-byte swizzle: `matrix_k_major` and `matrix_mn_major`.
//
// A product is asynchronous: `wgmma_fence`, products, `wgmma_commit`, `wgmma_wait`. Until the wait
// its accumulators and its registers of A may not be touched.
//
// Twin: `host90.cuh`. Included by `device.cuh` only.
#pragma once

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` groups are under way. The compiler learns that `d` changes here.
template <int Pending, int R>
INLINE void wgmma_wait(float (&d)[R]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
    UNROLL
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
constexpr bool no_such_width = false;

// Operands 0 .. n - 1 as PTX text, and as constraints on an array.
#define TEXT_4 "%0, %1, %2, %3"
#define TEXT_8 TEXT_4 \
    ", %4, %5, %6, %7"
#define TEXT_16 TEXT_8 \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT_32 TEXT_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_64 TEXT_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_128 TEXT_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LIST_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LIST_8(d, i) LIST_4(d, i), LIST_4(d, i + 4)
#define LIST_16(d, i) LIST_8(d, i), LIST_8(d, i + 8)
#define LIST_32(d, i) LIST_16(d, i), LIST_16(d, i + 16)
#define LIST_64(d, i) LIST_32(d, i), LIST_32(d, i + 32)
#define LIST_128(d, i) LIST_64(d, i), LIST_64(d, i + 64)

// The predicate that decides whether d is added to, from the operand `number`.
#define WGMMA(number, text) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" number ", 0;\nwgmma.mma_async.sync.aligned." text "\n}"
// A in registers: operands after d are its four registers, B's descriptor, the predicate.
#define WGMMA_REGISTERS(shape, types, tail, r, a0, a1, a2, a3, b, p)                              \
    asm volatile(WGMMA(#p, shape types " {" TEXT_##r "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3    \
                                       "}, %" #b ", p, " tail ";")                                \
                 : LIST_##r(d, 0)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix),                     \
                   "r"(static_cast<u32>(accumulate)))
// A in shared memory: operands after d are both descriptors and the predicate.
#define WGMMA_SHARED(shape, types, tail, r, a, b, p)                                              \
    asm volatile(WGMMA(#p, shape types " {" TEXT_##r "}, %" #a ", %" #b ", p, " tail ";")         \
                 : LIST_##r(d, 0)                                                                 \
                 : "l"(a_matrix), "l"(b_matrix), "r"(static_cast<u32>(accumulate)))

// E4M3 times E4M3, A in registers.
template <int N>
INLINE void wgmma_e4m3(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    if constexpr (N == 8) WGMMA_REGISTERS("m64n8k32", ".f32.e4m3.e4m3", "1, 1", 4, 4, 5, 6, 7, 8, 9);
    else if constexpr (N == 32) WGMMA_REGISTERS("m64n32k32", ".f32.e4m3.e4m3", "1, 1", 16, 16, 17, 18, 19, 20, 21);
    else if constexpr (N == 64) WGMMA_REGISTERS("m64n64k32", ".f32.e4m3.e4m3", "1, 1", 32, 32, 33, 34, 35, 36, 37);
    else if constexpr (N == 128) WGMMA_REGISTERS("m64n128k32", ".f32.e4m3.e4m3", "1, 1", 64, 64, 65, 66, 67, 68, 69);
    else static_assert(no_such_width<N>, "add this width to the list");
}
// The same, A in shared memory.
template <int N>
INLINE void wgmma_e4m3_shared(float (&d)[N / 2], u64 a_matrix, u64 b_matrix, bool accumulate) {
    if constexpr (N == 8) WGMMA_SHARED("m64n8k32", ".f32.e4m3.e4m3", "1, 1", 4, 4, 5, 6);
    else if constexpr (N == 64) WGMMA_SHARED("m64n64k32", ".f32.e4m3.e4m3", "1, 1", 32, 32, 33, 34);
    else if constexpr (N == 128) WGMMA_SHARED("m64n128k32", ".f32.e4m3.e4m3", "1, 1", 64, 64, 65, 66);
    else static_assert(no_such_width<N>, "add this width to the list");
}
// bf16 times bf16, both K-major in shared memory.
template <int N>
INLINE void wgmma_bf16_shared(float (&d)[N / 2], u64 a_matrix, u64 b_matrix, bool accumulate) {
    if constexpr (N == 8) WGMMA_SHARED("m64n8k16", ".f32.bf16.bf16", "1, 1, 0, 0", 4, 4, 5, 6);
    else if constexpr (N == 64) WGMMA_SHARED("m64n64k16", ".f32.bf16.bf16", "1, 1, 0, 0", 32, 32, 33, 34);
    else if constexpr (N == 128) WGMMA_SHARED("m64n128k16", ".f32.bf16.bf16", "1, 1, 0, 0", 64, 64, 65, 66);
    else static_assert(no_such_width<N>, "add this width to the list");
}
// The same, A in registers.
template <int N>
INLINE void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    if constexpr (N == 8) WGMMA_REGISTERS("m64n8k16", ".f32.bf16.bf16", "1, 1, 0", 4, 4, 5, 6, 7, 8, 9);
    else if constexpr (N == 64) WGMMA_REGISTERS("m64n64k16", ".f32.bf16.bf16", "1, 1, 0", 32, 32, 33, 34, 35, 36, 37);
    else if constexpr (N == 128) WGMMA_REGISTERS("m64n128k16", ".f32.bf16.bf16", "1, 1, 0", 64, 64, 65, 66, 67, 68, 69);
    else static_assert(no_such_width<N>, "add this width to the list");
}
// bf16 times bf16, A in registers, B with its columns side by side (`matrix_mn_major`).
template <int N>
INLINE void wgmma_bf16_mn(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    if constexpr (N == 256) WGMMA_REGISTERS("m64n256k16", ".f32.bf16.bf16", "1, 1, 1", 128, 128, 129, 130, 131, 132, 133);
    else static_assert(no_such_width<N>, "add this width to the list");
}

#undef WGMMA
#undef WGMMA_REGISTERS
#undef WGMMA_SHARED
