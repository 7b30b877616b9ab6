// attn_sparse90: attention of each token over its window and its compressed entries, 64 heads a block.
//
// Source   `sparse_attn` and the inverse rotation of `Attention.forward`, official release.
// Inputs   those of `attn_sparse` and `attn_merge` (`sparse.cu`)
// Outputs  attn_sparse90: per split of `split_blocks` blocks of 64 keys, sums that are not normalised,
//          maximum and denominator; `attn_merge` adds the splits
//          _c1: all keys are one split: o, as `attn_merge` would write it
//          _c2, _c4, _c8: a token's splits are the blocks of a cluster. They exchange their sums through
//          global memory, then each adds up an equal part of the heads: o, likewise
// Launch   grid (n_splits, ceil(n_heads / 64), n_tokens), 384 threads, 211 KB of shared memory: one
//          block per SM. _cC: C splits, some maybe without keys. The first warpgroup scores a block of
//          64 keys, takes the softmax and owns channels 0 .. 255 of the output; the second owns
//          256 .. 511; the third gathers and expands the next block of keys. A block of keys is read
//          K-major for the scores and MN-major for the values: one copy in shared memory is both.
// Limit    tensor cores and shared memory alike: per 64 keys 2,048 cycles of products against about
//          2,100 of operand traffic. A cluster exchanges 128 KB per block: at 64 bytes per cycle to and
//          from the second-level cache 2,048 cycles each way, fewer where blocks have no keys. Between
//          multiprocessors the sums would need memory that keys lie in.
// Arch     sm_90a.
// CPU twin `ops::cpu::attention`: the same blocks of 64 and the same bf16 rounding of weights;
//          splits have their own maxima, so weights may round otherwise: 2^-8 of the largest value.

#include "../include/merge.cuh"
#include "../include/sparse_keys.cuh"

constexpr u32 HEADS = 64, GROUP = 128, THREADS = 3 * GROUP, HALF = HEAD_DIM / 2;

struct SparseShared {
    alignas(1024) u8 q[TILES][TILE];
    alignas(1024) u8 keys[2][TILES][TILE];
    // Weights and factors of the first group's threads for the same threads of the second.
    u32 p[2][16][GROUP];
    float rescale[2][2][GROUP];
    u64 full[2], empty[2];
    // Sines and cosines of the rotation back, by pair of channels; of heads, where there is one split.
    float turns[ROPE_DIM / 2][2];
    OneSplit splits[HEADS];
};

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

// Where the sums of the block's split go, and what becomes of them. Addresses are made where they are
// used: kept from the beginning they would cost the products registers.
struct Output {
    float *acc, *stats;
    const float* sink;
    bf16* o;
    u32 first_token, n_heads;

    INLINE u32 first_head() const { return blockIdx.y * HEADS; }
    // Of partial results, numbered from the first token of the launch.
    INLINE u64 part(u32 split) const {
        return (static_cast<u64>(blockIdx.z) * gridDim.x + split) * n_heads + first_head();
    }
    INLINE bf16* row(u32 head) const {
        return o + (static_cast<u64>(first_token + blockIdx.z) * n_heads + first_head() + head) * HEAD_DIM;
    }
};

// Where there is one split: by both groups, `first_channel ..+ 256` by each. `split` of the thread's two rows.
INLINE void finish(SparseShared& s, const float (&o)[HALF / 2], const OneSplit (&split)[2], const Output& to,
                   u32 first_channel) {
    constexpr u32 PIECES = HALF / 8;
    const u32 lane = lane_id(), quad = lane % 4, first_row = warp_id() % 4 * 16, row = first_row + lane / 4;
    // The queries are read no more: rows of the output lie in their place, to leave in whole lines.
    u8 (*tiles)[TILE] = s.q + first_channel / 64;
    UNROLL
    for (u32 j = 0; j < PIECES; ++j)
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float re = split[r].value(o[4 * j + 2 * r]), im = split[r].value(o[4 * j + 2 * r + 1]);
            if (j >= PIECES - ROPE_DIM / 8 && first_channel == HALF) {
                const float* sin_cos = s.turns[(j - (PIECES - ROPE_DIM / 8)) * 4 + quad];
                turn(re, im, sin_cos[0], sin_cos[1]);
            }
            *reinterpret_cast<u32*>(&tiles[j / 8][swizzled(row + 8 * r, j % 8 * 16) + 4 * quad]) = pack_bf16x2(re, im);
        }
    warp_sync();
    for (u32 i = first_row; i < first_row + 16 && to.first_head() + i < to.n_heads; ++i)
        *reinterpret_cast<u32x4*>(to.row(i) + first_channel + 8 * lane) =
            *reinterpret_cast<const u32x4*>(&tiles[lane / 8][swizzled(i, lane % 8 * 16)]);
}

