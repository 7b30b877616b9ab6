// act_quant_tiles: rows of activations to FP8 tiles, as `pipeline90.cuh` copies them.
//
// Source   `act_quant` of the official release, and the gathering of a step's tokens by expert.
// Inputs   x [.., width] bf16
//          pairs: row i of the tiles is row `pairs[i] / per_row` of x, zeros if `pairs[i]` is ~0, for
//          i below n_items[1] (`moe_group`); or null: rows are those of x, zeros from n_rows on
// Outputs  codes [ceil(width / 128)][x_rows][128] E4M3, the 16-byte pieces of a row exchanged by its
//          number (128-byte swizzle); scales [ceil(width / 128)][x_rows] f32
// Launch   grid (ceil(x_rows / 16), ceil(width / 128)), 256 threads: two rows per warp. x_rows is a
//          multiple of 8, width of 8.
// Limit    memory: 3 bytes per value.
// Arch     sm_90a.
// CPU twin `ops::cpu::quant::quantise_linear_input`; equal values.

#include "../include/pipeline90.cuh"

extern "C" __global__ void __launch_bounds__(256) act_quant_tiles(
    const bf16* __restrict__ x, const u32* __restrict__ pairs, const u32* __restrict__ n_items,
    u8* __restrict__ codes, float* __restrict__ scales, u32 width, u32 n_rows, u32 x_rows, u32 per_row) {
    dependency_begin(x, pairs, n_items);
    const u32 lane = lane_id(), row = blockIdx.x * 16 + warp_id() * 2 + lane / 16, block = blockIdx.y;
    const u32 column = lane % 16 * PER_THREAD, n_used = pairs ? n_items[1] : n_rows;
    u32 from = row < n_used ? pairs ? pairs[row] : row : ~0u;
    u32x4 packed = {};
    if (from != ~0u && block * K_BLOCK + column < width) {
        from = pairs ? from / per_row : from;
        packed = *reinterpret_cast<const u32x4*>(x + static_cast<u64>(from) * width + block * K_BLOCK + column);
    }
    u32x2 packed_codes;
    const u32 scale = quantise_codes(packed, packed_codes);
    if (row >= x_rows) return;
    const u64 at = static_cast<u64>(block) * x_rows + row;
    *reinterpret_cast<u32x2*>(codes + at * K_BLOCK + (column ^ row % 8 * 16)) = packed_codes;
    if (lane % 16 == 0) scales[at] = e8m0_to_f32(scale);
}
EMU_KERNEL(act_quant_tiles)
