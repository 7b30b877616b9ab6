// Matrix products for few rows, `out[m][n] = sum_k W[n][k] x[m][k]`, weights straight from memory
// into tensor-core fragments.
//
// Computed transposed: 16 rows of W are the A operand of `mma.sync` m16n8k16, 8 tokens are its N,
// so a small batch wastes nothing (`fragments80.cuh`). Weights lie as in the checkpoint; a lane loads
// 16 consecutive bytes of a row. Activations are bf16 in shared memory in natural order.
//
// One order of addition for every batch size: K is cut into SEGMENTS runs of 128-wide blocks; a
// block's product is summed by the tensor core, times its scale added to the segment's f32 sum in K
// order; segments are added in order. A block of threads is ROW_TILES x SEGMENTS warps.
//
// x comes through a ring of stages (`gemm`), or, where the block makes it itself and it is small enough to
// lie in shared memory as a whole, from there (`gemm_resident`). Both have the same bits.
//
// Included by the operators in `linear/` and `moe/`.
#pragma once

#include "fragments80.cuh"
#include "rows.cuh"

constexpr u32 K_BLOCK = 128, SEGMENTS = 4, ROW_TILES = 2, TILE_ROWS = 16;
constexpr u32 GEMM_THREADS = ROW_TILES * SEGMENTS * WARP;
// 8 values of padding: rows of shared memory then begin 4 banks apart.
constexpr u32 X_STRIDE = K_BLOCK + 8;

// A matrix in the checkpoint's layout.
struct Weights {
    const u8* data;      // [n_rows, k] in the format's bytes
    const float* scales; // FP8: [ceil(n_rows / 128), ceil(k / 128)]
    const u8* exponents; // FP4: E8M0 [n_rows, k / 32]
    u32 n_rows, k;
};

template <u32 Tokens, u32 Stages>
struct GemmShared {
    union {
        bf16 x[Stages][SEGMENTS][Tokens][X_STRIDE];
        float sums[SEGMENTS][ROW_TILES][TILE_ROWS][Tokens + 1];
    };
};

// What a lane has loaded of the rows g and g + 8 of one K block.
template <Format F>
struct LaneBlock {
    u32x4 row[2][n_vectors<F>];
    u32 multiplier[2]; // FP4
};

template <Format F>
INLINE void load_block(const Weights& w, const u32 (&rows)[2], u32 k0, LaneBlock<F>& out) {
    const u32 t = lane_id() % 4;
    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        UNROLL
        for (u32 v = 0; v < n_vectors<F>; ++v) {
            // First value of this vector.
            const u32 k = k0 + (F == Format::Bf16 ? 32 * v + 8 * t : F == Format::Fp8 ? 64 * v + 16 * t : 32 * t);
            const u64 index = static_cast<u64>(rows[r]) * w.k + k;
            const u64 at = F == Format::Bf16 ? 2 * index : F == Format::Fp8 ? index : index / 2;
            if (k < w.k) out.row[r][v] = load_stream16(w.data + at);
            else out.row[r][v] = u32x4{};
        }
        out.multiplier[r] = 0;
        if (F == Format::Fp4) {
            const u32 k = k0 + 32 * t;
            const u32 byte = k < w.k ? w.exponents[static_cast<u64>(rows[r]) * (w.k / 32) + k / 32] : 0;
            out.multiplier[r] = fp4_multiplier(byte);
        }
    }
}

// The product of a K block: part[token tile] += W block * x block. `x(token, k)` is where the block's values
// lie, eight in 16 bytes.
template <Format F, u32 Tokens, class X>
INLINE void multiply_block(const LaneBlock<F>& w, const X& x, float (&part)[Tokens / 8][4]) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (u32 step = 0; step < STEPS; ++step) {
        u32 a[2][4];
        UNROLL
        for (u32 r = 0; r < 2; ++r) expand_step<F>(w.row[r][vector_of<F>(step)], step, w.multiplier[r], a[r]);
        UNROLL
        for (u32 tile = 0; tile < Tokens / 8; ++tile) {
            const u32x4 b = *reinterpret_cast<const u32x4*>(x(8 * tile + g, value_of<F>(step, t)));
            multiply_step<F>(part[tile], a[0], a[1], b);
        }
    }
}

