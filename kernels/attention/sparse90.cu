// attn_sparse90: attention of each token over its window and its compressed entries, 64 heads a block.
//
// Source   `sparse_attn` of the official release.
// Inputs, outputs: those of `attn_sparse` (`sparse.cu`): per split of `split_blocks` blocks of 64
//          keys, sums that are not normalised, maximum and denominator; `attn_merge` adds the splits.
// Launch   grid (n_splits, ceil(n_heads / 64), n_tokens), 384 threads, 211 KB of shared memory: one
//          block per SM. The first warpgroup scores a block of 64 keys, takes the softmax and owns
//          channels 0 .. 255 of the output; the second owns 256 .. 511; the third gathers and expands
//          the next block of keys. A block of keys is read K-major for the scores and MN-major for
//          the values: one copy in shared memory is both.
// Limit    tensor cores and shared memory alike: per 64 keys 2,048 cycles of products against about
//          2,100 of operand traffic.
// Arch     sm_90a.
// CPU twin `ops::cpu::attention`: the same blocks of 64 and the same bf16 rounding of weights;
//          splits have their own maxima, so weights may round otherwise: 2^-8 of the largest value.

#include "../include/formats.cuh"
#include "../include/reduce.cuh"
#include "../include/step.cuh"
#include "../include/swizzle.cuh"

constexpr u32 HEADS = 64, KEYS = 64, GROUP = 128, THREADS = 3 * GROUP;
// 64 rows (heads or keys) of 64 channels, swizzled; a row of 512 channels is 8 tiles.
constexpr u32 TILE = 8192, TILES = HEAD_DIM / 64, HALF = HEAD_DIM / 2;
constexpr float SOFTMAX_SCALE = 0.044194173f; // 512^-0.5
constexpr float LOG2_E = 1.44269504f;

struct SparseShared {
    alignas(1024) u8 q[TILES][TILE];
    alignas(1024) u8 keys[2][TILES][TILE];
    // Weights and factors of the first group's threads for the same threads of the second.
    u32 p[2][16][GROUP];
    float rescale[2][2][GROUP];
    u64 full[2], empty[2];
};

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
// keys, two halves) store to eight different pieces of a swizzled row: no bank conflict.
INLINE void store_half(const HalfRow& r, u32 half, u32 key, u8 (*tiles)[TILE]) {
    UNROLL
    for (u32 i = 0; i < CODES; ++i) {
        const u32 piece = CODES * half + i, scale = piece / 8;
        const u32 byte = (scale < 4 ? r.scales.v[0] : r.scales.v[1]) >> scale % 4 * 8 & 255u;
        // A power of two in the range of bf16's normal numbers, as all block scales are.
        const u32 factor = (byte << 7) * 0x00010001u;
        u32x4 values;
        expand_e4m3(r.codes[i].v[0], values.v[0], values.v[1]);
        expand_e4m3(r.codes[i].v[1], values.v[2], values.v[3]);
        UNROLL
        for (u32 j = 0; j < 4; ++j) values.v[j] = mul_bf16x2(values.v[j], factor);
        *reinterpret_cast<u32x4*>(&tiles[piece / 8][swizzled(key, piece % 8 * 16)]) = values;
    }
    UNROLL
    for (u32 i = 0; i < ROPES; i += 2) {
        const u32 piece = (ROPES * half + i) / 2;
        const u32x4 values = {{r.ropes[i].v[0], r.ropes[i].v[1], r.ropes[i + 1].v[0], r.ropes[i + 1].v[1]}};
        *reinterpret_cast<u32x4*>(&tiles[TILES - 1][swizzled(key, piece * 16)]) = values;
    }
}

// The third group: two threads per key.
INLINE void gather(SparseShared& s, const Keys& keys, u32 first, u32 end) {
    const u32 t = threadIdx.x % GROUP, key = t / 2, half = t % 2;
    for (u32 block = first; block < end; ++block) {
        const u32 slot = (block - first) % 2, parity = (block - first) / 2 % 2;
        HalfRow row = {}; // behind the last key: zeros, whose weight is zero
        if (key < keys.count(block)) load_half(keys.row(block, key), half, row);
        mbarrier_wait(&s.empty[slot], parity ^ 1);
        store_half(row, half, key, s.keys[slot]);
        fence_proxy_async();
        warp_sync();
        if (lane_id() == 0) mbarrier_arrive(&s.full[slot]);
    }
}

