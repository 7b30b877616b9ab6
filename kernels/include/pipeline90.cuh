// Matrix products of sm_90a, `out[row][token] = sum_k W[row][k] x[token][k]`, computed transposed:
// 64 rows of W are the A operand of a warpgroup product, N tokens its B. E4M3 times E4M3.
//
// A block is three warpgroups. The first brings operands: warp 0 streams weights by bulk copies,
// the others bring x. The other two multiply; by `Share` they split a row tile's K or two row tiles.
// They meet at two barriers per slot of the ring: `full` and `empty`.
//
// A tile of weights is 64 rows x 128 bytes of K:
//   FP8  128 codes of a row, swizzled by the tensor copy that brings them from the checkpoint's layout
//   bf16 64 values of a row, likewise; times bf16
//   FP8 times bf16: FP8 codes expanded in registers (layers whose activations are not quantised)
//   FP4  packed when loaded (`moe/pack_fp4.cu`), the tiles of 64 rows one behind the other in K:
//        4,096 bytes of codes as this lane's registers want them, then a word per row (256 bytes);
//        expanded in registers to E4M3. Word of a row: 4 bits per 32 columns, k + 5, where the
//        codes are multiplied by 2^k, and from bit 16 the E8M0 byte of what is left.
//        Wide (scales of a block of 128 too far apart for that): the four E8M0 bytes.
// x lies in shared memory as rows of 128 codes, swizzled, with a scale per row. It comes from bf16
// rows, quantised on the way (few tokens), or from tiles that `act_quant_tiles` made:
// codes [k / 128][x_rows][128], scales [k / 128][x_rows] f32, k rounded up to whole blocks. bf16 rows of
// x lie in panels of 64 columns, swizzled, brought by tensor copies.
//
// One order of addition for every number of tokens: K is cut into an even number of segments, fixed
// by the matrix; a block of 128 is summed by the tensor core, times its scales added to the
// segment's f32 sum in K order; segments are added in order.
//
// Included by `experts90.cuh`, `linear/linear90.cu` and `quant/tiles90.cu`.
#pragma once

#include "rows.cuh"
#include "swizzle.cuh"

constexpr u32 TILE_ROWS = 64, K_BLOCK = 128, GROUP = 128, PIPELINE_THREADS = 3 * GROUP;
constexpr u32 FILL_WARPS = 3;
constexpr u32 FP4_TILE = 4352, FP4_CODES = 4096, FP8_TILE = 8192;

enum class Format { Fp4, Fp4Wide, Fp8, Fp8ByBf16, Bf16 };
template <Format F>
constexpr u32 tile_bytes = F == Format::Fp4 || F == Format::Fp4Wide ? FP4_TILE : FP8_TILE;
// Values of K in a tile, and bytes of a row of x that go with them.
template <Format F>
constexpr u32 k_block = F == Format::Bf16 ? K_BLOCK / 2 : K_BLOCK;
template <Format F>
constexpr u32 x_bytes = F == Format::Fp8ByBf16 ? 2 * K_BLOCK : K_BLOCK;
constexpr u32 PANEL = 64; // columns of x in bf16 that lie together

// What the two multiplying warpgroups split: the K of one row tile, or two row tiles.
enum class Share { K, Rows };

template <Format F, Share S, u32 N, u32 Stages>
struct Pipeline {
    static constexpr u32 STAGES = Stages, N_X = S == Share::K ? 2 : 1;
    alignas(1024) u8 w[Stages][2][tile_bytes<F>];
    alignas(1024) u8 x[Stages][N_X][N * x_bytes<F>];
    alignas(16) float x_scales[Stages][N_X][N];
    // Share::K: the second group's sums. Share::Rows: each group's sums of earlier segments.
    float sums[S == Share::K ? 1 : 2][N / 2][GROUP];
    u64 full[Stages], empty[Stages];
};

// A place in the ring of slots.
template <u32 Stages>
struct Ring {
    u32 slot = 0, parity = 0;
    INLINE void next() {
        if (++slot == Stages) slot = 0, parity ^= 1;
    }
};

// The value of a group: an index known only at run time would put the array into local memory.
template <class T>
INLINE T of_group(const T (&values)[2], u32 group) {
    return group ? values[1] : values[0];
}

