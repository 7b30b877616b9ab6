// Several bf16 matrices times one x in one launch: what a layer's compressors and indexer read of its input.
//
// Included by `linear/skinny.cu` and `linear/tiled.cu`, whose headers say what goes in and comes out.
#pragma once

#include "skinny_gemm.cuh"

struct Matrices {
    static constexpr u32 MAX = 5;
    const u8* data[MAX];
    void* out[MAX]; // [n_tokens, n_rows]
    u32 n_rows[MAX], is_f32[MAX];
};

// The part of one block: rows of one matrix.
struct MatrixPart {
    Weights w;
    void* out;
    u32 is_f32, row_block;
};
// Matrices follow each other along the grid, in blocks of `block_rows` rows.
INLINE MatrixPart part_of(const Matrices& m, u32 k, u32 block_rows) {
    MatrixPart part = {{nullptr, nullptr, nullptr, 0, k}, nullptr, 0, 0};
    u32 first = 0;
    UNROLL
    for (u32 i = 0; i < Matrices::MAX; ++i) {
        const u32 n_blocks = ceil_div(m.n_rows[i], block_rows);
        if (blockIdx.x >= first && blockIdx.x < first + n_blocks) {
            part.w.data = m.data[i], part.w.n_rows = m.n_rows[i];
            part.out = m.out[i], part.is_f32 = m.is_f32[i], part.row_block = blockIdx.x - first;
        }
        first += n_blocks;
    }
    return part;
}

// `run(matrices, x, k, n_tokens)`: the block's share.
#define LINEAR_BF16_EACH(name, run)                                                               \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) name(                           \
        const bf16* __restrict__ x, u32 k, u32 n_tokens, const u8* __restrict__ data0,            \
        void* __restrict__ out0, u32 rows0, u32 f32_0, const u8* __restrict__ data1,              \
        void* __restrict__ out1, u32 rows1, u32 f32_1, const u8* __restrict__ data2,              \
        void* __restrict__ out2, u32 rows2, u32 f32_2, const u8* __restrict__ data3,              \
        void* __restrict__ out3, u32 rows3, u32 f32_3, const u8* __restrict__ data4,              \
        void* __restrict__ out4, u32 rows4, u32 f32_4) {                                          \
        const Matrices m = {{data0, data1, data2, data3, data4},                                  \
                            {out0, out1, out2, out3, out4},                                       \
                            {rows0, rows1, rows2, rows3, rows4},                                  \
                            {f32_0, f32_1, f32_2, f32_3, f32_4}};                                 \
        run(m, x, k, n_tokens);                                                                   \
    }                                                                                             \
    EMU_KERNEL(name)
