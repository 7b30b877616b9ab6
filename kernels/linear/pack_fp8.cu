// linear_pack_fp8: an FP8 matrix from the checkpoint's layout to tiles for `linear90.cu`.
//
// Inputs   codes [n_rows, k] E4M3, k a multiple of 16
// Outputs  tiles [ceil(n_rows / 64)][ceil(k / 128)][8192 B]: 64 rows of 128 codes, the 16-byte pieces
//          of a row exchanged by its number (128-byte swizzle); zeros behind the last row and column
// Launch   grid (ceil(k / 128), ceil(n_rows / 64)), 128 threads.
// Limit    memory, once per load.
// Arch     sm_80 and later; used on sm_90a.
// CPU twin none: products with the packed matrix are compared.

#include "../include/swizzle.cuh"

constexpr u32 TILE_ROWS = 64, K_BLOCK = 128, TILE_BYTES = TILE_ROWS * K_BLOCK, PIECE = 16;

extern "C" __global__ void __launch_bounds__(128) linear_pack_fp8(
    const u8* __restrict__ codes, u8* __restrict__ tiles, u32 n_rows, u32 k) {
    u8* out = tiles + (static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x) * TILE_BYTES;
    for (u32 i = threadIdx.x; i < TILE_BYTES / PIECE; i += 128) {
        const u32 row = i / (K_BLOCK / PIECE), byte = i % (K_BLOCK / PIECE) * PIECE;
        const u32 from_row = blockIdx.y * TILE_ROWS + row, column = blockIdx.x * K_BLOCK + byte;
        u32x4 piece = {};
        if (from_row < n_rows && column < k)
            piece = *reinterpret_cast<const u32x4*>(codes + static_cast<u64>(from_row) * k + column);
        *reinterpret_cast<u32x4*>(out + swizzled(row, byte)) = piece;
    }
}
EMU_KERNEL(linear_pack_fp8)