// One product of the block: where each group's tiles begin, and how many blocks of K each has.
struct Work {
    const u8* tiles[2];
    u32 n_blocks[2], first_block[2];
    INLINE u32 n_stages() const { return max_u32(n_blocks[0], n_blocks[1]); }
};

// Blocks of K in a segment, for `n_segments` of them.
INLINE u32 per_segment(u32 n_blocks, u32 n_segments) { return ceil_div(n_blocks, n_segments); }

// Segments `first` and `first + 1` of a row tile, one for each group. `tile_row`, `bytes` of a tile:
// for tiles that were packed.
INLINE Work share_k(const u8* tile_row, u32 bytes, u32 n_blocks, u32 per, u32 first) {
    Work work;
    UNROLL
    for (u32 group = 0; group < 2; ++group) {
        const u32 start = min_u32((first + group) * per, n_blocks);
        work.first_block[group] = start;
        work.n_blocks[group] = min_u32(per, n_blocks - start);
        work.tiles[group] = tile_row + static_cast<u64>(start) * bytes;
    }
    return work;
}
// Two row tiles from `tile` on; the second may be behind the last.
INLINE Work share_rows(const u8* tiles, u32 bytes, u32 n_blocks, u32 tile, u32 n_tiles) {
    Work work;
    UNROLL
    for (u32 group = 0; group < 2; ++group) {
        work.first_block[group] = 0;
        work.n_blocks[group] = tile + group < n_tiles ? n_blocks : 0;
        work.tiles[group] = tiles + static_cast<u64>(tile + group) * n_blocks * bytes;
    }
    return work;
}

// `n_fillers`: warps that arrive when they have brought x.
template <class P>
INLINE void pipeline_start(P& s, u32 n_fillers) {
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < P::STAGES; ++i) {
            mbarrier_init(&s.full[i], 1 + n_fillers);
            mbarrier_init(&s.empty[i], 2 * GROUP / WARP);
        }
        fence_mbarrier_init();
    }
    block_sync();
}

// Products of more tokens than a copy brings read the rest of the slot: any numbers will do there.
template <class P>
INLINE void clear_x(P& s) {
    for (u32 i = threadIdx.x; i < sizeof s.x / 16; i += PIPELINE_THREADS)
        reinterpret_cast<u32x4*>(s.x)[i] = u32x4{};
    for (u32 i = threadIdx.x; i < sizeof s.x_scales / 16; i += PIPELINE_THREADS)
        reinterpret_cast<u32x4*>(s.x_scales)[i] = u32x4{};
    fence_proxy_async();
    block_sync();
}

// Warp 0, one lane: the weights. `load(to, group, i, barrier)` starts the copy of the group's tile i.
template <Format F, class P, class R, class Load>
INLINE void copy_weights(P& s, R& ring, const Work& work, const Load& load) {
    for (u32 i = 0; i < work.n_stages(); ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        const u32 n_tiles = (i < work.n_blocks[0]) + (i < work.n_blocks[1]);
        mbarrier_arrive_expect(&s.full[ring.slot], n_tiles * tile_bytes<F>);
        UNROLL
        for (u32 group = 0; group < 2; ++group)
            if (i < work.n_blocks[group]) load(s.w[ring.slot][group], group, i, &s.full[ring.slot]);
    }
}

// Tiles of x in memory.
struct XTiles {
    const u8* codes;
    const float* scales;
    u32 rows;
};

// Warp 1, one lane: rows `first ..+ n` of x, n a multiple of 8.
template <Share S, class P, class R>
INLINE void copy_x(P& s, R& ring, const Work& work, const XTiles& x, u32 first, u32 n) {
    for (u32 i = 0; i < work.n_stages(); ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        u32 n_parts = 0;
        UNROLL
        for (u32 part = 0; part < P::N_X; ++part) n_parts += S == Share::Rows || i < work.n_blocks[part];
        mbarrier_arrive_expect(&s.full[ring.slot], n_parts * n * (K_BLOCK + 4));
        UNROLL
        for (u32 part = 0; part < P::N_X; ++part) {
            if (S == Share::K && i >= work.n_blocks[part]) continue;
            const u64 row = static_cast<u64>(work.first_block[part] + i) * x.rows + first;
            bulk_load<false>(s.x[ring.slot][part], x.codes + row * K_BLOCK, n * K_BLOCK, &s.full[ring.slot]);
            bulk_load<false>(s.x_scales[ring.slot][part], x.scales + row, n * 4, &s.full[ring.slot]);
        }
    }
}

