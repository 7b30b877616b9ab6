// Matrix products of sm_100f, `out[row][token] = sum_k W[row][k] x[token][k]`, computed transposed: 128
// rows of W are the A operand of a block-scaled product, up to N tokens its B. W is E2M1 or E4M3 with
// an E8M0 scale per 32 (of E4M3: per 128 x 128, repeated), x is E4M3 with one per 128, repeated: the
// products are exact, with scales, and sums stay in tensor memory.
//
// A block is 7 warps. Warp 4 copies weights and their scales, warp 5 multiplies, warp 6 copies x; they
// meet at two barriers per slot of the ring. Warps 0 to 3 store the results. One row tile and one
// segment of K per block; two blocks share an SM, so that one streams while the other stores.
//
// In memory:
//   W  rows as in the checkpoint, copied through a tensor map: 128 values of a row become 128 bytes,
//      swizzled; E2M1 codes 16 to 16 bytes
//   its scales [row tile][k / 128][512 B], words of a row's four bytes in the order of tensor memory:
//      row r at word 4 (r % 32) + r / 32 (`quant/scales100.cu`)
//   x  tiles of `act_quant_tiles100`: codes [k / 128][x_rows][128], swizzled; scales
//      [k / 128][x_rows + 32][4] words: row r has those of rows r, r + 32, r + 64, r + 96, so that 512
//      bytes from any row on are the scales of 128 tokens in the order of tensor memory
//
// Included by `linear/linear100.cu` and `moe/experts100.cu`.
#pragma once

#include "formats.cuh"
#include "swizzle100.cuh"

constexpr u32 TILE_ROWS = 128, K_BLOCK = 128, SCALES = 512, STORE_WARPS = 4, PIPELINE_THREADS = 7 * WARP;
constexpr u32 X_SCALES_PAD = 32;

enum class Format { Fp4, Fp8 };
// Bytes of a block of weights that move.
template <Format F>
constexpr u32 w_bytes = TILE_ROWS * K_BLOCK / (F == Format::Fp4 ? 2 : 1);

template <u32 N, u32 Stages>
struct Pipeline {
    static constexpr u32 STAGES = Stages, TOKENS = N;
    // Sums, then the scales of W and of x.
    static constexpr u32 W_SCALES = N, X_SCALES = N + 4, COLUMNS = N + 8 <= 64 ? 64 : 256;
    alignas(1024) u8 w[Stages][TILE_ROWS * K_BLOCK];
    alignas(1024) u8 x[Stages][N * K_BLOCK];
    alignas(128) u8 w_scales[Stages][SCALES];
    alignas(128) u8 x_scales[Stages][SCALES];
    u64 full[Stages], empty[Stages], done;
    u32 sums; // address in tensor memory
};

// A place in the ring of slots.
template <u32 Stages>
struct Ring {
    u32 slot = 0, parity = 0;
    INLINE void next() {
        if (++slot == Stages) slot = 0, parity ^= 1;
    }
};

// Tiles of x in memory.
struct XTiles {
    const u8* codes;
    const u32* scales;
    u32 rows;
};

// The product of a block: `n` tokens (a multiple of 8) from row `first` of x, blocks
// `first_block ..+ n_blocks` of K.
struct Work {
    const u8* w_scales; // of the row tile
    u32 first, n, first_block, n_blocks;
};

template <class P>
INLINE void pipeline_start(P& s) {
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < P::STAGES; ++i) mbarrier_init(&s.full[i], 2), mbarrier_init(&s.empty[i], 1);
        mbarrier_init(&s.done, 1);
        fence_mbarrier_init();
    }
    if (warp_id() == STORE_WARPS + 1) tmem_alloc<P::COLUMNS>(&s.sums);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
}

// `load(slot, k, barrier)` starts the copy of the tile's columns `k ..+ 128`.
template <Format F, class P, class Load>
INLINE void copy_weights(P& s, const Work& work, const Load& load) {
    Ring<P::STAGES> ring;
    for (u32 i = 0; i < work.n_blocks; ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        u64* full = &s.full[ring.slot];
        mbarrier_arrive_expect(full, w_bytes<F> + SCALES);
        const u32 block = work.first_block + i;
        load(s.w[ring.slot], block * K_BLOCK, full);
        bulk_load<true>(s.w_scales[ring.slot], work.w_scales + static_cast<u64>(block) * SCALES, SCALES, full);
    }
}

template <class P>
INLINE void copy_x(P& s, const Work& work, const XTiles& x) {
    Ring<P::STAGES> ring;
    for (u32 i = 0; i < work.n_blocks; ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        u64* full = &s.full[ring.slot];
        mbarrier_arrive_expect(full, work.n * K_BLOCK + SCALES);
        const u64 block = work.first_block + i;
        bulk_load<false>(s.x[ring.slot], x.codes + (block * x.rows + work.first) * K_BLOCK, work.n * K_BLOCK, full);
        bulk_load<false>(s.x_scales[ring.slot], x.scales + (block * (x.rows + X_SCALES_PAD) + work.first) * 4, SCALES, full);
    }
}

template <Format F, class P>
INLINE void multiply(P& s, const Work& work) {
    const u32 sums = s.sums, kind = scaled_kind<F == Format::Fp4>(work.n);
    Ring<P::STAGES> ring;
    for (u32 i = 0; i < work.n_blocks; ++i, ring.next()) {
        mbarrier_wait(&s.full[ring.slot], ring.parity);
        tmem_fence_after();
        tmem_copy_scales(sums + P::W_SCALES, matrix_rows16(s.w_scales[ring.slot]));
        tmem_copy_scales(sums + P::X_SCALES, matrix_rows16(s.x_scales[ring.slot]));
        const u64 w = tensor_matrix(s.w[ring.slot]), x = tensor_matrix(s.x[ring.slot]);
        UNROLL
        for (u32 step = 0; step < K_BLOCK / 32; ++step)
            mma_scaled(sums, w + 2 * step, x + 2 * step, kind + step * SCALE_BYTE, sums + P::W_SCALES,
                       sums + P::X_SCALES, i + step > 0);
        tmem_commit(&s.empty[ring.slot]);
    }
    tmem_commit(&s.done);
}

// Everything but the results: by warps 4 to 6. `wait` before x is read.
template <Format F, class P, class Load, class Wait>
INLINE void feed(P& s, const Work& work, const XTiles& x, const Load& load, const Wait& wait) {
    const u32 warp = warp_id();
    if (warp == STORE_WARPS && elect()) copy_weights<F>(s, work, load);
    else if (warp == STORE_WARPS + 1 && elect()) multiply<F>(s, work);
    else if (warp == STORE_WARPS + 2 && elect()) wait(), copy_x(s, work, x);
    warp_sync();
}

// Warps 0 to 3: `use(token, values)` for eight tokens at a time, the sums of row 32 warp + lane.
template <class P, class Use>
INLINE void for_sums(P& s, const Work& work, const Use& use) {
    mbarrier_wait(&s.done, 0);
    tmem_fence_after();
    warp_sync();
    for (u32 token = 0; token < work.n; token += 8) {
        float v[8] = {};
        if (work.n_blocks > 0) {
            tmem_load(v, s.sums + (warp_id() * WARP << 16) + token);
            tmem_load_wait(v);
        }
        use(token, v);
    }
    tmem_fence_before();
}

// By the whole block, at its end.
template <class P>
INLINE void pipeline_end(P& s) {
    block_sync();
    tmem_fence_after();
    if (warp_id() == STORE_WARPS + 1) tmem_dealloc<P::COLUMNS>(s.sums);
}
