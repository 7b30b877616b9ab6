// Operands of tensor cores' products in shared memory, and what these are told of them (sm_100f).
//
// Descriptors as in the PTX manual, "tcgen05 shared memory descriptor" and "instruction descriptor".
#pragma once

#include "swizzle.cuh"

// Rows of 128 bytes with the 128-byte swizzle, 8 rows to a group of 1,024 bytes, groups one behind
// the other, from a multiple of 1,024 on. The next 32 values of K are `+ 2`.
INLINE u64 tensor_matrix(const void* start) {
    return static_cast<u64>((smem_u32(start) & 0x3ffffu) >> 4) | static_cast<u64>(SWIZZLE_GROUP >> 4) << 32 |
           1ull << 46 | 2ull << 61;
}
// A matrix whose rows of memory are k and hold 64 columns (bf16) each, in groups of 8 likewise; the next 64
// columns begin `column_stride` bytes further on. The next 16 values of K are `+ 128`.
INLINE u64 tensor_matrix_mn(const void* start, u32 column_stride) {
    return tensor_matrix(start) | static_cast<u64>(column_stride >> 4) << 16;
}
// 32 rows of 16 bytes, one behind the other: scales.
INLINE u64 matrix_rows16(const void* start) {
    return static_cast<u64>((smem_u32(start) & 0x3ffffu) >> 4) | static_cast<u64>(8 * 16 >> 4) << 32 | 1ull << 46;
}

// 128 rows of A, `n` columns of B (8 .. 256, a multiple of 8); A is E2M1 or E4M3, B is E4M3; scales
// are E8M0. `+ step * SCALE_BYTE`: byte `step` of the scales' words.
constexpr u32 SCALE_BYTE = 1u << 29 | 1u << 4;
template <bool IsFp4>
constexpr u32 scaled_kind(u32 n) {
    return (IsFp4 ? 5u : 0u) << 7 | n / 8 << 17 | 1u << 23 | (128u / 16) << 24;
}

// `m` rows of A (64 or 128), `n` columns of B (a multiple of 8, of 16 for 128 rows, up to 256), both bf16; sums are
// f32. B as `tensor_matrix_mn`, or as `tensor_matrix`.
template <bool BIsMn>
constexpr u32 bf16_kind(u32 m, u32 n) {
    return 1u << 4 | 1u << 7 | 1u << 10 | (BIsMn ? 1u << 16 : 0u) | n / 8 << 17 | m / 16 << 24;
}