// Warp 1, one lane: N rows of x in bf16 from `first` on, columns from `first_column`, through a map with
// boxes of N rows x 64; zeros behind the last row.
template <Format F, Share S, u32 N, class P, class R>
INLINE void copy_x_panels(P& s, R& ring, const Work& work, const TensorMap& x, u32 first_column, u32 first) {
    constexpr u32 PANELS = k_block<F> / PANEL;
    for (u32 i = 0; i < work.n_stages(); ++i, ring.next()) {
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        u32 n_parts = 0;
        UNROLL
        for (u32 part = 0; part < P::N_X; ++part) n_parts += S == Share::Rows || i < work.n_blocks[part];
        mbarrier_arrive_expect(&s.full[ring.slot], n_parts * N * x_bytes<F>);
        UNROLL
        for (u32 part = 0; part < P::N_X; ++part) {
            if (S == Share::K && i >= work.n_blocks[part]) continue;
            UNROLL
            for (u32 panel = 0; panel < PANELS; ++panel) {
                const u32 at[2] = {first_column + (work.first_block[part] + i) * k_block<F> + panel * PANEL, first};
                tensor_load<false>(s.x[ring.slot][part] + panel * N * K_BLOCK, x, at, &s.full[ring.slot]);
            }
        }
    }
}

// RMSNorm of rows of x on their way, rounded to bf16; none without a weight.
struct RowNorm {
    const float* weight = nullptr;
    float eps = 0.0f;
};

// The factor of a row of `width` values; the whole warp calls it. `rms_norm` adds in this order too, so
// both have the same bits.
INLINE float norm_factor(const bf16* row, u32 width, float eps) {
    constexpr u32 THREADS = 256, MAX_CHUNKS = 4; // of `rms_norm`
    float sum = 0.0f;
    for (u32 first = 0; first < THREADS && first * PER_THREAD < width; first += WARP) {
        float squares = 0.0f;
        for (u32 chunk = 0; chunk < MAX_CHUNKS; ++chunk) {
            const u32 i = (chunk * THREADS + first + lane_id()) * PER_THREAD;
            float v[8] = {};
            if (i < width) load8(row + i, v);
            UNROLL
            for (u32 j = 0; j < 8; ++j) squares = fma_rn(v[j], v[j], squares);
        }
        sum = add_rn(sum, warp_sum(squares));
    }
    return div_rn(1.0f, sqrt_rn(sum / static_cast<float>(width) + eps));
}

// Warps 1 to 3, Share::K and N = 8: rows of bf16, normed and quantised on the way. `row_of(token)` is
// the token's row, or null; its values at and beyond k count as zeros.
template <class P, class R, class RowOf>
INLINE void fill_x(P& s, R& ring, const Work& work, u32 k, const RowOf& row_of, const RowNorm& norm = {}) {
    // 16 rows of 128 values per stage, two at a time: 8 tokens for each group.
    constexpr u32 PAIRS = 8, PER_WARP = ceil_div(PAIRS, FILL_WARPS);
    const u32 warp = warp_id() - 1, lane = lane_id(), column = lane % 16 * PER_THREAD;
    const bf16* rows[PER_WARP];
    u32x4 next[PER_WARP];
    UNROLL
    for (u32 i = 0; i < PER_WARP; ++i) {
        const u32 row = 2 * (warp + FILL_WARPS * i) + lane / 16;
        rows[i] = row < 2 * PAIRS ? row_of(row % 8) : nullptr;
    }
    float factors[PER_WARP] = {};
    if (norm.weight) {
        UNROLL
        for (u32 i = 0; i < PER_WARP; ++i)
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = 2 * (warp + FILL_WARPS * i) + half;
                const bf16* of_half = row < 2 * PAIRS ? row_of(row % 8) : nullptr;
                if (!of_half) continue;
                const float factor = norm_factor(of_half, k, norm.eps);
                if (lane / 16 == half) factors[i] = factor;
            }
    }
    const auto load = [&](u32 stage) {
        UNROLL
        for (u32 i = 0; i < PER_WARP; ++i) {
            const u32 group = (warp + FILL_WARPS * i) / 4 % 2;
            const u32 at = (of_group(work.first_block, group) + stage) * K_BLOCK + column;
            next[i] = u32x4{};
            if (rows[i] && stage < of_group(work.n_blocks, group) && at < k)
                next[i] = *reinterpret_cast<const u32x4*>(rows[i] + at);
        }
    };
    // One stage ahead: the latency of these loads is longer than a stage of weights takes.
    load(0);
    for (u32 stage = 0; stage < work.n_stages(); ++stage, ring.next()) {
        u32x4 now[PER_WARP];
        UNROLL
        for (u32 i = 0; i < PER_WARP; ++i) now[i] = next[i];
        load(stage + 1);
        mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
        UNROLL
        for (u32 i = 0; i < PER_WARP; ++i) {
            const u32 pair = warp + FILL_WARPS * i, group = pair / 4 % 2;
            if (pair >= PAIRS) break;
            const u32 token = (2 * pair + lane / 16) % 8;
            if (norm.weight) {
                const u32 at = (of_group(work.first_block, group) + stage) * K_BLOCK + column;
                float v[8];
                unpack8(now[i], v);
                UNROLL
                for (u32 j = 0; j < 8; ++j) v[j] = at < k ? mul_rn(mul_rn(v[j], factors[i]), norm.weight[at + j]) : 0.0f;
                now[i] = pack8(v);
            }
            u32x2 codes;
            const u32 scale = quantise_codes(now[i], codes);
            *reinterpret_cast<u32x2*>(&s.x[ring.slot][group][swizzled(token, column)]) = codes;
            if (lane % 16 == 0) s.x_scales[ring.slot][group][token] = e8m0_to_f32(scale);
        }
        fence_proxy_async();
        warp_sync();
        if (lane == 0) mbarrier_arrive(&s.full[ring.slot]);
    }
}

