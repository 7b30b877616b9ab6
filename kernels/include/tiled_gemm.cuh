// Matrix products for many tokens, `out[m][n] = sum_k W[n][k] x[m][k]`, on the tensor cores of sm_80: 128 rows of W
// and 64 tokens a block.
//
// The products of `skinny_gemm.cuh`, with the same bits: there few tokens are bound by memory, and weights go
// straight into registers; here weights and activations pass through shared memory, so that a warp's 32 x 32
// results need a quarter of the loads per product. Same fragments, same sums: a K block by the tensor core from
// zero, times its scale added to its segment's sum, segments added in order. A block is four groups of 32 rows by
// two of tokens (tiles of 8 tokens in turn, so that few tokens of an expert leave no warp idle before its time).
//
// Shared memory has no padding; which 16 bytes of a row lie where is turned by its row (`x_place`, `w_place`), so
// that the eight lanes of a load meet different banks.
//
// Included by the operators in `linear/` and `moe/`.
#pragma once

#include "skinny_gemm.cuh"

constexpr u32 TILED_ROWS = 128, TILED_TOKENS = 64, TILED_BYTES = 96 * 1024;
constexpr u32 TOKEN_TILES = TILED_TOKENS / 8 / 2; // of a warp

template <Format F>
struct TiledShared {
    static constexpr u32 ROW_BYTES = 64 * n_vectors<F>;
    static constexpr u32 STAGES = TILED_BYTES / (TILED_ROWS * ROW_BYTES + TILED_TOKENS * K_BLOCK * 2);
    union {
        struct {
            u8 w[STAGES][TILED_ROWS][ROW_BYTES];
            bf16 x[STAGES][TILED_TOKENS][K_BLOCK];
        };
        float sums[TILED_TOKENS][TILED_ROWS + 4];
    };
};

// The rows of one matrix from `first_row` on.
struct OneMatrix {
    Weights matrix;
    u32 first_row;
    INLINE const Weights& of(u32) const { return matrix; }
    INLINE u32 row(u32 r) const { return first_row + r; }
};
// 16 rows of the one and the same 16 of the other, by turns: both products of a row are in one thread's reach.
struct TwoMatrices {
    Weights first, second;
    u32 first_row;
    INLINE const Weights& of(u32 tile) const { return tile % 2 == 0 ? first : second; }
    INLINE u32 row(u32 r) const { return first_row + r / (2 * TILE_ROWS) * TILE_ROWS + r % TILE_ROWS; }
};

// Where the 16 bytes `chunk` of a row are kept. The eight lanes of a load have two rows, one of them odd, and four
// chunks of each: 2 t + .. (FP8), 4 t + .. (FP4) or 4 .. + t (bf16).
INLINE u32 x_place(u32 token, u32 chunk) { return chunk ^ (chunk / 8 * 2) ^ (token % 2 * 5); }
template <Format F>
INLINE u32 w_place(u32 row, u32 chunk) {
    return F == Format::Fp4 ? chunk : chunk ^ (row % 2 * 4);
}

template <Format F, class W>
INLINE void copy_weights(TiledShared<F>& s, const W& w, u32 k, u32 block) {
    using S = TiledShared<F>;
    constexpr u32 CHUNKS = S::ROW_BYTES / 16, AT_ONCE = GEMM_THREADS / CHUNKS;
    const u32 chunk = threadIdx.x % CHUNKS, column = block * K_BLOCK + chunk * (K_BLOCK / CHUNKS);
    UNROLL
    for (u32 i = 0; i < TILED_ROWS / AT_ONCE; ++i) {
        const u32 r = threadIdx.x / CHUNKS + i * AT_ONCE, row = w.row(r);
        const Weights& matrix = w.of(r / TILE_ROWS);
        const bool valid = row < matrix.n_rows && column < k;
        const u64 at = (static_cast<u64>(row) * k + column) * S::ROW_BYTES / K_BLOCK;
        cp_async16(&s.w[block % S::STAGES][r][16 * w_place<F>(r, chunk)], valid ? matrix.data + at : matrix.data, valid);
    }
}