// Adds the product of the K block from `k0` on, for rows of which `row` is one.
template <Format F, u32 Tokens, class X>
INLINE void add_block(const Weights& w, const LaneBlock<F>& now, u32 row, u32 k0, const X& x, float (&sums)[Tokens / 8][4]) {
    float part[Tokens / 8][4] = {};
    multiply_block<F, Tokens>(now, x, part);
    float scale = 1.0f;
    if (F == Format::Fp8) scale = w.scales[row / K_BLOCK * ceil_div(w.k, K_BLOCK) + k0 / K_BLOCK];
    UNROLL
    for (u32 n = 0; n < Tokens / 8; ++n)
        UNROLL
        for (u32 i = 0; i < 4; ++i) sums[n][i] = fma_rn(part[n][i], scale, sums[n][i]);
}

// Behind the last read of x: the segments' sums take its place, for `gemm_sum` to add.
template <u32 Tokens, u32 Stages>
INLINE void put_sums(GemmShared<Tokens, Stages>& s, const float (&sums)[Tokens / 8][4]) {
    const u32 segment = warp_id() / ROW_TILES, tile = warp_id() % ROW_TILES, g = lane_id() / 4, t = lane_id() % 4;
    block_sync();
    UNROLL
    for (u32 n = 0; n < Tokens / 8; ++n)
        UNROLL
        for (u32 i = 0; i < 4; ++i)
            s.sums[segment][tile][g + 8 * (i / 2)][8 * n + 2 * t + i % 2] = sums[n][i];
    block_sync();
}

// Copies block `block` of every segment of x into `to`; `row_of(token)` is the row of x, n_x_rows or
// more for none. Values at and beyond k are zeros.
template <u32 Tokens, class RowOf>
INLINE void copy_x(bf16 (*to)[Tokens][X_STRIDE], const bf16* x, u32 x_stride, u32 k, u32 per_segment,
                   u32 block, u32 n_x_rows, const RowOf& row_of) {
    constexpr u32 VECTORS = K_BLOCK / 8;
    for (u32 i = threadIdx.x; i < SEGMENTS * Tokens * VECTORS; i += GEMM_THREADS) {
        const u32 vector = i % VECTORS, token = i / VECTORS % Tokens, segment = i / VECTORS / Tokens;
        const u32 column = (segment * per_segment + block) * K_BLOCK + vector * 8;
        const u32 row = row_of(token);
        const bool valid = row < n_x_rows && column < k;
        const bf16* from = valid ? x + static_cast<u64>(row) * x_stride + column : x;
        cp_async16(&to[segment][token][vector * 8], from, valid);
    }
    cp_async_commit();
}

// Begins to bring what `gemm` will read first of each row and segment, by the warps that will.
template <Format F>
INLINE void prefetch_rows(const Weights& w, u32 first_row) {
    constexpr u32 BYTES = 512; // 64 KB a block: what memory delivers in the two microseconds of a launch
    const u32 row_bytes = F == Format::Bf16 ? 2 * w.k : w.k;
    const u32 per_segment = ceil_div(ceil_div(w.k, K_BLOCK), SEGMENTS) * (F == Format::Bf16 ? 2 : 1) * K_BLOCK;
    const u32 start = warp_id() / ROW_TILES * per_segment, row = first_row + lane_id();
    if (lane_id() < TILE_ROWS && row < w.n_rows && start < row_bytes)
        prefetch(w.data + static_cast<u64>(row) * row_bytes + start, min_u32(min_u32(BYTES, per_segment), row_bytes - start));
}

// The whole product for the rows `w.rows[tile] ..+ 16` of each row tile and `Tokens` tokens. Ends
// with the segments' sums in shared memory, after a barrier; `gemm_sum` adds them.
template <Format F, u32 Tokens, u32 Stages, class RowOf>
INLINE void gemm(GemmShared<Tokens, Stages>& s, const Weights& w, u32 first_row, const bf16* x,
                 u32 x_stride, u32 n_x_rows, const RowOf& row_of) {
    const u32 segment = warp_id() / ROW_TILES;
    const u32 n_blocks = ceil_div(w.k, K_BLOCK), per_segment = ceil_div(n_blocks, SEGMENTS);
    const u32 g = lane_id() / 4;
    // Rows behind the last repeat it; they are never stored.
    const u32 rows[2] = {min_u32(first_row + g, w.n_rows - 1), min_u32(first_row + g + 8, w.n_rows - 1)};
    float sums[Tokens / 8][4] = {};
    LaneBlock<F> next;
    const u32 first_k = segment * per_segment * K_BLOCK;
    load_block<F>(w, rows, first_k, next);
    for (u32 stage = 0; stage + 1 < Stages; ++stage)
        copy_x<Tokens>(s.x[stage], x, x_stride, w.k, per_segment, stage, n_x_rows, row_of);
    for (u32 block = 0; block < per_segment; ++block) {
        const LaneBlock<F> now = next;
        const u32 k0 = first_k + block * K_BLOCK;
        if (block + 1 < per_segment) load_block<F>(w, rows, k0 + K_BLOCK, next);
        cp_async_wait<Stages - 2>();
        block_sync();
        // The slot that the last iteration read is free now.
        copy_x<Tokens>(s.x[(block + Stages - 1) % Stages], x, x_stride, w.k, per_segment,
                       block + Stages - 1, block + Stages - 1 < per_segment ? n_x_rows : 0, row_of);
        if (k0 >= w.k || segment * per_segment + block >= n_blocks) continue;
        const bf16(*rows_of_x)[X_STRIDE] = s.x[block % Stages][segment];
        add_block<F, Tokens>(w, now, rows[0], k0, [&](u32 token, u32 at) { return &rows_of_x[token][at]; }, sums);
    }
    cp_async_wait<0>();
    put_sums(s, sums);
}