// Eight E2M1 codes to E4M3, times 2^(n - 5), n = 0..11, exact: k .. k + 3 and k + 16 .. k + 19 of a
// row. Magnitudes are nibbles; signs of the first four are bits 7, 15, 23, 31, of the others
// bits 3, 11, 19, 27 (`pack_fp4`).
INLINE void expand_fp4(u32 w, u32 n, u32& first, u32& second) {
    // The codes of 0, .5, 1, 1.5 and of 2, 3, 4, 6, times 2^-5; a step of the exponent is 8.
    const u32 low = 0x14100800u + n * 0x08080800u, high = 0x24201c18u + n * 0x08080808u;
    const u32 magnitudes = w & 0x77777777u;
    first = byte_perm(low, high, magnitudes) | (w & 0x80808080u);
    second = byte_perm(low, high, magnitudes >> 16) | (w << 4 & 0x80808080u);
}

// This thread's registers of a tile: `a[step]` for the products of 32 columns each, and the words of
// its rows g and g + 8.
template <Format F>
INLINE void expand_tile(const u8* tile, u32 (&a)[4][4], u32 (&words)[2]) {
    const u32 t = threadIdx.x % GROUP, row = t / WARP * 16 + t % WARP / 4;
    UNROLL
    for (u32 r = 0; r < 2; ++r) words[r] = *reinterpret_cast<const u32*>(tile + FP4_CODES + 4 * (row + 8 * r));
    UNROLL
    for (u32 half = 0; half < 2; ++half) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(tile + half * (FP4_CODES / 2) + t * 16);
        UNROLL
        for (u32 i = 0; i < 2; ++i)
            UNROLL
            for (u32 r = 0; r < 2; ++r) {
                const u32 step = 2 * half + i;
                const u32 n = F == Format::Fp4Wide ? 5 : words[r] >> 4 * step & 15;
                expand_fp4(v.v[2 * i + r], n, a[step][r], a[step][2 + r]);
            }
    }
}

// This thread's registers of an FP8 tile for the product of columns `16 step ..+ 16`, in bf16.
INLINE void expand_fp8_step(const u8* tile, u32 step, u32 (&a)[4]) {
    const u32 t = threadIdx.x % GROUP, row = t / WARP * 16 + t % WARP / 4;
    UNROLL
    for (u32 r = 0; r < 4; ++r) {
        const u32 at = swizzled(row + r % 2 * 8, step * 16 + r / 2 * 8 + t % 4 * 2);
        const u32 w = byte_perm(*reinterpret_cast<const u16*>(tile + at), 0, 0x1404);
        a[r] = mul_bf16x2((w & 0x80008000u) | (w >> 4 & 0x07f007f0u), 0x7b807b80u); // times 2^120
    }
}