constexpr u32 X_CHUNKS = K_BLOCK / 8, X_AT_ONCE = GEMM_THREADS / X_CHUNKS;

// `rows`: of x, those of the tokens that this thread copies; ~0 for none.
template <Format F>
INLINE void copy_tokens(TiledShared<F>& s, const bf16* x, u32 x_stride, const u32 (&rows)[TILED_TOKENS / X_AT_ONCE],
                        u32 k, u32 block) {
    const u32 chunk = threadIdx.x % X_CHUNKS, column = block * K_BLOCK + 8 * chunk;
    UNROLL
    for (u32 i = 0; i < TILED_TOKENS / X_AT_ONCE; ++i) {
        const u32 token = threadIdx.x / X_CHUNKS + i * X_AT_ONCE;
        const bool valid = rows[i] != ~0u && column < k;
        cp_async16(&s.x[block % TiledShared<F>::STAGES][token][8 * x_place(token, chunk)],
                   valid ? x + static_cast<u64>(rows[i]) * x_stride + column : x, valid);
    }
}

// What a lane needs of a K block beside the codes: multipliers (FP4) of rows g and g + 8 of both row tiles, scales (FP8).
template <Format F>
struct BlockScales {
    u32 multiplier[ROW_TILES][2];
    float scale[ROW_TILES];
};
template <Format F, class W>
INLINE void load_scales(const W& w, u32 first, u32 k, u32 block, BlockScales<F>& out) {
    const u32 g = lane_id() / 4, t = lane_id() % 4, column = block * K_BLOCK + 32 * t;
    UNROLL
    for (u32 tile = 0; tile < ROW_TILES; ++tile) {
        const Weights& matrix = w.of(tile);
        const u32 row = w.row(first + tile * TILE_ROWS);
        out.scale[tile] = F == Format::Fp8 ? matrix.scales[row / K_BLOCK * ceil_div(k, K_BLOCK) + block] : 1.0f;
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            out.multiplier[tile][r] = 0;
            if (F != Format::Fp4) continue;
            // Rows behind the last repeat it; they are never stored.
            const u64 at = min_u32(row + g + 8 * r, matrix.n_rows - 1);
            out.multiplier[tile][r] = fp4_multiplier(column < k ? matrix.exponents[at * (k / 32) + column / 32] : 0);
        }
    }
}

// The products of a K block: `part` of both row tiles and of this warp's first `Tiles` tiles of tokens.
template <u32 Tiles, Format F>
INLINE void multiply_tiles(const TiledShared<F>& s, u32 block, const BlockScales<F>& scales,
                           float (&part)[ROW_TILES][TOKEN_TILES][4]) {
    using S = TiledShared<F>;
    const u32 g = lane_id() / 4, t = lane_id() % 4, first = warp_id() % 4 * ROW_TILES * TILE_ROWS, half = warp_id() / 4;
    const u8(&w)[TILED_ROWS][S::ROW_BYTES] = s.w[block % S::STAGES];
    const bf16(&x)[TILED_TOKENS][K_BLOCK] = s.x[block % S::STAGES];
    u32x4 packed[ROW_TILES][2];
    UNROLL
    for (u32 step = 0; step < STEPS; ++step) {
        u32 a[ROW_TILES][2][4];
        UNROLL
        for (u32 tile = 0; tile < ROW_TILES; ++tile)
            UNROLL
            for (u32 r = 0; r < 2; ++r) {
                const u32 row = first + tile * TILE_ROWS + g + 8 * r;
                if (step == 0 || vector_of<F>(step) != vector_of<F>(step - 1))
                    packed[tile][r] = *reinterpret_cast<const u32x4*>(&w[row][16 * w_place<F>(row, 4 * vector_of<F>(step) + t)]);
                expand_step<F>(packed[tile][r], step, scales.multiplier[tile][r], a[tile][r]);
            }
        UNROLL
        for (u32 n = 0; n < Tiles; ++n) {
            const u32 token = 8 * (2 * n + half) + g;
            const u32x4 b = *reinterpret_cast<const u32x4*>(&x[token][8 * x_place(token, value_of<F>(step, t) / 8)]);
            UNROLL
            for (u32 tile = 0; tile < ROW_TILES; ++tile) multiply_step<F>(part[tile][n], a[tile][0], a[tile][1], b);
        }
    }
}

