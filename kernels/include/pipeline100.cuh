// Matrix products of sm_100f, `out[row][token] = sum_k W[row][k] x[token][k]`, computed transposed: 128
// rows of W are the A operand of a product, up to N tokens its B. Sums stay in tensor memory.
//
//   Fp4, Fp8     W is E2M1 or E4M3 with an E8M0 scale per 32 (of E4M3: per 128 x 128, repeated), x is E4M3
//                with one per 128, repeated: block-scaled products, exact with scales
//   Bf16         W and x are bf16
//   Fp8ByBf16    W is E4M3 with a power of two per 128 x 128, expanded to bf16 in shared memory with its
//                scale (exact); x is bf16
//
// A block is 7 warps. Warp 4 copies weights (and their scales), warp 5 multiplies, warp 6 copies x; they
// meet at two barriers per slot of the ring. Warps 0 to 3 store the results; of Fp8ByBf16 they expand
// weights first, a row per thread, from a ring of two blocks of codes. A slot holds 128 bytes of each row:
// 128 values or, of bf16, 64. One row tile and one run of K per block.
//
// In memory:
//   W  rows as in the checkpoint, copied through a tensor map: 128 bytes of a row, swizzled; of E2M1 128
//      values become 128 bytes, codes 16 to 16 bytes
//   its scales [row tile][k / 128][512 B], words of a row's four bytes in the order of tensor memory:
//      row r at word 4 (r % 32) + r / 32 (`quant/scales100.cu`); of Fp8ByBf16 f32 [row tile][k / 128]
//   x  tiles of `act_quant_tiles100`: codes [k / 128][x_rows][128], swizzled; scales
//      [k / 128][x_rows + 32][4] words: row r has those of rows r, r + 32, r + 64, r + 96, so that 512
//      bytes from any row on are the scales of 128 tokens in the order of tensor memory
//      of bf16: rows, copied through a tensor map with boxes of N rows x 64, zeros behind the last
//      of up to eight tokens: rows of bf16, which warp 6 rounds itself
//
// Included by `linear100.cuh` and `moe/experts100.cu`.
#pragma once

#include "rows.cuh"
#include "swizzle100.cuh"

constexpr u32 TILE_ROWS = 128, K_BLOCK = 128, SCALES = 512, STORE_WARPS = 4, PIPELINE_THREADS = 7 * WARP;
constexpr u32 X_SCALES_PAD = 32, SLOT_BYTES = 128, CODE_SLOTS = 2;

enum class Format { Fp4, Fp8, Bf16, Fp8ByBf16 };
template <Format F>
constexpr bool is_scaled = F == Format::Fp4 || F == Format::Fp8;
// Bytes of a block of weights that move.
template <Format F>
constexpr u32 w_bytes = TILE_ROWS * SLOT_BYTES / (F == Format::Fp4 ? 2 : 1);
// Values of K in a slot, and slots of a block of K.
template <Format F>
constexpr u32 k_slot = is_scaled<F> ? K_BLOCK : K_BLOCK / 2;
template <Format F>
constexpr u32 slots_of_block = K_BLOCK / k_slot<F>;

// What a format needs beside its operands, in whole 1,024 bytes.
template <Format F, u32 Stages>
struct Beside {
    alignas(1024) u8 w_scales[Stages][SCALES];
    alignas(128) u8 x_scales[Stages][SCALES];
};
template <u32 Stages>
struct Beside<Format::Bf16, Stages> {};
template <u32 Stages>
struct Beside<Format::Fp8ByBf16, Stages> {
    alignas(1024) u8 codes[CODE_SLOTS][TILE_ROWS * K_BLOCK];
};