// sums += part times a factor.
template <u32 N>
INLINE void promote(const float (&part)[N / 2], float factor, float (&sums)[N / 2]) {
    UNROLL
    for (u32 r = 0; r < N / 2; ++r) sums[r] = fma_rn(part[r], factor, sums[r]);
}

// sums += part times the factor of the row and the scale of the token.
template <u32 N>
INLINE void promote(const float (&part)[N / 2], float factor_low, float factor_high, const float* x_scales,
                    float (&sums)[N / 2]) {
    const u32 column = 2 * (lane_id() % 4);
    UNROLL
    for (u32 n = 0; n < N / 8; ++n)
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const float x_scale = x_scales[8 * n + column + i];
            sums[4 * n + i] = fma_rn(part[4 * n + i], mul_rn(factor_low, x_scale), sums[4 * n + i]);
            sums[4 * n + 2 + i] = fma_rn(part[4 * n + 2 + i], mul_rn(factor_high, x_scale), sums[4 * n + 2 + i]);
        }
}

template <class P, class R>
INLINE void release_slot(P& s, const R& ring) {
    warp_sync();
    if (lane_id() == 0) mbarrier_arrive(&s.empty[ring.slot]);
}

// The sums of a segment end here: `sums` begins anew, what was is kept in shared memory.
template <u32 N, class P>
INLINE void park(P& s, u32 group, bool is_first, float (&sums)[N / 2]) {
    const u32 t = threadIdx.x % GROUP;
    UNROLL
    for (u32 r = 0; r < N / 2; ++r) {
        float& kept = s.sums[group][r][t];
        kept = is_first ? sums[r] : add_rn(kept, sums[r]);
        sums[r] = 0.0f;
    }
}