// The whole product of the rows that `w` names and of `n_tokens` (up to 64) tokens; row_of(token) is the row of x.
// Ends with `s.sums`, behind a barrier.
template <Format F, class W, class RowOf>
INLINE void tiled_gemm(TiledShared<F>& s, const W& w, u32 k, const bf16* x, u32 x_stride, u32 n_tokens,
                       const RowOf& row_of) {
    constexpr u32 STAGES = TiledShared<F>::STAGES;
    const u32 n_blocks = ceil_div(k, K_BLOCK), per_segment = ceil_div(n_blocks, SEGMENTS);
    const u32 first = warp_id() % 4 * ROW_TILES * TILE_ROWS, half = warp_id() / 4;
    BlockScales<F> next;
    load_scales<F>(w, first, k, 0, next);
    u32 rows[TILED_TOKENS / X_AT_ONCE];
    UNROLL
    for (u32 i = 0; i < TILED_TOKENS / X_AT_ONCE; ++i) {
        const u32 token = threadIdx.x / X_CHUNKS + i * X_AT_ONCE;
        rows[i] = token < n_tokens ? row_of(token) : ~0u;
    }
    for (u32 block = 0; block < STAGES - 1; ++block) {
        if (block < n_blocks) {
            copy_weights<F>(s, w, k, block);
            copy_tokens<F>(s, x, x_stride, rows, k, block);
        }
        cp_async_commit();
    }
    const auto for_each = [](const auto& result) {
        UNROLL
        for (u32 tile = 0; tile < ROW_TILES; ++tile)
            UNROLL
            for (u32 n = 0; n < TOKEN_TILES; ++n)
                UNROLL
                for (u32 i = 0; i < 4; ++i) result(tile, n, i);
    };
    float total[ROW_TILES][TOKEN_TILES][4] = {}, sums[ROW_TILES][TOKEN_TILES][4] = {};
    const u32 n_tiles = ceil_div(max_u32(n_tokens, 8 * half) - 8 * half, 16); // of this warp, that have tokens
    u32 left = per_segment; // blocks of the segment
    for (u32 block = 0; block < n_blocks; ++block) {
        const BlockScales<F> now = next;
        if (block + 1 < n_blocks) load_scales<F>(w, first, k, block + 1, next);
        cp_async_wait<STAGES - 2>();
        block_sync();
        // The slot that the last block was read from is free now.
        if (block + STAGES - 1 < n_blocks) {
            copy_weights<F>(s, w, k, block + STAGES - 1);
            copy_tokens<F>(s, x, x_stride, rows, k, block + STAGES - 1);
        }
        cp_async_commit();
        float part[ROW_TILES][TOKEN_TILES][4] = {};
        // As many as have tokens, or the next power of two: no branch between products.
        if (n_tiles > 2) multiply_tiles<4>(s, block, now, part);
        else if (n_tiles == 2) multiply_tiles<2>(s, block, now, part);
        else if (n_tiles == 1) multiply_tiles<1>(s, block, now, part);
        for_each([&](u32 tile, u32 n, u32 i) { sums[tile][n][i] = fma_rn(part[tile][n][i], now.scale[tile], sums[tile][n][i]); });
        if (--left == 0 || block + 1 == n_blocks) {
            left = per_segment;
            for_each([&](u32 tile, u32 n, u32 i) {
                total[tile][n][i] = add_rn(total[tile][n][i], sums[tile][n][i]);
                sums[tile][n][i] = 0.0f;
            });
        }
    }
    cp_async_wait<0>();
    block_sync();
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    for_each([&](u32 tile, u32 n, u32 i) {
        s.sums[8 * (2 * n + half) + 2 * t + i % 2][first + tile * TILE_ROWS + g + 8 * (i / 2)] = total[tile][n][i];
    });
    block_sync();
}
