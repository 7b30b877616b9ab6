// Matrices in shared memory as tensor cores of sm_90 read them: rows of 128 bytes, 8 rows to a
// group of 1,024 bytes, 16-byte pieces of a row exchanged by the row's number (128-byte swizzle).
//
// A matrix begins at a multiple of 1,024. Compared with CuTe's layouts by `scripts/oracle`.
#pragma once

#include "device.cuh"

constexpr u32 SWIZZLE_ROW = 128, SWIZZLE_GROUP = 1024;

// Place of byte `byte` (< 128) of row `row`.
INLINE u32 swizzled(u32 row, u32 byte) { return row * SWIZZLE_ROW + (byte ^ row % 8 * 16); }

// Descriptor of a matrix whose rows (of A or of B^T) are the rows of memory, in groups one behind
// the other. The next 32 bytes of K are `+ 2`.
INLINE u64 matrix_k_major(const void* start) {
    return static_cast<u64>((smem_u32(start) & 0x3ffffu) >> 4) | 1ull << 16 |
           static_cast<u64>(SWIZZLE_GROUP >> 4) << 32 | 1ull << 62;
}
// Descriptor of a B whose rows of memory are k and hold 64 columns (bf16) each; the next 64 columns
// begin `column_stride` bytes further on. The next 16 values of K are `+ 128`.
INLINE u64 matrix_mn_major(const void* start, u32 column_stride) {
    return static_cast<u64>((smem_u32(start) & 0x3ffffu) >> 4) | static_cast<u64>(column_stride >> 4) << 16 |
           static_cast<u64>(SWIZZLE_GROUP >> 4) << 32 | 1ull << 62;
}