// One group's products of a work item: the sum over its blocks of K. `per`: blocks of a segment;
// `w_scales` (FP8): the scales of this row tile's blocks. `Rows`: rows of x in a slot, N at least.
template <Format F, Share S, u32 N, u32 Rows = N, class P, class R>
INLINE void multiply(P& s, R& ring, const Work& work, u32 group, u32 per, const float* w_scales,
                     float (&sums)[N / 2]) {
    const u32 n_blocks = of_group(work.n_blocks, group), n_stages = work.n_stages(), part_of_x = S == Share::K ? group : 0;
    float part[N / 2];
    u32 segment = 0, left = per; // blocks left of this segment
    UNROLL
    for (u32 r = 0; r < N / 2; ++r) sums[r] = 0.0f;
    const auto end_of_block = [&](u32 i) {
        if (S == Share::Rows && --left == 0 && i + 1 < n_blocks) {
            park<N>(s, group, segment++ == 0, sums);
            left = per;
        }
    };
    if constexpr (F == Format::Fp4) {
        // Registers of A alternate: those of the next block are expanded while this one multiplies.
        u32 a[2][4][4], words[2][2];
        if (n_blocks > 0) {
            mbarrier_wait(&s.full[ring.slot], ring.parity);
            expand_tile<F>(s.w[ring.slot][group], a[0], words[0]);
        }
        for (u32 first = 0; first < n_blocks; first += 2) {
            UNROLL
            for (u32 odd = 0; odd < 2; ++odd) {
                const u32 i = first + odd;
                if (i >= n_blocks) break;
                const u64 x = matrix_k_major(s.x[ring.slot][part_of_x]);
                wgmma_fence();
                UNROLL
                for (u32 step = 0; step < 4; ++step)
                    wgmma_e4m3<N>(part, a[odd][step], x + 2 * step, step > 0);
                wgmma_commit();
                if (i + 1 < n_blocks) {
                    R after = ring;
                    after.next();
                    mbarrier_wait(&s.full[after.slot], after.parity);
                    expand_tile<F>(s.w[after.slot][group], a[odd ^ 1], words[odd ^ 1]);
                }
                wgmma_wait<0>(part);
                promote<N>(part, bits_float((words[odd][0] >> 16 & 255u) << 23),
                           bits_float((words[odd][1] >> 16 & 255u) << 23), s.x_scales[ring.slot][part_of_x], sums);
                release_slot(s, ring);
                ring.next();
                end_of_block(i);
            }
        }
    } else if constexpr (F == Format::Bf16) {
        for (u32 i = 0; i < n_blocks; ++i) {
            mbarrier_wait(&s.full[ring.slot], ring.parity);
            const u64 w = matrix_k_major(s.w[ring.slot][group]), x = matrix_k_major(s.x[ring.slot][part_of_x]);
            wgmma_fence();
            UNROLL
            for (u32 step = 0; step < 4; ++step)
                wgmma_bf16_shared<N>(sums, w + 2 * step, x + 2 * step, left < per || step > 0);
            wgmma_commit();
            wgmma_wait<0>(sums);
            release_slot(s, ring);
            ring.next();
            if (S == Share::K) left = 0; // one segment
            else end_of_block(i);
        }
    } else if constexpr (F == Format::Fp8ByBf16) {
        for (u32 i = 0; i < n_blocks; ++i) {
            const float scale = w_scales[of_group(work.first_block, group) + i];
            mbarrier_wait(&s.full[ring.slot], ring.parity);
            const u8* x = s.x[ring.slot][part_of_x];
            u32 a[K_BLOCK / 16][4];
            UNROLL
            for (u32 step = 0; step < K_BLOCK / 16; ++step) expand_fp8_step(s.w[ring.slot][group], step, a[step]);
            wgmma_fence();
            UNROLL
            for (u32 step = 0; step < K_BLOCK / 16; ++step)
                wgmma_bf16<N>(part, a[step], matrix_k_major(x + step / 4 * Rows * K_BLOCK) + step % 4 * 2, step > 0);
            wgmma_commit();
            wgmma_wait<0>(part);
            promote<N>(part, scale, sums);
            release_slot(s, ring);
            ring.next();
            end_of_block(i);
        }
    } else {
        for (u32 i = 0; i < n_blocks; ++i) {
            const float scale = F == Format::Fp8 ? w_scales[of_group(work.first_block, group) + i] : 1.0f;
            mbarrier_wait(&s.full[ring.slot], ring.parity);
            const u64 x = matrix_k_major(s.x[ring.slot][part_of_x]);
            const float* x_scales = s.x_scales[ring.slot][part_of_x];
            if constexpr (F == Format::Fp8) {
                const u64 w = matrix_k_major(s.w[ring.slot][group]);
                wgmma_fence();
                UNROLL
                for (u32 step = 0; step < 4; ++step)
                    wgmma_e4m3_shared<N>(part, w + 2 * step, x + 2 * step, step > 0);
                wgmma_commit();
                wgmma_wait<0>(part);
                promote<N>(part, scale, scale, x_scales, sums);
            } else {
                // Scales too far apart to fold: every 32 columns are added with their own.
                u32 a[4][4], words[2];
                expand_tile<F>(s.w[ring.slot][group], a, words);
                UNROLL
                for (u32 step = 0; step < 4; ++step) {
                    wgmma_fence();
                    wgmma_e4m3<N>(part, a[step], x + 2 * step, false);
                    wgmma_commit();
                    wgmma_wait<0>(part);
                    promote<N>(part, bits_float((words[0] >> 8 * step & 255u) << 23),
                               bits_float((words[1] >> 8 * step & 255u) << 23), x_scales, sums);
                }
            }
            release_slot(s, ring);
            ring.next();
            end_of_block(i);
        }
    }
    // Slots that only the other group uses.
    for (u32 i = n_blocks; i < n_stages; ++i, ring.next()) {
        mbarrier_wait(&s.full[ring.slot], ring.parity);
        release_slot(s, ring);
    }
    if (S == Share::Rows && segment > 0) {
        UNROLL
        for (u32 r = 0; r < N / 2; ++r) sums[r] = add_rn(s.sums[group][r][threadIdx.x % GROUP], sums[r]);
    }
}

// Share::K: the first group's `sums` become those of both; the second's are done with.
template <u32 N, class P>
INLINE void add_groups(P& s, u32 group, float (&sums)[N / 2]) {
    const u32 t = threadIdx.x % GROUP;
    if (group == 1) {
        UNROLL
        for (u32 r = 0; r < N / 2; ++r) s.sums[0][r][t] = sums[r];
    }
    named_sync<1>(2 * GROUP);
    if (group == 0) {
        UNROLL
        for (u32 r = 0; r < N / 2; ++r) sums[r] = add_rn(sums[r], s.sums[0][r][t]);
    }
    named_sync<2>(2 * GROUP);
}
