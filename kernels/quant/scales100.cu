// linear_pack_scales100, moe_pack_scales100: scales of weights in the order of tensor memory, as
// `pipeline100.cuh` copies them.
//
// Inputs   linear: scales [ceil(n_rows / 128), ceil(k / 128)] f32, powers of two
//          moe: exponents [n_rows, k / 32] E8M0 of a matrix, and of up, where there are two; k is a
//          multiple of 128
// Outputs  out [row tiles][ceil(k / 128)][32][4] u32: word (l, c) is that of row 32 c + l of the tile, a
//          byte for each 32 of K. Gate and up: rows as in `moe/experts100.cu`. Scales of rows behind
//          the last are 1.
// Launch   grid (ceil(k / 128), row tiles), 128 threads.
// Limit    memory, once per load.
// Arch     sm_80 and later; used on sm_100f.
// CPU twin none: products with the packed scales are compared.

#include "../include/device.cuh"

constexpr u32 TILE_ROWS = 128, K_BLOCK = 128, ONE = 0x7f7f7f7fu;

INLINE void store_word(u32* out, u32 word) {
    const u64 tile = static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x;
    out[tile * TILE_ROWS + threadIdx.x % 32 * 4 + threadIdx.x / 32] = word;
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) linear_pack_scales100(
    const float* __restrict__ scales, u32* __restrict__ out) {
    // One scale for the tile: it is 128 rows, as the blocks of the checkpoint are.
    store_word(out, (float_bits(scales[blockIdx.y * gridDim.x + blockIdx.x]) >> 23 & 255u) * 0x01010101u);
}
EMU_KERNEL(linear_pack_scales100)

extern "C" __global__ void __launch_bounds__(TILE_ROWS) moe_pack_scales100(
    const u8* __restrict__ exponents, const u8* __restrict__ up_exponents, u32* __restrict__ out, u32 n_rows, u32 k) {
    const u32 t = threadIdx.x;
    const bool is_up = up_exponents && t % 32 >= 16;
    const u32 row = up_exponents ? blockIdx.y * 64 + t / 32 * 16 + t % 16 : blockIdx.y * TILE_ROWS + t;
    const u64 at = static_cast<u64>(row) * (k / 32) + blockIdx.x * (K_BLOCK / 32);
    store_word(out, row < n_rows ? *reinterpret_cast<const u32*>((is_up ? up_exponents : exponents) + at) : ONE);
}
EMU_KERNEL(moe_pack_scales100)
