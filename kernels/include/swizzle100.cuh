// Operands of `mma_scaled` in shared memory, and what it is told of them (sm_100f).
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