// o = o * rescale + p V for 256 channels, from `tile` on; then the keys are given back.
INLINE void add_values(SparseShared& s, u32 slot, u32 tile, const u32 (&p)[4][4], const float (&rescale)[2],
                       float (&o)[HALF / 2]) {
    UNROLL
    for (u32 i = 0; i < HALF / 2; ++i) o[i] = mul_rn(o[i], rescale[i / 2 % 2]);
    const u64 values = matrix_mn_major(s.keys[slot][tile], TILE);
    wgmma_fence();
    UNROLL
    for (u32 step = 0; step < KEYS / 16; ++step) wgmma_bf16_mn<HALF>(o, p[step], values + 128 * step, true);
    wgmma_commit();
    wgmma_wait<0>(o);
    warp_sync();
    if (lane_id() == 0) mbarrier_arrive(&s.empty[slot]);
}

// The first group: scores, softmax, its half of the output. Rows g and g + 8 of a warp's 16 heads.
INLINE void score(SparseShared& s, const Keys& keys, u32 first, u32 end, float (&o)[HALF / 2], float (&max)[2],
                  float (&sum)[2]) {
    const u32 t = threadIdx.x % GROUP, quad = lane_id() % 4;
    for (u32 block = first; block < end; ++block) {
        const u32 slot = (block - first) % 2, parity = (block - first) / 2 % 2, n_keys = keys.count(block);
        float d[KEYS / 2];
        mbarrier_wait(&s.full[slot], parity);
        wgmma_fence();
        UNROLL
        for (u32 tile = 0; tile < TILES; ++tile) {
            const u64 q = matrix_k_major(s.q[tile]), k = matrix_k_major(s.keys[slot][tile]);
            UNROLL
            for (u32 step = 0; step < 4; ++step)
                wgmma_bf16_shared<KEYS>(d, q + 2 * step, k + 2 * step, tile + step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(d);
        float rescale[2], shift[2], part[2] = {};
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float next = negative_infinity();
            UNROLL
            for (u32 i = 0; i < KEYS / 4; ++i) {
                float& x = d[i / 2 * 4 + 2 * r + i % 2];
                if (i / 2 * 8 + 2 * quad + i % 2 >= n_keys) x = negative_infinity();
                next = max_f32(next, x);
            }
            next = max_f32(max[r], mul_rn(group_max<4>(next), SOFTMAX_SCALE));
            rescale[r] = exp2_approx(mul_rn(max[r] - next, LOG2_E));
            max[r] = next;
            shift[r] = mul_rn(next, LOG2_E);
        }
        u32 p[4][4];
        UNROLL
        for (u32 i = 0; i < KEYS / 4; ++i) {
            // Pair i: keys 8 (i / 2) + 2 quad and the next, of row r = i % 2.
            const u32 r = i % 2, at = i / 2 * 4 + 2 * r;
            const float low = exp2_approx(fma_rn(d[at], SOFTMAX_SCALE * LOG2_E, -shift[r]));
            const float high = exp2_approx(fma_rn(d[at + 1], SOFTMAX_SCALE * LOG2_E, -shift[r]));
            // The denominator takes the unrounded weights.
            part[r] = add_rn(part[r], add_rn(low, high));
            // Accumulators of the scores lie as registers of A want them.
            p[i / 4][i % 4] = pack_bf16x2(low, high);
        }
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            part[r] = add_rn(part[r], shfl_xor(part[r], 1));
            part[r] = add_rn(part[r], shfl_xor(part[r], 2));
            sum[r] = fma_rn(sum[r], rescale[r], part[r]);
            s.rescale[slot][r][t] = rescale[r];
        }
        UNROLL
        for (u32 i = 0; i < 16; ++i) s.p[slot][i][t] = p[i / 4][i % 4];
        // One barrier per block is enough: the other group reads this slot before it comes to the
        // next, and this group writes it again only after that.
        named_sync<1>(2 * GROUP);
        add_values(s, slot, 0, p, rescale, o);
    }
}

// The second group: the other half.
INLINE void follow(SparseShared& s, u32 first, u32 end, float (&o)[HALF / 2]) {
    const u32 t = threadIdx.x % GROUP;
    for (u32 block = first; block < end; ++block) {
        const u32 slot = (block - first) % 2, parity = (block - first) / 2 % 2;
        mbarrier_wait(&s.full[slot], parity);
        named_sync<1>(2 * GROUP);
        u32 p[4][4];
        UNROLL
        for (u32 i = 0; i < 16; ++i) p[i / 4][i % 4] = s.p[slot][i][t];
        const float rescale[2] = {s.rescale[slot][0][t], s.rescale[slot][1][t]};
        add_values(s, slot, TILES / 2, p, rescale, o);
    }
}

