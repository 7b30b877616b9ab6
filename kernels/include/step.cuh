// What a step runs, as kernels read it, and where rows of the cache lie.
//
// Mirrors `ops::Batch` and `ops::CacheSpec`: a block holds 256 positions, a window ring holds
// position p in row p % ring, KV rows are 584 bytes, index keys 68.
#pragma once

#include "device.cuh"

constexpr u32 HEAD_DIM = 512, NOPE_DIM = 448, ROPE_DIM = 64, INDEX_DIM = 128, WINDOW = 128;
constexpr u32 KV_ROW_BYTES = 584, KEY_ROW_BYTES = 68, BLOCK_TOKENS = 256;

// One sequence's part of the step.
struct Sequence {
    u32 slot, row, n_tokens, position;
    u32 first_block, n_blocks; // its part of the list of block ids
    u32 unused[2];
    // Whether its row repeats another one, to fill up the step: it computes, and must store nothing
    // in the cache.
    INLINE bool repeats() const { return n_tokens == 0; }
};

// The step's arrays, in device memory.
struct Step {
    const u32* positions;      // [n_tokens]
    const u32* sequence_of;    // [n_tokens]
    const Sequence* sequences; // [n_sequences]
    const u32* blocks;
};

// Number of row `entry` in a store of `per_block` rows per block.
INLINE u64 block_row(const Step& step, const Sequence& sequence, u32 entry, u32 per_block) {
    return static_cast<u64>(step.blocks[sequence.first_block + entry / per_block]) * per_block + entry % per_block;
}