template <Format F, u32 N, u32 Stages, u32 Segments = 1>
struct Pipeline : Beside<F, Stages> {
    static constexpr u32 STAGES = Stages, TOKENS = N, SEGMENTS = Segments;
    // Sums (of a segment after those of the one before), then the scales of W and of x.
    static constexpr u32 W_SCALES = N, X_SCALES = N + 4;
    static constexpr u32 COLUMNS = !is_scaled<F> ? N * Segments : N + 8 <= 64 ? 64 : 256;
    static_assert(Segments == 1 || !is_scaled<F>);
    alignas(1024) u8 w[Stages][TILE_ROWS * SLOT_BYTES];
    alignas(1024) u8 x[Stages][N * SLOT_BYTES];
    u64 full[Stages], empty[Stages], done;
    u64 brought[CODE_SLOTS], expanded[CODE_SLOTS]; // codes of Fp8ByBf16
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
    static constexpr bool BY_WARP = false;
    const u8* codes;
    const u32* scales;
    u32 rows;
};
// A map of rows of x in bf16, and the first column of those that are meant.
struct XMap {
    static constexpr bool BY_WARP = false;
    const TensorMap* map;
    u32 column;
};
// Up to eight rows of bf16, which the block itself puts on the FP8 grid: row `pairs[i] / per_row` of `rows`, k
// values each (whole blocks), for i below `count`.
struct XRows {
    static constexpr bool BY_WARP = true;
    const bf16* rows;
    const u32* pairs;
    u32 per_row, count, k;
};

// The product of a block: `n` tokens (a multiple of 8, for bf16 of 16) from row `first` of x, blocks
// `first_block ..+ n_blocks` of K, in segments of `per` blocks.
struct Work {
    const u8* w_scales; // of the row tile
    u32 first, n, first_block, n_blocks, per;
};

template <Format F, class P>
INLINE void pipeline_start(P& s) {
    if (threadIdx.x == 0) {
        // Weights and x are brought by one thread each, or weights are expanded by four warps.
        constexpr u32 FILLERS = 1 + (F == Format::Fp8ByBf16 ? STORE_WARPS : 1);
        for (u32 i = 0; i < P::STAGES; ++i) mbarrier_init(&s.full[i], FILLERS), mbarrier_init(&s.empty[i], 1);
        for (u32 i = 0; i < CODE_SLOTS; ++i)
            mbarrier_init(&s.brought[i], 1), mbarrier_init(&s.expanded[i], STORE_WARPS);
        mbarrier_init(&s.done, 1);
        fence_mbarrier_init();
    }
    if (warp_id() == STORE_WARPS + 1) tmem_alloc<P::COLUMNS>(&s.sums);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
}

// `load(slot, k, barrier)` starts the copy of the tile's columns `k ..+ k_slot` (of codes: 128).
template <Format F, class P, class Load>
INLINE void copy_weights(P& s, const Work& work, const Load& load) {
    if constexpr (F == Format::Fp8ByBf16) {
        Ring<CODE_SLOTS> ring;
        for (u32 i = 0; i < work.n_blocks; ++i, ring.next()) {
            mbarrier_wait(&s.expanded[ring.slot], ring.parity ^ 1);
            mbarrier_arrive_expect(&s.brought[ring.slot], w_bytes<F>);
            load(s.codes[ring.slot], (work.first_block + i) * K_BLOCK, &s.brought[ring.slot]);
        }
    } else {
        Ring<P::STAGES> ring;
        const u32 first = work.first_block * slots_of_block<F>;
        for (u32 i = 0; i < work.n_blocks * slots_of_block<F>; ++i, ring.next()) {
            mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
            u64* full = &s.full[ring.slot];
            mbarrier_arrive_expect(full, w_bytes<F> + (is_scaled<F> ? SCALES : 0));
            load(s.w[ring.slot], (first + i) * k_slot<F>, full);
            if constexpr (is_scaled<F>)
                bulk_load<true>(s.w_scales[ring.slot], work.w_scales + static_cast<u64>(first + i) * SCALES, SCALES, full);
        }
    }
}

template <Format F, class P>
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
INLINE void copy_x(P& s, const Work& work, const XMap& x) {
    Ring<P::STAGES> ring;
    const u32 first = work.first_block * slots_of_block<F>;
    for (u32 i = 0; i < work.n_blocks * slots_of_block<F>; ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        mbarrier_arrive_expect(&s.full[ring.slot], sizeof s.x[0]);
        const u32 at[2] = {x.column + (first + i) * k_slot<F>, work.first};
        tensor_load<false>(s.x[ring.slot], *x.map, at, &s.full[ring.slot]);
    }
}