// By both groups of each of the cluster's blocks, whose sums are stored.
template <u32 Cluster>
INLINE void merge(SparseShared& s, const Output& to) {
    cluster_arrive();
    cluster_wait();
    const float* acc = after_wait(to.acc + to.part(0) * HEAD_DIM);
    const float* stats = after_wait(to.stats + 2 * to.part(0));
    const u32 lane = lane_id();
    for (u32 i = warp_id() * Cluster + cluster_rank(); i < HEADS; i += 2 * GROUP / WARP * Cluster) {
        const u32 head = to.first_head() + i;
        if (head >= to.n_heads) return;
        float v[KV_PER_LANE];
        // As many splits as the grid has: known to the compiler, they would be unrolled and spill.
        constexpr u32 AT_ONCE = Cluster < 4 ? Cluster : 4;
        merge_head<AT_ONCE>(acc + i * HEAD_DIM, stats + 2 * i, to.n_heads, gridDim.x, to.sink[head], v);
        if (lane >= NOPE_DIM / KV_PER_LANE)
            UNROLL
            for (u32 j = 0; j < KV_PER_LANE / 2; ++j) {
                const float* sin_cos = s.turns[(lane - NOPE_DIM / KV_PER_LANE) * (KV_PER_LANE / 2) + j];
                turn(v[2 * j], v[2 * j + 1], sin_cos[0], sin_cos[1]);
            }
        store_row(v, to.row(i));
    }
}

// By the last warp, before everything else: later its branch would have no registers for it.
INLINE void prepare_turns(const float* frequencies, u32 position) {
    SparseShared& s = shared<SparseShared>();
    if (warp_id() + 1 < THREADS / WARP) return;
    const u32 pair = lane_id();
    float sin, cos;
    sincos_f32(mul_rn(static_cast<float>(position), frequencies[pair]), sin, cos);
    s.turns[pair][0] = mul_rn(sin, -1.0f), s.turns[pair][1] = cos;
}

