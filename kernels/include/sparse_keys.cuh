// The keys of a token for blocks of 64 heads: rows of the window, then compressed entries, in blocks of 64
// keys, gathered and expanded to bf16 tiles with the 128-byte swizzle. A tile is read with its rows along K
// for the scores, and with its channels side by side for the values: one copy is both.
//
// Included by `attention/sparse100.cu`.
#pragma once

#include "formats.cuh"
#include "step.cuh"
#include "swizzle.cuh"

constexpr u32 KEYS = 64;
// 64 keys of 64 channels, swizzled; a row of 512 channels is 8 tiles.
constexpr u32 TILE = 8192, TILES = HEAD_DIM / 64;
constexpr float SOFTMAX_SCALE = 0.044194173f; // 512^-0.5
constexpr float LOG2_E = 1.44269504f;

// What the block attends to: keys of the window, then entries, in blocks of 64.
struct Keys {
    const u8 *window, *pending, *entries;
    const u32* chosen; // of this token; null: all entries
    Step step;
    const Sequence* sequence;
    u32 position, n_window, n_entries, window_blocks, ring, ratio;

    INLINE u32 count(u32 block) const {
        const u32 first = (block < window_blocks ? block : block - window_blocks) * KEYS;
        return min_u32(KEYS, (block < window_blocks ? n_window : n_entries) - first);
    }
    INLINE const u8* row(u32 block, u32 key) const {
        if (block < window_blocks) {
            const u32 at = position + 1 - n_window + block * KEYS + key;
            if (at >= sequence->position)
                return pending + static_cast<u64>(sequence->row + at - sequence->position) * KV_ROW_BYTES;
            return window + (static_cast<u64>(sequence->slot) * ring + at % ring) * KV_ROW_BYTES;
        }
        const u32 at = (block - window_blocks) * KEYS + key, entry = chosen ? chosen[at] : at;
        return entries + block_row(step, *sequence, entry, BLOCK_TOKENS / ratio) * KV_ROW_BYTES;
    }
};

// Half of a row as it lies in the cache: 32 of each 64 codes, 32 of the rotated channels; scales of all.
constexpr u32 CODES = NOPE_DIM / 16, ROPES = ROPE_DIM / 8;
struct HalfRow {
    u32x2 codes[CODES], ropes[ROPES], scales;
};

INLINE void load_half(const u8* row, u32 half, HalfRow& r) {
    r.scales = *reinterpret_cast<const u32x2*>(row + NOPE_DIM + 2 * ROPE_DIM);
    UNROLL
    for (u32 i = 0; i < CODES; ++i) r.codes[i] = *reinterpret_cast<const u32x2*>(row + i / 4 * 64 + half * 32 + i % 4 * 8);
    UNROLL
    for (u32 i = 0; i < ROPES; ++i)
        r.ropes[i] = *reinterpret_cast<const u32x2*>(row + NOPE_DIM + half * ROPE_DIM + i * 8);
}

// Expands it into the tiles. The halves are 4 pieces of 16 bytes apart, so that eight lanes (four keys, two
// halves) store to eight different pieces of a swizzled row: no bank conflict.
INLINE void store_half(const HalfRow& r, u32 half, u32 key, u8 (*tiles)[TILE]) {
    u8* pieces[4];
    UNROLL
    for (u32 i = 0; i < 4; ++i) pieces[i] = tiles[0] + swizzled(key, half * 64 + i * 16);
    UNROLL
    for (u32 i = 0; i < CODES; ++i) {
        const u32 tile = i / 4, byte = r.scales.v[tile / 4] >> tile % 4 * 8 & 255u;
        // A power of two in the range of bf16's normal numbers, as all block scales are.
        const u32 factor = (byte << 7) * 0x00010001u;
        u32x4 values;
        expand_e4m3(r.codes[i].v[0], values.v[0], values.v[1]);
        expand_e4m3(r.codes[i].v[1], values.v[2], values.v[3]);
        UNROLL
        for (u32 j = 0; j < 4; ++j) values.v[j] = mul_bf16x2(values.v[j], factor);
        *reinterpret_cast<u32x4*>(pieces[i % 4] + tile * TILE) = values;
    }
    UNROLL
    for (u32 i = 0; i < 4; ++i)
        *reinterpret_cast<u32x4*>(pieces[i] + (TILES - 1) * TILE) =
            u32x4{{r.ropes[2 * i].v[0], r.ropes[2 * i].v[1], r.ropes[2 * i + 1].v[0], r.ropes[2 * i + 1].v[1]}};
}