// Writes channels `first_channel ..+ 256` of this group's heads.
INLINE void store_half_output(const float (&o)[HALF / 2], float* acc, u32 first_head, u32 n_heads, u32 first_channel) {
    const u32 lane = lane_id(), head = warp_id() % 4 * 16 + lane / 4;
    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        if (first_head + head + 8 * r >= n_heads) continue;
        float* out = acc + static_cast<u64>(head + 8 * r) * HEAD_DIM + first_channel + 2 * (lane % 4);
        UNROLL
        for (u32 j = 0; j < HALF / 8; ++j)
            *reinterpret_cast<u32x2*>(out + 8 * j) = u32x2{{float_bits(o[4 * j + 2 * r]), float_bits(o[4 * j + 2 * r + 1])}};
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attn_sparse90(
    const bf16* __restrict__ q, const u8* __restrict__ window, const u8* __restrict__ pending,
    const u8* __restrict__ entries, const u32* __restrict__ chosen, const u32* __restrict__ counts,
    const u32* __restrict__ positions, const u32* __restrict__ sequence_of,
    const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,
    float* __restrict__ acc_out, float* __restrict__ stats, u32 first_token, u32 n_heads, u32 ring,
    u32 ratio, u32 top_k, u32 split_blocks) {
    // Of `window` and `blocks` nothing that is read here is written in this step.
    dependency_begin(q, pending, entries, chosen, counts, positions, sequence_of, sequences);
    SparseShared& s = shared<SparseShared>();
    // Outputs are numbered from the first token of this launch, inputs from that of the step.
    const u32 token = first_token + blockIdx.z, first_head = blockIdx.y * HEADS, t = threadIdx.x;
    Keys keys;
    keys.window = window, keys.pending = pending, keys.entries = entries;
    keys.chosen = chosen ? chosen + static_cast<u64>(token) * top_k : nullptr;
    keys.step = {positions, sequence_of, sequences, blocks};
    keys.sequence = sequences + sequence_of[token];
    keys.position = positions[token], keys.ring = ring, keys.ratio = ratio;
    keys.n_window = min_u32(keys.position + 1, WINDOW);
    keys.n_entries = ratio == 0 ? 0 : chosen ? counts[token] : (keys.position + 1) / ratio;
    keys.window_blocks = ceil_div(keys.n_window, KEYS);
    const u32 n_blocks = keys.window_blocks + ceil_div(keys.n_entries, KEYS);
    const u32 first = blockIdx.x * split_blocks, end = min_u32(n_blocks, first + split_blocks);

    if (t == 0) {
        for (u32 slot = 0; slot < 2; ++slot) {
            mbarrier_init(&s.full[slot], GROUP / WARP);
            mbarrier_init(&s.empty[slot], 2 * GROUP / WARP);
        }
        fence_mbarrier_init();
    }
    for (u32 i = t; i < HEADS * (HEAD_DIM / 8); i += THREADS) {
        const u32 head = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
        u32x4 values = {};
        if (first_head + head < n_heads)
            values = *reinterpret_cast<const u32x4*>(
                q + (static_cast<u64>(token) * n_heads + first_head + head) * HEAD_DIM + piece * 8);
        *reinterpret_cast<u32x4*>(&s.q[piece / 8][swizzled(head, piece % 8 * 16)]) = values;
    }
    fence_proxy_async();
    block_sync();

    const u64 at = (static_cast<u64>(blockIdx.z) * gridDim.x + blockIdx.x) * n_heads + first_head;
    if (t >= 2 * GROUP) {
        give_up_registers<112>();
        gather(s, keys, first, end);
    } else if (t < GROUP) {
        take_registers<208>();
        float o[HALF / 2] = {}, max[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};
        score(s, keys, first, end, o, max, sum);
        store_half_output(o, acc_out + at * HEAD_DIM, first_head, n_heads, 0);
        const u32 head = warp_id() * 16 + lane_id() / 4;
        UNROLL
        for (u32 r = 0; r < 2; ++r)
            if (lane_id() % 4 == 0 && first_head + head + 8 * r < n_heads) {
                stats[2 * (at + head + 8 * r)] = max[r];
                stats[2 * (at + head + 8 * r) + 1] = sum[r];
            }
    } else {
        take_registers<184>();
        float o[HALF / 2] = {};
        follow(s, first, end, o);
        store_half_output(o, acc_out + at * HEAD_DIM, first_head, n_heads, HALF);
    }
}
EMU_KERNEL(attn_sparse90)
