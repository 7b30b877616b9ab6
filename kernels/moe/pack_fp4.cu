// moe_pack_fp4: an expert's FP4 matrix from the checkpoint's layout to tiles for `experts90.cu`.
//
// Inputs   codes [n_rows, k] E2M1, two per byte, and exponents [n_rows, k / 32] E8M0
//          up_codes, up_exponents: for gate and up, the up matrix; else null
// Outputs  tiles [row tiles][ceil(k / 128)][4352 B], see `pipeline90.cuh`. Gate and up: a tile has 32
//          channels, in each 16 of its rows 8 gate channels, then the same channels of up.
//          n_wide [1] u32: counts the blocks of 128 whose scales are too far apart to fold. The caller
//          sets it to 0; if it is not afterwards, the matrix is packed again with `wide`.
// Launch   grid (ceil(k / 128), row tiles), 128 threads. Rows and columns behind the last are zeros.
// Limit    memory, once per load.
// Arch     sm_80 and later; used on sm_90a.
// CPU twin none: `MoeOps::moe` of the packed experts is compared.

#include "../include/formats.cuh"

constexpr u32 TILE_ROWS = 64, K_BLOCK = 128, TILE_BYTES = 4352, CODES = 4096;

// The four E8M0 bytes of a row's block of 128, and which of its four parts hold any number but zero.
INLINE u32 row_exponents(const u8* codes, const u8* exponents, u32 row, u32 k, u32 k0, u32& used) {
    u32 bytes = 0;
    used = 0;
    for (u32 part = 0; part < 4; ++part) {
        const u32 column = k0 + 32 * part;
        if (column >= k) break;
        const u64 index = static_cast<u64>(row) * k + column;
        const u32x4 packed = *reinterpret_cast<const u32x4*>(codes + index / 2);
        const u32 any = (packed.v[0] | packed.v[1] | packed.v[2] | packed.v[3]) & 0x77777777u;
        bytes |= static_cast<u32>(exponents[index / 32]) << 8 * part;
        if (any) used |= 1u << part;
    }
    return bytes;
}

// Eight codes at nibble order to the order that `expand_fp4` takes.
INLINE u32 reorder(u32 first, u32 second) {
    // `first`: codes k .. k + 3 in 16 bits; `second`: k + 16 .. k + 19.
    u32 out = (first & 0x7777u) | (second & 0x7777u) << 16;
    for (u32 i = 0; i < 4; ++i) {
        out |= (first >> (4 * i + 3) & 1u) << (8 * i + 7);
        out |= (second >> (4 * i + 3) & 1u) << (8 * i + 3);
    }
    return out;
}

extern "C" __global__ void __launch_bounds__(128) moe_pack_fp4(
    const u8* __restrict__ codes, const u8* __restrict__ exponents, const u8* __restrict__ up_codes,
    const u8* __restrict__ up_exponents, u8* __restrict__ tiles, u32* __restrict__ n_wide, u32 n_rows,
    u32 k, u32 wide) {
    const u32 t = threadIdx.x, k0 = blockIdx.x * K_BLOCK, tile = blockIdx.y;
    u8* out = tiles + (static_cast<u64>(tile) * gridDim.x + blockIdx.x) * TILE_BYTES;
    // Row `row` of this tile: its matrix and its row there; n_rows for none.
    const auto source = [&](u32 row, bool& is_up) {
        is_up = up_codes && row % 16 >= 8;
        return up_codes ? tile * (TILE_ROWS / 2) + row / 16 * 8 + row % 8 : tile * TILE_ROWS + row;
    };
    const u32 first_row = t / WARP * 16 + t % WARP / 4;
    for (u32 half = 0; half < 2; ++half) {
        u32x4 vector = {};
        for (u32 i = 0; i < 4; ++i) {
            bool is_up;
            const u32 row = source(first_row + 8 * (i % 2), is_up);
            const u32 column = k0 + 32 * (2 * half + i / 2) + 4 * (t % 4);
            if (row >= n_rows || column >= k) continue;
            const u64 at = (static_cast<u64>(row) * k + column) / 2;
            const u8* from = is_up ? up_codes : codes;
            vector.v[i] = reorder(*reinterpret_cast<const u16*>(from + at),
                                  *reinterpret_cast<const u16*>(from + at + 8));
        }
        *reinterpret_cast<u32x4*>(out + half * (CODES / 2) + t * 16) = vector;
    }
    if (t >= TILE_ROWS) return;
    bool is_up;
    const u32 row = source(t, is_up);
    u32 word = 0;
    if (row < n_rows) {
        u32 used;
        const u32 bytes = row_exponents(is_up ? up_codes : codes, is_up ? up_exponents : exponents, row, k, k0, used);
        u32 largest = 0;
        for (u32 part = 0; part < 4; ++part)
            if (used >> part & 1) largest = max_u32(largest, bytes >> 8 * part & 255u);
        // What is folded is 2^(byte - reference), -5 .. 6.
        const u32 reference = max_u32(largest, 6) - 6;
        bool is_wide = false;
        word = reference << 16;
        for (u32 part = 0; part < 4; ++part) {
            const u32 byte = bytes >> 8 * part & 255u;
            if (!(used >> part & 1)) continue;
            if (byte + 5 < reference) is_wide = true;
            else word |= (byte + 5 - reference) << 4 * part;
        }
        if (wide) word = bytes;
        else if (is_wide) atomic_add(n_wide, 1);
    }
    *reinterpret_cast<u32*>(out + CODES + 4 * t) = word;
}
EMU_KERNEL(moe_pack_fp4)