// By a whole warp: what `act_quant_tiles100` and a copy would bring.
template <Format F, class P>
INLINE void copy_x(P& s, const Work& work, const XRows& x) {
    constexpr u32 AT_ONCE = WARP / (K_BLOCK / PER_THREAD), PER_LANE = 8 / AT_ONCE;
    const u32 lane = lane_id(), column = lane % 16 * PER_THREAD, own = lane / 16;
    const bf16* rows[PER_LANE];
    UNROLL
    for (u32 i = 0; i < PER_LANE; ++i) {
        const u32 row = AT_ONCE * i + own;
        rows[i] = row < x.count ? x.rows + static_cast<u64>(x.pairs[row] / x.per_row) * x.k + column : nullptr;
    }
    // Only the words of the eight rows are written again.
    for (u32 slot = 0; slot < P::STAGES; ++slot) reinterpret_cast<u32x4*>(s.x_scales[slot])[lane] = u32x4{};
    u32x4 next[PER_LANE];
    const auto load = [&](u32 block) {
        UNROLL
        for (u32 i = 0; i < PER_LANE; ++i) {
            next[i] = u32x4{};
            if (rows[i] && block < work.n_blocks)
                next[i] = *reinterpret_cast<const u32x4*>(rows[i] + (work.first_block + block) * K_BLOCK);
        }
    };
    warp_sync();
    load(0);
    Ring<P::STAGES> ring;
    for (u32 block = 0; block < work.n_blocks; ++block, ring.next()) {
        u32x4 now[PER_LANE];
        UNROLL
        for (u32 i = 0; i < PER_LANE; ++i) now[i] = next[i];
        load(block + 1);
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        UNROLL
        for (u32 i = 0; i < PER_LANE; ++i) {
            const u32 row = AT_ONCE * i + own;
            u32x2 codes;
            const u32 scale = quantise_codes(now[i], codes);
            *reinterpret_cast<u32x2*>(&s.x[ring.slot][swizzled(row, column)]) = codes;
            if (lane % 16 == 0) *reinterpret_cast<u32*>(&s.x_scales[ring.slot][16 * row]) = scale * 0x01010101u;
        }
        fence_proxy_async();
        warp_sync();
        if (lane == 0) mbarrier_arrive(&s.full[ring.slot]);
    }
}

template <Format F, class P>
INLINE void multiply(P& s, const Work& work) {
    u32 sums = s.sums;
    const u32 kind = is_scaled<F> ? scaled_kind<F == Format::Fp4>(work.n) : bf16_kind<false>(TILE_ROWS, work.n);
    Ring<P::STAGES> ring;
    for (u32 i = 0, of_segment = 0; i < work.n_blocks * slots_of_block<F>; ++i, ring.next()) {
        mbarrier_wait(&s.full[ring.slot], ring.parity);
        tmem_fence_after();
        const u64 w = tensor_matrix(s.w[ring.slot]), x = tensor_matrix(s.x[ring.slot]);
        if constexpr (is_scaled<F>) {
            tmem_copy_scales(sums + P::W_SCALES, matrix_rows16(s.w_scales[ring.slot]));
            tmem_copy_scales(sums + P::X_SCALES, matrix_rows16(s.x_scales[ring.slot]));
        }
        // 32 bytes of K each.
        UNROLL
        for (u32 step = 0; step < SLOT_BYTES / 32; ++step) {
            if constexpr (is_scaled<F>)
                mma_scaled(sums, w + 2 * step, x + 2 * step, kind + step * SCALE_BYTE, sums + P::W_SCALES,
                           sums + P::X_SCALES, of_segment + step > 0);
            else mma_bf16_shared(sums, w + 2 * step, x + 2 * step, kind, of_segment + step > 0);
        }
        tmem_commit(&s.empty[ring.slot]);
        if (++of_segment == work.per * slots_of_block<F> && P::SEGMENTS > 1) of_segment = 0, sums += P::TOKENS;
    }
    tmem_commit(&s.done);
}