// Cluster: blocks that add up a token's splits; 0 where another launch does.
template <u32 Cluster>
INLINE void attend(const bf16* q, const Keys& keys, u32 split_blocks, const Output& to) {
    SparseShared& s = shared<SparseShared>();
    const u32 t = threadIdx.x, token = to.first_token + blockIdx.z, first_head = to.first_head();
    const u32 n_blocks = keys.window_blocks + ceil_div(keys.n_entries, KEYS);
    const u32 first = blockIdx.x * split_blocks, end = min_u32(n_blocks, first + split_blocks);
    const bool has_keys = first < end;

    if (t == 0) {
        for (u32 slot = 0; slot < 2; ++slot) {
            mbarrier_init(&s.full[slot], GROUP / WARP);
            mbarrier_init(&s.empty[slot], 2 * GROUP / WARP);
        }
        fence_mbarrier_init();
    }
    for (u32 i = t; has_keys && i < HEADS * (HEAD_DIM / 8); i += THREADS) {
        const u32 head = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
        u32x4 values = {};
        if (first_head + head < to.n_heads)
            values = *reinterpret_cast<const u32x4*>(
                q + (static_cast<u64>(token) * to.n_heads + first_head + head) * HEAD_DIM + piece * 8);
        *reinterpret_cast<u32x4*>(&s.q[piece / 8][swizzled(head, piece % 8 * 16)]) = values;
    }
    fence_proxy_async();
    block_sync();

    const u32 row = warp_id() % 4 * 16 + lane_id() / 4, quad = lane_id() % 4;
    if (t >= 2 * GROUP) {
        give_up_registers<120>();
        gather(s, keys, first, end);
        // Too few registers to take part in what follows.
        if constexpr (Cluster > 1) cluster_arrive(), cluster_wait();
    } else if (t < GROUP) {
        take_registers<208>();
        float o[HALF / 2] = {}, max[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};
        score(s, keys, first, end, o, max, sum);
        if constexpr (Cluster == 1) {
            OneSplit split[2];
            UNROLL
            for (u32 r = 0; r < 2; ++r) {
                const u32 head = to.first_head() + row + 8 * r;
                split[r] = one_split(max[r], sum[r], head < to.n_heads ? to.sink[head] : 0.0f);
                if (quad == 0) s.splits[row + 8 * r] = split[r];
            }
            named_sync<1>(2 * GROUP);
            finish(s, o, split, to, 0);
        } else {
            const u64 part = to.part(blockIdx.x);
            if (has_keys) store_half_output(o, to.acc + part * HEAD_DIM, to.first_head(), to.n_heads, 0);
            UNROLL
            for (u32 r = 0; r < 2; ++r)
                if (quad == 0 && to.first_head() + row + 8 * r < to.n_heads) {
                    float* stats = to.stats + 2 * (part + row + 8 * r);
                    stats[0] = max[r], stats[1] = sum[r];
                }
        }
        if constexpr (Cluster > 1) merge<Cluster>(s, to);
    } else {
        take_registers<176>();
        float o[HALF / 2] = {};
        follow(s, first, end, o);
        if constexpr (Cluster == 1) {
            named_sync<1>(2 * GROUP);
            const OneSplit split[2] = {s.splits[row], s.splits[row + 8]};
            finish(s, o, split, to, HALF);
        } else if (has_keys) {
            store_half_output(o, to.acc + to.part(blockIdx.x) * HEAD_DIM, to.first_head(), to.n_heads, HALF);
        }
        if constexpr (Cluster > 1) merge<Cluster>(s, to);
    }
}

// `acc_out` and `stats` are read again, after the cluster's barrier: no __restrict__.
#define ATTEND(name, cluster, clusters)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) clusters name(                                   \
        const bf16* __restrict__ q, const u8* __restrict__ window, const u8* __restrict__ pending,            \
        const u8* __restrict__ entries, const u32* __restrict__ chosen, const u32* __restrict__ counts,       \
        const u32* __restrict__ positions, const u32* __restrict__ sequence_of,                               \
        const Sequence* __restrict__ sequences, const u32* __restrict__ blocks, float* acc_out, float* stats, \
        const float* __restrict__ sink, const float* __restrict__ frequencies, bf16* __restrict__ o,          \
        u32 first_token, u32 n_heads, u32 ring, u32 ratio, u32 top_k, u32 split_blocks) {                     \
        /* Of `window` and `blocks` nothing that is read here is written in this step. */                     \
        dependency_begin(q, pending, entries, chosen, counts, positions, sequence_of, sequences);             \
        const u32 token = first_token + blockIdx.z;                                                           \
        if (cluster > 0) prepare_turns(frequencies, positions[token]);                                        \
        const Keys keys = keys_of({positions, sequence_of, sequences, blocks}, token, window, pending,        \
                                  entries, chosen, counts, ring, ratio, top_k);                               \
        const Output output = {acc_out, stats, sink, o, first_token, n_heads};                                \
        attend<cluster>(q, keys, split_blocks, output);                                                       \
    }

ATTEND(attn_sparse90, 0, )
EMU_KERNEL(attn_sparse90)
ATTEND(attn_sparse90_c1, 1, )
EMU_KERNEL(attn_sparse90_c1)
ATTEND(attn_sparse90_c2, 2, __cluster_dims__(2))
EMU_KERNEL(attn_sparse90_c2, .cluster = 2)
ATTEND(attn_sparse90_c4, 4, __cluster_dims__(4))
EMU_KERNEL(attn_sparse90_c4, .cluster = 4)
ATTEND(attn_sparse90_c8, 8, __cluster_dims__(8))
EMU_KERNEL(attn_sparse90_c8, .cluster = 8)
