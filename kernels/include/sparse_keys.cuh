// The keys of a token for blocks of 64 heads: rows of the window, then compressed entries, in blocks of 64
// keys, gathered and expanded to bf16 tiles with the 128-byte swizzle. A tile is read with its rows along K
// for the scores, and with its channels side by side for the values: one copy is both.
//
// Included by `attention/sparse90.cu` and `attention/sparse100.cu`.
#pragma once

#include "formats.cuh"
#include "step.cuh"
#include "swizzle.cuh"

constexpr u32 KEYS = 64;
// 64 rows (heads or keys) of 64 channels, swizzled; a row of 512 channels is 8 tiles.
constexpr u32 TILE = 8192, TILES = HEAD_DIM / 64;
constexpr float SOFTMAX_SCALE = 0.044194173f; // 512^-0.5
constexpr float LOG2_E = 1.44269504f;

// What the block attends to: keys of the window, then entries, in blocks of 64.
struct Keys {
    const u8 *window, *pending, *entries;
    const u32* chosen; // of this token; null: all entries
    Step step;
    const Sequence* sequence;
    u32 position, n_window, n_entries, window_blocks, ring;
    u32 first_row;   // of the ring that is in the window
    u32 entry_shift; // of a block of entries the binary logarithm

    INLINE u32 count(u32 block) const {
        const u32 first = (block < window_blocks ? block : block - window_blocks) * KEYS;
        return min_u32(KEYS, (block < window_blocks ? n_window : n_entries) - first);
    }
    INLINE const u8* row(u32 block, u32 key) const {
        if (block < window_blocks) {
            const u32 number = block * KEYS + key, at = position + 1 - n_window + number;
            if (at >= sequence->position)
                return pending + static_cast<u64>(sequence->row + at - sequence->position) * KV_ROW_BYTES;
            const u32 row = first_row + number, in_ring = row < ring ? row : row - ring;
            return window + (static_cast<u64>(sequence->slot) * ring + in_ring) * KV_ROW_BYTES;
        }
        const u32 at = (block - window_blocks) * KEYS + key, entry = chosen ? chosen[at] : at;
        const u64 first = static_cast<u64>(step.blocks[sequence->first_block + (entry >> entry_shift)]) << entry_shift;
        return entries + (first + (entry & ((1u << entry_shift) - 1))) * KV_ROW_BYTES;
    }
};

INLINE Keys keys_of(const Step& step, u32 token, const u8* window, const u8* pending, const u8* entries,
                    const u32* chosen, const u32* counts, u32 ring, u32 ratio, u32 top_k) {
    Keys keys;
    keys.window = window, keys.pending = pending, keys.entries = entries;
    keys.chosen = chosen ? chosen + static_cast<u64>(token) * top_k : nullptr;
    keys.step = step;
    keys.sequence = step.sequences + step.sequence_of[token];
    keys.position = step.positions[token], keys.ring = ring;
    keys.n_window = min_u32(keys.position + 1, WINDOW);
    keys.n_entries = ratio == 0 ? 0 : chosen ? counts[token] : (keys.position + 1) / ratio;
    keys.window_blocks = ceil_div(keys.n_window, KEYS);
    keys.first_row = (keys.position + 1 - keys.n_window) % ring;
    keys.entry_shift = ratio == 0 ? 0 : 31 - count_leading_zeros(BLOCK_TOKENS / ratio);
    return keys;
}

// Half of a row as it lies in the cache: codes of 8 channels, rotated channels, scales.
constexpr u32 CODES = NOPE_DIM / 16, ROPES = ROPE_DIM / 8;
struct HalfRow {
    u32x2 codes[CODES], ropes[ROPES], scales;
};

INLINE void load_half(const u8* row, u32 half, HalfRow& r) {
    r.scales = *reinterpret_cast<const u32x2*>(row + NOPE_DIM + 2 * ROPE_DIM);
    UNROLL
    for (u32 i = 0; i < CODES; ++i) r.codes[i] = *reinterpret_cast<const u32x2*>(row + (CODES * half + i) * 8);
    UNROLL
    for (u32 i = 0; i < ROPES; ++i)
        r.ropes[i] = *reinterpret_cast<const u32x2*>(row + NOPE_DIM + (ROPES * half + i) * 8);
}

// Expands it into the tiles. The halves begin 28 pieces of 16 bytes apart, so that eight lanes (four
// keys, two halves) store to eight different pieces of a swizzled row: no bank conflict. Places and scales
// of the second half are those of the first, four pieces and three tiles further on.
INLINE void store_half(const HalfRow& r, u32 half, u32 key, u8 (*tiles)[TILE]) {
    const u32 exchange = key % 8 * 16 ^ half * 64;
    u8 *low = &tiles[3 * half][key * SWIZZLE_ROW], *high = low + half * TILE;
    // Groups of four pieces share a scale with the next (even ones) or the one before.
    const u32 even = half ? r.scales.v[0] >> 24 | r.scales.v[1] << 8 : r.scales.v[0], odd = even >> 8 * half;
    UNROLL
    for (u32 i = 0; i < CODES; ++i) {
        const u32 byte = (i / 4 % 2 ? odd : even) >> i / 8 * 8 & 255u;
        // A power of two in the range of bf16's normal numbers, as all block scales are.
        const u32 factor = (byte << 7) * 0x00010001u;
        u32x4 values;
        expand_e4m3(r.codes[i].v[0], values.v[0], values.v[1]);
        expand_e4m3(r.codes[i].v[1], values.v[2], values.v[3]);
        UNROLL
        for (u32 j = 0; j < 4; ++j) values.v[j] = mul_bf16x2(values.v[j], factor);
        *reinterpret_cast<u32x4*>((i % 8 < 4 ? low : high) + i / 8 * TILE + (i % 8 * 16 ^ exchange)) = values;
    }
    UNROLL
    for (u32 i = 0; i < ROPES; i += 2) {
        const u32x4 values = {{r.ropes[i].v[0], r.ropes[i].v[1], r.ropes[i + 1].v[0], r.ropes[i + 1].v[1]}};
        *reinterpret_cast<u32x4*>(&tiles[TILES - 1][key * SWIZZLE_ROW + (i / 2 * 16 ^ exchange)]) = values;
    }
}