// Everything but the results: by warps 4 to 6. `wait` before x is read.
template <Format F, class P, class X, class Load, class Wait>
INLINE void feed(P& s, const Work& work, const X& x, const Load& load, const Wait& wait) {
    const u32 warp = warp_id();
    if (warp == STORE_WARPS && elect()) copy_weights<F>(s, work, load);
    else if (warp == STORE_WARPS + 1 && elect()) multiply<F>(s, work);
    else if (warp == STORE_WARPS + 2 && (X::BY_WARP || elect())) wait(), copy_x<F>(s, work, x);
    warp_sync();
}

// Fp8ByBf16, warps 0 to 3: codes of a row and its scale (a power of two, of the row tile's blocks) to bf16.
// 16 bytes of eight rows are in different banks, read and written.
template <class P>
INLINE void expand_weights(P& s, const Work& work, const float* scales) {
    const u32 row = threadIdx.x;
    Ring<P::STAGES> ring;
    Ring<CODE_SLOTS> codes;
    float scale = work.n_blocks > 0 ? scales[work.first_block] : 0.0f;
    for (u32 i = 0; i < work.n_blocks; ++i, codes.next()) {
        // A power of two in the range of bf16's normal numbers: the upper half is all of it.
        const u32 factor = (float_bits(scale) >> 16) * 0x00010001u;
        if (i + 1 < work.n_blocks) scale = scales[work.first_block + i + 1];
        mbarrier_wait(&s.brought[codes.slot], codes.parity);
        UNROLL
        for (u32 half = 0; half < 2; ++half, ring.next()) {
            u32x4 v[4];
            UNROLL
            for (u32 j = 0; j < 4; ++j)
                v[j] = *reinterpret_cast<const u32x4*>(&s.codes[codes.slot][swizzled(row, half * 64 + 16 * j)]);
            if (half == 1) {
                warp_sync();
                if (lane_id() == 0) mbarrier_arrive(&s.expanded[codes.slot]);
            }
            mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
            UNROLL
            for (u32 j = 0; j < 8; ++j) {
                u32x4 values;
                expand_e4m3(v[j / 2].v[2 * (j % 2)], values.v[0], values.v[1]);
                expand_e4m3(v[j / 2].v[2 * (j % 2) + 1], values.v[2], values.v[3]);
                UNROLL
                for (u32 pair = 0; pair < 4; ++pair) values.v[pair] = mul_bf16x2(values.v[pair], factor);
                *reinterpret_cast<u32x4*>(&s.w[ring.slot][swizzled(row, 16 * j)]) = values;
            }
            fence_proxy_async();
            warp_sync();
            if (lane_id() == 0) mbarrier_arrive(&s.full[ring.slot]);
        }
    }
}

// Warps 0 to 3: `use(token, values)` for eight tokens at a time, the sums of row 32 warp + lane, segments
// added in order.
template <class P, class Use>
INLINE void for_sums(P& s, const Work& work, const Use& use) {
    mbarrier_wait(&s.done, 0);
    tmem_fence_after();
    warp_sync();
    for (u32 token = 0; token < work.n; token += 8) {
        float v[P::SEGMENTS][8] = {};
        UNROLL
        for (u32 segment = 0; segment < P::SEGMENTS; ++segment)
            if (segment * work.per < work.n_blocks)
                tmem_load(v[segment], s.sums + (warp_id() * WARP << 16) + segment * P::TOKENS + token);
        UNROLL
        for (u32 segment = 0; segment < P::SEGMENTS; ++segment)
            if (segment * work.per < work.n_blocks) tmem_load_wait(v[segment]);
        UNROLL
        for (u32 segment = 1; segment < P::SEGMENTS; ++segment)
            UNROLL
            for (u32 i = 0; i < 8; ++i) v[0][i] = add_rn(v[0][i], v[segment][i]);
        use(token, v[0]);
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