// Values of a row of x in shared memory, with those behind k and 16 bytes of padding.
INLINE u32 resident_stride(u32 k) { return ceil_div(k, K_BLOCK) * K_BLOCK + 8; }

// Rows of x on the FP8 grid of their blocks of 128, zeros behind k, to `to`; row_of(token) is the row of x.
// Vectors of a thread are on their way together.
template <class RowOf>
INLINE void fill_on_grid(bf16* to, const bf16* x, u32 x_stride, u32 k, u32 n_tokens, const RowOf& row_of) {
    constexpr u32 AT_ONCE = 4;
    const u32 per_row = ceil_div(k, K_BLOCK) * (K_BLOCK / 8), n = n_tokens * per_row;
    for (u32 first = 0; first < n; first += AT_ONCE * GEMM_THREADS) {
        u32x4 packed[AT_ONCE] = {};
        UNROLL
        for (u32 part = 0; part < AT_ONCE; ++part) {
            const u32 i = first + part * GEMM_THREADS + threadIdx.x, column = i % per_row * 8;
            if (i < n && column < k)
                packed[part] = *reinterpret_cast<const u32x4*>(x + static_cast<u64>(row_of(i / per_row)) * x_stride + column);
        }
        UNROLL
        for (u32 part = 0; part < AT_ONCE; ++part) {
            const u32 i = first + part * GEMM_THREADS + threadIdx.x;
            if (first + part * GEMM_THREADS >= n) break; // the same for all threads
            float v[8];
            unpack8(packed[part], v);
            quantise_block128(v);
            if (i < n) store8(to + i / per_row * resident_stride(k) + i % per_row * 8, v);
        }
    }
}

// `gemm` for up to eight tokens whose x `fill(to)` puts into shared memory, row after row; `to` is where `s`
// lies, and has room for them. Weights are on their way meanwhile.
template <Format F, u32 Stages, class Fill>
INLINE void gemm_resident(GemmShared<8, Stages>& s, const Weights& w, u32 first_row, u32 n_tokens, const Fill& fill) {
    const u32 n_blocks = ceil_div(w.k, K_BLOCK), per_segment = ceil_div(n_blocks, SEGMENTS), g = lane_id() / 4;
    const u32 rows[2] = {min_u32(first_row + g, w.n_rows - 1), min_u32(first_row + g + 8, w.n_rows - 1)};
    const u32 first_k = warp_id() / ROW_TILES * per_segment * K_BLOCK, stride = resident_stride(w.k);
    bf16* x = reinterpret_cast<bf16*>(&s);
    float sums[1][4] = {};
    LaneBlock<F> next;
    load_block<F>(w, rows, first_k, next);
    fill(x);
    block_sync();
    for (u32 block = 0; block < per_segment; ++block) {
        const LaneBlock<F> now = next;
        const u32 k0 = first_k + block * K_BLOCK;
        if (k0 >= w.k) break;
        if (block + 1 < per_segment) load_block<F>(w, rows, k0 + K_BLOCK, next);
        // Columns of no token are those of the last one; they are never stored.
        add_block<F, 8>(w, now, rows[0], k0, [&](u32 token, u32 at) { return x + min_u32(token, n_tokens - 1) * stride + k0 + at; }, sums);
    }
    put_sums(s, sums);
}

template <u32 Tokens, u32 Stages>
INLINE float gemm_sum(const GemmShared<Tokens, Stages>& s, u32 tile, u32 row, u32 token) {
    float sum = s.sums[0][tile][row][token];
    for (u32 segment = 1; segment < SEGMENTS; ++segment)
        sum = add_rn(sum, s.sums[segment][tile][row][token]);
    return sum;
}
